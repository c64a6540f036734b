"""Epsilon of what was done: privacy loss distributions, as dp-accounting computes them.

The one number that is reported and held against a limit is :func:`epsilon`. It depends on the
events and on nothing else, so it is computed anew from the ledger and never carried along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from typing import Any

from fedistill.errors import BudgetExceeded
from fedistill.privacy.events import Claim, Event, Gaussian, Sampled, Spending
from fedistill.privacy.rdp import upper_bound

__all__ = ["ACCOUNTANT", "RELATIONS", "calibrate", "epsilon", "quick_epsilon", "upper_bound"]

ACCOUNTANT = f"dp-accounting {metadata.version('dp-accounting')} PLD"
"""Who computes epsilon; stands beside every epsilon that is shown."""

RELATIONS = ("add-remove", "replace-one")
"""Neighbouring data sets: one unit more or less, or one unit exchanged for another."""

FINE, COARSE = 1e-4, 1e-3
"""Grids of the privacy loss. Losses are rounded so that epsilon is never too small on any."""
SPARSE = {FINE: 2e-3, COARSE: 1e-2}
"""Grids where losses are large, or points are dear (rows that lie there several times)."""

NO_PROTECTION = 1000.0
"""An epsilon that is as good as none."""


@lru_cache(maxsize=4096)
def epsilon(spending: Spending, delta: float, relation: str = "add-remove") -> float:
    """The privacy loss of these events together.

    Privacy loss distributions (Koskela, Jalko and Honkela 2020, arXiv 1906.03049; connect the
    dots: Doroshenko et al. 2022, arXiv 2207.04380), rounded towards too large. Events are merged
    first: all Gaussians are one, and steps of one kind are composed at once.

    Args:
        spending: what was done to the costliest unit.
        delta: probability with which epsilon need not hold.
        relation: one of :data:`RELATIONS`. Numbers of different relations do not compare.

    Returns:
        0 for no events; infinity where an event has no noise, or claims use all of delta up.
        Beyond 1000 a bound: the exact number would take minutes, for nothing.

    Raises:
        ValueError: delta not in (0, 1), an unknown relation, or one that cannot be computed
            (replace-one of rows that lie there several times).
    """
    return _on_grid(spending, delta, relation, FINE)


@lru_cache(maxsize=4096)
def quick_epsilon(spending: Spending, delta: float, relation: str = "add-remove") -> float:
    """The same on a coarser grid: ten times as quick, never less, some 0.1 % more.

    It is per cents more where epsilon is far below 1.

    For searches and for tables with many rows; what is held against a limit is :func:`epsilon`.
    """
    return _on_grid(spending, delta, relation, COARSE)


def _on_grid(spending: Spending, delta: float, relation: str, grid: float) -> float:
    _check(spending, delta, relation)
    parts = _merged(spending)
    if not parts:
        return 0.0
    if any(_hopeless(event) for event, _ in parts):
        return math.inf
    bound = upper_bound(spending, delta)
    if NO_PROTECTION < bound < math.inf:
        return bound if relation == "add-remove" else math.inf
    if bound > 40:
        grid = SPARSE[grid]
    total = None
    for event, times in parts:
        losses = _distribution(event, times, relation, grid)
        total = losses if total is None else total.compose(losses)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))


def _check(spending: Spending, delta: float, relation: str) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, found {delta:g}: take 1e-5, for example")
    if relation not in RELATIONS:
        raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, found {relation!r}")
    if relation == "replace-one" and any(
        isinstance(event, Sampled) and event.copies > 1 for event, _ in spending
    ):
        raise ValueError(
            "replace-one is not known for rows that lie there several times: take add-remove, or "
            "leave duplicates out"
        )


def _merged(spending: Spending) -> list[tuple[Event, int]]:
    """Events without those that cost nothing, and all Gaussians as one: precisions add up."""
    precision, parts = 0.0, []
    for event, times in spending:
        if isinstance(event, Sampled) and event.rate >= 1 and event.copies == 1:
            event = Gaussian(event.sigma)
        if isinstance(event, Gaussian) and event.sigma > 0:
            precision += times / event.sigma**2
        elif not _free(event):
            parts.append((event, times))
    if precision > 0:
        parts.append((Gaussian(precision**-0.5), 1))
    return parts


def _free(event: Event) -> bool:
    if isinstance(event, Claim):
        return event.epsilon == event.delta == 0
    return isinstance(event, Sampled) and event.rate == 0


def _hopeless(event: Event) -> bool:
    """No noise, or losses too large for the grid: no epsilon that anyone would accept."""
    if isinstance(event, Claim):
        return event.epsilon > NO_PROTECTION / 2 or event.delta >= 1
    copies = event.copies if isinstance(event, Sampled) else 1
    return event.sigma == 0 or (copies > 1 and (copies / event.sigma) ** 2 / 2 > NO_PROTECTION)


def _distribution(event: Event, times: int, relation: str, grid: float) -> Any:
    """Privacy losses of one event, ``times`` times."""
    losses = _once(event, relation, grid)
    return losses.self_compose(times) if times > 1 else losses


@lru_cache(maxsize=32)  # a few megabytes each
def _once(event: Event, relation: str, grid: float) -> Any:
    # It takes a second to import, which is too much for a site that only has to open its ledger.
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import common, privacy_loss_distribution

    if isinstance(event, Claim):
        claim = common.DifferentialPrivacyParameters(event.epsilon, event.delta)
        return privacy_loss_distribution.from_privacy_parameters(claim, grid)
    if isinstance(event, Sampled) and event.copies > 1:
        drawn = range(event.copies + 1)
        return privacy_loss_distribution.from_mixture_gaussian_mechanism(
            event.sigma,
            sensitivities=list(drawn),
            sampling_probs=[_binomial(event.copies, k, event.rate) for k in drawn],
            value_discretization_interval=grid,
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        event.sigma,
        value_discretization_interval=grid,
        sampling_prob=event.rate if isinstance(event, Sampled) else 1.0,
        neighboring_relation=NeighboringRelation.REPLACE_ONE
        if relation == "replace-one"
        else NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


# --- how much noise ------------------------------------------------------------------------------

STEPS = 900
"""Noise multipliers of three digits in a decade: 1.00, 1.01 ... 9.99."""
LOWEST, HIGHEST = -2 * STEPS, 5 * STEPS


def calibrate(
    cost: Callable[[float], Spending],
    past: Spending,
    epsilon: float,
    delta: float,
    relation: str = "add-remove",
) -> float:
    """The least noise with which a plan stays within its budget, on top of what is spent.

    Args:
        cost: what the whole plan costs with a noise multiplier; more noise never costs more.
        past: what is spent already.
        epsilon: the most that may be spent in all.
        delta: its delta.
        relation: one of :data:`RELATIONS`.

    Returns:
        A noise multiplier of three digits; the next smaller one would be too small. The bound of
        :func:`upper_bound` is where the search begins (for add-remove, the only relation that it
        is for), and :func:`epsilon` where it ends.

    Raises:
        BudgetExceeded: no noise is enough, as ``past`` is too near to the budget or beyond it.
        ValueError: as :func:`epsilon`.
    """

    def precise(spending: Spending) -> float:
        return _precise(spending, delta, relation)

    def enough(step: int) -> bool:
        return precise(past + cost(_sigma(step))) <= epsilon

    def nearly(step: int) -> bool:
        return quick_epsilon(past + cost(_sigma(step)), delta, relation) <= epsilon

    def roughly(step: int) -> bool:
        return upper_bound(past + cost(_sigma(step)), delta) <= epsilon

    bounded = relation == "add-remove" and roughly(HIGHEST)
    if precise(past) > epsilon or not (bounded or enough(HIGHEST)):
        raise BudgetExceeded(precise(past), precise(past + cost(_sigma(HIGHEST))), epsilon)
    step = _first(roughly, LOWEST, HIGHEST) if bounded else HIGHEST
    step = _first(nearly, LOWEST, step, near=bounded)
    while not enough(step):  # hardly ever met: the coarse grid gives the larger epsilon
        step += 1
    while step > LOWEST and enough(step - 1):
        step -= 1
    return _sigma(step)


def _precise(spending: Spending, delta: float, relation: str) -> float:
    return epsilon(spending, delta, relation)


def _sigma(step: int) -> float:
    """The noise multiplier of a step: 1.00 at 0, 9.99 at 899, 10.0 at 900."""
    decade, place = divmod(step, STEPS)
    return float(f"{100 + place}e{decade - 2}")


def _first(holds: Callable[[int], bool], low: int, high: int, *, near: bool = False) -> int:
    """The first of ``low .. high`` for which it holds, as it does from there on.

    ``high`` is taken to hold. With ``near`` the search walks down from it in growing strides, as
    the answer is close.
    """
    stride = 8
    while near and high - stride > low:
        if not holds(high - stride):
            low = high - stride + 1
            break
        high, stride = high - stride, stride * 2
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high
