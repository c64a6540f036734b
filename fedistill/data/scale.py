"""Filling gaps and scaling, with statistics from public rows only.

What a site computes over its own rows would be one more thing to protect; the public rows are
known to all, so every site derives the same numbers from them and shares none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedistill.errors import DataError
from fedistill.types import FloatArray, IntArray

SCALES = ("auto", "standard", "centred", "unit", "none")
WILD = 4.0
"""Standardised values beyond this many deviations say no more than that they are extreme."""
AUTO = {"table": "standard", "image": "centred"}


@dataclass(frozen=True, eq=False)
class Scaler:
    """Fill gaps, add the indicators, then ``(filled - shift) / spread``, within limits.

    Attributes:
        fill: what stands in for a missing value, per column.
        shift: subtracted.
        spread: divided by.
        indicated: columns for which a 0/1 column "was missing" is added.
        limit: largest absolute value of a scaled column.
    """

    fill: FloatArray
    shift: FloatArray
    spread: FloatArray
    indicated: IntArray
    limit: float = np.inf

    @classmethod
    def fit(
        cls, public_inputs: FloatArray, kind: str, scale: str, *, indicators: float = 1.0
    ) -> Scaler:
        """Learn all numbers from the public rows.

        Args:
            public_inputs: ``[n, ...]``; NaN stands for a missing value.
            kind: "table" or "image", which decides what "auto" means.
            scale: "standard" (each column to mean 0, deviation 1), "centred" ([0, 255] to
                [-1, 1]), "unit" (largest absolute value 1: of each column of a table, of all
                pixels of images), "none" or "auto".
            indicators: columns missing in more than this share of the rows get a 0/1 column.
        """
        if not len(public_inputs) or scale not in SCALES or kind not in AUTO:
            raise DataError(
                f"scaling: expected public rows, kind table or image and a scale out of "
                f"{', '.join(SCALES)}; found {len(public_inputs)} rows, {kind} and {scale}"
            )
        missing = np.isnan(public_inputs)
        fill = medians(public_inputs, missing)
        share = missing.reshape(len(missing), -1).mean(axis=0)
        indicated = np.flatnonzero(share > indicators)
        scale = AUTO[kind] if scale == "auto" else scale
        filled = widen(public_inputs, fill, indicated).astype(np.float64)
        shift, spread = _moments(filled, kind, scale)
        return cls(fill, shift, spread, indicated, WILD if scale == "standard" else np.inf)

    def apply(self, inputs: FloatArray) -> FloatArray:
        """Scaled float32 rows without gaps, the indicators behind the other columns."""
        shift, spread = self.shift.astype(np.float32), self.spread.astype(np.float32)
        scaled = (widen(inputs, self.fill, self.indicated) - shift) / spread
        if np.isfinite(self.limit):
            scaled = scaled.clip(-self.limit, self.limit)
        return scaled.astype(np.float32)


def widen(inputs: FloatArray, fill: FloatArray, indicated: IntArray) -> FloatArray:
    """Rows without gaps, with a 0/1 column for each of ``indicated``."""
    missing = np.isnan(inputs)
    filled = np.where(missing, fill, inputs) if missing.any() else inputs
    if not len(indicated):
        return filled
    return np.concatenate([filled, missing[:, indicated].astype(np.float32)], axis=1)


def medians(inputs: FloatArray, missing: npt.NDArray[np.bool_]) -> FloatArray:
    """The median of each column over the values that are there; 0 where none is."""
    if not missing.any():
        return np.zeros(inputs.shape[1:], dtype=np.float32)
    present = ~missing.all(axis=0)
    fill = np.zeros(inputs.shape[1:], dtype=np.float32)
    fill[present] = np.nanmedian(inputs[:, present], axis=0)
    return fill


def _moments(filled: FloatArray, kind: str, scale: str) -> tuple[FloatArray, FloatArray]:
    zero, one = np.zeros(1), np.ones(1)
    if scale == "centred":
        return one * 127.5, one * 127.5
    if scale == "none":
        return zero, one
    largest = np.abs(filled).max(axis=0)
    if scale == "standard":
        # The deviation of a constant column is 0 only up to rounding.
        return filled.mean(axis=0), _no_zero(filled.std(axis=0), 1e-12 * largest)
    return zero, _no_zero(largest if kind == "table" else one * largest.max(), zero)


def _no_zero(spread: FloatArray, floor: FloatArray) -> FloatArray:
    return np.where(spread > np.maximum(floor, np.finfo(np.float32).tiny), spread, 1.0)
