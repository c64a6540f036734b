"""Page-Hinkley: a sum of distances to the running mean that leaves its extreme too far behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedistill.continual.watcher import DriftState, Watcher, need
from fedistill.types import FloatArray

MODES = ("up", "down", "both")


class PageHinkley(Watcher):
    """The test of Page (Biometrika 41, 1954) in Hinkley's form, with a factor that forgets.

    With x_n the values since the last alarm and mean_n theirs, the sums are U_n = alpha U_{n-1}
    + (x_n - mean_n) - delta and D_n = alpha D_{n-1} + (x_n - mean_n) + delta. Drift is a rise
    U_n - min U or a fall max D - D_n above the threshold. After an alarm all starts anew.

    The same alarms, index by index, as river 0.26.1. Each value enters a running mean that the
    next one needs: a loop over plain floats keeps river's rounding, a closed form would not.

    Args:
        on: what it watches; ``error`` and ``loss`` need labels.
        min_instances: no alarm before this many values.
        delta: change of the mean that is tolerated, at least 0.
        threshold: in units of the values times rows; 50 suits values in 0 to 1.
        alpha: what of a sum remains after a row, 0 to 1.
        mode: ``up`` finds rises, ``down`` falls, ``both`` either.
        warn: WARN above this share of the threshold, 0 to 1; it changes no alarm.

    Raises:
        FedistillError: an argument is out of range.
    """

    name = "page-hinkley"

    def __init__(
        self,
        on: str = "entropy",
        *,
        min_instances: int = 30,
        delta: float = 0.005,
        threshold: float = 50.0,
        alpha: float = 1 - 0.0001,
        mode: str = "both",
        warn: float = 0.5,
    ) -> None:
        need(
            self.name,
            min_instances >= 1 and delta >= 0 and threshold > 0 and math.isfinite(threshold),
            "min_instances of at least 1, delta of at least 0 and a threshold above 0, found "
            f"{min_instances}, {delta} and {threshold}",
        )
        need(self.name, 0 < alpha <= 1, f"alpha above 0 and up to 1, found {alpha}")
        need(self.name, mode in MODES, f"a mode of {', '.join(MODES)}, found {mode}")
        need(self.name, 0 < warn <= 1, f"warn above 0 and up to 1 (of the threshold), found {warn}")
        self.min_instances = min_instances
        self.delta = delta
        self.threshold = threshold
        self.alpha = alpha
        self.mode = mode
        self.warn = warn
        super().__init__(
            on,
            min_instances=min_instances,
            delta=delta,
            threshold=threshold,
            alpha=alpha,
            mode=mode,
            warn=warn,
        )

    def reset(self) -> None:
        """Start anew; the count of rows goes on."""
        # The first row is its own mean, so the sums start at -delta and +delta: an extreme of 0
        # is what an infinite one would be after that row.
        self._n, self._mean = 0, 0.0
        self._up, self._low = 0.0, 0.0
        self._down, self._high = 0.0, 0.0

    def _run(self, block: FloatArray) -> tuple[DriftState, list[int]]:
        alpha, delta, first = self.alpha, self.delta, self.min_instances
        rise = self.threshold if self.mode != "down" else math.inf
        fall = self.threshold if self.mode != "up" else math.inf
        near_rise, near_fall = self.warn * rise, self.warn * fall
        n, mean = self._n, self._mean
        up, low, down, high = self._up, self._low, self._down, self._high
        state, found = DriftState.OK, []
        for row, x in enumerate(block.tolist()):
            n += 1
            mean += (1.0 / n) * (x - mean)
            away = x - mean
            up = alpha * up + away - delta
            down = alpha * down + away + delta
            if up < low:
                low = up
            if down > high:
                high = down
            if (up - low > near_rise or high - down > near_fall) and n >= first:
                if up - low > rise or high - down > fall:
                    state = DriftState.DRIFT
                    found.append(row)
                    n, mean, up, low, down, high = 0, 0.0, 0.0, 0.0, 0.0, 0.0
                else:
                    state = max(state, DriftState.WARN)
        self._n, self._mean = n, mean
        self._up, self._low, self._down, self._high = up, low, down, high
        return state, found

    def _save(self) -> dict[str, Any]:
        return {
            "n": self._n,
            "mean": self._mean,
            "up": self._up,
            "low": self._low,
            "down": self._down,
            "high": self._high,
        }

    def _load(self, held: Mapping[str, Any]) -> None:
        n = int(held["n"])
        mean, up, low, down, high = (
            float(held[key]) for key in ("mean", "up", "low", "down", "high")
        )
        self._n, self._mean = n, mean
        self._up, self._low, self._down, self._high = up, low, down, high
