"""Distance of logits themselves."""

from __future__ import annotations

from torch import Tensor

from fedistill.losses.pairs import paired, per_row


def logit_mse(logits: Tensor, teacher: Tensor) -> Tensor:
    """||c(z_s) - c(z_t)||^2 / (2 C), c = centred over classes; mean over rows.

    What T^2 KL(q_T || p_T) tends to for large T (Hinton et al., arXiv 1503.02531, section 2.1), so
    it takes the place of :func:`logit_kl` at the same weight and needs no T^2. Unit: squared
    logits. Deviation: Ba and Caruana (arXiv 1312.6184) do not centre; a constant added to a row,
    which no softmax sees, then costs something.

    Args:
        logits: student, ``[..., classes]``; leading axes are rows.
        teacher: logits or log-probabilities of the same shape; never given a gradient.

    Raises:
        FedistillError: unequal shapes.
    """
    logits, teacher = paired(logits, teacher, "logits")
    gap = logits - teacher
    gap = (gap - gap.mean(dim=-1, keepdim=True)) if gap.shape[-1] else gap
    rows = gap.square().sum(dim=-1) / max(2 * gap.shape[-1], 1)
    return per_row(rows.sum(), rows.numel())
