"""Students of one kind side by side: gathered into stacks, trained and asked together, put back.

What they see, and in which order, is what each would see alone. A student's lesson may be longer
than another's: the longest come first, and those that have ended drop out of the stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.backends import kernels
from fedistill.backends.feeding import Fed, feed
from fedistill.backends.kernels import PerClient, Stack
from fedistill.backends.stacking import (
    averages,
    count_steps,
    gather,
    kept,
    put_back,
    speaking,
    steps_taken,
    values,
    without_score,
)
from fedistill.backends.tuning import PREDICT_ROWS, Shape
from fedistill.distill.optimizer import falling
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import Lesson, TorchStudent
from fedistill.models import MLP, Linear, layers_of
from fedistill.privacy.dpsgd import PrivateLesson, PrivateStudent
from fedistill.select import Answers


def unfit(learner: object) -> str:
    """Why a learner is trained alone, in words that end a sentence; empty where it need not be."""
    if type(learner) not in (TorchStudent, PrivateStudent):
        return f"{type(learner).__name__} is no plain student"
    assert isinstance(learner, TorchStudent)
    module, recipe = learner.module, learner.recipe
    if type(module) not in (Linear, MLP):
        return f"there are no kernels for {type(module).__name__}"
    if recipe.optimizer != "sgd" and learner.scored and recipe.distil == "phase":
        return f"{recipe.optimizer} takes fewer steps for its familiarity than for the rest"
    if learner.guided or not all(weight.requires_grad for weight in module.parameters()):
        return "it trains by a table, or not all of its weights"
    if layers_of(module, learner.trunk) is None:
        return f"its {type(module).__name__} was changed after it was built, or has hooks"
    if isinstance(learner, PrivateStudent) and not learner.by_hand:
        return "its noisy steps are of users, on a GPU, audited or by a loss of its own"
    return ""


def kind_of(student: TorchStudent, lessons: Sequence[Lesson]) -> tuple[object, ...]:
    """What students must have in common to go into one stack."""
    shapes = tuple(tuple(weight.shape) for weight in student._weights())
    privacy = student.privacy if isinstance(student, PrivateStudent) else None
    built = student.recipe, privacy, student.classes, student.scored, student.device
    return *built, shapes, tuple(map(_kind_of, lessons))


def _kind_of(lesson: Lesson) -> tuple[object, ...]:
    """What lessons must have in common to be learned together: own rows may last longer."""
    parts = len(lesson.batches.parts or ())
    if isinstance(lesson, PrivateLesson):
        return lesson.noisy, len(lesson.batches), parts
    return lesson.own, 0 if lesson.own else len(lesson.batches), parts


def shape_of(student: TorchStudent) -> Shape:
    """What the speed of a student depends on; a step has own rows and as many public ones."""
    matrices = [weight for weight in student.module.parameters() if weight.dim() > 1]
    sizes = [matrices[0].shape[1], *[len(weight) for weight in matrices]]
    sizes[-1] += student.scored
    return Shape(tuple(sizes), 2 * student.recipe.batch_size, student.device.type)


# --- a block -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Students side by side, those with the longest lesson first.

    Attributes:
        students: all of one kind.
        lessons: of each, what it is to train on, in turn.
        rows: of one product when predicting.
    """

    students: Sequence[TorchStudent]
    lessons: Sequence[Sequence[Lesson]]
    rows: int = PREDICT_ROWS

    def teach(self) -> None:
        """Train all of them on their lessons."""
        recipe = self.students[0].recipe
        stack = gather(self.students, values)
        averaged = gather(self.students, averages) if recipe.average else None
        for turn in zip(*self.lessons, strict=True):
            # Soft targets say nothing of familiarity.
            scored = self.students[0].scored and turn[0].own
            moved = stack if scored or not self.students[0].scored else without_score(stack)
            columns = [partial(kept, name=name, scored=scored) for name in _moments(recipe)]
            moments = [gather(self.students, column) for column in columns]
            drill = self.drill(turn)
            drill(self.students, turn, stack, moved, moments, averaged).run()
            for moment, column in zip(moments, columns, strict=True):
                put_back(moment, self.students, column)
            if recipe.optimizer != "sgd":
                for student, lesson in zip(self.students, turn, strict=True):
                    count_steps(student, lesson.steps, scored)
        put_back(stack, self.students, values)
        if averaged is not None:
            put_back(averaged, self.students, averages)

    def drill(self, lessons: Sequence[Lesson]) -> type[Drill]:
        """How lessons of one kind are learned together."""
        del lessons
        return Drill

    def ask(self, rows: Tensor) -> list[Answers]:
        """What each says of rows that all are asked, ``[rows, in]``."""
        classes, count = self.students[0].classes, len(self.students)
        stack = gather(self.students, speaking)
        logits = np.empty((count, len(rows), classes), dtype=np.float32)
        scores = np.zeros((count, len(rows)), dtype=np.float32)
        for part, found in kernels.predict(stack, rows, self.rows):
            said = found.cpu().numpy()
            logits[:, part] = said[:, :classes].transpose(0, 2, 1)
            if self.students[0].scored:
                scores[:, part] = said[:, classes].clip(-FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)
        return [Answers(*one) for one in zip(logits, scores, strict=True)]


def benches(lessons: Sequence[Sequence[Lesson]], size: int) -> list[list[int]]:
    """Which students of one kind to train side by side, by their places, so many at once."""
    # Lessons on soft targets alone are equally long in a kind: the sum goes by own rows.
    length = [sum(one.steps for one in turns) for turns in lessons]
    order = sorted(range(len(lessons)), key=lambda place: -length[place])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _moments(recipe: Recipe) -> tuple[str, ...]:
    """What the optimizer keeps of the gradients, as ``torch`` names it."""
    if recipe.optimizer != "sgd":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if recipe.momentum else ()


# --- training ------------------------------------------------------------------------------------


@dataclass
class Drill:
    """One lesson of each student, learned together.

    Attributes:
        students: longest lesson first.
        lessons: one of each.
        stack: all weights.
        taught: those of them that this lesson changes.
        moments: what the optimizer keeps of those.
        averaged: of all weights; None without.
    """

    students: Sequence[TorchStudent]
    lessons: Sequence[Lesson]
    stack: Stack
    taught: Stack
    moments: Sequence[Stack]
    averaged: Stack | None

    def run(self) -> None:
        """Take all steps, and count them."""
        for step, fed in enumerate(feed(self.lessons, self.recipe.temperature)):
            self._step(step, fed)
            self._count(fed.counts)

    @cached_property
    def recipe(self) -> Recipe:
        """That of all students."""
        return self.students[0].recipe

    @cached_property
    def begun(self) -> list[float]:
        """Steps that each student's Adam took before."""
        return [steps_taken(student) for student in self.students]

    @cached_property
    def gradient(self) -> Stack:
        """Where a gradient is held by itself, if it must be."""
        return self.taught.zeros()

    def _step(self, step: int, fed: Fed) -> None:
        """One step of the students that have a batch."""
        recipe, active = self.recipe, len(fed.counts)
        stack = self.taught.first(active)
        moments = [moment.first(active) for moment in self.moments]
        outputs, given = kernels.forward(stack, fed.inputs)
        deltas = kernels.backward(stack, given, self._delta(outputs, fed))
        rates, clip = self._rates(step, active), recipe.clip
        few = clip and kernels.few(stack, fed.inputs.shape[1])
        if few and kernels.clip_deltas(given, deltas, clip):
            clip = 0.0
        if recipe.optimizer == "sgd" and moments and not clip and not recipe.weight_decay:
            kernels.accumulate(moments[0], given, deltas, recipe.momentum or 0.0)
            kernels.step(stack, moments[0], kernels.for_each(rates, stack))
            return
        gradient = self.gradient.first(active)
        kernels.accumulate(gradient, given, deltas, 0.0)
        if clip:
            kernels.clip(gradient, clip)
        self._move(stack, gradient, moments, rates, step)

    def _move(
        self,
        stack: Stack,
        gradient: Stack,
        moments: Sequence[Stack],
        rates: Sequence[float],
        step: int,
    ) -> None:
        """Take the optimizer's step along a gradient."""
        recipe = self.recipe
        if recipe.optimizer != "sgd":
            taken = [begun + step for begun in self.begun[: len(stack)]]
            decoupled = recipe.optimizer == "adamw"
            decay = recipe.weight_decay
            kernels.adam(stack, gradient, moments, taken, rates, decay, decoupled)
            return
        if recipe.weight_decay:
            kernels.decay(gradient, stack, recipe.weight_decay)
        if moments:
            kernels.fold(moments[0], gradient, recipe.momentum or 0.0)
        along = moments[0] if moments else gradient
        kernels.step(stack, along, kernels.for_each(rates, stack))

    def _delta(self, outputs: Tensor, fed: Fed) -> Tensor:
        """Gradient of the loss by the outputs, ``[c, out, rows]``."""
        recipe, classes, own = self.recipe, self.students[0].classes, self.lessons[0].own
        logits = outputs[:, :classes]
        if own and self.lessons[0].offset is not None:
            offsets = [lesson.offset for lesson in self.lessons[: len(outputs)]]
            shift = torch.stack([offset for offset in offsets if offset is not None])
            logits = logits + shift[..., None] * fed.own[:, None]
        if not own and recipe.loss == "mae":
            return kernels.mae_delta(logits, fed.targets, fed.weight)
        heat: PerClient = 1.0
        if recipe.temperature != 1.0:
            heat = torch.where(fed.own, 1.0, recipe.temperature)
        delta = kernels.soft_delta(logits, fed.targets, fed.weight, heat)
        if outputs.shape[1] == classes:
            return delta
        score = kernels.familiar_delta(outputs[:, classes], fed.familiar)
        return torch.cat([delta, score[:, None]], 1)

    def _rates(self, step: int, active: int) -> list[float]:
        """The learning rate of each student."""
        if self.recipe.schedule != "cosine":
            return [self.recipe.lr] * active
        lengths = [len(lesson.batches) for lesson in self.lessons[:active]]
        return [self.recipe.lr * falling(step, length) for length in lengths]

    def _count(self, rows: Sequence[int]) -> None:
        """Students took a step on so many rows each: count it, and move their averages."""
        for student, count in zip(self.students, rows, strict=False):
            student.count(count)
        if self.averaged is None:
            return
        active = len(rows)
        keep = kernels.for_each([s.keeps() for s in self.students[:active]], self.stack)
        kernels.average(self.averaged.first(active), self.stack.first(active), keep)
