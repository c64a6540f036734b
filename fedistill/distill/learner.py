"""The learner seam: anything that fits rows, absorbs soft targets and predicts.

Three methods and a state are all that a federation needs. A learner may also offer
``familiarity(inputs) -> [rows]``, the log density ratio of its own rows to the proxy rows; the
rule ``distribution-weighted`` asks for it. One that also trains by tables of other clients is
:class:`Guided`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from fedistill.distill.guide import Guide
from fedistill.types import FloatArray, Logits, Probs, Rows, State


@runtime_checkable
class Learner(Protocol):
    """Anything that learns. Calls come in rounds: ``absorb``, then ``fit``, then ``predict``."""

    def absorb(
        self,
        inputs: FloatArray,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> None:
        """Learn from public rows ``[rows, ...]`` and their soft targets ``[rows, classes]``.

        A learner may train at once, or keep them and join them to its own rows in ``fit``.
        ``weights [rows]`` are 1 for fresh targets and less for older ones.
        """
        ...

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Train on own labelled rows, which may be none."""
        ...

    def predict(self, inputs: FloatArray) -> Logits:
        """Logits ``[rows, classes]``; the same for the same inputs, always."""
        ...

    def state_dict(self) -> State:
        """Everything that a later ``load_state_dict`` needs to go on with equal results."""
        ...

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore. ``rows`` are the own rows, for learners whose state is a refit on them."""
        ...


@runtime_checkable
class Familiar(Protocol):
    """A learner that can tell its own rows from proxy rows."""

    def familiarity(self, inputs: FloatArray) -> FloatArray:
        """Log density ratio log p_own(x) / p_proxy(x) of each row, ``[rows]``."""
        ...


@runtime_checkable
class Guided(Protocol):
    """A learner that can train by a table of other clients, and tell the features of rows."""

    def guide(self, guide: Guide | None) -> None:
        """Train by this table from the next ``fit`` on, until there is another; None: by none."""
        ...

    def features(self, inputs: FloatArray) -> FloatArray:
        """Hidden features of each row, ``[rows, width]``; the same for the same inputs, always."""
        ...
