"""A log that shows when it was changed: what a site did with private rows, and when.

One JSON object a line, each with the hash of the line before and its own (SHA-256 over canonical
JSON). An edited, missing or moved line breaks the chain at a line that can be named. Lines that
are missing at the end break no chain; the file ``NAME.head`` beside the log, which holds the last
line's number and hash, shows those.

The chain has no key. It shows accidents and naive edits. Whoever may write both files can write
both anew: keep a hash of it elsewhere (on paper, with the data protection officer), and give it to
:func:`verify`.

An entry has a name from :data:`EVENTS` and fields from :data:`FIELDS`, which are whitelists as in
:mod:`fedistill.log`: none can hold a row, a label, a prediction, an id of a person or a path.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

from fedistill.errors import LedgerError
from fedistill.log import WITHHELD, escaped
from fedistill.store import sync_folder, write_atomic
from fedistill.wire.messages import bucket

NAME = "audit-log.jsonl"
"""How a site's log is called."""

EVENTS: Mapping[str, str] = {
    "run_begun": "a run that this site had not met before",
    "charged": "a private step was charged to the ledger, before it ran",
    "voided": "a charge was taken back: nothing had been computed",
    "released": "the bytes that a charge bought may leave the site",
    "resent": "bytes that were released before went out again: no new charge",
    "refused": "a request was not answered; reason says why",
    "policy_refused": "the site's own policy forbids what was asked; reason says what",
    "exhausted": "the next step would cost more than is left of the budget",
    "forgotten": "units were erased; sha256 is that of the receipt",
    "loss_acknowledged": "the ledger was restored, and is charged with what it may lack",
    "torn": "bytes at the log's end that a crash left incomplete were put in quarantine",
}
"""Every event by name, with what it means."""

NUMBERS: Mapping[str, type] = {
    "round": int,
    "rounds": int,
    "steps": int,
    "entry": int,
    "rows": int,
    "units": int,
    "bytes": int,
    "epsilon": float,
    "delta": float,
    "sigma": float,
    "rate": float,
    "limit": float,
}
"""Fields that hold a number; ``rows`` and ``units`` are rounded to a power of two when written."""
BUCKETED = ("rows", "units")
TEXTS: Mapping[str, str] = {
    "run": r".*",
    "site": r".*",
    "purpose": r".*",
    "version": r".*",
    "mechanism": r"[\w-]*",
    "unit": r"[\w-]*",
    "relation": r"[\w-]*",
    "accountant": r"[\w .+-]*",
    "reason": r"[\w.:-]*",
    "sha256": r"[0-9a-f]*",
    "ledger": r"[0-9a-f]*",
    "proxy": r"[0-9a-f]*",
}
"""Fields that hold a text, with what it may look like; another text is withheld."""
FIELDS = (*NUMBERS, *TEXTS)
"""Every field an entry may have, beside time, event, seq, prev and hash."""
OWN = ("time", "event", "seq", "prev", "hash")

START = "0" * 64
"""What stands in place of a hash before the first entry."""
WINDOW = 1 << 20
"""Bytes at the end of a log among which its last whole entry must be."""

Entry = Mapping[str, Any]


class AuditLog:
    """An audit log that is written to.

    Each entry is on the disk when :meth:`append` returns. Several processes may write to one log:
    they take turns. What a crash left incomplete at the end stays where it is, and the next entry
    says so; nothing is ever removed.

    Args:
        path: of the log; its folder is made when the first entry is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, /, **fields: Any) -> str:
        """Write an entry and return its hash; a field that is None, NaN or infinite is left out.

        Raises:
            TypeError: an unknown event, an unknown field, or a field of another type.
            LedgerError: the log was changed at its end, or cannot be written.
        """
        if event not in EVENTS or event == "torn":
            raise TypeError(f'expected an event of audit_log.EVENTS, found "{escaped(event)}"')
        known = checked(fields)
        try:
            with _locked(self.path) as handle:
                seq, prev, torn = _end(self.path, handle)
                _agrees(self.path, seq, prev)
                text = b""
                if torn is not None:
                    told = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
                    entry = _entry("torn", seq + 1, prev, told)
                    text, seq, prev = _written(entry), entry["seq"], entry["hash"]
                entry = _entry(event, seq + 1, prev, known)
                _write(handle, text + _written(entry))
                _remember(self.path, entry)
        except OSError as error:
            raise LedgerError(
                f"{self.path}: expected an audit log that can be written, found {error.strerror}: "
                "check its permissions and the space on the disk"
            ) from None
        return str(entry["hash"])


@dataclass(frozen=True)
class Verified:
    """A log whose chain holds.

    Attributes:
        entries: all of them, in order.
        torn: bytes at its end that a crash left incomplete; the next entry will say so.
    """

    entries: tuple[Entry, ...]
    torn: int = 0

    @property
    def head(self) -> str:
        """Hash of the last entry: what to keep elsewhere. Empty for a log without entries."""
        return str(self.entries[-1]["hash"]) if self.entries else ""


def verify(path: Path, head: str = "") -> Verified:
    """Check the whole chain of a log.

    Args:
        path: of the log.
        head: a hash that the log had once, kept elsewhere; empty for none.

    Raises:
        LedgerError: a line was edited, removed, moved or added, the last ones are missing, or the
            log does not hold ``head``; the text names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        _refuse(path, f"expected an audit log, found none ({error.strerror})")
    found: list[Entry] = []
    torn: list[bytes] = []
    for place, line in enumerate(lines, start=1):
        entry = _parsed(line)
        if entry is None:
            if line or torn or place < len(lines):
                torn.append(line)
            continue
        if line != _canonical(entry):
            _refuse(path, f"line {place}: expected JSON as it was written, found another", _EDITED)
        _check(path, place, entry, found, b"\n".join(torn) if torn else None)
        found.append(entry)
        torn = []
    _agrees(path, len(found), found[-1]["hash"] if found else START, found)
    if head and all(entry["hash"] != head for entry in found):
        _refuse(path, f"expected an entry with the hash {escaped(head)[:12]}…, found none")
    return Verified(tuple(found), len(b"\n".join(torn)))


def entries(path: Path, last: int = 1000) -> tuple[Entry, ...]:
    """The last entries of a log, unverified, for showing; empty where there is no log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - WINDOW))
            lines = file.read().split(b"\n")
    except OSError:
        return ()
    return tuple(entry for line in lines if (entry := _parsed(line)) is not None)[-last:]


def checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they are written: known, of their type, cut, escaped and bucketed.

    Raises:
        TypeError: an unknown field, or a field of another type; the value is not named.
    """
    known = {}
    for name, value in fields.items():
        if name not in FIELDS:
            raise TypeError(f'expected a field of audit_log.FIELDS, found "{escaped(name)}"')
        if value is not None and (told := _told(name, value)) is not None:
            known[name] = told
    return known


# --- entries -------------------------------------------------------------------------------------


def _told(name: str, value: Any) -> str | int | float | None:
    if name in TEXTS and isinstance(value, str):
        fits = re.fullmatch(TEXTS[name], value, re.ASCII | re.DOTALL)
        # A digest must be whole: it has as many characters as a text may have.
        return escaped(value) if fits else WITHHELD
    kind = NUMBERS.get(name)
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return bucket(int(value)) if name in BUCKETED else int(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    wanted = "str" if kind is None else kind.__name__
    raise TypeError(f"{name}: expected {wanted}, found {type(value).__name__}")


def _entry(event: str, seq: int, prev: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    entry = {"time": time, "event": event, "seq": seq, "prev": prev, **fields}
    return entry | {"hash": _hash(entry)}


def _hash(entry: Entry) -> str:
    body = {name: value for name, value in entry.items() if name != "hash"}
    return hashlib.sha256(_canonical(body)).hexdigest()


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _written(entry: Entry) -> bytes:
    return _canonical(entry) + b"\n"


def _parsed(line: bytes) -> Entry | None:
    """The entry of a line; None for what is no JSON object, as all that is torn."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _whole(entry: Entry) -> bool:
    """Whether an entry has its own hash."""
    own = all(name in entry for name in OWN) and type(entry["seq"]) is int
    return own and _sound(entry) and entry["hash"] == _hash(entry)


def _sound(entry: Entry) -> bool:
    return all(
        isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
        for value in entry.values()
    )


def _check(path: Path, place: int, entry: Entry, before: list[Entry], torn: bytes | None) -> None:
    """Whether an entry is as it was written, and follows those before it."""
    if not _whole(entry):
        _refuse(path, f"line {place}: expected the hash of its content, found another", _EDITED)
    prev = before[-1]["hash"] if before else START
    if entry["prev"] != prev or entry["seq"] != len(before) + 1:
        number = entry["seq"]
        _refuse(
            path,
            f"line {place}: expected entry {len(before) + 1} with the hash of the one before it, "
            f"found entry {number}",
            "lines were removed, added or moved",
        )
    if entry["event"] == "torn":
        if torn is None or entry.get("sha256") != hashlib.sha256(torn).hexdigest():
            _refuse(path, f"line {place - 1}: expected the torn bytes in quarantine, found others")
    elif torn is not None:
        _refuse(path, f"line {place - 1}: expected an entry, found other bytes", _EDITED)


# --- files ---------------------------------------------------------------------------------------

_EDITED = "it was edited"


def _refuse(path: Path, what: str, why: str = "it was changed or replaced") -> NoReturn:
    raise LedgerError(
        f"{path}: {what}: {why}; keep both files as evidence, and let a new log begin elsewhere"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The log, open for reading and appending, by one process and thread at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if fresh:
            sync_folder(path.parent)
        yield handle
    finally:
        os.close(handle)


def _end(path: Path, handle: int) -> tuple[int, str, bytes | None]:
    """Number and hash of the last entry, and what a crash left after it (None: nothing)."""
    size = os.fstat(handle).st_size
    begin = max(0, size - WINDOW)
    data = os.pread(handle, size - begin, begin)
    torn: list[bytes] = []
    lines = data.split(b"\n")
    for line in reversed(lines):
        entry = _parsed(line)
        if entry is None:
            torn.insert(0, line)
            continue
        if not _whole(entry):
            _refuse(path, "expected the last entry with the hash of its content", _EDITED)
        rest = b"\n".join(torn)
        return entry["seq"], str(entry["hash"]), rest.removesuffix(b"\n") if rest else None
    if begin:
        _refuse(path, f"expected an entry among the last {WINDOW} bytes, found none")
    return 0, START, data.removesuffix(b"\n") if data else None


def _write(handle: int, text: bytes) -> None:
    """Lines at the end, on a line of their own, and on the disk."""
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        text = b"\n" + text
    if os.write(handle, text) != len(text):
        raise OSError(0, "no room for a whole entry")
    os.fsync(handle)


def _head(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def _remember(path: Path, entry: Entry) -> None:
    """The last entry's number and hash, beside the log."""
    told = {"seq": entry["seq"], "hash": entry["hash"]}
    write_atomic(_head(path), _written(told))


def _agrees(path: Path, seq: int, last: str, found: list[Entry] | None = None) -> None:
    """Whether the log still has the entry that stands in its head file.

    The log may be ahead of it: a crash came between the two. It is never behind.
    """
    try:
        told = _parsed(_head(path).read_bytes()) or {}
    except FileNotFoundError:
        told = {"seq": 0, "hash": START} if seq <= 1 else {}
    number, digest = told.get("seq"), told.get("hash")
    if type(number) is not int or not isinstance(digest, str):
        _refuse(path, f"expected the file {_head(path).name} beside {seq} entries, found none")
    if number > seq:
        _refuse(
            path,
            f"line {seq + 1}: expected entry {seq + 1} of {number}, found the end of the log",
            "the last lines were removed",
        )
    there = last if number == seq else None
    if number < seq and found is not None:
        there = found[number - 1]["hash"] if number else START
    if there is not None and there != digest:
        _refuse(path, f"entry {number}: expected the hash in {_head(path).name}, found another")
