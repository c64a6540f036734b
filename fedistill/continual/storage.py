"""Where a buffer's rows lie: flat columns, allocated once, written in one go for a whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedistill.types import IntArray

Columns: TypeAlias = dict[str, npt.NDArray[Any]]
"""Named columns of equal length ``[n, ...]``."""

RAGGED = {"logits": "logits_classes", "soft": "soft_classes"}
"""Columns whose rows have different widths, and the columns that say how wide each row is."""


class Table:
    """Rows in slots 0 to capacity - 1; a slot that is not in use holds zeros.

    Attributes:
        columns: by name, ``[capacity, ...]``.
        used: ``[capacity]`` whether there is a row.
    """

    def __init__(self, capacity: int) -> None:
        self.columns: Columns = {}
        self.used = np.zeros(capacity, dtype=bool)

    def put(self, slots: IntArray, rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write rows ``[n, ...]`` over whatever is in ``slots [n]``; columns left out become 0."""
        for name, values in rows.items():
            self._make_room(name, values)
        for name, column in self.columns.items():
            if name not in rows:
                column[slots] = np.zeros((), column.dtype)
            elif name in RAGGED:
                column[slots, rows[name].shape[1] :] = 0
                column[slots, : rows[name].shape[1]] = rows[name]
            else:
                column[slots] = rows[name]
        self.used[slots] = True

    def take(self, slots: IntArray) -> Columns:
        """Copies of the rows in ``slots``; ragged columns are as wide as their widest row."""
        rows = {name: column[slots] for name, column in self.columns.items()}
        for name, width in RAGGED.items():
            if name in rows:
                rows[name] = rows[name][:, : int(rows[width].max(initial=0))]
        return rows

    def clear(self, slots: IntArray) -> None:
        """Empty the slots; nothing of their rows is left in them."""
        if not len(slots):
            return
        for column in self.columns.values():
            column[slots] = np.zeros((), column.dtype)
        self.used[slots] = False

    def free(self, count: int) -> IntArray:
        """The first ``count`` empty slots."""
        return np.flatnonzero(~self.used)[:count]

    def _make_room(self, name: str, values: npt.NDArray[Any]) -> None:
        """Make or widen a column for values ``[n, ...]``: longer names, more classes."""
        held = self.columns.get(name)
        if held is None:
            shape = (len(self.used), *values.shape[1:])
            self.columns[name] = np.zeros(shape, dtype=values.dtype)
        elif name in RAGGED and held.shape[1] < values.shape[1]:
            wider = np.zeros((len(held), values.shape[1]), dtype=held.dtype)
            wider[:, : held.shape[1]] = held
            self.columns[name] = wider
        elif held.dtype.kind == "U" and held.dtype.itemsize < values.dtype.itemsize:
            self.columns[name] = held.astype(values.dtype)


def rows_of(columns: Mapping[str, npt.NDArray[Any]], index: npt.NDArray[Any]) -> Columns:
    """Rows of columns by number or by mask."""
    return {name: column[index] for name, column in columns.items()}


def texts_to_numbers(texts: npt.NDArray[np.str_]) -> npt.NDArray[np.uint32]:
    """Texts ``[n]`` as code points ``[n, longest]``, for a state that holds numbers only."""
    longest = int(np.char.str_len(texts).max(initial=0))
    narrow = np.ascontiguousarray(texts.astype(f"<U{max(longest, 1)}"))
    return narrow.view(np.uint32).reshape(len(texts), max(longest, 1))


def numbers_to_texts(numbers: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    """What :func:`texts_to_numbers` was given."""
    points = np.ascontiguousarray(numbers, dtype=np.uint32)
    return points.view(f"<U{points.shape[1]}").reshape(len(points))
