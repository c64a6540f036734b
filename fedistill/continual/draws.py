"""What is replayed: which of the held rows a draw takes. Storage knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from fedistill.continual.policies import ranks
from fedistill.errors import FedistillError, did_you_mean
from fedistill.types import FloatArray, IntArray

Draw: TypeAlias = Callable[[IntArray, int, np.random.Generator], IntArray]
"""From labels ``[n]`` of the held rows, how many, and a generator, to distinct row numbers."""

CANDIDATES = 50
"""Rows among which MIR looks for the most interfered; the authors' number."""


def uniform(labels: IntArray, count: int, random: np.random.Generator) -> IntArray:
    """``[min(count, n)]`` different rows, each set and each order as likely as any other."""
    return random.permutation(len(labels))[:count]


def balanced(labels: IntArray, count: int, random: np.random.Generator) -> IntArray:
    """``[min(count, n)]`` different rows, as many of each class as there are, to within one.

    Classes are shared out exactly, not drawn; which class gets the odd row is drawn.
    """
    if not len(labels):
        return np.empty(0, dtype=np.int64)
    lots = random.random((2, len(labels)))
    chosen = np.lexsort((lots[1], ranks(lots[0], lots[0], labels)))[:count]
    return random.permutation(chosen)


def most_interfered(scores: FloatArray, count: int) -> IntArray:
    """``[min(count, n)]`` rows whose loss would grow most, the largest first.

    Aljundi et al., Online continual learning with maximally interfered retrieval (MIR), arXiv
    1908.04742. ``scores`` are loss after a virtual step on the batch minus loss before it.
    """
    return np.argsort(-scores, kind="stable")[:count]


DRAWS: Mapping[str, Draw] = {"uniform": uniform, "balanced": balanced, "mir": uniform}
"""The draws by name; ``mir`` draws candidates uniformly, and scores decide among them."""


def find_draw(draw: str | Draw) -> Draw:
    """A draw by name; a function is itself.

    Raises:
        FedistillError: no draw has this name.
    """
    if not isinstance(draw, str):
        return draw
    if draw not in DRAWS:
        raise FedistillError(f'unknown draw "{draw}"{did_you_mean(draw, DRAWS)}')
    return DRAWS[draw]
