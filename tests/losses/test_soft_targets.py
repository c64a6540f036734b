"""What each loss must prove (reference/distillation.md, 2.6)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses import (
    kl_divergence,
    logit_mae,
    own_or_proxy,
    soft_cross_entropy,
    soften,
)
from fedistill.losses.soft_targets import own_or_proxy_slope, soft_cross_entropy_slope

TEMPERATURES = [1.0, 2.0, 4.0, 8.0]


def tensors(rows=6, classes=5, seed=0, scale=1.5):
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=random, dtype=torch.float64)
    targets = (scale * torch.randn(rows, classes, generator=random, dtype=torch.float64)).softmax(1)
    return logits, targets


def mean_cross_entropy(logits, targets, temperature=1.0):
    """The cross-entropy as a step uses it: weights T^2/rows, targets at the temperature."""
    rows = max(len(logits), 1)
    weight = torch.full((len(logits),), temperature**2 / rows, dtype=logits.dtype)
    return soft_cross_entropy(logits, soften(targets, temperature), weight, temperature)


FAMILY = {"kl": kl_divergence, "cross-entropy": mean_cross_entropy, "mae": logit_mae}


def gradient(loss, logits, *rest):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest), leaf)[0]


# --- divergences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_is_zero_at_the_teacher_for_every_temperature(temperature):
    logits, _ = tensors()
    assert kl_divergence(logits, logits.softmax(1), temperature).abs() < 1e-12
    assert gradient(kl_divergence, logits, logits.softmax(1), temperature).abs().max() < 1e-9


def test_mae_is_zero_at_the_teacher():
    logits, _ = tensors()
    assert logit_mae(logits, logits.softmax(1)) < 1e-9


@given(st.integers(0, 10_000), st.sampled_from(TEMPERATURES))
@settings(max_examples=30, deadline=None)
def test_kl_is_never_negative_and_cross_entropy_never_below_the_entropy(seed, temperature):
    logits, targets = tensors(seed=seed)
    assert kl_divergence(logits, targets, temperature) >= 0
    entropy = -(targets * targets.log()).sum(1).mean()
    assert mean_cross_entropy(logits, targets) >= entropy


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_slopes_are_the_gradients_of_their_losses(temperature):
    logits, targets = tensors()
    targets = targets * 0.999  # what a codec loses
    weight = torch.arange(6, dtype=torch.float64)
    torch.testing.assert_close(
        soft_cross_entropy_slope(logits, targets, weight, temperature),
        gradient(soft_cross_entropy, logits, targets, weight, temperature),
    )
    scores, side = 20 * logits[:, 0], torch.tensor([0.5, -0.5, 0.0, 1.0, -2.0, 0.25]).double()
    torch.testing.assert_close(
        own_or_proxy_slope(scores, side), gradient(own_or_proxy, scores, side)
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_cross_entropy_has_the_gradient_of_kl(temperature):
    logits, targets = tensors()
    torch.testing.assert_close(
        gradient(mean_cross_entropy, logits, targets, temperature),
        gradient(kl_divergence, logits, targets, temperature),
    )


def test_the_direction_is_teacher_to_student():
    logits, targets = tensors()
    expected = (targets * (targets.log() - logits.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(kl_divergence(logits, targets), expected)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_gradient_size_hardly_depends_on_the_temperature(scale):
    logits, targets = tensors(rows=400, classes=10, scale=scale)
    norms = [
        float(gradient(kl_divergence, logits, targets, temperature).norm())
        for temperature in TEMPERATURES
    ]
    assert max(norms) / min(norms) < (1.15 if scale == 1.0 else 1.6)
    bare = float(gradient(kl_divergence, logits, targets, 8.0).norm()) / 8.0**2
    assert bare < min(norms) / 20, "without T^2 the soft part would fade"


def test_gradient_has_the_closed_form():
    logits, targets = tensors()
    temperature = 3.0
    student = (logits / temperature).softmax(1)
    expected = temperature * (student - soften(targets, temperature)) / len(logits)
    torch.testing.assert_close(gradient(kl_divergence, logits, targets, temperature), expected)


def test_averaged_losses_have_the_gradient_of_the_averaged_targets():
    logits, first = tensors()
    _, second = tensors(seed=5)

    def each(z):
        parts = [kl_divergence(z, targets) for targets in (first, second)]
        return 0.3 * parts[0] + 0.7 * parts[1]

    pooled = 0.3 * first + 0.7 * second
    torch.testing.assert_close(gradient(each, logits), gradient(kl_divergence, logits, pooled))


# --- common properties ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_no_gradient_reaches_the_teacher(name):
    logits, targets = tensors()
    logits.requires_grad_()
    targets.requires_grad_()
    FAMILY[name](logits, targets).backward()
    assert logits.grad is not None
    assert targets.grad is None


def test_the_bare_cross_entropy_gives_the_teacher_no_gradient():
    logits, targets = tensors()
    logits.requires_grad_()
    targets.requires_grad_()
    soft_cross_entropy(logits, targets, torch.ones(6, dtype=torch.float64)).backward()
    assert targets.grad is None


@pytest.mark.parametrize("name", FAMILY)
def test_a_constant_added_to_a_row_changes_nothing(name):
    logits, targets = tensors()
    shifted = logits + torch.arange(6.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(FAMILY[name](shifted, targets), FAMILY[name](logits, targets))


@pytest.mark.parametrize("name", FAMILY)
def test_renaming_classes_changes_nothing(name):
    logits, targets = tensors()
    order = [4, 2, 0, 1, 3]
    renamed = FAMILY[name](logits[:, order], targets[:, order])
    torch.testing.assert_close(renamed, FAMILY[name](logits, targets))


@pytest.mark.parametrize("name", FAMILY)
def test_a_batch_is_the_weighted_mean_of_its_parts(name):
    logits, targets = tensors()
    loss = FAMILY[name]
    parts = (2 * loss(logits[:2], targets[:2]) + 4 * loss(logits[2:], targets[2:])) / 6
    torch.testing.assert_close(loss(logits, targets), parts)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_leading_axes_are_rows(temperature):
    logits, targets = tensors(rows=6)
    wide = kl_divergence(logits.reshape(2, 3, 5), targets.reshape(2, 3, 5), temperature)
    torch.testing.assert_close(wide, kl_divergence(logits, targets, temperature))


@pytest.mark.parametrize("name", ["kl", "cross-entropy"])
def test_classes_of_probability_zero_do_not_dilute_the_loss(name):
    logits, targets = tensors()
    wider = F.pad(logits, (0, 20), value=-1e4), F.pad(targets, (0, 20))
    torch.testing.assert_close(FAMILY[name](*wider), FAMILY[name](logits, targets))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_finite_at_extreme_logits_and_one_hot_targets(name, temperature):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    targets = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    options = () if name == "mae" else (temperature,)
    value = FAMILY[name](logits, targets, *options)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", FAMILY)
def test_an_empty_batch_costs_nothing(name):
    logits = torch.zeros(0, 3, requires_grad=True)
    value = FAMILY[name](logits, torch.zeros(0, 3))
    value.backward()
    assert value == 0
    assert logits.grad.shape == (0, 3)


@pytest.mark.parametrize("name", FAMILY)
def test_gradcheck(name):
    logits, targets = tensors(rows=3, classes=4)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: FAMILY[name](z, targets), (logits,))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradcheck_at_a_temperature(temperature):
    logits, targets = tensors(rows=3, classes=4)
    logits.requires_grad_()
    for loss in (kl_divergence, mean_cross_entropy):
        assert torch.autograd.gradcheck(
            lambda z, loss=loss: loss(z, targets, temperature), (logits,)
        )


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([[2.0, 0.0, -2.0]]),
        torch.tensor([[0.5, 0.5, 0.1]]),
        torch.tensor([[1.5, -0.5, 0.0]]),
        torch.full((1, 3), torch.nan),
    ],
)
def test_targets_that_are_no_probabilities_are_refused(targets):
    """P4: against raw logits a cross-entropy has no lower bound."""
    with pytest.raises(FedistillError, match="rows that sum to 1"):
        kl_divergence(torch.zeros(1, 3), targets)


def test_targets_of_another_shape_are_refused():
    with pytest.raises(FedistillError, match=r"shape \[1, 3\] of the logits, found \[1, 2\]"):
        kl_divergence(torch.zeros(1, 3), torch.full((1, 2), 0.5))


def test_half_precision_targets_are_probabilities():
    _, targets = tensors(rows=20, classes=100)
    kl_divergence(torch.zeros(20, 100), targets.half().float())


# --- soften --------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.3, 8.0))
@settings(max_examples=30, deadline=None)
def test_probabilities_carry_the_logits(seed, temperature):
    logits, _ = tensors(seed=seed)
    expected = (logits / temperature).softmax(1)
    torch.testing.assert_close(soften(logits.softmax(1), temperature), expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_softened_rows_sum_to_one_even_with_zeros(temperature):
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    found = soften(targets, temperature)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert (found >= 0).all()


# --- mae -----------------------------------------------------------------------------------------


def test_mae_by_hand():
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    targets = torch.tensor([[0.0, 1.0, -1.0]]).softmax(1)
    assert logit_mae(logits, targets) == pytest.approx(2 / 3, abs=1e-6)


# --- own or proxy --------------------------------------------------------------------------------


def test_the_best_score_is_the_log_density_ratio():
    """Three kinds of row: 6, 3, 1 of ten own rows, 1, 1, 2 of four proxy rows."""
    kinds = torch.tensor([0] * 6 + [1] * 3 + [2] + [0, 1, 2, 2])
    side = torch.tensor([1 / 10] * 10 + [-1 / 4] * 4, dtype=torch.float64)
    ratio = torch.tensor([0.6 / 0.25, 0.3 / 0.25, 0.1 / 0.5], dtype=torch.float64)
    score = ratio.log().requires_grad_()
    (found,) = torch.autograd.grad(own_or_proxy(score[kinds], side), score)
    assert found.abs().max() < 1e-12
    assert own_or_proxy(score[kinds], side) < own_or_proxy(score[kinds] + 0.1, side)


def test_rows_of_neither_side_do_not_count():
    scores = torch.tensor([0.3, -0.2, 5.0])
    side = torch.tensor([0.5, -0.5, 0.0])
    torch.testing.assert_close(own_or_proxy(scores, side), own_or_proxy(scores[:2], side[:2]))


def test_own_or_proxy_is_finite_and_its_gradient_checks():
    extreme = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    own_or_proxy(extreme, torch.tensor([-0.5, 0.5, 0.5])).backward()
    assert extreme.grad.isfinite().all()
    scores = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    side = torch.tensor([0.5, -1.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: own_or_proxy(s, side), (scores,))
    assert own_or_proxy(torch.zeros(0), torch.zeros(0)) == 0
