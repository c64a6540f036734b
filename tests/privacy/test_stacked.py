"""Many clients at once: each has what it would have alone, and noise of its own."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedistill import models
from fedistill.errors import RunError
from fedistill.models import layers_of
from fedistill.privacy.clipping import Clipper
from fedistill.privacy.stacked import Drawn, noisy_gradients, through

INPUTS, CLASSES, CLIP = 6, 3, 0.4
COUNTS = [5, 0, 1, 9]
RANDOM = torch.Generator().manual_seed(3)
ROWS = [torch.randn(count, INPUTS, generator=RANDOM) for count in COUNTS]
LABELS = [torch.randint(CLASSES, (count,), generator=RANDOM) for count in COUNTS]
EXPECTED = torch.tensor([4.0, 2.0, 3.0, 8.0])
MODULES = {
    "linear": partial(models.Linear, INPUTS, CLASSES),
    "mlp": partial(models.MLP, INPUTS, CLASSES, width=8, depth=2),
}


def made(name, count=4):
    torch.manual_seed(0)
    return [MODULES[name]().train() for _ in range(count)]


def stacked(modules):
    layers = list(zip(*[layers_of(module) for module in modules], strict=True))
    weights = [torch.stack([layer.weight.detach() for layer in each]) for each in layers]
    return weights, [torch.stack([layer.bias.detach() for layer in each]) for each in layers]


def generators(count=4):
    return [torch.Generator().manual_seed(10 + place) for place in range(count)]


def gradients(modules, rows=ROWS, labels=LABELS, sigma=0.0, keep=0.0, into=None, clip=CLIP):
    weights, biases = stacked(modules)
    pairs = [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]
    into = [torch.full_like(tensor, torch.nan) for tensor in pairs] if into is None else into
    noisy_gradients(
        weights,
        biases,
        Drawn.of(rows, labels),
        into,
        clip=clip,
        sigma=[sigma] * len(rows),
        expected=EXPECTED[: len(rows)],
        generators=generators(len(rows)),
        keep=keep,
    )
    return into


def alone(module, place, mode, sigma=0.0, rows=ROWS):
    """The same of one client, by the clipper."""
    with Clipper(
        module,
        clip=CLIP,
        sigma=sigma,
        expected=float(EXPECTED[place]),
        generator=generators()[place],
        mode=mode,
    ) as clipper:
        chosen = np.arange(len(rows[place]))
        clipper.step(chosen, lambda some: (rows[place][some], LABELS[place][some], None))
    return [weight.grad for weight in module.parameters()]


def assert_close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["gram", "hooks"])
@pytest.mark.parametrize("sigma", [0.0, 1.3])
@pytest.mark.parametrize("name", MODULES)
def test_each_client_has_what_it_would_have_alone(name, sigma, mode):
    """Padded rows add nothing, nobody is there at the second, and noise is there all the same."""
    modules = made(name)
    found = gradients(modules, sigma=sigma)
    for place, module in enumerate(modules):
        wanted = alone(module, place, mode, sigma)
        assert_close([tensor[place] for tensor in found], wanted)


def test_a_step_that_nobody_is_in_is_noise_at_every_client():
    modules = made("mlp", 3)
    rows, labels = [ROWS[1]] * 3, [LABELS[1]] * 3
    drawn = torch.stack(
        [
            torch.cat([t[k].flatten() for t in gradients(modules, rows, labels, 2.0)])
            for k in range(3)
        ]
    )
    spread = 2.0 * CLIP / EXPECTED[:3]
    torch.testing.assert_close(drawn.std(1), spread, rtol=0.15, atol=0)


def test_noise_of_one_client_tells_nothing_of_that_of_another():
    modules = made("mlp", 2)
    rows, labels = [ROWS[0]] * 2, [LABELS[0]] * 2
    both = [
        torch.stack([tensor[k] for k in range(2)]).flatten(1)
        for tensor in gradients(modules, rows, labels, 1.0)
    ]
    flat = torch.cat(both, 1)
    assert abs(float(torch.corrcoef(flat)[0, 1])) < 0.3


def test_momentum_is_folded_in():
    modules = made("mlp")
    plain = gradients(modules, sigma=1.0)
    before = [torch.randn_like(tensor) for tensor in plain]
    found = gradients(modules, sigma=1.0, keep=0.9, into=[tensor.clone() for tensor in before])
    assert_close(found, [0.9 * b + p for b, p in zip(before, plain, strict=True)])


def test_matrices_may_lie_as_their_transposes():
    modules = made("mlp")
    plain = gradients(modules)
    turned = [
        tensor.mT.contiguous().mT if tensor.dim() > 2 else tensor.clone()
        for tensor in (torch.ones_like(part) for part in plain)
    ]
    assert_close(gradients(modules, keep=0.5, into=turned), [0.5 + part for part in plain])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_without_a_finite_gradient_adds_nothing(value):
    modules, rows = made("mlp"), [part.clone() for part in ROWS]
    rows[3][2, 1] = value
    found = gradients(modules, rows)
    for place, module in enumerate(modules):
        assert_close([tensor[place] for tensor in found], alone(module, place, "gram", rows=rows))
    kept = [ROWS[3][[0, 1, 3, 4, 5, 6, 7, 8]], LABELS[3][[0, 1, 3, 4, 5, 6, 7, 8]]]
    wanted = gradients(modules, [*ROWS[:3], kept[0]], [*LABELS[:3], kept[1]])
    assert_close(found, wanted)


def test_weights_that_are_not_finite_end_the_steps():
    modules = made("mlp")
    with torch.no_grad():
        modules[2].head.weight[0, 0] = torch.nan
    with pytest.raises(RunError, match=r"weights are NaN.*privacy\.lr"):
        gradients(modules)


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1.0, 1e6, 1e15])
def test_one_row_moves_its_client_by_the_norm_and_no_other(size):
    modules = made("mlp")
    before = gradients(modules)
    more = [torch.cat([ROWS[2], size * torch.ones(1, INPUTS)]), torch.cat([LABELS[2], LABELS[2]])]
    after = gradients(modules, [*ROWS[:2], more[0], ROWS[3]], [*LABELS[:2], more[1], LABELS[3]])
    for place in range(4):
        apart = [
            (a[place] - b[place]).flatten().double() for a, b in zip(after, before, strict=True)
        ]
        moved = float(torch.cat(apart).norm()) * float(EXPECTED[place])
        assert moved <= (CLIP * (1 + 1e-4) if place == 2 else 1e-6)


def test_one_client_is_a_stack_of_one():
    modules = made("mlp", 1)
    found = gradients(modules, ROWS[:1], LABELS[:1])
    assert_close([tensor[0] for tensor in found], alone(modules[0], 0, "hooks"))


def test_outputs_and_gradients_are_those_of_autograd():
    module = made("mlp", 1)[0]
    weights, biases = stacked([module])
    found = through(weights, biases, ROWS[3][None], LABELS[3][None])
    loss = nn.functional.cross_entropy(module(ROWS[3]), LABELS[3], reduction="sum")
    wanted = torch.autograd.grad(loss, list(module.parameters()))
    sums = [torch.zeros_like(weight, requires_grad=False)[None] for weight in module.parameters()]
    found.add_to(sums, torch.ones(1, len(ROWS[3])))
    assert_close([tensor[0] for tensor in sums], wanted)
