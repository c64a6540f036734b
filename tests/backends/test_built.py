"""What modules have in common that compute the same, and which cannot be told."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedistill import models
from fedistill.backends.built import built_of


class Scaled(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        vars(self.layer).update(settings)

    def forward(self, inputs):
        return self.layer(inputs)


def other():
    class Scaled(nn.Module):
        """Another class of the same name."""

    return Scaled()


SETTINGS = {
    "number": (1.0, 5.0),
    "kind of number": (1, True),
    "no number": (1.0, None),
    "text": ("mean", "sum"),
    "tuple": ((1, 2), (1, 3)),
    "nested": ({"a": [1, 2]}, {"a": [1, 3]}),
    "list or tuple": ([1, 2], (1, 2)),
    "dtype": (torch.float32, torch.float64),
    "function": (F.relu, F.gelu),
    "built-in function": (torch.tanh, torch.sigmoid),
}


@pytest.mark.parametrize(("one", "two"), SETTINGS.values(), ids=SETTINGS)
def test_what_differs_in_an_attribute_is_not_the_same(one, two):
    assert not isinstance(built_of(Scaled(scale=one)), str)
    assert built_of(Scaled(scale=one)) == built_of(Scaled(scale=one))
    assert built_of(Scaled(scale=one)) != built_of(Scaled(scale=two))


def test_what_has_a_number_that_is_none_is_the_same_as_itself():
    assert built_of(Scaled(scale=float("nan"))) == built_of(Scaled(scale=float("nan")))


def test_classes_and_not_their_names_count():
    assert built_of(other()) != built_of(other())


def test_layers_count_by_their_place():
    relu, tanh = nn.ReLU(), nn.Tanh()
    assert built_of(nn.Sequential(relu, tanh)) == built_of(nn.Sequential(nn.ReLU(), nn.Tanh()))
    assert built_of(nn.Sequential(relu, tanh)) != built_of(nn.Sequential(tanh, relu))
    assert built_of(nn.Sequential(relu, relu)) != built_of(nn.Sequential(relu))


def test_weights_and_mode_do_not_count():
    assert built_of(models.LeNet().eval()) == built_of(models.LeNet().train())


@pytest.mark.parametrize(
    "value",
    [torch.ones(1), [torch.ones(1)], object(), lambda given: given, nn.Linear(2, 2).forward],
    ids=["tensor", "in a list", "object", "lambda", "method"],
)
def test_what_cannot_be_compared_says_so(value):
    found = built_of(Scaled(scale=value))
    assert found == f"Linear keeps a {type(value).__name__} as scale, which cannot be compared"
