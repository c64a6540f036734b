"""Codes of proxy rows that both sides of a line hold, so that only what changed has to travel."""

from __future__ import annotations

import hashlib

import numpy as np

from fedistill.types import IntArray, Probs, State
from fedistill.wire.delta import grid_of, restore
from fedistill.wire.grid import Codes


class Shelf:
    """The latest codes of each proxy row, as one side sent them and the other decoded them.

    Args:
        codec: whose codes.
        total: number of proxy rows.
        classes: number of classes.

    Attributes:
        codes: ``[total, columns]``.
        round: ``[total]``, in which round the codes of a row were made; 0: there are none.
    """

    def __init__(self, codec: str, total: int, classes: int) -> None:
        grid = grid_of(codec)
        self.codec = codec
        self.classes = classes
        self.codes: Codes = np.zeros((total, grid.columns(classes)), dtype=grid.dtype(classes))
        self.round = np.zeros(total, dtype=np.int32)

    def put(self, rows: IntArray, codes: Codes, number: int) -> None:
        """Keep the codes of some rows, made in round ``number``."""
        self.codes[rows], self.round[rows] = codes, number

    def forget(self, rows: IntArray | slice = slice(None)) -> None:
        """Hold nothing of some rows, or of all."""
        self.codes[rows], self.round[rows] = 0, 0

    def reference(self, rows: IntArray) -> Codes | None:
        """Codes of the rows to compare with: zeros where none are held; None if of no row."""
        return self.codes[rows] if self.round[rows].any() else None

    def probs(self, rows: IntArray) -> Probs:
        """What the codes of some rows stand for, ``[rows, classes]``."""
        return restore(self.codec, self.codes[rows], self.classes)

    def state_dict(self) -> State:
        """Codes and rounds."""
        return {"codes": self.codes, "round": self.round}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.codes, self.round = np.array(state["codes"]), np.array(state["round"])


def mark(rows: IntArray, codes: Codes) -> str:
    """A short checksum of rows and their codes, by which two sides find that they hold the same."""
    digest = hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(codes).tobytes())
    return digest.hexdigest()[:16]
