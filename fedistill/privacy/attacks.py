"""What predictions give away: who was among the rows, and the mix of their labels.

A score says how much a prediction looks like that of a model that has seen a row. Two attacks are
made, each on what may be queried: the model itself, or nothing but its predictions on proxy rows.

- *loss*: the log-probability of the row's label (Yeom et al., "Privacy risk in machine learning",
  CSF 2018).
- *reference*: the log-odds of the label (Carlini et al., "Membership inference attacks from first
  principles", S&P 2022), less what a reference model that never saw a canary makes them expect. One
  reference, where LiRA takes many: how much of it counts is fitted by least squares over all
  canaries, without their coins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from fedistill.types import FloatArray, IntArray, Logits, Probs

Seen = Sequence[Logits]
"""Predictions on canaries after each round, ``[canaries, classes]``."""


# --- membership ----------------------------------------------------------------------------------


def log_odds(logits: Logits, labels: IntArray) -> FloatArray:
    """ln(p / (1 - p)) of the label, ``[rows]``; exact where p is almost 1."""
    place = np.arange(len(labels))
    others = np.array(logits, dtype=np.float64)
    own = others[place, labels]
    others[place, labels] = -np.inf
    found: FloatArray = own - special.logsumexp(others, axis=1)
    return found


def loss_scores(seen: Seen, labels: IntArray) -> FloatArray:
    """Log-probability of the label after the last round, ``[rows]``."""
    known: FloatArray = special.log_softmax(np.float64(seen[-1]), axis=1)
    return known[np.arange(len(labels)), labels]


def reference_scores(seen: Seen, reference: Seen, labels: IntArray) -> FloatArray:
    """Log-odds of the label after the last round, less what the reference explains of them."""
    found, expected = (log_odds(logits[-1], labels) for logits in (seen, reference))
    found, expected = found - found.mean(), expected - expected.mean()
    share = float(found @ expected) / (float(expected @ expected) or 1.0)
    left: FloatArray = found - share * expected
    return left


ATTACKS: dict[str, Callable[[Seen, Seen, IntArray], FloatArray]] = {
    "loss": lambda seen, reference, labels: loss_scores(seen, labels),
    "reference": reference_scores,
}


# --- the mix of labels ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelMix:
    """How near a server comes to the mix of a client's labels.

    Attributes:
        error: total variation distance of the best estimate, 0 to 1; 0: the mix is known.
        guess: that of a uniform guess, which needs no predictions.
    """

    error: float
    guess: float


def label_mix(probs: Probs, labels: IntArray, classes: int) -> LabelMix:
    """The mix of labels as predictions on proxy rows give it away.

    Two estimates are made, and the better one counts: the mean prediction, and the normalised
    geometric mean, in which classes that a client never met count for little.

    Args:
        probs: ``[rows, classes]`` predictions on proxy rows.
        labels: the client's own.
        classes: how many there are.
    """
    true = np.bincount(labels, minlength=classes) / max(len(labels), 1)
    geometric = special.softmax(np.log(np.maximum(probs, 1e-6)).mean(axis=0))
    estimates = (probs.mean(axis=0), geometric)
    errors = [float(np.abs(estimate - true).sum() / 2) for estimate in estimates]
    return LabelMix(min(errors), float(np.abs(1 / classes - true).sum() / 2))
