"""Backends: what runs a plan on the clients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from fedistill.errors import FedistillError, did_you_mean
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


BUILT_IN = {"serial": "Serial", "vectorized": "Vectorized", "processes": "Pool"}
"""The backends that run in this process or start their own, by their modules here."""


def backend_of(named: str | Callable[[Any], Backend]) -> Callable[[Any], Backend]:
    """What makes a backend from the sites: one of :data:`BUILT_IN` by name, or as it is.

    Raises:
        FedistillError: there is none of this name, or it makes nothing.
    """
    if callable(named):
        return named
    if named not in BUILT_IN:
        known = ", ".join(BUILT_IN)
        raise FedistillError(
            f"backend: expected {known}, or what makes one from the sites, found "
            f'"{named}"{did_you_mean(str(named), BUILT_IN)}'
        )
    made: Callable[[Any], Backend] = getattr(import_module(f"{__name__}.{named}"), BUILT_IN[named])
    return made
