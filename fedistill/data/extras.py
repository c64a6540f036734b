"""Packages that only some sources need, imported when such a source is read."""

from __future__ import annotations

import importlib
from typing import Any

from fedistill.errors import MissingExtra


def optional(module: str, extra: str, need: str, package: str = "") -> Any:
    """Import ``module``, or say which extra of fedistill brings it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtra(package or module.partition(".")[0], extra, need) from None
