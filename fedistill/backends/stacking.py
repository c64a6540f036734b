"""Tensors of students gathered into stacks, and put back.

The score of familiarity is one more output of the last layer. Stacks have layouts of their own
(:mod:`fedistill.backends.kernels`); a student keeps those of its module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fedistill.backends.kernels import Stack
from fedistill.distill.torch_student import TorchStudent

Column = Callable[[TorchStudent], Sequence[Tensor]]
"""From a student to a tensor for each weight and bias, in order; changed in place, they count."""


def gather(students: Sequence[TorchStudent], column: Column) -> Stack:
    """Tensors of all students, stacked."""
    first = _layers(students[0], column)
    sizes = [first[0][0][0].shape[1]]
    sizes += [sum(len(bias) for _, bias in pairs) for pairs in first]
    stack = Stack.blank(sizes, len(students), first[0][0][0])
    for there, here in _matched(stack, students, column):
        there.copy_(here)
    return stack


def put_back(stack: Stack, students: Sequence[TorchStudent], column: Column) -> None:
    """The reverse of :func:`gather`."""
    for there, here in _matched(stack, students, column):
        here.copy_(there)


def _matched(
    stack: Stack, students: Sequence[TorchStudent], column: Column
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of each student beside its place in the stack."""
    for place, student in enumerate(students):
        layers = zip(_layers(student, column), stack.as_modules(), stack.biases, strict=True)
        for pairs, weights, biases in layers:
            start = 0
            for weight, bias in pairs:
                part = slice(start, start + len(weight))
                yield weights[place, part], weight
                yield biases[place, part], bias
                start += len(weight)


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


def taught(student: TorchStudent, scored: bool) -> list[nn.Parameter]:
    """The weights that a lesson moves; soft targets say nothing of the score of familiarity."""
    return student._weights() if scored else student._weights()[: _plain(student)]


def kept(student: TorchStudent, name: str, scored: bool) -> list[Tensor]:
    """What the optimizer keeps under a name for each weight that a lesson moves, at first 0."""
    held = student._optimizer.state
    found = []
    for weight in taught(student, scored):
        state = held.setdefault(weight, {})
        if name not in state:
            state[name] = torch.zeros_like(weight.data)
        found.append(state[name])
    return found


def steps_taken(student: TorchStudent) -> float:
    """How many steps Adam has counted for the student's first weight."""
    state = student._optimizer.state.get(student._weights()[0], {})
    return float(state["step"]) if "step" in state else 0.0


def count_steps(student: TorchStudent, steps: int, scored: bool) -> None:
    """Have Adam count so many more for each weight that a lesson moved."""
    for weight in taught(student, scored):
        state = student._optimizer.state[weight]
        state["step"] = state.get("step", torch.tensor(0.0)) + steps


def without_score(stack: Stack) -> Stack:
    """The same stack but for the last output; a change in place counts."""
    last = slice(0, stack.biases[-1].shape[1] - 1)
    return Stack(
        (*stack.weights[:-1], stack.weights[-1][:, last]),
        (*stack.biases[:-1], stack.biases[-1][:, last]),
    )
