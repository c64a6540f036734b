"""Renyi differential privacy: a bound on epsilon that costs a millisecond and no import.

It is some ten per cent above what :mod:`fedistill.privacy.accounting` computes, never below: where
the bound is within the budget, nothing finer has to be computed.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fedistill.privacy.events import Claim, Event, Gaussian, Spending
from fedistill.types import FloatArray

ORDERS = np.array([*range(2, 65), 80, 96, 128, 192, 256, 384, 512])
"""Whole orders: the moments of sampled Gaussian noise are finite sums there."""


def upper_bound(spending: Spending, delta: float) -> float:
    """An epsilon that is certainly enough: Renyi differential privacy at whole orders.

    Mironov, Talwar and Zhang 2019 (arXiv 1908.10530) for sampled Gaussian noise; Balle et al.
    2020 (arXiv 1905.09982) for the step from an order to (epsilon, delta). Claims have no order:
    they are added up, and their delta is taken off first.

    Returns:
        Infinity where there is no such bound: no noise, rows that lie there several times, claims
        that use all of delta up.
    """
    claimed, left = 0.0, delta
    curve = np.zeros(len(ORDERS))
    for event, times in spending:
        if isinstance(event, Claim):
            claimed += times * event.epsilon
            left -= times * event.delta
        else:
            curve = curve + times * _curve(event)
    if left <= 0:
        return math.inf
    return claimed + _convert(curve, left)


def _convert(curve: FloatArray, delta: float) -> float:
    if not curve.any():
        return 0.0
    steps = np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float((curve + steps).min()))


@lru_cache(maxsize=4096)
def _curve(event: Event) -> FloatArray:
    """Renyi divergence at each of the orders, of one event."""
    assert not isinstance(event, Claim)
    if event.sigma == 0:
        free = not isinstance(event, Gaussian) and event.rate == 0
        return np.full(len(ORDERS), 0.0 if free else math.inf)
    if isinstance(event, Gaussian) or (event.copies == 1 and event.rate >= 1):
        return np.asarray(ORDERS / (2 * event.sigma**2))
    if event.copies > 1:
        return np.full(len(ORDERS), math.inf)
    if event.rate == 0:
        return np.zeros(len(ORDERS))
    moments = [_log_moment(int(order), event.rate, event.sigma) for order in ORDERS]
    curve: FloatArray = np.maximum(np.array(moments), 0) / (ORDERS - 1)
    return curve


def _log_moment(order: int, rate: float, sigma: float) -> float:
    """Of sum_k C(order, k) (1 - rate)^(order - k) rate^k exp(k (k - 1) / (2 sigma^2))."""
    k = np.arange(order + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, order + 1)))])
    terms = (
        factorials[order]
        - factorials[k]
        - factorials[order - k]
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + k * (k - 1) / (2 * sigma**2)
    )
    top = terms.max()
    return float(top + np.log(np.exp(terms - top).sum()))
