"""Kernel alignment: rows shall lie to one another as they do for others, whatever the width."""

from __future__ import annotations

import torch
from torch import Tensor

from fedistill.errors import FedistillError
from fedistill.losses.pairs import wide


def kernel_loss(features: Tensor, kernel: Tensor) -> Tensor:
    """1 - CKA(K, kernel), K = H F F' H the Gram matrix of the centred features; within 0 and 2.

    FedHeNN, Makhija et al., arXiv 2202.07757, with the linear centred kernel alignment of
    Kornblith et al., arXiv 1905.00414: CKA = <K, L> / (|K| |L|) in Frobenius norms. Without unit:
    moved, scaled and turned features are the same. A Gram matrix that is 0 (equal rows) is like
    nothing: the loss is 1, without a gradient.

    Our reading where the paper leaves it open: ``kernel`` is centred here too, so that the kernel
    of some of the rows is compared like that of all.

    Args:
        features: ``[rows, width]``.
        kernel: ``[rows, rows]``, how like to one another the rows are for others; never given a
            gradient.

    Raises:
        FedistillError: sides that do not fit together.
    """
    rows = len(features)
    if features.dim() != 2 or kernel.shape != (rows, rows):
        raise FedistillError(
            "kernel_loss needs features [rows, width] and a kernel [rows, rows], found "
            f"{list(features.shape)} and {list(kernel.shape)}: compare the same public rows"
        )
    if rows < 2:
        return wide(features).sum() * 0
    with torch.autocast(features.device.type, enabled=False):
        own, other = gram(features), _unless_flat(_centred(_scaled(wide(kernel.detach()))))
        squares = own.square().sum() * other.square().sum()
        usable = squares > 0
        length = torch.where(usable, squares, 1.0).sqrt()
        return 1 - torch.where(usable, (own * other).sum() / length, 0.0)


def gram(features: Tensor) -> Tensor:
    """Gram matrix ``[rows, rows]`` of the centred features, in units of their largest size squared.

    Args:
        features: ``[rows, width]``.
    """
    rows = _scaled(wide(features))
    rows = _unless_flat(rows - rows.mean(dim=0))
    return rows @ rows.T


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(dim=0) - kernel.mean(dim=1, keepdim=True) + kernel.mean()


def _scaled(values: Tensor) -> Tensor:
    """The same with 1 as the largest size, so that no fourth power leaves float32."""
    largest = values.detach().abs().amax() if values.numel() else values.new_ones(())
    return values / largest.clamp_min(torch.finfo(values.dtype).tiny)


def _unless_flat(centred: Tensor) -> Tensor:
    """Zeros, if no more than rounding is left of values that were 1 at most before centring."""
    largest = centred.detach().abs().amax() if centred.numel() else centred.new_ones(())
    return centred * (largest > 16 * torch.finfo(centred.dtype).eps)
