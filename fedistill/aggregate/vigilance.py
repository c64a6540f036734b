"""Watching over clients: predictions that look wrong, and clients that do not answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.types import FloatArray, Probs

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
    answered: Mapping[str, npt.NDArray[np.bool_]] | None = None,
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
    said = probs
    if familiarity:
        said = np.concatenate(
            [probs, np.array([familiarity[n] for n in names])[:, :, None]], axis=2
        )
    weights = np.ones(len(names))
    flags: dict[str, list[str]] = {}
    spoken = [said[index].tobytes() for index in range(len(names))]
    alike = Counter(spoken)
    for index, name in enumerate(names):
        rows = probs[index]
        given = np.ones(len(rows), dtype=bool) if answered is None else answered[name]
        if not given.any():
            continue  # it declined every row: nothing was said that could be wrong
        twins = alike[spoken[index]]
        if twins > 1 and len(rows) > 1 and not coarse:
            flags.setdefault(name, []).append("identical")
            weights[index] /= twins
        if len(rows) > 1 and np.ptp(said[index], axis=0).max() < 1e-9:
            flags.setdefault(name, []).append("constant")
            weights[index] = 0.0
        elif not coarse and published is not None and repeats(rows[given], published[given]):
            flags.setdefault(name, []).append("echo")
            weights[index] = 0.0
        elif not coarse and given.sum() > 1 and rows[given].max(axis=1).min() > CERTAIN:
            flags.setdefault(name, []).append("overconfident")
            probs[index] = (1 - SMOOTHING) * rows + SMOOTHING / rows.shape[1]
    if not weights.any():
        weights = np.ones(len(names))
    return probs, weights, flags


def repeats(said: Probs, published: Probs) -> bool:
    """Whether a client says what was published before, row by row to the last code.

    An honest client that learns from a target comes near it and not onto it: it is only where a
    target is all but certain that two of them are coded alike, and those rows are left out. A
    client whose predictions *are* the targets (alone with a rule that follows one client, and
    without training) looks the same; where it is the only one with a weight it keeps it.

    Args:
        said: ``[rows, classes]``, decoded.
        published: ``[rows, classes]``, decoded; NaN on rows without a target.
    """
    told = np.where(np.isnan(published).any(axis=1), 1.0, published.max(axis=1))
    known = np.flatnonzero(told < ECHO_CERTAIN)
    if len(np.unique(published[known], axis=0)) < ECHO_ROWS:
        return False
    same = np.abs(said[known] - published[known]).max(axis=1) <= ECHO_STEP
    return bool(same.mean() >= ECHO_SHARE)


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
