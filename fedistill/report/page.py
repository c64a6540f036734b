"""From a template of this package to a file that is either old or new, never half."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedistill.errors import RunError


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package with its values; every text is escaped unless marked safe."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
    )
    return environment.get_template(template).render(values)


def write(path: Path, content: str) -> Path:
    """Write by a temporary name in the same folder, synced, then renamed.

    Raises:
        RunError: the folder cannot be written to.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"expected a folder that can be written to, found {error.strerror}: "
                           f"{path.parent}; free it or name another") from None
        raise
    return path
