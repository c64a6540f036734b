"""That a person left: what stays on record of it, and keeps older files from bringing them back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedistill.types import State


@dataclass(frozen=True, order=True)
class Tombstone:
    """What a buffer remembers of somebody it has erased: not the name, but how to know it again.

    The salt lies beside the hash. It keeps files of different buffers from being joined on it, but
    not somebody who holds the file from trying names: ids should not be guessable.

    Attributes:
        salt: hashed before the name.
        mark: sha256 (hex) of salt and name.
        time: on the buffer's clock.
        rows: how many were erased.
        digest: sha256 (hex) over the rows that were left.
    """

    salt: int
    mark: str
    time: float
    rows: int
    digest: str

    def marks(self, subject: str) -> bool:
        """Whether this is the stone of that subject."""
        return mark_of(subject, self.salt) == self.mark


@dataclass(frozen=True)
class ErasureReceipt:
    """What an erasure did.

    Attributes:
        tombstone: what stays on record.
        recompute: ids of the rows left that carry an ensemble's soft targets. Models that had
            seen the person may have made them: whoever made them has to make them anew. (Logits
            of other rows are the student's own, and the student has seen the person, too.)
    """

    tombstone: Tombstone
    recompute: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows were erased, each with its logits, soft targets and features."""
        return self.tombstone.rows


def mark_of(subject: str, salt: int) -> str:
    """sha256 (hex) of a subject's name under a salt."""
    return hashlib.sha256(salt.to_bytes(8, "little") + subject.encode()).hexdigest()


def erased(subjects: npt.NDArray[np.str_], stones: Iterable[Tombstone]) -> npt.NDArray[np.bool_]:
    """``[n]`` whether a row's subject has a tombstone; each name is hashed once for each salt."""
    by_salt: dict[int, set[str]] = {}
    for stone in stones:
        by_salt.setdefault(stone.salt, set()).add(stone.mark)
    if not by_salt:
        return np.zeros(len(subjects), dtype=bool)
    names, place = np.unique(subjects, return_inverse=True)
    found = [
        any(mark_of(name, salt) in marks for salt, marks in by_salt.items())
        for name in names.tolist()
    ]
    return np.array(found, dtype=bool)[place]


def digest_of(columns: State) -> str:
    """sha256 (hex) over names, shapes and content."""
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        digest.update(f"{name}{column.dtype.str}{column.shape}".encode())
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def stones_to_state(stones: Sequence[Tombstone]) -> dict[str, npt.NDArray[np.uint64 | np.float64]]:
    """Tombstones as arrays."""
    words = [
        [stone.salt, stone.rows, *_words(stone.mark), *_words(stone.digest)] for stone in stones
    ]
    return {
        "tombstones.words": np.array(words, dtype=np.uint64).reshape(len(stones), 10),
        "tombstones.times": np.array([stone.time for stone in stones], dtype=np.float64),
    }


def stones_from_state(state: State) -> list[Tombstone]:
    """What :func:`stones_to_state` was given."""
    return [
        Tombstone(int(row[0]), _hex(row[2:6]), float(time), int(row[1]), _hex(row[6:]))
        for row, time in zip(state["tombstones.words"], state["tombstones.times"], strict=True)
    ]


def _words(text: str) -> list[int]:
    return [int(text[k : k + 16], 16) for k in range(0, 64, 16)]


def _hex(words: npt.NDArray[np.uint64]) -> str:
    return "".join(f"{int(word):016x}" for word in words)
