"""A table as it travels: float32 rows, some of which may be absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedistill.errors import Rejected
from fedistill.types import FloatArray
from fedistill.wire.envelope import count_bits, pack_mask, unpack_mask

FEW_VALUES = 1 << 20
MOST_VALUES = 1 << 26
"""Values of a table, the absent ones counted: a mask costs little to send and much to unfold."""


@dataclass(frozen=True, eq=False)
class Table:
    """Values ``[items, width]``; NaN in the rows of items that nobody had anything for."""

    values: FloatArray

    @property
    def shape(self) -> tuple[int, int]:
        """Items and width."""
        items, width = self.values.shape
        return items, width

    def parts(self) -> list[bytes]:
        """A bit for each absent item, and the values of the others."""
        absent = np.isnan(self.values.sum(axis=1))
        return [pack_mask(absent), self.values[~absent].astype("<f4").tobytes()]

    @classmethod
    def read(cls, shape: Any, parts: list[bytes]) -> Table:
        """The inverse of :meth:`parts`.

        Raises:
            Rejected: ``shape`` or ``nonfinite``.
        """
        if not (
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(side) is int and side >= 0 for side in shape)
        ):
            raise Rejected("shape", "a table has a number of items and a width")
        items, width = shape
        present = items - count_bits(parts[0], items)
        # Each side too: a table of no width has no values, and a mask of all its items.
        huge = max(items, 1) * max(width, 1) > MOST_VALUES
        if huge or 4 * present * width != len(parts[1]):
            raise Rejected("shape", "the values are not as many as the header says")
        absent = unpack_mask(parts[0], items)
        told = np.frombuffer(parts[1], dtype="<f4").reshape(present, width)
        if not np.isfinite(told).all():
            raise Rejected("nonfinite", "NaN or infinity in the table")
        values = np.full((items, width), np.nan, dtype=np.float32)
        values[~absent] = told
        return cls(values)
