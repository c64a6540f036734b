"""MMD: do two windows of predictions come from one distribution? Sees what no single value does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.continual.watcher import DriftState, Watcher, need
from fedistill.errors import FedistillError
from fedistill.seeding import derive, generator
from fedistill.types import FloatArray

AT_ONCE = 100
"""Permutations drawn together."""
TIE = 1e-12
"""Statistics closer than this are equal: the order of a sum must not decide."""


def kernel(rows: FloatArray) -> FloatArray:
    """Gaussian kernel ``[n, n]`` of rows ``[n, d]``, exp(-|x - y|^2 / (2 w^2)), diagonal 0.

    The width w is the median distance of two of the rows (the mean where the median is 0, 1 where
    all are equal). It comes from all rows together, so no permutation of them changes it.
    """
    rows = rows - rows.mean(axis=0)
    squares = (rows * rows).sum(axis=1)
    apart = np.maximum(squares[:, None] + squares - 2.0 * (rows @ rows.T), 0.0)
    apart[apart < TIE * max(float(squares.max()), TIE)] = 0.0
    pairs = np.sqrt(apart[np.triu_indices(len(rows), 1)])
    width = float(np.median(pairs)) or float(pairs.mean()) or 1.0
    table: FloatArray = np.exp(apart / (-2.0 * width * width))
    np.fill_diagonal(table, 0.0)
    return table


def unbiased(table: FloatArray, chosen: FloatArray) -> FloatArray:
    """Squared MMD between the rows chosen and the others, ``[ways]``; about 0 if alike.

    The U-statistic: means of the kernel within each side, less twice the mean across; it can be
    negative. Gretton et al., JMLR 13 (2012), equation 3.

    Args:
        table: ``[n, n]`` symmetric kernel with diagonal 0.
        chosen: ``[ways, n]`` ones and zeros, as many ones in each way, at least 2 of each.
    """
    m = float(chosen[0].sum())
    k = chosen.shape[1] - m
    each = table.sum(axis=1)
    inside = ((chosen @ table) * chosen).sum(axis=1)
    touching = chosen @ each
    outside = each.sum() - 2.0 * touching + inside
    across = touching - inside
    found: FloatArray = (
        outside / (k * (k - 1.0)) + inside / (m * (m - 1.0)) - 2.0 * across / (m * k)
    )
    return found


def p_value(
    reference: FloatArray,
    window: FloatArray,
    permutations: int = 999,
    *,
    seed: int = 0,
    enough: int | None = None,
) -> float:
    """Chance of so large an MMD if both are draws from one distribution; never 0.

    (1 + permutations at least as large as observed) / (1 + permutations), exact for rows that are
    exchangeable. With ``enough`` it stops after that many permutations at least as large, and
    is ``enough`` / draws so far, also exact (Besag and Clifford, Biometrika 78, 1991); so alike
    windows cost little.

    Args:
        reference: ``[k, d]``, at least 2 rows.
        window: ``[m, d]``, at least 2 rows.
        permutations: how many at most.
        seed: of the permutations.
        enough: as above; None: all are drawn.
    """
    table = kernel(np.concatenate([reference, window]))
    k, n = len(reference), len(table)
    split = np.concatenate([np.zeros(k), np.ones(n - k)])
    observed = float(unbiased(table, split[None])[0]) - TIE
    rng = generator(seed)
    larger = 0
    for start in range(0, permutations, AT_ONCE):
        ways = rng.permuted(np.tile(split, (min(AT_ONCE, permutations - start), 1)), axis=1)
        hits = np.flatnonzero(unbiased(table, ways) >= observed)
        if enough is not None and larger + len(hits) >= enough:
            return enough / (start + int(hits[enough - larger - 1]) + 1)
        larger += len(hits)
    return (1 + larger) / (1 + permutations)


class Mmd(Watcher):
    """Maximum mean discrepancy between a reference window and the latest one.

    Gretton et al., JMLR 13 (2012). The first ``reference`` rows are what the world was like. Every
    ``window`` further rows are tested against them by permutation: drift is a p-value of at most
    ``alpha``. After an alarm a new reference is taken, from the next row on.

    On a calm stream of independent rows each test alarms with probability at most ``alpha``, so
    there is about one alarm in window / alpha rows (100 000). Rows that depend on their neighbours
    (sorted, or one person after the other) are not exchangeable and alarm more.

    Label-free. It sees a change of the predicted classes where confidence stays the same. Costs
    some milliseconds a test. Deviations from Renate and alibi-detect: p is never 0, windows do not
    overlap, the width of the kernel comes from both windows.

    Args:
        on: what it watches; ``predictions`` gives rows ``[rows, C]``, any other value one column.
        alpha: false alarms a test, 0 to 1.
        reference: rows of the reference window.
        window: rows of a test.
        permutations: how many at most; at least 1/alpha - 1.
        seed: of the permutations.
        warn: WARN at a p-value of at most ``warn`` times alpha; it changes no alarm.

    Raises:
        FedistillError: an argument is out of range.
    """

    name = "mmd"
    columns = True

    def __init__(
        self,
        on: str = "predictions",
        *,
        alpha: float = 0.001,
        reference: int = 300,
        window: int = 100,
        permutations: int = 999,
        seed: int = 0,
        warn: float = 10.0,
    ) -> None:
        need(self.name, 0 < alpha < 1, f"alpha between 0 and 1, found {alpha}")
        need(
            self.name,
            min(reference, window) >= 2,
            f"reference and window of at least 2 rows, found {reference} and {window}",
        )
        need(
            self.name,
            (1 + permutations) * alpha >= 1 - 1e-9,
            f"at least {math.ceil(1 / alpha - 1e-9) - 1} permutations for alpha {alpha}, found "
            f"{permutations}: with fewer it could never alarm",
        )
        need(self.name, warn >= 1, f"warn of at least 1 (times alpha), found {warn}")
        self.alpha = alpha
        self.reference = reference
        self.window = window
        self.permutations = permutations
        self.seed = seed
        self.warn = warn
        super().__init__(
            on,
            alpha=alpha,
            reference=reference,
            window=window,
            permutations=permutations,
            seed=seed,
            warn=warn,
        )

    def reset(self) -> None:
        """Forget the reference; the next rows are the new one. The count of rows goes on."""
        self._rows: FloatArray | None = None
        self.tests = getattr(self, "tests", 0)
        self.p = math.nan

    def update(self, values: npt.ArrayLike) -> DriftState:
        """Take the next rows, in order.

        Args:
            values: ``[rows, columns]``, or ``[rows]`` for one column; none changes nothing. Rows
                may get wider (a class more): what is held is padded with zeros, as its
                probabilities were.

        Returns:
            The worst state met; where, if it is DRIFT, is in ``alarms``, and ``p`` is the p-value
            of the last test (NaN before the first and after an alarm).

        Raises:
            FedistillError: values are not finite numbers of that shape, or rows get narrower;
                nothing has changed then.
        """
        return super().update(values)

    def _run(self, block: FloatArray) -> tuple[DriftState, list[int]]:
        state = DriftState.OK
        found: list[int] = []
        if not len(block):
            return state, found
        fresh = block[:, None] if block.ndim == 1 else block
        held = np.empty((0, fresh.shape[1])) if self._rows is None else self._rows
        if held.shape[1] > fresh.shape[1]:
            raise FedistillError(
                f"{self.name}: expected rows of at least {held.shape[1]} columns, found "
                f"{fresh.shape[1]}: call reset() when the meaning of the columns changes"
            )
        padded = np.pad(held, ((0, 0), (0, fresh.shape[1] - held.shape[1])))
        left, start = np.concatenate([padded, fresh]), -len(held)
        while len(left) >= self.reference + self.window:
            end = self.reference + self.window
            worst = self._test(left[: self.reference], left[self.reference : end])
            state = max(state, worst)
            if worst is DriftState.DRIFT:
                found.append(start + end - 1)
                self.reset()
                left, start = left[end:], start + end
            else:
                left = np.concatenate([left[: self.reference], left[end:]])
                start += self.window
        self._rows = left.copy()
        return state, found

    def _test(self, reference: FloatArray, window: FloatArray) -> DriftState:
        most = min(self.alpha * self.warn, 1.0)
        self.p = p_value(
            reference,
            window,
            self.permutations,
            seed=derive(self.seed, "mmd", self.tests),
            enough=math.floor(most * (1 + self.permutations) + 1e-9) + 1,
        )
        self.tests += 1
        if self.p <= self.alpha:
            return DriftState.DRIFT
        return DriftState.WARN if self.p <= most else DriftState.OK

    def _save(self) -> dict[str, Any]:
        return {
            "rows": None if self._rows is None else self._rows.tolist(),
            "columns": 0 if self._rows is None else self._rows.shape[1],
            "tests": self.tests,
            "p": None if math.isnan(self.p) else self.p,
        }

    def _load(self, held: Mapping[str, Any]) -> None:
        rows = held["rows"]
        made = (
            None
            if rows is None
            else np.array(rows, dtype=np.float64).reshape(len(rows), int(held["columns"]))
        )
        self._rows, self.tests = made, int(held["tests"])
        self.p = math.nan if held["p"] is None else float(held["p"])
