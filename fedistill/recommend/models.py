"""Recommenders as two towers: a user's vector, an item's vector, and their product as the score.

All three have the same five methods (:class:`Towers`), grow with users and items, and hold no
interactions: what a user chose is handed in as a history, item numbers from 1, 0 for nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.errors import FedistillError

START = 0.1
"""Standard deviation of the first weights of a table, divided by nothing: scores begin near 0."""


class Towers(Protocol):
    """What :class:`fedistill.recommend.Recommender` asks of a model."""

    def user_vectors(self, users: Tensor, history: Tensor | None = None) -> Tensor:
        """``[n, width]`` of users ``[n]`` with the items ``[n, h]`` they chose, latest last."""
        ...

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        """``[m, width]`` of items ``[m]``, all without."""
        ...

    def item_biases(self, items: Tensor | None = None) -> Tensor:
        """``[m]`` likewise: what an item scores with everybody."""
        ...

    def grow(self, users: Tensor | int, items: Tensor | int) -> None:
        """Append rows for new users and items: as given ``[new, width]``, or so many at random."""
        ...


class ItemTable(nn.Module, ABC):
    """What models with a table of item vectors share: the tower of the items, and scores.

    Attributes:
        items: ``[items, width]``.
        bias: ``[items]``.
    """

    items: nn.Parameter
    bias: nn.Parameter

    @abstractmethod
    def user_vectors(self, users: Tensor, history: Tensor | None = None) -> Tensor:
        """Vectors of users ``[n, width]``."""

    @abstractmethod
    def grow(self, users: Tensor | int, items: Tensor | int) -> None:
        """Append rows for new users and items."""

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        return self.items if items is None else F.embedding(items, self.items)

    def item_biases(self, items: Tensor | None = None) -> Tensor:
        return self.bias if items is None else self.bias[items]

    def forward(self, users: Tensor, history: Tensor | None = None) -> Tensor:
        """Scores of all items, ``[n, items]``."""
        return scores_of(self, users, history)


class MatrixFactorisation(ItemTable):
    """A vector of its own for each user and each item, and a bias for each item.

    Args:
        users: number of users, may be 0 and grow.
        items: number of items, likewise.
        width: numbers in a vector.
    """

    looks_back = False

    def __init__(self, users: int, items: int, width: int = 32) -> None:
        super().__init__()
        self.users = nn.Parameter(table(users, width))
        self.items = nn.Parameter(table(items, width))
        self.bias = nn.Parameter(torch.zeros(items))

    def user_vectors(self, users: Tensor, history: Tensor | None = None) -> Tensor:  # noqa: D102
        return F.embedding(users, self.users)

    def grow(self, users: Tensor | int, items: Tensor | int) -> None:
        """Append rows for new users and items; what was there keeps every bit.

        Args:
            users: their vectors ``[new, width]``, or how many begin at random.
            items: likewise; their biases begin at the lowest that is there.
        """
        width = self.items.shape[1]
        self.users = appended(self.users, _rows(users, width))
        self.items = appended(self.items, _rows(items, width))
        self.bias = grown_biases(self.bias, len(self.items))


class TwoTower(ItemTable):
    """The user tower also looks at what the user chose: new users are served without training.

    User: own vector + W mean(vectors of the history); item: own vector and a bias.

    Args:
        users: number of users, may be 0 and grow.
        items: number of items, likewise.
        width: numbers in a vector.
    """

    looks_back = True

    def __init__(self, users: int, items: int, width: int = 32) -> None:
        super().__init__()
        self.users = nn.Parameter(torch.zeros(users, width))
        self.items = nn.Parameter(table(items, width))
        self.chosen = nn.Parameter(table(items, width))
        self.bias = nn.Parameter(torch.zeros(items))
        self.mix = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.mix.weight)

    def user_vectors(self, users: Tensor, history: Tensor | None = None) -> Tensor:  # noqa: D102
        own = F.embedding(users, self.users)
        if history is None or not history.shape[1]:
            return own
        there = (history > 0).to(own.dtype)
        held = F.embedding((history - 1).clamp_min(0), self.chosen) * there[..., None]
        mixed: Tensor = self.mix(held.sum(1) / there.sum(1, keepdim=True).clamp_min(1))
        return own + mixed

    def grow(self, users: Tensor | int, items: Tensor | int) -> None:
        """Append rows for new users and items; what was there keeps every bit.

        Args:
            users: how many; their own vectors begin at 0, their history speaks for them. Vectors
                ``[new, width]`` are taken as given.
            items: their vectors ``[new, width]``, or how many begin at random.
        """
        width = self.items.shape[1]
        news = torch.zeros(users, width) if isinstance(users, int) else users
        self.users = appended(self.users, news)
        rows = _rows(items, width)
        self.items = appended(self.items, rows)
        self.chosen = appended(self.chosen, rows)
        self.bias = grown_biases(self.bias, len(self.items))


class SequentialRecommender(nn.Module):
    """What comes next after the last clicks: a GRU over the vectors of the items.

    As a classifier it takes ``[n, history]`` item numbers as floats (0: nothing, latest last) to
    logits ``[n, items]``, the model ``sequential`` of a federation. GRU4Rec, Hidasi et al., ICLR
    2016, without its ranking loss; one table of item vectors serves input and output.

    Args:
        items: number of items; classes of a classifier.
        width: numbers in a vector.
    """

    looks_back = True

    def __init__(self, items: int, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)
        self.towards = nn.Linear(width, width)
        # Last, so that it is known as the head: where classes grow, and whose inputs are features.
        self.head = nn.Linear(width, max(items, 1))  # of none torch warns
        self.head.weight = nn.Parameter(table(items, width))
        self.head.bias = nn.Parameter(torch.zeros(items))
        self.head.out_features = items

    @property
    def items(self) -> Tensor:
        """The vectors of the items ``[items, width]``, those of the input too."""
        return self.head.weight

    @property
    def bias(self) -> Tensor:
        """How much each item is chosen anyway ``[items]``."""
        return self.head.bias

    def user_vectors(self, users: Tensor, history: Tensor | None = None) -> Tensor:  # noqa: D102
        if history is None:
            raise FedistillError("a sequential recommender needs histories, found none: hand them")
        if not len(history) or not history.shape[1]:
            return self.items.new_zeros(len(history), self.items.shape[1])
        known = history.clamp(0, len(self.items))
        there = known > 0
        steps = F.embedding((known - 1).clamp_min(0), self.items) * there[..., None]
        hidden, _ = self.gru(steps)
        vectors: Tensor = self.towards(hidden[:, -1])
        return vectors * there.any(1, keepdim=True)

    def item_vectors(self, items: Tensor | None = None) -> Tensor:  # noqa: D102
        return self.items if items is None else F.embedding(items, self.items)

    def item_biases(self, items: Tensor | None = None) -> Tensor:  # noqa: D102
        return self.bias if items is None else self.bias[items]

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the next item ``[n, items]`` from the last ones ``[n, history]``."""
        history = inputs.flatten(1).long()
        logits: Tensor = self.head(self.user_vectors(history[:, :0], history))
        return logits

    def grow(self, users: Tensor | int, items: Tensor | int) -> None:
        """Append rows for new items; users have none. What was there keeps every bit."""
        rows = _rows(items, self.items.shape[1])
        self.head.weight = appended(self.items, rows)
        self.head.bias = grown_biases(self.bias, len(self.items))
        self.head.out_features = len(self.items)


MODELS = {"mf": MatrixFactorisation, "two-tower": TwoTower, "sequential": SequentialRecommender}
"""Names of models that a :class:`fedistill.recommend.Recommender` builds itself."""


def scores_of(
    model: Towers, users: Tensor, history: Tensor | None = None, items: Tensor | None = None
) -> Tensor:
    """Scores ``[n, m]`` of users ``[n]`` and items ``[m]``, all items without."""
    vectors = model.user_vectors(users, history)
    return vectors @ model.item_vectors(items).T + model.item_biases(items)


def table(rows: int, width: int) -> Tensor:
    """Random vectors ``[rows, width]``; a longer table begins with the rows of a shorter one."""
    return (
        torch.stack([START * torch.randn(width) for _ in range(rows)])
        if rows
        else (torch.zeros(0, width))
    )


def appended(weight: Tensor, rows: Tensor) -> nn.Parameter:
    """A parameter with more rows."""
    return nn.Parameter(torch.cat([weight.detach(), rows.to(weight)]))


def grown_biases(bias: Tensor, items: int) -> nn.Parameter:
    """Biases for more items: a new one is taken to be as rare as the rarest."""
    lowest = float(bias.detach().min()) if len(bias) else 0.0
    return appended(bias, torch.full((items - len(bias),), lowest))


def _rows(news: Tensor | int, width: int) -> Tensor:
    if isinstance(news, int):
        return table(news, width)
    if news.dim() != 2 or news.shape[1] != width:
        raise FedistillError(
            f"grow: expected vectors [new, {width}], found {list(news.shape)}: hand one for each"
        )
    return news


__all__ = [
    "MODELS",
    "MatrixFactorisation",
    "SequentialRecommender",
    "Towers",
    "TwoTower",
    "scores_of",
]
