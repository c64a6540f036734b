"""Students of one kind side by side: gathered into stacks, trained and asked together, put back.

What they see, and in which order, is what each would see alone. A student's lesson may be longer
than another's: the longest come first, and those that have ended drop out of the stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.backends import kernels
from fedistill.backends.kernels import Stack
from fedistill.distill.batches import Batch
from fedistill.distill.optimizer import falling
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import Lesson, TorchStudent
from fedistill.models import MLP, Linear
from fedistill.select import Answers

CACHED_BYTES = 4 << 20
"""Of weights and momentum of a block: more leaves the cache, and each step fetches it again."""
LARGEST_BLOCK = 25
"""Clients side by side; beyond this the stacks grow and nothing is gained."""
PREDICT_ROWS = 500
"""Rows of one product when predicting."""


def block_of(weights: int) -> int:
    """How many clients with this many weights to train side by side."""
    return min(max(CACHED_BYTES // (8 * weights), 1), LARGEST_BLOCK)


def unfit(learner: object) -> str:
    """Why a learner is trained alone, in words that end a sentence; empty where it need not be."""
    if type(learner) is not TorchStudent:
        return f"{type(learner).__name__} is no plain student"
    module, recipe = learner.module, learner.recipe
    if type(module) not in (Linear, MLP):
        return f"there are no kernels for {type(module).__name__}"
    if recipe.optimizer != "sgd":
        return f"there are no kernels for {recipe.optimizer}"
    if learner.device.type != "cpu":
        return f"kernels are for cpu, this is {learner.device.type}"
    if learner.guided or not all(weight.requires_grad for weight in module.parameters()):
        return "it trains by a table, or not all of its weights"
    return ""


def kind_of(student: TorchStudent, lessons: Sequence[Lesson]) -> tuple[object, ...]:
    """What students must have in common to go into one stack."""
    shapes = tuple(tuple(weight.shape) for weight in student._weights())
    parts = tuple((one.own, 0 if one.own else len(one.batches)) for one in lessons)
    return student.recipe, student.classes, student.scored, shapes, parts


# --- gathering -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Students side by side, those with the longest lesson first.

    Attributes:
        students: all of one kind.
        lessons: of each, what it is to train on, in turn.
    """

    students: Sequence[TorchStudent]
    lessons: Sequence[Sequence[Lesson]]

    def teach(self) -> None:
        """Train all of them on their lessons."""
        first = self.students[0]
        stack = gather(self.students, values)
        averaged = gather(self.students, averages) if first.recipe.average else None
        for turn in zip(*self.lessons, strict=True):
            taught, column = stack, momenta
            if first.scored and not turn[0].own:  # soft targets say nothing of familiarity
                taught, column = _without_score(stack), momenta_but_score
            momentum = gather(self.students, column) if first.recipe.momentum else None
            Drill(self.students, turn, stack, taught, momentum, averaged).run()
            if momentum is not None:
                put_back(momentum, self.students, column)
        put_back(stack, self.students, values)
        if averaged is not None:
            put_back(averaged, self.students, averages)

    def ask(self, rows: Tensor) -> list[Answers]:
        """What each says of rows that all are asked, ``[rows, in]``."""
        classes = self.students[0].classes
        stack = gather(self.students, speaking)
        found = kernels.predict(stack, rows, PREDICT_ROWS).numpy()
        scores = np.zeros(found.shape[:2], dtype=np.float32)
        if self.students[0].scored:
            scores = found[:, :, classes].clip(-FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)
        return [Answers(one[:, :classes], score) for one, score in zip(found, scores, strict=True)]


def benches(
    students: Sequence[TorchStudent], lessons: Sequence[Sequence[Lesson]]
) -> list[list[int]]:
    """Which students of one kind to train side by side, by their places."""
    length = [max((len(one.batches) for one in turns), default=0) for turns in lessons]
    order = sorted(range(len(students)), key=lambda place: -length[place])
    size = block_of(sum(weight.numel() for weight in students[0]._weights()))
    return [order[start : start + size] for start in range(0, len(order), size)]


Column = Callable[[TorchStudent], Sequence[Tensor]]
"""From a student to a tensor for each weight and bias, in order; changed in place, they count."""


def gather(students: Sequence[TorchStudent], column: Column) -> Stack:
    """Tensors of all students, stacked; the score of familiarity is one more output."""
    layers = [_layers(student, column) for student in students]
    weights, biases = [], []
    for layer in zip(*layers, strict=True):
        weights.append(torch.stack([_joined([pair[0] for pair in pairs]) for pairs in layer]))
        biases.append(torch.stack([_joined([pair[1] for pair in pairs]) for pairs in layer]))
    return Stack(tuple(weights), tuple(biases))


def put_back(stack: Stack, students: Sequence[TorchStudent], column: Column) -> None:
    """The reverse of :func:`gather`."""
    for place, student in enumerate(students):
        layers = zip(_layers(student, column), stack.weights, stack.biases, strict=True)
        for pairs, weight, bias in layers:
            start = 0
            for held, offset in pairs:
                part = slice(start, start + len(held))
                held.copy_(weight[place, part])
                offset.copy_(bias[place, part])
                start += len(held)


def _layers(student: TorchStudent, column: Column) -> list[list[tuple[Tensor, Tensor]]]:
    """Weight and bias of each layer; of the last, those of the score beside them."""
    tensors = column(student)
    pairs = [(tensors[at], tensors[at + 1]) for at in range(0, len(tensors), 2)]
    count = _plain(student) // 2
    return [*([pair] for pair in pairs[: count - 1]), pairs[count - 1 :]]


def _plain(student: TorchStudent) -> int:
    """How many weights and biases its module has."""
    return len(list(student.module.parameters()))


def values(student: TorchStudent) -> list[Tensor]:
    """The weights."""
    return [weight.data for weight in student._weights()]


def averages(student: TorchStudent) -> list[Tensor]:
    """Their moving averages."""
    return student._averaged


def speaking(student: TorchStudent) -> list[Tensor]:
    """What it predicts with: the averages, if there are any and a step was taken."""
    return student._averaged if student._averaged and student._steps else values(student)


def momenta(student: TorchStudent) -> list[Tensor]:
    """The momentum of each weight; it begins with 0."""
    return _momenta(student, student._weights())


def momenta_but_score(student: TorchStudent) -> list[Tensor]:
    """The same for the weights that a phase on soft targets moves."""
    return _momenta(student, student._weights()[: _plain(student)])


def _momenta(student: TorchStudent, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    held = student._optimizer.state
    for weight in weights:
        if "momentum_buffer" not in held.setdefault(weight, {}):
            held[weight]["momentum_buffer"] = torch.zeros_like(weight.data)
    return [held[weight]["momentum_buffer"] for weight in weights]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _without_score(stack: Stack) -> Stack:
    """The same stack but for the last output; a change in place counts."""
    last = slice(0, stack.biases[-1].shape[1] - 1)
    return Stack(
        (*stack.weights[:-1], stack.weights[-1][:, last]),
        (*stack.biases[:-1], stack.biases[-1][:, last]),
    )


# --- training ------------------------------------------------------------------------------------


@dataclass
class Drill:
    """One lesson of each student, learned together.

    Attributes:
        students: longest lesson first.
        lessons: one of each.
        stack: all weights.
        taught: those of them that this lesson changes.
        momentum: of those; None without.
        averaged: of all weights; None without.
    """

    students: Sequence[TorchStudent]
    lessons: Sequence[Lesson]
    stack: Stack
    taught: Stack
    momentum: Stack | None
    averaged: Stack | None

    def run(self) -> None:
        """Take all steps, and count them."""
        recipe = self.students[0].recipe
        lengths = [len(lesson.batches) for lesson in self.lessons]
        gradient = self.taught.zeros() if self._apart(recipe) else None
        for step in range(lengths[0]):
            active = sum(length > step for length in lengths)
            batches = [lesson.batches.make(step) for lesson in self.lessons[:active]]
            self._step(recipe, step, batches, gradient)
            for student, batch in zip(self.students, batches, strict=False):
                student.count(len(batch))
            if self.averaged is not None:
                self._follow(active)

    def _apart(self, recipe: Recipe) -> bool:
        """Whether the gradient is needed by itself, and not only in the momentum."""
        return bool(recipe.clip or recipe.weight_decay or self.momentum is None)

    def _step(
        self, recipe: Recipe, step: int, batches: Sequence[Batch], gradient: Stack | None
    ) -> None:
        """One step of the students that have a batch."""
        active = len(batches)
        stack = self.taught.first(active)
        rows = Rowed.of(batches)
        outputs, given = kernels.forward(stack, rows.inputs)
        delta = self._delta(recipe, outputs, rows)
        deltas = kernels.backward(stack, given, delta)
        keep = recipe.momentum or 0.0
        momentum = None if self.momentum is None else self.momentum.first(active)
        moved = momentum
        if gradient is not None:
            found = gradient.first(active)
            kernels.accumulate(found, given, deltas, 0.0)
            if recipe.clip:
                kernels.clip(found, recipe.clip)
            if recipe.weight_decay:
                kernels.decay(found, stack, recipe.weight_decay)
            if momentum is not None:
                kernels.fold(momentum, found, keep)
            moved = found if momentum is None else momentum
        else:
            assert momentum is not None
            kernels.accumulate(momentum, given, deltas, keep)
        assert moved is not None
        kernels.step(stack, moved, self._rate(recipe, step, active))

    def _delta(self, recipe: Recipe, outputs: Tensor, rows: Rowed) -> Tensor:
        """Gradient of the loss by the outputs."""
        classes, own = self.students[0].classes, self.lessons[0].own
        logits = outputs[:, :, :classes]
        if own and self.lessons[0].offset is not None:
            offsets = [lesson.offset for lesson in self.lessons[: len(outputs)]]
            shift = torch.stack([offset for offset in offsets if offset is not None])
            logits = logits + shift[:, None] * rows.own[..., None]
        if not own and recipe.loss == "mae":
            return kernels.mae_delta(logits, rows.targets, rows.weight)
        heat: Tensor | float = 1.0
        if recipe.temperature != 1.0:
            heat = torch.where(rows.own, 1.0, recipe.temperature)
        delta = kernels.soft_delta(logits, rows.targets, rows.weight, heat)
        if outputs.shape[2] == classes:
            return delta
        score = kernels.familiar_delta(outputs[:, :, classes], rows.familiar)
        return torch.cat([delta, score[..., None]], 2)

    def _rate(self, recipe: Recipe, step: int, active: int) -> float | Tensor:
        """The learning rate, of each student where they differ in it."""
        if recipe.schedule != "cosine":
            return recipe.lr
        lengths = [len(lesson.batches) for lesson in self.lessons[:active]]
        return torch.tensor([recipe.lr * falling(step, length) for length in lengths])

    def _follow(self, active: int) -> None:
        """Move the averages of the students that took a step."""
        assert self.averaged is not None
        keep = torch.tensor([student.keeps() for student in self.students[:active]])
        kernels.average(self.averaged.first(active), self.stack.first(active), keep)


@dataclass(frozen=True)
class Rowed:
    """The batches of one step side by side, filled up with rows of no weight.

    Attributes:
        inputs: ``[c, rows, in]``.
        targets: ``[c, rows, classes]``.
        weight: ``[c, rows]``, as are the others.
        familiar: as in a batch.
        own: whether it is an own row.
    """

    inputs: Tensor
    targets: Tensor
    weight: Tensor
    familiar: Tensor
    own: Tensor

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Rowed:
        """Batches of all students that are at work."""
        count = max(map(len, batches))
        own = torch.tensor([batch.own for batch in batches])
        return cls(
            _side([batch.inputs.flatten(1) for batch in batches], count),
            _side([batch.targets for batch in batches], count),
            _side([batch.weight for batch in batches], count),
            _side([batch.familiar for batch in batches], count),
            torch.arange(count) < own[:, None],
        )


def _side(parts: list[Tensor], count: int) -> Tensor:
    """Stacked, shorter ones filled up with zeros."""
    if all(len(part) == count for part in parts):
        return torch.stack(parts)
    return nn.utils.rnn.pad_sequence(parts, batch_first=True)
