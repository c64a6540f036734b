"""The teachers of one round side by side, whatever rows each of them answered, and late or not.

Their predictions are read some rows at a time, each teacher's in the order of the ids, so that
neither memory nor the order of arrival sets a limit or leaves a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fedistill.aggregate.chunked import Chunked
from fedistill.aggregate.rules import log_softmax
from fedistill.aggregate.vigilance import Watch, smoothed
from fedistill.door import Answer
from fedistill.types import FloatArray, IntArray, Logits, Probs
from fedistill.wire.envelope import Mask

Flags = dict[str, list[str]]


@dataclass(frozen=True, eq=False)
class Panel:
    """What the teachers say of the rows that a round asks.

    Attributes:
        names: ids of the teachers, in order.
        probs: ``[teachers, rows, classes]``, uniform where a teacher does not answer; read in
            parts.
        answered: ``[teachers, rows]``.
        familiarity: ``[teachers, rows]`` log density ratios; None where they are not shared.
        ages: ``[teachers]``, rounds that an answer came late.
        weights: ``[teachers]``.
        certain: bool ``[teachers]``, whose predictions are smoothed before they count.
        tops: ``[teachers, rows]``, the top class; known once the predictions were watched.
    """

    names: tuple[str, ...]
    probs: Chunked
    answered: Mask
    familiarity: FloatArray | None
    ages: IntArray
    weights: FloatArray
    certain: Mask
    tops: IntArray

    @classmethod
    def of(cls, teachers: Sequence[Answer], asked: IntArray, classes: int) -> Panel:
        """Every answer on the rows asked, ``[rows]``; a late one on those that it has too."""
        places = np.array([answer.places(asked) for answer in teachers], dtype=np.int32)
        answered = places >= 0
        ratios = np.zeros(places.shape)
        for number, answer in enumerate(teachers):
            if answer.familiarity is not None:
                there = answered[number]
                ratios[number, there] = answer.familiarity[places[number, there]]
        shared = any(answer.familiarity is not None for answer in teachers)
        return cls(
            tuple(answer.upload.client for answer in teachers),
            Chunked((*places.shape, classes), partial(_read, teachers, places, classes)),
            answered,
            ratios if shared else None,
            np.array([answer.age for answer in teachers]),
            np.ones(len(teachers)),
            np.zeros(len(teachers), dtype=bool),
            np.zeros(places.shape, dtype=np.int32),
        )

    def watched(self, published: Probs | None, *, coarse: bool, quorum: int) -> tuple[Panel, Flags]:
        """With less weight for those who look wrong (see ``flag_predictions``), and remarks.

        Leaving the silent ones out must not publish what fewer than ``quorum`` clients said.
        """
        # Which rows a client answers tells as much about it as its familiarity.
        partial = None if self.answered.all() else self.answered
        marks = self.familiarity if self.familiarity is not None else partial
        watch = Watch(self.answered, coarse=coarse, published=published)
        tops = self.tops.copy()
        for rows in self.probs.windows():
            said = self.probs[:, rows]
            watch.look(rows, said, None if marks is None else marks[:, rows])
            tops[:, rows] = said.argmax(axis=2)
        weights, flags, certain = watch.verdict(self.names)
        if (weights > 0).sum() < quorum:
            weights = np.ones(len(self.names))
        return replace(self, weights=weights, certain=certain, tops=tops), flags

    def logits(self) -> Chunked:
        """Log-probabilities ``[teachers, rows, classes]``, finite; read in parts."""
        return Chunked(self.probs.shape, self._logits)

    def _logits(self, rows: slice | IntArray) -> Logits:
        said = self.probs[:, rows]
        found = np.empty(said.shape)
        for number, own in enumerate(said):  # one by one: what is made of one fits a cache
            heard = smoothed(own) if self.certain[number] else own
            found[number] = log_softmax(np.log(np.maximum(heard, 1e-12)))
        return found

    def voices(self, late: float) -> FloatArray:
        """Weights ``[teachers]``, or ``[teachers, rows]`` where not all answer every row."""
        weights: FloatArray = self.weights * late**self.ages
        return weights if self.answered.all() else weights[:, None] * self.answered

    def agreement(self, targets: Probs) -> float | None:
        """Share of rows on which a teacher's top class is the target's, mean over teachers."""
        counted = self.answered & ~np.isnan(targets).any(axis=1)
        same = self.tops == targets.argmax(axis=1)
        shares = [
            float(own[rows].mean()) for own, rows in zip(same, counted, strict=True) if rows.any()
        ]
        return float(np.mean(shares)) if shares else None


def _read(
    teachers: Sequence[Answer], places: IntArray, classes: int, rows: slice | IntArray
) -> Probs:
    """``[teachers, some rows, classes]``, decoded one teacher after the other."""
    wanted = places[:, rows]
    probs = np.full((*wanted.shape, classes), 1 / classes)
    for own, here, answer in zip(probs, wanted, teachers, strict=True):
        own[here >= 0] = answer.read(here[here >= 0])
    return probs
