"""Rows picked for many students at once are those that each would see alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from builders import gaussian

from fedistill.backends.feeding import feed
from fedistill.distill.batches import Batches, Memory, local_batches, soft_batches
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import Lesson


def own_lesson(rows, recipe, seed, memory, background):
    inputs = torch.from_numpy(rows.inputs.astype(np.float32))
    targets = torch.nn.functional.one_hot(torch.from_numpy(rows.labels), 3).float()
    return Lesson(
        local_batches(inputs, targets, memory, background, recipe, seed), True, None, seed
    )


def public(count, seed=5, faded=False):
    random = np.random.default_rng(seed)
    answers = torch.from_numpy(random.dirichlet([1, 1, 1], count).astype(np.float32))
    weights = random.random(count) if faded else np.ones(count)
    return Memory(
        torch.from_numpy(gaussian(count, seed).inputs.astype(np.float32)), answers, weights
    )


def made(lesson):
    """The same lesson, its batches to be made one by one."""
    batches = lesson.batches
    bare = Batches(batches.count, batches.smallest, batches.make)
    return dataclasses.replace(lesson, batches=bare)


def rows_of(fed):
    """For each student what it sees, in the order of the inputs: rows without any effect aside."""
    found = []
    for k in range(len(fed.counts)):
        own = fed.own.expand(len(fed.counts), -1)[k]
        there = (fed.weight[k] != 0) | (fed.familiar[k] != 0)
        table = torch.cat(
            [
                fed.inputs[k],
                fed.targets[k].T,
                fed.weight[k][:, None],
                fed.familiar[k][:, None],
                own[:, None].float(),
            ],
            1,
        )[there]
        found.append(sorted(map(tuple, table.tolist())))
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("faded", [False, True])
@pytest.mark.parametrize("kind", ["own", "joined", "scored", "background", "phase"])
def test_picked_rows_are_those_of_the_batches(kind, faded, temperature):
    recipe = Recipe(epochs=2, batch_size=8, temperature=temperature, scarce_rows=40)
    lessons = []
    for k, count in enumerate((24, 17, 17, 5)):
        memory = public(30 + k, seed=9 + k, faded=faded)
        if kind == "phase":
            lesson = Lesson(soft_batches(memory, recipe, k), False, None, k)
        else:
            background = memory.inputs if kind in ("scored", "background") else None
            soft = memory if kind in ("joined", "scored") else None
            lesson = own_lesson(gaussian(count, k), recipe, k, soft, background)
        lessons.append(lesson)
    lessons.sort(key=lambda lesson: -len(lesson.batches))
    picked = feed(lessons, temperature)
    batches = feed([made(lesson) for lesson in lessons], temperature)
    steps = 0
    for one, other in zip(picked, batches, strict=True):
        assert one.counts == other.counts
        for found, wanted in zip(rows_of(one), rows_of(other), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        steps += 1
    assert steps == len(lessons[0].batches)


def test_mixed_rows_have_no_numbers():
    recipe = Recipe(batch_size=8, mixup=0.5)
    assert soft_batches(public(20), recipe, 0).parts is None
    assert own_lesson(gaussian(20, 0), recipe, 0, public(20), None).batches.parts is None
