"""Uploads that come a round or more late: what they answered, and who has been heard already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedistill.types import IntArray
from fedistill.wire.envelope import unpack_mask
from fedistill.wire.messages import Plan
from fedistill.wire.rows import RowSpec

MOST_LATE = 3
"""Rounds after which a late upload is of no use any more."""


class Latecomers:
    """What was asked in the last rounds, and whose uploads of them were let in.

    Args:
        ask: from a round to its rows.
    """

    def __init__(self, ask: Callable[[int], RowSpec]) -> None:
        self._ask = ask
        self.skipped: dict[int, bytes] = {}
        self.let_in: dict[int, list[str]] = {}
        self.asked: dict[int, list[str]] = {}
        self._now: list[tuple[int, str]] = []

    def age(self, number: int, plan: Plan) -> int:
        """Rounds that an upload of round ``number`` is late; 0: it is not, or too late."""
        return plan.round - number if number in self.skipped and number < plan.round else 0

    def heard(self, number: int, client: str) -> bool:
        """Whether the client's upload of that round was let in, then or since."""
        return client in self.let_in[number]

    def rows(self, number: int) -> IntArray:
        """What was asked in round ``number``."""
        ask = self._ask(number)
        rows: IntArray = ask.rows()[~unpack_mask(self.skipped[number], ask.count)]
        return rows

    def note(self, number: int, client: str) -> None:
        """A late upload is let in; it counts as heard once the round is closed."""
        self._now.append((number, client))

    def close(self, plan: Plan, let_in: Iterable[str]) -> None:
        """A round is over, and these were heard in time."""
        for number, client in self._now:
            self.let_in[number].append(client)
        self._now.clear()
        self.skipped[plan.round], self.let_in[plan.round] = plan.skip, sorted(let_in)
        self.asked[plan.round] = list(plan.clients)
        for old in (self.skipped, self.let_in, self.asked):
            old.pop(plan.round - MOST_LATE, None)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "skipped": {str(number): mask.hex() for number, mask in self.skipped.items()},
            "let_in": {str(number): list(names) for number, names in self.let_in.items()},
            "asked": {str(number): names for number, names in self.asked.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.skipped = {int(k): bytes.fromhex(v) for k, v in state["skipped"].items()}
        self.let_in = {int(k): list(names) for k, names in state["let_in"].items()}
        self.asked = {int(k): list(names) for k, names in state["asked"].items()}
        self._now.clear()
