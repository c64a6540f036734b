"""Hints: a student's layer, seen through a trained regressor, imitates a teacher's layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedistill.errors import FedistillError
from fedistill.losses.pairs import paired, per_row


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """(h_s - h_t)^2, mean over **all** elements; unit: squared activations.

    FitNets, Romero et al., arXiv 1412.6550. Layers of unequal width need a :func:`regressor` on
    the student's side, trained along and thrown away. Deviation: a mean in place of half a sum, so
    that the weight does not depend on the size of the layer.

    Args:
        student: features of any shape, after the regressor.
        teacher: features of the same shape; never given a gradient.

    Raises:
        FedistillError: unequal shapes.
    """
    student, teacher = paired(student, teacher, "features")
    return per_row((student - teacher).square().sum(), student.numel())


def regressor(student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
    """A trainable map from the student's features to the shape of the teacher's.

    A 1x1 convolution for maps, else a linear layer on the last axis. Deviation: FitNets gives it
    the non-linearity of the hint layer and larger kernels; 1x1 is what its successors use.

    Args:
        student: shape of one row of features, ``(width,)``, ``(tokens, width)`` or
            ``(channels, height, width)``.
        teacher: shape of one row of the teacher's; equal but for the width or the channels.

    Raises:
        FedistillError: shapes between which no such map exists.
    """
    maps = len(student) == len(teacher) == 3
    same = student[1:] == teacher[1:] if maps else student[:-1] == teacher[:-1]
    if not same or not 1 <= len(student) == len(teacher) <= 3:
        raise FedistillError(
            "a regressor needs features that differ in channels (maps) or in the last axis only, "
            f"found {list(student)} and {list(teacher)}: choose another pair of layers"
        )
    if maps:
        return nn.Conv2d(student[0], teacher[0], kernel_size=1)
    return nn.Linear(student[-1], teacher[-1])
