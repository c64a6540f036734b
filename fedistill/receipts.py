"""What was erased, when, and what was not: a receipt for whoever asked for it, and for an auditor.

A receipt names nobody: people stand in it as hashes under a key that stays at the site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedistill import store

RECEIPTS = "receipts"


def now() -> str:
    """The present time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What an erasure did.

    Attributes:
        kind: ``forget`` (people, at a site) or ``drop`` (a client, at the coordinator).
        site: the site, or the client.
        time: in UTC.
        subjects: the mark of each person, as in the site's tombstones.
        rows: taken out of memories, each with its logits, soft targets and features.
        predictions: of the client that the coordinator had stored, proxy rows.
        targets: soft targets that the coordinator has dropped, and makes anew, proxy rows.
        written: files that were written anew.
        removed: files that were taken away.
        weights: by run (or ``student``) what becomes of what a model has learned.
        epsilon: spent by the site so far, where there is a ledger.
        delta: at which it is stated.
        unit: of privacy: ``record`` or ``user``.
        ledger: head of the ledger's chain after the erasure.
        notes: what this erasure does not do.
        elsewhere: what is left to others.
    """

    kind: str
    site: str
    time: str = field(default_factory=now)
    subjects: tuple[str, ...] = ()
    rows: int = 0
    predictions: int = 0
    targets: int = 0
    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    epsilon: float | None = None
    delta: float | None = None
    unit: str = ""
    ledger: str = ""
    notes: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()

    def text(self) -> str:
        """The same, to be read."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.kind == "forget":
            yield f"{self.site}: {len(self.subjects)} forgotten, {self.time}"
            yield from (f"  person {mark}" for mark in self.subjects)
            yield f"  rows taken out of memories: {self.rows}"
        else:
            yield f"{self.site}: dropped at the coordinator, {self.time}"
            yield f"  stored predictions dropped, proxy rows: {self.predictions}"
            yield f"  soft targets dropped, to be made anew, proxy rows: {self.targets}"
        yield from (f"  written anew: {name}" for name in self.written)
        yield from (f"  removed: {name}" for name in self.removed)
        yield from (f"  weights ({run}): {words}" for run, words in self.weights.items())
        if self.epsilon is not None:
            delta = "" if self.delta is None else f" at delta {self.delta:g}"
            unit = f", unit: {self.unit}" if self.unit else ""
            yield f"  epsilon {self.epsilon:.4g}{delta}{unit}"
        if self.ledger:
            yield f"  ledger: {self.ledger}"
        yield from (f"  note: {line}" for line in self.notes)
        yield from (f"  left to do: {line}" for line in self.elsewhere)


def write_receipt(folder: Path, receipt: Receipt) -> Path:
    """Keep a receipt in ``folder/receipts``, as JSON and beside it as text.

    Returns:
        The JSON file.

    Raises:
        RunError: the folder cannot be written.
    """
    place = folder / RECEIPTS
    store.probe(place)
    name = f"{receipt.kind}-{receipt.time.replace('-', '').replace(':', '')}"
    number = 1
    while (place / f"{name}.json").exists():
        number += 1
        name = f"{name.split('_')[0]}_{number}"
    store.save_json(place / f"{name}.json", dataclasses.asdict(receipt))
    store.write_atomic(place / f"{name}.txt", f"{receipt.text()}\n".encode())
    return place / f"{name}.json"


def names(files: Sequence[Path], home: Path) -> tuple[str, ...]:
    """Files as a receipt names them: from the folder that was asked about."""
    return tuple(file.relative_to(home).as_posix() for file in files)
