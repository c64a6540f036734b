"""Ranking all items for many users, without a table of users by items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedistill.metrics.ranking import NOBODY
from fedistill.recommend.seen import Shelves
from fedistill.types import FloatArray, IntArray

SCORES = 1 << 22
"""Scores held at a time when ranking: 16 MB, however many users and items there are."""


@dataclass(frozen=True, eq=False)
class Ranker:
    """A model with the books that it ranks by; users and items are rows.

    Attributes:
        model: towers.
        shelves: who chose what.
        counts: ``[items]`` choices of each item that was learned.
        history: how many items a tower that looks back is shown; 0 for others.
    """

    model: Any
    shelves: Shelves
    counts: FloatArray
    history: int = 0

    def rank(self, users: IntArray, k: int) -> IntArray:
        """The k best items ``[n, k]`` for users ``[n]``, what they chose left out; user -1: -1."""
        ranked = np.full((len(users), k), NOBODY, dtype=np.int64)
        there = np.flatnonzero(users >= 0)
        items = len(self.counts)
        size, deep = max(1, SCORES // max(items, 1)), min(k, items)
        for start in range(0, len(there), size):
            part = there[start : start + size]
            scores = self.score(users[part])
            owner, chosen = self.shelves.of(users[part])
            learned = chosen < items
            scores[torch.from_numpy(owner[learned]), torch.from_numpy(chosen[learned])] = -torch.inf
            best = scores.topk(deep)
            left = best.values > -torch.inf
            ranked[part, :deep] = best.indices.masked_fill(~left, NOBODY).numpy()
        return ranked

    def popular(self, users: IntArray, k: int) -> IntArray:
        """The items chosen most ``[n, k]``, less what each user chose; -1 is a user unheard of."""
        ranked = np.full((len(users), k), NOBODY, dtype=np.int64)
        order = np.argsort(-self.counts, kind="stable")
        ranked[:, : min(k, len(order))] = order[:k]
        for place in np.flatnonzero(users >= 0):
            _, chosen = self.shelves.of(users[[place]])
            left = order[~np.isin(order, chosen)][:k]
            ranked[place] = NOBODY
            ranked[place, : len(left)] = left
        return ranked

    @torch.no_grad()
    def score(self, users: IntArray, items: IntArray | None = None) -> Tensor:
        """Scores ``[n, m]`` of users ``[n]`` and items ``[m]``, all that were learned without."""
        history = None
        if self.history:
            held = self.shelves.history(users, self.history)
            history = torch.from_numpy(np.where(held > len(self.counts), 0, held))
        columns = None if items is None else torch.from_numpy(items)
        vectors = self.model.user_vectors(torch.from_numpy(users), history)
        scores: Tensor = vectors @ self.model.item_vectors(columns).T
        return scores.add_(self.model.item_biases(columns))
