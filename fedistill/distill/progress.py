"""What an experience brought, and what a detector says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedistill.continual.watch import LABELLED
from fedistill.continual.watcher import Detector, DriftState, observe
from fedistill.types import FloatArray, IntArray, Probs


@dataclass(frozen=True, eq=False)
class Progress:
    """What one experience brought.

    Attributes:
        rows: how many came.
        accuracy_before: on those with a label, before they were learned; None without labels.
        correct: ``[rows]`` 1 where the first guess was right, 0 where not, NaN without a label.
        drift: the worst that the detector said of them.
        alarms: where, in rows since the first of the stream.
        consolidated: whether an alarm led to steps of consolidation.
        new_classes: classes that had not been met before.
        steps: steps of the optimizer.
        rows_trained: rows that these steps saw, remembered and public ones included.
        terms: the objective's terms, mean over steps; their sum is the loss.
        seconds: for all of it.
    """

    rows: int = 0
    accuracy_before: float | None = None
    correct: FloatArray = field(default_factory=lambda: np.empty(0))
    drift: DriftState = DriftState.OK
    alarms: tuple[int, ...] = ()
    consolidated: bool = False
    new_classes: tuple[int, ...] = ()
    steps: int = 0
    rows_trained: int = 0
    terms: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Sum of the terms."""
        return sum(self.terms.values())


def tested(probs: Probs, labels: IntArray) -> Progress:
    """What predictions on rows that are still to be learned were worth."""
    known = labels >= 0
    correct = np.where(known, probs.argmax(axis=1) == labels, np.nan)
    accuracy = float(correct[known].mean()) if known.any() else None
    return Progress(len(labels), accuracy, correct)


def watched(
    detector: Detector | None, probs: Probs, labels: IntArray, start: int
) -> tuple[DriftState, tuple[int, ...]]:
    """Show a detector predictions on new rows; what it says, and the rows of its alarms.

    One that watches labels is not shown rows without any, so its own count falls behind the
    stream's: alarms are told in rows of the stream.

    Args:
        detector: None says nothing.
        probs: ``[rows, classes]``.
        labels: ``[rows]``; -1 where none is known.
        start: rows of the stream before these.
    """
    on_labels = detector is not None and detector.on in LABELLED
    shown = np.flatnonzero(labels >= 0) if on_labels else np.arange(len(labels))
    if detector is None or not len(shown):
        return DriftState.OK, ()
    before = getattr(detector, "seen", None)
    state = observe(detector, probs, labels)
    if state is not DriftState.DRIFT or before is None:
        return state, tuple(detector.alarms) if state is DriftState.DRIFT else ()
    return state, tuple(start + int(shown[row - before]) for row in detector.alarms)
