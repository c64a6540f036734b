"""Deltas: codes sent as what changed against the codes that the receiver holds.

Sattler et al. 2020 (CFD, arXiv 2012.00632): with a fixed set of rows most codes stay as they
were from round to round, and an entry that did not change costs next to nothing. Lossless: what
is compared and restored is codes, never probabilities, so errors do not add up.

What travels is the difference of every entry (modulo its type), sorted by the code that the
receiver holds, column by column or over all columns, whichever is smaller; the entropy coder
does the rest. Where rows moved too much for that, the codes travel as they are. A delta names the
reference it was made against by a checksum: against another one it is refused, not misread.

Deviation: CFD lists the changed entries and leaves their coding open.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np

from fedistill.errors import Rejected
from fedistill.types import IntArray, Probs
from fedistill.wire.codec import CODECS
from fedistill.wire.entropy import pack, unpack
from fedistill.wire.grid import Codes, Grid, in_parts

PLAIN, SAME = 0, 1
"""First byte of a delta: codes as they are; nothing changed. The others are :data:`ORDERS`."""


def _by_column(held: Codes) -> IntArray:
    within = np.argsort(held, axis=1, kind="stable")
    order: IntArray = (within + np.arange(len(held))[:, None] * held.shape[1]).ravel()
    return order


def _by_code(held: Codes) -> IntArray:
    order: IntArray = np.argsort(held.ravel(), kind="stable")
    return order


ORDERS: Mapping[int, Callable[[Codes], IntArray]] = {2: _by_column, 3: _by_code}
"""In which order the differences stand, given the reference ``[columns, rows]``."""


def grid_of(codec: str) -> Grid:
    """The grid of a codec, whose codes can be compared.

    Raises:
        KeyError: an unknown codec, or one without a grid.
    """
    grid = CODECS[codec].grid
    if grid is None:
        raise KeyError(codec)
    return grid


def quantise(codec: str, probs: Probs, *, seed: int = 0) -> Codes:
    """The codes ``[rows, columns]`` that stand for ``probs [rows, classes]``.

    Args:
        codec: its name.
        probs: the rows.
        seed: of the draws of a codec that draws.

    Raises:
        Rejected: ``nonfinite`` or ``not_probs``.
    """
    grid = grid_of(codec)
    if CODECS[codec].draws:  # for all rows at once, from one seed
        return grid.quantise(probs, seed)
    codes: Codes = in_parts(grid.quantise, probs, probs.shape[1])
    return codes


def restore(codec: str, codes: Codes, classes: int) -> Probs:
    """The float32 probabilities ``[rows, classes]`` that codes stand for."""
    grid = grid_of(codec)
    probs: Probs = in_parts(lambda some: grid.restore(some, classes), codes, classes)
    return probs


def delta_encode(codec: str, codes: Codes, reference: Codes | None = None) -> bytes:
    """Codes as bytes, given what the receiver holds of the same rows; compressed already.

    Args:
        codec: the name of the codec whose codes they are.
        codes: ``[rows, columns]`` from :func:`quantise`.
        reference: codes of the same rows that the receiver holds; None: it holds none.

    Raises:
        Rejected: ``reference``, for one of another shape or type.
    """
    grid = grid_of(codec)
    plain = bytes([PLAIN]) + pack(grid.dump(codes), hard=True)
    if reference is None:
        return plain
    if (reference.shape, reference.dtype) != (codes.shape, codes.dtype):
        raise Rejected("reference", "the codes held are of other rows, or of another codec")
    mark = _checksum(reference)
    if np.array_equal(codes, reference):
        return bytes([SAME]) + mark
    held = _sent(grid, reference)
    difference = (_sent(grid, codes) - held).ravel()
    found = [
        bytes([form]) + mark + pack(_planes(difference[order(held)]), hard=True)
        for form, order in ORDERS.items()
    ]
    return min(plain, *found, key=len)


def delta_decode(
    codec: str, data: bytes, rows: int, classes: int, reference: Codes | None = None
) -> Codes:
    """The codes ``[rows, columns]`` that :func:`delta_encode` was given.

    Memory is bounded by ``rows`` and ``classes``: compare them with what was agreed on before.

    Args:
        codec: the name of the codec whose codes they are.
        data: what came.
        rows: number of rows, from the header.
        classes: number of classes.
        reference: the codes held of these rows; None: there are none.

    Raises:
        Rejected: ``truncated``, ``shape``, ``format`` or ``not_probs`` for what is no delta;
            ``reference`` for one against other codes than those held.
    """
    grid = grid_of(codec)
    form = data[0] if data else -1
    if form == PLAIN:
        return grid.load(unpack(data[1:], rows * grid.row_bytes(classes)), rows, classes)
    if form != SAME and form not in ORDERS:
        raise Rejected("format", "not a delta")
    if (
        reference is None
        or reference.shape != (rows, grid.columns(classes))
        or reference.dtype != np.dtype(grid.dtype(classes))
        or data[1:5] != _checksum(reference)
    ):
        raise Rejected("reference", "a delta against other codes than those held")
    if form == SAME:
        if len(data) > 5:
            raise Rejected("shape", "something behind the delta")
        return reference.copy()
    held = _sent(grid, reference)
    difference = np.empty(held.size, dtype=held.dtype)
    content = unpack(data[5:], held.size * held.itemsize)
    planes = np.frombuffer(content, dtype=np.uint8).reshape(held.itemsize, held.size)
    difference[ORDERS[form](held)] = np.ascontiguousarray(planes.T).view(held.dtype)[:, 0]
    codes = np.ascontiguousarray((held + difference.reshape(held.shape)).T)
    if grid.units:
        codes = _with_last(codes, grid.units)
    grid.check(codes, classes)
    return codes


def _checksum(reference: Codes) -> bytes:
    return zlib.crc32(np.ascontiguousarray(reference).tobytes()).to_bytes(4, "little")


def _sent(grid: Grid, codes: Codes) -> Codes:
    """What is compared, ``[columns, rows]``: a last column that the others tell is not."""
    return np.ascontiguousarray((codes[:, :-1] if grid.units else codes).T)


def _planes(values: Codes) -> bytes:
    """All first bytes, then all second: where changes are small the later ones are zeros."""
    return values.view(np.uint8).reshape(len(values), -1).T.tobytes()


def _with_last(codes: Codes, units: int) -> Codes:
    last = units - codes.sum(axis=1, dtype=np.int64)
    if len(last) and last.min() < 0:
        raise Rejected("not_probs", f"the codes of a row must sum to {units}")
    return np.concatenate([codes, last[:, None].astype(codes.dtype)], axis=1)
