"""From guesses about canaries to the least epsilon that explains them.

An audit guesses which canaries were among the rows. Under (epsilon, delta)-DP nobody guesses much
better than a coin, so guesses that are too good refute a claimed epsilon. Two bounds are given.

**One run** (:func:`one_run_epsilon`; Steinke, Nasr, Jagielski, "Privacy auditing with one (1)
training run", NeurIPS 2023): ``m`` canaries, each in by its own fair coin, ``r`` guesses, ``v`` of
them right. With ``p = 1 / (1 + exp(-epsilon))`` and ``W ~ Bin(r, p)``::

    P[V >= v] <= P[W >= v] + slack(delta)

It supposes nothing about how canaries influence one another, and it is what an audit judges by.

For delta = 0 this is elementary: given the output and the coins before it, a coin is guessed right
with probability at most ``p``. For delta > 0 the smaller of two slacks counts, either of which
alone makes the bound hold:

- ``m delta / (1 + exp(epsilon))``. Given the output ``t`` and the earlier coins, coin ``i`` is
  guessed right with probability at most ``p + e_i(t)``. Let P and Q be the output's densities with
  canary ``i`` in and out, the later coins averaged over. Where "in" is guessed,
  ``e_i = (P / (P + Q) - p)+``, and its mean there is ``1/2 (1 - p)`` times the integral of
  ``(P - exp(epsilon) Q)+``, which is at most delta; likewise where "out" is guessed. So
  ``E e_i <= (1 - p) delta``. Replacing the guesses one after another by coins of bias ``p`` changes
  the probability of the event by at most ``E e_i`` each time; there are ``m`` of them.
- ``2 m delta max_i (P[W >= v - i] - P[W >= v]) / i``: Corollary 5.4 of the paper, the better one
  of the two where ``m delta`` is large. The two figures printed there (0.673 and 2.675) are tests.

**Two rates** (:func:`rates_epsilon`): epsilon >= ln((TPR - delta) / FPR), each rate by its
Clopper-Pearson bound (Nasr et al., "Adversary instantiation", 2021). The intervals suppose that
canaries are independent of one another, which canaries of one training are not quite: it is shown
beside the other bound and does not decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from fedistill.types import FloatArray

Coins = npt.NDArray[np.bool_]
"""Which canaries were in, ``[canaries]``."""

SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Of all canaries, those with the most extreme scores are guessed; so many shares are tried."""
CUTS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
"""Shares of all canaries that are called "in", each a threshold that is tried."""
HALVINGS = 40
"""Steps of a bisection: epsilon to better than 1e-9."""


@dataclass(frozen=True)
class Guesses:
    """What guessing from scores gave.

    Attributes:
        epsilon: lower bound, at the confidence that was asked for.
        ceiling: what it would have been with every guess right: no audit of this size can say more.
        made: guesses behind the bound.
        right: how many of them were right.
    """

    epsilon: float
    ceiling: float
    made: int
    right: int


# --- one run -------------------------------------------------------------------------------------


def one_run_p_value(
    made: int, right: int, epsilon: float, *, canaries: int, delta: float = 0.0
) -> float:
    """Largest probability of so many right guesses under (epsilon, delta)-DP.

    Args:
        made: guesses.
        right: right ones.
        epsilon: what is claimed.
        canaries: how many there were, those without a guess counted.
        delta: what is claimed.
    """
    bias = 1 / (1 + math.exp(-epsilon))
    tail = float(special.betainc(right, made - right + 1, bias)) if right else 1.0
    if not delta:
        return tail
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), made, bias))
    steepest = float((below / np.arange(1, right + 1)).max(initial=0.0))
    slack = canaries * delta * min(1 - bias, 2 * steepest)
    return min(1.0, tail + slack)


def one_run_epsilon(
    made: int, right: int, *, canaries: int, delta: float = 0.0, beta: float = 0.05
) -> float:
    """The largest epsilon that so many right guesses refute, with confidence 1 - ``beta``.

    >>> round(one_run_epsilon(1000, 1000, canaries=1000), 2)
    5.81
    """

    def refuted(epsilon: float) -> bool:
        found = one_run_p_value(made, right, epsilon, canaries=canaries, delta=delta)
        return found < beta

    if not made or not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low  # refuted itself, whatever happens between: the bound errs to the low side


def one_run(
    scores: FloatArray,
    included: Coins,
    *,
    delta: float = 0.0,
    beta: float = 0.05,
    shares: Sequence[float] = SHARES,
) -> Guesses:
    """The best one-run bound from scores; ``beta`` is divided by the number of shares tried.

    Half of the guesses are "in", on the highest scores, half "out", on the lowest.

    Args:
        scores: ``[canaries]``, higher where "in" is likelier.
        included: ``[canaries]``, the coins.
        delta: what is claimed.
        beta: one minus the confidence.
        shares: of all canaries, how many are guessed.
    """
    count = len(scores)
    order = np.argsort(scores, kind="stable")
    hits = included[order].astype(np.int64)
    best = Guesses(0.0, 0.0, 0, 0)
    for share in shares:
        side = int(share * count / 2)
        if not side:
            continue
        right = int(hits[count - side :].sum() + side - hits[:side].sum())
        level = beta / len(shares)
        found = one_run_epsilon(2 * side, right, canaries=count, delta=delta, beta=level)
        ceiling = one_run_epsilon(2 * side, 2 * side, canaries=count, delta=delta, beta=level)
        better = Guesses(found, 0.0, 2 * side, right) if found > best.epsilon else best
        best = Guesses(better.epsilon, max(best.ceiling, ceiling), better.made, better.right)
    return best


# --- two rates -----------------------------------------------------------------------------------


def clopper_pearson(hits: int, trials: int, beta: float) -> tuple[float, float]:
    """One-sided lower and upper bound on a probability, each with confidence 1 - ``beta``.

    >>> [round(bound, 3) for bound in clopper_pearson(0, 10, 0.05)]
    [0.0, 0.259]
    """
    misses = trials - hits
    low = float(special.betaincinv(hits, misses + 1, beta)) if hits else 0.0
    high = float(special.betaincinv(hits + 1, misses, 1 - beta)) if misses else 1.0
    return low, high


def rates_epsilon(
    caught: int, inside: int, alarms: int, outside: int, *, delta: float = 0.0, beta: float = 0.05
) -> float:
    """Lower bound on epsilon from one threshold.

    Args:
        caught: canaries that were in and are called "in".
        inside: canaries that were in.
        alarms: canaries that were out and are called "in".
        outside: canaries that were out.
        delta: what is claimed.
        beta: one minus the confidence, shared by the two rates.
    """
    if not inside or not outside:
        return 0.0
    hit_low, _ = clopper_pearson(caught, inside, beta / 2)
    _, alarm_high = clopper_pearson(alarms, outside, beta / 2)
    ratios = ((hit_low, alarm_high), (1 - alarm_high, 1 - hit_low))
    return max(
        [0.0, *(math.log((more - delta) / less) for more, less in ratios if more > delta and less)]
    )


def best_rates_epsilon(
    scores: FloatArray,
    included: Coins,
    *,
    delta: float = 0.0,
    beta: float = 0.05,
    cuts: Sequence[float] = CUTS,
) -> float:
    """The best of several thresholds; ``beta`` is divided by their number."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(included[order])
    inside = int(included.sum())
    found = [0.0]
    for cut in cuts:
        called = round(cut * len(scores))
        if called:
            caught = int(hits[called - 1])
            rates = caught, inside, called - caught, len(scores) - inside
            found.append(rates_epsilon(*rates, delta=delta, beta=beta / len(cuts)))
    return max(found)


# --- how well the scores tell ---------------------------------------------------------------------


def auc(scores: FloatArray, included: Coins) -> float:
    """Probability that a canary that was in scores above one that was not; 0.5 is a guess."""
    inside = int(included.sum())
    outside = len(scores) - inside
    if not inside or not outside:
        return 0.5
    ranks = stats.rankdata(scores)
    return float((ranks[included].sum() - inside * (inside + 1) / 2) / (inside * outside))


def roc(scores: FloatArray, included: Coins) -> tuple[FloatArray, FloatArray]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1).

    Equal scores are told apart by no threshold: only the last of them is a point.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(included[order])[last]
    called = np.flatnonzero(last) + 1
    inside = max(int(included.sum()), 1)
    outside = max(len(scores) - int(included.sum()), 1)
    false = np.concatenate([[0.0], (called - hits) / outside])
    true = np.concatenate([[0.0], hits / inside])
    return false, true


def tpr_at(scores: FloatArray, included: Coins, fpr: float = 0.01) -> float:
    """Share of the canaries inside that are caught at no more than so many false alarms."""
    false, true = roc(scores, included)
    return float(true[false <= fpr + 1e-12].max())
