"""What the students of a block see in a step, side by side.

Where a lesson says which rows its batches are made of, those of all students are picked straight
into one buffer; where rows are mixed, batches are made one by one and stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedistill.distill.batches import Part
from fedistill.distill.torch_student import Lesson
from fedistill.losses import soften


@dataclass(frozen=True)
class Fed:
    """The batches of one step side by side, filled up with rows of no weight.

    Attributes:
        inputs: ``[c, rows, in]``; overwritten by the next step.
        targets: ``[c, classes, rows]``.
        weight: ``[c, rows]``.
        familiar: ``[c, rows]``, as in a batch.
        own: ``[c, rows]`` or ``[1, rows]``: whether it is an own row.
        counts: rows of each student's batch.
    """

    inputs: Tensor
    targets: Tensor
    weight: Tensor
    familiar: Tensor
    own: Tensor
    counts: Sequence[int]


def feed(lessons: Sequence[Lesson], temperature: float) -> Iterator[Fed]:
    """What the students see, step by step, as long as any of them has a batch.

    Args:
        lessons: of one kind, the longest first.
        temperature: of soft targets.
    """
    parts = [lesson.batches.parts for lesson in lessons]
    known = [found for found in parts if found is not None]
    return _picked(lessons, known, temperature) if len(known) == len(parts) else _made(lessons)


# --- picked --------------------------------------------------------------------------------------


def _picked(
    lessons: Sequence[Lesson], parts: Sequence[tuple[Part, ...]], temperature: float
) -> Iterator[Fed]:
    """Rows picked straight into place."""
    kinds = list(zip(*parts, strict=True))
    tables = [[part.inputs.flatten(1) for part in kind] for kind in kinds]
    wanted, starts = _targets(kinds, temperature)
    first = tables[0][0]
    buffer = first.new_empty(0)
    for step in range(len(lessons[0].batches)):
        active = sum(len(lesson.batches) > step for lesson in lessons)
        chosen = [Chosen.of(kind[:active], step) for kind in kinds]
        shape = active, sum(one.index.shape[1] for one in chosen), first.shape[1]
        if buffer.shape != shape:
            buffer = first.new_empty(shape)
        start = 0
        for one, table in zip(chosen, tables, strict=True):
            part = slice(start, start + one.index.shape[1])
            indices = torch.from_numpy(one.index).to(first.device)
            for held, rows, index in zip(buffer[:, part], table, indices, strict=False):
                torch.index_select(rows, 0, index, out=held)
            start = part.stop
        moved = [one.index + at[:active, None] for one, at in zip(chosen, starts, strict=True)]
        places = torch.from_numpy(np.concatenate(moved, 1)).to(first.device)
        targets = wanted.index_select(0, places.flatten()).view(*places.shape, -1)
        own = np.concatenate(
            [
                np.full(one.index.shape[1], kind[0].own)
                for one, kind in zip(chosen, kinds, strict=True)
            ]
        )
        yield Fed(
            buffer,
            targets.mT,
            _joined([one.weight for one in chosen], first),
            _joined([one.familiar for one in chosen], first),
            torch.from_numpy(own)[None].to(first.device),
            np.sum([one.counts for one in chosen], axis=0).tolist(),
        )


@dataclass(frozen=True)
class Chosen:
    """One part of the batches of a step.

    Attributes:
        index: ``[c, rows]`` numbers of rows, 0 where there is none.
        weight: ``[c, rows]``, as is ``familiar``.
        counts: rows of each student, ``[c]``.
    """

    index: np.ndarray
    weight: np.ndarray
    familiar: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[Part], step: int) -> Chosen:
        """That of each student."""
        picked = [part.index[step] for part in parts]
        counts = np.array([len(numbers) for numbers in picked])
        index = np.zeros((len(parts), counts.max()), dtype=np.int64)
        there = np.arange(index.shape[1]) < counts[:, None]
        index[there] = np.concatenate(picked)
        weight = np.array([part.weight for part in parts]) / counts
        familiar = np.array([part.familiar for part in parts]) / counts
        return cls(index, weight[:, None] * there, familiar[:, None] * there, counts)


def _targets(
    kinds: Sequence[Sequence[Part]], temperature: float
) -> tuple[Tensor, list[np.ndarray]]:
    """Targets of all rows of all students in one table, and where those of each begin."""
    tables, starts, start = [], [], 0
    for kind in kinds:
        sizes = [len(part.targets) for part in kind]
        starts.append(start + np.cumsum([0, *sizes[:-1]]))
        start += sum(sizes)
        heat = 1.0 if kind[0].own or not kind[0].weight else temperature
        tables += [soften(part.targets, heat) for part in kind]
    return torch.cat(tables), starts


def _joined(parts: list[np.ndarray], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(parts, 1)).to(like)


# --- made ----------------------------------------------------------------------------------------


def _made(lessons: Sequence[Lesson]) -> Iterator[Fed]:
    """Batches made one by one."""
    for step in range(len(lessons[0].batches)):
        batches = [lesson.batches.make(step) for lesson in lessons if len(lesson.batches) > step]
        count = max(map(len, batches))
        own = torch.tensor([batch.own for batch in batches])
        yield Fed(
            _side([batch.inputs.flatten(1) for batch in batches], count),
            _side([batch.targets for batch in batches], count).mT,
            _side([batch.weight for batch in batches], count),
            _side([batch.familiar for batch in batches], count),
            (torch.arange(count) < own[:, None]).to(batches[0].inputs.device),
            [len(batch) for batch in batches],
        )


def _side(parts: list[Tensor], count: int) -> Tensor:
    """Stacked, shorter ones filled up with zeros."""
    if all(len(part) == count for part in parts):
        return torch.stack(parts)
    return nn.utils.rnn.pad_sequence(parts, batch_first=True)
