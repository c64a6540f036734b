"""Where new users and items begin: near those they were met with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedistill.types import IntArray


@torch.no_grad()
def neighbour_vectors(
    model: Any, users: IntArray, items: IntArray, known: tuple[int, int], new: tuple[int, int]
) -> tuple[Tensor | int, Tensor]:
    """Vectors ``[new, width]`` of the users and items that a block brings.

    A new user begins at the mean of the known users who chose the same items in the block, a new
    item at the mean of the known items that its users chose in it: the two-hop neighbours of CCD,
    Lee et al., KDD 2024 (rule 5). Deviations: all of them and not the 20 most popular; the mean of
    one hop, which CCD adds, is left out, since users and items do not share a space here. Without
    neighbours: the mean of all.

    Args:
        model: towers with the known rows only.
        users: ``[n]`` rows of the block's users, new ones from ``known[0]``.
        items: ``[n]`` rows of its items, new ones from ``known[1]``.
        known: how many users and items the model has.
        new: how many come.
    """
    vectors = model.item_vectors().detach()
    fresh_items = _two_hops(vectors, items, users, known[1], new[1])
    table = getattr(model, "users", None)
    if table is None or getattr(model, "looks_back", False):
        return new[0], fresh_items
    return _two_hops(table.detach(), users, items, known[0], new[0]), fresh_items


def _two_hops(table: Tensor, own: IntArray, between: IntArray, known: int, new: int) -> Tensor:
    """From ``own`` over ``between`` to known rows and their vectors, averaged twice."""
    mean = table.mean(0, keepdim=True) if len(table) else table.new_zeros(1, table.shape[1])
    news = mean.repeat(new, 1)
    old = own < known
    if not new or not old.any():
        return news
    hub, there = _means(table[torch.from_numpy(own[old])], between[old], int(between.max()) + 1)
    edge = ~old & there[between]
    found, met = _means(hub[torch.from_numpy(between[edge])], own[edge] - known, new)
    chosen = torch.from_numpy(met)
    news[chosen] = found[chosen]
    return news


def _means(rows: Tensor, groups: IntArray, count: int) -> tuple[Tensor, np.ndarray]:
    index = torch.from_numpy(groups)
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, index, rows)
    sizes = torch.from_numpy(np.bincount(groups, minlength=count)).to(rows)
    return sums / sizes.clamp_min(1)[:, None], (sizes > 0).numpy()
