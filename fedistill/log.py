"""Structured events: what happened, when and to whom, without private values.

An event has a name from :data:`EVENTS` and fields from :data:`FIELDS`. Both are whitelists: there
is no field that could hold a row, a label, a prediction, a path or the text of an exception. All
text is cut and escaped, for ids and reasons come from other sites (fault 64).

Events go through ``logging.getLogger("fedistill.events")``, which says nothing unless a program
asks for it, and into the files of :func:`events_to`, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

from fedistill.errors import RunError

Event = dict[str, Any]

EVENTS: Mapping[str, str] = {
    # at the coordinator
    "run_started": "a run begins with its first round",
    "run_resumed": "a run goes on from its checkpoint",
    "round_started": "sites are asked for the round's predictions, perhaps not for the first time",
    "answered": "a site's upload was let in",
    "dropped": "a site's upload was refused, or none came; reason says why",
    "quorum_missed": "too few uploads: soft targets stay as they were, the round is tried again",
    "round_done": "uploads are combined, the student is taught, the checkpoint is written",
    "run_done": "the last round is done",
    "run_failed": "the run gave up; --resume goes on once the reason is gone",
    "run_interrupted": "Ctrl-C or SIGTERM; --resume goes on",
    "worker_died": "a process that clients of a simulation work in; another goes on in its place",
    # at a site
    "run_begun": "a plan of a run that this site has not met before",
    "plan_received": "the coordinator asks for predictions",
    "step_done": "trained, predicted and answered; or the stored answer was sent again",
    "measured": "the student after its step, on the site's own test rows; it stays with the site",
    "step_refused": "this site does not answer that plan; reason says why",
    "step_failed": "the step broke off; kind is the error's class and line of code, never its text",
    "state_restored": "the newest state was damaged: the site goes on from the one before it",
}
"""Every event by name, with what it means."""

FIELDS: Mapping[str, type] = {
    "run": str,
    "round": int,
    "rounds": int,
    "attempt": int,
    "site": str,
    "sites": list,
    "asked": list,
    "answered": int,
    "quorum": int,
    "reason": str,
    "kind": str,
    "bytes_up": int,
    "bytes_down": int,
    "seconds": float,
    "version": str,
    "method": str,
    "accuracy": float,
    "address": str,
}
"""Every field an event may have; ``sites`` and ``asked`` are lists of ids.

``accuracy`` is the server student's, or in a site's own log the site's own.
"""

LONGEST_TEXT = 64
LONGEST_LIST = 1000
CODES: Mapping[str, str] = {
    "reason": r"[\w.:-]*",
    "kind": r"[\w.]*( at [\w.:<>?-]+)?",
}
"""Fields that hold a short code, or a class and the line of code where it was raised.

A sentence in them could quote data, and is withheld.
"""
WITHHELD = "withheld"
LARGEST = 10 << 20
"""Bytes after which a file of events is put aside as ``NAME.1``."""
KEPT = 5
"""Files put aside, ``NAME.1`` being the newest."""
BLOCK = 1 << 16

LOGGER = logging.getLogger("fedistill.events")
logging.getLogger("fedistill").addHandler(logging.NullHandler())


@dataclass(frozen=True, eq=False)
class _Sink:
    """A file that events are written to, and what is added to each of them."""

    path: Path
    standing: Event


_SINKS: list[_Sink] = []


def event(name: str, /, **fields: Any) -> None:
    """Log an event; a field that is None, NaN or infinite is left out.

    The level is WARNING for what is dropped or has failed, else INFO.

    Raises:
        TypeError: an unknown event, an unknown field, or a field of another type.
    """
    if name not in EVENTS:
        raise TypeError(f'expected an event of fedistill.log.EVENTS, found "{escaped(name)}"')
    known = checked(fields)
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    for sink in tuple(_SINKS):
        line = {"time": time, "event": name} | sink.standing | known
        # The disk is full, or the folder has gone: the event is lost, and the run goes on.
        with contextlib.suppress(OSError):
            _append(sink.path, json.dumps(line).encode() + b"\n")
    level = logging.WARNING if name.endswith(("_failed", "dropped")) else logging.INFO
    if LOGGER.isEnabledFor(level):
        told = " ".join([name, *(f"{key}={json.dumps(value)}" for key, value in known.items())])
        LOGGER.log(level, "%s", told, extra={"event": name, "fields": known})


@contextlib.contextmanager
def events_to(path: Path, **standing: Any) -> Iterator[None]:
    """Write the events of this process to a file as well, while the context is open.

    Several processes may write to one file: each line is one write at its end. The file is
    readable by its owner alone, and is put aside when it has grown to 10 MiB.

    Args:
        path: the file, usually ``events.jsonl``.
        standing: fields added to every event that does not have them itself.

    Raises:
        TypeError: an unknown field, or a field of another type.
    """
    sink = _Sink(path, checked(standing))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    _SINKS.append(sink)
    try:
        yield
    finally:
        _SINKS.remove(sink)


def read_events(path: Path, last: int = 1000) -> list[Event]:
    """The last events of a file, the oldest first; what is torn or not an event is left out.

    Only the end of a large file is read. Files put aside count as its beginning.

    Raises:
        RunError: the file is there and cannot be read.
    """
    found: list[Event] = []
    seen: set[tuple[int, int]] = set()
    for file in (path, *(_aside(path, number) for number in range(1, KEPT + 1))):
        if len(found) >= last:
            break
        try:
            with file.open("rb") as handle:
                facts = os.fstat(handle.fileno())
                if (facts.st_dev, facts.st_ino) in seen:
                    continue  # put aside while we read
                seen.add((facts.st_dev, facts.st_ino))
                lines = _tail(handle, last - len(found))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RunError(
                f"expected a readable file of events, found {file} ({error.strerror}): "
                "check its permissions"
            ) from None
        found = [entry for line in lines if (entry := _parsed(line)) is not None] + found
    return found


# --- fields --------------------------------------------------------------------------------------


def checked(fields: Mapping[str, Any]) -> Event:
    """The fields as they are written: known, of their type, cut and escaped.

    Raises:
        TypeError: an unknown field, or a field of another type.
    """
    known: Event = {}
    for name, value in fields.items():
        if name not in FIELDS:
            raise TypeError(f'expected a field of fedistill.log.FIELDS, found "{escaped(name)}"')
        if value is not None and (told := _told(name, value)) is not None:
            known[name] = told
    return known


def _told(name: str, value: Any) -> str | int | float | list[str] | None:
    """A value as it is written; None if there is nothing to write."""
    kind = FIELDS[name]
    if kind is str and isinstance(value, str):
        coded = name not in CODES or re.fullmatch(CODES[name], value, re.ASCII)
        return escaped(value) if coded else WITHHELD
    if kind is list and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return [escaped(one) for one in value[:LONGEST_LIST]]
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return round(float(value), 6) if math.isfinite(value) else None
    # The error names the types alone: the value may be private.
    raise TypeError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")


def escaped(text: str) -> str:
    r"""A text on one line of at most 64 characters, control and direction characters escaped.

    >>> print(escaped("a\nb"), len(escaped("x" * 5000)))
    a\nb 64
    """
    safe = "".join(
        one.encode("unicode_escape").decode()
        if unicodedata.category(one)[0] == "C" or unicodedata.category(one) in {"Zl", "Zp"}
        else one
        for one in text[: LONGEST_TEXT + 1]
    )
    return safe if len(safe) <= LONGEST_TEXT else safe[: LONGEST_TEXT - 1] + "…"


# --- files ---------------------------------------------------------------------------------------


def _append(path: Path, line: bytes) -> None:
    """One line at the end of the file; a torn line before it is closed first."""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, b"\n" + line if torn else line)
        if size + len(line) >= LARGEST:
            _put_aside(path, handle)
    finally:
        os.close(handle)


def _put_aside(path: Path, handle: int) -> None:
    """Rename the open file to ``NAME.1`` and older ones onwards; one process does it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), path.stat()):
            return  # another process has done it
        for number in range(KEPT, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                _aside(path, number - 1).replace(_aside(path, number))
        path.replace(_aside(path, 1))


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _tail(file: BinaryIO, last: int) -> list[bytes]:
    """The last lines of a file, read from its end."""
    place = file.seek(0, os.SEEK_END)
    blocks: list[bytes] = []
    ends = 0
    while place and ends <= last:
        size = min(BLOCK, place)
        place = file.seek(place - size)
        blocks.append(file.read(size))
        ends += blocks[-1].count(b"\n")
    lines = b"".join(reversed(blocks)).split(b"\n")
    whole = lines[1:] if place else lines
    return [line for line in whole if line.strip()][-last:]


def _parsed(line: bytes) -> Event | None:
    """A line's event with the fields that we know; None if it is torn, or none of ours."""
    try:
        found = json.loads(line)
        datetime.fromisoformat(found["time"])
        if not isinstance(found["event"], str):
            return None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    known = {name: value for name, value in found.items() if _fits(name, value)}
    return {"time": found["time"], "event": found["event"]} | known


def _fits(name: str, value: object) -> bool:
    kind = FIELDS.get(name)
    if isinstance(value, bool) or kind is None:
        return False
    return isinstance(value, int | float if kind is float else kind)
