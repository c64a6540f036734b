"""How weights and temperatures move: pure functions of the epoch, or of the losses themselves.

``partial(cosine, start=8, stop=1, epochs=20)`` is a schedule: a function from the epoch, counted
from 0, to a number. Asked twice it says the same, so resuming needs no help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedistill.errors import FedistillError

Schedule: TypeAlias = Callable[[int], float]


SURE = 1e-6
"""Less sureness than this is rounding."""


def at(value: float | Schedule, epoch: int) -> float:
    """A number where a number or a schedule may stand."""
    return float(value(epoch) if callable(value) else value)


def constant(epoch: int, *, value: float) -> float:
    """The same always."""
    del epoch
    return value


def steps(epoch: int, *, start: float, factor: float, every: int) -> float:
    """Start * factor^floor(epoch / every): multiplied by a factor every so many epochs."""
    return start * factor ** (epoch // every)


def fading_labels(
    epoch: int, *, start: float = 0.7, factor: float = 0.95, every: int = 10
) -> float:
    """A soft_weight that grows as the labels' fades: 1 - start * factor^floor(epoch / every).

    >>> [round(fading_labels(epoch), 3) for epoch in (0, 10, 20, 50, 100)]
    [0.3, 0.335, 0.368, 0.458, 0.581]
    """
    return 1 - steps(epoch, start=start, factor=factor, every=every)


def linear(epoch: int, *, start: float, stop: float, epochs: int) -> float:
    """From ``start`` at epoch 0 to ``stop`` at the last of ``epochs``, straight; then constant."""
    return start + (stop - start) * _done(epoch, epochs)


def cosine(epoch: int, *, start: float, stop: float, epochs: int) -> float:
    """From ``start`` to ``stop`` as :func:`linear`, slowly at both ends."""
    return stop + (start - stop) * (1 + math.cos(math.pi * _done(epoch, epochs))) / 2


def _done(epoch: int, epochs: int) -> float:
    return min(epoch / max(epochs - 1, 1), 1.0)


# --- from the losses -----------------------------------------------------------------------------


def loss_ratio(hard: Tensor, soft: Tensor, ratio: float = 1.0) -> Tensor:
    """The soft_weight w at which w soft = ratio (1 - w) hard; never given a gradient.

    Args:
        hard: loss on labels, one number of at least 0.
        soft: soft part, one number of at least 0.
        ratio: how many times the labels' part the soft part shall count.

    Returns:
        w within 0 and 1; ratio / (1 + ratio) where both losses are 0.
    """
    hard, soft = ratio * hard.detach(), soft.detach()
    total = hard + soft
    return torch.where(total > 0, hard / total.clamp_min(1e-30), ratio / (1 + ratio))


def by_loss_ratio(parts: Mapping[str, Tensor], ratio: float = 1.0) -> Tensor:
    """A total in which the soft part counts ``ratio`` times as much as the labels; features as is.

    Args:
        parts: named losses, as ``Distiller(balance=...)`` gives them.
        ratio: see :func:`loss_ratio`.
    """
    rest = [value for name, value in parts.items() if name not in {"labels", "soft"}]
    if not {"labels", "soft"} <= set(parts):
        return torch.stack(list(parts.values())).sum()
    weight = loss_ratio(parts["labels"], parts["soft"], ratio)
    mixed = (1 - weight) * parts["labels"] + weight * parts["soft"]
    return torch.stack([mixed, *rest]).sum()


class Uncertainty(nn.Module):
    """Learned weights: sum over parts of exp(-s) loss + s / 2, s = log of a variance.

    Kendall, Gal and Cipolla, arXiv 1705.07115. At the best s = log(2 loss) every part counts one
    half, so its scale does not matter. Deviation: the paper's form for classification is used for
    all parts; its form for regression, exp(-s) loss / 2, only shifts s.

    Args:
        names: of the parts, such as ``labels`` and ``soft``.
    """

    def __init__(self, names: Sequence[str] = ("labels", "soft")) -> None:
        super().__init__()
        self.names = tuple(names)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One total; parts that a phase leaves out are left out.

        Raises:
            FedistillError: a part without a weight.
        """
        for name in parts:
            if name not in self.names:
                raise FedistillError(
                    f'Uncertainty has no weight for "{name}", only for {", ".join(self.names)}'
                )
        chosen = [self.names.index(name) for name in parts]
        logs = self.log_variance[chosen]
        total: Tensor = ((-logs).exp() * torch.stack(list(parts.values())) + logs / 2).sum()
        return total


# --- from the rows -------------------------------------------------------------------------------


def sureness(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """1 - H(q) / log C of each row: 1 for one class alone, 0 for all alike; ``[...]``, no gradient.

    Args:
        logits: ``[..., classes]``.
        temperature: of q.
    """
    probs = (logits.detach() / temperature).softmax(dim=-1)
    entropy = torch.special.entr(probs).sum(dim=-1)
    sure: Tensor = 1 - entropy / math.log(max(logits.shape[-1], 2))
    return sure.clamp_min(0)


def certainty(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Strength of each row: the teacher's sureness divided by its mean; ``[rows]``, no gradient.

    Rows of which the teacher knows nothing teach nothing. Of mean 1, or the learning rate would
    change too; all 1 where it is sure of none.

    Args:
        logits: teacher, ``[rows, classes]``.
        temperature: of the teacher's side.
    """
    sure = sureness(logits, temperature)
    mean = sure.mean()
    return torch.where(mean > SURE, sure / mean.clamp_min(SURE), 1.0)
