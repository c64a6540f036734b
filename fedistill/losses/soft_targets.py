"""Losses that teach a student from soft targets."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

SMALLEST = 1e-8
"""Targets are floored here before the logarithm; a float16 or label target may hold zeros."""


def kl_divergence(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q_T || p_T): summed over classes, mean over rows; 0 where student equals teacher.

    Hinton et al., arXiv 1503.02531. T acts on both sides and nowhere else; T^2 keeps the size of
    the gradient (nearly) independent of T.

    Args:
        logits: student, ``[rows, classes]``, before softmax.
        targets: probabilities ``[rows, classes]`` at temperature 1; never given a gradient.
        temperature: T.
    """
    targets = targets.detach()
    if temperature != 1.0:
        targets = (targets.clamp_min(SMALLEST).log() / temperature).softmax(dim=-1)
    student = F.log_softmax(logits / temperature, dim=-1)
    rows = max(len(logits), 1)
    return temperature**2 * F.kl_div(student, targets, reduction="sum") / rows


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


def own_or_proxy(own: Tensor, proxy: Tensor) -> Tensor:
    """Binary cross-entropy that tells own rows (1) from proxy rows (0), each side half.

    At its optimum the score is the log density ratio log p_own(x) / p_proxy(x): balanced sides
    leave no prior in it.

    Args:
        own: scores of own rows, ``[n]``.
        proxy: scores of proxy rows, ``[m]``.
    """
    return 0.5 * (F.softplus(-own).mean() + F.softplus(proxy).mean())
