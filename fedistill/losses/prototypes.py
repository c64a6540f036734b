"""Class prototypes: every row's features are drawn to the mean features of its class."""

from __future__ import annotations

from torch import Tensor

from fedistill.errors import FedistillError
from fedistill.losses.pairs import per_row, wide


def prototype_loss(features: Tensor, labels: Tensor, prototypes: Tensor, present: Tensor) -> Tensor:
    """Mean (h - P[y])^2 over all elements of the rows whose class has a prototype.

    FedProto, Tan et al., arXiv 2105.00243. Unit: squared features, per element, so that a weight
    means the same at any width. 0, with its gradient, where no row counts. Deviation: a row whose
    class has no prototype does not count, where the authors' code gives it its own features as
    target, a zero that thins the mean.

    Args:
        features: ``[rows, width]``.
        labels: class numbers ``[rows]``, or one-hot ``[rows, classes]``.
        prototypes: ``[classes, width]``; never given a gradient. Absent ones may hold anything.
        present: bool ``[classes]``, whether there is a prototype.

    Raises:
        FedistillError: sides that do not fit together.
    """
    labels = labels.argmax(dim=1) if labels.dim() == 2 else labels
    if (
        features.dim() != 2
        or prototypes.dim() != 2
        or features.shape[1] != prototypes.shape[1]
        or len(labels) != len(features)
        or present.shape != prototypes.shape[:1]
    ):
        raise FedistillError(
            "prototype_loss needs features [rows, width], a label each, prototypes "
            f"[classes, width] and a bool each, found {list(features.shape)}, "
            f"{list(labels.shape)}, {list(prototypes.shape)} and {list(present.shape)}: every "
            "client must have features of one width"
        )
    counted = present[labels]
    gap = wide(features)[counted] - wide(prototypes.detach())[labels[counted]]
    return per_row(gap.square().sum(), gap.numel())
