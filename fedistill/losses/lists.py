"""Listwise ranking: a student recommender learns the teacher's order of a list of items."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses.pairs import check_temperature, paired

LOWEST = -1e30
"""Score of an item that is not there: probability 0 in float32, without the NaN of -inf."""


def ranking(
    scores: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(scores / T)) over a list, in nats, mean over lists.

    The top-one form of ListNet, Cao et al., ICML 2007: the probability that an item comes first.
    Deviations: KL and not cross-entropy (the same gradient), so that 0 means "equal"; T with T^2
    as in every other loss here.

    Args:
        scores: student, ``[..., items]``; leading axes are lists.
        teacher: scores of the same shape; never given a gradient.
        temperature: T, above 0; a small one looks at the top of the list alone.
        mask: ``[..., items]``, true where an item is there; lists without items do not count.

    Raises:
        FedistillError: unequal shapes, or a temperature not above 0.
    """
    check_temperature(temperature)
    scores, teacher, there = _lists(scores, teacher, mask)
    student = F.log_softmax((scores / temperature).masked_fill(~there, LOWEST), dim=-1)
    wanted = F.log_softmax((teacher / temperature).masked_fill(~there, LOWEST), dim=-1)
    parts = F.kl_div(student, wanted, reduction="none", log_target=True)
    return temperature**2 * _mean(parts.masked_fill(~there, 0.0), there)


def ranking_order(
    scores: Tensor, teacher: Tensor, top: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """-log of the Plackett-Luce probability of the teacher's order, in nats, mean over lists.

    ListMLE, Xia et al., ICML 2008; with ``top`` = k its top-k form, Xia et al., NeurIPS 2009: the
    first k places are drawn from all items that are left, the order of the rest is free. Only the
    order of the teacher's scores counts, not their size; equal scores keep the order of the items.
    It is a sum over places: longer lists weigh more. Logsumexp runs from the end of the list, so
    it is finite at any scores.

    Args:
        scores: student, ``[..., items]``; leading axes are lists.
        teacher: scores of the same shape; never given a gradient.
        top: places that count, all if None or more than there are items.
        mask: ``[..., items]``, true where an item is there; lists without items do not count.

    Raises:
        FedistillError: unequal shapes, or ``top`` below 1.
    """
    if top is not None and top < 1:
        raise FedistillError(f"top must be 1 at least, found {top}")
    scores, teacher, there = _lists(scores, teacher, mask)
    order = teacher.masked_fill(~there, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    there = there.gather(-1, order)
    ranked = scores.gather(-1, order).masked_fill(~there, LOWEST)
    left = ranked.flip(-1).logcumsumexp(dim=-1).flip(-1)
    places = torch.arange(ranked.shape[-1], device=ranked.device)
    counted = there & (places < (len(places) if top is None else top))
    return _mean((left - ranked).masked_fill(~counted, 0.0), there)


def _lists(scores: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    scores, teacher = paired(scores, teacher, "scores")
    there = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    return scores, teacher, there


def _mean(parts: Tensor, there: Tensor) -> Tensor:
    """Sum over items, mean over the lists that have any."""
    return parts.sum() / there.any(dim=-1).sum().clamp_min(1)
