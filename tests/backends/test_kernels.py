"""Steps by hand against those of autograd, in double precision."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fedistill.backends import kernels, precision
from fedistill.backends.kernels import Stack
from fedistill.backends.precision import LARGEST_ERROR, best_mode, error_of, matmul_precision
from fedistill.losses import logit_mae, own_or_proxy, soft_cross_entropy
from fedistill.models import MLP, Linear

INPUTS, CLASSES, ROWS = 7, 4, 6
BUILDS = {
    "linear": partial(Linear, INPUTS, CLASSES),
    "mlp": partial(MLP, INPUTS, CLASSES, width=5),
    "deep": partial(MLP, INPUTS, CLASSES, width=5, depth=3),
}


def layers_of(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def stacked(modules):
    columns = list(zip(*map(layers_of, modules), strict=True))
    sizes = [columns[0][0].in_features, *[column[0].out_features for column in columns]]
    stack = Stack.blank(sizes, len(modules), columns[0][0].weight.detach())
    for held, bias, column in zip(stack.as_modules(), stack.biases, columns, strict=True):
        held.copy_(torch.stack([layer.weight.detach() for layer in column]))
        bias.copy_(torch.stack([layer.bias.detach() for layer in column]))
    return stack


def tensors_of(stack):
    """As modules have them."""
    return (*stack.as_modules(), *stack.biases)


def students(build, count=3):
    torch.manual_seed(1)
    return [build().double() for _ in range(count)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    layers = layers_of(module)
    return [layer.weight.grad for layer in layers] + [layer.bias.grad for layer in layers]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_gradient_is_that_of_autograd(build, shared, count):
    modules = students(build, count)
    stack = stacked(modules)
    rows = drawn(ROWS, INPUTS) if shared else drawn(count, ROWS, INPUTS)
    targets = drawn(count, ROWS, CLASSES, seed=1).softmax(-1)
    weight = drawn(count, ROWS, seed=2).abs()
    logits, given = kernels.forward(stack, rows)
    delta = kernels.soft_delta(logits, targets.mT, weight, 2.0)
    found = stack.zeros()
    kernels.accumulate(found, given, kernels.backward(stack, given, delta), 0.0)
    for k, module in enumerate(modules):
        own = rows if shared else rows[k]
        torch.testing.assert_close(logits[k].T, module(own))
        loss = soft_cross_entropy(module(own), targets[k], weight[k], 2.0)
        wanted = gradients(module, loss)
        for tensor, grad in zip(tensors_of(found), wanted, strict=True):
            torch.testing.assert_close(tensor[k], grad)


def test_targets_that_do_not_sum_to_one_have_the_gradient_of_the_loss_as_it_is():
    logits = drawn(1, ROWS, CLASSES).requires_grad_()
    targets = drawn(1, ROWS, CLASSES, seed=1).abs()
    weight, heat = drawn(1, ROWS, seed=2).abs(), torch.tensor([[1.0, 1.0, 2.0, 3.0, 2.0, 1.0]])
    scaled = (logits / heat[..., None]).log_softmax(-1)
    (wanted,) = torch.autograd.grad(-(weight * (targets * scaled).sum(-1)).sum(), logits)
    found = kernels.soft_delta(logits.detach().mT, targets.mT, weight, heat).mT
    torch.testing.assert_close(found, wanted, check_dtype=False)


def test_losses_beside_cross_entropy_have_their_gradient_and_rows_without_weight_none():
    logits = drawn(ROWS, CLASSES).requires_grad_()
    targets = drawn(ROWS, CLASSES, seed=1).softmax(-1)
    weight = torch.full((ROWS,), 0.5, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(logit_mae(logits, targets) * weight.sum(), logits)
    pad = torch.ones(1, 2, CLASSES, dtype=torch.float64)
    found = kernels.mae_delta(
        torch.cat([logits.detach()[None], pad], 1).mT,
        torch.cat([targets[None], pad], 1).mT,
        torch.cat([weight[None], torch.zeros(1, 2, dtype=torch.float64)], 1),
    ).mT
    torch.testing.assert_close(found[0, :ROWS], wanted)
    assert not found[0, ROWS:].any()

    scores = drawn(ROWS).requires_grad_()
    side = torch.tensor([0.5, -0.2, 0.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    (wanted,) = torch.autograd.grad(own_or_proxy(scores, side), scores)
    torch.testing.assert_close(kernels.familiar_delta(scores.detach(), side), wanted)


@pytest.mark.parametrize("clipped", [0.0, 0.3])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_three_steps_are_those_of_torch_sgd(build, clipped):
    modules = students(build)
    stack = stacked(modules)
    momentum, gradient = stack.zeros(), stack.zeros()
    sgd = [
        torch.optim.SGD(
            [
                {"params": [w for w in m.parameters() if w.dim() > 1], "weight_decay": 0.01},
                {"params": [w for w in m.parameters() if w.dim() == 1]},
            ],
            lr=0.1,
            momentum=0.9,
        )
        for m in modules
    ]
    for turn in range(3):
        rows = drawn(3, ROWS, INPUTS, seed=turn)
        targets = drawn(3, ROWS, CLASSES, seed=9 + turn).softmax(-1)
        weight = torch.full((3, ROWS), 1 / ROWS, dtype=torch.float64)
        logits, given = kernels.forward(stack, rows)
        deltas = kernels.backward(stack, given, kernels.soft_delta(logits, targets.mT, weight))
        kernels.accumulate(gradient, given, deltas, 0.0)
        if clipped:
            kernels.clip(gradient, clipped)
        kernels.decay(gradient, stack, 0.01)
        kernels.fold(momentum, gradient, 0.9)
        kernels.step(stack, momentum, torch.full((3,), 0.1, dtype=torch.float64))
        for k, module in enumerate(modules):
            module.zero_grad()
            soft_cross_entropy(module(rows[k]), targets[k], weight[k]).backward()
            if clipped:
                nn.utils.clip_grad_norm_(module.parameters(), clipped)
            sgd[k].step()
    wanted = stacked(modules)
    for found, other in zip(stack.tensors(), wanted.tensors(), strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_clipping_before_the_gradient_is_there_is_clipping(build, shared):
    stack = stacked(students(build))
    rows = drawn(ROWS, INPUTS) if shared else drawn(3, ROWS, INPUTS)
    logits, given = kernels.forward(stack, rows)
    # The first is shorter than the limit and stays as it is.
    delta = logits * torch.tensor([1e-3, 1.0, 5.0], dtype=torch.float64)[:, None, None]
    deltas = kernels.backward(stack, given, delta)
    wanted, found = stack.zeros(), stack.zeros()
    kernels.accumulate(wanted, given, deltas, 0.0)
    before = wanted.weights[0].clone()
    kernels.clip(wanted, 2.0)
    kernels.clip_deltas(given, deltas, 2.0)
    kernels.accumulate(found, given, deltas, 0.0)
    assert torch.equal(wanted.weights[0][0], before[0])
    assert not torch.equal(wanted.weights[0][2], before[2])
    for tensor, other in zip(found.tensors(), wanted.tensors(), strict=True):
        torch.testing.assert_close(tensor, other)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("begun", "rates"), [((0, 0, 0), (0.1,) * 3), ((0, 2, 1), (0.1, 0.2, 0.1))]
)
def test_adam_is_that_of_torch_for_clients_at_different_steps_too(kind, begun, rates):
    modules = students(BUILDS["mlp"])
    optimizers = [
        kind(
            [
                {"params": [w for w in m.parameters() if w.dim() > 1], "weight_decay": 0.05},
                {"params": [w for w in m.parameters() if w.dim() == 1], "weight_decay": 0.0},
            ],
            lr=rate,
        )
        for m, rate in zip(modules, rates, strict=True)
    ]

    def walk(module, optimizer, turn):
        module.zero_grad()
        module(drawn(ROWS, INPUTS, seed=turn)).square().mean().backward()
        optimizer.step()

    for module, optimizer, count in zip(modules, optimizers, begun, strict=True):
        for turn in range(count):
            walk(module, optimizer, turn)
    stack, moments = stacked(modules), [stacked(modules).zeros(), stacked(modules).zeros()]
    for moment, key in zip(moments, ["exp_avg", "exp_avg_sq"], strict=True):
        for k, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            held = [optimizer.state[w].get(key) for w in module.parameters()]
            if held[0] is not None:
                for tensor, value in zip(moment.as_modules(), held[::2], strict=True):
                    tensor[k].copy_(value)
                for tensor, value in zip(moment.biases, held[1::2], strict=True):
                    tensor[k].copy_(value)
    for turn in range(2):
        outputs, given = kernels.forward(stack, drawn(ROWS, INPUTS, seed=9 + turn))
        deltas = kernels.backward(stack, given, 2 * outputs / outputs[0].numel())
        gradient = stack.zeros()
        kernels.accumulate(gradient, given, deltas, 0.0)
        taken = [float(count + turn) for count in begun]
        decoupled = kind is torch.optim.AdamW
        kernels.adam(stack, gradient, moments, taken, rates, 0.05, decoupled)
        for module, optimizer in zip(modules, optimizers, strict=True):
            walk(module, optimizer, 9 + turn)
    for found, wanted in zip(stack.tensors(), stacked(modules).tensors(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_momentum_folded_into_the_product_is_momentum():
    stack = stacked(students(BUILDS["mlp"]))
    folded, apart, gradient = stack.zeros(), stack.zeros(), stack.zeros()
    for turn, shared in enumerate([False, True, False]):
        rows = drawn(*([] if shared else [3]), ROWS, INPUTS, seed=turn)
        logits, given = kernels.forward(stack, rows)
        deltas = kernels.backward(stack, given, logits)
        kernels.accumulate(folded, given, deltas, 0.9)
        kernels.accumulate(gradient, given, deltas, 0.0)
        kernels.fold(apart, gradient, 0.9)
    for found, wanted in zip(folded.tensors(), apart.tensors(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_first_clients_step_alone_and_the_average_follows_each_at_its_pace():
    stack = stacked(students(BUILDS["mlp"]))
    before = stack.first(3).weights[0].clone()
    moved = stack.zeros()
    for tensor in moved.tensors():
        tensor += 1
    kernels.step(stack.first(2), moved.first(2), 0.5)
    torch.testing.assert_close(stack.weights[0][:2], before[:2] - 0.5)
    assert torch.equal(stack.weights[0][2], before[2])
    averaged = stack.zeros()
    kernels.average(averaged, moved, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert [float(tensor[0, 0]) for tensor in averaged.weights[0]] == [1.0, 0.5, 0.0]


def test_prediction_in_chunks_is_that_of_each_module():
    modules = students(BUILDS["deep"])
    rows = drawn(11, INPUTS)
    for part, found in kernels.predict(stacked(modules), rows, 4):
        for k, module in enumerate(modules):
            torch.testing.assert_close(found[k].T, module(rows[part]).detach())
    assert part == slice(8, 12)


def test_the_mode_of_products_is_put_back_and_only_an_exact_one_is_chosen():
    before = torch.get_float32_matmul_precision()
    with matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(ValueError, match="stop"), matmul_precision("medium"):
        raise ValueError("stop")
    assert torch.get_float32_matmul_precision() == before
    assert error_of("highest") < LARGEST_ERROR
    assert error_of(best_mode()) < LARGEST_ERROR


@pytest.mark.parametrize(
    ("vendor", "family", "error", "mode"),
    [
        ("AuthenticAMD", 26, 1e-7, "medium"),
        ("AuthenticAMD", 26, 1e-3, "highest"),
        ("AuthenticAMD", 25, 1e-7, "highest"),
        ("GenuineIntel", 6, 1e-7, "highest"),
    ],
)
def test_a_mode_that_gains_nothing_or_has_the_error_of_bfloat16_is_not_chosen(
    monkeypatch, vendor, family, error, mode
):
    said = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\n"
    monkeypatch.setattr(precision, "processor", lambda: said)
    monkeypatch.setattr(precision, "error_of", lambda mode: error)
    assert precision.best_mode.__wrapped__() == mode
