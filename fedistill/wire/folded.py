"""Codes of many rows in little memory, read a few rows at a time.

A payload is compressed as a whole and its bytes need not stand row by row, so none of its rows
can be read without all others. Codes can. Where they are large and compress well they are kept
compressed, a block of rows each by itself; else as they are.
"""

from __future__ import annotations

import zlib

import numpy as np

from fedistill.types import IntArray
from fedistill.wire.grid import Codes

SMALL = 1 << 20
"""Bytes of codes that are not worth folding."""
BLOCK = 1 << 15
"""Bytes of codes in a block: what zlib looks back on anyway, and little to unfold for one row."""


class Folded:
    """Codes ``[rows, columns]`` that are read by row.

    Args:
        codes: as they were decoded; not to be written to any more.

    Attributes:
        nbytes: what is kept.
    """

    def __init__(self, codes: Codes) -> None:
        self.shape: tuple[int, ...] = codes.shape
        self._codes: Codes | None = codes
        self._blocks: list[bytes] = []
        self._latest: tuple[int, Codes] = -1, np.empty(0, dtype=codes.dtype)
        self._size = max(BLOCK // max(codes[:1].nbytes, 1), 1)
        self._dtype = codes.dtype
        self.nbytes = codes.nbytes
        # The first block tells whether the others are worth the time.
        if codes.nbytes > SMALL and 2 * len(self._fold(codes, 0)) < codes[: self._size].nbytes:
            starts = range(0, len(codes), self._size)
            self._blocks = [self._fold(codes, start) for start in starts]
            self._codes = None
            self.nbytes = sum(map(len, self._blocks))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | IntArray) -> Codes:
        """The codes of some rows."""
        if self._codes is not None:
            return self._codes[rows]
        places = np.arange(len(self))[rows]
        codes = np.empty((len(places), *self.shape[1:]), dtype=self._dtype)
        for block in np.unique(places // self._size):
            here = places // self._size == block
            codes[here] = self._unfold(block)[places[here] % self._size]
        return codes

    def _fold(self, codes: Codes, start: int) -> bytes:
        return zlib.compress(codes[start : start + self._size].tobytes(), 1)

    def _unfold(self, block: int) -> Codes:
        """A block; the latest is held, for whoever reads in turn goes on in it."""
        if self._latest[0] != block:
            content = zlib.decompress(self._blocks[block])
            codes = np.frombuffer(content, dtype=self._dtype).reshape(-1, *self.shape[1:])
            self._latest = block, codes
        return self._latest[1]
