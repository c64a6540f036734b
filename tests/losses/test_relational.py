"""How the rows of a batch lie to one another."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses import relational_angle, relational_distance

BOTH = [relational_distance, relational_angle]


def rows(count, width, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=random, dtype=torch.float64)


def published_distance(student, teacher):
    """The authors' code but for the diagonal's clamp."""
    made = []
    for side in (student, teacher):
        gaps = (side[:, None] - side[None]).norm(dim=2)
        made.append(gaps / gaps[gaps > 0].mean())
    return F.smooth_l1_loss(*made)


def published_angle(student, teacher):
    made = []
    for side in (student, teacher):
        units = F.normalize(side[None] - side[:, None], p=2, dim=2)
        made.append(torch.bmm(units, units.transpose(1, 2)))
    return F.smooth_l1_loss(*made)


def test_they_are_the_published_losses():
    student, teacher = rows(7, 3), rows(7, 5, seed=1)
    torch.testing.assert_close(
        relational_distance(student, teacher), published_distance(student, teacher)
    )
    torch.testing.assert_close(
        relational_angle(student, teacher), published_angle(student, teacher)
    )


def test_distances_by_hand():
    """Distances 1, 1, 2 against 1, 1, 1: divided by 4/3, gaps of 1/4, 1/4, 1/2, each twice."""
    student = torch.tensor([[0.0], [1.0], [2.0]])
    teacher = torch.eye(3)
    expected = 2 * 0.5 * (1 / 16 + 1 / 16 + 1 / 4) / 9
    assert relational_distance(student, teacher) == pytest.approx(expected)


@pytest.mark.parametrize("loss", BOTH)
def test_moved_scaled_and_turned_features_lie_the_same(loss):
    teacher = rows(6, 3)
    turn, _ = torch.linalg.qr(rows(3, 3, seed=2))
    assert loss(4 * teacher @ turn + 10, teacher) < 1e-12


@pytest.mark.parametrize("loss", BOTH)
def test_widths_may_differ_and_maps_are_flattened(loss):
    assert loss(rows(4, 8).reshape(4, 2, 2, 2), rows(4, 3)) > 0


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("same", [2, 5])
def test_equal_rows_have_a_small_finite_gradient(loss, same):
    """The root of 0 has a NaN gradient, and 1e-12 in its place a huge one."""
    student = rows(5, 3)
    student[:same] = student[0]
    student.requires_grad_()
    loss(student, rows(5, 3, seed=1)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10


@pytest.mark.parametrize("loss", BOTH)
def test_too_few_rows_have_no_relation(loss):
    few = 1 if loss is relational_distance else 2
    student = rows(few, 3).requires_grad_()
    value = loss(student, rows(few, 4))
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("loss", BOTH)
def test_unequal_numbers_of_rows_are_refused(loss):
    with pytest.raises(FedistillError, match="equally many rows, found 3 and 4"):
        loss(rows(3, 2), rows(4, 2))
