"""Losses that teach a student from soft targets."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fedistill.errors import FedistillError

SMALLEST = 1e-8
"""Targets are floored here before the logarithm; a float16 or label target may hold zeros."""
TOLERANCE = 1e-3
"""How far the sum of a target may be from 1: what float16 loses."""


def soften(targets: Tensor, temperature: float) -> Tensor:
    """Targets at a temperature: softmax(log q / T), ``[rows, classes]``; never given a gradient."""
    targets = targets.detach()
    if temperature == 1.0:
        return targets
    return (targets.clamp_min(SMALLEST).log() / temperature).softmax(dim=-1)


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Refuse anything else where probabilities are asked for.

    Raises:
        FedistillError: another shape than the logits', or rows that do not sum to 1.
    """
    if logits.shape != targets.shape:
        raise FedistillError(
            f"targets must have the shape {list(logits.shape)} of the logits, found "
            f"{list(targets.shape)}"
        )
    sums = targets.detach().sum(dim=-1)
    far = ~((sums - 1).abs() <= TOLERANCE)
    if far.any() or (targets < 0).any():
        raise FedistillError(
            "targets must be probabilities, rows that sum to 1: found a row that sums to "
            f"{float(sums[far][0] if far.any() else sums.flatten()[0]):.4g} or holds a negative "
            "number; put logits through softmax first"
        )


def kl_divergence(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q_T || p_T): summed over classes, mean over rows; 0 where student equals teacher.

    Hinton et al., arXiv 1503.02531. T acts on both sides and nowhere else; T^2 keeps the size of
    the gradient (nearly) independent of T.

    Args:
        logits: student, ``[..., classes]``, before softmax; leading axes are rows.
        targets: probabilities of the same shape at temperature 1.
        temperature: T.

    Raises:
        FedistillError: targets of another shape, or rows that do not sum to 1.
    """
    check_targets(logits, targets)
    student = F.log_softmax(logits / temperature, dim=-1).flatten(0, -2)
    teacher = soften(targets, temperature).flatten(0, -2)
    rows = max(len(student), 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum") / rows


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, weight: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum over rows of weight times -sum_c q_c log p_c: the gradient of a weighted KL.

    Args:
        logits: student, ``[rows, classes]``.
        targets: probabilities ``[rows, classes]``, already at the temperature (:func:`soften`).
        weight: ``[rows]``; holds 1/rows for a mean, and T^2 where a temperature is used.
        temperature: of the student's side.
    """
    logs = F.log_softmax(logits / temperature, dim=-1)
    return -(weight * (targets.detach() * logs).sum(dim=-1)).sum()


def soft_cross_entropy_slope(
    logits: Tensor, targets: Tensor, weight: Tensor, temperature: float = 1.0
) -> Tensor:
    """The gradient of :func:`soft_cross_entropy` by the logits, ``[rows, classes]``."""
    said = (logits / temperature).softmax(dim=-1) * targets.sum(dim=-1, keepdim=True)
    return (said - targets) * (weight / temperature)[:, None]


def logit_mae(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference of row-centred logits; FedMD's digest step, arXiv 1910.03581.

    Deviation: targets travel as probabilities, so their centred logarithm stands for the centred
    mean logits (they differ by a constant per row, which centring removes).

    Args:
        logits: student, ``[rows, classes]``.
        targets: probabilities ``[rows, classes]``; never given a gradient.
    """
    wanted = targets.detach().clamp_min(SMALLEST).log()
    wanted = wanted - wanted.mean(dim=-1, keepdim=True)
    centred = logits - logits.mean(dim=-1, keepdim=True)
    return (centred - wanted).abs().mean() if len(logits) else (centred * 0).sum()


def own_or_proxy(scores: Tensor, side: Tensor) -> Tensor:
    """Binary cross-entropy that tells own rows from proxy rows.

    With sides of equal weight the best score is the log density ratio
    log p_own(x) / p_proxy(x): no prior is left in it.

    Args:
        scores: ``[rows]``.
        side: ``[rows]``: a positive weight for own rows, a negative one for proxy rows, 0 for
            rows that do not count; 1/own and -1/proxy make the mean of each side.
    """
    return (side.abs() * F.softplus(-scores * side.sign())).sum()


def own_or_proxy_slope(scores: Tensor, side: Tensor) -> Tensor:
    """The gradient of :func:`own_or_proxy` by the scores, ``[rows]``."""
    return -side * (-scores * side.sign()).sigmoid()
