"""Weights in one piece: the bytes of a step for each weight by itself."""

import pytest
import torch
from torch import nn

from fedistill.distill.optimizer import Optimizer
from fedistill.distill.recipe import Recipe
from fedistill.distill.resident import Resident

SHAPES = ((5, 3), (5,), (2, 5), (7, 1, 3, 3), (1,))


def drawn(number):
    made = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=made) for shape in SHAPES]


def plain_step(optimizer, averaged, rate, clip, keep):
    taught = [weight for weight in optimizer.weights if weight.grad is not None]
    if clip:
        nn.utils.clip_grad_norm_(taught, clip, foreach=True)
    optimizer.step(rate)
    for mean, weight in zip(averaged, optimizer.weights, strict=False):
        mean.lerp_(weight.data, 1 - keep)


def give(weights, step, absent=()):
    for number, (weight, grad) in enumerate(zip(weights, drawn(100 + step), strict=True)):
        weight.grad = None if number in absent else 3 * grad


RECIPES = [
    Recipe(optimizer=kind, momentum=momentum, weight_decay=decay)
    for decay in (0.0, 0.01)
    for kind, momentum in (("sgd", 0.0), ("sgd", 0.9), ("adam", None), ("adamw", None))
]


@pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda r: f"{r.optimizer}-{r.momentum}-{r.weight_decay}"
)
@pytest.mark.parametrize("clip", [0.0, 2.0])
def test_steps_have_the_bytes_of_the_optimizer(recipe, clip):
    ours = Optimizer(recipe, [nn.Parameter(value) for value in drawn(0)])
    theirs = Optimizer(recipe, [nn.Parameter(value) for value in drawn(0)])
    means, other_means = drawn(1), drawn(1)
    homes = [weight.data_ptr() for weight in ours.weights]
    # The last weights get no gradient at first, then all do, then one in the middle does not.
    for absences in ((4,) * 3, (4,) * 2, (9,) * 3, (1,) * 2):
        with Resident(ours, means) as resident:
            for step, absent in enumerate(absences):
                give(ours.weights, step, {absent})
                give(theirs.weights, step, {absent})
                resident.step(0.1 / (step + 1), clip)
                resident.follow(0.8)
                plain_step(theirs, other_means, 0.1 / (step + 1), clip, 0.8)
                for one, two in zip(ours.weights, theirs.weights, strict=True):
                    assert torch.equal(one, two)
        assert [weight.data_ptr() for weight in ours.weights] == homes
        assert all(torch.equal(*pair) for pair in zip(means, other_means, strict=True))
        for one, two in zip(ours.weights, theirs.weights, strict=True):
            kept, other = ours.state.get(one, {}), theirs.state.get(two, {})
            assert kept.keys() == other.keys()
            assert all(torch.equal(kept[key], other[key]) for key in kept)
            assert all(kept[key].shape == other[key].shape for key in kept)


def test_other_weights_within_a_block_are_taught_too():
    recipe = Recipe(momentum=0.5)
    ours = Optimizer(recipe, [nn.Parameter(value) for value in drawn(0)])
    theirs = Optimizer(recipe, [nn.Parameter(value) for value in drawn(0)])
    with Resident(ours, []) as resident:
        for step, absent in enumerate(({4}, set(), {0, 1}, {0, 1, 2, 3, 4}, set())):
            give(ours.weights, step, absent)
            give(theirs.weights, step, absent)
            resident.step(0.1, 1.0)
            plain_step(theirs, [], 0.1, 1.0, 1.0) if absent != {0, 1, 2, 3, 4} else None
    assert all(torch.equal(*pair) for pair in zip(ours.weights, theirs.weights, strict=True))


def test_an_error_in_the_block_leaves_weights_where_they_were():
    optimizer = Optimizer(Recipe(), [nn.Parameter(value) for value in drawn(0)])
    homes = [weight.data_ptr() for weight in optimizer.weights]

    def teach():
        with Resident(optimizer, []) as resident:
            give(optimizer.weights, 0)
            resident.step(0.1, 0.0)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        teach()
    assert [weight.data_ptr() for weight in optimizer.weights] == homes
    assert not torch.equal(optimizer.weights[0], drawn(0)[0])


def strange_weights():
    """Two in another order of memory, and two that are one."""
    shared = torch.arange(6.0).reshape(2, 3)
    wide = torch.linspace(-1, 1, 54).reshape(2, 3, 3, 3)
    return [
        nn.Parameter(torch.linspace(0, 1, 12).reshape(3, 4).t()),
        nn.Parameter(wide.to(memory_format=torch.channels_last)),
        nn.Parameter(shared),
        nn.Parameter(shared),
    ]


def test_weights_that_are_not_plain_memory_of_their_own_keep_bytes_and_order():
    recipe = Recipe(momentum=0.9)
    ours, theirs = (Optimizer(recipe, strange_weights()) for _ in range(2))
    strides = [weight.stride() for weight in ours.weights]
    with Resident(ours, []) as resident:
        for step in range(3):
            for optimizer in (ours, theirs):
                for number, weight in enumerate(optimizer.weights):
                    weight.grad = torch.full_like(weight, 0.3 * number - step)
            resident.step(0.1, 1.0)
            plain_step(theirs, [], 0.1, 1.0, 1.0)
            assert torch.equal(ours.weights[2], ours.weights[3])
    assert all(torch.equal(*pair) for pair in zip(ours.weights, theirs.weights, strict=True))
    assert [weight.stride() for weight in ours.weights] == strides
