"""Drawing some rows of many so that each class has its share."""

from __future__ import annotations

import numpy as np

from fedistill.errors import DataError
from fedistill.types import IntArray


def stratified(labels: IntArray, count: int, rng: np.random.Generator) -> IntArray:
    """Sorted row numbers of ``count`` rows; each class is there as soon as there is room for all.

    >>> labels = np.array([0] * 90 + [1] * 10)
    >>> int(labels[stratified(labels, 10, np.random.default_rng(0))].sum())
    1
    """
    _, numbers, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares = allot(sizes, count)
    chosen = [
        rng.permutation(np.flatnonzero(numbers == number))[:share]
        for number, share in enumerate(shares)
    ]
    return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *chosen]))


def allot(sizes: IntArray, count: int) -> IntArray:
    """Divide ``count`` in proportion to ``sizes``, 1 or more for each that is not empty.

    Where the count is too small for that, the largest come first.

    >>> allot(np.array([90, 9, 1]), 10).tolist()
    [8, 1, 1]
    """
    count = min(count, int(sizes.sum()))
    exact = sizes * count / max(int(sizes.sum()), 1)
    shares = np.floor(exact).astype(np.int64)
    if count >= (sizes > 0).sum():
        shares = np.maximum(shares, sizes > 0)
    while shares.sum() > count:
        shares[np.argmax(np.where(shares > 1, shares - exact, -np.inf))] -= 1
    while shares.sum() < count:
        shares[np.argmax(np.where(shares < sizes, exact - shares, -np.inf))] += 1
    return shares


def count_of(amount: int | float, total: int, what: str) -> int:
    """A count as it is, a share below 1 of ``total`` rounded, but at least 1 of several rows."""
    if amount < 0 or (amount >= 1 and amount != int(amount)):
        raise DataError(
            f"{what}: expected a share below 1 or a whole number of rows, found {amount}"
        )
    if amount >= 1 or not amount:
        return int(amount)
    return max(round(amount * total), int(total > 1))
