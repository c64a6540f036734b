"""What is measured: of one model, over a stream, and against an oracle."""

from __future__ import annotations

from fedistill.metrics.continual import (
    Prequential,
    anytime_accuracy,
    average_accuracy,
    backward_transfer,
    faded,
    forgetting,
    forward_transfer,
    h_mean,
    latest,
    min_accuracy,
    retained,
    worst_case_accuracy,
)
from fedistill.metrics.point import accuracy, agreement, auc, calibration_error, entropy
from fedistill.metrics.ranking import Ranked, hit_rate_at, ndcg_at, rank_items, recall_at
from fedistill.metrics.shift_gap import (
    Bounds,
    bounds,
    fluctuation,
    noise_floor,
    recovery,
    relative_gaps,
    worst_gap,
)

__all__ = [
    "Bounds",
    "Prequential",
    "Ranked",
    "accuracy",
    "agreement",
    "anytime_accuracy",
    "auc",
    "average_accuracy",
    "backward_transfer",
    "bounds",
    "calibration_error",
    "entropy",
    "faded",
    "fluctuation",
    "forgetting",
    "forward_transfer",
    "h_mean",
    "hit_rate_at",
    "latest",
    "min_accuracy",
    "ndcg_at",
    "noise_floor",
    "rank_items",
    "recall_at",
    "recovery",
    "relative_gaps",
    "retained",
    "worst_case_accuracy",
    "worst_gap",
]
