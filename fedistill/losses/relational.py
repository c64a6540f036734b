"""Relational distillation: how the rows of a batch lie to one another.

Park et al., Relational Knowledge Distillation, arXiv 1904.05068. Both losses compare relations
among rows, so widths may differ, and a batch is not the mean of its halves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses.pairs import wide


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between matrices of distances, each divided by its mean; mean over rows^2.

    D_ij = ||h_i - h_j|| / mean of the positive distances: without unit, the same for features of
    any scale. Deviation: equal rows have the distance 0 and no gradient, where the authors' code
    clamps the square at 1e-12 before the root.

    Args:
        student: ``[rows, ...]``, flattened to ``[rows, width]``.
        teacher: the same with any width; never given a gradient.

    Raises:
        FedistillError: unequal numbers of rows.
    """
    student, teacher = _flat(student, teacher)
    if len(student) < 2:
        return student.sum() * 0
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines of all angles i-j-k, the corner at j; mean over rows^3.

    Without unit. It holds 4 rows^3 bytes for each side: 67 MB at 256 rows. The paper's weight is
    twice that of :func:`relational_distance`. Deviation: a pair of equal rows has no direction,
    its cosines are 0 and give no gradient; the authors' code divides by 1e-12 there, and one
    duplicate throws the student out.

    Args:
        student: ``[rows, ...]``, flattened to ``[rows, width]``.
        teacher: the same with any width; never given a gradient.

    Raises:
        FedistillError: unequal numbers of rows.
    """
    student, teacher = _flat(student, teacher)
    if len(student) < 3:
        return student.sum() * 0
    with torch.autocast(student.device.type, enabled=False):
        return F.smooth_l1_loss(_angles(student), _angles(teacher))


def _flat(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if len(student) != len(teacher):
        raise FedistillError(
            "features of student and teacher must have equally many rows, found "
            f"{len(student)} and {len(teacher)}"
        )
    return wide(student).flatten(1), wide(teacher.detach()).flatten(1)


def _distances(rows: Tensor) -> Tensor:
    """``[rows, rows]``, the mean of the positive ones being 1."""
    gaps = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    positive = (gaps > 0).sum().clamp_min(1)
    return gaps / (gaps.sum() / positive).clamp_min(torch.finfo(gaps.dtype).tiny)


def _angles(rows: Tensor) -> Tensor:
    """Cosines ``[corner, rows, rows]``."""
    gaps = rows[None] - rows[:, None]
    squares = gaps.square().sum(dim=2, keepdim=True)
    apart = squares > 0
    lengths = torch.where(apart, squares, 1.0).sqrt()
    units = torch.where(apart, gaps, 0.0) / lengths
    return units @ units.transpose(1, 2)
