"""What one model is worth: pure functions of logits and labels."""

from __future__ import annotations

import numpy as np

from fedistill.aggregate.chunked import parts
from fedistill.aggregate.rules import softmax
from fedistill.types import IntArray, Logits, Probs


def accuracy(logits: Logits, labels: IntArray) -> float:
    """Share of rows whose largest logit is at the label; NaN without rows."""
    return float((logits.argmax(axis=1) == labels).mean()) if len(labels) else float("nan")


def auc(logits: Logits, labels: IntArray) -> float | None:
    """Area under the ROC curve of class 1, for two classes that both occur; else None."""
    if logits.shape[1] != 2 or len(np.unique(labels)) != 2:
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, softmax(logits)[:, 1]))


BINS = 15


def calibration_error(logits: Logits, labels: IntArray) -> float | None:
    """How far confidence is from accuracy, on the average; 0 is well calibrated.

    None without rows, or where a model says NaN.

    Guo et al., On Calibration of Modern Neural Networks, 2017: the expected calibration error over
    15 equally wide bins of the largest probability.

    >>> import numpy as np
    >>> calibration_error(np.log([[0.8, 0.2], [0.8, 0.2]]), np.array([0, 1])).__round__(3)
    0.3
    """
    if not len(labels) or not np.isfinite(logits).all():
        return None
    probs = softmax(logits)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(place, right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


def agreement(probs: Probs, targets: Probs) -> float:
    """Share of rows on which a client's top class is that of the soft target."""
    return float((probs.argmax(axis=1) == targets.argmax(axis=1)).mean()) if len(probs) else 0.0


def entropy(probs: Probs) -> float:
    """Mean entropy of the rows, in nats."""
    rows = np.empty(len(probs))
    for part in parts(len(probs), probs.shape[1]):
        safe = np.maximum(np.asarray(probs[part], dtype=np.float64), 1e-30)
        rows[part] = (safe * np.log(safe)).sum(axis=1)
    return float(-rows.mean()) if len(rows) else 0.0
