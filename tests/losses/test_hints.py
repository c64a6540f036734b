"""Hints, cosine and attention: one layer against another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedistill.errors import FedistillError
from fedistill.losses import attention_transfer, cosine, hint, regressor


def test_hint_by_hand_and_per_element():
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])
    assert hint(student, teacher) == 2.0
    wider = [side.repeat(1, 8) for side in (student, teacher)]
    assert hint(*wider) == 2.0


def test_hint_says_what_to_do_about_unequal_widths():
    with pytest.raises(FedistillError, match=r"one shape, found \[2, 3\] and \[2, 4\]"):
        hint(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ((3,), (7,), nn.Linear),
        ((5, 3), (5, 7), nn.Linear),
        ((4, 6, 6), (9, 6, 6), nn.Conv2d),
    ],
)
def test_a_regressor_maps_to_the_teachers_shape_and_learns(student, teacher, kind):
    torch.manual_seed(0)
    made = regressor(student, teacher)
    assert isinstance(made, kind)
    found = made(torch.randn(2, *student))
    assert found.shape == (2, *teacher)
    hint(found, torch.randn(2, *teacher)).backward()
    assert all(weight.grad is not None for weight in made.parameters())


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 6, 6), (4, 3, 3)), ((5, 3), (6, 3)), ((3,), (3, 3)), ((), ())]
)
def test_shapes_without_a_regressor_are_refused(student, teacher):
    with pytest.raises(FedistillError, match="choose another pair of layers"):
        regressor(student, teacher)


# --- cosine --------------------------------------------------------------------------------------


def test_cosine_by_hand():
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    teacher = torch.tensor([[0.0, 3.0], [2.0, 2.0], [-1.0, 0.0]])
    assert cosine(student, teacher) == pytest.approx((1 + 0 + 2) / 3)
    assert cosine(student, teacher, torch.tensor([True, True, False])) == pytest.approx(0.5)
    assert cosine(student, teacher, torch.zeros(3, dtype=torch.bool)) == 0


def test_only_the_direction_counts():
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(cosine(100 * student, teacher / 7), cosine(student, teacher))


def test_padding_gives_no_gradient():
    student = torch.randn(2, 3, 4).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    cosine(student, torch.randn(2, 3, 4), mask).backward()
    assert (student.grad[~mask] == 0).all()


# --- attention -----------------------------------------------------------------------------------


def test_the_two_forms_by_hand():
    student = torch.tensor([[[[2.0, 0.0]]]])  # attention (1, 0)
    teacher = torch.tensor([[[[0.0, 1.0]]]])  # attention (0, 1)
    assert attention_transfer(student, teacher) == pytest.approx(1.0)
    assert attention_transfer(student, teacher, "paper") == pytest.approx(2**0.5)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_channels_scale_and_size_may_differ(form):
    student, teacher = torch.randn(3, 2, 4, 4), torch.randn(3, 7, 8, 8)
    found = attention_transfer(student, teacher, form)
    torch.testing.assert_close(attention_transfer(student, 5 * teacher, form), found)
    assert attention_transfer(teacher[:, :, :4], teacher[:, [2, 0, 1, 3, 4, 5, 6], :4]) < 1e-9


def test_the_code_form_has_the_bound_that_its_weight_comes_from():
    student, teacher = torch.rand(8, 2, 3, 5), torch.rand(8, 2, 3, 5)
    assert attention_transfer(student, teacher) <= 2 / 15


@pytest.mark.parametrize(
    ("student", "teacher", "form"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), "code"),
        (torch.zeros(2, 3, 1, 1), torch.zeros(1, 3, 1, 1), "code"),
        (torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1), "Paper"),
    ],
)
def test_no_maps_other_rows_or_an_unknown_form_are_refused(student, teacher, form):
    with pytest.raises(FedistillError):
        attention_transfer(student, teacher, form)
