"""From a template of this package to a file that is either old or new, never half."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedistill.store import write_atomic


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package with its values; every text is escaped unless marked safe."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
    )
    return environment.get_template(template).render(values)


def write(path: Path, content: str) -> Path:
    """Replace the file by a page, in one step.

    Raises:
        RunError: the folder cannot be written to.
    """
    write_atomic(path, content.encode())
    return path
