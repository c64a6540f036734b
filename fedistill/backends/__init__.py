"""Backends: what runs a plan on the clients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedistill.evaluate import Figures
from fedistill.types import Rows
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


@runtime_checkable
class Away(Protocol):
    """A backend whose clients work in processes that it started; the sites here are theirs."""

    def measure(self, due: Mapping[str, Rows]) -> dict[str, Figures]:
        """Figures of clients, each on its own test rows, or on the common ones."""
        ...

    def fetch(self) -> None:
        """Bring the learners of this process to where those of the clients are."""
        ...

    def close(self) -> None:
        """End those processes."""
        ...


@contextlib.contextmanager
def at_work(backend: Backend) -> Iterator[Away | None]:
    """The part of a backend that works in processes of its own, ended with the context; or None."""
    inner = backend
    while not isinstance(inner, Away) and hasattr(inner, "inner"):
        inner = inner.inner
    away = inner if isinstance(inner, Away) else None
    try:
        yield away
        if away is not None:
            away.fetch()
    finally:
        if away is not None:
            away.close()
