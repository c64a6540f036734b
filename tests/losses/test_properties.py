"""What each loss of a student against a teacher must prove (reference/distillation.md, 2.6)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fedistill import losses

SOFTMAX = {
    "logit_kl": losses.logit_kl,
    "kd": lambda s, t: losses.kd(s, t, labels_of(s), 0.6, 3.0),
    "kd, no labels": losses.kd,
    "logit_mse": losses.logit_mse,
    "decoupled_kd": lambda s, t: losses.decoupled_kd(s, t, labels_of(s)),
    "ranking": partial(losses.ranking, temperature=2.0),
    "ranking_order": losses.ranking_order,
}
HIDDEN = {
    "hint": losses.hint,
    "cosine": losses.cosine,
    "attention, code": losses.attention_transfer,
    "attention, paper": partial(losses.attention_transfer, form="paper"),
    "relational_distance": losses.relational_distance,
    "relational_angle": losses.relational_angle,
}
ALL = SOFTMAX | HIDDEN
DIVERGENCES = [name for name in ALL if name not in {"kd", "ranking_order"}]
PER_ROW = [name for name in ALL if not name.startswith("relational")]
LEADING = [*SOFTMAX, "cosine"]
TESTED_ELSEWHERE = {
    "bpr",
    "kernel_loss",
    "kl_divergence",
    "logit_mae",
    "own_or_proxy",
    "prototype_loss",
    "relaxed_ranking",
    "sampled_kl",
    "sampled_softmax",
    "soft_cross_entropy",
    "soften",
}


def labels_of(rows):
    """Any labels that stay with their row and its classes: the class of the largest constant."""
    return torch.arange(rows[..., 0].numel()).reshape(rows.shape[:-1]) % max(rows.shape[-1], 1)


def pair(name, rows=6, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    shape = (rows, 3, 2, 4) if name.startswith("attention") else (rows, 5)
    return [1.5 * torch.randn(shape, generator=random, dtype=dtype) for _ in range(2)]


def gradient(loss, student, teacher):
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, teacher), leaf)[0]


def test_every_public_loss_is_in_a_table():
    named = {name.partition(",")[0] for name in ALL} - {"attention"}
    assert named | {"attention_transfer", "regressor", "label_loss"} | TESTED_ELSEWHERE == set(
        losses.__all__
    )
    assert losses.__all__ == sorted(losses.__all__)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_and_minimal_at_the_teacher(name):
    student, teacher = pair(name)
    assert ALL[name](teacher, teacher).abs() < 1e-12
    assert ALL[name](student, teacher) > 1e-3
    assert gradient(ALL[name], teacher, teacher).abs().max() < 1e-9


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(5))
def test_bounded_below_by_zero(name, seed):
    assert ALL[name](*pair(name, seed=seed)) >= 0


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_reaches_the_teacher(name):
    """P7: mutual losses without detach."""
    student, teacher = (side.requires_grad_() for side in pair(name))
    ALL[name](student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("side", [0, 1])
def test_a_constant_added_to_a_row_changes_nothing(name, side):
    sides = pair(name)
    expected = SOFTMAX[name](*sides)
    sides[side] = sides[side] + torch.arange(6.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(SOFTMAX[name](*sides), expected)


@pytest.mark.parametrize("name", [n for n in SOFTMAX if n not in {"kd", "decoupled_kd"}])
def test_renaming_classes_changes_nothing(name):
    student, teacher = pair(name)
    order = [4, 2, 0, 1, 3]
    torch.testing.assert_close(
        SOFTMAX[name](student[:, order], teacher[:, order]), SOFTMAX[name](student, teacher)
    )


@pytest.mark.parametrize("loss", [losses.kd, losses.decoupled_kd])
def test_renaming_classes_and_labels_changes_nothing(loss):
    student, teacher = pair("kd")
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    order = torch.tensor([4, 2, 0, 1, 3])
    renamed = loss(student[:, order], teacher[:, order], order.argsort()[labels])
    torch.testing.assert_close(renamed, loss(student, teacher, labels))


@pytest.mark.parametrize("name", PER_ROW)
def test_a_batch_is_the_weighted_mean_of_its_parts(name):
    student, teacher = pair(name, rows=15)
    loss = ALL[name]
    parts = 5 * loss(student[:5], teacher[:5]) + 10 * loss(student[5:], teacher[5:])
    torch.testing.assert_close(loss(student, teacher), parts / 15)


@pytest.mark.parametrize("name", LEADING)
def test_leading_axes_are_rows(name):
    """``batchmean`` would grow with the number of tokens."""
    student, teacher = pair(name)
    flat = ALL[name](student, teacher)
    deep = ALL[name](student.reshape(2, 3, 5), teacher.reshape(2, 3, 5))
    torch.testing.assert_close(deep, flat)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_finite_at_extreme_values_and_at_zeros(name, scale):
    student, teacher = (scale * side.sign() for side in pair(name, dtype=torch.float32))
    student.requires_grad_()
    value = ALL[name](student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [0, 1])
def test_finite_on_an_empty_batch_and_on_one_row(name, rows):
    student, teacher = pair(name, rows=rows)
    student.requires_grad_()
    value = ALL[name](student, teacher)
    value.backward()
    assert value.isfinite()
    assert rows or value == 0
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    student, teacher = pair(name, rows=4)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ALL[name](s, teacher), (student,))


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_computed_in_float32(name):
    student, teacher = pair(name, dtype=torch.float32)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    value = ALL[name](student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ALL[name](student.float(), teacher.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ALL[name](student.float(), teacher.float())
    torch.testing.assert_close(under, value)


@pytest.mark.parametrize("name", [n for n in SOFTMAX if n != "logit_mse"])
def test_classes_of_probability_zero_do_not_dilute_the_loss(name):
    """P5: a mean over classes makes the soft part C times too weak."""
    student, teacher = pair(name)
    wider = [F.pad(side, (0, 20), value=-1e4) for side in (student, teacher)]
    losses_of = {
        "kd": lambda s, t: losses.kd(s, t, labels_of(student), 0.6, 3.0),
        "decoupled_kd": lambda s, t: losses.decoupled_kd(s, t, labels_of(student)),
        "ranking_order": partial(losses.ranking_order, top=5),
    }
    loss = losses_of.get(name, SOFTMAX[name])
    torch.testing.assert_close(loss(*wider), loss(student, teacher))
