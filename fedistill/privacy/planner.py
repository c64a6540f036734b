"""How much noise: so much that all that is planned stays within the budget, and no more."""

from __future__ import annotations

from dataclasses import dataclass

from fedistill.errors import BudgetExceeded
from fedistill.privacy.accounting import calibrate, epsilon
from fedistill.privacy.events import Spending
from fedistill.privacy.learner import Quote
from fedistill.privacy.terms import RELATION

MOST_GROWTH = 4.0
"""Noise may be this many times what it would be with nothing spent before: beyond it what is left
of a budget buys nothing but noise."""
MAKES_UP = 1.5
"""Within a run, to make up for steps that were charged and lost, noise may grow by this factor."""


@dataclass(frozen=True)
class Projection:
    """What a run will cost.

    Attributes:
        sigma: noise multiplier of every step.
        spent: epsilon before the run.
        after: epsilon after each of its private rounds.
    """

    sigma: float
    spent: float
    after: tuple[float, ...]


def noise_for(
    forecast: Quote,
    past: Spending,
    limit: float,
    delta: float,
    relation: str = RELATION,
    *,
    before: float | None = None,
) -> float:
    """The noise multiplier with which everything that is still planned stays within the limit.

    Args:
        forecast: from noise to the cost of all that is still planned.
        past: what is spent.
        limit: largest epsilon.
        delta: at which it is meant.
        relation: which two data sets are neighbours.
        before: the noise of the run so far, which is kept while it will do.

    Raises:
        BudgetExceeded: no noise will do, or none with which anything would be learned.
    """

    def loss(spending: Spending) -> float:
        return epsilon(spending, delta, relation)

    if before is not None and loss(past + forecast(before)) <= limit:
        return before
    if not past:
        return calibrate(forecast, past, limit, delta, relation)
    fresh = before
    if fresh is None:
        fresh = calibrate(forecast, Spending(), limit, delta, relation)
    most = fresh * (MOST_GROWTH if before is None else MAKES_UP)
    if loss(past + forecast(most)) > limit:
        raise BudgetExceeded(loss(past), loss(past + forecast(fresh)), limit)
    return calibrate(forecast, past, limit, delta, relation)


def project(quote: Quote, rounds: int, past: Spending, sigma: float, delta: float) -> Projection:
    """Epsilon after each of some rounds of equal cost."""
    cost = quote(sigma)
    after = tuple(epsilon(past + cost * number, delta) for number in range(1, rounds + 1))
    return Projection(sigma, epsilon(past, delta), after)
