"""From a factory to a learner."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import INPUTS, Saying

from fedistill import models
from fedistill.distill.build import build_learner
from fedistill.distill.recipe import Recipe
from fedistill.distill.sklearn_student import SklearnStudent
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import FedistillError


def build(factory, **options):
    return build_learner(factory, Recipe(), classes=3, seed=1, **options)


def test_a_torch_module_becomes_a_torch_student():
    found = build(partial(models.MLP, INPUTS, 3))
    assert isinstance(found, TorchStudent)
    assert found.device == torch.device("cpu")


def test_a_classifier_becomes_a_scikit_learn_student():
    assert isinstance(build(models.logistic_regression), SklearnStudent)


def test_a_learner_is_taken_as_it_is():
    own = Saying(np.zeros((1, 3)))
    assert build(lambda: own) is own


@pytest.mark.parametrize("thing", [None, 3, object(), "mlp"])
def test_anything_else_is_refused_by_its_type(thing):
    with pytest.raises(FedistillError, match=f"it returned {type(thing).__name__}"):
        build(lambda: thing)


def test_models_of_one_seed_start_alike_and_the_global_generator_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (build(partial(models.MLP, INPUTS, 3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    inputs = np.ones((2, INPUTS), np.float32)
    np.testing.assert_array_equal(first.predict(inputs), second.predict(inputs))
