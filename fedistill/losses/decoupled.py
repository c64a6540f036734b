"""Decoupled distillation: the target class and the order of the others, weighed apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses.pairs import check_temperature, paired, per_row


def decoupled_kd(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    """T^2 (target_weight TCKD + other_weight NCKD), in nats, mean over rows.

    Zhao et al., arXiv 2203.08679. TCKD is the KL of two events, "the label" and "any other class";
    NCKD the KL among the other classes alone. With q the teacher's probability of the label,
    KL = TCKD + (1 - q) NCKD: plain distillation mutes the second part where the teacher is sure.
    The paper's alpha and beta are ``target_weight`` and ``other_weight``. Deviation: the other
    classes are cut out, where the authors' code subtracts 1000 from the label's logit: exact at
    any size of logits.

    Args:
        logits: student, ``[..., classes]``, two classes at least; leading axes are rows.
        teacher: logits or log-probabilities of the same shape; never given a gradient.
        labels: ``[...]`` class numbers from 0.
        temperature: T, above 0.
        target_weight: of TCKD.
        other_weight: of NCKD; 8, with T 4, is common on CIFAR-100.

    Raises:
        FedistillError: unequal shapes, fewer than two classes, or a temperature not above 0.
    """
    check_temperature(temperature)
    logits, teacher = paired(logits, teacher, "logits")
    classes = logits.shape[-1]
    if classes < 2:
        raise FedistillError(f"decoupled_kd needs two classes at least, found {classes}")
    labels = labels.flatten()
    student = F.log_softmax(logits.flatten(0, -2) / temperature, dim=-1)
    wanted = F.log_softmax(teacher.flatten(0, -2) / temperature, dim=-1)
    target = _kl(_events(student, labels), _events(wanted, labels))
    other = _kl(*(_others(logs, labels).log_softmax(dim=1) for logs in (student, wanted)))
    total = target_weight * target + other_weight * other
    return temperature**2 * per_row(total, len(labels))


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def _others(logs: Tensor, labels: Tensor) -> Tensor:
    """The columns that are not the label, ``[rows, classes - 1]``."""
    keep = torch.ones_like(logs, dtype=torch.bool).scatter_(1, labels[:, None], value=False)
    return logs[keep].reshape(len(logs), logs.shape[1] - 1)


def _events(logs: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the label and of any other class, ``[rows, 2]``."""
    label = logs.gather(1, labels[:, None])
    return torch.cat([label, _others(logs, labels).logsumexp(dim=1, keepdim=True)], dim=1)
