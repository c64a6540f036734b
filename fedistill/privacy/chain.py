"""Rows of the ledger and the chain that holds them together.

Each row carries the hash of the row before it. Who changes, adds or removes one has to change all
that follow, and the last hash is known elsewhere (checkpoints, receipts of the server).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedistill.errors import LedgerError
from fedistill.privacy.events import Spending

COLUMNS: Mapping[str, str] = {
    "seq": "INTEGER PRIMARY KEY",
    "entry_id": "TEXT NOT NULL",
    "kind": "TEXT NOT NULL",
    "time": "TEXT NOT NULL",
    "run": "TEXT NOT NULL",
    "round": "INTEGER NOT NULL",
    "mechanism": "TEXT NOT NULL",
    "spending": "TEXT NOT NULL",
    "unit": "TEXT NOT NULL",
    "relation": "TEXT NOT NULL",
    "epsilon": "REAL",
    "delta": "REAL",
    "cohorts": "TEXT NOT NULL",
    "splits": "TEXT NOT NULL",
    "touched": "TEXT NOT NULL",
    "members": "TEXT NOT NULL",
    "release_sha256": "TEXT",
    "heads": "TEXT NOT NULL",
    "prev": "TEXT NOT NULL",
    "hash": "TEXT NOT NULL UNIQUE",
}
"""Columns of table ``entry`` and their types. All but ``hash`` are what ``hash`` is taken of."""

ACKNOWLEDGE = "state what that does not know with `fedistill ledger acknowledge-loss`"
"""What to do once a backup is back in its place."""

KINDS = ("reserve", "release", "void", "loss", "erase")


@dataclass(frozen=True)
class Entry:
    """One row of the ledger.

    Attributes:
        seq: number of the row, from 1.
        entry_id: ``run/round/attempt`` of a reservation; its release and void bear the same.
        kind: ``reserve`` (a debit), ``release`` (its result may leave), ``void`` (nothing was
            computed, the debit is taken back), ``loss`` (what a restored backup does not know),
            ``erase`` (units that must not be used again).
        time: when, UTC. For readers: nothing is decided by it.
        run: run that it belongs to.
        round: round of the run.
        cohorts: which cohorts are charged.
        mechanism: how the noise comes in.
        spending: what is charged.
        unit: whose presence is hidden (record or user).
        relation: neighbouring data sets that the limit is meant for.
        epsilon: the limit that the reservation was held against.
        delta: its delta.
        splits: cohorts that were born here, and of which cohort ("": units not seen before).
        touched: keyed digest of the set of units.
        members: digest of who is in which cohort, after this row, and of the key's mark.
        release_sha256: digest of what was released.
        heads: of a loss: last rows of the lost ledger, which others ask for.
        prev: hash of the row before, "" for the first.
        hash: SHA-256 of ``prev`` and all the columns.
    """

    seq: int
    entry_id: str
    kind: str
    time: str
    run: str
    round: int
    mechanism: str = ""
    spending: Spending = field(default_factory=Spending)
    unit: str = ""
    relation: str = ""
    epsilon: float | None = None
    delta: float | None = None
    cohorts: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    touched: str = ""
    members: str = ""
    release_sha256: str | None = None
    heads: tuple[str, ...] = ()
    prev: str = ""
    hash: str = ""

    def row(self) -> tuple[Any, ...]:
        """Values in the order of :data:`COLUMNS`, as they are stored."""
        stored = {
            **{name: getattr(self, name) for name in COLUMNS},
            "spending": self.spending.to_json(),
            "cohorts": _canonical(sorted(self.cohorts)),
            "splits": _canonical(dict(self.splits)),
            "heads": _canonical(sorted(self.heads)),
        }
        return tuple(stored.values())

    def sealed(self) -> Entry:
        """The same with its hash."""
        return replace(self, hash=row_hash(self.row()))


def row_hash(row: tuple[Any, ...]) -> str:
    """SHA-256 of the previous hash and the canonical row, every column under it."""
    told = dict(zip(COLUMNS, row, strict=True))
    told.pop("hash")
    return hashlib.sha256(f"{told['prev']}{_canonical(told)}".encode()).hexdigest()


def read_chain(rows: Iterable[tuple[Any, ...]], name: str) -> tuple[Entry, ...]:
    """Rows in their order, as entries, once the chain is proved.

    Args:
        rows: values in the order of :data:`COLUMNS`.
        name: of the ledger, for the error.

    Raises:
        LedgerError: a row that was changed, added, or is missing; it says which.
    """
    entries: list[Entry] = []
    prev = ""
    for place, row in enumerate(rows, 1):
        told = dict(zip(COLUMNS, row, strict=True))
        if told["seq"] != place or told["prev"] != prev:
            raise _broken(name, place, "does not follow the row before it")
        if told["hash"] != row_hash(row):
            raise _broken(name, place, "does not have the hash that it was written with")
        entries.append(_entry(told))
        prev = told["hash"]
    return tuple(entries)


def _entry(told: dict[str, Any]) -> Entry:
    return Entry(
        **{
            **told,
            "spending": Spending.from_json(told["spending"]),
            "cohorts": tuple(json.loads(told["cohorts"])),
            "splits": json.loads(told["splits"]),
            "heads": tuple(json.loads(told["heads"])),
        }
    )


def _broken(name: str, place: int, what: str) -> LedgerError:
    return LedgerError(
        f"{name} was edited, row {place} {what}: nothing is released; restore it from a backup, "
        f"and {ACKNOWLEDGE}"
    )


def _canonical(value: Any) -> str:
    # A value that was edited into bytes has no JSON: as text its hash differs, which is the point.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
