"""Full-ranking metrics of recommenders: every item competes, what was learned from is masked.

Metrics on a few sampled negatives are inconsistent (Krichene and Rendle, KDD 2020) and not here.
A user that a model does not know has a row of -1 alone: it counts as zero and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedistill.errors import DataError
from fedistill.types import FloatArray, IntArray

NOBODY = -1
"""Fills a ranking where no item is left, and all of it for an unseen user."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """A metric over users.

    Attributes:
        mean: over the users that have relevant items; 0 if there are none.
        values: ``[n]`` of each user; NaN for those without relevant items.
        unseen: users with relevant items and no ranking: each counted as zero.
    """

    mean: float
    values: FloatArray
    unseen: int


def rank_items(
    scores: npt.ArrayLike, k: int, seen: Sequence[npt.ArrayLike] | None = None
) -> IntArray:
    """The k best items of each row ``[n, k]``, best first; equal scores by the item number.

    Args:
        scores: ``[n, items]``; a row of NaN is a user that the model does not know.
        k: how many, from 1.
        seen: for each row the items that it was trained on: they are never ranked.

    Raises:
        DataError: scores of another shape, NaN in a part of a row, or lists that do not fit.
    """
    table = np.array(scores, dtype=np.float64)
    _check(k)
    if table.ndim != 2 or (seen is not None and len(seen) != len(table)):
        raise DataError(
            f"rank_items: expected scores [n, items] and n lists of seen items, found "
            f"{list(table.shape)} and {'none' if seen is None else len(seen)}"
        )
    missing = np.isnan(table)
    if (missing.any(axis=1) & ~missing.all(axis=1)).any():
        raise DataError(
            "rank_items: expected scores without NaN, or a row of NaN for an unknown user, found "
            "rows with both: check the model"
        )
    for row, items in enumerate(seen or ()):
        table[row, np.asarray(items, dtype=np.int64)] = np.nan
    table[np.isnan(table)] = -np.inf
    order = np.argsort(-table, axis=1, kind="stable")[:, :k]
    left = np.take_along_axis(table, order, axis=1) > -np.inf
    ranked = np.full((len(table), k), NOBODY, dtype=np.int64)
    ranked[:, : order.shape[1]] = np.where(left, order, NOBODY)
    return ranked


def recall_at(ranked: IntArray, relevant: Sequence[npt.ArrayLike], k: int = 20) -> Ranked:
    r"""Share of a user's relevant items among its first k: hits / \|relevant\|.

    Args:
        ranked: ``[n, at least k]`` item numbers, best first, -1 for none; see :func:`rank_items`.
        relevant: for each user the items that it chose afterwards; repeats count once.
        k: how far down.

    Raises:
        DataError: k below 1 or beyond the ranking, or other numbers of users.
    """
    hits, sizes = _hits(ranked, relevant, k)
    shares: FloatArray = hits.sum(axis=1) / np.maximum(sizes, 1)
    return _over_users(shares, sizes, ranked)


def hit_rate_at(ranked: IntArray, relevant: Sequence[npt.ArrayLike], k: int = 20) -> Ranked:
    """Whether any relevant item is among a user's first k; arguments as :func:`recall_at`."""
    hits, sizes = _hits(ranked, relevant, k)
    met: FloatArray = np.array(hits.any(axis=1), dtype=np.float64)
    return _over_users(met, sizes, ranked)


def ndcg_at(ranked: IntArray, relevant: Sequence[npt.ArrayLike], k: int = 20) -> Ranked:
    r"""Normalised discounted cumulative gain: sum over hits of 1 / log2(rank + 1) by the best.

    The best has min(k, \|relevant\|) hits at the top. Gains are 0 or 1. Arguments as
    :func:`recall_at`.
    """
    hits, sizes = _hits(ranked, relevant, k)
    discounts = 1 / np.log2(np.arange(k) + 2)
    best = np.concatenate([[0.0], discounts.cumsum()])[np.minimum(sizes, k)]
    gains: FloatArray = (hits * discounts).sum(axis=1)
    return _over_users(gains / np.where(best > 0, best, 1.0), sizes, ranked)


def _hits(
    ranked: IntArray, relevant: Sequence[npt.ArrayLike], k: int
) -> tuple[npt.NDArray[np.bool_], IntArray]:
    """Which of the first k are relevant ``[n, k]``, and how many are ``[n]``."""
    _check(k)
    if ranked.ndim != 2 or ranked.shape[1] < k or len(ranked) != len(relevant):
        raise DataError(
            f"ranking: expected {k} ranked items or more for each of {len(relevant)} users, found "
            f"{list(ranked.shape)}: rank deeper, and for the same users"
        )
    lists = [np.unique(np.asarray(items, dtype=np.int64)) for items in relevant]
    sizes = np.array([len(items) for items in lists], dtype=np.int64)
    flat = np.concatenate([np.empty(0, dtype=np.int64), *lists])
    top = ranked[:, :k]
    span = int(max(flat.max(initial=0), top.max(initial=0))) + 2
    wanted = np.repeat(np.arange(len(lists)), sizes) * span + flat
    found = np.arange(len(top))[:, None] * span + top
    return np.isin(found, wanted) & (top != NOBODY), sizes


def _over_users(values: FloatArray, sizes: IntArray, ranked: IntArray) -> Ranked:
    counted = sizes > 0
    unseen = int((counted & (ranked == NOBODY).all(axis=1)).sum())
    mean = float(values[counted].mean()) if counted.any() else 0.0
    return Ranked(mean, np.where(counted, values, np.nan), unseen)


def _check(k: int) -> None:
    if k < 1:
        raise DataError(f"ranking: expected k of 1 at least, found {k}")
