"""Heads that grow."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import INPUTS, gaussian
from torch import nn

from fedistill import models
from fedistill.distill.growth import (
    MOST_CLASSES,
    check_growth,
    grow_head,
    head_name,
    head_size,
    moved,
    shaped,
    widen,
    widened,
)
from fedistill.distill.incremental import IncrementalDistiller
from fedistill.distill.recipe import Recipe
from fedistill.distill.teachers import EmaTeacher
from fedistill.errors import DataError, FedistillError

MLP = partial(models.MLP, INPUTS, 3, width=8)
ROWS = gaussian(24, 1)
LATER = gaussian(24, 2)


def plain():
    """A model whose layers have no names of ours, and a hidden layer wider than its head."""
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(), nn.Linear(8, 3))


def bare():
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))


class Conv(nn.Module):
    """No linear layer at all."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 3, INPUTS)

    def forward(self, inputs):
        return self.conv(inputs[:, None])[:, :, 0]


class Misled(nn.Module):
    """The last linear layer is not what gives the logits."""

    def __init__(self):
        super().__init__()
        self.out, self.gate = nn.Linear(INPUTS, 3), nn.Linear(INPUTS, 1)

    def forward(self, inputs):
        return self.out(inputs) * self.gate(inputs)


def later(shift=2):
    return LATER.inputs, LATER.labels + shift


# --- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [MLP, plain, bare, partial(models.Linear, INPUTS, 3)])
def test_what_was_there_does_not_change_by_one_bit(build):
    module = build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    replaced = grow_head(module, 5)
    assert head_size(module) == 5
    for name, value in module.state_dict().items():
        old = before[name]
        assert torch.equal(value[: len(old)], old)
        assert value.isfinite().all()
    after = list(module.parameters())
    for old, new in replaced.items():
        assert any(new is one for one in after)
        assert new.requires_grad == old.requires_grad
    assert module(torch.zeros(2, INPUTS)).shape == (2, 5)


def test_new_weights_are_as_torch_draws_them_and_types_stay():
    module = plain().double()
    grow_head(module, 203)
    new = module[2].weight[3:]
    assert new.dtype == torch.float64
    assert new.abs().max() <= 1 / 8**0.5
    assert new.std().item() == pytest.approx(1 / 8**0.5 / 3**0.5, rel=0.1)


def test_frozen_heads_stay_frozen():
    module = plain().requires_grad_(False)
    grow_head(module, 4)
    assert not any(weight.requires_grad for weight in module.parameters())


def test_a_head_can_lose_its_last_outputs_again():
    module = plain()
    before = module[2].weight.detach().clone()
    grow_head(module, 6)
    grow_head(module, 3)
    assert torch.equal(module[2].weight, before)


def test_a_module_without_a_head_says_so():
    assert head_size(Conv()) == 0
    with pytest.raises(FedistillError, match="Conv has no linear layer that could grow to 4"):
        grow_head(Conv(), 4)


def test_names_and_shapes():
    assert head_name(plain()) == "2"
    assert head_name(MLP()) == "head"
    assert head_name(nn.Linear(2, 3)) == ""
    assert head_name(Conv()) == ""
    assert head_size(shaped(MLP, 7)) == 7
    assert head_size(shaped(MLP, 0)) == 3
    assert head_size(shaped(Conv, 3)) == 0


def test_absurd_numbers_of_classes_are_refused():
    check_growth(MOST_CLASSES, 3)
    check_growth(MOST_CLASSES + 5, MOST_CLASSES + 5)
    with pytest.raises(DataError, match=r"expected labels below 100000, found 100000"):
        check_growth(MOST_CLASSES + 1, 3)


def test_optimizers_and_averages_are_widened():
    old, new, other = torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)
    state = {old: {"m": torch.full((2, 3), 2.0), "step": torch.tensor(5.0)}, other: {"m": other}}
    found = moved(state, {old: new})
    assert set(found) == {new, other}
    assert found[new]["m"].tolist() == [[2.0] * 3] * 2 + [[0.0] * 3] * 2
    assert found[new]["step"].item() == 5
    assert widen(other, other) is other
    weight = torch.arange(8.0).reshape(4, 2)
    assert widened(-torch.ones(3, 2), weight).tolist() == [[-1, -1]] * 3 + [[6, 7]]
    assert widened(-torch.ones(5, 2), weight).tolist() == [[-1, -1]] * 4


# --- a student -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_classes_come_unannounced_and_nothing_old_moves(optimizer):
    recipe = Recipe(optimizer=optimizer, momentum=0.9, lr=0.01, average=0.9, batch_size=8)
    student = IncrementalDistiller(plain, training=recipe, teacher=EmaTeacher(0.9), seed=3)
    student.learn(ROWS)
    before = {name: np.array(value) for name, value in student.state_dict().items()}
    said = student.predict(LATER.inputs)
    taught = student.teacher(torch.from_numpy(LATER.inputs))
    student._resize(5)
    after = student.state_dict()
    parts = ("net.", "average.", "optimizer.", "teacher.")
    grown = 0
    for name in (name for name in before if name.startswith(parts)):
        old, new = before[name], after[name]
        np.testing.assert_array_equal(new[: len(old)] if old.ndim else new, old, err_msg=name)
        grown += new.shape != old.shape
    assert grown == 2 * (3 + (2 if optimizer == "adam" else 1)), "weight and bias of each"
    assert any(name.startswith("optimizer.2.") for name in before)
    np.testing.assert_array_equal(student.predict(LATER.inputs)[:, :3], said)
    assert torch.equal(student.teacher(torch.from_numpy(LATER.inputs))[:, :3], taught)
    # What an optimizer keeps of new weights begins at zero.
    for name in (n for n in after if n.startswith("optimizer.") and after[n].shape):
        if after[name].shape != before[name].shape:
            assert (after[name][3:] == 0).all()


def test_a_student_learns_classes_beyond_its_head():
    student = IncrementalDistiller(plain, seed=3, training=Recipe(epochs=20, batch_size=8, lr=0.1))
    assert student.learn(ROWS).new_classes == (0, 1, 2)
    step = student.learn(later())
    assert step.new_classes == (3, 4)
    assert student.classes == 5
    found = student.predict(LATER.inputs).argmax(axis=1)
    assert (found == later()[1]).mean() > 0.8
    assert student.learn(later()).new_classes == ()


def test_growth_is_seeded_and_moves_no_other_generator():
    def run(global_seed):
        torch.manual_seed(global_seed)
        student = IncrementalDistiller(plain, seed=3)
        student.learn(ROWS)
        before = torch.get_rng_state()
        student.learn(later(7))
        assert torch.equal(torch.get_rng_state(), before)
        return student.predict(LATER.inputs)

    np.testing.assert_array_equal(run(1), run(2))


def test_a_first_number_of_classes_shapes_the_head():
    student = IncrementalDistiller(plain, classes=6, seed=1)
    assert student.predict(ROWS.inputs).shape == (24, 6)
    assert student.learn(ROWS).rows == 24
    assert IncrementalDistiller(Conv, classes=3).learn(ROWS).rows == 24
    with pytest.raises(FedistillError, match="no linear layer to count its classes by"):
        IncrementalDistiller(Conv)


def test_a_model_that_cannot_grow_is_told_before_anything_changes():
    student = IncrementalDistiller(Conv, classes=3, seed=1)
    student.learn(ROWS)
    before = student.state_dict()
    with pytest.raises(DataError, match="label 4 needs more than the 3 outputs of Conv"):
        student.learn(later())
    after = student.state_dict()
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


def test_a_model_whose_last_linear_layer_is_not_its_head_is_told():
    student = IncrementalDistiller(Misled, seed=1)
    with pytest.raises(DataError, match=r"must return logits \[rows, 1\], it returns \[1, 3"):
        student.learn(ROWS)
