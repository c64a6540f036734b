"""Private students side by side: noisy steps of a block at once, public steps between them.

Each was paid for by itself, draws by coins of its own and has noise of its own: what one is told of
another is as much as by one after another. A step holds the rows of all that were drawn, so a block
of clients with many rows is a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from fedistill.backends import kernels
from fedistill.backends.feeding import Fed, feed
from fedistill.backends.kernels import Stack
from fedistill.backends.together import Bench, Drill
from fedistill.distill.torch_student import Lesson
from fedistill.privacy.dpsgd import PrivateLesson, PrivateStudent
from fedistill.privacy.stacked import Drawn, noisy_gradients

STEP_ROWS = 1000
"""Rows of a noisy step of a block, by expectation."""


def private_benches(lessons: Sequence[Sequence[Lesson]], size: int) -> list[list[int]]:
    """Which students of one kind to train side by side: those that draw about as many rows.

    Args:
        lessons: of each student.
        size: students at once, at most.
    """
    drawn = [max((one.expected for one in _noisy(turns)), default=0.0) for turns in lessons]
    benches: list[list[int]] = []
    room = 0
    for place in sorted(range(len(lessons)), key=lambda place: -drawn[place]):
        if not room:
            benches.append([])
            room = max(1, min(size, int(STEP_ROWS / max(drawn[place], 1.0))))
        benches[-1].append(place)
        room -= 1
    return benches


def _noisy(lessons: Sequence[Lesson]) -> list[PrivateLesson]:
    return [one for one in lessons if isinstance(one, PrivateLesson)]


class PrivateBench(Bench):
    """Students whose own rows are learned by noisy steps; all take equally many."""

    def drill(self, lessons: Sequence[Lesson]) -> type[Drill]:
        """Noisy steps for what was paid for; soft targets alone are learned as by any student."""
        return NoisyDrill if _noisy(lessons) else Drill


class NoisyDrill(Drill):
    """One private lesson of each student: noisy steps, and public ones in between."""

    def run(self) -> None:
        """Take all steps, and count them.

        Raises:
            RunError: weights are not finite any more.
        """
        students = [one for one in self.students if isinstance(one, PrivateStudent)]
        self.noted = noted = _noisy(self.lessons)
        self.clip_norm = students[0].privacy.clip_norm
        pairs = [student.open(one) for student, one in zip(students, noted, strict=True)]
        coins, noise = zip(*pairs, strict=True)
        public = feed(noted, self.recipe.temperature)
        taken = 0
        for step in range(noted[0].noisy):
            rate, self.public_rate = students[0].rates(step, noted[0].noisy)
            self._noisy_step(taken, rate, self._drawn(coins), noise)
            taken += 1
            for _ in noted[0].beside(step):
                fed = next(public)
                self._step(taken, fed)
                self._count(fed.counts)
                taken += 1
        for student, one in zip(students, noted, strict=True):
            student.close(one)

    def _drawn(self, coins: Sequence[torch.Generator]) -> Drawn:
        """The rows of a step: each unit of each student by a coin of its own."""
        parts = [one.take(one.draw(own)) for one, own in zip(self.noted, coins, strict=True)]
        return Drawn.of(
            [rows.flatten(1) for rows, _, _ in parts], [labels for _, labels, _ in parts]
        )

    def _noisy_step(
        self, taken: int, rate: float, drawn: Drawn, noise: Sequence[torch.Generator]
    ) -> None:
        """A step along the noisy gradients; they are folded into the momentum where that is all."""
        recipe = self.recipe
        folded = recipe.optimizer == "sgd" and bool(self.moments) and not recipe.weight_decay
        into = self.moments[0] if folded else self.gradient
        noisy_gradients(
            self.taught.as_modules(),
            self.taught.biases,
            drawn,
            _by_layer(into),
            clip=self.clip_norm,
            sigma=[one.sigma for one in self.noted],
            expected=self._expected,
            generators=noise,
            keep=(recipe.momentum or 0.0) if folded else 0.0,
        )
        if folded:
            kernels.step(self.taught, into, rate)
        else:
            self._move(self.taught, into, self.moments, [rate] * len(self.noted), taken)
        self._count([0] * len(self.noted))

    @cached_property
    def _expected(self) -> Tensor:
        return torch.tensor([one.expected for one in self.noted])

    @cached_property
    def _strength(self) -> Tensor:
        """Weight of each student's public steps."""
        found = [self.recipe.soft_weight_for(len(one.units)) for one in self.noted]
        return torch.tensor(found)[:, None, None]

    def _delta(self, outputs: Tensor, fed: Fed) -> Tensor:
        return super()._delta(outputs, fed) * self._strength

    def _rates(self, step: int, active: int) -> list[float]:
        """Those of public steps: they fall with the noisy ones."""
        del step
        return [self.public_rate] * active


def _by_layer(stack: Stack) -> list[Tensor]:
    """Weight and bias of each layer in turn, as modules have them."""
    return list(chain(*zip(stack.as_modules(), stack.biases, strict=True)))
