"""ADWIN: a window that grows while the mean stays, and is dropped when two parts of it differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedistill.continual.watcher import DriftState, Watcher, need
from fedistill.types import FloatArray, IntArray

LONGEST = 4096
"""Values taken at once; bounds memory, and what is computed again after an alarm."""


class Adwin(Watcher):
    """Adaptive windowing of Bifet and Gavalda, SIAM SDM 2007, doi 10.1137/1.9781611972771.42.

    The window is kept as sums of 1, 2, 4, ... values, at most ``max_buckets`` of each, so memory
    is O(log n). Every ``clock`` values all cuts between two sums are tried; drift is where the
    means of the two sides differ by more than sqrt(2 m s2 ln(2 ln(n) / delta)) + (2/3) m
    ln(2 ln(n) / delta), with m = 1/(n0 - l + 1) + 1/(n1 - l + 1), s2 the variance of the window
    of n values and l the ``min_window_length``.

    The same alarms, index by index, as river 0.26.1, as all sums are done in its order. Like
    river and unlike the paper it starts with an empty window after an alarm (the paper keeps the
    younger part). So no sum is ever taken out again, the places of all cuts follow from n, and a
    block of values is worked off without a loop over them.

    Delays come in steps of ``clock``. For values in 0 to 1, where delta bounds the chance of a
    false alarm at each check.

    Args:
        on: what it watches; ``error`` and ``loss`` need labels.
        delta: smaller is more careful, 0 to 1.
        clock: values between two checks.
        max_buckets: sums kept of each size; more is finer and slower.
        min_window_length: fewest values on a side of a cut.
        grace_period: no check up to here.
        warn: WARN where a cut holds at ``warn`` times delta; it changes no alarm.

    Raises:
        FedistillError: an argument is out of range.
    """

    name = "adwin"

    def __init__(
        self,
        on: str = "entropy",
        *,
        delta: float = 0.002,
        clock: int = 32,
        max_buckets: int = 5,
        min_window_length: int = 5,
        grace_period: int = 10,
        warn: float = 10.0,
    ) -> None:
        need(self.name, 0 < delta < 1, f"delta between 0 and 1, found {delta}")
        need(
            self.name,
            min(clock, max_buckets, min_window_length) >= 1 and grace_period >= 0,
            "clock, max_buckets and min_window_length of at least 1 and grace_period of at least "
            f"0, found {clock}, {max_buckets}, {min_window_length} and {grace_period}",
        )
        need(self.name, warn >= 1, f"warn of at least 1 (times delta), found {warn}")
        self.delta = delta
        self.clock = clock
        self.max_buckets = max_buckets
        self.min_window_length = min_window_length
        self.grace_period = grace_period
        self.warn = warn
        super().__init__(
            on,
            delta=delta,
            clock=clock,
            max_buckets=max_buckets,
            min_window_length=min_window_length,
            grace_period=grace_period,
            warn=warn,
        )

    @property
    def width(self) -> int:
        """Values in the window."""
        return self._counted + len(self._waiting)

    @property
    def mean(self) -> float:
        """Their mean; NaN without any."""
        total = self._total + float(self._waiting.sum())
        return total / self.width if self.width else math.nan

    def reset(self) -> None:
        """Empty the window; the count of rows goes on."""
        self._restart()
        self._waiting: FloatArray = np.empty(0)

    def _restart(self) -> None:
        self._counted = 0
        self._total = 0.0
        self._variance = 0.0  # the sum of squared distances to the mean
        self._levels: list[FloatArray] = [np.empty(0)]  # sums of 1, of 2, of 4, ...; oldest first

    def _run(self, block: FloatArray) -> tuple[DriftState, list[int]]:
        """Values wait until a check is due, so a stream of single values costs little more."""
        state, found = DriftState.OK, []
        start = -len(self._waiting)
        left = np.concatenate([self._waiting, block])
        longest = max(LONGEST // self.clock, 1)
        while (checks := min(len(left) // self.clock, longest)) > 0:
            size, worst = self._window(left[: checks * self.clock])
            state = max(state, worst)
            left, start = left[size:], start + size
            if worst is DriftState.DRIFT:
                found.append(start - 1)
        self._waiting = left.copy()
        return state, found

    def _window(self, values: FloatArray) -> tuple[int, DriftState]:
        """Take values up to the first alarm, or all; how many, and the worst state met."""
        n = len(values)
        # Bit for bit the sums of a loop over the values: accumulate works from left to right.
        width = np.arange(self._counted + 1, self._counted + n + 1, dtype=np.float64)
        totals = np.add.accumulate(np.concatenate([[self._total], values]))
        away = values - totals[:-1] / np.maximum(width - 1.0, 1.0)
        steps = (width - 1.0) * away * away / width
        variances = np.add.accumulate(np.concatenate([[self._variance], steps]))

        at = np.arange(self.clock, n + 1, self.clock)
        levels, sizes, sums = self._buckets(values, self._counted + at)
        exceeds = self._cuts(sizes, sums, self._counted + at, totals[at], variances[at])
        drift = np.flatnonzero(exceeds == DriftState.DRIFT)
        if len(drift):
            self._restart()
            return int(at[drift[0]]), DriftState.DRIFT
        self._counted += n
        self._total, self._variance = float(totals[-1]), float(variances[-1])
        self._levels = levels
        return n, DriftState(int(exceeds.max()))

    def _buckets(
        self, values: FloatArray, widths: IntArray
    ) -> tuple[list[FloatArray], FloatArray, FloatArray]:
        """The levels after all values, and ``[checks, cuts]`` sizes and sums, oldest first.

        A level that would hold more than ``max_buckets`` sends its two oldest sums up as one. So
        of a sums that ever reached a level, (a - max_buckets + 1) // 2 pairs have gone up, and
        what a check saw is a slice. Empty places have size 0 and sum 0 and change nothing.
        """
        places = np.arange(self.max_buckets)
        levels: list[Any] = []
        sizes: list[Any] = []
        sums: list[Any] = []
        came, before, new = widths, self._counted, values
        while True:
            depth = len(levels)
            old = self._levels[depth] if depth < len(self._levels) else np.empty(0)
            all_ = np.concatenate([old, new])
            if not len(all_):
                break
            up = np.maximum(came - self.max_buckets + 1, 0) // 2
            up_before = max(before - self.max_buckets + 1, 0) // 2
            there = places < (came - 2 * up)[:, None]
            index = np.where(there, 2 * (up - up_before)[:, None] + places, 0)
            sizes.append(there * float(2**depth))
            sums.append(np.where(there, all_[index], 0.0))
            pairs = int(up[-1]) - up_before
            levels.append(all_[2 * pairs :])
            new = all_[0 : 2 * pairs : 2] + all_[1 : 2 * pairs : 2]
            came, before = up, up_before
        return levels, np.concatenate(sizes[::-1], axis=1), np.concatenate(sums[::-1], axis=1)

    def _cuts(
        self,
        sizes: FloatArray,
        sums: FloatArray,
        widths: IntArray,
        totals: FloatArray,
        variances: FloatArray,
    ) -> IntArray:
        """The state of each check, ``[checks]``."""
        least = float(self.min_window_length)
        n0 = np.add.accumulate(sizes, axis=1)
        n1 = widths[:, None] - n0
        u0 = np.add.accumulate(sums, axis=1)
        u1 = np.subtract.accumulate(np.concatenate([totals[:, None], sums], axis=1), axis=1)[:, 1:]
        fair = (n0 >= least) & (n1 >= least) & (widths > self.grace_period)[:, None]
        n0, n1 = np.where(fair, n0, least), np.where(fair, n1, least)
        apart = np.abs(u0 / n0 - u1 / n1)
        m = 1.0 / (n0 - least + 1.0) + 1.0 / (n1 - least + 1.0)
        spread = 2.0 * m * (variances / widths)[:, None]
        states = np.zeros(len(widths), dtype=np.int64)
        for state, delta in (
            (DriftState.WARN, min(self.delta * self.warn, 1.0)),
            (DriftState.DRIFT, self.delta),
        ):
            # math.log and not numpy's: the same bits on every machine with the same C library.
            logs = [math.log(2.0 * math.log(max(w, 2)) / delta) for w in widths.tolist()]
            prime = np.array(logs)[:, None]
            bound = np.sqrt(spread * prime) + 2.0 / 3.0 * prime * m
            states[(fair & (apart > bound)).any(axis=1)] = state
        return states

    def _save(self) -> dict[str, Any]:
        return {
            "counted": self._counted,
            "total": self._total,
            "variance": self._variance,
            "levels": [level.tolist() for level in self._levels],
            "waiting": self._waiting.tolist(),
        }

    def _load(self, held: Mapping[str, Any]) -> None:
        levels: list[FloatArray] = [np.array(v, dtype=np.float64) for v in held["levels"]]
        self._waiting = np.array(held["waiting"], dtype=np.float64)
        self._counted, self._levels = int(held["counted"]), levels
        self._total, self._variance = float(held["total"]), float(held["variance"])
