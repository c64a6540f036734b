"""Labels and a teacher's logits."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses import kd, kl_divergence, label_loss, logit_kl, logit_mse

TEMPERATURES = [1.0, 2.0, 4.0, 8.0]


def case(rows=6, classes=5, scale=1.5, seed=0):
    random = torch.Generator().manual_seed(seed)
    made = [
        scale * torch.randn(rows, classes, generator=random, dtype=torch.float64) for _ in range(2)
    ]
    return *made, torch.arange(rows) % classes


def norm(loss, student, teacher, **options):
    leaf = student.clone().requires_grad_()
    return float(torch.autograd.grad(loss(leaf, teacher, **options), leaf)[0].norm())


def test_the_formula_by_hand():
    student, teacher, labels = case()
    soft = (teacher / 4).softmax(1)
    kl = (soft * (soft.log() - (student / 4).log_softmax(1))).sum(1).mean()
    expected = 0.3 * F.cross_entropy(student, labels) + 0.7 * 16 * kl
    torch.testing.assert_close(kd(student, teacher, labels, 0.7, 4.0), expected)


def test_logits_and_probabilities_of_a_teacher_say_the_same():
    student, teacher, _ = case()
    for temperature in TEMPERATURES:
        expected = kl_divergence(student, teacher.softmax(1), temperature)
        torch.testing.assert_close(logit_kl(student, teacher, temperature), expected)
        torch.testing.assert_close(logit_kl(student, teacher.log_softmax(1), temperature), expected)


def test_defaults_can_be_called_and_have_a_soft_part():
    """P8, D1: the default alpha=None crashes; P6: a default that switches the soft part off."""
    student, teacher, labels = case()
    assert inspect.signature(kd).parameters["soft_weight"].default == 0.7
    assert kd(student, teacher, labels) != kd(student, teacher, labels, 0.0)
    assert kd(student, teacher) > 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_without_labels_it_is_the_soft_part_alone(temperature):
    """P8, D2: T^2 lost without labels, sixteen times too weak at T = 4."""
    student, teacher, labels = case()
    alone = kd(student, teacher, temperature=temperature)
    torch.testing.assert_close(alone, logit_kl(student, teacher, temperature))
    torch.testing.assert_close(kd(student, teacher, labels, 1.0, temperature), alone)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("end", "inside"), [(0.0, 1e-9), (1.0, 1 - 1e-9)])
def test_continuous_at_both_ends_of_the_weight(temperature, end, inside):
    """P8, D2."""
    student, teacher, labels = case()
    torch.testing.assert_close(
        kd(student, teacher, labels, end, temperature),
        kd(student, teacher, labels, inside, temperature),
    )


def test_weight_one_ignores_labels_and_weight_zero_ignores_the_teacher():
    """P10: one name, one meaning."""
    student, teacher, labels = case()
    nothing = torch.full_like(teacher, torch.nan)
    assert kd(student, teacher, labels - 7, 1.0).isfinite()
    torch.testing.assert_close(kd(student, nothing, labels, 0.0), F.cross_entropy(student, labels))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_gradient_size_hardly_depends_on_the_temperature(scale):
    """P8, D6: without T^2 a weight means another thing at each temperature."""
    student, teacher, _ = case(rows=400, classes=10, scale=scale)
    norms = [norm(logit_kl, student, teacher, temperature=t) for t in TEMPERATURES]
    assert max(norms) / min(norms) < (1.15 if scale == 1.0 else 1.6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_temperature_is_on_both_sides(temperature):
    """P9: T on one side only makes a student that equals its teacher move."""
    _, teacher, _ = case()
    assert logit_kl(teacher, teacher, temperature).abs() < 1e-12
    assert norm(logit_kl, teacher, teacher, temperature=temperature) < 1e-9


def test_logit_mse_is_the_limit_of_a_large_temperature():
    student, teacher, _ = case()
    torch.testing.assert_close(
        logit_kl(student, teacher, 1e4), logit_mse(student, teacher), rtol=1e-3, atol=0
    )
    by_hand = logit_mse(torch.tensor([[1.0, -1.0]]), torch.tensor([[5.0, 1.0]]))
    assert by_hand == pytest.approx((1 + 1) / 4)


def test_strength_weighs_rows():
    student, teacher, _ = case(rows=2)
    apart = [logit_kl(student[i : i + 1], teacher[i : i + 1]) for i in range(2)]
    strength = torch.tensor([0.5, 1.5], dtype=torch.float64)
    expected = (0.5 * apart[0] + 1.5 * apart[1]) / 2
    torch.testing.assert_close(logit_kl(student, teacher, strength=strength), expected)


def test_label_loss_is_cross_entropy_and_costs_nothing_without_rows():
    student, _, labels = case()
    torch.testing.assert_close(label_loss(student, labels), F.cross_entropy(student, labels))
    assert label_loss(student[:0], labels[:0]) == 0


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradcheck_at_a_temperature(temperature):
    student, teacher, labels = case(rows=3)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd(z, teacher, labels, 0.4, temperature), (student,))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"teacher": torch.zeros(6, 4)}, r"one shape, found \[6, 5\] and \[6, 4\]"),
        ({"soft_weight": 1.5}, "soft_weight must lie within 0 and 1, found 1.5"),
        ({"temperature": 0.0}, "a temperature must be above 0, found 0.0"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"shape \[6\] of the rows, found \[5\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, told):
    student, teacher, labels = case()
    with pytest.raises(FedistillError, match=told):
        kd(**({"logits": student, "teacher": teacher, "labels": labels} | change))
