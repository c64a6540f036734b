"""Grids: probabilities as small whole numbers, which is what is sent and what deltas compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.errors import Rejected
from fedistill.types import FloatArray, IntArray, Probs

CELLS = 1 << 20
"""Values that are converted at a time: 8 MB of float64."""
Codes = IntArray
"""Unsigned whole numbers ``[rows, columns]``; what a column means is the grid's business."""


@dataclass(frozen=True)
class Grid:
    """Probabilities to codes and back, and codes to bytes of a known size and back.

    Attributes:
        quantise: ``probs [rows, classes]`` to codes. Raises :class:`Rejected` (``nonfinite``,
            ``not_probs``) for what are no probabilities.
        restore: codes that passed ``check`` and the number of classes to float32 probabilities.
        check: refuses codes ``(codes, classes)`` that no probabilities could have given.
        dump: codes to bytes, :attr:`row_bytes` for every row.
        load: bytes of that size to codes ``(data, rows, classes)``; checked, or
            :class:`Rejected`.
        columns: codes of a row, given the number of classes.
        row_bytes: bytes of a row before compression, given the number of classes.
        dtype: of the codes, given the number of classes.
        units: what the codes of a row sum to, so that the last column need not be sent; 0 where
            they have no fixed sum.
    """

    quantise: Callable[..., Codes]
    restore: Callable[[Codes, int], Probs]
    check: Callable[[Codes, int], None]
    dump: Callable[[Codes], bytes]
    load: Callable[[bytes, int, int], Codes]
    columns: Callable[[int], int]
    row_bytes: Callable[[int], int]
    dtype: Callable[[int], npt.DTypeLike]
    units: int = 0

    def encode(self, probs: Probs) -> bytes:
        """Probabilities ``[rows, classes]`` to bytes."""
        return self.dump(self.quantise(probs))

    def decode(self, data: bytes, rows: int, classes: int) -> Probs:
        """Bytes to float32 probabilities ``[rows, classes]``, or :class:`Rejected`."""
        return self.restore(self.load(data, rows, classes), classes)


def in_parts(convert: Callable[[Any], Any], table: Any, width: int) -> Any:
    """What a conversion that takes each row by itself makes of a table, some rows at a time.

    Args:
        convert: from rows to rows.
        table: ``[rows, columns]``.
        width: values of a row where they are most; floats of many rows take much memory.
    """
    if len(table) * width <= CELLS:
        return convert(table)
    size = max(CELLS // width, 1)
    return np.concatenate(
        [convert(table[start : start + size]) for start in range(0, len(table), size)]
    )


def sound(probs: Probs) -> Probs:
    """The rows, if they are finite and not negative.

    Raises:
        Rejected: ``nonfinite`` or ``not_probs``.
    """
    if not np.isfinite(probs).all():
        raise Rejected("nonfinite", "NaN or infinity among the predictions")
    if probs.min(initial=0) < 0:
        raise Rejected("not_probs", "probabilities must not be negative")
    return probs


def shares(probs: Probs) -> FloatArray:
    """The rows in float64, each divided by its sum.

    Raises:
        Rejected: as :func:`sound`, and for a row of zeros.
    """
    values = np.asarray(sound(probs), dtype=np.float64)
    sums = values.sum(axis=1, keepdims=True)
    if len(values) and not (sums > 0).all():
        raise Rejected("not_probs", "a row of zeros has no shares")
    result: FloatArray = values / sums
    return result


def measured(data: bytes, size: int) -> bytes:
    """The bytes, if they are as many as the header promises.

    Raises:
        Rejected: ``shape``.
    """
    if len(data) != size:
        raise Rejected("shape", f"expected {size} bytes of codes, found {len(data)}")
    return data


def label_type(classes: int) -> npt.DTypeLike:
    """The smallest little-endian type that holds every class number: 1, 2 or 4 bytes."""
    return "<u1" if classes <= 1 << 8 else "<u2" if classes <= 1 << 16 else "<u4"


def width(classes: int) -> int:
    """Bytes of a class number."""
    return np.dtype(label_type(classes)).itemsize
