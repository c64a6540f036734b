"""Backends: what runs a plan on the clients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from fedistill.wire.messages import Failure, Plan


@dataclass(frozen=True)
class Reply:
    """What came back from a client, unread: only the server's door opens it."""

    client: str
    data: bytes
    asked: int = 1
    """How often the plan was sent for it."""


class Backend(Protocol):
    """Runs a plan on the clients it names, in any order, and yields what comes back."""

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        """One reply or failure for every client asked."""
        ...
