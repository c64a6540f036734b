"""Listwise ranking."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fedistill.errors import FedistillError
from fedistill.losses import logit_kl, ranking, ranking_order


def scores(lists=4, items=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(lists, items, generator=random, dtype=torch.float64)


def test_listnet_is_the_kl_of_coming_first():
    student, teacher = scores(), scores(seed=1)
    torch.testing.assert_close(ranking(student, teacher, 2.0), logit_kl(student, teacher, 2.0))


def test_plackett_luce_by_hand():
    """The teacher ranks b, c, a: e^2/(e^1+e^2+e^0) times e^0/(e^0+e^1)."""
    student = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[-1.0, 9.0, 3.0]], dtype=torch.float64)
    first = math.exp(2) / (math.e + math.exp(2) + 1)
    second = 1 / (1 + math.e)
    assert ranking_order(student, teacher) == pytest.approx(-math.log(first * second))
    assert ranking_order(student, teacher, top=1) == pytest.approx(-math.log(first))


@pytest.mark.parametrize("top", [None, 1, 2])
def test_the_probabilities_of_all_orders_sum_to_one(top):
    """The log-likelihood is that of a distribution, over whole orders and over their tops."""
    student = scores(1, 4)
    total, met = 0.0, set()
    for order in itertools.permutations(range(4)):
        if order[:top] not in met:
            met.add(order[:top])
            teacher = torch.zeros(1, 4, dtype=torch.float64)
            teacher[0, list(order)] = torch.arange(4.0, 0.0, -1.0, dtype=torch.float64)
            total += math.exp(-float(ranking_order(student, teacher, top)))
    assert total == pytest.approx(1)


def test_only_the_order_of_the_teacher_counts():
    student, teacher = scores(), scores(seed=1)
    torch.testing.assert_close(
        ranking_order(student, (3 * teacher).exp()), ranking_order(student, teacher)
    )


def test_scores_in_the_teachers_order_and_far_apart_cost_nothing():
    teacher = scores()
    assert ranking_order(1e3 * teacher, teacher) < 1e-6
    assert ranking_order(-1e3 * teacher, teacher) > 100


def test_a_top_beyond_the_list_is_the_whole_list():
    student, teacher = scores(), scores(seed=1)
    assert ranking_order(student, teacher, top=50) == ranking_order(student, teacher)


@pytest.mark.parametrize("loss", [ranking, ranking_order])
@pytest.mark.parametrize("there", [3, 1])
def test_items_that_are_not_there_change_nothing(loss, there):
    student, teacher = scores(), scores(seed=1)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[:, :there] = True
    student.requires_grad_()
    found = loss(student, teacher, mask=mask)
    torch.testing.assert_close(found, loss(student[:, :there], teacher[:, :there]))
    found.backward()
    assert (student.grad[:, there:] == 0).all()
    assert student.grad.isfinite().all()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask=mask), (student,))


@pytest.mark.parametrize("loss", [ranking, ranking_order])
def test_lists_without_items_do_not_dilute_the_mean(loss):
    student, teacher = scores(), scores(seed=1)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2:] = False
    student.requires_grad_()
    found = loss(student, teacher, mask=mask)
    torch.testing.assert_close(found, loss(student[:2], teacher[:2]))
    found.backward()
    assert student.grad.isfinite().all()


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(FedistillError, match="top must be 1 at least, found 0"):
        ranking_order(scores(), scores(), top=0)
    with pytest.raises(FedistillError, match="scores of student and teacher must have one shape"):
        ranking(scores(), scores(items=4))
