"""Small students and their factories."""

from __future__ import annotations

import pytest
import torch

from fedistill import catalog, models
from fedistill.errors import FedistillError

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
