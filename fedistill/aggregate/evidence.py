"""How much a client knows about a proxy row: familiarity and the number of own rows as weights."""

from __future__ import annotations

import numpy as np

from fedistill.types import FloatArray

FAMILIARITY_LIMIT = 8.0
"""Log density ratios are clamped to plus and minus this, both where sent and where used."""


def normalised_ratios(familiarity: FloatArray, weights: FloatArray) -> FloatArray:
    """Density ratios ``[clients, rows]`` whose mean over the rows is 1 for each client.

    A density ratio averages to 1 over the rows of its denominator, so dividing by the mean
    repairs badly scaled estimates and bounds what a client can claim: high familiarity
    everywhere is the same as none at all.
    """
    limited = np.clip(
        np.asarray(familiarity, dtype=np.float64), -FAMILIARITY_LIMIT, FAMILIARITY_LIMIT
    )
    ratio = np.exp(limited)
    asked = np.asarray(weights, dtype=np.float64) > 0
    asked = asked if asked.ndim == 2 else np.repeat(asked[:, None], ratio.shape[1], axis=1)
    count = np.maximum(asked.sum(axis=1, keepdims=True), 1)
    average = (ratio * asked).sum(axis=1, keepdims=True) / count
    ratio /= np.where(average > 0, average, 1.0)
    return ratio


def evidence(
    weights: FloatArray,
    familiarity: FloatArray,
    sizes: FloatArray,
    prior_rows: float = 100.0,
) -> FloatArray:
    """Weights ``[clients, rows]``: about the number of own rows like a row, plus ``prior_rows``.

    Nobody counts with more than twice the rows of the median client: how many rows a client has
    is its own word, and a wrong one must not silence the others.

    Args:
        weights: ``[clients]`` or ``[clients, rows]`` to start from.
        familiarity: ``[clients, rows]`` log density ratio, clamped to plus and minus 8.
        sizes: ``[clients]`` number of own rows, bucketed.
        prior_rows: rows that a client's familiarity must outweigh.
    """
    base = np.asarray(weights, dtype=np.float64)
    base = base if base.ndim == 2 else np.repeat(base[:, None], familiarity.shape[1], axis=1)
    told = np.asarray(sizes, dtype=np.float64)
    present = told[base.any(axis=1)]
    counts = np.minimum(told, 2 * np.median(present) if len(present) else 0.0)[:, None]
    weighed: FloatArray = base * (counts * normalised_ratios(familiarity, base) + prior_rows)
    return weighed
