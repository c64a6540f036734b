"""Who teaches. A teacher is called with inputs and returns logits; it never gets a gradient.

Any callable from a tensor ``[rows, ...]`` to logits ``[rows, classes]`` will do. One that moves
with its student also has ``update(student)``, called after each step, and ``state_dict``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from fedistill.distill.schedules import SURE, sureness
from fedistill.errors import CheckpointError, FedistillError
from fedistill.losses import label_loss
from fedistill.types import Rows, State

ROWS = 250
"""Rows of one forward pass where nobody waits for a gradient."""


class Teacher(Protocol):
    """Says what it thinks of rows; unless it is moved, the same of the same rows."""

    def __call__(self, inputs: Tensor, /) -> Tensor:
        """Logits (or log-probabilities) ``[rows, classes]`` of inputs ``[rows, ...]``."""
        ...


@runtime_checkable
class Moving(Protocol):
    """A teacher that follows its student, and so has a state."""

    def start(self, student: nn.Module) -> None:
        """Begin with the student as it is, unless there is a beginning already."""
        ...

    def update(self, student: nn.Module) -> None:
        """Follow a student that has just taken a step."""
        ...

    def state_dict(self) -> State:
        """Everything that goes on from step to step."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Restore, after ``start``."""
        ...


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, batch statistics and gradients; each layer's mode comes back afterwards."""
    training = [layer for layer in module.modules() if layer.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in training:
            layer.training = True


def predict(teacher: Teacher, inputs: Tensor) -> Tensor:
    """Logits of all rows, some hundred at a time."""
    with torch.no_grad():
        return torch.cat([teacher(part) for part in torch.split(inputs, ROWS)])


class Frozen:
    """A trained module that teaches and stays as it is.

    Args:
        module: inputs ``[rows, ...]`` to logits; not copied, and left in the mode it is in.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits ``[rows, classes]``, without dropout and without a gradient."""
        with evaluating(self.module):
            logits: Tensor = self.module(inputs)
        return logits


# --- several teachers ----------------------------------------------------------------------------

Shares: TypeAlias = Callable[[Tensor], Tensor]
"""From logits ``[teachers, rows, classes]`` to shares ``[teachers, rows]`` that sum to 1."""


def confidence(logits: Tensor) -> Tensor:
    """Shares by sureness, row by row: 1 - H(q_k) / log C over its sum; equal where none is sure.

    Args:
        logits: ``[teachers, rows, classes]``.

    Returns:
        ``[teachers, rows]``, sums to 1 over teachers.
    """
    sure = sureness(logits)
    total = sure.sum(dim=0)
    return torch.where(total > SURE, sure / total.clamp_min(SURE), 1 / len(logits))


def pool(logits: Tensor, shares: Tensor) -> Tensor:
    """Log of the weighted mean of probabilities ``[rows, classes]``: the linear pool.

    Probabilities and not logits are averaged: in a mean of logits one teacher that is sure that a
    class is absent forbids it to all.

    Args:
        logits: ``[teachers, rows, classes]``.
        shares: ``[teachers]`` or ``[teachers, rows]``, sums to 1 over teachers.
    """
    wide = shares.reshape(*shares.shape, *[1] * (3 - shares.dim()))
    return (logits.log_softmax(dim=-1) + wide.log()).logsumexp(dim=0)


class Ensemble:
    """Several teachers as one, by the mean of their probabilities.

    Its ``module`` holds theirs, so that layer ``trunk`` of the first is ``0.trunk``.

    Args:
        teachers: modules or callables from inputs to logits.
        weights: None for equal shares, one number of at least 0 for each teacher, or a function
            from logits ``[teachers, rows, classes]`` to shares, such as :func:`confidence`.

    Raises:
        FedistillError: no teacher, or weights that are no shares of these teachers.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher | nn.Module],
        weights: Sequence[float] | Shares | None = None,
    ) -> None:
        self._teachers = [as_teacher(teacher) for teacher in teachers]
        if not self._teachers:
            raise FedistillError("an ensemble needs one teacher at least, found none")
        modules = [module_of(teacher) for teacher in self._teachers]
        self.module = nn.ModuleList([nn.Module() if m is None else m for m in modules])
        given = [1.0] * len(self._teachers) if weights is None else weights
        if callable(given):
            self._shares = given
            return
        if len(given) != len(self._teachers) or min(given) < 0 or not 0 < sum(given) < math.inf:
            raise FedistillError(
                f"an ensemble of {len(self._teachers)} needs as many weights of at least 0, one "
                f"of them above 0; found {list(given)}"
            )
        fixed = torch.tensor(given, dtype=torch.float64) / sum(given)
        self._shares = lambda logits: fixed.to(logits)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Log-probabilities ``[rows, classes]``."""
        with torch.no_grad():
            logits = torch.stack([teacher(inputs) for teacher in self._teachers])
            return pool(logits, self._shares(logits))


def best_of(teachers: Sequence[Teacher | nn.Module], rows: Rows) -> Teacher:
    """The teacher with the lowest cross-entropy on labelled rows; the first of equals.

    Args:
        teachers: modules or callables from inputs to logits.
        rows: labelled rows that no teacher was trained on.
    """
    inputs, labels = torch.from_numpy(rows.inputs), torch.from_numpy(rows.labels)
    able = [as_teacher(teacher) for teacher in teachers]
    return min(able, key=lambda teacher: float(label_loss(predict(teacher, inputs), labels)))


def as_teacher(teacher: Teacher | nn.Module) -> Teacher:
    """A module becomes a frozen teacher; anything else is one already."""
    return Frozen(teacher) if isinstance(teacher, nn.Module) else teacher


def module_of(teacher: Teacher) -> nn.Module | None:
    """The module whose layers can be watched, where a teacher has one."""
    module = getattr(teacher, "module", None)
    return module if isinstance(module, nn.Module) else None


# --- the student's own past ----------------------------------------------------------------------


class EmaTeacher:
    """The moving average of a student's weights: theta <- a theta + (1 - a) student, each step.

    Tarvainen and Valpola, arXiv 1703.01780. a = min(decay, (1 + i) / (10 + i)) at step i = 0, 1,
    ..., so that the first random weights are soon forgotten. Buffers, such as the running
    statistics of batch norm, are copied and not averaged.

    Args:
        decay: a after the warm-up, usually 0.99 to 0.999.

    Raises:
        FedistillError: a decay outside 0 and 1.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise FedistillError(f"the decay must be at least 0 and below 1, found {decay}")
        self.decay = decay
        self._average: nn.Module | None = None
        self._steps = 0

    @property
    def module(self) -> nn.Module:
        """The average.

        Raises:
            FedistillError: there is no student yet.
        """
        if self._average is None:
            raise FedistillError("an EmaTeacher has no student yet: call start(student) first")
        return self._average

    def start(self, student: nn.Module) -> None:
        """Begin with a copy of the student, unless there is an average already."""
        if self._average is None:
            self._average = copy.deepcopy(student).eval().requires_grad_(False)

    def update(self, student: nn.Module) -> None:
        """Follow a student that has just taken a step."""
        self.start(student)
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        with torch.no_grad():
            pairs = zip(self.module.parameters(), student.parameters(), strict=True)
            for average, weight in pairs:
                average.lerp_(weight, 1 - decay)
            for kept, buffer in zip(self.module.buffers(), student.buffers(), strict=True):
                kept.copy_(buffer)
        self._steps += 1

    def grow(self, student: nn.Module) -> None:
        """Follow a student whose head has grown: what is new in it is taken over as it is."""
        if self._average is None:
            return
        before, self._average = self._average, copy.deepcopy(student).eval().requires_grad_(False)
        with torch.no_grad():
            pairs = zip(self._average.parameters(), before.parameters(), strict=True)
            for wide, average in pairs:
                both = tuple(map(slice, map(min, wide.shape, average.shape)))
                wide[both] = average[both]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits ``[rows, classes]`` of the average."""
        with evaluating(self.module):
            logits: Tensor = self.module(inputs)
        return logits

    def state_dict(self) -> State:
        """The average and the number of steps."""
        kept = {f"average.{k}": v.cpu().numpy().copy() for k, v in self.module.state_dict().items()}
        return kept | {"steps": np.array([self._steps], dtype=np.int64)}

    def load_state_dict(self, state: State) -> None:
        """Restore, after ``start`` with a student of the same shape.

        Raises:
            CheckpointError: the state is that of another module.
        """
        named = {k[8:]: torch.from_numpy(np.array(state[k])) for k in state if k[:8] == "average."}
        try:
            self.module.load_state_dict(named)
        except RuntimeError as error:
            raise CheckpointError(f"this state is of another teacher: {error}") from None
        self._steps = int(state["steps"][0])


class SelfTeacher:
    """The student as it was when its present experience began, so that what it knew then stays.

    There is none before the second experience: nothing was known before the first.
    """

    def __init__(self) -> None:
        self._before: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The student as it was.

        Raises:
            FedistillError: there is none yet.
        """
        if self._before is None:
            raise FedistillError("a SelfTeacher has no student yet: call begin(student) first")
        return self._before

    def ready(self) -> bool:
        """Whether there is a former student."""
        return self._before is not None

    def begin(self, student: nn.Module) -> None:
        """A new experience begins: the student as it is now teaches from here on."""
        self._before = copy.deepcopy(student).eval().requires_grad_(False)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits ``[rows, classes it had]``."""
        with evaluating(self.module):
            logits: Tensor = self.module(inputs)
        return logits

    def state_dict(self) -> State:
        """The former student; empty without one."""
        if self._before is None:
            return {}
        return {k: v.cpu().numpy().copy() for k, v in self._before.state_dict().items()}

    def load_state_dict(self, state: State) -> None:
        """Restore, after ``begin`` with a student of the same shape; an empty state is of none.

        Raises:
            CheckpointError: the state is that of another module.
        """
        if not state:
            self._before = None
            return
        try:
            self.module.load_state_dict({k: torch.from_numpy(np.array(state[k])) for k in state})
        except RuntimeError as error:
            raise CheckpointError(f"this state is of another teacher: {error}") from None


def born_again(
    train: Callable[[Teacher | None, int], nn.Module], generations: int
) -> Iterator[nn.Module]:
    """Generations of one architecture, each taught by the one before it.

    Born-Again Networks, Furlanello et al., arXiv 1805.04770. Every generation starts from new
    weights; the mean of several is an :class:`Ensemble` of what is yielded.

    Args:
        train: from a teacher (None for the first generation, which has labels alone) and the
            number of the generation, from 0, to a trained module.
        generations: how many.
    """
    teacher: Teacher | None = None
    for number in range(generations):
        student = train(teacher, number)
        yield student
        teacher = Frozen(student)
