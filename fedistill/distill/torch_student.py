"""A torch module as a learner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.byhand import Program, program_of
from fedistill.distill.batches import Batch, Batches, Memory, local_batches, soft_batches
from fedistill.distill.guide import Guide, guiding, nearest_prototype
from fedistill.distill.optimizer import Optimizer, falling
from fedistill.distill.recipe import Recipe
from fedistill.distill.resident import Resident
from fedistill.distill.trunk import Trunk, trunk_of
from fedistill.losses import (
    logit_mae,
    own_or_proxy,
    soft_cross_entropy,
)
from fedistill.losses.soft_targets import own_or_proxy_slope, soft_cross_entropy_slope
from fedistill.seeding import derive
from fedistill.types import FloatArray, IntArray, Logits, Probs, Rows, State

PREDICT_ROWS = 250
"""Rows of one forward pass when predicting: small enough to stay in cache."""

Loss: TypeAlias = Callable[[Batch, Batch], Tensor]
"""Of a part of a batch, given the whole: the losses of the parts add up to that of the whole."""
Slopes: TypeAlias = Callable[..., list[Tensor | None]]
"""From a part of a batch and a network's outputs to the gradient of the loss by each of them."""


@dataclass(frozen=True)
class Lesson:
    """What a student is to train on next, before it does.

    Attributes:
        batches: what its steps see.
        own: there are own rows in each; else soft targets alone.
        offset: added to the logits of own rows, ``[classes]``; None: nothing.
        seed: of dropout, and of what a guide draws.
    """

    batches: Batches
    own: bool
    offset: Tensor | None
    seed: int

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return len(self.batches)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own torch seed and put the global generator back afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class WithFamiliarity(nn.Module):
    """A module with one more output: how familiar a row is, from the features before the head.

    The features are those of its :class:`Trunk`, into which the gradient flows.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.module = module
        self._trunk = Trunk(module)
        was_training = module.training
        module.eval()
        with torch.no_grad():
            features = self._trunk.of(module(example))
        module.train(was_training)
        with seeded(0):  # it starts at zero: what is drawn first must not move other draws
            self.score = nn.Linear(features.shape[-1], 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[rows, classes]`` and familiarity ``[rows]``."""
        logits: Tensor = self.module(inputs)
        score: Tensor = self.score(self._trunk.of(logits))[:, 0]
        return logits, score


class TorchStudent:
    """A torch module that fits rows, absorbs soft targets and predicts.

    Args:
        build: a factory of modules, inputs ``[batch, ...]`` to logits ``[batch, classes]``.
        recipe: how to train.
        classes: number of classes.
        seed: of the initial weights; equal seeds and factories start equal.
        device: where to compute.
        background: proxy rows; needed to learn familiarity.

    Attributes:
        passed: rows that its steps have seen since it was built.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        recipe: Recipe,
        *,
        classes: int,
        seed: int,
        device: torch.device | None = None,
        background: FloatArray | None = None,
    ) -> None:
        self.recipe = recipe
        self.classes = classes
        self.device = device or torch.device("cpu")
        self.background = None if background is None else self._tensor(background)
        with seeded(seed):
            module = build()
        self.module = module.to(self.device)
        self._scored: WithFamiliarity | None = None
        if recipe.familiarity and self.background is not None:
            self._scored = WithFamiliarity(self.module, self.background[:2]).to(self.device)
        self._net: nn.Module = self._scored or self.module
        self._averaged = [p.detach().clone() for p in self._weights()] if recipe.average else []
        self._steps = 0
        self.passed = 0
        self._memory: Memory | None = None
        self._guide: Guide | None = None
        self._optimizer = Optimizer(recipe, self._weights())
        self._program: Program | None = None
        self._physical = 1 << 30

    # --- the three methods of a learner --------------------------------------------------------

    def absorb(
        self,
        inputs: FloatArray,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> None:
        """Distil on soft targets at once (``phase``), or keep them for ``fit`` (``inside``)."""
        lesson = self.hear(inputs, soft_targets, seed=seed, weights=weights)
        if lesson is not None:
            self.work_through(lesson)

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Train on own rows, joined by proxy rows; without own rows, on the proxy rows alone.

        A guide counts while there are own rows. Its part of the loss keeps its weight from round
        to round: a schedule over rounds, as FedHeNN has one, is left to the caller.
        """
        lesson = self.lesson(rows, seed)
        if lesson is not None:
            self.work_through(lesson)

    # --- the same, before it is learned --------------------------------------------------------

    def hear(
        self,
        inputs: FloatArray | Tensor,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> Lesson | None:
        """What ``absorb`` would train on at once; None where it only keeps the targets."""
        if weights is None:
            weights = np.ones(len(inputs))
        memory = Memory(self._tensor(inputs), self._tensor(soft_targets), weights)
        if self.recipe.distil == "inside":
            self._memory = memory
        return self._phase(memory, seed) if self.recipe.distil == "phase" else None

    def lesson(self, rows: Rows, seed: int) -> Lesson | None:
        """What ``fit`` would train on; None where there is nothing."""
        if len(rows) == 0 or self.recipe.epochs == 0:
            return None if self._memory is None else self._phase(self._memory, seed)
        labels = torch.from_numpy(rows.labels).to(self.device)
        batches = local_batches(
            self._tensor(rows.inputs),
            nn.functional.one_hot(labels, self.classes).float(),
            self._memory,
            self.background if self._scored is not None else None,
            self.recipe,
            seed,
        )
        offset = self._log_shares(rows.labels) if self.recipe.calibrate else None
        return Lesson(batches, True, offset, seed)

    def work_through(self, lesson: Lesson) -> None:
        """Train on what ``hear`` or ``lesson`` gave."""
        if not lesson.own:
            slopes = _soft_slopes if self.recipe.loss == "kl" else None
            self._train(lesson.batches, self._soft_loss, lesson.seed, slopes=slopes)
            return
        offset = lesson.offset

        with guiding(self._guide, self.recipe, self.module, lesson.seed, self.device) as guide:

            def loss(part: Batch, whole: Batch) -> Tensor:
                logits, score = self._forward(part.inputs)
                guided = guide.on_own(logits, part, whole) if guide is not None else None
                if offset is not None:
                    logits = torch.cat([logits[: part.own] + offset, logits[part.own :]])
                if part.temperature != 1.0:
                    logits = torch.cat([logits[: part.own], logits[part.own :] / part.temperature])
                total = soft_cross_entropy(logits, part.targets, part.weight)
                total = total if guided is None else total + guided
                return total if self._scored is None else total + own_or_proxy(score, part.familiar)

            beside = None if guide is None else guide.beside
            plain = guide is None and offset is None and self.recipe.temperature == 1.0
            slopes = _own_slopes if plain else None
            self._train(lesson.batches, loss, lesson.seed, beside, slopes=slopes)

    def guide(self, guide: Guide | None) -> None:
        """Train by this table from the next ``fit`` on, until there is another; None: by none.

        Raises:
            FedistillError: the table is about other classes.
        """
        if guide is not None:
            guide.check_classes(self.classes)
        self._guide = guide

    def restart(self) -> None:
        """Forget the optimizer's state, as when the weights were replaced from outside."""
        self._optimizer.state.clear()

    def predict(self, inputs: FloatArray) -> Logits:
        """Logits ``[rows, classes]``, float32."""
        guide = self._guide if self.recipe.predict == "prototypes" else None
        if guide is not None and guide.kind == "prototypes" and guide.present.any():
            return nearest_prototype(self.features(inputs), guide)
        return self._evaluate(inputs)[0]

    def features(self, inputs: FloatArray) -> FloatArray:
        """What the last linear layer is given, ``[rows, width]``; logits without such a layer."""
        rows = self._tensor(inputs)
        # The width of no rows at all is known from a blank one.
        shown = rows if len(rows) else rows.new_zeros((1, *rows.shape[1:]))
        self._net.eval()
        with self._predicting(), torch.inference_mode(), trunk_of(self.module) as trunk:
            parts = [
                trunk.of(self.module(shown[start : start + PREDICT_ROWS])).cpu().numpy()
                for start in range(0, len(shown), PREDICT_ROWS)
            ]
        return np.concatenate(parts)[: len(rows)]

    def familiarity(self, inputs: FloatArray) -> FloatArray:
        """Log density ratio of own to proxy rows, ``[rows]``; 0 where it is not learned."""
        return self._evaluate(inputs)[1]

    def state_dict(self) -> State:
        """Weights, their moving average, the optimizer's tensors, the guide and the steps taken."""
        state = {f"net.{k}": _copied(v) for k, v in self._net.state_dict().items()}
        state |= {f"average.{i}": _copied(v) for i, v in enumerate(self._averaged)}
        for index, weight in enumerate(self._weights()):
            for key, value in self._optimizer.state.get(weight, {}).items():
                state[f"optimizer.{index}.{key}"] = _copied(value)
        if self._guide is not None:
            state |= {f"guide.{k}": v for k, v in self._guide.state_dict().items()}
        return state | {"steps": np.array([self._steps], dtype=np.int64)}

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore the weights of a module of the same shape."""
        del rows
        named = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        net = {name[4:]: value for name, value in named.items() if name.startswith("net.")}
        self._net.load_state_dict(net)
        for index, tensor in enumerate(self._averaged):
            tensor.copy_(named[f"average.{index}"])
        weights = self._weights()
        self._optimizer.state.clear()
        for name, value in named.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                home = value if key == "step" else value.to(self.device)
                self._optimizer.state.setdefault(weights[int(number)], {})[key] = home
        self._guide = Guide.from_state(
            {k[6:]: v for k, v in state.items() if k.startswith("guide.")}
        )
        self._steps = int(state["steps"][0])

    # --- side by side with others --------------------------------------------------------------

    @property
    def scored(self) -> bool:
        """Whether it learns familiarity."""
        return self._scored is not None

    @property
    def trunk(self) -> Trunk | None:
        """What listens to its module for the familiarity; None where it learns none."""
        return None if self._scored is None else self._scored._trunk

    @property
    def guided(self) -> bool:
        """Whether it has a table to train by."""
        return self._guide is not None

    def keeps(self) -> float:
        """How much of the moving average the next step keeps."""
        return min(self.recipe.average, (1 + self._steps) / (10 + self._steps))

    def count(self, rows: int) -> None:
        """A step was taken on this many rows."""
        self._steps += 1
        self.passed += rows

    # --- training ------------------------------------------------------------------------------

    def _distil(self, memory: Memory, seed: int) -> None:
        """A phase on soft targets alone."""
        self._train(soft_batches(memory, self.recipe, seed), self._soft_loss, seed)

    def _phase(self, memory: Memory, seed: int) -> Lesson | None:
        """The same as a lesson; None without any targets."""
        if not len(memory):
            return None
        return Lesson(soft_batches(memory, self.recipe, seed), False, None, seed)

    def _soft_loss(self, part: Batch, whole: Batch) -> Tensor:
        """Of rows that have soft targets alone."""
        del whole
        logits, _ = self._forward(part.inputs)
        if self.recipe.loss == "mae":
            return logit_mae(logits, part.targets) * part.weight.sum()
        return soft_cross_entropy(logits, part.targets, part.weight, part.temperature)

    def _train(
        self,
        batches: Batches,
        loss: Loss,
        seed: int,
        beside: Callable[[int], Tensor | None] | None = None,
        after: Callable[[], None] | None = None,
        recipe: Recipe | None = None,
        slopes: Slopes | None = None,
    ) -> None:
        """One optimizer step for each batch.

        Args:
            batches: what the steps see.
            loss: of a batch.
            seed: of dropout.
            beside: a term of the step and not of rows.
            after: called after each step.
            recipe: rate, schedule and clipping; None: the student's own.
            slopes: of the same loss, for a network by hand, which then needs no graph.
        """
        recipe = recipe or self.recipe
        self._net.train()
        if batches.smallest == 1:
            # A single row has no variance: batch statistics would be undefined.
            for layer in self._net.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()
        resident = Resident(self._optimizer, self._averaged)
        with seeded(derive(seed, "dropout")), self._by_hand(), resident:
            for step, batch in enumerate(batches):
                share = falling(step, len(batches)) if recipe.schedule == "cosine" else 1.0
                extra = None if beside is None else partial(beside, step)
                self._backward(batch, loss, extra, slopes)
                resident.step(recipe.lr * share, recipe.clip)
                self.count(len(batch))
                resident.follow(self.keeps())
                if after is not None:
                    after()
        self._net.eval()

    def _backward(
        self,
        batch: Batch,
        loss: Loss,
        beside: Callable[[], Tensor | None] | None = None,
        slopes: Slopes | None = None,
    ) -> None:
        """Gradient of one batch; out of memory, in parts that add up to the same."""
        while True:
            self._optimizer.zero_grad()
            size = min(self._physical, len(batch))
            try:
                for start in range(0, len(batch), size):
                    part = batch if size == len(batch) else batch.cut(start, start + size)
                    program = None if slopes is None else self._program_for(part.inputs)
                    if program is not None and slopes is not None:
                        program.teach(part.inputs, partial(slopes, part))
                    else:
                        loss(part, batch).backward()  # type: ignore[no-untyped-call]
                extra = beside() if beside is not None else None
                # Features of a model without hidden layers are its inputs: nothing to align.
                if extra is not None and extra.requires_grad:
                    extra.backward()  # type: ignore[no-untyped-call]
                return
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self._physical = max(1, size // 2)

    def _update_average(self, weights: list[nn.Parameter]) -> None:
        if self._averaged:
            torch._foreach_lerp_(self._averaged, [w.detach() for w in weights], 1 - self.keeps())

    # --- predicting ----------------------------------------------------------------------------

    def _evaluate(self, inputs: FloatArray) -> tuple[Logits, FloatArray]:
        rows = self._tensor(inputs)
        logits = np.zeros((len(rows), self.classes), dtype=np.float32)
        scores = np.zeros(len(rows), dtype=np.float32)
        self._net.eval()
        with self._predicting(), self._by_hand(), torch.inference_mode():
            for start in range(0, len(rows), PREDICT_ROWS):
                part = slice(start, start + PREDICT_ROWS)
                found, score = self._forward(rows[part])
                logits[part] = found.cpu().numpy()
                scores[part] = score.cpu().numpy()
        return logits, np.clip(scores, -FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)

    @contextmanager
    def _predicting(self) -> Iterator[None]:
        """Predict with the averaged weights, if there are any and a step was taken."""
        if not self._averaged or not self._steps:
            yield
            return
        weights = self._weights()
        last = [weight.data for weight in weights]
        for weight, averaged in zip(weights, self._averaged, strict=True):
            weight.data = averaged
        try:
            yield
        finally:
            for weight, data in zip(weights, last, strict=True):
                weight.data = data

    @contextmanager
    def _by_hand(self) -> Iterator[None]:
        """Within the block, forward and backward by hand, where the module has such."""
        before = self._program
        if self._scored is None:
            self._program = program_of(self.module)
        else:
            trunk = self._scored._trunk
            self._program = program_of(self.module, self._scored.score, heard=trunk)
        try:
            yield
        finally:
            self._program = before

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if (program := self._program_for(inputs)) is not None:
            logits, *scores = program(inputs)
            return logits, scores[0][:, 0] if scores else logits.new_zeros(len(logits))
        if self._scored is not None:
            logits, score = self._scored(inputs)
            return logits, score
        logits = self.module(inputs)
        return logits, logits.new_zeros(len(logits))

    def _program_for(self, inputs: Tensor) -> Program | None:
        """The network by hand, if it has one that can be given these rows."""
        return self._program if self._program is not None and self._program.takes(inputs) else None

    def _weights(self) -> list[nn.Parameter]:
        return [weight for weight in self._net.parameters() if weight.requires_grad]

    def _log_shares(self, labels: IntArray) -> Tensor:
        """Log of the own class shares ``[classes]``; a class never met gets half a row."""
        counts = np.bincount(labels, minlength=self.classes).astype(np.float64)
        shares = np.maximum(counts, 0.5) / max(len(labels), 1)
        return self._tensor(np.log(shares))

    def _tensor(self, array: Any) -> Tensor:
        if isinstance(array, Tensor):  # on the device already, for all who share it
            return array.to(self.device)
        tensor: Tensor = torch.as_tensor(np.asarray(array, dtype=np.float32))
        return tensor.to(self.device)


def _soft_slopes(part: Batch, logits: Tensor, *scores: Tensor) -> list[Tensor | None]:
    """Of the cross-entropy with soft targets; it does not depend on scores."""
    slope = soft_cross_entropy_slope(logits, part.targets, part.weight, part.temperature)
    return [slope, *[None] * len(scores)]


def _own_slopes(part: Batch, logits: Tensor, *scores: Tensor) -> list[Tensor | None]:
    """Of the cross-entropy at temperature 1, and of telling own rows from proxy rows."""
    told = [own_or_proxy_slope(score[:, 0], part.familiar)[:, None] for score in scores]
    return [soft_cross_entropy_slope(logits, part.targets, part.weight), *told]


def _copied(tensor: Tensor) -> FloatArray:
    """The values now: on the CPU ``numpy()`` alone would share memory with the living weights."""
    return np.array(tensor.cpu().numpy())
