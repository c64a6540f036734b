"""Clipped sums against a loop over rows; noise, expected batches, memory and broken rows."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedistill import models
from fedistill.errors import FedistillError, RunError
from fedistill.privacy import clipping
from fedistill.privacy.clipping import Clipper, clipping_mode, cross_entropy
from fedistill.privacy.layers import private_module

INPUTS = 4
X = torch.randn(12, INPUTS, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
IMAGES = torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    """One layer, used twice."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(torch.tanh(self.body(inputs)))))


class Shared(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)
        self.second.weight = self.first.weight
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


class Scaled(nn.Module):
    """A bare parameter, as a learned temperature is."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, inputs):
        return self.head(inputs) * self.scale


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs.reshape(-1, INPUTS // 2, 2))[0][:, -1])


class Convolving(nn.Module):
    """A layer that gram clipping has no measure for, and Opacus has."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv1d(1, 3, 2), nn.Linear(3 * (INPUTS - 1), 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs[:, None])).flatten(1))


MODES = ["gram", "ghost", "hooks"]
MODULES = {
    "linear": (partial(models.Linear, INPUTS, 3), X, "gram"),
    "mlp": (partial(models.MLP, INPUTS, 3, width=8), X, "gram"),
    "cnn": (partial(models.CNN, 1, 3, width=4), IMAGES, "gram"),
    "tied": (Tied, X, "gram"),
    "convolving": (Convolving, X, "hooks"),
    "shared": (Shared, X, "hooks"),
    "scaled": (Scaled, X, "hooks"),
    "recurrent": (Recurrent, X, "hooks"),
}


def made(build):
    torch.manual_seed(0)
    return private_module(build, []).train()


def naive(module, inputs, labels, clip, groups=None):
    """The definition, one backward pass a unit."""
    groups = range(len(inputs)) if groups is None else groups
    total = [torch.zeros_like(w) for w in module.parameters()]
    for group in sorted(set(groups)):
        rows = [n for n, g in enumerate(groups) if g == group]
        loss = F.cross_entropy(module(inputs[rows]), labels[rows])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient * min(1.0, clip / float(norm))
    return total


def clipper(module, **how):
    known = {"clip": 0.5, "sigma": 0.0, "expected": 1.0, "generator": None, "mode": "hooks"}
    return Clipper(module, **(known | how))


def taker(inputs=X, labels=Y):
    return lambda chosen: (inputs[chosen], labels[chosen], None)


def gradients(module):
    return [weight.grad.clone() for weight in module.parameters()]


def assert_close(found, wanted, tolerance=1e-5):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [0.5, 100.0])
@pytest.mark.parametrize("name", MODULES)
def test_the_sum_is_that_of_a_loop_over_rows(name, clip, mode):
    build, inputs, _ = MODULES[name]
    labels = Y[: len(inputs)]
    module = made(build)
    with clipper(module, clip=clip, mode=mode) as made_by:
        made_by.step(np.arange(len(inputs)), taker(inputs, labels))
        found = gradients(module)
    assert_close(found, naive(module, inputs, labels, clip))


@pytest.mark.parametrize("name", MODULES)
def test_the_fastest_way_that_is_right(name):
    build, _, mode = MODULES[name]
    assert clipping_mode(made(build), "record") == mode
    assert clipping_mode(made(build), "user") == "hooks"


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_of_ones_own_is_clipped_as_it_is(mode):
    def halved(net, inputs, labels):
        return cross_entropy(net, inputs, labels) / 2

    module = made(MODULES["cnn"][0])
    labels = Y[: len(IMAGES)]
    with clipper(module, clip=100.0, loss=halved, mode=mode) as made_by:
        made_by.step(np.arange(len(IMAGES)), taker(IMAGES, labels))
        found = gradients(module)
        assert made_by.mode == mode
    assert_close([2 * one for one in found], naive(module, IMAGES, labels, 1e6))


@pytest.mark.parametrize("mode", ["gram", "ghost"])
def test_a_layer_used_twice_turns_to_hooks_with_the_same_draw(mode):
    module = made(Tied)
    with clipper(module, mode=mode) as made_by:
        made_by.step(np.arange(5), taker())
        assert made_by.mode == "hooks"
        found = gradients(module)
    assert_close(found, naive(module, X[:5], Y[:5], 0.5))


@pytest.mark.parametrize("mode", ["gram", "ghost"])
def test_hooks_in_place_of_another_way_take_fewer_rows(monkeypatch, mode):
    monkeypatch.setattr(clipping, "HOOKS_VALUES", 4 * sum(w.numel() for w in Tied().parameters()))
    module = made(Tied)
    with clipper(module, mode=mode) as made_by:
        assert made_by.largest == 1024
        made_by.step(np.arange(10), taker())
        assert made_by.largest == 4
        found = gradients(module)
    assert_close(found, naive(module, X[:10], Y[:10], 0.5))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_clipped_is_no_longer_than_the_norm(mode):
    module = made(MODULES["mlp"][0])
    with clipper(module, clip=0.01, mode=mode) as made_by:
        for row in range(len(X)):
            made_by.step(np.array([row]), taker())
            norm = torch.cat([g.flatten() for g in gradients(module)]).norm()
            assert norm <= 0.01 * (1 + 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_parts_add_up_to_the_whole(mode):
    module = made(MODULES["mlp"][0])
    with clipper(module, mode=mode, largest=5, expected=4.0) as made_by:
        made_by.step(np.arange(12), taker())
        found = gradients(module)
    assert_close(found, [g / 4 for g in naive(module, X, Y, 0.5)])


@pytest.mark.parametrize("mode", MODES)
def test_the_divisor_is_the_expected_number_and_not_the_drawn_one(mode):
    module = made(MODULES["linear"][0])
    with clipper(module, mode=mode, expected=7.5) as made_by:
        made_by.step(np.arange(3), taker())
        found = gradients(module)
    assert_close(found, [g / 7.5 for g in naive(module, X[:3], Y[:3], 0.5)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("largest", [None, 2])
def test_noise_has_the_deviation_that_is_paid_for(mode, largest):
    """300 draws of 15 numbers: a deviation that is 5 % off would be seen; noise once a step."""
    module, random = made(MODULES["linear"][0]), torch.Generator().manual_seed(4)
    drawn = []
    how = {"sigma": 3.0, "clip": 0.5, "expected": 6.0, "generator": random, "largest": largest}
    with clipper(module, mode=mode, **how) as made_by:
        for _ in range(300):
            made_by.step(np.arange(6), taker())
            drawn.append(torch.cat([g.flatten() for g in gradients(module)]))
    noise = torch.stack(drawn)
    exact = torch.cat([g.flatten() for g in naive(module, X[:6], Y[:6], 0.5)]) / 6
    assert float((noise - exact).std()) == pytest.approx(3 * 0.5 / 6, rel=0.05)
    assert float((noise.mean(0) - exact).abs().max()) < 5 * 0.25 / 300**0.5


@pytest.mark.parametrize("mode", MODES)
def test_a_step_without_anybody_is_noise(mode):
    """Fault 51: an empty draw is a step, finite and noised."""
    module, random = made(MODULES["mlp"][0]), torch.Generator().manual_seed(4)
    how = {"sigma": 2.0, "clip": 1.0, "expected": 1.0, "generator": random}
    with clipper(module, mode=mode, **how) as made_by:
        noise = []
        for _ in range(60):
            made_by.step(np.arange(0), taker())
            noise.append(torch.cat([g.flatten() for g in gradients(module)]))
    found = torch.cat(noise)
    assert float(found.std()) == pytest.approx(2.0, rel=0.05)
    assert abs(float(found.mean())) < 0.2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_running_out_changes_parts_and_nothing_else(mode, where):
    """Fault 61."""
    module = made(MODULES["mlp"][0])

    def fits_three(net, inputs, labels):
        if len(inputs) > 3 and where == "forward":
            raise torch.OutOfMemoryError
        losses = cross_entropy(net, inputs, labels)
        if len(inputs) > 3:
            losses.register_hook(_out_of_memory)
        return losses

    takes = []

    def take(chosen):
        takes.append(chosen)
        return X[chosen], Y[chosen], None

    drawn = np.array([0, 2, 3, 5, 7, 8, 11])
    with clipper(module, loss=fits_three, mode=mode) as made_by:
        made_by.step(drawn, take)
        found = gradients(module)
        assert made_by.largest == 3
        assert [len(part) for part in takes] == [7, 3, 3, 1]
        made_by.step(drawn, take)
    assert_close(found, naive(module, X[drawn], Y[drawn], 0.5))
    assert_close(gradients(module), found)


@pytest.mark.parametrize("mode", ["gram", "hooks"])
def test_memory_running_out_while_unusable_rows_are_looked_for(mode):
    """The second pass of a step with such a row."""
    module, inputs, passes = made(MODULES["mlp"][0]), X.clone(), []
    inputs[1] = np.nan

    def scarce(net, some, labels):
        passes.append(len(some))
        if len(passes) == 2:
            raise torch.OutOfMemoryError
        return cross_entropy(net, some, labels)

    with clipper(module, mode=mode, loss=scarce) as by:
        by.step(np.arange(len(X)), taker(inputs))
        assert by.unusable == 1
    assert passes[1] == len(X) > passes[2]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(module))


def _out_of_memory(gradient):
    raise torch.OutOfMemoryError


def test_one_row_that_does_not_fit_is_the_end():
    def never(net, inputs, labels):
        raise torch.OutOfMemoryError

    with clipper(made(MODULES["linear"][0]), loss=never) as made_by:
        with pytest.raises(torch.OutOfMemoryError):
            made_by.step(np.arange(4), taker())
        assert made_by.largest == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("largest", [None, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_without_a_finite_gradient_adds_nothing(mode, value, largest):
    """Fault 52. The others count as if it were not there: it must not decide about them."""
    module, broken = made(MODULES["mlp"][0]), X.clone()
    broken[4, 0] = value
    with clipper(module, mode=mode, largest=largest) as made_by:
        made_by.step(np.arange(8), taker(broken))
        found = gradients(module)
        assert made_by.unusable == 1
    rest = [0, 1, 2, 3, 5, 6, 7]
    assert_close(found, naive(module, X[rest], Y[rest], 0.5))


@pytest.mark.parametrize("mode", MODES)
def test_steps_without_any_finite_gradient_are_noise_and_nobody_is_told(mode):
    """Fault 52: each of the steps counts. An error would tell of rows, which no noise covers."""
    module, random = made(MODULES["mlp"][0]), torch.Generator().manual_seed(4)
    nothing = torch.full_like(X, np.nan)
    with clipper(module, mode=mode, sigma=1.0, generator=random) as made_by:
        for inputs in (nothing, nothing, X, nothing, nothing, nothing):
            made_by.step(np.arange(4), taker(inputs))
            assert all(g.isfinite().all() for g in gradients(module))


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_are_not_finite_end_the_steps(mode):
    module = made(MODULES["mlp"][0])
    with torch.no_grad():
        next(module.parameters()).fill_(np.nan)
    with (
        clipper(module, mode=mode) as made_by,
        pytest.raises(RunError, match=r"weights are NaN.*privacy\.lr"),
    ):
        made_by.step(np.arange(4), taker(X))


def test_a_user_has_one_gradient_the_mean_of_its_rows():
    module, owner = made(MODULES["mlp"][0]), torch.tensor([0, 0, 0, 0, 1, 2, 2])
    with clipper(module) as made_by:
        made_by.step(np.arange(3), lambda chosen: (X[:7], Y[:7], owner))
        found = gradients(module)
    assert_close(found, naive(module, X[:7], Y[:7], 0.5, owner.tolist()))


@pytest.mark.parametrize("count", [1, 30])
def test_a_user_moves_the_sum_by_the_norm_at_most(count):
    """However many rows it has."""
    module = made(MODULES["mlp"][0])
    inputs, labels = (
        torch.cat([X, 50 * X[:1].repeat(count, 1)]),
        torch.cat([Y, Y[:1].repeat(count)]),
    )
    owner = torch.tensor([n // 3 for n in range(12)] + [4] * count)
    with clipper(module, clip=0.3) as made_by:
        everybody = made_by.clipped_sum((inputs, labels, owner))
        moved = []
        for user in range(5):
            rest = owner != user
            place = torch.unique(owner[rest], return_inverse=True)[1]
            without = made_by.clipped_sum((inputs[rest], labels[rest], place))
            apart = [a - b for a, b in zip(everybody, without, strict=True)]
            moved.append(float(torch.cat([a.flatten() for a in apart]).norm()))
    assert max(moved) <= 0.3 * (1 + 1e-3)
    assert max(moved) > 0.29


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_nothing_of_it_stays_on_the_module(name, mode):
    build, inputs, _ = MODULES[name]
    module = made(build)
    with clipper(module, mode=mode) as made_by:
        made_by.step(np.arange(4), taker(inputs))
    for layer in module.modules():
        assert not layer._forward_hooks
        assert not layer._backward_hooks
        assert not {"activations", "max_batch_len", "autograd_grad_sample_hooks"} & set(vars(layer))
    for weight in module.parameters():
        kept = {"grad_sample", "summed_grad", "_norm_sample", "_forward_counter"}
        assert not kept & set(vars(weight))


@pytest.mark.parametrize("mode", MODES)
def test_ordinary_steps_aside_are_ordinary(mode):
    module = made(MODULES["mlp"][0])
    with clipper(module, mode=mode) as made_by:
        for _ in range(2):
            made_by.step(np.arange(4), taker())
            found = gradients(module)
            with made_by.aside():
                assert not module.head._forward_hooks
                module.zero_grad(set_to_none=True)
                F.cross_entropy(module(X), Y).backward()
                plain = gradients(module)
    wanted = torch.autograd.grad(F.cross_entropy(module(X), Y), list(module.parameters()))
    assert_close(plain, wanted, 1e-7)
    assert_close(found, naive(module, X[:4], Y[:4], 0.5))


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_that_the_loss_does_not_use_has_to_be_frozen(mode):
    """Section 5: Opacus says "Per sample gradient is not initialized"."""
    module = made(MODULES["mlp"][0])
    module.spare = nn.Linear(2, 2)
    with (
        clipper(module, mode=mode) as made_by,
        pytest.raises(FedistillError, match=r"gradient of spare\.weight.*freeze"),
    ):
        made_by.step(np.arange(4), taker())
    module.spare.requires_grad_(False)
    with clipper(module, mode=mode) as made_by:
        made_by.step(np.arange(4), taker())


@pytest.mark.parametrize("mode", MODES)
def test_public_rows_in_the_same_pass_are_refused(mode):
    """Section 5, ``cat(private, public)``: they would count as rows and be noised as such."""

    def joined(net, inputs, labels):
        logits = net(torch.cat([inputs, X]))
        return F.cross_entropy(logits[: len(inputs)], labels, reduction="none")

    with (
        clipper(made(MODULES["linear"][0]), loss=joined, mode=mode) as made_by,
        pytest.raises(FedistillError, match="for each row"),
    ):
        made_by.step(np.arange(4), taker())


@pytest.mark.parametrize("mode", ["ghost", "hooks"])
def test_two_passes_before_a_step_are_one_loss_too_many(mode):
    """Section 5: gradients of an earlier pass must not slip into a step."""
    module = made(MODULES["mlp"][0])
    with clipper(module, mode=mode) as made_by:
        made_by.step(np.arange(4), taker())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cross_entropy(made_by._engine._wrapped, X, Y).sum().backward()
        made_by.step(np.arange(4), taker())
        found = gradients(module)
    assert_close(found, naive(module, X[:4], Y[:4], 0.5))


def test_a_loss_is_one_value_a_row():
    def wide(net, inputs, labels):
        return net(inputs)

    with (
        clipper(made(MODULES["linear"][0]), loss=wide) as made_by,
        pytest.raises(FedistillError, match=r"one value for each row, \[4\], it gives \[4, 3\]"),
    ):
        made_by.step(np.arange(4), taker())


@pytest.mark.parametrize("mode", MODES)
def test_a_sum_over_rows_will_do(mode):
    def summed(net, inputs, labels):
        return cross_entropy(net, inputs, labels).sum()

    module = made(MODULES["mlp"][0])
    with clipper(module, loss=summed, mode=mode) as made_by:
        made_by.step(np.arange(4), taker())
        found = gradients(module)
        assert made_by.mode == "hooks"
    assert_close(found, naive(module, X[:4], Y[:4], 0.5))


@pytest.mark.parametrize(
    ("mode", "rows", "largest"),
    [("gram", 1, 1024), ("ghost", 1, 1024), ("hooks", 1, 1024), ("hooks", 50, 20)],
)
def test_how_many_units_go_at_once(mode, rows, largest):
    assert clipper(made(MODULES["mlp"][0]), mode=mode, rows=rows).largest == largest


def test_a_large_model_takes_fewer_rows_at_once():
    """A gradient of a million values for every row: 64 of them are 256 MB."""
    with torch.device("meta"):
        wide = nn.Linear(1024, 1024, bias=False)
    assert clipper(wide).largest == 64
    assert clipper(wide, mode="ghost").largest == 1024
    assert clipper(wide, rows=1000).largest == 1
