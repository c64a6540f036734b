"""Direction of hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from fedistill.losses.pairs import paired


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cos(h_s, h_t), mean over the rows (or tokens) that count; from 0 to 2, without unit.

    DistilBERT, Sanh et al., arXiv 1910.01108. A row of zeros has no direction: its cosine is 0, and
    it gives no gradient.

    Args:
        student: ``[..., width]``; leading axes are rows. Of another width than the teacher's, it
            first goes through a :func:`regressor`.
        teacher: the same shape; never given a gradient.
        mask: ``[...]``, true where a row counts (false for padding); None counts all.

    Raises:
        FedistillError: unequal shapes.
    """
    student, teacher = paired(student, teacher, "features")
    own, other = student.square().sum(dim=-1), teacher.square().sum(dim=-1)
    usable = (own > 0) & (other > 0)
    lengths = torch.where(usable, own, 1.0).sqrt() * torch.where(usable, other, 1.0).sqrt()
    cosines = torch.where(usable, (student * teacher).sum(dim=-1) / lengths, 0.0)
    counted = torch.ones_like(cosines, dtype=torch.bool) if mask is None else mask.bool()
    return torch.where(counted, 1 - cosines, 0.0).sum() / counted.sum().clamp_min(1)
