"""What a stream did to a model: accuracy over experiences, forgetting, and running means.

``table`` is R ``[T, E]``: R[i, j] is the accuracy on experience j after training on experience i,
NaN where it was not measured. T experiences have been learned, of E >= T. No function changes it,
and a number that rests on nothing measured is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.errors import DataError
from fedistill.types import FloatArray


def average_accuracy(table: npt.ArrayLike) -> float:
    """Accuracy at the end: mean_j R[T, j], over the T experiences learned."""
    learned = _checked(table)
    return _mean(learned[-1])


def anytime_accuracy(table: npt.ArrayLike) -> float:
    """Accuracy on the way: mean_i mean_{j<=i} R[i, j]."""
    learned = _checked(table)
    return _mean([_mean(row[: i + 1]) for i, row in enumerate(learned)])


def forgetting(table: npt.ArrayLike) -> float:
    """What was lost since the best: mean_{j<T} ( max_{j<=i<T} R[i, j] - R[T, j] ).

    The last row is not part of the maximum, so it is negative where the last training helped the
    past. Chaudhry et al. 2018, arXiv 1801.10112.

    Args:
        table: R ``[T, E]``.

    Returns:
        The mean over those j for which both numbers were measured; NaN before a second experience.
    """
    learned = _checked(table)
    past = range(len(learned) - 1)
    return _mean([_highest(learned[j:-1, j]) - learned[-1, j] for j in past])


def backward_transfer(table: npt.ArrayLike) -> float:
    """What later training did to the past: mean_{j<T} ( R[T, j] - R[j, j] ).

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840. It is not minus the forgetting, which looks at
    the best value and not at the first.

    Args:
        table: R ``[T, E]``.
    """
    learned = _checked(table)
    return _mean((learned[-1] - np.diagonal(learned))[:-1])


def forward_transfer(table: npt.ArrayLike, baseline: npt.ArrayLike) -> float:
    """What the past did for the next experience: mean_{j>1} ( R[j-1, j] - b_j ).

    Args:
        table: R ``[T, E]``, measured on the next experience too.
        baseline: b ``[E]``, accuracy on each experience of a model with its first, random weights.

    Raises:
        DataError: not one baseline for each experience.
    """
    full = _whole(table)
    start = np.asarray(baseline, dtype=np.float64)
    if start.shape != full.shape[1:]:
        raise DataError(
            f"forward_transfer: expected a baseline for each of {full.shape[1]} experiences, found "
            f"shape {start.shape}: measure the untrained model on each"
        )
    return _mean(np.diagonal(full, offset=1) - start[1 : len(full) + 1])


def latest(table: npt.ArrayLike) -> float:
    """Latest performance, LA: R[T, T], on the newest experience."""
    return float(_checked(table)[-1, -1])


def retained(table: npt.ArrayLike) -> float:
    """Retained performance, RA: mean_{j<=T} R[T, j], over all experiences so far."""
    return average_accuracy(table)


def h_mean(latest: float, retained: float) -> float:
    """Both at once: 2 LA RA / (LA + RA); 0 where both are 0.

    LA and RA as in :func:`latest` and :func:`retained`; the names are those of CCD (KDD 2024,
    arXiv 2405.19046), whose code defines neither.
    """
    total = latest + retained
    return 2.0 * latest * retained / total if total else 0.0


def min_accuracy(curves: npt.ArrayLike, learned: npt.ArrayLike) -> float:
    """The deepest falls: mean over past j of the smallest A_j after j was learned.

    Accuracies at the end of experiences hide the drop right after a switch; measured during
    training they show it. De Lange et al. 2023, arXiv 2205.13452.

    Args:
        curves: A ``[measurements, E]``, accuracy on each experience at moments of the training.
        learned: ``[k]`` rising; ``learned[j]`` is the row of ``curves`` at the end of experience j.
            The last one is the current experience, the others are past.

    Returns:
        NaN while nothing is past.

    Raises:
        DataError: the two do not fit together.
    """
    values, ends = _curves(curves, learned)
    last = int(ends[-1])
    return _mean([_lowest(values[end + 1 : last + 1, j]) for j, end in enumerate(ends[:-1])])


def worst_case_accuracy(curves: npt.ArrayLike, learned: npt.ArrayLike) -> float:
    """A_k / k + (1 - 1/k) min-ACC: the k-th experience now, the others at their worst.

    Arguments as of :func:`min_accuracy`. With one experience it is A_1.
    """
    values, ends = _curves(curves, learned)
    k = len(ends)
    current = float(values[ends[-1], k - 1])
    return current if k == 1 else current / k + (1 - 1 / k) * min_accuracy(values, ends)


def faded(losses: npt.ArrayLike, decay: float = 0.999) -> FloatArray:
    """A running mean that forgets: S <- loss + a S, N <- 1 + a N, value S / N.

    N grows to 1 / (1 - a), about 1,000 rows for 0.999. Dividing by N, not by a count, leaves no
    bias at the start. Gama et al. 2013, doi 10.1007/s10994-012-5320-9.

    Args:
        losses: ``[n]``, in the order of the stream.
        decay: a, above 0 and at most 1; 1 is the mean of all so far.

    Returns:
        ``[n]`` the value after each row.

    Raises:
        DataError: losses are not finite, or decay is out of range.
    """
    if not 0 < decay <= 1:
        raise DataError(f"faded: expected decay above 0 and at most 1, found {decay}: try 0.999")
    rows = _finite(losses, "faded")
    sums = accumulate(rows.tolist(), lambda held, loss: loss + decay * held)
    counts = accumulate([1.0] * len(rows), lambda held, one: one + decay * held)
    return np.array([total / count for total, count in zip(sums, counts, strict=True)])


class Prequential:
    """Test, then train: the mean over the last ``window`` rows, each predicted before learned.

    It does not matter in which blocks the rows come. Dawid 1984, doi 10.2307/2981683.

    Args:
        window: rows of the mean.
        every: rows between two points of the curve; 0 is a tenth of the window.

    Raises:
        DataError: a window below 1.
    """

    def __init__(self, window: int = 1000, every: int = 0) -> None:
        if window < 1 or every < 0:
            raise DataError(
                f"prequential: expected a window of at least 1 row and every of at least 0, found "
                f"{window} and {every}: 1000 is a usual window"
            )
        self.window = window
        self.every = every or max(1, window // 10)
        self.seen = 0
        self._held: FloatArray = np.empty(0)
        self._curve: list[float] = []

    def update(self, correct: npt.ArrayLike) -> float:
        """Take the next rows, in order; the value after them.

        Args:
            correct: ``[n]`` 1 or True where the prediction was right; any number per row will do.

        Raises:
            DataError: not finite numbers; nothing has changed then.
        """
        rows = _finite(correct, "prequential")
        start = self.seen - len(self._held)
        held = np.concatenate([self._held, rows])
        first = self.seen // self.every + 1
        self.seen += len(rows)
        for point in range(first, self.seen // self.every + 1):
            end = point * self.every - start
            self._curve.append(float(held[max(0, end - self.window) : end].mean()))
        self._held = held[-self.window :].copy()
        return self.value

    @property
    def value(self) -> float:
        """The mean of the last ``window`` rows, of fewer at the start; NaN before the first."""
        return _mean(self._held)

    @property
    def curve(self) -> FloatArray:
        """``[points]`` the value after ``every``, 2 ``every``, ... rows."""
        return np.array(self._curve)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly, fit for JSON."""
        return {
            "window": self.window,
            "every": self.every,
            "seen": self.seen,
            "held": self._held.tolist(),
            "curve": list(self._curve),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            DataError: it was written with another window.
        """
        wrote = (state.get("window"), state.get("every"))
        if wrote != (self.window, self.every):
            raise DataError(
                f"prequential: expected the state of window {self.window} and every {self.every}, "
                f"found {wrote[0]} and {wrote[1]}: resume with the window that wrote it"
            )
        self.seen = int(state["seen"])
        self._held = np.array(state["held"], dtype=np.float64)
        self._curve = [float(value) for value in state["curve"]]


def _whole(table: npt.ArrayLike) -> FloatArray:
    values = np.array(table, dtype=np.float64)
    if values.ndim != 2 or not 1 <= len(values) <= values.shape[1]:
        raise DataError(
            "a table of accuracies: expected shape [T, E], a row for each experience learned and a "
            f"column for each of E >= T, found {list(values.shape)}: give R[i, j] = accuracy on j "
            "after training on i"
        )
    if np.isinf(values).any():
        raise DataError("a table of accuracies: expected numbers or NaN, found inf: measure again")
    return values


def _checked(table: npt.ArrayLike) -> FloatArray:
    """R over the experiences learned, ``[T, T]``."""
    values = _whole(table)
    return values[:, : len(values)]


def _curves(
    curves: npt.ArrayLike, learned: npt.ArrayLike
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    values = np.array(curves, dtype=np.float64)
    ends = np.array(learned, dtype=np.int64)
    fits = values.ndim == 2 and ends.ndim == 1 and 1 <= len(ends) <= values.shape[1]
    if not fits or (np.diff(ends) <= 0).any() or ends[0] < 0 or ends[-1] >= len(values):
        raise DataError(
            "curves of accuracy: expected [measurements, E] and, rising, the measurement at the "
            f"end of each experience, found shape {list(values.shape)} and {ends.tolist()}: give "
            "the row numbers of the curve"
        )
    return values, ends


def _finite(values: npt.ArrayLike, name: str) -> FloatArray:
    rows = np.atleast_1d(np.array(values, dtype=np.float64))
    if rows.ndim != 1 or not np.isfinite(rows).all():
        raise DataError(
            f"{name}: expected [n] finite numbers, found shape {list(rows.shape)}, "
            f"{int((~np.isfinite(rows)).sum())} not finite: leave out rows without a label"
        )
    return rows


def _mean(values: npt.ArrayLike) -> float:
    known = _known(values)
    return float(known.mean()) if len(known) else float("nan")


def _highest(values: FloatArray) -> float:
    known = _known(values)
    return float(known.max()) if len(known) else float("nan")


def _lowest(values: FloatArray) -> float:
    known = _known(values)
    return float(known.min()) if len(known) else float("nan")


def _known(values: npt.ArrayLike) -> FloatArray:
    numbers = np.asarray(values, dtype=np.float64)
    known: FloatArray = numbers[~np.isnan(numbers)]
    return known
