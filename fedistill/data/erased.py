"""People who are to be forgotten: what is noted of them, and rows without theirs.

A site keeps one file ``tombstones.json`` beside its state. It holds a random key and, under it, a
hash of each person's name. Whoever has the file can tell whether a name that he tries is in it; a
hash alone, as receipts show it, tells nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedistill import store
from fedistill.errors import CheckpointError, FedistillError, RunError
from fedistill.types import IntArray, Rows

TOMBSTONES = "tombstones.json"
"""The file in a site's folder for what outlives runs: ``state`` of a real site, ``sites/ID``."""

LEFT_OUT = "left-out.json"
"""Beside it: by which digests the rows that are left were known before."""
MOST_NOTED = 100


@dataclass(frozen=True)
class Tombstones:
    """The people whom a site has forgotten.

    Attributes:
        key: of the hashes, 64 hex digits, drawn once for each site.
        marks: HMAC-SHA256 (hex) of each name under the key, in the order in which they left.
    """

    key: str
    marks: tuple[str, ...] = ()

    def mark(self, subject: str) -> str:
        """What stands for a name."""
        return hmac.new(bytes.fromhex(self.key), subject.encode(), hashlib.sha256).hexdigest()

    def places(self, subjects: npt.NDArray[np.str_]) -> IntArray:
        """``[n]`` at which place each left, from 0; -1 of those who did not."""
        place = {mark: number for number, mark in enumerate(self.marks)}
        names, numbers = np.unique(subjects, return_inverse=True)  # each name is hashed once
        found = [place.get(self.mark(name), -1) for name in names.tolist()]
        return np.array(found, dtype=np.int64)[numbers]


def read_tombstones(folder: Path) -> Tombstones | None:
    """The tombstones of a site; None where nobody was ever forgotten.

    Raises:
        CheckpointError: the file is damaged: without it the forgotten would come back.
    """
    path = folder / TOMBSTONES
    try:
        told = json.loads(path.read_text(encoding="ascii"))
        key, marks = told["key"], told["marks"]
        if any(len(bytes.fromhex(text)) != 32 for text in (key, *marks)):
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path}: expected the tombstones of people who are to be forgotten, found a damaged "
            "file: put a copy back, without it their rows would be used again"
        ) from None
    return Tombstones(key, tuple(marks))


def bury(folder: Path, subjects: Iterable[str]) -> list[str]:
    """Note that these people are to be forgotten, in a file for this user's eyes alone.

    Returns:
        The mark of each.

    Raises:
        FedistillError: the empty name, which is nobody's.
        CheckpointError: the tombstones that are there are damaged.
        RunError: the folder cannot be written.
    """
    names = list(subjects)
    if "" in names:
        raise FedistillError("forget: expected a subject, found the empty one: name the person")
    old = read_tombstones(folder) or Tombstones(secrets.token_hex(32))
    marks = [old.mark(name) for name in names]
    told = {"key": old.key, "marks": list(dict.fromkeys((*old.marks, *marks)))}
    store.write_atomic(folder / TOMBSTONES, (json.dumps(told, indent=2) + "\n").encode())
    (folder / TOMBSTONES).chmod(0o600)
    return marks


def without_erased(rows: Rows, folder: Path) -> Rows:
    """The rows of all who were not forgotten; the very same object where nobody's are left out.

    Where some are, it is noted by which digests the rest was known before: see :func:`known_as`.

    Args:
        rows: as they were read; rows whose owner is not told stay.
        folder: where the tombstones of the site lie.

    Raises:
        CheckpointError: the tombstones are damaged.
    """
    stones = read_tombstones(folder)
    if stones is None or rows.subject is None:
        return rows
    places = stones.places(rows.subject)
    if (places < 0).all():
        return rows
    left = rows.take(np.flatnonzero(places < 0))
    _note(folder, rows, places, left)
    return left


def known_as(rows: Rows, folder: Path) -> list[str]:
    """Digests of what these rows were while they held those of people who were forgotten since.

    A learner that knows rows by their content takes them for new ones when somebody's are missing:
    by these it can be told that it has met them.

    Args:
        rows: as :func:`without_erased` gave them.
        folder: where the tombstones of the site lie.
    """
    noted = _noted(folder)
    return noted.get(fingerprint(rows), []) if noted else []


def _note(folder: Path, rows: Rows, places: IntArray, left: Rows) -> None:
    noted, now = _noted(folder), fingerprint(left)
    if now in noted:
        return
    # As they were before each of the people left; a hash that is asked for once a tombstone.
    before = [
        fingerprint(rows.take(np.flatnonzero((places < 0) | (places >= place))))
        for place in np.unique(places[places >= 0])
    ]
    newest = [*noted.items(), (now, before)][-MOST_NOTED:]
    with contextlib.suppress(RunError):  # at worst, rows are remembered twice
        store.write_atomic(folder / LEFT_OUT, (json.dumps(dict(newest)) + "\n").encode())


def _noted(folder: Path) -> dict[str, list[str]]:
    try:
        noted = json.loads((folder / LEFT_OUT).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def fingerprint(rows: Rows) -> str:
    """What rows are known by to learners: their content."""
    from fedistill.distill import arriving  # which imports torch

    return arriving.fingerprint(rows)
