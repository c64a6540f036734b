"""Training of two towers: the chosen item against others, beside what a teacher said of all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.distill.optimizer import Optimizer
from fedistill.distill.recipe import Recipe
from fedistill.errors import FedistillError
from fedistill.losses.lists import LOWEST
from fedistill.types import FloatArray, IntArray

FLATTER = 0.75
"""Items are drawn with probability in proportion to (choices + 1) to this power, as word2vec does:
most of the softmax over a catalogue lies on frequent items."""
ABSENT = -1e4
"""A teacher's score of an item that it had not met: probability 0."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a recommender trains: numbers only.

    Attributes:
        steps: on the first block, and on everything when training from scratch; 0 leaves the model
            where it starts.
        update_steps: on a later block, likewise.
        lr: learning rate of Adam at the start; it falls to 0 along a cosine.
        update_lr: the same for a later block.
        batch_size: users (for towers that look back: choices) in a step; as many others join them
            where a teacher speaks.
        negatives: items drawn for a step; a catalogue that is no larger takes part as a whole.
        penalty: weight of the mean squared length of the vectors in a step.
        fade: factor on older choices with every block that comes: the latest say most about the
            next.
        history: latest items that a tower which looks back is shown.
        solver: how ``mf`` is learned from scratch: ``spectral``, placed where the leading singular
            vectors of who chose what say, at once; or by ``gradient`` steps, as the other models.
        scale: length of the spectral vectors, as a share of what they were found to be.
        smooth: choices added to every user and item before it: few are not taken at their word.
        rank: numbers in a row of the sketch that is kept of all choices, more than in a vector.
    """

    steps: int = 300
    update_steps: int = 150
    lr: float = 0.05
    update_lr: float = 0.02
    batch_size: int = 1024
    negatives: int = 2048
    penalty: float = 0.1
    fade: float = 1.0
    history: int = 20
    solver: str = "spectral"
    scale: float = 0.7
    smooth: float = 10.0
    rank: int = 128

    def __post_init__(self) -> None:
        least = {"steps": 0, "update_steps": 0}
        least |= dict.fromkeys(("batch_size", "negatives", "history", "rank"), 1)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise FedistillError(
                    f"training: expected {name} of {low} at least, found {getattr(self, name)}"
                )
        for name in ("lr", "update_lr", "scale", "smooth"):
            if not getattr(self, name) > 0:
                raise FedistillError(f"training: expected {name} above 0")
        if self.solver not in {"spectral", "gradient"}:
            raise FedistillError(
                f'training: expected solver of spectral, gradient, found "{self.solver}"'
            )
        if not 0 < self.fade <= 1:
            raise FedistillError(f"training: expected fade above 0 and up to 1, found {self.fade}")
        if self.penalty < 0:
            raise FedistillError(f"training: expected a penalty from 0, found {self.penalty}")


@dataclass(frozen=True, eq=False)
class Choices:
    """What is learned from: askers, and the items that each of them chose.

    A user is one asker with many items; for towers that look back every choice is one, with what
    was chosen before it.

    Attributes:
        users: ``[c]`` rows of the askers.
        owners: ``[n]`` which asker, never falling.
        items: ``[n]`` rows of items.
        history: ``[c, h]`` item numbers from 1, 0 for nothing; None for towers that do not look.
        weights: ``[n]`` of each choice beside the others; None: equal.
    """

    users: IntArray
    owners: IntArray
    items: IntArray
    history: IntArray | None = None
    weights: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True, eq=False)
class Teacher:
    """An earlier model, and the askers that its scores are asked for.

    Attributes:
        model: towers as they were; see :func:`frozen`.
        users: ``[u]`` rows of users.
        chances: ``[u]`` how often each is asked, in proportion.
        items: how many items it had met: the first rows of the catalogue.
        weight: of its word beside the choices of the block.
        known_only: whether only the items that it had met are compared (LwF); otherwise what is
            new is not what these users chose.
        history: ``[u, h]``; None for towers that do not look.
        anchor: ``[items]`` shares of the items it had met in its choices; with them its vectors
            hold those of the student as firmly as the penalty held its own, see :func:`fit`.
    """

    model: Any
    users: IntArray
    chances: FloatArray
    items: int
    weight: float
    known_only: bool = False
    history: IntArray | None = None
    anchor: FloatArray | None = None


def frozen(model: Any) -> Any:
    """A copy that no gradient reaches."""
    held = copy.deepcopy(model)
    held.eval()
    held.requires_grad_(False)
    return held


def by_user(users: IntArray, items: IntArray, weights: FloatArray | None = None) -> Choices:
    """Choices with one asker for each user."""
    askers, owners = np.unique(users, return_inverse=True)
    order = np.argsort(owners, kind="stable")
    return Choices(
        askers, owners[order], items[order], None, None if weights is None else weights[order]
    )


def fit(
    model: Any,
    choices: Choices,
    training: Training,
    *,
    counts: FloatArray,
    random: np.random.Generator,
    steps: int,
    lr: float,
    teachers: tuple[Teacher, ...] = (),
    watch: Callable[[int], None] | None = None,
) -> float:
    """Teach a model some choices; returns the mean loss of the last tenth, 0 without choices.

    Args:
        model: towers, changed in place.
        choices: what is learned.
        training: how.
        counts: ``[items]`` how often each was chosen: what negatives are drawn by.
        random: of order and negatives.
        steps: of the optimizer.
        lr: learning rate at the start.
        teachers: whose scores count beside the choices.
        watch: called with the number of each step that is done.
    """
    if not len(choices) or not steps:
        model.eval()
        return 0.0
    optimizer = Optimizer(Recipe(optimizer="adam"), list(model.parameters()))
    model.train()
    losses: list[float] = []
    batches = _Batches(choices, training.batch_size, random)
    for step in range(steps):
        batch = batches.next()
        drawn, log_q = draw_items(counts, training.negatives, random)
        vectors, biases = model.item_vectors(drawn), model.item_biases(drawn)
        loss = _choice_loss(model, batch, vectors, biases, log_q, training.penalty)
        for teacher in teachers:
            loss = loss + teacher.weight * _teacher_loss(
                model, teacher, drawn, vectors, biases, log_q, training, random
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(lr * (1 + np.cos(np.pi * step / steps)) / 2)
        losses.append(float(loss.detach()))
        if watch is not None:
            watch(step)
    optimizer.zero_grad()
    model.eval()
    return float(np.mean(losses[-max(1, steps // 10) :]))


def draw_items(
    counts: FloatArray, most: int, random: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Items to stand for the catalogue ``[m]``, and the log of m times the chance of each.

    A catalogue of at most ``most`` items stands for itself, without chances.
    """
    if len(counts) <= most:
        return torch.arange(len(counts)), None
    heap = ((counts + 1.0) ** FLATTER).cumsum()
    drawn = np.searchsorted(heap, random.random(most) * heap[-1], side="right")
    chances = (counts[drawn] + 1.0) ** FLATTER / heap[-1]
    return torch.from_numpy(drawn), torch.from_numpy(np.log(most * chances)).float()


def _choice_loss(
    model: Any,
    batch: Choices,
    vectors: Tensor,
    biases: Tensor,
    log_q: Tensor | None,
    penalty: float,
) -> Tensor:
    """Cross-entropy of the chosen items, mean over choices.

    The sum over the catalogue is that of the asker, computed once for all its choices.
    """
    users = model.user_vectors(*_asked(batch.users, batch.history))
    items, owners = torch.from_numpy(batch.items), torch.from_numpy(batch.owners)
    chosen, asking = model.item_vectors(items), F.embedding(owners, users)
    positive = (asking * chosen).sum(1) + model.item_biases(items)
    scores = users @ vectors.T + biases
    if log_q is None:
        total = scores.logsumexp(1)[owners]
    else:  # a draw may miss the chosen item, whose score would then grow unopposed
        total = torch.logaddexp((scores - log_q).logsumexp(1)[owners], positive)
    parts = total - positive + penalty * (asking.square().sum(1) + chosen.square().sum(1))
    if batch.weights is None:
        mean: Tensor = parts.mean()
        return mean
    weights = torch.from_numpy(batch.weights).to(parts)
    weighed: Tensor = (parts * weights).sum() / weights.sum()
    return weighed


def _teacher_loss(
    model: Any,
    teacher: Teacher,
    drawn: Tensor,
    vectors: Tensor,
    biases: Tensor,
    log_q: Tensor | None,
    training: Training,
    random: np.random.Generator,
) -> Tensor:
    """KL of what the student says of some askers to what the teacher said, over drawn items."""
    heap = teacher.chances.cumsum()
    if len(heap) <= training.batch_size:  # few enough to ask all, each as much as it counts
        rows, share = np.arange(len(heap)), torch.from_numpy(teacher.chances / heap[-1]).float()
    else:
        size = training.batch_size
        rows = np.searchsorted(heap, random.random(size) * heap[-1], side="right")
        share = torch.full((size,), 1 / size)
    asked = _asked(teacher.users[rows], None if teacher.history is None else teacher.history[rows])
    met = drawn < teacher.items
    with torch.no_grad():
        known = drawn.clamp_max(max(teacher.items - 1, 0))
        old = teacher.model
        before = old.user_vectors(*asked)
        wanted = before @ old.item_vectors(known).T + old.item_biases(known)
        wanted = wanted.masked_fill(~met, ABSENT)
    users = model.user_vectors(*asked)
    scores = users @ vectors.T + biases
    if log_q is not None:
        scores, wanted = scores - log_q, wanted - log_q
    if teacher.known_only:
        scores = scores.masked_fill(~met, LOWEST)
    said, target = scores.log_softmax(1), wanted.log_softmax(1)
    loss: Tensor = ((target.exp() * (target - said)).sum(1) * share).sum()
    if teacher.anchor is None:
        return loss
    held = torch.from_numpy(teacher.anchor).float()
    moved = (model.item_vectors()[: teacher.items] - old.item_vectors()).square().sum(1)
    drift = ((users - before).square().sum(1) * share).sum() + (moved * held).sum()
    held_loss: Tensor = loss + training.penalty * drift
    return held_loss


def _asked(users: IntArray, history: IntArray | None) -> tuple[Tensor, Tensor | None]:
    return torch.from_numpy(users), None if history is None else torch.from_numpy(history)


class _Batches:
    """Askers in batches, each once before any twice."""

    def __init__(self, choices: Choices, size: int, random: np.random.Generator) -> None:
        self.choices, self.size, self.random = choices, size, random
        self.starts = np.searchsorted(choices.owners, np.arange(len(choices) + 1))
        self.order: IntArray = np.empty(0, dtype=np.int64)

    def next(self) -> Choices:
        if len(self.choices) <= self.size:
            return self.choices
        if not len(self.order):
            self.order = self.random.permutation(len(self.choices))
        rows, self.order = self.order[: self.size], self.order[self.size :]
        counts = self.starts[rows + 1] - self.starts[rows]
        owners = np.repeat(np.arange(len(rows)), counts)
        places = np.arange(len(owners)) - np.repeat(counts.cumsum() - counts, counts)
        places = places + self.starts[rows][owners]
        whole = self.choices
        return Choices(
            whole.users[rows],
            owners,
            whole.items[places],
            None if whole.history is None else whole.history[rows],
            None if whole.weights is None else whole.weights[places],
        )
