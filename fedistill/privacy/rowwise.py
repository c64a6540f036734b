"""What all ways of clipping share: a loss for every row, and a sum of clipped gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.errors import FedistillError

RowLoss: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From a module, inputs ``[rows, ...]`` and labels ``[rows]`` to ``[rows]`` losses, or their sum.

The loss of a row must depend on that row alone.
"""

Part: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Inputs, labels, and for users the place of each row's user in the part; None: a row a unit."""

SMOOTHING = 1e-6
"""Added to a norm before the clipping norm is divided by it, as Opacus does."""


BROKEN_WEIGHTS = "the weights are NaN or infinite: what was spent stays spent; lower privacy.lr"
"""What is said of a student whose weights are not finite any more."""


class Unsuited(Exception):
    """This way of clipping would be wrong here: take hooks."""


class Engine(Protocol):
    """A way of clipping: from rows to the sum of the clipped gradients of their units."""

    def open(self) -> None:
        """Put on the module what has to listen to it."""
        ...

    def close(self) -> None:
        """Take all of that off again."""
        ...

    def add(self, part: Part, to: Sequence[Tensor], share: float) -> None:
        """Add the sum of the units' clipped gradients, times ``share``.

        Args:
            part: the units.
            to: a tensor for each weight that learns; worth nothing after an error.
            share: what each is multiplied by.

        Raises:
            Unsuited: another way has to be taken.
            FedistillError: a weight takes no part in the loss, or the loss is of a wrong shape.
        """
        ...

    def usable(self, part: Part) -> Tensor:
        """Whether the gradient of each unit is finite, ``[units]``."""
        ...


def cross_entropy(module: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of a student, ``[rows]``."""
    return F.cross_entropy(module(inputs), labels, reduction="none")


def losses_of(module: nn.Module, loss: RowLoss, part: Part) -> Tensor:
    """The losses of a part, ``[rows]``, or where a row is a unit their sum.

    Raises:
        FedistillError: the loss is of another shape.
    """
    inputs, labels, owner = part
    losses = loss(module, inputs, labels)
    scalar = losses.dim() == 0 and owner is None
    if not scalar and losses.shape != (len(inputs),):
        raise FedistillError(
            f"a private loss must give one value for each row, [{len(inputs)}], it gives "
            f"{list(losses.shape)}: reduce it to rows, not to their mean"
        )
    return losses


def factors_of(norms: Tensor, clip: float) -> Tensor:
    """What gradients of these norms are multiplied by, so that none is longer than ``clip``."""
    return (clip / (norms + SMOOTHING)).clamp(max=1.0)


def taught(module: nn.Module) -> list[nn.Parameter]:
    """The weights that learn."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def is_finite(sums: list[Tensor]) -> bool:
    """Whether all values are finite; of values near the largest float maybe not, though they are.

    NaN and infinity survive a sum, which is a fiftieth of the work of looking at each value.
    """
    return bool(torch.stack([tensor.sum() for tensor in sums]).isfinite().all())
