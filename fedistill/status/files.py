"""Files of a run or a site that may be absent, torn, or being written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedistill.errors import RunError
from fedistill.report.words import clean


def text(path: Path) -> str:
    """What the file holds, empty where there is none.

    Raises:
        RunError: it is there and cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunError(
            f"expected a readable file, found {clean(path, 200)} ({error.strerror}): "
            "check its permissions"
        ) from None


def toml(path: Path) -> Mapping[str, Any]:
    """The tables of the file; empty where there are none."""
    try:
        return tomllib.loads(text(path))
    except tomllib.TOMLDecodeError:
        return {}


def table(content: str) -> Mapping[str, Any]:
    """The JSON object in a text; empty where it holds none, or part of one."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
