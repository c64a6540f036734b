"""The folder of a run: what it is called, who may write there, and who shows what happens in it.

No torch here: the process that merely waits for a run needs none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from fedistill.errors import RunError

Summary = dict[str, Any]
EVENTS = "events.jsonl"
"""The log of a run or of a site, a line for each event."""


class Watch(Protocol):
    """Something that shows a run while it goes on."""

    def add(self, row: Mapping[str, Any]) -> None:
        """A round is done."""

    def advance(self, label: str, done: int, total: int) -> None:
        """Something within a round is done."""


class _Silent:
    def add(self, row: Mapping[str, Any]) -> None:
        del row

    def advance(self, label: str, done: int, total: int) -> None:
        del label, done, total


Show = Callable[[str, int], AbstractContextManager[Watch]]


def silent(title: str, rounds: int) -> AbstractContextManager[Watch]:
    """Show nothing."""
    del title, rounds
    return contextlib.nullcontext(_Silent())


def guard(folder: Path, *, resume: bool) -> None:
    """Refuse to write over a run, or into a folder of other things.

    Raises:
        RunError: the folder holds a run and ``resume`` is not set, or holds something else.
    """
    if not folder.is_dir():
        return
    a_run = (folder / "config.toml").exists()
    if a_run and not resume:
        raise RunError(
            f"{folder} holds a run already: add --resume to go on with it, or choose another "
            "folder with --out"
        )
    if not a_run and {entry.name for entry in folder.iterdir()} - {".lock"}:
        raise RunError(
            f"{folder} is not empty and holds no run: choose a folder of its own with --out"
        )


def default_folder(name: str, *, resume: bool) -> Path:
    """``runs/NAME``; the next free ``runs/NAME-2`` ... for a new run, the newest for a resumed."""
    base, number = Path("runs") / name, 1
    taken: Path | None = None
    while True:
        folder = base if number == 1 else base.with_name(f"{name}-{number}")
        if not (folder / "config.toml").exists():
            return taken if resume and taken else folder
        taken, number = folder, number + 1
