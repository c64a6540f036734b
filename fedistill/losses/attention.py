"""Attention transfer: where in an image a layer is active."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses.pairs import per_row, wide


def attention_transfer(
    student: Tensor, teacher: Tensor, form: Literal["code", "paper"] = "code"
) -> Tensor:
    """Distance of attention maps A, mean over rows; without unit, for A has norm 1.

    Zagoruyko and Komodakis, arXiv 1612.03928. A is the mean over channels of h^2, flattened and
    divided by its norm. The paper and its authors' code differ, and both are here:

    * ``code``: mean over places of (A_s - A_t)^2; at most 2 / (H W), hence weights near 1000;
    * ``paper``: ||A_s - A_t||_2; at most the root of 2.

    Deviations: mean over rows also in the form of the paper, which sums; maps of unequal size are
    pooled to the smaller.

    Args:
        student: ``[rows, channels, height, width]``.
        teacher: the same with any channels, height and width; never given a gradient.
        form: ``code`` or ``paper``.

    Raises:
        FedistillError: not maps, unequal numbers of rows, or an unknown form.
    """
    if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
        raise FedistillError(
            "attention needs maps [rows, channels, height, width] of equally many rows, found "
            f"{list(student.shape)} and {list(teacher.shape)}"
        )
    if form not in {"code", "paper"}:
        raise FedistillError(f'the form of attention must be "code" or "paper", found "{form}"')
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    gap = _attention(student, size) - _attention(teacher.detach(), size)
    if form == "paper":
        return per_row(gap.norm(dim=1).sum(), len(gap))
    return per_row(gap.square().sum(), gap.numel())


def _attention(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalised attention ``[rows, height * width]``; all 0 where a map is."""
    maps = wide(maps)
    if maps.shape[2:] != size:
        maps = F.adaptive_avg_pool2d(maps, size) if len(maps) else maps[..., : size[0], : size[1]]
    return F.normalize(maps.square().mean(dim=1).flatten(1), dim=1)
