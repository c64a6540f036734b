"""Noise on the mean of what clients say, at a trusted server: a client hides among hundreds.

K clients share a probability vector for each of m proxy rows, and the server publishes their mean
with Gaussian noise. In place of one client's vectors any other vectors might stand (replace-one, K
is known to all). Two probability vectors are at most sqrt(2) apart, the 2-norm over m rows is at
most sqrt(2 m), and the mean moves by a K-th of that:

    sensitivity = sqrt(2 m) / K

Noise of standard deviation sigma * sensitivity on every value is one Gaussian event of multiplier
sigma for each round, however many rows and classes there are. Projecting the noisy mean onto the
simplex, sharpening it and teaching a student on it is post-processing.

What it hides, and from whom: whether a client took part, and all that it said, from the other
clients and from the public. The server sees everything. For a client's own records it gives no
bound that is worth printing, since its model, which is not private, may change on every row when
one record does.

It needs hundreds of clients: for one round of 100 rows and epsilon 1 at delta 1e-5 the noise per
probability is 5.28 among 10 clients and 0.053 among 1,000. Below :data:`MIN_CLIENTS` it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedistill.aggregate.basics import softmax
from fedistill.errors import FedistillError
from fedistill.privacy.entropy import numpy_generator
from fedistill.privacy.events import Gaussian, Spending
from fedistill.types import FloatArray, IntArray, Logits, Probs, Rows

MIN_CLIENTS = 100
RELATION = "replace-one"
"""What a report says of the neighbours; the unit is the client."""
TOLERANCE = 1e-6


def sensitivity(clients: int, rows: int) -> float:
    """How far one client can move the mean of one round, in the 2-norm over rows and classes.

    Args:
        clients: K, those whose answers the mean is of.
        rows: m, proxy rows of the round.
    """
    return math.sqrt(2 * rows) / clients


def noise_std(clients: int, rows: int, sigma: float) -> float:
    """Standard deviation of the noise on each probability of one round.

    Args:
        clients: as :func:`sensitivity`.
        rows: as :func:`sensitivity`.
        sigma: noise multiplier.
    """
    return sigma * sensitivity(clients, rows)


def cost(sigma: float, rounds: int = 1) -> Spending:
    """What some rounds cost each client.

    The multiplier counts in distances of replace-one already, so epsilon of it is
    ``accounting.epsilon(cost, delta)`` as it stands: ``relation="replace-one"`` there is for
    events that count in what one unit adds, and would double the distance once more.
    """
    return Spending.of(Gaussian(sigma), rounds)


def check_clients(clients: int) -> None:
    """Refuse a mean of so few that it would be noise.

    Raises:
        FedistillError: fewer than :data:`MIN_CLIENTS`.
    """
    if clients < MIN_CLIENTS:
        raise FedistillError(
            f"central-gauss: expected the mean of at least {MIN_CLIENTS} clients, found {clients}, "
            "among whom the noise would drown it: take dpsgd or dp-head at the clients"
        )


def describe(clients: int, rows: int, sigma: float) -> str:
    """One sentence of what the noise does to the targets."""
    std = noise_std(clients, rows, sigma)
    verdict = (
        "more than the targets can carry: expect students that learn little"
        if std > 0.3
        else "expect less accurate students than without it"
        if std > 0.03
        else "little beside what clients differ by"
    )
    return (
        f"central-gauss: noise of standard deviation {std:.2g} on every probability "
        f"(mean of {clients} clients, {rows} rows a round), {verdict}"
    )


def project_to_simplex(values: FloatArray) -> Probs:
    """The nearest probability vector to each row, in the 2-norm.

    Sorted descending as u, the row is shifted by theta = (u_1 + ... + u_k - 1) / k for the largest
    k with u_k > theta, and cut off at 0. Duchi et al., ICML 2008.

    Args:
        values: ``[..., classes]``, finite.

    Returns:
        Of the same shape, float64, rows of sum 1.
    """
    table = np.asarray(values, dtype=np.float64)
    table = table - table.max(axis=-1, keepdims=True)  # a shift changes nothing but roundings
    sorted_ = -np.sort(-table, axis=-1)
    ranks = np.arange(1, table.shape[-1] + 1)
    thetas = (np.cumsum(sorted_, axis=-1) - 1) / ranks
    last = np.count_nonzero(sorted_ > thetas, axis=-1)[..., None] - 1
    probs: Probs = np.maximum(table - np.take_along_axis(thetas, last, axis=-1), 0.0)
    probs /= probs.sum(axis=-1, keepdims=True)
    return probs


def noisy_mean(probs: Probs, sigma: float, random: np.random.Generator | None = None) -> Probs:
    """Mean over clients with noise, as probabilities again.

    Args:
        probs: ``[clients, rows, classes]``, each row a probability vector: the bound rests on it.
        sigma: noise multiplier.
        random: of the noise; None: from the operating system, as it must be outside of tests.

    Returns:
        ``[rows, classes]`` float64.

    Raises:
        FedistillError: too few clients, or rows that are no probabilities.
    """
    said = np.asarray(probs, dtype=np.float64)
    if said.ndim != 3:
        raise FedistillError(
            f"central-gauss: expected probabilities [clients, rows, classes], found shape "
            f"{list(said.shape)}: stack what the clients said"
        )
    clients, rows, _ = said.shape
    check_clients(clients)
    # Written so that NaN fails too: no comparison with it is true.
    sums = said.sum(axis=2)
    if said.size and not (said.min() >= 0 and np.abs(sums - 1).max() <= TOLERANCE):
        raise FedistillError(
            "central-gauss: expected rows of probabilities that sum to 1, found others: the bound "
            "on what a client can move rests on it, so refuse the upload at the door"
        )
    if not rows:
        return np.empty(said.shape[1:])
    random = random or numpy_generator()
    noise = random.normal(0.0, noise_std(clients, rows, sigma), said.shape[1:])
    return project_to_simplex(said.mean(axis=0) + noise)


@dataclass(frozen=True)
class NoisyMean:
    """The rule ``mean`` with noise: what a server publishes in place of it.

    Every client counts alike, whatever weight it is given: a weight that depends on what clients
    say would let one of them move the others' share, and the bound would be wrong.

    Args:
        sigma: noise multiplier of every round.
    """

    sigma: float

    def __call__(self, logits: Logits, weights: FloatArray) -> Probs:
        """Noisy mean of ``logits [clients, rows, classes]``, ``[rows, classes]``."""
        del weights
        return noisy_mean(softmax(logits), self.sigma)


class CentralNoise:
    """The server's side of the mechanism: a rule that has to be paid for before it combines.

    It speaks to an account as a :class:`fedistill.privacy.learner.Private` learner does; its units
    are the clients.

    Args:
        clients: ids of all that are enrolled.

    Raises:
        FedistillError: too few of them.
    """

    def __init__(self, clients: Sequence[str]) -> None:
        check_clients(len(clients))
        self.clients = tuple(clients)
        self.members = Rows(np.zeros((len(clients), 1)), np.zeros(len(clients), dtype=np.int64))
        self._sigma: float | None = None

    def quote(self, rows: Rows, asked: IntArray) -> Callable[[float], Spending]:
        """One Gaussian event a round, however many rows are asked."""
        del rows, asked
        return cost

    def allow(self, sigma: float) -> None:
        """The next mean, once, with this much noise."""
        self._sigma = sigma

    def units(self, rows: Rows) -> tuple[bytes, ...]:
        """The clients."""
        del rows
        return tuple(name.encode() for name in self.clients)

    def __call__(self, logits: Logits, weights: FloatArray) -> Probs:
        """Noisy mean of ``logits [clients, rows, classes]``, ``[rows, classes]``.

        Raises:
            FedistillError: it was not paid for, or too few clients answered.
        """
        sigma, self._sigma = self._sigma, None
        if sigma is None:
            raise FedistillError("central-gauss: expected a charged round, found none: charge it")
        return NoisyMean(sigma)(logits, weights)
