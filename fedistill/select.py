"""Which of the proxy rows a client answers, and how familiar they are to it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedistill.choice import Method
from fedistill.distill.density import DENSITIES, Density
from fedistill.distill.learner import Learner
from fedistill.distill.public_features import features_of
from fedistill.errors import Rejected
from fedistill.types import FloatArray, IntArray, Logits, ProxySet, Rows
from fedistill.wire.envelope import Mask


class Answers(NamedTuple):
    """What a learner says of the rows that a plan asks."""

    logits: Logits
    """``[rows, classes]``."""
    familiarity: FloatArray
    """``[rows]``."""


class Selector:
    """Familiarity of proxy rows, by the learner's own output for it or by an estimate from rows.

    Args:
        method: which of the two, whether rows are declined, and whether familiarity is shared.
        own: the client's rows; without any it answers nothing.
        proxy: the public rows.
        seed: of an estimate.
    """

    def __init__(self, method: Method, own: Rows, proxy: ProxySet, seed: int) -> None:
        self.method = method
        self.own = own
        self.proxy = proxy
        self.seed = seed
        self._density: Density | None = None
        self._ratios: FloatArray | None = None

    def choose(
        self, rows: IntArray, learner: Learner, scores: FloatArray | None = None
    ) -> tuple[Mask, FloatArray | None]:
        """Which of some rows to answer, bool ``[rows]``, and the familiarity of those, if shared.

        Args:
            rows: proxy rows.
            learner: what says how familiar they are, and own rows.
            scores: what it says of the proxy rows, ``[rows]``; None asks it.

        Raises:
            Rejected: the learner's familiarity is no finite number for each row.
        """
        answered = np.full(len(rows), len(self.own) > 0)
        ratios: FloatArray = np.zeros(len(rows))
        if self.method.density() and len(self.own):
            ratios = self._familiarity(rows, learner, scores)
            if self.method.accept:
                answered = ratios >= self._threshold(learner)
        return answered, ratios[answered] if self.method.tells_familiarity() else None

    def _familiarity(
        self, rows: IntArray, learner: Learner, scores: FloatArray | None
    ) -> FloatArray:
        if self.method.density() not in DENSITIES:
            return said_by(learner, self.proxy.take(rows)) if scores is None else finite(scores)
        if self._ratios is None:
            self._ratios = self._estimate().score(self.proxy.inputs)
        return self._ratios[rows]

    def _threshold(self, learner: Learner) -> float:
        """The familiarity below which a row is declined: a quantile of that of own rows."""
        if self.method.density() in DENSITIES:
            return self._estimate().threshold(self.method.accept)
        return float(np.quantile(said_by(learner, self.own.inputs), self.method.accept))

    def _estimate(self) -> Density:
        """From the rows alone, and so the same whenever it is made."""
        if self._density is None:
            make = DENSITIES[self.method.density()]
            self._density = make(self.own.inputs, features_of(self.proxy), seed=self.seed)
        return self._density


def said_by(learner: Learner, inputs: FloatArray) -> FloatArray:
    """What a learner says of its own to proxy rows, log density ratio ``[rows]``."""
    score = getattr(learner, "familiarity", None)
    if score is None:  # a model that cannot tell
        return np.zeros(len(inputs))
    return finite(floats(score(inputs), (len(inputs),)))


def finite(ratios: FloatArray) -> FloatArray:
    """The familiarity of rows, if it is a number for each."""
    if not np.isfinite(ratios).all():
        raise Rejected("nonfinite", "the model's familiarity is NaN or infinite")
    return ratios


def floats(values: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """What a model says, if it is floats of exactly this shape: no broadcasting, no objects."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        raise Rejected("dtype", f"the model must predict floats, it predicts {array.dtype}")
    if array.shape != shape:
        raise Rejected("shape", f"the model must predict {shape}, it predicts {array.shape}")
    return array
