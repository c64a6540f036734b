"""Watching over clients: predictions that look wrong, and clients that do not answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.types import FloatArray, IntArray, Probs

Mask = npt.NDArray[np.bool_]

MISSES = 3
"""Rounds without an answer after which a client counts as inactive."""
PROBE_EVERY = 3
"""An inactive client is asked again in every round of this multiple."""
CERTAIN = 0.9999
SMOOTHING = 0.01
ECHO_ROWS = 20
"""Fewest different targets by which an echo can be told from a coincidence; where a codec has
fewer (few classes, few bits), honest clients meet them by chance."""
ECHO_SHARE = 0.9
"""An echo repeats this share of them: it may have missed a target, or rounded another way."""
ECHO_CERTAIN = 0.99
"""Targets more certain than this are left out: all who are sure of a row say the same of it."""
ECHO_STEP = 1e-6
"""Decoded values that differ by less came from the same codes."""


def flag_predictions(
    predictions: Mapping[str, Probs],
    familiarity: Mapping[str, FloatArray] | None = None,
    *,
    answered: Mapping[str, Mask] | None = None,
    coarse: bool = False,
    published: Probs | None = None,
) -> tuple[Probs, FloatArray, dict[str, list[str]]]:
    """Predictions stacked ``[clients, rows, classes]``, a weight each, and remarks.

    * the same predictions from several clients (free riders): ``identical``, one weight in all;
    * one prediction for all rows: ``constant``, it says nothing, weight 0, unless all do;
    * the soft targets that were published before (a free rider): ``echo``, weight 0;
    * certainty on every row: ``overconfident``, smoothed by one percent.

    Where familiarity is shared it belongs to what is compared: a client with one class rightly
    predicts that class everywhere, and tells by its familiarity on which rows to listen to it.

    Args:
        predictions: ``[rows, classes]`` by client, in the order of the result.
        familiarity: ``[rows]`` by client, where it is shared.
        answered: bool ``[rows]`` by client, where they decline some; what stands in the others is
            not looked at.
        coarse: the codec sends little more than a class, so that anybody looks certain, and
            like anybody else.
        published: ``[rows, classes]``, the last soft target of each row that clients were told
            before this round, as they decode it; NaN on rows without one.
    """
    names = list(predictions)
    probs = np.array([predictions[name] for name in names], dtype=np.float64)
    given = np.ones(probs.shape[:2], dtype=bool)
    if answered is not None:
        given = np.array([answered[name] for name in names])
    marks = np.array([familiarity[name] for name in names]) if familiarity else None
    watch = Watch(given, coarse=coarse, published=published)
    watch.look(slice(0, probs.shape[1]), probs, marks)
    weights, flags, certain = watch.verdict(names)
    for index in np.flatnonzero(certain):
        probs[index] = smoothed(probs[index])
    return probs, weights, flags


def smoothed(probs: Probs) -> Probs:
    """Predictions with one percent of uniform ones."""
    mixed: Probs = (1 - SMOOTHING) * probs + SMOOTHING / probs.shape[-1]
    return mixed


class Watch:
    """Looks at some rows after others, and tells at the end whose predictions look wrong.

    Args:
        answered: bool ``[clients, rows]``.
        coarse: as in :func:`flag_predictions`.
        published: as in :func:`flag_predictions`.
    """

    def __init__(self, answered: Mask, *, coarse: bool, published: Probs | None = None) -> None:
        clients, rows = answered.shape
        self.answered = answered
        self.coarse = coarse
        self.published = None if coarse else published
        self.comparable = np.zeros(rows, dtype=bool)
        if self.published is not None:
            untold = np.isnan(self.published).any(axis=1)
            self.comparable = np.where(untold, 1.0, self.published.max(axis=1)) < ECHO_CERTAIN
        self.alike: IntArray = np.zeros(clients, dtype=np.int64)
        self.low: FloatArray | float = np.inf
        self.high: FloatArray | float = -np.inf
        self.least = np.full(clients, np.inf)
        self.same = np.zeros(clients, dtype=np.int64)

    def look(self, rows: slice, probs: Probs, marks: npt.NDArray[Any] | None = None) -> None:
        """At ``probs [clients, some rows, classes]``, and ``marks [clients, some rows]``."""
        said = list(probs)
        if marks is not None:
            pairs = zip(probs, marks, strict=True)
            said = [np.concatenate([own, mark[:, None]], axis=1) for own, mark in pairs]
        self.alike = _parted(self.alike, said)
        self.low = np.minimum(self.low, [own.min(axis=0, initial=np.inf) for own in said])
        self.high = np.maximum(self.high, [own.max(axis=0, initial=-np.inf) for own in said])
        for client, own in enumerate(probs):
            given = self.answered[client, rows]
            certain = own.max(axis=1)[given].min(initial=np.inf)
            self.least[client] = min(self.least[client], certain)
            known = self.comparable[rows] & given
            if self.published is not None and known.any():
                gap = np.abs(own[known] - self.published[rows][known]).max(axis=1)
                self.same[client] += int((gap <= ECHO_STEP).sum())

    def verdict(self, names: Sequence[str]) -> tuple[FloatArray, dict[str, list[str]], Mask]:
        """A weight for each client, remarks, and whose predictions are to be smoothed."""
        weights, certain = np.ones(len(names)), np.zeros(len(names), dtype=bool)
        flags: dict[str, list[str]] = {}
        several = self.answered.shape[1] > 1
        for index, name in enumerate(names):
            given = int(self.answered[index].sum())
            if not given:
                continue  # it declined every row: nothing was said that could be wrong
            twins = int((self.alike == self.alike[index]).sum())
            if twins > 1 and several and not self.coarse:
                flags.setdefault(name, []).append("identical")
                weights[index] /= twins
            if several and np.subtract(self.high, self.low)[index].max() < 1e-9:
                flags.setdefault(name, []).append("constant")
                weights[index] = 0.0
            elif self._echoes(index):
                flags.setdefault(name, []).append("echo")
                weights[index] = 0.0
            elif not self.coarse and given > 1 and self.least[index] > CERTAIN:
                flags.setdefault(name, []).append("overconfident")
                certain[index] = True
        return weights if weights.any() else np.ones(len(names)), flags, certain

    def _echoes(self, client: int) -> bool:
        """Whether it says what was published before, row by row to the last code.

        An honest client that learns from a target comes near it and not onto it: it is only where
        a target is all but certain that two of them are coded alike, and those rows are left out.
        A client whose predictions *are* the targets (alone with a rule that follows one client,
        and without training) looks the same; where it is the only one with a weight it keeps it.
        """
        known = self.comparable & self.answered[client]
        if self.published is None or not self.same[client]:
            return False
        if self.same[client] / known.sum() < ECHO_SHARE:
            return False
        return len(np.unique(self.published[known], axis=0)) >= ECHO_ROWS


def _parted(alike: IntArray, said: Sequence[FloatArray]) -> IntArray:
    """Equal numbers for those who have said the same so far, and do here too."""
    many = np.bincount(alike) > 1
    keys = [(n, own.tobytes() if many[n] else b"") for n, own in zip(alike, said, strict=True)]
    numbers: dict[tuple[int, bytes], int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


class Vigilance:
    """Who has not answered for how long; an inactive client is probed, and returns by answering."""

    def __init__(self) -> None:
        self.misses: dict[str, int] = {}

    def worth_asking(self, client: str, number: int) -> bool:
        """Whether to ask a client in round ``number``."""
        return self.misses.get(client, 0) < MISSES or number % PROBE_EVERY == 0

    def note(self, client: str, *, answered: bool) -> None:
        """Record that an asked client answered, or did not."""
        self.misses[client] = 0 if answered else self.misses.get(client, 0) + 1

    def note_all(self, asked: Iterable[str], answered: Collection[str]) -> None:
        """Record a round: who was asked, and who of them answered."""
        for client in asked:
            self.note(client, answered=client in answered)

    def inactive(self) -> list[str]:
        """Clients that missed too many rounds in a row."""
        return sorted(name for name, misses in self.misses.items() if misses >= MISSES)

    def state_dict(self) -> dict[str, Any]:
        """Counts by client."""
        return {"misses": self.misses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        self.misses = {str(name): int(misses) for name, misses in state["misses"].items()}
