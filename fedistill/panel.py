"""The teachers of one round side by side, whatever rows each of them answered, and late or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedistill.aggregate.rules import log_softmax
from fedistill.aggregate.vigilance import flag_predictions
from fedistill.door import Answer
from fedistill.metrics import agreement
from fedistill.types import FloatArray, IntArray, Logits, Probs
from fedistill.wire.envelope import Mask

Flags = dict[str, list[str]]


@dataclass(frozen=True, eq=False)
class Panel:
    """What the teachers say of the rows that a round asks.

    Attributes:
        names: ids of the teachers, in order.
        probs: ``[teachers, rows, classes]``, uniform where a teacher does not answer.
        answered: ``[teachers, rows]``.
        familiarity: ``[teachers, rows]`` log density ratios; None where they are not shared.
        ages: ``[teachers]``, rounds that an answer came late.
        weights: ``[teachers]``.
    """

    names: tuple[str, ...]
    probs: Probs
    answered: Mask
    familiarity: FloatArray | None
    ages: IntArray
    weights: FloatArray

    @classmethod
    def of(cls, teachers: Sequence[Answer], asked: IntArray, classes: int) -> Panel:
        """Every answer on the rows asked, ``[rows]``; a late one on those that it has too."""
        probs = np.full((len(teachers), len(asked), classes), 1 / classes)
        answered = np.zeros((len(teachers), len(asked)), dtype=bool)
        ratios = np.zeros((len(teachers), len(asked)))
        for number, answer in enumerate(teachers):
            there, here = answer.on(asked)
            probs[number, there], answered[number, there] = answer.probs[here], True
            if answer.familiarity is not None:
                ratios[number, there] = answer.familiarity[here]
        shared = any(answer.familiarity is not None for answer in teachers)
        return cls(
            tuple(answer.upload.client for answer in teachers),
            probs,
            answered,
            ratios if shared else None,
            np.array([answer.age for answer in teachers]),
            np.ones(len(teachers)),
        )

    def watched(self, published: Probs | None, *, coarse: bool, quorum: int) -> tuple[Panel, Flags]:
        """With less weight for those who look wrong (see ``flag_predictions``), and remarks.

        Leaving the silent ones out must not publish what fewer than ``quorum`` clients said.
        """
        said = dict(zip(self.names, self.probs, strict=True))
        # Which rows a client answers tells as much about it as its familiarity.
        partial = None if self.answered.all() else self.answered
        marks = self.familiarity if self.familiarity is not None else partial
        probs, weights, flags = flag_predictions(
            said,
            self._by_name(marks),
            answered=self._by_name(partial),
            coarse=coarse,
            published=published,
        )
        if (weights > 0).sum() < quorum:
            weights = np.ones(len(self.names))
        return replace(self, probs=probs, weights=weights), flags

    def _by_name(self, values: Any) -> dict[str, Any] | None:
        return None if values is None else dict(zip(self.names, values, strict=True))

    def logits(self) -> Logits:
        """Log-probabilities ``[teachers, rows, classes]``, finite."""
        return log_softmax(np.log(np.maximum(self.probs, 1e-12)))

    def voices(self, late: float) -> FloatArray:
        """Weights ``[teachers]``, or ``[teachers, rows]`` where not all answer every row."""
        weights: FloatArray = self.weights * late**self.ages
        return weights if self.answered.all() else weights[:, None] * self.answered

    def agreement(self, targets: Probs) -> float | None:
        """Share of rows on which a teacher's top class is the target's, mean over teachers."""
        counted = self.answered & ~np.isnan(targets).any(axis=1)
        shares = [
            agreement(said[rows], targets[rows])
            for said, rows in zip(self.probs, counted, strict=True)
            if rows.any()
        ]
        return float(np.mean(shares)) if shares else None
