"""What an objective is given, and the parts that objectives are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOWEST = -1e30
"""A logit of probability 0, without the NaN that minus infinity makes of 0 times itself."""
Terms: TypeAlias = dict[str, Tensor]
Ask: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Group:
    """Some rows of a step, and what the student says of them.

    Attributes:
        inputs: ``[n, ...]``.
        labels: ``[n]``; -1 where none is known.
        logits: ``[n, classes]`` of the student, before the step.
        stored: ``[n, classes]`` logits that lie beside remembered rows; NaN where there is none,
            as for classes that came after the row.
        teacher: from inputs to the teacher's logits ``[n, classes or fewer]``; None without one.
    """

    inputs: Tensor
    labels: Tensor
    logits: Tensor
    stored: Tensor
    teacher: Ask | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def taught(self) -> Tensor:
        """The teacher's logits ``[n, classes]``; NaN for classes that it does not know."""
        if self.teacher is None or not len(self):
            return torch.full_like(self.logits, torch.nan)
        said = self.teacher(self.inputs)
        return F.pad(said, (0, self.logits.shape[1] - said.shape[1]), value=torch.nan)


@dataclass(frozen=True, eq=False)
class Step:
    """What an objective sees.

    Attributes:
        new: the rows that came.
        old: remembered rows, a group for each of the objective's ``draws``; groups are empty while
            nothing is remembered.
        public: public rows, as many as the objective's ``public`` says; empty without any.
        known: ``[classes]`` the classes met before this experience.
        weights: what is trained.
    """

    new: Group
    old: tuple[Group, ...]
    public: Group
    known: Tensor
    weights: Sequence[nn.Parameter] = ()


class Objective(Protocol):
    """The seam: anything that turns a step into named terms. Attributes may be left out.

    Attributes:
        draws: rows of each independent draw from the memory, 0 for as many as are new; left out:
            one draw of so many.
    """

    def __call__(self, step: Step) -> Terms:
        """Terms to be added up."""
        ...


# --- the parts of which objectives are made ------------------------------------------------------


def labels(group: Group, among: Tensor | None = None) -> Tensor:
    """CE in nats, mean over the rows that have a label; 0 without any.

    Args:
        group: the rows.
        among: ``[classes]`` classes that compete, or ``[n, classes]``; None: all.
    """
    logits = group.logits if among is None else group.logits.masked_fill(~among, LOWEST)
    total = F.cross_entropy(logits, group.labels, ignore_index=-1, reduction="sum")
    return total / (group.labels >= 0).sum().clamp_min(1)


def logit_gap(group: Group, wanted: Tensor) -> Tensor:
    """Mean squared difference of logits over the entries that ``wanted`` has; 0 without any.

    The entries are picked out before the difference. Masked afterwards, NaN would stay in the
    gradient; replaced by zeros, classes that come would change the order of the sum. So the loss of
    an old row does not change by one bit when they do.
    """
    there = wanted.isfinite()
    if bool(there.all()):  # the usual case, without picking
        gap = group.logits - wanted.detach()
        return gap.square().sum() / max(gap.numel(), 1)
    gap = group.logits[there] - wanted[there].detach()
    return gap.square().sum() / there.sum().clamp_min(1)


def soft_gap(group: Group, wanted: Tensor, among: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(wanted / T) || softmax(f / T)) over some classes, mean over rows.

    Rows for which ``wanted`` lacks one of these classes do not count.
    """
    student, wanted = group.logits[:, among], wanted[:, among]
    rows = wanted.isfinite().all(dim=1) if wanted.shape[1] else torch.zeros(len(group)).bool()
    if not bool(rows.any()):
        return group.logits.sum() * 0
    logs = F.log_softmax(student[rows] / temperature, dim=1)
    target = F.log_softmax(wanted[rows].detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(logs, target, reduction="batchmean", log_target=True)


def told(wanted: Tensor) -> Tensor:
    """``[classes]`` the classes that a teacher told of: it may know fewer than the student."""
    return wanted.isfinite().all(dim=0)


def present(group: Group) -> Tensor:
    """``[classes]`` the classes that stand in a batch."""
    found = torch.zeros(group.logits.shape[1], dtype=torch.bool, device=group.logits.device)
    found[group.labels[group.labels >= 0]] = True
    return found


def gradient(loss: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
    """The gradient as one vector."""
    parts = torch.autograd.grad(loss, list(weights), retain_graph=True, allow_unused=True)
    flat = [
        torch.zeros_like(weight).flatten() if part is None else part.flatten()
        for part, weight in zip(parts, weights, strict=True)
    ]
    return torch.cat(flat)
