"""Rows that occur in two sets at once, found without comparing every pair."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedistill.types import FloatArray, IntArray, row_digest


def overlap(inputs: FloatArray, others: FloatArray) -> IntArray:
    """Row numbers of ``inputs`` whose exact content occurs among ``others``."""
    return among(inputs, {row_digest(row) for row in others})


def among(inputs: FloatArray, digests: Collection[bytes]) -> IntArray:
    """Row numbers of ``inputs`` that have one of these digests."""
    return np.flatnonzero([row_digest(row) in digests for row in inputs])
