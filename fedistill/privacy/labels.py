"""Labels in place of probabilities: less is told, and nothing is guaranteed."""

from __future__ import annotations

import numpy as np

from fedistill.types import Probs

STATEMENT = (
    "Labels were shared in place of probabilities. That tells less of the rows, and is NOT "
    "differentially private: nothing bounds what a label tells of a record."
)
"""What a report says."""


def hard_labels(probs: Probs) -> Probs:
    """Probability 1 for the likeliest class of each row; of equal ones, for the lowest.

    Args:
        probs: ``[rows, classes]``, or any scores in the order of them.

    Returns:
        ``[rows, classes]`` float64.
    """
    scores = np.asarray(probs)
    labels: Probs = np.zeros(scores.shape)
    if scores.size:
        np.put_along_axis(labels, scores.argmax(axis=-1)[..., None], 1.0, axis=-1)
    return labels
