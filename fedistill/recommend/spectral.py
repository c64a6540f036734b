"""A sketch of who chose what: its leading singular vectors, brought up to date block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.types import FloatArray, IntArray

MORE, PASSES = 8, 6
"""Directions beyond those wanted, and passes over the matrix, of the randomised decomposition."""
PIECE = 1 << 14
"""Choices that are summed at a time, few enough for the cache."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """What has been learned of all choices so far, without any of them.

    Attributes:
        users: ``[users, rank]``.
        items: ``[items, rank]``: products tell how much more often than by chance, see
            :func:`sketched`.
        user_counts: ``[users]`` choices of each, faded ones in part.
        item_counts: ``[items]`` likewise.
        smooth: c, see :func:`sketched`.
    """

    users: Tensor
    items: Tensor
    user_counts: Tensor
    item_counts: Tensor
    smooth: float


@torch.no_grad()
def sketched(
    users: IntArray,
    items: IntArray,
    weights: FloatArray,
    sizes: tuple[int, int],
    rank: int,
    *,
    smooth: float = 10.0,
    old: Sketch | None = None,
    fade: float = 1.0,
) -> Sketch:
    """The sketch of choices, of some alone or of those that an older sketch stands for and more.

    With n choices of which n_u are a user's and n_i an item's, the matrix
    (Y - n_u n_i / n) / sqrt((n_u + c)(n_i + c)) is decomposed (Halko et al., SIAM Review 2011).
    Its part at (u, i), times n / sqrt((n_u + c)(n_i + c)), is P(i | u) / P(i) - 1: to first order
    what the score of a softmax adds to the item's bias. An older sketch stands in for its own Y,
    which it gives back but for what it had cut off (Brand, Linear Algebra Appl. 2006, updates a
    singular value decomposition so; here it is decomposed anew, since all scales change).

    Args:
        users: ``[n]`` rows of users.
        items: ``[n]`` rows of items.
        weights: ``[n]`` as how many choices each counts.
        sizes: how many users and items there are, those of the older sketch first.
        rank: numbers in a vector.
        smooth: c, choices added to every user and item: what is known of few is not taken at its
            word.
        old: what came before, with the same c.
        fade: as how much each choice before counts now.
    """
    rows, columns = torch.from_numpy(users), torch.from_numpy(items)
    counts = torch.from_numpy(weights).float()
    n_users = torch.zeros(sizes[0]).index_add_(0, rows, counts)
    n_items = torch.zeros(sizes[1]).index_add_(0, columns, counts)
    if old is not None:
        old = _padded(old, sizes)
        n_users, n_items = n_users + fade * old.user_counts, n_items + fade * old.item_counts
    total = float(n_users.sum())
    left, right = (n_users + smooth).rsqrt()[:, None], (n_items + smooth).rsqrt()[:, None]

    def forth(vectors: Tensor) -> Tensor:
        scaled = right * vectors
        sums = _gathered(rows, columns, counts, scaled, sizes[0])
        if old is not None:
            sums += fade * _remembered(old, scaled)
        return left * (sums - n_users[:, None] * (n_items @ scaled) / total)

    def back(vectors: Tensor) -> Tensor:
        scaled = left * vectors
        sums = _gathered(columns, rows, counts, scaled, sizes[1])
        if old is not None:
            sums += fade * _remembered(_turned(old), scaled)
        return right * (sums - n_items[:, None] * (n_users @ scaled) / total)

    basis = forth(torch.randn(sizes[1], min(rank + MORE, *sizes)))
    for _ in range(PASSES):
        basis = torch.linalg.qr(forth(torch.linalg.qr(back(torch.linalg.qr(basis).Q)).Q)).Q
    axes, values, turn = torch.linalg.svd(back(basis), full_matrices=False)
    root = (values[:rank] * total).sqrt()
    pad = (0, max(0, rank - len(values)))
    return Sketch(
        F.pad(left * (basis @ turn.T[:, :rank]) * root, pad),
        F.pad(right * axes[:, :rank] * root, pad),
        n_users,
        n_items,
        smooth,
    )


def _gathered(to: Tensor, of: Tensor, counts: Tensor, vectors: Tensor, size: int) -> Tensor:
    """Sum over choices of ``counts * vectors[of]`` at ``to``."""
    sums = vectors.new_zeros(size, vectors.shape[1])
    for start in range(0, len(to), PIECE):
        part = slice(start, start + PIECE)
        sums.index_add_(0, to[part], counts[part, None] * vectors[of[part]])
    return sums


def _remembered(old: Sketch, vectors: Tensor) -> Tensor:
    """The same sum at users, over the choices that a sketch stands for."""
    total = old.user_counts.sum()
    if total <= 0:
        return vectors.new_zeros(len(old.users), vectors.shape[1])
    chance = old.user_counts[:, None] * (old.item_counts @ vectors)
    theirs = old.items.T @ ((old.item_counts + old.smooth)[:, None] * vectors)
    return (chance + (old.user_counts + old.smooth)[:, None] * (old.users @ theirs)) / total


def _turned(sketch: Sketch) -> Sketch:
    """Users and items in each other's place."""
    return Sketch(sketch.items, sketch.users, sketch.item_counts, sketch.user_counts, sketch.smooth)


def _padded(sketch: Sketch, sizes: tuple[int, int]) -> Sketch:
    """The sketch with rows for users and items that it has not met."""
    users, items = sizes[0] - len(sketch.users), sizes[1] - len(sketch.items)
    return Sketch(
        F.pad(sketch.users, (0, 0, 0, users)),
        F.pad(sketch.items, (0, 0, 0, items)),
        F.pad(sketch.user_counts, (0, users)),
        F.pad(sketch.item_counts, (0, items)),
        sketch.smooth,
    )
