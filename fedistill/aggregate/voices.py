"""What a rule starts from: checked voices of equal form, and a top class that no order decides."""

from __future__ import annotations

import numpy as np

from fedistill.aggregate.basics import log_softmax
from fedistill.errors import FedistillError
from fedistill.types import FloatArray, IntArray, Logits

TIE = 1e-9
"""Scores closer than this are equal: the order in which clients are summed must not decide."""


def voices(logits: Logits, weights: FloatArray) -> tuple[Logits, FloatArray]:
    """Log-probabilities ``[clients, rows, classes]`` and weights ``[clients, rows]``, checked.

    Where a weight is zero the log-probabilities are those of the uniform distribution, so that
    NaN from a client that did not answer cannot spread.

    Raises:
        FedistillError: a shape does not fit, or a weight is negative or not finite.
    """
    scores = np.asarray(logits, dtype=np.float64)
    given = say(scores.shape, weights)
    return log_softmax(np.where(given[:, :, None] > 0, scores, 0.0)), given


def say(shape: tuple[int, ...], weights: FloatArray) -> FloatArray:
    """Weights as ``[clients, rows]``, if they and predictions of that shape fit together.

    Raises:
        FedistillError: a shape does not fit, or a weight is negative or not finite.
    """
    if len(shape) != 3 or not shape[0] or not shape[2]:
        raise FedistillError(
            "logits must be [clients, rows, classes] with at least one client and one class, "
            f"found {list(shape)}: stack one [rows, classes] per client"
        )
    given = np.asarray(weights, dtype=np.float64)
    if given.shape not in (shape[:1], shape[:2]):
        raise FedistillError(
            f"weights must be [clients] = {list(shape[:1])} or [clients, rows] = "
            f"{list(shape[:2])}, found {list(given.shape)}: give one for each"
        )
    if not (np.isfinite(given).all() and (given >= 0).all()):
        raise FedistillError(
            "weights must be finite and at least 0, found others: give a client without a say 0"
        )
    return np.repeat(given[:, None], shape[1], axis=1) if given.ndim == 1 else given


def top_class(scores: FloatArray) -> IntArray:
    """The class of the highest score of each row, of equals (within 1e-9) the lowest."""
    top = scores.max(axis=-1, keepdims=True)
    best: IntArray = (scores >= top - TIE * (1 + np.abs(top))).argmax(axis=-1)
    return best
