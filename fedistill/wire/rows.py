"""Which proxy rows: drawn from a seed, so that a set of rows costs a few bytes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedistill.errors import Rejected
from fedistill.seeding import generator
from fedistill.types import IntArray
from fedistill.wire.envelope import check_types, exact_keys


@dataclass(frozen=True)
class RowSpec:
    """A set of proxy rows that costs a few bytes: it is drawn from a seed, not listed.

    Rows are drawn in passes: every pass deals out all proxy rows once, in an order of its own, so
    that no row waits long for its first soft target.
    """

    seed: int
    round: int
    count: int
    total: int

    def rows(self) -> IntArray:
        """The row numbers, ``[count]``; those of one round are distinct. Not to be written to."""
        return _drawn(self)

    def draw(self) -> IntArray:
        """As :meth:`rows`, drawn afresh."""
        if not self.count:
            return np.empty(0, dtype=np.int64)
        number, offset = divmod((self.round - 1) * self.count, self.total)
        first = self._pass(number)[offset : offset + self.count]
        if len(first) == self.count:
            return first
        return np.concatenate([first, self._pass(number + 1)[: self.count - len(first)]])

    def _pass(self, number: int) -> IntArray:
        """All rows in the order in which pass ``number`` deals them out.

        A round that takes the last rows of one pass and the first of the next must not get a row
        twice: rows among the former wait until that round is over. That moves rows among the
        first ``count`` of a pass only, so in long passes the last rows are known at once; in
        short ones the pass before decides on them, back to one that began together with a round.
        """
        start = number
        while (
            start
            and start * self.total % self.count
            and (start == number or self.total < 2 * self.count)
        ):
            start -= 1
        order = generator(self.seed, "proxy-pass", start).permutation(self.total)
        for later in range(start + 1, number + 1):
            shared = later * self.total % self.count
            last = order[self.total - shared :]
            order = generator(self.seed, "proxy-pass", later).permutation(self.total)
            head = np.flatnonzero(~np.isin(order, last))[: self.count - shared]
            order = np.concatenate([order[head], np.delete(order, head)])
        return order


@functools.lru_cache(maxsize=8)
def _drawn(spec: RowSpec) -> IntArray:
    """Drawn once: a round asks for its rows many times, and later rounds take longer to draw."""
    rows = spec.draw()
    rows.flags.writeable = False
    return rows


def spec_fields(spec: RowSpec) -> dict[str, int]:
    """A set of rows as a header says it."""
    return {"seed": spec.seed, "round": spec.round, "count": spec.count, "total": spec.total}


def read_spec(raw: Any) -> RowSpec:
    """Rows that can be drawn: of ``total`` at least one, and no more than there are."""
    names = {"seed": int, "round": int, "count": int, "total": int}
    check_types(raw, names)
    exact_keys(raw, set(names))
    spec = RowSpec(**raw)
    if spec.round < 1 or not 0 <= spec.count <= spec.total < 1 << 40 or not spec.total:
        raise Rejected("shape", "the rows of a round must be a part of the proxy rows")
    return spec
