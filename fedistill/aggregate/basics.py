"""The arithmetic that all rules share: softmax, weights as shares, the linear pool."""

from __future__ import annotations

import numpy as np

from fedistill.types import FloatArray, Logits, Probs


def softmax(logits: Logits) -> Probs:
    """Softmax over the last axis in float64, shifted so that nothing overflows."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    probs: Probs = shifted / shifted.sum(axis=-1, keepdims=True)
    return probs


def log_softmax(logits: Logits) -> Logits:
    """Logarithm of :func:`softmax`, finite for finite logits."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    logs: Logits = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def spread(weights: FloatArray, rows: int) -> FloatArray:
    """Weights ``[clients]`` or ``[clients, rows]`` as ``[clients, rows]``, columns of sum 1.

    A column without any weight becomes NaN.
    """
    table = np.asarray(weights, dtype=np.float64)
    if table.ndim == 1:
        table = np.repeat(table[:, None], rows, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: FloatArray = table / table.sum(axis=0)
    return shares


def pool(probs: Probs, weights: FloatArray) -> Probs:
    """Linear pool: sum over clients of ``weights [clients, rows]`` times ``probs``."""
    mixed: Probs = np.einsum("kr,krc->rc", weights, probs)
    mixed /= mixed.sum(axis=-1, keepdims=True)
    return mixed
