"""What one model is worth: pure functions of logits and labels."""

from __future__ import annotations

import numpy as np

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


def agreement(probs: Probs, targets: Probs) -> float:
    """Share of rows on which a client's top class is that of the soft target."""
    return float((probs.argmax(axis=1) == targets.argmax(axis=1)).mean()) if len(probs) else 0.0


def entropy(probs: Probs) -> float:
    """Mean entropy of the rows, in nats."""
    safe = np.maximum(np.asarray(probs, dtype=np.float64), 1e-30)
    return float(-(safe * np.log(safe)).sum(axis=1).mean()) if len(probs) else 0.0
