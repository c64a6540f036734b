"""Rows that change while a client takes part: the present experience, and how it was met."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from fedistill.distill.learner import Learner
from fedistill.types import Rows

WINDOW = 100
"""Rows of a point of the prequential curve."""


class Course(Protocol):
    """One experience after another. A simulation knows all of them, at a real site they arrive."""

    def position(self, number: int, now: int) -> int:
        """Which experience is the present one in a regular round.

        Args:
            number: of the round, from 1; rounds of distillation are not counted.
            now: the one met last; -1: none yet.
        """
        ...

    def rows(self, position: int) -> Rows:
        """The rows of an experience, the same whenever they are asked for."""
        ...


@dataclass(frozen=True, eq=False)
class Timetable:
    """Experiences that begin in rounds known beforehand.

    Attributes:
        experiences: the rows of each, in the order in which they are met.
        starts: the regular round in which each begins; the first in round 1.
    """

    experiences: tuple[Rows, ...]
    starts: tuple[int, ...]

    def position(self, number: int, now: int) -> int:
        """The last one that has begun."""
        del now
        return max(sum(start <= number for start in self.starts) - 1, 0)

    def rows(self, position: int) -> Rows:
        """The rows of one."""
        return self.experiences[position]

    def left(self, number: int) -> int | None:
        """Regular rounds until the next one begins, this one included; None: none begins."""
        later = [start for start in self.starts if start > number]
        return min(later) - number if later else None


def timetable(experiences: tuple[Rows, ...], every: int, lag: int = 0) -> Timetable:
    """An experience each ``every`` rounds; all but the first come ``lag`` rounds later.

    >>> timetable((), 2).starts
    ()
    """
    starts = [1 + number * every + lag * (number > 0) for number in range(len(experiences))]
    return Timetable(experiences, tuple(starts))


@dataclass(frozen=True)
class Met:
    """How a client met an experience: it was tested first, and learned then.

    Attributes:
        position: which, from 0.
        rows: how many came.
        correct: how many of those with a label the learner knew before.
        labelled: how many have a label.
        curve: share known in each window of :data:`WINDOW` rows, in order.
        alarms: rows, from the first of the whole stream, at which a detector alarmed.
        trained: rows that the steps saw for it so far, proxy and remembered rows included.
    """

    position: int
    rows: int
    correct: int
    labelled: int
    curve: tuple[float, ...]
    alarms: tuple[int, ...] = ()
    trained: int = 0

    @classmethod
    def of(cls, position: int, rows: Rows, learner: Learner) -> Met:
        """Test a learner on rows that it is about to learn."""
        known = np.flatnonzero(rows.labels >= 0)
        guesses = learner.predict(rows.inputs).argmax(axis=1) if len(rows) else rows.labels
        right = (guesses == rows.labels)[known]
        windows = [right[start : start + WINDOW] for start in range(0, len(right), WINDOW)]
        curve = tuple(float(window.mean()) for window in windows)
        return cls(position, len(rows), int(right.sum()), len(known), curve)

    @property
    def accuracy(self) -> float | None:
        """Share of the labelled rows that were known before; None without any."""
        return self.correct / self.labelled if self.labelled else None

    def facts(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Met:
        """What :meth:`facts` gave."""
        return cls(**facts | {name: tuple(facts[name]) for name in ("curve", "alarms")})


def consolidate(learner: Learner, rows: Rows, seed: int) -> None:
    """A round of distillation: soft targets and what is remembered, no row of the day.

    A learner without ``consolidate`` learns from what it absorbed alone.
    """
    own = getattr(learner, "consolidate", None)
    if own is not None:
        own(seed=seed)
    else:
        learner.fit(rows.take(np.empty(0, dtype=np.int64)), seed=seed)
