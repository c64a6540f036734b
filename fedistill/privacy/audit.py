"""One audit of one client's training: canaries in, predictions out, and what they give away.

The client's learner is trained as in a run, on its own rows and on those canaries whose coin said
"in"; a second one, on its own rows alone, is what predictions are compared with. Both are made for
the audit and thrown away, and so is the ledger that charges them. Nothing is absorbed: soft targets
are public, and would only add noise to what an attacker sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy import special
from torch import nn

from fedistill.aggregate.rules import softmax
from fedistill.distill.learner import Learner
from fedistill.privacy import bounds
from fedistill.privacy.account import Account, Step
from fedistill.privacy.attacks import ATTACKS, LabelMix, label_mix
from fedistill.privacy.bounds import Coins
from fedistill.privacy.canaries import Canaries, copied, mixed, planted
from fedistill.privacy.learner import Answering, Private
from fedistill.privacy.tap import CountTap, Tap
from fedistill.privacy.terms import Terms
from fedistill.seeding import derive, generator
from fedistill.settings import PrivacySettings
from fedistill.types import FloatArray, IntArray, Logits, Probs, Rows

CURVE = 60
"""Points of a curve that are kept."""
ENOUGH = 0.95
"""Noise below this share of what was charged, chance allowed for, fails whatever canaries say."""
DOUBT = 1e-4
"""Probability that noise as it was charged is taken for less by chance."""
FLOOR = 1e-6
"""Smallest probability of which a logarithm is taken."""


@runtime_checkable
class Overheard(Protocol):
    """A learner whose noisy updates can be listened to: DP-SGD.

    ``listener`` is called once a noisy step, with the module: each weight holds the noisy mean
    gradient in ``grad``, and has not moved yet.
    """

    listener: Callable[[nn.Module], None] | None
    module: nn.Module
    privacy: PrivacySettings


@runtime_checkable
class Counting(Protocol):
    """A committee whose noisy counts can be listened to.

    ``listener`` is called with numbers of proxy rows and their noisy counts ``[rows, classes]``.
    """

    listener: Callable[[IntArray, FloatArray], None] | None

    def answered(self, asked: IntArray) -> object:
        """Which of these proxy rows have an answer."""
        ...


@dataclass(frozen=True, eq=False)
class Subject:
    """What is audited.

    Attributes:
        make: makes the client's learner anew.
        rows: the client's own rows.
        proxy: ``[m, ...]`` proxy rows.
        classes: how many there are.
        rounds: in which own rows are trained on.
        terms: of the client; None: nothing is private.
        per_round: proxy rows asked in a round; 0: all.
        told: from probabilities ``[rows, classes]`` to what leaves the client.
    """

    make: Callable[[], Learner]
    rows: Rows
    proxy: FloatArray
    classes: int
    rounds: int
    terms: Terms | None = None
    per_round: int = 0
    told: Callable[[Probs], Probs] = field(default=lambda probs: probs)


@dataclass(frozen=True)
class Attack:
    """What one attack on one view found.

    Attributes:
        view: ``model``, ``proxy`` (predictions on proxy rows alone), ``updates`` or ``counts``.
        name: of the score.
        guesses: the one-run bound.
        rates: the bound from two rates, which supposes independent canaries.
        auc: 0.5 is a guess.
        tpr: share of the canaries caught at 1 % false alarms.
        curve: pairs of false and true positive rate.
    """

    view: str
    name: str
    guesses: bounds.Guesses
    rates: float
    auc: float
    tpr: float
    curve: tuple[tuple[float, float], ...]

    def facts(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "view": self.view,
            "attack": self.name,
            "epsilon_one_run": self.guesses.epsilon,
            "ceiling": self.guesses.ceiling,
            "guesses": self.guesses.made,
            "right": self.guesses.right,
            "epsilon_rates": self.rates,
            "auc": self.auc,
            "tpr_at_1_percent": self.tpr,
            "curve": [list(point) for point in self.curve],
        }


@dataclass(frozen=True)
class Audit:
    """What one audit found.

    Attributes:
        canaries: how many.
        included: how many were in.
        attacks: one for each score and view; their bounds hold together.
        mix: how well the label mix can be told from predictions on proxy rows.
        sigma: noise multiplier of the training; None: it has none.
        noise: the same as measured in what the mechanism released; None: not measured.
        draws: independent draws behind that measurement.
        spent: epsilon of this training as its own ledger composed it; infinite without terms.
    """

    canaries: int
    included: int
    attacks: tuple[Attack, ...]
    mix: LabelMix
    sigma: float | None
    noise: float | None
    draws: int
    spent: float

    @property
    def quiet(self) -> bool:
        """Whether there is less noise than was charged, beyond any doubt."""
        if self.noise is None or not self.sigma:
            return False
        doubt = float(special.chdtri(self.draws, 1 - DOUBT)) / self.draws
        return self.noise < ENOUGH * self.sigma * math.sqrt(doubt)

    @property
    def epsilon(self) -> float:
        """The lower bound: the best of all attacks."""
        return max(attack.guesses.epsilon for attack in self.attacks)

    @property
    def ceiling(self) -> float:
        """The most that this audit could have shown."""
        return max(attack.guesses.ceiling for attack in self.attacks)

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "canaries": self.canaries,
            "included": self.included,
            "epsilon_lower": self.epsilon,
            "ceiling": self.ceiling,
            "spent": self.spent if math.isfinite(self.spent) else None,
            "sigma": self.sigma,
            "noise_measured": self.noise,
            "noise_draws": self.draws,
            "label_mix_error": self.mix.error,
            "label_mix_guess": self.mix.guess,
            "attacks": [attack.facts() for attack in self.attacks],
        }


def audit_once(
    subject: Subject, *, canaries: int, seed: int, delta: float, beta: float = 0.05
) -> Audit:
    """Train with canaries and without, and see what can be told.

    Args:
        subject: what is audited.
        canaries: how many.
        seed: of canaries, coins and all that is public. Noise is never derived from it.
        delta: of the claim.
        beta: one minus the confidence with which all bounds hold together.

    Raises:
        BudgetExceeded: the terms do not allow the training at all.
    """
    answers = isinstance(subject.make(), Answering)
    made = (copied if answers else mixed)(canaries, subject.proxy, subject.classes, seed)
    rows = planted(subject.rows, made, seed)
    with_, tap, account = _train(subject, rows, made, seed, listen=True)
    without, _, _ = _train(subject, subject.rows, made, seed)
    scores = _scores(subject, made, with_, without, tap, answers=answers)
    level = beta / len(scores)
    attacks = tuple(
        _attack(*key, found, made.included[which], delta, level)
        for key, (found, which) in scores.items()
    )
    mix = label_mix(softmax(without.proxy[-1]), subject.rows.labels, subject.classes)
    return Audit(
        canaries=len(made),
        included=int(made.included.sum()),
        attacks=attacks,
        mix=mix,
        sigma=None if account is None else account.sigma,
        noise=None if tap is None else tap.noise,
        draws=0 if tap is None else tap.draws,
        spent=math.inf if account is None else account.spent(),
    )


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an attacker sees of one training, an entry a round.

    Attributes:
        model: logits on all canaries; empty where the model answers about proxy rows only.
        proxy: what was last told about each proxy row, as logits; 0 before it was asked.
    """

    model: list[Logits]
    proxy: list[Logits]


def _train(
    subject: Subject, rows: Rows, canaries: Canaries, seed: int, *, listen: bool = False
) -> tuple[Outcome, Tap | CountTap | None, Account | None]:
    """The rounds of a run in which own rows are trained on."""
    learner = subject.make()
    answers = isinstance(learner, Answering)
    account = None if subject.terms is None else Account(subject.terms)
    tap = _tapped(subject, learner, canaries, rows) if listen else None
    outcome = Outcome([], [])
    known = np.zeros((len(subject.proxy), subject.classes))
    for number in range(1, subject.rounds + 1):
        asked = _asked(subject, number, seed)
        if account is not None:
            assert isinstance(learner, Private)
            account.pay(Step("audit", number, _left(subject, number), asked), learner, rows)
        if tap is not None and account is not None:
            tap.sigma = account.sigma or 0.0
        learner.fit(rows, seed=derive(seed, "audit", number))
        said = (
            learner.answer(asked)
            if isinstance(learner, Answering)
            else learner.predict(subject.proxy[asked])
        )
        known = known.copy()
        known[asked] = _told(subject, np.asarray(said))
        outcome.proxy.append(known)
        if not answers:
            outcome.model.append(learner.predict(canaries.rows.inputs))
    return outcome, tap, account


def _left(subject: Subject, number: int) -> int:
    """Private rounds that the run has planned for, this one included."""
    planned = subject.rounds if subject.terms is None else subject.terms.rounds
    return max(planned, subject.rounds) - number + 1


def _asked(subject: Subject, number: int, seed: int) -> IntArray:
    """The proxy rows of a round."""
    total = len(subject.proxy)
    if not 0 < subject.per_round < total:
        return np.arange(total)
    draw = generator(seed, "asked", number)
    return np.sort(draw.choice(total, subject.per_round, replace=False))


def _told(subject: Subject, logits: Logits) -> Logits:
    """Logits as they leave the client."""
    return np.log(np.maximum(subject.told(softmax(logits)), FLOOR))


def _tapped(
    subject: Subject, learner: Learner, canaries: Canaries, rows: Rows
) -> Tap | CountTap | None:
    """A tap on the learner's updates or counts, where it can be listened to."""
    if isinstance(learner, Counting):
        learner.listener = counts = CountTap(canaries)
        return counts
    if not isinstance(learner, Overheard) or not isinstance(learner, Private):
        return None
    spare = subject.make()
    assert isinstance(spare, Overheard)
    tap = Tap(
        spare.module,
        subject.rows,
        canaries.rows,
        rate=learner.privacy.sample_rate,
        clip=learner.privacy.clip_norm,
        units=len(set(learner.units(rows))),
    )
    learner.listener = tap
    return tap


# --- scores --------------------------------------------------------------------------------------


def _scores(
    subject: Subject,
    canaries: Canaries,
    with_: Outcome,
    without: Outcome,
    tap: Tap | CountTap | None,
    *,
    answers: bool,
) -> Mapping[tuple[str, str], tuple[FloatArray, IntArray]]:
    """For each view and attack scores, and the numbers of the canaries that they are of."""
    near: IntArray = np.flatnonzero(canaries.proxy >= 0)
    everybody: IntArray = np.arange(len(canaries))
    views = {} if answers else {"model": (with_.model, without.model, everybody)}
    asked = [[logits[canaries.proxy[near]] for logits in one.proxy] for one in (with_, without)]
    views["proxy"] = asked[0], asked[1], near
    labels = canaries.rows.labels
    found: dict[tuple[str, str], tuple[FloatArray, IntArray]] = {
        (view, name): (score(seen, reference, labels[which]), which)
        for view, (seen, reference, which) in views.items()
        for name, score in ATTACKS.items()
    }
    if tap is not None:
        view = "counts" if isinstance(tap, CountTap) else "updates"
        found |= {(view, name): scored for name, scored in tap.scores().items()}
    return found


def _attack(
    view: str, name: str, scores: FloatArray, coins: Coins, delta: float, beta: float
) -> Attack:
    """The figures of one score."""
    scores = np.nan_to_num(scores, nan=0.0, posinf=1e9, neginf=-1e9)
    return Attack(
        view,
        name,
        bounds.one_run(scores, coins, delta=delta, beta=beta),
        bounds.best_rates_epsilon(scores, coins, delta=delta, beta=beta),
        bounds.auc(scores, coins),
        bounds.tpr_at(scores, coins),
        _thinned(*bounds.roc(scores, coins)),
    )


def _thinned(false: FloatArray, true: FloatArray) -> tuple[tuple[float, float], ...]:
    """A curve with few points, most of them where there are few false alarms."""
    places = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, CURVE)])
    index = np.searchsorted(false, places, side="right") - 1
    kept = dict.fromkeys((round(float(false[i]), 5), round(float(true[i]), 5)) for i in index)
    return tuple(kept)
