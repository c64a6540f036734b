"""Item scores of recommenders: lists of a teacher, and clicks against items drawn at random."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses.lists import LOWEST, ranking
from fedistill.losses.pairs import paired, per_row, wide


def relaxed_ranking(
    interesting: Tensor,
    others: Tensor,
    mask: Tensor | None = None,
    others_mask: Tensor | None = None,
) -> Tensor:
    """-log of the probability that the interesting items come first, in their order, in nats.

    Relaxed ranking distillation (RRD) of DE-RRD, Kang et al., CIKM 2020: ListMLE over the
    interesting items, with the others below all of them in any order,
    sum_k [log(sum_{j >= k} e^{s_j} + sum_l e^{u_l}) - s_k]. Without others it is ListMLE, see
    :func:`fedistill.losses.ranking_order`. Deviations: logsumexp from the end of the list, finite
    at any scores, where the authors' exponentials overflow; a mean over lists and not a sum.

    Args:
        interesting: the student's scores s of the teacher's best items, in the teacher's order,
            ``[..., k]``; leading axes are lists.
        others: the student's scores u of items that the teacher finds uninteresting, ``[..., l]``.
        mask: ``[..., k]``, true where an interesting item is there; lists without do not count.
        others_mask: ``[..., l]``, the same for the others.

    Raises:
        FedistillError: leading axes that differ, or a mask of another shape than its scores.
    """
    if interesting.shape[:-1] != others.shape[:-1]:
        raise FedistillError(
            "interesting and other items must be of the same lists, found "
            f"{list(interesting.shape)} and {list(others.shape)}"
        )
    best, there = _masked(interesting, mask)
    rest, _ = _masked(others, others_mask)
    left = best.flip(-1).logcumsumexp(dim=-1).flip(-1)
    if rest.shape[-1]:
        left = torch.logaddexp(left, rest.logsumexp(dim=-1, keepdim=True))
    parts = (left - best).masked_fill(~there, 0.0)
    return parts.sum() / there.any(dim=-1).sum().clamp_min(1)


def sampled_kl(
    scores: Tensor,
    teacher: Tensor,
    top: int,
    items: int,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""T^2 KL of the softmax over a catalogue, from the teacher's top and a draw from the rest.

    The first ``top`` = a entries of a list are the teacher's best items, the others b items drawn
    uniformly from the |I| - a that are left. The drawn ones stand for all of these: both sides get
    log((|I| - a) / b) on their (divided) scores. With b = |I| - a it is the full KL.

    Args:
        scores: student, ``[..., a + b]``; leading axes are lists.
        teacher: scores of the same items; never given a gradient.
        top: a, how many entries come from the top.
        items: \|I|, the size of the catalogue.
        temperature: T, above 0.
        mask: ``[..., a + b]``, true where an item is there; lists without items do not count.

    Raises:
        FedistillError: unequal shapes, a list longer than the catalogue or shorter than its top, a
            temperature not above 0.
    """
    drawn = scores.shape[-1] - top
    if top < 0 or drawn < 0 or scores.shape[-1] > items:
        raise FedistillError(
            f"a list must hold its top of {top} and at most {items} items, found {scores.shape[-1]}"
        )
    scores, teacher = paired(scores, teacher, "scores")
    lift = scores.new_zeros(scores.shape[-1])
    if drawn:
        lift[top:] = math.log((items - top) / drawn) * temperature
    return ranking(scores + lift, teacher + lift, temperature, mask)


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(positive - negative), in nats, mean over pairs.

    Bayesian personalised ranking, Rendle et al., UAI 2009, without its penalty on the weights.

    Args:
        positive: scores of items that were chosen, any shape.
        negative: scores of items that were not, by the same users.

    Raises:
        FedistillError: unequal shapes.
    """
    if positive.shape != negative.shape:
        raise FedistillError(
            "positive and negative scores must have one shape, found "
            f"{list(positive.shape)} and {list(negative.shape)}"
        )
    return per_row(F.softplus(wide(negative) - wide(positive)).sum(), positive.numel())


def sampled_softmax(
    positive: Tensor,
    negatives: Tensor,
    log_q: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the chosen item, in nats, mean over rows, the catalogue drawn at random.

    -log[e^{s+} / (e^{s+} + sum_j e^{s_j} / (m q_j))]: the m drawn items, each with its probability
    q_j in a draw, stand for all others (the log-q correction of Bengio and Senecal, 2008; Yi et
    al., RecSys 2019). With every other item once and no ``log_q`` it is the full softmax.
    Deviation: the chosen item is always there, hence not corrected.

    Args:
        positive: scores of the chosen items, ``[n]``.
        negatives: scores of the drawn items, ``[n, m]``; the same items for every row, or not.
        log_q: log of the probability of each in one draw, ``[m]`` or ``[n, m]``; None: q = 1 / m.
        mask: ``[n, m]``, false where a drawn item is the chosen one, or is not to count.

    Raises:
        FedistillError: shapes that do not fit.
    """
    if negatives.dim() != 2 or positive.shape != negatives.shape[:1]:
        raise FedistillError(
            "expected positive scores [n] and negative ones [n, m], found "
            f"{list(positive.shape)} and {list(negatives.shape)}"
        )
    chosen, drawn = wide(positive), wide(negatives)
    if log_q is not None and drawn.shape[1]:
        drawn = drawn - (log_q + math.log(drawn.shape[1]))
    drawn, _ = _masked(drawn, mask)
    total = torch.cat([chosen[:, None], drawn], dim=1).logsumexp(dim=1)
    return per_row((total - chosen).sum(), len(chosen))


def _masked(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in float32 at least, the lowest where nothing is, and where something is."""
    scores = wide(scores)
    if mask is None:
        return scores, torch.ones_like(scores, dtype=torch.bool)
    if mask.shape != scores.shape:
        raise FedistillError(
            f"a mask must have the shape of its scores, found {list(mask.shape)} and "
            f"{list(scores.shape)}"
        )
    there = mask.bool()
    return scores.masked_fill(~there, LOWEST), there
