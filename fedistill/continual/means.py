"""Running means of features, one for each class: what herding steers by."""

from __future__ import annotations

import numpy as np

from fedistill.types import FloatArray, IntArray


class ClassMeans:
    """Sums and counts of feature rows by class, float64.

    Attributes:
        labels: ``[k]`` int64, ascending.
        sums: ``[k, d]``.
        counts: ``[k]`` int64.
    """

    def __init__(self) -> None:
        self.labels: IntArray = np.empty(0, dtype=np.int64)
        self.sums: FloatArray = np.empty((0, 0))
        self.counts: IntArray = np.empty(0, dtype=np.int64)

    def add(self, labels: IntArray, features: FloatArray) -> None:
        """Count rows ``[n]`` with features ``[n, d]`` in."""
        self._join(labels, features, np.ones(len(labels), dtype=np.int64))

    def merge(self, other: ClassMeans) -> None:
        """Count in what another has counted."""
        if len(other.labels):
            self._join(other.labels, other.sums, other.counts)

    def of(self, labels: IntArray) -> FloatArray:
        """``[n, d]`` the mean of each row's class, which must have been counted."""
        place = np.searchsorted(self.labels, labels)
        means: FloatArray = self.sums[place] / self.counts[place][:, None]
        return means

    def _join(self, labels: IntArray, sums: FloatArray, counts: IntArray) -> None:
        known, place = np.unique(np.concatenate([self.labels, labels]), return_inverse=True)
        total = np.zeros((len(known), sums.shape[1]))
        number = np.zeros(len(known), dtype=np.int64)
        old = len(self.labels)
        if old:
            total[place[:old]] = self.sums
            number[place[:old]] = self.counts
        np.add.at(total, place[old:], sums)
        np.add.at(number, place[old:], counts)
        self.labels, self.sums, self.counts = known, total, number
