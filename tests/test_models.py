"""Small students and their factories."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fedistill import catalog, models
from fedistill.distill.trunk import Trunk
from fedistill.errors import FedistillError
from fedistill.models import layers_of

INPUTS, CLASSES = 6, 3
SHAPES = {"lenet": (1, 28, 28), "cnn": (3, 8, 8)}


@pytest.mark.parametrize("name", catalog.known("models"))
def test_every_model_of_the_catalogue_is_built_and_predicts(name):
    shape = SHAPES.get(name, (5,))
    made = models.factory(name, shape, 4, width=8, depth=2)()
    if isinstance(made, torch.nn.Module):
        assert made(torch.rand(3, *shape)).shape == (3, 4)
        assert made.eval()(torch.rand(1, *shape)).shape == (1, 4)
    else:
        assert hasattr(made, "predict_proba")
        assert "random_state" in made.get_params()


def test_an_mlp_has_the_layers_that_are_asked_for():
    made = models.MLP(6, 3, width=7, depth=3)
    assert [
        layer.out_features for layer in made.modules() if isinstance(layer, torch.nn.Linear)
    ] == [7, 7, 7, 3]


def test_flat_models_take_images_too():
    assert models.factory("mlp", (1, 4, 4), 3)()(torch.rand(2, 1, 4, 4)).shape == (2, 3)
    assert models.factory("linear", (1, 4, 4), 3)()(torch.rand(2, 1, 4, 4)).shape == (2, 3)


def test_lenet_has_its_published_number_of_parameters():
    assert models.parameter_count(models.LeNet(10)) == 61_706


def test_the_cnn_shares_nothing_between_the_rows_of_a_batch():
    made = models.CNN(1, 3, width=4)
    rows = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(made(rows)[:1], made(rows[:1]))
    assert not [m for m in made.modules() if "BatchNorm" in type(m).__name__]


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("lenet", (3, 32, 32), "lenet takes images of 1x28x28, the rows are 3x32x32"),
        ("cnn", (64,), "cnn takes images .*, the rows are 64: use mlp or linear"),
        ("nope", (64,), 'unknown model "nope"'),
    ],
)
def test_a_model_that_cannot_take_the_rows_says_what_can(name, shape, told):
    with pytest.raises(FedistillError, match=told):
        models.factory(name, shape, 3)


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(FedistillError, match="a multiple of 4, found 6"):
        models.CNN(1, 3, width=6)


def test_devices():
    assert models.pick_device("cpu") == torch.device("cpu")
    assert models.pick_device("auto").type in {"cpu", "cuda"}
    if not torch.cuda.is_available():
        with pytest.raises(FedistillError, match='"cuda" is asked for, this machine has 0'):
            models.pick_device("cuda")


# --- what is a stack ------------------------------------------------------------------------------


def mlp():
    return models.MLP(INPUTS, CLASSES, width=8)


def no_bias():
    module = mlp()
    module.head = nn.Linear(8, CLASSES, bias=False)
    return module


def tied():
    module = models.MLP(INPUTS, CLASSES, width=INPUTS, depth=2)
    module.trunk[2].weight = module.trunk[0].weight
    return module


def frozen():
    module = mlp()
    module.trunk[0].weight.requires_grad_(False)
    return module


def heard():
    module = mlp()
    module.trunk.register_forward_hook(lambda layer, given, gave: 2 * gave)
    return module


def smoother():
    module = mlp()
    module.trunk[1] = nn.GELU()
    return module


def other_layer():
    module = mlp()
    module.head = nn.Sequential(nn.Linear(8, CLASSES))
    return module


def spare():
    module = mlp()
    module.scale = nn.Parameter(torch.ones(1))
    return module


def replaced():
    module = mlp()
    module.forward = lambda inputs: module.head(torch.tanh(module.trunk(inputs)))
    return module


class Child(models.MLP):
    """Not plainly an MLP."""


NO_STACKS = [
    no_bias,
    tied,
    frozen,
    heard,
    smoother,
    other_layer,
    spare,
    replaced,
    lambda: mlp().double(),
    partial(Child, INPUTS, CLASSES),
    lambda: nn.Sequential(nn.Linear(INPUTS, CLASSES)),
]


@pytest.mark.parametrize("build", NO_STACKS)
def test_modules_that_are_no_plain_stack(build):
    assert layers_of(build()) is None


@pytest.mark.parametrize(
    "build",
    [partial(models.Linear, INPUTS, CLASSES), partial(models.MLP, INPUTS, CLASSES, depth=2)],
)
def test_stacks(build):
    module = build()
    held = [weight for layer in layers_of(module) for weight in (layer.weight, layer.bias)]
    assert all(one is other for one, other in zip(held, module.parameters(), strict=True))


def test_hooks_of_one_listener_do_not_change_a_stack():
    module = mlp()
    trunk = Trunk(module)
    assert layers_of(module) is None
    assert layers_of(module, trunk) is not None
    module.head.register_forward_hook(lambda layer, given, gave: 2 * gave)
    assert layers_of(module, trunk) is None
