"""Predictions of many clients, a few proxy rows at a time: what does not fit memory at once.

100 clients, 10,000 rows and 1,000 classes are 8 GB of float64. The target of a row mostly depends
on what is said of that row alone, so the rows are taken in turn, and the result is the same to the
last bit. A rule declares what it can do:

* :func:`rowwise`: a row's target depends on that row of all clients alone. It is called with some
  rows at a time;
* :func:`chunkwise`: it gets a :class:`Chunked` in place of an array, and reads slices of its rows,
  in as many passes as it likes;
* without a declaration it gets all in one array, as large as that may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np

from fedistill.errors import FedistillError
from fedistill.types import FloatArray, IntArray, Logits, Probs

RuleT = TypeVar("RuleT", bound=Callable[..., Any])

PART = 1 << 20
"""Values that a row-wise rule is given at a time: 8 MB, so that what it makes of them stays in a
cache; 1,048 rows of 100 clients and 10 classes."""
WHOLE = 1 << 24
"""Values of which all are held at once, and so made once only: 128 MB."""
WINDOW = 1 << 22
"""Values held at a time where there are more."""
HUGE = 1 << 27
"""Values in one array beyond which it is worth a warning: 1 GB, and a rule makes copies."""

# --- what a rule declares ------------------------------------------------------------------------


def rowwise(rule: RuleT) -> RuleT:
    """Declare that each row of the result depends on that row of the arguments alone."""
    return _declared(rule, "rows")


def chunkwise(rule: RuleT) -> RuleT:
    """Declare that a rule takes a :class:`Chunked` in place of an array."""
    return _declared(rule, "chunks")


def _declared(rule: RuleT, how: str) -> RuleT:
    rule.reads = how  # type: ignore[attr-defined]
    return rule


def reads(rule: Callable[..., Any]) -> str:
    """What a rule declares: ``rows``, ``chunks``, or ``all`` where it declares nothing."""
    while isinstance(rule, partial):
        rule = rule.func
    return str(getattr(rule, "reads", "all"))


# --- rows in turn --------------------------------------------------------------------------------


def parts(rows: int, width: int, cells: int = 0) -> Iterator[slice]:
    """Rows in turn, as many at a time as have ``cells`` values of ``width`` a row; 0: :data:`PART`.

    Two at least, where there are two: numpy sums over clients in another order where there is one
    row alone, and the last bit would tell where a part ended.

    >>> list(parts(7, width=10, cells=30))
    [slice(0, 3, None), slice(3, 7, None)]
    """
    size = max((cells or PART) // max(width, 1), 2)
    start = _end(0, rows, size)
    yield slice(0, start)
    while start < rows:
        stop = _end(start, rows, size)
        yield slice(start, stop)
        start = stop


def _end(start: int, rows: int, size: int) -> int:
    """Where a part of about ``size`` rows ends, so that no single row is left over."""
    return rows if rows - start <= size + 1 else start + size


def of_rows(values: Any, rows: slice) -> Any:
    """Weights of some rows, whose last axis are the rows; weights ``[clients]`` are of all."""
    return values if np.ndim(values) == 1 else np.asarray(values)[:, rows]


def by_parts(
    rule: Callable[[Logits, FloatArray], Probs],
    logits: Logits | Chunked,
    weights: FloatArray,
) -> Probs:
    """What a row-wise rule makes of all rows, some at a time."""
    clients, rows, classes = logits.shape
    return joined(
        rows,
        (
            (part, rule(logits[:, part], of_rows(weights, part)))
            for part in parts(rows, clients * classes)
        ),
    )


def joined(rows: int, found: Iterable[tuple[slice, FloatArray]]) -> FloatArray:
    """One array of what was found for parts of the rows.

    Raises:
        FedistillError: the parts have different shapes.
    """
    whole: FloatArray | None = None
    for part, some in found:
        if part == slice(0, rows):
            return some
        if whole is None:
            whole = np.empty((rows, *some.shape[1:]), dtype=some.dtype)
        if some.shape[1:] != whole.shape[1:]:
            raise FedistillError(
                f"a row-wise rule must return one shape for every row, returned "
                f"{list(whole.shape[1:])} and {list(some.shape[1:])}: declare it chunkwise"
            )
        whole[part] = some
    return np.empty((0, 0)) if whole is None else whole


# --- the predictions -----------------------------------------------------------------------------


class Chunked:
    """An array ``[clients, rows, classes]`` of which some rows are made at a time.

    Where all of it is small it is made once. Else what was read last is held, with the rows
    behind it, so that reading in turn makes each row once.

    Args:
        shape: clients, rows, classes.
        make: from a slice of the rows, or from row numbers, to ``[clients, some rows, classes]``.

    >>> logits = Chunked((1, 3, 2), lambda rows: np.arange(6.0).reshape(1, 3, 2)[:, rows])
    >>> logits[:, 1:2]
    array([[[2., 3.]]])
    """

    def __init__(
        self, shape: tuple[int, int, int], make: Callable[[slice | IntArray], FloatArray]
    ) -> None:
        self.shape = shape
        self._make = make
        self._held = slice(0, 0)
        self._window: FloatArray = np.empty((shape[0], 0, shape[2]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: tuple[slice, slice | IntArray]) -> FloatArray:
        clients, rows = key
        if clients != slice(None):
            raise FedistillError(
                f"expected logits[:, rows] of predictions read in parts, found {clients} for the "
                "clients: choose clients from what was read"
            )
        if not isinstance(rows, slice):
            return self._make(rows)
        start, stop, step = rows.indices(self.shape[1])
        window = self._from(start)
        if step != 1 or stop > window.stop:
            return self._make(rows)
        if start < self._held.start or stop > self._held.stop:
            self._window = np.empty((self.shape[0], 0, self.shape[2]))  # lets go of the old one
            self._window, self._held = self._make(window), window
        return self._window[:, start - self._held.start : stop - self._held.start]

    def windows(self) -> Iterator[slice]:
        """All rows in turn, as many at a time as are held."""
        start = 0
        while start < max(self.shape[1], 1):
            yield (window := self._from(start))
            start = max(window.stop, 1)

    def whole(self) -> FloatArray:
        """All of it in one array."""
        if self._from(0).stop == self.shape[1]:
            return self[:, :]
        found = np.empty(self.shape)
        for rows in self.windows():
            found[:, rows] = self[:, rows]
        return found

    def _from(self, start: int) -> slice:
        """The rows to be held when one is read: all where they are few, else it and some more."""
        clients, rows, classes = self.shape
        if clients * rows * classes <= WHOLE:
            return slice(0, rows)
        return slice(start, _end(start, rows, max(WINDOW // (clients * classes), 2)))
