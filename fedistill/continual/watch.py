"""What a drift detector watches: a stream of values that a model's predictions give.

With labels (``error``, ``loss``) or without (``entropy``, ``confidence``, ``margin``,
``predictions``). All lie in 0 to 1, the scale that ADWIN's bound and Page-Hinkley's threshold are
meant for.

Limits: a model can be sure and wrong, so confidence may stay high under a shift of the inputs;
and no label-free value can see a change of p(y|x) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fedistill.errors import FedistillError, did_you_mean
from fedistill.types import FloatArray, IntArray, Probs

LARGEST_LOSS = 10.0
"""Nats at which ``loss`` is cut, and by which it is divided."""


def entropy(probs: Probs) -> FloatArray:
    """Entropy over its largest value log C, ``[rows]``: 0 is certain, 1 knows nothing.

    The scale moves when the number of classes C grows.
    """
    p = np.asarray(probs, dtype=np.float64)
    if p.shape[1] < 2:
        return np.zeros(len(p))
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    found: FloatArray = np.clip(-(p * logs).sum(axis=1) / np.log(p.shape[1]), 0.0, 1.0)
    return found


def confidence(probs: Probs) -> FloatArray:
    """The largest probability, ``[rows]``."""
    found: FloatArray = np.asarray(probs, dtype=np.float64).max(axis=1)
    return found


def margin(probs: Probs) -> FloatArray:
    """The largest probability less the second largest, ``[rows]``; 1 with one class."""
    p = np.asarray(probs, dtype=np.float64)
    if p.shape[1] < 2:
        return np.ones(len(p))
    top = np.partition(p, -2, axis=1)
    found: FloatArray = top[:, -1] - top[:, -2]
    return found


def predictions(probs: Probs) -> FloatArray:
    """The probabilities themselves, ``[rows, C]``; for :class:`~fedistill.continual.mmd.Mmd`."""
    return np.asarray(probs, dtype=np.float64)


def error(probs: Probs, labels: IntArray) -> FloatArray:
    """1 where the likeliest class is not the label, else 0, ``[rows]``; ties: the first class."""
    found: FloatArray = (np.asarray(probs).argmax(axis=1) != labels).astype(np.float64)
    return found


def loss(probs: Probs, labels: IntArray) -> FloatArray:
    """Minus log p(label), cut at 10 nats and divided by 10, ``[rows]``.

    A label that the model has no output for yet counts 1.
    """
    p = np.asarray(probs, dtype=np.float64)
    known = labels < p.shape[1]
    chosen = np.where(known, p[np.arange(len(p)), np.where(known, labels, 0)], 0.0)
    found: FloatArray = -np.log(np.clip(chosen, np.exp(-LARGEST_LOSS), 1.0)) / LARGEST_LOSS
    return found


UNLABELLED: dict[str, Callable[[Probs], FloatArray]] = {
    "entropy": entropy,
    "confidence": confidence,
    "margin": margin,
    "predictions": predictions,
}
LABELLED: dict[str, Callable[[Probs, IntArray], FloatArray]] = {"error": error, "loss": loss}
VALUES = (*UNLABELLED, *LABELLED)
"""All that can be watched."""


def values(on: str, probs: Probs, labels: npt.ArrayLike | None = None) -> FloatArray:
    """The stream of values that ``on`` names.

    Args:
        on: a name of :data:`VALUES`.
        probs: ``[rows, C]`` rows that sum to 1.
        labels: ``[rows]`` class numbers; rows with -1 (not known) are left out of ``error`` and
            ``loss``. Not looked at by the others.

    Returns:
        ``[rows]``, or ``[rows, C]`` for ``predictions``.

    Raises:
        FedistillError: ``on`` is unknown, labels are missing, or shapes do not fit.
    """
    known(on, VALUES)
    table = np.asarray(probs, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise FedistillError(
            f"drift: expected probabilities of shape [rows, classes], found {list(table.shape)}"
        )
    if not np.isfinite(table).all():
        row = int(np.argwhere(~np.isfinite(table))[0, 0])
        raise FedistillError(f"drift: expected finite probabilities, row {row} is not")
    if on in UNLABELLED:
        return UNLABELLED[on](table)
    if labels is None:
        raise FedistillError(
            f'drift: on="{on}" needs labels, found none: give them or watch "entropy"'
        )
    told = np.asarray(labels)
    if told.shape != table.shape[:1] or told.dtype.kind not in "iub":
        raise FedistillError(
            f"drift: expected {len(table)} class numbers, found {told.dtype} {list(told.shape)}"
        )
    there = told >= 0
    return LABELLED[on](table[there], told[there].astype(np.int64))


def known(on: str, names: Sequence[str]) -> str:
    """``on`` if it is one of the names.

    Raises:
        FedistillError: it is none.
    """
    if on not in names:
        raise FedistillError(f'drift: cannot watch "{on}"{did_you_mean(on, names)}')
    return on
