"""Axes: which range, which ticks, and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A range with its ticks, linear or logarithmic."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Where the value lies when ``low`` is drawn at ``start`` and ``high`` at ``end``."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(v, 1e-12)) for v in (value, low, high))
        return start + (end - start) * (value - low) / (high - low)


def linear(
    values: Iterable[float],
    *,
    count: int = 5,
    least: float | None = None,
    most: float | None = None,
    whole: bool = False,
    tight: bool = False,
) -> Axis:
    """A linear axis around the values, its ends on round numbers unless ``tight``.

    Args:
        values: what must fit.
        count: how many ticks are wished for.
        least: the axis never goes below.
        most: the axis never goes above.
        whole: ticks at whole numbers only; with ``tight`` the first and the last are among them.
        tight: the axis ends at the extreme values.
    """
    found = list(values)
    low, high = min(found), max(found)
    if high - low < 1e-12:
        room = 0.5 if whole or tight else max(abs(low) * 0.05, 1e-3)
        low, high = low - room, high + room
    step = _step((high - low) / count, whole)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if tight:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        low, high = first * step, last * step
    low = low if least is None else max(low, least)
    high = high if most is None else min(high, most)
    if high - low < 1e-12:
        high = low + step
    marks = [round(k * step, 10) for k in range(first, last + 1)]
    marks = [mark for mark in marks if low - 1e-9 <= mark <= high + 1e-9]
    if whole and tight:
        ends = (float(math.ceil(low)), float(math.floor(high)))
        inner = [m for m in marks if ends[0] + 0.6 * step < m < ends[1] - 0.6 * step]
        marks = sorted({*ends, *inner})
    return Axis(low, high, tuple(marks))


def log10(values: Iterable[float], *, tight: bool = False) -> Axis:
    """A logarithmic axis around positive values; ends at powers of ten unless ``tight``."""
    found = [value for value in values if value > 0] or [1.0]
    low, high = min(found), max(found)
    if high / low < 1.2:
        low, high = low / 2, high * 2
    bottom, top = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if not tight:
        low, high = 10.0**bottom, 10.0**top
    wide = math.log10(high / low)
    steps = (1,) if wide > 2.5 else (1, 3) if wide > 1.2 else (1, 2, 5)
    marks = [step * 10.0**power for power in range(bottom - 1, top + 1) for step in steps]
    keep = max(1, math.ceil(len([m for m in marks if low <= m <= high]) / 7))
    return Axis(low, high, tuple(m for m in marks if low <= m <= high * 1.0001)[::keep], log=True)


def _step(rough: float, whole: bool) -> float:
    """The round number (1, 2, 2.5 or 5 times a power of ten) near a rough step."""
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.8)
    return max(1.0, float(math.ceil(step))) if whole else step
