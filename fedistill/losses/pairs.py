"""What every loss asks: sides of one shape, float32 at least, no gradient to the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from fedistill.errors import FedistillError


def wide(values: Tensor) -> Tensor:
    """At least float32: sums of squares and exponentials do not fit into half precision."""
    return values.float() if values.dtype in {torch.float16, torch.bfloat16} else values


def paired(student: Tensor, teacher: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Both sides in float32 at least, the teacher's detached.

    Args:
        student: any shape.
        teacher: of the same shape.
        what: the thing that is compared, for the message.

    Raises:
        FedistillError: unequal shapes.
    """
    if student.shape != teacher.shape:
        raise FedistillError(
            f"{what} of student and teacher must have one shape, found {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    return wide(student), wide(teacher.detach())


def per_row(total: Tensor, rows: int) -> Tensor:
    """A mean over rows from their sum; an empty batch gives 0 and not NaN."""
    return total / max(rows, 1)


def check_temperature(temperature: float) -> None:
    """Refuse what cannot divide logits.

    Raises:
        FedistillError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise FedistillError(f"a temperature must be above 0, found {temperature}")


def check_share(value: float, name: str) -> None:
    """Refuse what is no share.

    Raises:
        FedistillError: the value is not within 0 and 1.
    """
    if not 0 <= value <= 1:
        raise FedistillError(f"{name} must lie within 0 and 1, found {value}")
