"""What a step of incremental learning minimises, against numbers by hand."""

from __future__ import annotations

import copy
import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedistill import catalog, models
from fedistill.distill import objectives
from fedistill.distill.objectives import (
    OBJECTIVES,
    AGem,
    Cfed,
    Der,
    DerPlus,
    Er,
    ErAce,
    FineTune,
    Follow,
    GDumb,
    Group,
    Lwf,
    Only,
    Steady,
    Step,
    excess,
    labels,
    logit_gap,
    objective,
    present,
    soft_gap,
)
from fedistill.distill.teachers import Frozen
from fedistill.errors import FedistillError

NAN = float("nan")
NEW = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]]
OLD = [[1.0, -1.0, 3.0], [0.0, 2.0, 1.0], [4.0, 0.0, 0.0]]
STORED = [[0.0, 0.0, 1.0], [1.0, 1.0, NAN], [3.0, NAN, NAN]]


def group(logits, known, stored=None, teacher=None):
    said = logits if torch.is_tensor(logits) else torch.tensor(logits, dtype=torch.float64)
    beside = torch.full_like(said, NAN) if stored is None else torch.tensor(stored).to(said)
    inputs = torch.arange(2.0 * len(said), dtype=said.dtype).reshape(len(said), 2)
    return Group(inputs, torch.tensor(known, dtype=torch.int64), said, beside, teacher)


def nobody(classes=3):
    return group(torch.empty(0, classes, dtype=torch.float64), [])


def step(new=None, old=(), public=None, known=(True, True, False), weights=()):
    new = group(NEW, [0, 1]) if new is None else new
    return Step(new, tuple(old), public or nobody(), torch.tensor(known), weights)


def entropy(logits, label, among=None):
    """Cross-entropy by hand, over some of the classes."""
    chosen = range(len(logits)) if among is None else among
    return math.log(sum(math.exp(logits[c]) for c in chosen)) - logits[label]


def divergence(wanted, said, temperature):
    p, q = (np.exp(np.array(x) / temperature) for x in (wanted, said))
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def near(terms, **expected):
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-12), name


FRESH = (entropy(NEW[0], 0) + entropy(NEW[1], 1)) / 2
PAST = (entropy(OLD[0], 2) + entropy(OLD[1], 1) + entropy(OLD[2], 0)) / 3
GAP = (1 + 1 + 4 + 1 + 1 + 1) / 6  # over the six entries that are stored


# --- by hand -------------------------------------------------------------------------------------


def test_fine_tune_is_the_mean_over_labelled_new_rows():
    near(FineTune()(step()), new=FRESH)
    near(FineTune()(step(group(NEW, [-1, 1]))), new=entropy(NEW[1], 1))


def test_er_is_one_mean_over_new_and_remembered_rows():
    terms = Er()(step(old=[group(OLD, [2, 1, 0])]))
    near(terms, new=2 / 5 * FRESH, old=3 / 5 * PAST)
    half = Er()(step(group(NEW, [-1, 1]), [group(OLD, [2, -1, -1])]))
    near(half, new=entropy(NEW[1], 1) / 2, old=entropy(OLD[0], 2) / 2)


def test_er_ace_lets_only_the_classes_of_the_batch_compete():
    terms = ErAce()(step(old=[group(OLD, [2, 1, 0])]))
    masked = (entropy(NEW[0], 0, (0, 1)) + entropy(NEW[1], 1, (0, 1))) / 2
    near(terms, new=masked, old=PAST)
    alone = ErAce()(step(group(NEW, [2, -1]), [group(OLD, [2, 1, 0])]))
    near(alone, new=0.0, old=PAST)


def test_er_ace_pushes_no_class_that_is_not_in_the_batch():
    logits = torch.tensor(NEW, dtype=torch.float64, requires_grad=True)
    terms = ErAce()(step(group(logits, [0, 1]), [nobody()]))
    sum(terms.values()).backward()
    assert (logits.grad[:, 2] == 0).all()
    assert (logits.grad[:, :2] != 0).all()
    assert present(group(NEW, [2, -1])).tolist() == [False, False, True]


def test_der_is_the_mean_squared_gap_over_what_is_stored():
    near(Der(alpha=0.5)(step(old=[group(OLD, [2, 1, 0], STORED)])), new=FRESH, stored=0.5 * GAP)


def test_der_plus_takes_labels_from_the_second_draw():
    first, second = group(OLD, [-1, -1, -1], STORED), group(OLD, [2, 1, 0])
    terms = DerPlus(alpha=0.5, beta=2.0)(step(old=[first, second]))
    near(terms, new=FRESH, stored=0.5 * GAP, old=2 * PAST)


def test_lwf_is_over_old_classes_only():
    before = torch.tensor([[1.0, 0.0, 9.0], [0.0, 3.0, -9.0]], dtype=torch.float64)
    terms = Lwf(weight=0.5, temperature=2.0)(step(group(NEW, [0, 1], teacher=lambda _: before)))
    gap = (divergence([1, 0], NEW[0][:2], 2) + divergence([0, 3], NEW[1][:2], 2)) / 2
    near(terms, new=FRESH, teacher=0.5 * 4 * gap)


def test_lwf_of_a_teacher_with_fewer_classes_is_over_those():
    before = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    told = step(group(NEW, [0, 1], teacher=lambda _: before), known=(True, True, True))
    gap = (divergence([1, 0], NEW[0][:2], 2) + divergence([0, 3], NEW[1][:2], 2)) / 2
    near(Lwf()(told), new=FRESH, teacher=4 * gap)


def test_cfed_is_soft_cross_entropy_on_public_rows_without_the_square():
    taught = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    public = group([[0.0, 1.0, 0.0]], [-1], teacher=lambda _: taught)
    terms = Cfed(weight=0.1, temperature=2.0)(step(public=public))
    near(terms, new=FRESH, public=0.1 * divergence([1, 0, 2], [0, 1, 0], 2))
    assert Cfed(rows=7).public == 7


def test_gdumb_learns_nothing_as_it_comes():
    logits = torch.tensor(NEW, requires_grad=True)
    terms = GDumb()(step(group(logits, [0, 1])))
    assert terms["new"].item() == 0
    terms["new"].backward()
    assert (logits.grad == 0).all()


def test_follow_adds_the_teacher_on_remembered_rows():
    taught = torch.tensor(OLD, dtype=torch.float64) + 2
    old = group(OLD, [2, 1, 0], teacher=lambda _: taught)
    terms = Follow(Er(), 0.1)(step(old=[old]))
    near(terms, new=2 / 5 * FRESH, old=3 / 5 * PAST, teacher=0.4)


def test_follow_uses_new_rows_while_nothing_is_remembered():
    taught = torch.tensor(NEW, dtype=torch.float64) + 3
    terms = Follow(Er(), 0.1)(step(group(NEW, [0, 1], teacher=lambda _: taught), [nobody()]))
    near(terms, new=FRESH, old=0.0, teacher=0.9)


def test_follow_passes_on_what_is_asked_of_the_other():
    assert Follow(DerPlus(rows=3)).draws == (3, 3)
    assert Follow(GDumb(epochs=4)).afresh
    assert Follow(GDumb(epochs=4)).epochs == 4
    assert not hasattr(Follow(lambda step: {}), "draws"), "so one draw as large as the batch"
    assert copy.deepcopy(Follow(Er(3), 0.2)) == Follow(Er(3), 0.2)


def test_only_one_term_is_kept():
    terms = Only("public", Cfed(rows=9))(step())
    assert set(terms) == {"public"}
    assert Only("public", Cfed(rows=9)).public == 9
    assert Only("public", Cfed()).draws == ()


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [FineTune(), Er(), ErAce(), Der(0.5), Lwf(), Cfed(), Follow(Der(0.5), 0.3)],
    ids=lambda made: type(made).__name__,
)
def test_gradients_are_those_of_the_values(made):
    random = torch.Generator().manual_seed(1)
    taught = torch.randn(3, 3, generator=random, dtype=torch.float64)

    def loss(new, old, public):
        teacher = lambda inputs: taught[: len(inputs)]  # noqa: E731
        told = step(
            group(new, [0, 1], teacher=teacher),
            [group(old, [2, -1, 0], STORED, teacher)],
            group(public, [-1, -1], teacher=teacher),
        )
        return sum(made(told).values())

    given = [
        torch.randn(n, 3, generator=random, dtype=torch.float64, requires_grad=True)
        for n in (2, 3, 2)
    ]
    assert torch.autograd.gradcheck(loss, given)


def flat(loss, weights):
    return torch.cat([p.flatten() for p in torch.autograd.grad(loss, weights, retain_graph=True)])


@pytest.mark.parametrize("seed", range(8))
def test_a_gem_has_the_projected_gradient(seed):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    weights = list(module.parameters())
    inputs = torch.randn(6, 2, dtype=torch.float64)
    # The same inputs with other labels: what helps the new rows harms the old ones.
    known = torch.randint(0, 3, (6,))
    others = (known + 1) % 3 if seed % 2 else known
    logits = module(torch.cat([inputs, inputs]))
    new, old = group(logits[:6], known.tolist()), group(logits[6:], others.tolist())
    g, r = flat(labels(new), weights), flat(labels(old), weights)
    wanted = g - (g @ r) / (r @ r) * r if g @ r < 0 else g
    terms = AGem()(step(new, [old], weights=weights))
    found = flat(sum(terms.values()), weights)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert bool(g @ r < 0) == bool(seed % 2)
    assert (found @ r).item() >= -1e-12


def test_a_gem_without_remembered_or_labelled_rows_is_the_plain_gradient():
    module = nn.Linear(2, 3).double()
    logits = module(torch.ones(2, 2, dtype=torch.float64))
    weights = list(module.parameters())
    assert set(AGem()(step(group(logits, [0, 1]), [nobody()], weights=weights))) == {"new"}
    blind = AGem()(step(group(logits, [0, 1]), [group(logits, [-1, -1])], weights=weights))
    torch.testing.assert_close(
        flat(sum(blind.values()), weights), flat(labels(group(logits, [0, 1])), weights)
    )
    mute = AGem()(step(group(logits, [-1, -1]), [group(logits, [0, 1])], weights=weights))
    assert sum(mute.values()).item() == 0


# --- what was not known when a row came ----------------------------------------------------------


@pytest.mark.parametrize("made", [Der(0.3), DerPlus(0.3, 0.7)], ids=["der", "der++"])
def test_classes_that_come_change_the_loss_of_old_rows_by_not_one_bit(made):
    random = torch.Generator().manual_seed(3)
    said = torch.randn(5, 3, generator=random)
    stored = torch.randn(5, 3, generator=random)
    wide = torch.cat([said, torch.randn(5, 4, generator=random)], dim=1).requires_grad_()
    padded = torch.cat([stored, torch.full((5, 4), NAN)], dim=1)
    narrow = Group(said, torch.full((5,), -1), said, stored)
    grown = Group(said, torch.full((5,), -1), wide, padded)
    mute = Group(said[:0], torch.empty(0, dtype=torch.int64), said[:0], said[:0])
    terms = [
        made(Step(mute, (old,) * len(made.draws), mute, torch.ones(7, dtype=torch.bool)))
        for old in (narrow, grown)
    ]
    assert terms[0]["stored"].item() == terms[1]["stored"].item()
    terms[1]["stored"].backward()
    assert wide.grad.isfinite().all()
    assert (wide.grad[:, 3:] == 0).all()


def test_rows_without_stored_logits_pull_at_nothing():
    logits = torch.tensor(OLD, requires_grad=True)
    loss = logit_gap(group(logits, [0, 0, 0]), torch.full((3, 3), NAN))
    assert loss.item() == 0
    loss.backward()
    assert (logits.grad == 0).all()


def test_soft_gap_leaves_out_rows_that_lack_a_class():
    said = torch.tensor(NEW, dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([[1.0, 0.0, NAN], [0.0, 3.0, 1.0]], dtype=torch.float64)
    every = torch.ones(3, dtype=torch.bool)
    loss = soft_gap(group(said, [0, 1]), wanted, every, 1.0)
    assert loss.item() == pytest.approx(divergence([0, 3, 1], NEW[1], 1))
    loss.backward()
    assert said.grad.isfinite().all()
    assert (said.grad[0] == 0).all()


@pytest.mark.parametrize("size", [200.0, -200.0])
@pytest.mark.parametrize("made", [Lwf(), Cfed()], ids=["lwf", "cfed"])
def test_large_logits_stay_finite(made, size):
    said = (size * torch.eye(3)[:2]).requires_grad_()
    teacher = lambda inputs: -size * torch.eye(3)[: len(inputs)]  # noqa: E731
    told = group(said, [0, 1], teacher=teacher)
    loss = sum(made(step(told, public=told, known=(True, True, True))).values())
    assert loss.isfinite()
    loss.backward()
    assert said.grad.isfinite().all()


# --- teachers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [Lwf(), Cfed(), Follow(Er())], ids=["lwf", "cfed", "follow"])
def test_a_teacher_is_in_eval_mode_and_gets_no_gradient(made):
    modes = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(2, 3)

        def forward(self, inputs):
            modes.append((self.training, self.drop.training, torch.is_grad_enabled()))
            return self.head(self.drop(inputs))

    module = Watched()
    module.train()
    teacher = Frozen(module)
    said = torch.randn(2, 3, requires_grad=True)
    told = group(said, [0, 1], teacher=teacher)
    sum(made(step(told, [told], told)).values()).backward()
    assert set(modes) == {(False, False, False)}
    assert module.training
    assert module.drop.training
    assert all(weight.grad is None for weight in module.parameters())


def test_a_plain_function_that_teaches_gets_no_gradient_either():
    weight = torch.ones(3, requires_grad=True)
    said = torch.randn(2, 3, requires_grad=True)
    told = group(said, [0, 1], teacher=lambda inputs: weight.expand(len(inputs), 3))
    for made in (Lwf(), Cfed(), Follow(Er())):
        sum(made(step(told, [told], told)).values()).backward()
    assert weight.grad is None


def test_what_a_teacher_does_not_know_is_not_a_number():
    narrow = group(NEW, [0, 1], teacher=lambda inputs: torch.ones(len(inputs), 2).double())
    taught = narrow.taught()
    assert taught[:, :2].eq(1).all()
    assert taught[:, 2].isnan().all()
    assert group(NEW, [0, 1]).taught().isnan().all()


# --- nothing to learn from -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_empty_groups_and_rows_without_labels_give_a_finite_zero(name):
    made = objective(name)
    module = nn.Linear(2, 3).double()
    logits = module(torch.ones(2, 2, dtype=torch.float64))
    draws = [nobody() for _ in made.draws]
    told = step(group(logits, [-1, -1]), draws, weights=list(module.parameters()))
    loss = sum(made(told).values())
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad.eq(0).all() for weight in module.parameters())


# --- names ---------------------------------------------------------------------------------------


def test_the_catalogue_has_the_same_names():
    assert set(catalog.OBJECTIVES) == set(OBJECTIVES)
    assert set(catalog.known("objectives")) == set(OBJECTIVES)


def test_an_unknown_name_or_option_is_told():
    with pytest.raises(FedistillError, match=r'unknown objective "dre"; did you mean "der"'):
        objective("dre")
    with pytest.raises(FedistillError, match=r"objective der: .*gamma"):
        objective("der", gamma=1)
    own = Er(3)
    assert objective(own) is own
    assert objective("er", rows=4) == Er(4)


@pytest.mark.parametrize("made", [Er, Der, DerPlus, ErAce])
def test_an_objective_is_short_to_read(made):
    source, _ = inspect.getsourcelines(made)
    text = inspect.getsource(made)
    docs = sum(len(part.splitlines()) for part in text.split('"""')[1::2])
    assert len(source) - docs <= 20


def test_every_objective_works_with_a_model():
    build = partial(models.Linear, 2, 3)
    for name in OBJECTIVES:
        made = objective(name)
        module = build()
        inputs = torch.randn(4, 2)
        said = module(inputs)
        told = Group(inputs, torch.tensor([0, 1, 2, 0]), said, said.detach(), None)
        known = torch.ones(3, dtype=torch.bool)
        terms = made(Step(told, (told,) * len(made.draws), told, known, list(module.parameters())))
        assert all(isinstance(key, str) and value.dim() == 0 for key, value in terms.items())
        sum(terms.values()).backward()


def test_the_module_says_what_it_offers():
    for name, made in OBJECTIVES.items():
        assert (made.__doc__ or "").strip(), name
    assert objectives.LOWEST < -1e9


# --- steady --------------------------------------------------------------------------------------


def test_steady_frees_labels_of_what_a_step_shows_more_than_the_memory():
    """New rows are of classes 0 0, remembered ones of 2 1 0 0: shares 1 0 0 and 1/2 1/4 1/4."""
    old = group([*OLD, [0.0, 0.0, 0.0]], [2, 1, 0, 0], [*STORED, [NAN] * 3])
    new = group(NEW, [0, 0])
    shown = [(1 + 0.5) / 2, 0.125, 0.125]
    more = [math.log(shown[c] / q) for c, q in enumerate((0.5, 0.25, 0.25))]
    assert excess(new, old, 1.0).tolist() == pytest.approx(more)

    def adjusted(rows, known):
        moved = [[x + m for x, m in zip(row, more, strict=True)] for row in rows]
        return sum(entropy(row, label) for row, label in zip(moved, known, strict=True)) / len(
            known
        )

    terms = Steady(alpha=0.5, beta=1.0)(step(new, [old]))
    near(
        terms,
        new=adjusted(NEW, [0, 0]),
        stored=0.5 * GAP,
        old=adjusted([*OLD, [0.0] * 3], [2, 1, 0, 0]),
    )


def test_steady_adjusts_nothing_where_shares_agree_or_nothing_is_remembered():
    alike = group(NEW, [0, 1])
    assert excess(alike, group(NEW, [1, 0]), 3.0).tolist() == pytest.approx([0, 0, 0])
    assert excess(alike, nobody(), 1.0).tolist() == [0, 0, 0]
    assert excess(group(NEW, [-1, -1]), alike, 1.0).tolist() == [0, 0, 0]
    near(Steady()(step(old=[nobody()])), new=FRESH, stored=0.0, old=0.0)


def test_steady_counts_a_class_that_is_not_there_as_half_a_row():
    more = excess(group(NEW, [0, 0]), group(OLD, [1, 1, 1]), 1.0)
    least = 0.5 / 5
    assert more.tolist() == pytest.approx(
        [math.log(0.5 / least), math.log(0.5), math.log(least / least)]
    )
