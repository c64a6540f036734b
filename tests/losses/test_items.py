"""Losses on item scores."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses import (
    bpr,
    ranking,
    ranking_order,
    relaxed_ranking,
    sampled_kl,
    sampled_softmax,
)


def draw(*shape, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=dtype)


def naive_relaxed(best, rest):
    parts = [
        (torch.exp(best[..., k:]).sum(-1) + torch.exp(rest).sum(-1)).log() - best[..., k]
        for k in range(best.shape[-1])
    ]
    return torch.stack(parts, -1).sum(-1).mean()


# --- relaxed ranking -----------------------------------------------------------------------------


def test_relaxed_ranking_is_the_formula_of_the_paper():
    best, rest = draw(4, 3), draw(4, 6, seed=1)
    torch.testing.assert_close(relaxed_ranking(best, rest), naive_relaxed(best, rest))


def test_without_others_it_is_listmle():
    best = draw(4, 5)
    order = torch.arange(5.0, 0, -1, dtype=torch.float64).expand(4, 5)
    found = relaxed_ranking(best, best.new_zeros(4, 0))
    torch.testing.assert_close(found, ranking_order(best, order))


def test_relaxed_probabilities_of_all_tops_sum_to_one():
    """Which two of four come first, in their order: the chances of the twelve tops."""
    scores, total = draw(4), 0.0
    for top in itertools.permutations(range(4), 2):
        rest = [item for item in range(4) if item not in top]
        total += math.exp(-float(relaxed_ranking(scores[None, list(top)], scores[None, rest])))
    assert total == pytest.approx(1)


def test_relaxed_ranking_masks_change_nothing_but_who_is_there():
    best, rest = draw(3, 4).requires_grad_(), draw(3, 5, seed=1).requires_grad_()
    mask = torch.arange(4).expand(3, 4) < 2
    others = torch.arange(5).expand(3, 5) < 3
    found = relaxed_ranking(best, rest, mask, others)
    torch.testing.assert_close(found, relaxed_ranking(best[:, :2], rest[:, :3]))
    found.backward()
    assert (best.grad[:, 2:] == 0).all()
    assert (rest.grad[:, 3:] == 0).all()
    assert gradcheck(lambda b, r: relaxed_ranking(b, r, mask, others), (best, rest))


def test_lists_without_interesting_items_do_not_count():
    best, rest = draw(3, 4), draw(3, 5, seed=1)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1:] = False
    torch.testing.assert_close(
        relaxed_ranking(best, rest, mask), relaxed_ranking(best[:1], rest[:1])
    )


def test_relaxed_ranking_is_finite_at_large_scores_and_gives_no_zero_gradient_above_a_clamp():
    best, rest = (1e4 * draw(4, 3, dtype=torch.float32)).requires_grad_(), draw(4, 6) * 1e4
    loss = relaxed_ranking(best, rest.float())
    loss.backward()
    assert loss.isfinite()
    assert best.grad.isfinite().all()
    above = torch.tensor([[20.0, 19.0]], requires_grad=True)
    relaxed_ranking(above, torch.tensor([[20.5]])).backward()
    assert (above.grad != 0).all()


# --- sampled KL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_with_every_item_the_sampled_kl_is_the_full_one(temperature):
    scores, teacher = draw(4, 9), draw(4, 9, seed=1)
    found = sampled_kl(scores, teacher, top=3, items=9, temperature=temperature)
    torch.testing.assert_close(found, ranking(scores, teacher, temperature))


def test_drawn_items_stand_for_the_rest():
    """Items outside the top that all score the same: one of them tells as much as all."""
    scores, teacher = draw(1, 10), draw(1, 10, seed=1)
    scores[:, 2:], teacher[:, 2:] = 0.3, -0.4
    whole = sampled_kl(scores, teacher, top=2, items=10)
    for drawn in (1, 4):
        part = slice(0, 2 + drawn)
        torch.testing.assert_close(
            sampled_kl(scores[:, part], teacher[:, part], top=2, items=10), whole
        )


def test_sampled_kl_is_zero_at_the_teacher_and_gives_it_no_gradient():
    scores, teacher = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_()
    assert sampled_kl(teacher, teacher, top=2, items=50).abs() < 1e-12
    sampled_kl(scores, teacher, top=2, items=50).backward()
    assert teacher.grad is None
    assert gradcheck(lambda s: sampled_kl(s, teacher, top=2, items=50, temperature=2.0), (scores,))


# --- choices -------------------------------------------------------------------------------------


def test_bpr_by_hand_and_its_gradient():
    positive, negative = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    wanted = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert float(bpr(positive, negative)) == pytest.approx(wanted)
    pair = draw(5).requires_grad_(), draw(5, seed=1).requires_grad_()
    assert gradcheck(bpr, pair)
    assert bpr(torch.tensor([-1e4]), torch.tensor([1e4])).isfinite()


def test_with_all_other_items_the_sampled_softmax_is_the_full_one():
    scores, chosen = draw(4, 7), torch.tensor([0, 3, 6, 2])
    others = torch.ones(4, 7, dtype=torch.bool).scatter_(1, chosen[:, None], False)
    positive = scores.gather(1, chosen[:, None])[:, 0]
    wanted = F.cross_entropy(scores, chosen)
    torch.testing.assert_close(sampled_softmax(positive, scores, mask=others), wanted)
    left = scores[others].reshape(4, 6)
    torch.testing.assert_close(sampled_softmax(positive, left), wanted)


def test_the_log_q_correction_finds_the_sum_over_the_catalogue():
    """Drawn by any law, the weighted sum is that of all items; here items in fixed proportion."""
    others = draw(3)
    drawn = torch.tensor([0, 1, 1, 2, 2, 2])
    log_q = (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / 6).log()[drawn]
    positive = draw(1, seed=2)
    torch.testing.assert_close(
        sampled_softmax(positive, others[drawn][None], log_q),
        sampled_softmax(positive, others[None]),
    )


def test_sampled_softmax_gradient_and_large_scores():
    positive, negatives = draw(3).requires_grad_(), draw(3, 5, seed=1).requires_grad_()
    mask = torch.arange(5).expand(3, 5) != 2
    assert gradcheck(
        lambda p, n: sampled_softmax(p, n, draw(5, seed=2) - 3, mask), (positive, negatives)
    )
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = sampled_softmax(far, torch.tensor([[1e4], [-1e4]]))
    loss.backward()
    assert loss.isfinite()
    assert far.grad.isfinite().all()


def test_nothing_costs_nothing():
    none = torch.zeros(0, 4, requires_grad=True)
    for loss in (
        relaxed_ranking(none, torch.zeros(0, 3)),
        relaxed_ranking(torch.zeros(2, 0, requires_grad=True), torch.zeros(2, 3)),
        sampled_kl(none, torch.zeros(0, 4), top=2, items=9),
        bpr(none, torch.zeros(0, 4)),
        sampled_softmax(torch.zeros(0, requires_grad=True), torch.zeros(0, 4)),
    ):
        assert loss == 0
        loss.backward()


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(FedistillError, match="of the same lists"):
        relaxed_ranking(draw(2, 3), draw(3, 3))
    with pytest.raises(FedistillError, match="a mask must have the shape"):
        relaxed_ranking(draw(2, 3), draw(2, 3), torch.ones(2, 2))
    with pytest.raises(FedistillError, match="its top of 5 and at most 9 items, found 4"):
        sampled_kl(draw(2, 4), draw(2, 4), top=5, items=9)
    with pytest.raises(FedistillError, match="at most 3 items, found 4"):
        sampled_kl(draw(2, 4), draw(2, 4), top=1, items=3)
    with pytest.raises(FedistillError, match="must have one shape"):
        bpr(draw(2), draw(3))
    with pytest.raises(FedistillError, match=r"positive scores \[n\] and negative ones"):
        sampled_softmax(draw(2), draw(3, 4))
