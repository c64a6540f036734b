"""Opacus, imported without its side effect: it would make all logs of the program appear."""

from __future__ import annotations

import importlib
import logging


def import_opacus() -> None:
    """Import Opacus, and put the root logger back as it was.

    ``opacus.utils.module_utils`` calls ``logging.basicConfig`` when it is imported (1.6.0): from
    then on every warning of every library would be printed in its format.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    importlib.import_module("opacus")
    root.handlers[:] = handlers
    root.setLevel(level)
