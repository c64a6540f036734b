"""Where the states of sleeping sites rest while a run lasts: in memory, or in temporary files.

A state is one block of bytes, as :func:`fedistill.store.state_bytes` gives it: named arrays and
facts under a checksum. Nothing here outlives the process: what a killed run goes on from lies in
its run folder, see :mod:`fedistill.kept`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from fedistill.errors import FedistillError, RunError, did_you_mean

SMALLEST = 4096
"""Bytes of the smallest slot: a page."""
STEPS = 4
"""Sizes of slots between one power of two and the next."""


class StateStore(Protocol):
    """Keeps a block of bytes under each name."""

    def put(self, name: str, state: bytes) -> None:
        """Keep a state in place of the one before."""
        ...

    def get(self, name: str) -> bytes:
        """What was put last; KeyError without any."""
        ...

    def drop(self, name: str) -> None:
        """Keep nothing under this name."""
        ...


class MemoryStore:
    """States in memory: quick, and as large as all of them together."""

    def __init__(self) -> None:
        self._states: dict[str, bytes] = {}

    def put(self, name: str, state: bytes) -> None:
        """Keep a state in place of the one before."""
        self._states[name] = state

    def get(self, name: str) -> bytes:
        """What was put last; KeyError without any."""
        return self._states[name]

    def drop(self, name: str) -> None:
        """Keep nothing under this name."""
        self._states.pop(name, None)


class DiskStore:
    """States in temporary files, which are gone with the process even if it is killed.

    Slots of equal length lie in one file, a row for each client, so that those of one model share
    a file and what is freed is used again. They are written and read in place and not mapped: no
    page of them counts as memory of this process, and a full disk is an error and not a signal.

    Args:
        folder: where the files are made; None: where the system keeps such files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(folder or tempfile.gettempdir())
        self._files = contextlib.ExitStack()
        weakref.finalize(self, self._files.close)
        self._groups: dict[int, _Group] = {}
        self._places: dict[str, _Place] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskStore:
        """The same states in files of its own."""
        copied = memo[id(self)] = DiskStore(self.folder)
        for name in self._places:
            copied.put(name, self.get(name))
        return copied

    def put(self, name: str, state: bytes) -> None:
        """Keep a state in place of the one before.

        Raises:
            RunError: the disk is full, or the folder cannot be written.
        """
        size = slot_size(len(state))
        place = self._places.get(name)
        if place is None or place.size != size:
            self.drop(name)
            place = _Place(size, self._group(size).take())
        self._places[name] = _Place(size, place.row, len(state))
        try:
            self._group(size).write(place.row, state)
        except OSError as error:
            raise self._cannot(error) from None

    def get(self, name: str) -> bytes:
        """What was put last; KeyError without any."""
        place = self._places[name]
        return self._groups[place.size].read(place.row, place.length)

    def drop(self, name: str) -> None:
        """Keep nothing under this name."""
        place = self._places.pop(name, None)
        if place is not None:
            self._groups[place.size].free.append(place.row)

    def _group(self, size: int) -> _Group:
        if size not in self._groups:
            try:
                opened = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            except OSError as error:
                raise self._cannot(error) from None
            self._groups[size] = _Group(size, self._files.enter_context(opened))
        return self._groups[size]

    def _cannot(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write states of sleeping clients to {self.folder} ({error.strerror}): free "
            'some space, set TMPDIR to another disk, or set backend.store = "memory"'
        )


@dataclass(frozen=True)
class _Place:
    """Where a state lies: in which group and row, and how long it is."""

    size: int
    row: int
    length: int = 0


@dataclass
class _Group:
    """Slots of one size in one file.

    Attributes:
        size: bytes of a slot.
        file: unnamed.
        rows: slots that were ever taken.
        free: those of them that hold nothing any more.
    """

    size: int
    file: IO[bytes]
    rows: int = 0
    free: list[int] = field(default_factory=list)

    def take(self) -> int:
        """An empty slot."""
        if self.free:
            return self.free.pop()
        self.rows += 1
        return self.rows - 1

    def write(self, row: int, state: bytes) -> None:
        left, at = memoryview(state), row * self.size
        while left:  # a file system may take less at once
            done = os.pwrite(self.file.fileno(), left, at)
            left, at = left[done:], at + done

    def read(self, row: int, length: int) -> bytes:
        parts, at = [], row * self.size
        while length and (part := os.pread(self.file.fileno(), length, at)):
            parts.append(part)
            length, at = length - len(part), at + len(part)
        return b"".join(parts)


def slot_size(length: int) -> int:
    """Bytes of the slot for a state: the next of four sizes to a power of two.

    The states of one model differ by the few bytes of an upload, and mostly share a size.

    >>> slot_size(1), slot_size(4097), slot_size(100_000)
    (4096, 5120, 114688)
    """
    octave = SMALLEST
    while octave * 2 <= length:
        octave *= 2
    step = octave // STEPS
    return max(SMALLEST, -(-length // step) * step)


STORES: dict[str, Callable[[], StateStore]] = {"disk": DiskStore, "memory": MemoryStore}


def store_of(name: str) -> Callable[[], StateStore]:
    """What the setting ``backend.store`` names.

    Raises:
        FedistillError: there is none of this name.
    """
    if name not in STORES:
        raise FedistillError(f'unknown store "{name}"{did_you_mean(name, STORES)}')
    return STORES[name]
