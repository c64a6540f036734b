"""Knowledge distillation: labels and a teacher's logits, mixed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses.pairs import check_share, check_temperature, paired, per_row, wide


def logit_kl(
    logits: Tensor, teacher: Tensor, temperature: float = 2.0, strength: Tensor | None = None
) -> Tensor:
    """T^2 KL(q_T || p_T) in nats, q_T = softmax(teacher / T): summed over classes, mean over rows.

    Hinton et al., arXiv 1503.02531. T acts on both sides and nowhere else; T^2 keeps the size of
    the gradient (nearly) independent of T. Deviation: KL and not cross-entropy, which has the same
    gradient, so that 0 means "equal".

    Args:
        logits: student, ``[..., classes]``; leading axes are rows.
        teacher: logits or log-probabilities of the same shape; never given a gradient.
        temperature: T, above 0.
        strength: ``[...]``, factor of each row, of mean 1 (see ``schedules.certainty``); None is 1.

    Raises:
        FedistillError: unequal shapes, or a temperature that is not above 0.
    """
    check_temperature(temperature)
    logits, teacher = paired(logits, teacher, "logits")
    student = F.log_softmax(logits / temperature, dim=-1)
    wanted = F.log_softmax(teacher / temperature, dim=-1)
    rows = F.kl_div(student, wanted, reduction="none", log_target=True).sum(dim=-1)
    if strength is not None:
        rows = rows * strength.detach()
    return temperature**2 * per_row(rows.sum(), rows.numel())


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with labels in nats, mean over rows; 0 without rows.

    Args:
        logits: ``[..., classes]``; leading axes are rows.
        labels: ``[...]`` class numbers from 0.

    Raises:
        IndexError: a label that is no class (from torch).
    """
    rows = wide(logits).flatten(0, -2)
    total = F.cross_entropy(rows, labels.flatten(), reduction="sum")
    return per_row(total, len(rows))


def kd(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    soft_weight: float = 0.7,
    temperature: float = 2.0,
    strength: Tensor | None = None,
) -> Tensor:
    """(1 - w) CE(logits, labels) + w T^2 KL(q_T || p_T), in nats, mean over rows.

    Hinton et al., arXiv 1503.02531. Without labels it is the soft part alone, with its T^2; w = 1
    does not look at labels and w = 0 does not look at the teacher. Deviation: one ``soft_weight``
    within 0 and 1 in place of an alpha, which weighs the labels in some libraries and the teacher
    in others.

    Args:
        logits: student, ``[..., classes]``; leading axes are rows.
        teacher: logits or log-probabilities of the same shape; never given a gradient.
        labels: ``[...]`` class numbers from 0, or None.
        soft_weight: w.
        temperature: T of the soft part; labels have none.
        strength: ``[...]``, factor of each row in the soft part, of mean 1.

    Raises:
        FedistillError: unequal shapes, a weight that is no share, or a temperature not above 0.
        IndexError: a label that is no class (from torch).
    """
    check_share(soft_weight, "soft_weight")
    if labels is None or soft_weight == 1:
        return logit_kl(logits, teacher, temperature, strength)
    if labels.shape != logits.shape[:-1]:
        raise FedistillError(
            f"labels must have the shape {list(logits.shape[:-1])} of the rows, found "
            f"{list(labels.shape)}"
        )
    hard = label_loss(logits, labels)
    if soft_weight == 0:
        return hard
    soft = logit_kl(logits, teacher, temperature, strength)
    return (1 - soft_weight) * hard + soft_weight * soft
