"""The kinds of bad clients: what each says, does and claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedistill.types import IntArray, Logits

LARGEST = 2500.0
"""Logits beyond this are cut: a client's own door refuses rows beyond 1e4 after centring."""
SURE = 0.999
"""Probability of a class that is claimed outright; just below what is flagged as overconfident."""
REPEATS = 8
"""How often a client that inflates its size counts each of its rows."""


def as_they_are(logits: Logits) -> Logits:
    """Nothing is done to them."""
    return logits


def honestly(labels: IntArray, classes: int) -> IntArray:
    """Labels that say what is so."""
    del classes
    return labels


@dataclass(frozen=True)
class Attack:
    """One way to be a bad client, as small functions.

    Attributes:
        summary: what it does, one line.
        paper: where it was published.
        bound: what bounds it.
        tamper: from the logits ``[rows, classes]`` that it would have shared to those it shares.
        relabel: from its labels ``[rows]`` and the number of classes to those it trains on.
        claims: the familiarity it claims on every row; None: what its learner finds.
        repeats: how often it counts each of its rows when it tells how many it has.
        trains: whether it trains at all.
        copies: whether it repeats the soft targets that it was sent.
    """

    summary: str
    paper: str = ""
    bound: str = ""
    tamper: Callable[[Logits], Logits] = as_they_are
    relabel: Callable[[IntArray, int], IntArray] = honestly
    claims: float | None = None
    repeats: int = 1
    trains: bool = True
    copies: bool = False


# --- what is done to predictions and labels ------------------------------------------------------


def flip_scaled(logits: Logits) -> Logits:
    """Logits times -100, cut so that its own site lets them out."""
    values = np.asarray(logits, dtype=np.float64)
    centred = values - values.mean(axis=1, keepdims=True)
    flipped: Logits = np.clip(-100.0 * centred, -LARGEST, LARGEST)
    return flipped


def swap_extremes(logits: Logits) -> Logits:
    """The largest and the smallest probability of each row change places.

    The classes in between keep theirs. The paper moves all confidences; the top and the bottom
    do the harm, and the row stays a plausible prediction.
    """
    swapped = np.array(logits)
    rows = np.arange(len(swapped))
    high, low = swapped.argmax(axis=1), swapped.argmin(axis=1)
    swapped[rows, high], swapped[rows, low] = swapped[rows, low], swapped[rows, high]
    return swapped


def least_likely(logits: Logits) -> Logits:
    """All on the least likely class of each row."""
    return all_on(np.asarray(logits).argmin(axis=1), np.shape(logits)[1])


def likeliest_wrong(logits: Logits) -> Logits:
    """All on the second most likely class of each row: the wrong answer that looks best."""
    order = np.argsort(logits, axis=1, kind="stable")
    return all_on(order[:, -min(2, order.shape[1])], order.shape[1])


def first_class(logits: Logits) -> Logits:
    """All on the first class, whatever the row."""
    return all_on(np.zeros(len(logits), dtype=np.int64), np.shape(logits)[1])


def all_on(labels: IntArray, classes: int) -> Logits:
    """Log-probabilities ``[rows, classes]`` with :data:`SURE` on one class of each row."""
    rest = (1 - SURE) / max(classes - 1, 1)
    claimed: Logits = np.full((len(labels), classes), np.log(rest))
    claimed[np.arange(len(labels)), labels] = np.log(SURE)
    return claimed


def next_class(labels: IntArray, classes: int) -> IntArray:
    """Every label becomes the next class, the last the first: not one stays right."""
    return (labels + 1) % classes


ATTACKS: Mapping[str, Attack] = {
    "scaled-flip": Attack(
        summary="logits times -100: certain of what it finds least likely",
        bound="one vote on a wrong class once predictions are probabilities; a mean of logits "
        "has no bound and falls to nothing",
        tamper=flip_scaled,
    ),
    "fdla": Attack(
        summary="the largest and the smallest probability of each row change places",
        paper="arXiv 2401.03685",
        bound="one vote with the confidence of an honest one; one row shows nothing, the distance "
        "from the others over all rows does (geometric-median-client, trust)",
        tamper=swap_extremes,
    ),
    "least-likely": Attack(
        summary="certain of the least likely class of each row (LMA)",
        paper="Roux et al., ICLR 2025, arXiv 2402.12265",
        bound="one vote on a class that few others vote for; medians leave it out",
        tamper=least_likely,
    ),
    "likeliest-wrong": Attack(
        summary="certain of the second most likely class of each row",
        bound="one vote, where the honest are least sure: the strongest of these; with many such "
        "clients and unequal classes only labelled rows at the server help (trust-anchored)",
        tamper=likeliest_wrong,
    ),
    "label-flip": Attack(
        summary="trains on its rows with every label moved to the next class",
        paper="Tolpegin et al. 2020, arXiv 2007.08432",
        bound="what it learns: the soft targets it is taught pull it back to the truth",
        relabel=next_class,
    ),
    "free-rider-copy": Attack(
        summary="never trains: repeats the soft targets it was sent, the nearest for new rows",
        paper="after Lin, Du and Liu 2019, arXiv 1911.12560",
        bound="it says what was said, which slows learning down; flagged as an echo, and several "
        "as identical",
        claims=0.0,
        trains=False,
        copies=True,
    ),
    "free-rider-constant": Attack(
        summary="never trains: one prediction for all rows",
        paper="after Lin, Du and Liu 2019, arXiv 1911.12560",
        bound="flagged as constant, weight 0; colluders hide it by noise, and have a vote each",
        tamper=first_class,
        claims=0.0,
        trains=False,
    ),
    "inflated-familiarity": Attack(
        summary=f"likeliest-wrong, claiming to know every row, and {REPEATS} times its rows",
        bound="familiarity is divided by its mean over the rows: high everywhere is none at all; "
        "nobody counts with more than twice the rows of the median client",
        tamper=likeliest_wrong,
        claims=8.0,
        repeats=REPEATS,
    ),
}
