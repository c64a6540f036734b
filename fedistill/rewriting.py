"""Both generations of a state file written anew, each from its own content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from fedistill import store
from fedistill.errors import CheckpointError
from fedistill.types import State

Content: TypeAlias = tuple[State, dict[str, Any]]
"""Arrays and facts, as :func:`fedistill.store.load_state` gives them."""


def read_generations(path: Path) -> dict[Path, Content | None]:
    """The generation before and the newest, where they exist; None for a damaged one.

    Raises:
        CheckpointError: none of those that exist is whole, or one is of a kind that is not opened.
    """
    found: dict[Path, Content | None] = {}
    problem: CheckpointError | None = None
    for place in (store.previous(path), path):
        if not place.exists():
            continue
        try:
            arrays, facts, older = store.load_state(place)
            found[place] = None if older else (arrays, facts)
        except CheckpointError as error:
            if getattr(error, "final", False):
                raise
            found[place], problem = None, error
    if problem is not None and not any(found.values()):
        raise problem
    return found


def newest(generations: dict[Path, Content | None]) -> Content | None:
    """The newest whole one; None where there is none at all."""
    whole = [content for content in generations.values() if content is not None]
    return whole[-1] if whole else None


def rewrite(
    generations: dict[Path, Content | None], change: Callable[[Content], Content]
) -> tuple[list[Path], list[Path]]:
    """Write each generation anew; a damaged one is taken away, for nobody knows what it holds.

    Returns:
        The files that were written, and those that were taken away.

    Raises:
        RunError: the folder cannot be written.
    """
    written, removed = [], []
    for place, content in generations.items():
        if content is None:
            place.unlink()
            removed.append(place)
        else:
            store.write_atomic(place, store.state_bytes(*change(content)), own=True)
            written.append(place)
    return written, removed
