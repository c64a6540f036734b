"""A learner that is not to be trusted, around an honest one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedistill.aggregate.basics import log_softmax
from fedistill.attacks.kinds import Attack
from fedistill.seeding import generator
from fedistill.types import FloatArray, IntArray, Logits, Probs, Rows, State

if TYPE_CHECKING:
    from fedistill.distill.learner import Learner

LOWEST = -8.0
"""Colluders cut log-probabilities here: what a codec rounds to nothing would look identical."""
NOISE = 0.1
"""Colluders' noise on log-probabilities, plus and minus: two steps of the codec ``u8``."""
HANDED_ON = ("guide", "features")
"""What only some learners offer; whoever needs it looks whether it is there."""


class Copied:
    """The latest soft target of every public row that came by, to be repeated.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.known: dict[bytes, FloatArray] = {}

    def keep(self, inputs: FloatArray, targets: Probs) -> None:
        """Remember targets ``[rows, classes]`` of public rows ``[rows, ...]``."""
        for row, target in zip(_flat(inputs), np.asarray(targets, dtype=np.float32), strict=True):
            self.known[row.tobytes()] = target

    def of(self, inputs: FloatArray) -> Probs:
        """Targets ``[rows, classes]``: the row's, else those of the nearest; else uniform."""
        flat = _flat(inputs)
        if not self.known:
            return np.full((len(flat), self.classes), 1.0 / self.classes)
        keys = [row.tobytes() for row in flat]
        new = [number for number, key in enumerate(keys) if key not in self.known]
        found = np.array([self.known.get(key, np.zeros(self.classes)) for key in keys])
        if new:
            found[new] = self._targets()[nearest(flat[new], self._inputs())]
        return found.reshape(len(flat), self.classes)

    def _inputs(self) -> FloatArray:
        return np.array([np.frombuffer(key, dtype=np.float32) for key in self.known])

    def _targets(self) -> Probs:
        return np.array(list(self.known.values()))

    def state_dict(self) -> State:
        """Rows, flattened, and their targets; nothing while there are none."""
        return {"inputs": self._inputs(), "targets": self._targets()} if self.known else {}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.known = {}
        if state:
            self.keep(state["inputs"], state["targets"])


def nearest(rows: FloatArray, among: FloatArray, block: int = 256) -> IntArray:
    """For each of ``rows [n, inputs]`` the number of the nearest of ``among [m, inputs]``."""
    others = np.asarray(among, dtype=np.float64)
    lengths = (others**2).sum(axis=1)
    found = [
        (lengths - 2 * np.asarray(rows[start : start + block], dtype=np.float64) @ others.T).argmin(
            axis=1
        )
        for start in range(0, len(rows), block)
    ]
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Pact:
    """What a colluder agrees on with the others, and what it keeps to itself.

    Attributes:
        shared: seed with which all of them train.
        own: seed of the noise that tells its uploads from theirs.
    """

    shared: int
    own: int


class BadLearner:
    """An honest learner with a hand on what it is told and on what it says.

    Args:
        inner: the honest learner.
        attack: what is done.
        classes: number of classes.
        pact: with whom it colludes; None: with nobody.
    """

    def __init__(
        self, inner: Learner, attack: Attack, classes: int, pact: Pact | None = None
    ) -> None:
        self.inner = inner
        self.attack = attack
        self.classes = classes
        self.pact = pact
        self.copied = Copied(classes)
        for name in HANDED_ON:
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def absorb(
        self,
        inputs: FloatArray,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> None:
        """Learn from soft targets as an honest client does, or only keep them to repeat them."""
        if self.attack.copies:
            self.copied.keep(inputs, soft_targets)
        if self.attack.trains:
            self.inner.absorb(inputs, soft_targets, seed=self._seed(seed), weights=weights)

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Train, unless it is a free rider."""
        if self.attack.trains:
            self.inner.fit(self._once(rows), seed=self._seed(seed))

    def predict(self, inputs: FloatArray) -> Logits:
        """What it shares, ``[rows, classes]``."""
        said = self.attack.tamper(self._before(inputs))
        return said if self.pact is None else disguised(said, inputs, self.pact.own)

    def honest(self, inputs: FloatArray) -> Logits:
        """What its learner really finds: logits ``[rows, classes]``."""
        return self.inner.predict(inputs)

    def familiarity(self, inputs: FloatArray) -> FloatArray:
        """The familiarity that it claims, ``[rows]``."""
        score = getattr(self.inner, "familiarity", None)
        if self.attack.claims is None and score is not None:
            return np.asarray(score(inputs))
        return np.full(len(inputs), self.attack.claims or 0.0, dtype=np.float32)

    def state_dict(self) -> State:
        """The inner learner's state, and the targets it copied."""
        state = {f"inner.{name}": value for name, value in self.inner.state_dict().items()}
        return state | {f"copied.{k}": v for k, v in self.copied.state_dict().items()}

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore.

        Raises:
            KeyError: the state is that of an honest learner.
        """
        inner = {name[6:]: value for name, value in state.items() if name.startswith("inner.")}
        if state and not inner:
            raise KeyError("inner")
        self.inner.load_state_dict(inner, self._once(rows))
        self.copied.load_state_dict({k[7:]: v for k, v in state.items() if k[:7] == "copied."})

    def _before(self, inputs: FloatArray) -> Logits:
        """Logits before they are tampered with."""
        if self.attack.copies:
            copy: Logits = np.log(np.maximum(self.copied.of(inputs), 1e-12, dtype=np.float64))
            return copy
        if not self.attack.trains:
            return np.zeros((len(inputs), self.classes))
        return self.inner.predict(inputs)

    def _once(self, rows: Rows) -> Rows:
        """Its rows without the repeats that only make it look large."""
        times = self.attack.repeats
        return rows if times == 1 else rows.take(np.arange(len(rows) // times))

    def _seed(self, seed: int) -> int:
        return seed if self.pact is None else self.pact.shared


def disguised(logits: Logits, inputs: FloatArray, seed: int) -> Logits:
    """Log-probabilities with a little noise that belongs to the row: the same row, the same noise.

    Uploads that are equal to the byte count as one. The noise is a hash of the row's bits (their
    sum modulo 2**64, each times an odd number drawn from the seed), so that it depends neither on
    the order of the rows nor on how a library sums floats.
    """
    rows = _flat(inputs)
    bits = rows.view(np.uint32).astype(np.uint64)
    shape = (rows.shape[1], np.shape(logits)[1])
    factors = generator(seed, "noise").integers(0, 1 << 63, size=shape, dtype=np.uint64)
    hashed = bits @ (2 * factors + 1) >> np.uint64(32)
    noise = NOISE * (hashed.astype(np.float64) / (1 << 31) - 1)
    return np.maximum(log_softmax(logits), LOWEST) + noise


def _flat(inputs: FloatArray) -> FloatArray:
    """Rows as contiguous float32 ``[rows, inputs]``."""
    table = np.ascontiguousarray(inputs, dtype=np.float32)
    return table.reshape(len(table), int(np.prod(table.shape[1:])))
