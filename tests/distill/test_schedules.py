"""Weights and temperatures that move."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fedistill.distill import schedules
from fedistill.errors import FedistillError


def test_the_widely_copied_rule():
    """Reference 2.3; and two calls in one epoch decay once."""
    found = [schedules.fading_labels(epoch) for epoch in (0, 10, 20, 50, 100)]
    assert found == pytest.approx([0.300, 0.335, 0.368, 0.458, 0.581], abs=5e-4)
    assert [schedules.fading_labels(10) for _ in range(3)] == [schedules.fading_labels(10)] * 3
    assert schedules.fading_labels(19) == schedules.fading_labels(10)


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.cosine])
def test_annealing_begins_and_ends_where_it_says(schedule):
    anneal = partial(schedule, start=8.0, stop=2.0, epochs=11)
    found = [anneal(epoch) for epoch in range(14)]
    assert found[0] == 8.0
    assert found[5] == pytest.approx(5.0)
    assert found[10:] == pytest.approx([2.0] * 4)
    assert found == sorted(found, reverse=True)
    assert schedule(0, start=3.0, stop=1.0, epochs=1) == 3.0


def test_steps_and_constant_and_plain_numbers():
    assert schedules.steps(7, start=1.0, factor=0.5, every=3) == 0.25
    assert schedules.constant(99, value=0.3) == 0.3
    assert schedules.at(0.4, 3) == 0.4
    assert schedules.at(lambda epoch: epoch / 10, 3) == pytest.approx(0.3)


# --- from the losses -----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_loss_ratio_makes_the_parts_count_as_asked(ratio):
    hard, soft = torch.tensor(0.2, requires_grad=True), torch.tensor(5.0)
    weight = schedules.loss_ratio(hard, soft, ratio)
    assert weight * soft == pytest.approx(float(ratio * (1 - weight) * 0.2))
    assert not weight.requires_grad
    nothing = torch.tensor(0.0)
    assert schedules.loss_ratio(nothing, nothing, ratio) == pytest.approx(ratio / (1 + ratio))


def test_by_loss_ratio_keeps_features_and_lone_parts_as_they_are():
    parts = {"labels": torch.tensor(1.0), "soft": torch.tensor(3.0), "a:b": torch.tensor(0.5)}
    weight = schedules.loss_ratio(parts["labels"], parts["soft"])
    expected = float((1 - weight) * 1.0 + weight * 3.0 + 0.5)
    assert schedules.by_loss_ratio(parts) == pytest.approx(expected)
    assert schedules.by_loss_ratio({"soft": torch.tensor(3.0)}) == 3.0


def test_uncertainty_is_at_rest_where_every_part_counts_one_half():
    losses = {"labels": torch.tensor(0.2), "soft": torch.tensor(40.0)}
    module = schedules.Uncertainty()
    with torch.no_grad():
        module.log_variance.copy_(torch.tensor([math.log(0.4), math.log(80.0)]))
    total = module(losses)
    total.backward()
    assert module.log_variance.grad.abs().max() < 1e-6
    assert total.item() == pytest.approx(0.5 + 0.5 + (math.log(0.4) + math.log(80.0)) / 2)


def test_uncertainty_leaves_out_what_a_phase_leaves_out_and_refuses_what_it_does_not_know():
    module = schedules.Uncertainty()
    assert module({"soft": torch.tensor(3.0)}).item() == 3.0
    with pytest.raises(FedistillError, match='no weight for "a:b", only for labels, soft'):
        module({"a:b": torch.tensor(1.0)})
    leaf = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: module.double()({"soft": v}), (leaf,))


# --- from the rows -------------------------------------------------------------------------------


def test_rows_a_teacher_knows_nothing_of_teach_nothing_and_the_mean_stays_one():
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    found = schedules.certainty(logits)
    assert found[0] == pytest.approx(0, abs=1e-5)
    assert found[1] > found[2] > 0
    assert found.mean() == pytest.approx(1)
    assert not found.requires_grad
    assert schedules.certainty(logits, 5.0)[2] < found[2]


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(3, 4), torch.zeros(3, 1), torch.tensor([[-torch.inf, 0.0], [1e4, -1e4]])],
)
def test_strength_is_finite_and_one_where_nothing_tells_rows_apart(logits):
    found = schedules.certainty(logits)
    torch.testing.assert_close(found, torch.ones(len(logits)))
