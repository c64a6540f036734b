"""Rules with a memory: clients that keep being wrong lose their say, and may win it back.

Both are called like any rule, with the ids of the clients beside; ids matter for memory alone.
What a client says counts with its weight, times what it knows of a row where familiarity is
shared (:func:`~fedistill.aggregate.evidence.evidence`), times its trust. A client's trust stays
as it is while it is away, and is never 0: it is bounded at exp(-10), so that a client which was
wrong under an old world, or is repaired, comes back after some rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.aggregate.chunked import Chunked
from fedistill.aggregate.evidence import evidence
from fedistill.aggregate.robust import blocks, places, row_centres, weighted_mean
from fedistill.errors import FedistillError
from fedistill.types import FloatArray, IntArray, Logits, Probs

LOWEST = -10.0
"""Log trust never falls below this."""
FEWEST = 3
"""Clients that must answer before anybody can be told to differ from most."""
DOUBT = 1e-3
"""Added to probabilities of true classes, so that a row nobody gets right says nothing."""


class _Memory:
    """What the rules of this file share: a few numbers for each client, kept between rounds."""

    reads = "chunks"
    width: int

    def __init__(self, rate: float, forget: float, prior_rows: float) -> None:
        if not rate >= 0 or not 0 <= forget <= 1 or not prior_rows >= 0:
            raise FedistillError(
                "trust: expected rate and prior_rows of at least 0 and forget from 0 to 1, found "
                f"rate {rate}, prior_rows {prior_rows}, forget {forget}"
            )
        self.rate = rate
        self.forget = forget
        self.prior_rows = prior_rows
        self.memory: dict[str, list[float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of each client, fit for JSON."""
        return {"clients": {name: list(held) for name, held in sorted(self.memory.items())}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            FedistillError: the state is another rule's.
        """
        found = {str(k): [float(x) for x in held] for k, held in state["clients"].items()}
        if any(len(held) != self.width for held in found.values()):
            raise FedistillError(
                f"trust: expected {self.width} numbers for each client, found others: resume "
                "with the rule that wrote the state"
            )
        self.memory = found

    def _held(self, clients: Sequence[str]) -> FloatArray:
        """``[clients, width]``, zeros for who is new."""
        return np.array([self.memory.get(name, [0.0] * self.width) for name in clients])

    def _keep(
        self, clients: Sequence[str], held: FloatArray, changed: npt.NDArray[np.bool_]
    ) -> None:
        for name, row, there in zip(clients, held, changed, strict=True):
            if there:
                self.memory[name] = [float(value) for value in row]

    def _claims(
        self,
        logits: Logits | Chunked,
        weights: FloatArray,
        clients: Sequence[str],
        familiarity: FloatArray | None,
        sizes: FloatArray | None,
    ) -> FloatArray:
        """What each client counts on each row before trust, ``[clients, rows]``."""
        if len(set(clients)) != len(logits) or len(clients) != len(logits):
            raise FedistillError(
                f"trust: expected {len(logits)} different client ids, one for each of the "
                f"predictions, found {list(clients)}"
            )
        if familiarity is not None and sizes is not None:
            return evidence(weights, familiarity, sizes, self.prior_rows)
        table = np.asarray(weights, dtype=np.float64)
        return table if table.ndim == 2 else np.repeat(table[:, None], logits.shape[1], axis=1)


class Trust(_Memory):
    """Linear pool with trust that falls with the distance to what most clients say.

    The base is the geometric median of each row. A client's score s is its mean L1 distance to
    it over the rows it claims to know, 0 to 2. In each round ``log trust <- forget * log trust -
    rate * d``, where d is what s exceeds of a limit. With fewer than three clients trust stays.

    After ExpGuard of Roux, Zimmer and Pokutta, arXiv 2402.12265, where trust is a product over
    all rounds. Deviations: logarithms, of which the largest is subtracted, and a lower bound (the
    product underflows); ``forget`` (a client that was excluded could not come back); and the
    limit: not the median of the scores, but as far above it as the smallest score is below. So
    honest clients that differ, because their rows do, keep their say: with the median alone half
    of them are put down a little in every round.

    Holds where honest clients are clearly more: with 2 bad of 10 on rows that differ from client
    to client, 4 of 10 where they do not. For more use :class:`AnchoredTrust`.

    Args:
        rate: how fast distance costs trust; 10 halves it for 0.07 beyond the limit.
        forget: what remains of log trust after a round, 0 to 1.
        prior_rows: rows that a client's familiarity must outweigh.

    Raises:
        FedistillError: an argument is out of range.
    """

    width = 1

    def __init__(self, rate: float = 10.0, forget: float = 0.8, prior_rows: float = 100.0) -> None:
        super().__init__(rate, forget, prior_rows)

    def __call__(
        self,
        logits: Logits | Chunked,
        weights: FloatArray,
        *,
        clients: Sequence[str],
        familiarity: FloatArray | None = None,
        sizes: FloatArray | None = None,
    ) -> Probs:
        """Soft targets ``[rows, classes]`` of a round; trust moves by one round.

        Args:
            logits: ``[clients, rows, classes]``.
            weights: ``[clients]`` or ``[clients, rows]``.
            clients: ids, in the order of the first axis.
            familiarity: ``[clients, rows]`` log density ratio; used where ``sizes`` is given too.
            sizes: ``[clients]`` number of own rows, bucketed.

        Raises:
            FedistillError: ids do not fit the predictions.
        """
        claims = self._claims(logits, weights, clients, familiarity, sizes)
        answered = claims.sum(axis=1) > 0
        if answered.sum() >= FEWEST:
            # One vote a client, less for twins, as the weights say; not by sizes, which are claims.
            votes = np.asarray(weights, dtype=np.float64).reshape(len(logits), -1).mean(axis=1)
            beyond = np.zeros((len(logits), 1))
            beyond[answered, 0] = _beyond(_distances(logits, claims)[answered], votes[answered])
            self._keep(clients, self.forget * self._held(clients) - self.rate * beyond, answered)
            # The best is at 0, present or not: who answers alone is not made the best by it.
            best = max(log for (log,) in self.memory.values())
            self.memory = {name: [max(log - best, LOWEST)] for name, (log,) in self.memory.items()}
        return weighted_mean(logits, claims * np.exp(self._held(clients)))


def _distances(logits: Logits | Chunked, claims: FloatArray) -> FloatArray:
    """Mean L1 distance ``[clients]`` to the rows' geometric medians, weighted by the claims."""
    total = np.zeros(len(logits))
    for rows, probs, shares in blocks(logits, claims):
        centre = row_centres(probs, shares)
        held = claims[:, rows].T
        apart = np.abs(probs - centre[:, :, None]).sum(axis=0)
        total += np.where(held > 0, held * apart, 0.0).sum(axis=0)
    mass = claims.sum(axis=1)
    scores: FloatArray = total / np.where(mass > 0, mass, 1.0)
    return scores


def _beyond(scores: FloatArray, votes: FloatArray) -> FloatArray:
    """What scores exceed of the limit that mirrors the smallest at the (weighted) median."""
    order = np.argsort(scores, kind="stable")
    middle = scores[order] @ places(votes[order] / votes.sum(), 0.5)
    over: FloatArray = np.maximum(scores - middle - (middle - scores.min()), 0.0)
    return over


class AnchoredTrust(_Memory):
    """Linear pool with trust from proxy rows whose labels the server knows: anchors.

    On an anchor the pool gives the true class some probability; a client's credit is what it
    gives itself, in multiples of that, averaged over the anchors it claims to know: its share in
    what the pool gets right, the weight that a step of expectation-maximisation for a mixture
    would give it. A client that knows three classes of ten is right where others are wrong and
    keeps credit near 1; one that knows nothing has some; who systematically names wrong classes
    has none. Trust is ``min(credit, 1) ** rate``.

    The idea of a trusted root set is FLTrust's (Cao et al., arXiv 2012.13995), which compares
    gradients with the server's. Deviation: accuracy or cross-entropy on anchors would throw out
    honest clients with few classes, which are wrong on most; credit does not. And what is kept
    over rounds are sums of credit and of anchors, each multiplied by ``forget`` in a round, not
    trust: with one anchor in a round a product of trusts would be noise.

    Needs no honest majority: it survives 4 colluders of 10 on rows that differ from client to
    client, with 20 to 40 anchors. A round without anchors leaves trust as it is.

    Args:
        rate: exponent of the credit.
        forget: what remains after a round of what was seen before, 0 to 1.
        prior_rows: rows that a client's familiarity must outweigh.

    Raises:
        FedistillError: an argument is out of range.
    """

    width = 2

    def __init__(self, rate: float = 3.0, forget: float = 0.8, prior_rows: float = 100.0) -> None:
        super().__init__(rate, forget, prior_rows)

    def __call__(
        self,
        logits: Logits | Chunked,
        weights: FloatArray,
        *,
        clients: Sequence[str],
        anchors: IntArray,
        familiarity: FloatArray | None = None,
        sizes: FloatArray | None = None,
    ) -> Probs:
        """Soft targets ``[rows, classes]`` of a round; memory moves by one round with anchors.

        Args:
            logits: ``[clients, rows, classes]``.
            weights: ``[clients]`` or ``[clients, rows]``.
            clients: ids, in the order of the first axis.
            anchors: ``[rows]`` class numbers, -1 where the label is not known.
            familiarity: ``[clients, rows]`` log density ratio; used where ``sizes`` is given too.
            sizes: ``[clients]`` number of own rows, bucketed.

        Raises:
            FedistillError: ids or anchors do not fit the predictions.
        """
        labels = np.asarray(anchors, dtype=np.int64)
        rows, classes = logits.shape[1:]
        if labels.shape != (rows,) or not ((labels >= -1) & (labels < classes)).all():
            raise FedistillError(
                f"anchors: expected {rows} class numbers below {classes}, or -1 where there is "
                f"none, found shape {list(labels.shape)}: give one for each row of the round"
            )
        claims = self._claims(logits, weights, clients, familiarity, sizes)
        held = self._held(clients)
        known = np.flatnonzero(labels >= 0)
        met = _credit(logits[:, known], _as_rows(claims)[:, known], labels[known])
        told = met[:, 1] > 0
        held = np.where(told[:, None], self.forget * held + met, held)
        self._keep(clients, held, told)
        # One anchor's worth of credit 1 to start with: a single mistake excludes nobody.
        credit = (held[:, 0] + 1) / (held[:, 1] + 1)
        logs = np.maximum(self.rate * np.log(np.minimum(credit, 1.0)), LOWEST)
        return weighted_mean(logits, claims * np.exp(logs)[:, None])


def _as_rows(claims: FloatArray) -> FloatArray:
    """Claims with mean 1 over the rows a client answered: an anchor counts as about one row."""
    answered = np.maximum((claims > 0).sum(axis=1, keepdims=True), 1)
    average = claims.sum(axis=1, keepdims=True) / answered
    scaled: FloatArray = claims / np.where(average > 0, average, 1.0)
    return scaled


def _credit(logits: Logits, claims: FloatArray, labels: IntArray) -> FloatArray:
    """Credit and number of anchors, ``[clients, 2]``, both weighted by the claims."""
    found = np.zeros((len(logits), 2))
    if not len(labels):
        return found
    for rows, probs, shares in blocks(logits, claims):
        true = probs[labels[rows], np.arange(len(shares))]
        said = (true + DOUBT) / ((shares * true).sum(axis=1, keepdims=True) + DOUBT)
        held = claims[:, rows].T
        found[:, 0] += np.where(held > 0, held * said, 0.0).sum(axis=0)
        found[:, 1] += held.sum(axis=0)
    return found
