"""The seam between a private mechanism and the account that pays for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from fedistill.privacy.events import Spending
from fedistill.types import IntArray, Logits, Rows

Quote: TypeAlias = Callable[[float], Spending]
"""From a noise multiplier to what the next step would cost with it."""


@runtime_checkable
class Private(Protocol):
    """A learner whose next ``fit`` on own rows has to be paid for.

    ``quote`` says what it would cost, ``allow`` that it is paid. A learner that was not allowed,
    or has used its allowance up, refuses to ``fit`` on own rows: there is no way around the ledger
    by mistake. Everything else it does (``absorb``, ``predict``, ``fit`` on no rows) is
    post-processing and free.
    """

    def quote(self, rows: Rows, asked: IntArray) -> Quote:
        """What the next ``fit`` on these rows, and its answers on these proxy rows, would cost.

        It must not depend on the content of the rows, only on how many there are.
        """
        ...

    def allow(self, sigma: float) -> None:
        """The next ``fit``, once, with this much noise: what it costs is on the ledger."""
        ...

    def units(self, rows: Rows) -> tuple[bytes, ...]:
        """Names of all whose data the next ``fit`` touches, remembered rows included.

        A name is a digest of a record, or of a subject where the unit is the user. Names leave
        the client in no form; the ledger keeps them under a keyed hash.
        """
        ...


@runtime_checkable
class Answering(Protocol):
    """A private learner whose answers are not simply its predictions (noisy votes)."""

    def answer(self, asked: IntArray) -> Logits:
        """Logits ``[rows, classes]`` on these proxy rows that may leave the client."""
        ...
