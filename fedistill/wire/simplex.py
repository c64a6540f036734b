"""k-bit simplex: every row becomes ``2**k - 1`` units, dealt out to the classes.

Sattler, Marban, Rischke and Samek 2020 (CFD, arXiv 2012.00632): predictions quantised so that
they still sum to 1; with one bit that is the number of the top class. Rounding is by largest
remainder: every class gets the whole units of its share, and those left over go to the largest
fractions, the lower class first where two are equal. All of it is whole-number arithmetic after
one rounding at 2**-32 of a unit, so that the same rows give the same bytes on every machine.

Deviation: a class without a unit comes back as :func:`floor_of`, not as 0, and its row is
normalised. A logarithm of what arrives stays finite, and one client cannot veto a class in a
mean of logits. Coding again what was decoded changes nothing.

The bytes stand class by class and, within a class, sorted by the units that a row has left to
deal out: the receiver knows them by then. A row that has dealt out its units is left out, and so
is the last class; zeros fill up to one byte a value, which is how long the content is before
compression. What was likely in like circumstances then stands together, and a general coder
finds it (:mod:`fedistill.wire.entropy`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedistill.errors import Rejected
from fedistill.seeding import generator
from fedistill.types import IntArray, Probs
from fedistill.wire.grid import Codes, Grid, label_type, measured, shares, width

FLOOR = 1e-4
"""Probability of a class without a unit, unless there are many classes."""
FINE = 32
"""Bits behind the point of a unit that decide on remainders."""


def simplex(bits: int) -> Grid:
    """The grid of ``2**bits - 1`` units a row.

    Args:
        bits: 1 to 8.

    >>> grid = simplex(2)
    >>> grid.quantise(np.array([[0.5, 0.3, 0.2], [0.9, 0.08, 0.02]]))
    array([[1, 1, 1],
           [3, 0, 0]], dtype=uint8)
    """
    if bits == 1:
        return LABELS
    units = (1 << bits) - 1

    def check(codes: Codes, classes: int) -> None:
        if (codes.sum(axis=1, dtype=np.int64) != units).any():
            raise Rejected("not_probs", f"the codes of a row must sum to {units}")

    return Grid(
        quantise=lambda probs: deal(probs, units),
        restore=lambda codes, classes: _restore(codes, units),
        check=check,
        dump=lambda codes: _dump(codes, units),
        load=lambda data, rows, classes: _load(data, rows, classes, units),
        columns=lambda classes: classes,
        row_bytes=lambda classes: classes,
        dtype=lambda classes: np.uint8,
        units=units,
    )


def floor_of(units: int, classes: int) -> float:
    """What a class without a unit comes back as.

    Small enough that all floors of a row are at most 1 %, and less than half a unit: that is why
    coding again changes nothing.
    """
    return min(FLOOR, min(0.01, 0.4 / units) / classes)


def deal(probs: Probs, units: int) -> Codes:
    """Units of every class, ``[rows, classes]`` uint8; each row sums to ``units``.

    Raises:
        Rejected: ``nonfinite`` or ``not_probs``.
    """
    classes = probs.shape[1]
    fine = np.rint(shares(probs) * (units << FINE)).astype(np.int64)
    whole = fine >> FINE
    missing = units - whole.sum(axis=1)  # [rows], 0 to classes
    # One key orders a row: the remainder, then the lower class. No two are equal.
    keys = (fine & ((1 << FINE) - 1)) * classes + np.arange(classes - 1, -1, -1)
    ranked = np.sort(keys, axis=1)
    least = np.take_along_axis(ranked, (classes - np.maximum(missing, 1))[:, None], axis=1)
    whole += (keys >= least) & (missing > 0)[:, None]
    return whole.astype(np.uint8)


def _restore(codes: Codes, units: int) -> Probs:
    values = np.maximum(codes / units, floor_of(units, max(1, codes.shape[1])))
    probs: Probs = (values / values.sum(axis=1, keepdims=True)).astype(np.float32)
    return probs


def _order(left: IntArray) -> Iterator[IntArray]:
    """For class after class the rows that have units left, fewest first; ``left`` moves on."""
    while True:
        live = np.flatnonzero(left)
        yield live[np.argsort(left[live], kind="stable")]


def _dump(codes: Codes, units: int) -> bytes:
    rows, classes = codes.shape
    content = np.zeros(rows * classes, dtype=np.uint8)
    left = np.full(rows, units, dtype=np.uint8)
    place = 0
    for column, order in zip(np.ascontiguousarray(codes.T[:-1]), _order(left), strict=False):
        content[place : place + len(order)] = column[order]
        place += len(order)
        left -= column
        if not len(order):
            break
    return content.tobytes()


def _load(data: bytes, rows: int, classes: int, units: int) -> Codes:
    content = np.frombuffer(measured(data, rows * classes), dtype=np.uint8)
    codes = np.zeros((classes, rows), dtype=np.uint8)
    left = np.full(rows, units, dtype=np.uint8)
    place = 0
    for column, order in zip(codes[:-1], _order(left), strict=False):
        found = content[place : place + len(order)]
        if (found > left[order]).any():
            raise Rejected("not_probs", f"the codes of a row must sum to {units}")
        column[order] = found
        place += len(order)
        left -= column
        if not len(order):
            break
    if content[place:].any():
        raise Rejected("not_probs", "codes behind the last row")
    if classes:
        codes[-1] = left
    return np.ascontiguousarray(codes.T)


# --- one bit: the label --------------------------------------------------------------------------


def top_class(probs: Probs) -> Codes:
    """The number of the largest class, the lowest of equals; ``[rows, 1]``.

    Raises:
        Rejected: ``nonfinite`` or ``not_probs``.
    """
    return deal_one(probs, np.asarray(shares(probs).argmax(axis=1)))


def deal_one(probs: Probs, labels: IntArray) -> Codes:
    """Class numbers ``[rows]`` as codes ``[rows, 1]`` of the smallest type that fits."""
    return labels.astype(label_type(probs.shape[1]))[:, None]


def one_hot(codes: Codes, classes: int) -> Probs:
    """Rows of zeros with a one at the class of each code; ``[rows, classes]`` float32."""
    probs: Probs = np.zeros((len(codes), classes), dtype=np.float32)
    probs[np.arange(len(codes)), codes[:, 0]] = 1
    return probs


def _restore_labels(codes: Codes, classes: int) -> Probs:
    low = floor_of(1, max(1, classes))
    sum_of_row = 1 + low * (classes - 1)
    probs: Probs = np.full((len(codes), classes), low / sum_of_row, dtype=np.float32)
    probs[np.arange(len(codes)), codes[:, 0]] = 1 / sum_of_row
    return probs


def check_labels(codes: Codes, classes: int) -> None:
    """Refuse class numbers that do not exist.

    Raises:
        Rejected: ``not_probs``.
    """
    if codes.size and int(codes.max()) >= classes:
        raise Rejected("not_probs", f"a class number of {classes} or more")


def _load_labels(data: bytes, rows: int, classes: int) -> Codes:
    codes = np.frombuffer(measured(data, rows * width(classes)), dtype=label_type(classes))
    check_labels(codes, classes)
    return codes.reshape(rows, 1)


LABELS = Grid(
    quantise=top_class,
    restore=_restore_labels,
    check=check_labels,
    dump=lambda codes: codes.tobytes(),
    load=_load_labels,
    columns=lambda classes: 1,
    row_bytes=width,
    dtype=label_type,
)
"""One unit a row: a label, sent as its number."""


def draw(probs: Probs, seed: int = 0) -> Codes:
    """A class drawn from every row, ``[rows, 1]``: its one-hot row is ``probs`` on average.

    The draws are those of ``seed``, so that a step repeated gives the same bytes. Let every
    client and round have a seed of its own: with a common one all would err alike, and a mean
    over clients would not get better with their number. Whoever knows the seed learns more from
    a label than its class; sampling is no privacy mechanism.

    Raises:
        Rejected: ``nonfinite`` or ``not_probs``.
    """
    edges = np.cumsum(shares(probs), axis=1)
    edges /= edges[:, -1:]  # a last class of probability 0 is then out of reach
    point = generator(seed, "sampled-label").random(len(edges))[:, None]
    return deal_one(probs, (edges[:, :-1] <= point).sum(axis=1))


SAMPLED = Grid(
    quantise=draw,
    restore=one_hot,
    check=check_labels,
    dump=LABELS.dump,
    load=_load_labels,
    columns=LABELS.columns,
    row_bytes=width,
    dtype=label_type,
)
"""One class drawn from each row; decoded without a floor, so that it is right on average."""
