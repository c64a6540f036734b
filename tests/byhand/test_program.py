"""Networks by hand: the values and gradients of their modules, and which have none."""

import pytest
import torch
from torch import nn

from fedistill.byhand import program_of
from fedistill.models import CNN, MLP, LeNet
from fedistill.pooling import MaxPool


def small(*, pool=None, after=True, bias=True):
    """Two convolutions; ReLU after the pool or before it."""

    def block(before, channels, kernel, padding):
        steps = [pool or nn.MaxPool2d(2), nn.ReLU()]
        made = nn.Conv2d(before, channels, kernel, padding=padding, bias=bias)
        return [made, *(steps if after else reversed(steps))]

    return nn.Sequential(
        nn.Sequential(*block(2, 3, 4, 2), *block(3, 4, 5, 1)),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 5, bias=bias),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


MODULES = {
    "lenet": (LeNet, (1, 28, 28)),
    "pool first": (small, (2, 13, 12)),
    "relu first": (lambda: small(after=False), (2, 12, 13)),
    "our pool": (lambda: small(pool=MaxPool()), (2, 13, 13)),
    "no bias": (lambda: small(bias=False), (2, 12, 12)),
}


def built(name):
    torch.manual_seed(0)
    build, shape = MODULES[name]
    return build(), shape


def gradients(outputs, incoming, weights):
    return torch.autograd.grad(outputs, weights, incoming)


@pytest.mark.parametrize("kind", ["random", "background"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients_are_the_modules(name, rows, kind):
    module, shape = built(name)
    program, weights = program_of(module), list(module.parameters())
    inputs = torch.randn(rows, *shape)
    if kind == "background":  # windows full of ties
        inputs[..., : shape[-1] // 2] = -1.0
    assert program.takes(inputs)
    (ours,), theirs = program(inputs), module(inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    incoming = torch.randn_like(theirs)
    pairs = zip(
        gradients(ours, incoming, weights), gradients(theirs, incoming, weights), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(program(inputs)[0], ours)


def test_a_head_beside_the_last_layer_sees_the_same_features():
    module, shape = built("lenet")
    beside = nn.Linear(84, 1)
    program = program_of(module, beside)
    inputs = torch.randn(5, *shape)
    features = []
    hook = module.head.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    logits = module(inputs)
    hook.remove()
    score = beside(features[0])
    weights = [*module.parameters(), *beside.parameters()]
    ours = program(inputs)
    torch.testing.assert_close(ours[1], score, rtol=1e-4, atol=1e-5)
    one = torch.autograd.grad(ours[0].sum() + ours[1].square().sum(), weights)
    other = torch.autograd.grad(logits.sum() + score.square().sum(), weights)
    for found, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_head_without_a_gradient_gets_none():
    module, shape = built("lenet")
    beside = nn.Linear(84, 1)
    program_of(module, beside)(torch.randn(2, *shape))[0].sum().backward()
    assert beside.weight.grad is None
    assert module.conv1.weight.grad is not None


@pytest.mark.parametrize("parts", [1, 3])
def test_a_network_is_taught_from_the_slopes_of_a_loss_as_by_a_graph(parts):
    module, shape = built("lenet")
    beside = nn.Linear(84, 1)
    module.fc1.weight.requires_grad_(False)
    program = program_of(module, beside)
    inputs, incoming = torch.randn(6, *shape), torch.randn(6, 10)
    program(inputs)[0].backward(incoming)
    wanted = [weight.grad for weight in program.weights]
    module.zero_grad()
    for rows, slope in zip(inputs.chunk(parts), incoming.chunk(parts), strict=True):
        program.teach(rows, lambda logits, score, slope=slope: [slope, None])
    for weight, grad in zip(program.weights, wanted, strict=True):
        assert (weight.grad is None) == (grad is None)
        if grad is not None:
            torch.testing.assert_close(weight.grad, grad, rtol=1e-4, atol=1e-5)
    assert beside.weight.grad is None
    assert module.fc1.weight.grad is None


def changed(change):
    module = small()
    change(module)
    return module


class Doubled(LeNet):
    """What LeNet tells is no longer what is computed."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Doubling:
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Mixed(Doubling, LeNet):
    """The same, by a class beside it."""


class Told(LeNet):
    """Tells of a forward that another class wrote."""

    def in_order(self):
        told = super().in_order()
        return [*told[:-2], told[-1]]


class Node(nn.Module):
    """Has a method of that name for something else."""

    def __init__(self):
        super().__init__()
        self.body = small()

    def forward(self, inputs):
        return self.body(inputs)

    def in_order(self, node):
        return [*self.in_order(node.left), node]


class Numbers(Node):
    """Has one that gives no layers."""

    def forward(self, inputs):
        return 2 * self.body(inputs)

    def in_order(self):
        return iter([1, 2])


class Heir(LeNet):
    """Computes what LeNet computes."""

    def __init__(self):
        super().__init__()
        self.note = "nothing else"


@pytest.mark.parametrize(
    "module",
    [
        MLP(4, 2),
        CNN(1, 3, width=4),
        nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten(), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv2d(1, 2, 5), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Conv2d(1, 2, 5), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv2d(1, 2, 5, stride=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv2d(1, 2, 5), nn.MaxPool2d(2), nn.Dropout(), nn.Linear(8, 2)),
        changed(lambda made: made.double()),
        changed(lambda made: made[2].register_forward_hook(lambda *_: None)),
        changed(lambda made: nn.utils.parametrizations.weight_norm(made[2])),
        changed(lambda made: made.register_parameter("idle", nn.Parameter(torch.zeros(1)))),
        changed(lambda made: made.register_buffer("mean", torch.ones(1))),
        changed(lambda made: setattr(made, "forward", torch.tanh)),
        changed(lambda made: setattr(made[2], "forward", torch.tanh)),
        changed(lambda made: setattr(made[3], "forward", torch.tanh)),
        Doubled(),
        Mixed(),
        Told(),
        Node(),
        Numbers(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_left_to_pytorch(module):
    assert program_of(module) is None


def test_whoever_takes_both_from_one_class_is_known():
    assert program_of(Heir()) is not None


def test_hooks_of_all_modules_count():
    module, _ = built("lenet")
    hook = nn.modules.module.register_module_forward_hook(lambda layer, given, gave: 2 * gave)
    try:
        assert program_of(module) is None
    finally:
        hook.remove()
    assert program_of(module) is not None


def test_rows_that_do_not_fit_are_left_to_pytorch():
    module, shape = built("lenet")
    program = program_of(module)
    assert not program.takes(torch.zeros(0, *shape))
    assert not program.takes(torch.zeros(2, 1, 20, 20))
    assert not program.takes(torch.zeros(2, *shape, dtype=torch.float64))
    assert not program.takes(torch.zeros(2, *shape, requires_grad=True))
    assert not program.takes(torch.full((2, *shape), torch.inf))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not program.takes(torch.zeros(2, *shape))


def test_hooks_of_one_listener_may_not_count():
    module, _ = built("lenet")

    class Listener:
        def hear(self, layer, inputs):
            pass

    listener = Listener()
    module.head.register_forward_pre_hook(listener.hear)
    assert program_of(module) is None
    assert program_of(module, heard=listener) is not None
