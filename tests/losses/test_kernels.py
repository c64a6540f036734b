"""FedHeNN's loss: how like to one another rows are, here and elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedistill.errors import FedistillError
from fedistill.losses import kernel_loss


def features(rows=6, width=4, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(rows, width, generator=random, dtype=dtype)


def kernel_of(rows):
    centred = rows - rows.mean(dim=0)
    kernel = centred @ centred.T
    return kernel / kernel.norm()


def test_by_hand():
    # Centred: 1, -1, 0; so K = [[1, -1, 0], [-1, 1, 0], [0, 0, 0]], |K| = 2.
    rows = torch.tensor([[3.0], [1.0], [2.0]])
    # Centred: 1, 0, -1: L = [[1, 0, -1], [0, 0, 0], [-1, 0, 1]], |L| = 2, <K, L> = 1.
    kernel = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]])
    assert kernel_loss(rows, kernel) == pytest.approx(1 - 1 / 4)


def test_equals_the_formula_in_numpy():
    rows, other = features().numpy(), features(width=7, seed=1).numpy()
    centre = np.eye(6) - 1 / 6
    own, theirs = (centre @ x @ x.T @ centre for x in (rows, other))
    wanted = 1 - (own * theirs).sum() / (np.linalg.norm(own) * np.linalg.norm(theirs))
    found = kernel_loss(torch.from_numpy(rows), torch.from_numpy(theirs))
    assert found.item() == pytest.approx(wanted, rel=1e-12)


def test_zero_and_minimal_at_the_own_kernel_and_no_gradient_into_it():
    rows = features().requires_grad_()
    kernel = kernel_of(rows.detach()).requires_grad_()
    value = kernel_loss(rows, kernel)
    value.backward()
    assert value.abs() < 1e-12
    assert rows.grad.abs().max() < 1e-12
    assert kernel.grad is None


def test_moved_scaled_and_turned_features_are_the_same():
    rows, kernel = features(), kernel_of(features(seed=1))
    turn = torch.linalg.qr(features(4, 4, seed=2))[0]
    other = 1e3 * (rows @ turn) + torch.arange(4.0)
    torch.testing.assert_close(kernel_loss(other, 7 * kernel), kernel_loss(rows, kernel))
    assert kernel_loss(other, kernel_of(rows)).abs() < 1e-9


def test_some_of_the_rows_are_compared_like_all():
    """The kernel of a part is that part of the kernel, centred anew."""
    rows = features(9)
    part = torch.tensor([7, 2, 3, 5])
    assert kernel_loss(rows[part], kernel_of(rows)[part][:, part]).abs() < 1e-12


def test_the_order_of_the_rows_does_not_matter():
    rows, kernel = features(), kernel_of(features(seed=1))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        kernel_loss(rows[order], kernel[order][:, order]), kernel_loss(rows, kernel)
    )


@pytest.mark.parametrize("seed", range(5))
def test_bounded(seed):
    kernel = features(6, 6, seed=seed + 10)
    assert 0 <= kernel_loss(features(seed=seed), kernel) <= 2


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_say_nothing(rows):
    own = features(rows).requires_grad_()
    value = kernel_loss(own, torch.ones(rows, rows))
    value.backward()
    assert value == 0
    assert (own.grad == 0).all()


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("side", ["features", "kernel"])
def test_rows_that_are_all_equal_are_like_nothing(constant, side):
    rows, kernel = features(dtype=torch.float32), kernel_of(features(seed=1)).float()
    if side == "features":
        rows = torch.full_like(rows, constant)
    else:
        kernel = torch.full_like(kernel, constant)
    rows.requires_grad_()
    value = kernel_loss(rows, kernel)
    value.backward()
    assert value == 1
    assert (rows.grad == 0).all()


@pytest.mark.parametrize("scale", [1e-12, 1e4, 1e12])
def test_finite_at_any_scale(scale):
    rows = (scale * features()).float().requires_grad_()
    kernel = scale * kernel_of(features(seed=1)).float()
    value = kernel_loss(rows, kernel)
    value.backward()
    wanted = kernel_loss(features(), kernel_of(features(seed=1)))
    assert value.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert rows.grad.isfinite().all()
    assert rows.grad.abs().max() > 0


def test_half_precision_is_computed_in_float32():
    rows, kernel = features().bfloat16(), kernel_of(features(seed=1)).bfloat16()
    value = kernel_loss(rows, kernel)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, kernel_loss(rows.float(), kernel.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = kernel_loss(rows.float(), kernel.float())
    torch.testing.assert_close(under, value)


def test_gradcheck():
    kernel = kernel_of(features(seed=1))
    rows = features().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: kernel_loss(h, kernel), (rows,))


@pytest.mark.parametrize(
    ("rows", "kernel"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4)),
        (torch.zeros(3, 2), torch.zeros(2, 2)),
        (torch.zeros(3, 2, 1), torch.zeros(3, 3)),
    ],
)
def test_other_rows_are_refused(rows, kernel):
    with pytest.raises(FedistillError, match="the same public rows"):
        kernel_loss(rows, kernel)
