"""Watching over clients: predictions that look wrong, and clients that do not answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from fedistill.types import FloatArray, Probs

MISSES = 3
"""Rounds without an answer after which a client counts as inactive."""
PROBE_EVERY = 3
"""An inactive client is asked again in every round of this multiple."""
CERTAIN = 0.9999
SMOOTHING = 0.01


def flag_predictions(
    predictions: Mapping[str, Probs],
    familiarity: Mapping[str, FloatArray] | None = None,
    *,
    coarse: bool = False,
) -> tuple[Probs, FloatArray, dict[str, list[str]]]:
    """Predictions stacked ``[clients, rows, classes]``, a weight each, and remarks.

    * the same predictions from several clients (free riders): ``identical``, one weight in all;
    * one prediction for all rows: ``constant``, it says nothing, weight 0, unless all do;
    * certainty on every row: ``overconfident``, smoothed by one percent.

    Where familiarity is shared it belongs to what is compared: a client with one class rightly
    predicts that class everywhere, and tells by its familiarity on which rows to listen to it.

    Args:
        predictions: ``[rows, classes]`` by client, in the order of the result.
        familiarity: ``[rows]`` by client, where it is shared.
        coarse: the codec sends little more than a class, so that anybody looks certain.
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
    for index, name in enumerate(names):
        rows = probs[index]
        twins = [
            n for n in range(len(names)) if n != index and np.array_equal(said[index], said[n])
        ]
        if twins and len(rows) > 1:
            flags.setdefault(name, []).append("identical")
            weights[index] /= 1 + len(twins)
        if len(rows) > 1 and np.ptp(said[index], axis=0).max() < 1e-9:
            flags.setdefault(name, []).append("constant")
            weights[index] = 0.0
        elif not coarse and len(rows) > 1 and rows.max(axis=1).min() > CERTAIN:
            flags.setdefault(name, []).append("overconfident")
            probs[index] = (1 - SMOOTHING) * rows + SMOOTHING / rows.shape[1]
    if not weights.any():
        weights = np.ones(len(names))
    return probs, weights, flags


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
