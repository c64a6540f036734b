"""Relative shift gap: how far a student that is kept current falls behind full retraining.

At step t the student that has learned the blocks before t is tested on block t, then updated. The
oracle has the same architecture, is retrained from scratch on all blocks before t, and is tested on
the same block. A raw curve moves because some blocks are harder; the gap to the oracle does not.
Qualities q (accuracy, or NDCG@20) are ``[T]``, or ``[seeds, T]`` of several runs: the mean over
seeds is always taken first, since the largest minus the smallest of noise grows with T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedistill.errors import DataError
from fedistill.seeding import generator
from fedistill.types import FloatArray


@dataclass(frozen=True)
class Bounds:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


def relative_gaps(oracle: npt.ArrayLike, student: npt.ArrayLike) -> FloatArray:
    """g_t = ( q(O_t) - q(S_{t-1}) ) / q(O_t), of the means over seeds; negative is better.

    Args:
        oracle: ``[T]`` or ``[seeds, T]``.
        student: the same blocks; another number of seeds will do.

    Returns:
        ``[T]``.

    Raises:
        DataError: other shapes, numbers that are not finite, or an oracle that is not above 0.
    """
    expert, learner = _runs(oracle, "oracle"), _runs(student, "student")
    if expert.shape[1] != learner.shape[1]:
        raise DataError(
            f"relative gaps: expected the same blocks for both, found {expert.shape[1]} of the "
            f"oracle and {learner.shape[1]} of the student: test both on each block"
        )
    return _gaps(expert.mean(axis=0), learner.mean(axis=0))


def fluctuation(gaps: npt.ArrayLike, *, one_sided: bool = False) -> float:
    """max_t g_t - min_t g_t.

    Args:
        gaps: ``[T]``, from :func:`relative_gaps`.
        one_sided: of max(g_t, 0), so that being better than the oracle is not punished.
    """
    values = _steps(gaps)
    return float(np.ptp(np.maximum(values, 0.0) if one_sided else values))


def worst_gap(gaps: npt.ArrayLike) -> float:
    """max_t g_t."""
    return float(_steps(gaps).max())


def noise_floor(oracle_a: npt.ArrayLike, oracle_b: npt.ArrayLike) -> float:
    """The fluctuation between two oracles that differ only in their seed.

    What chance alone does; a student's fluctuation means something above it.
    """
    return fluctuation(relative_gaps(oracle_a, oracle_b))


def recovery(curve: npt.ArrayLike, level: float, every: int = 1) -> int | None:
    """Rows until a windowed curve is back at ``level``, after its lowest point.

    It is measured from the lowest point on because a window still holds rows from before the
    switch, and a curve that is about to fall starts high.

    Args:
        curve: ``[points]`` from the switch on, such as part of ``Prequential.curve``.
        level: 0.98 times what the oracle reaches, for "back within 2 %".
        every: rows between two points; the first point is ``every`` rows behind the switch.

    Returns:
        0 where it never fell below; None where it does not come back.
    """
    points = _steps(curve)
    if (points >= level).all():
        return 0
    lowest = int(points.argmin())
    back = np.flatnonzero(points[lowest:] >= level)
    return (lowest + int(back[0]) + 1) * every if len(back) else None


def bounds(
    oracle: npt.ArrayLike,
    student: npt.ArrayLike,
    statistic: Callable[[FloatArray], float] = fluctuation,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    blocks: bool = True,
    seed: int = 0,
) -> Bounds:
    """Paired bootstrap interval of a statistic of the gaps, over blocks and seeds.

    Each resample draws seeds and blocks with replacement, the same for oracle and student; takes
    the mean over its seeds, the gaps, and the statistic of them. The ends are quantiles. A draw of
    blocks can leave the extreme one out and never add a worse one, so for a largest value or a
    range ``blocks=False``, seeds alone, is the stricter interval: report both.

    Args:
        oracle: ``[seeds, T]``; ``[T]`` is one seed, and only the blocks are drawn then.
        student: the same shape, run by run with the same seed.
        statistic: of ``[T]`` gaps, such as :func:`fluctuation` or :func:`worst_gap`.
        level: share of resamples inside.
        resamples: how many.
        blocks: draw the blocks too.
        seed: of the draws.

    Raises:
        DataError: the shapes differ, or an oracle is not above 0.
    """
    expert, learner = _runs(oracle, "oracle"), _runs(student, "student")
    if expert.shape != learner.shape:
        raise DataError(
            "bounds: expected oracle and student of one shape, to pair them by seed and block, "
            f"found {list(expert.shape)} and {list(learner.shape)}: run both with the same seeds"
        )
    if not 0 < level < 1 or resamples < 1:
        raise DataError(
            "bounds: expected a level between 0 and 1 and at least 1 resample, found "
            f"{level} and {resamples}: 0.95 and 2000 are usual"
        )
    value = statistic(relative_gaps(expert, learner))
    runs, steps = expert.shape
    random = generator(seed, "shift gap", "bounds")
    found = np.empty(resamples)
    for number in range(resamples):
        chosen = random.integers(runs, size=runs)
        block = random.integers(steps, size=steps) if blocks else np.arange(steps)
        means = (side[chosen].mean(axis=0)[block] for side in (expert, learner))
        found[number] = statistic(_gaps(*means))
    tail = (1 - level) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Bounds(value, float(low), float(high))


def _gaps(expert: FloatArray, learner: FloatArray) -> FloatArray:
    if not (expert > 0).all():
        step = int(np.argmin(expert > 0))
        raise DataError(
            f"relative gaps: expected an oracle above 0 in each block, found {expert[step]} in "
            f"block {step}: a gap relative to nothing has no value; leave the block out"
        )
    gaps: FloatArray = (expert - learner) / expert
    return gaps


def _runs(values: npt.ArrayLike, name: str) -> FloatArray:
    runs = np.atleast_2d(np.array(values, dtype=np.float64))
    if runs.ndim != 2 or not runs.size or not np.isfinite(runs).all():
        raise DataError(
            f"relative gaps: expected finite [T] or [seeds, T] for the {name}, found shape "
            f"{list(runs.shape)}, {int((~np.isfinite(runs)).sum())} not finite: measure each block"
        )
    return runs


def _steps(values: npt.ArrayLike) -> FloatArray:
    steps = np.array(values, dtype=np.float64)
    if steps.ndim != 1 or not steps.size or not np.isfinite(steps).all():
        raise DataError(
            f"shift gap: expected [T] finite numbers, found shape {list(steps.shape)}: take the "
            "mean over seeds first, as relative_gaps does"
        )
    return steps
