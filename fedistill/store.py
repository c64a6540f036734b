"""State on disk: one file per owner, written whole or not at all, with the generation before it.

A file is ``magic, version, sha256, content``; the content is safetensors (named arrays and text,
nothing that could carry code). Writing goes to a temporary name, is synced, and renamed; the
former file stays as ``NAME.previous``. A file that was cut short is noticed by its checksum, and
the generation before is used instead, with a word about it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.errors import CheckpointError, RunError
from fedistill.types import State

MAGIC = b"FDstate\n"
SCHEMA = 1
HEADER = len(MAGIC) + 2 + 32
GROWS = ("optimizer.", "guide.")
"""Names of what a learner has only after its first step: a fresh one cannot list them."""


def write_atomic(
    path: Path, data: bytes, *, keep_previous: bool = False, own: bool = False
) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old content or the new one.

    Args:
        path: of the file.
        data: its content.
        keep_previous: keep the generation before it.
        own: for its owner's eyes alone.

    Raises:
        RunError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    link = path.with_name(f".{path.name}.{os.getpid()}.link")
    try:
        with temporary.open("wb") as file:
            if own:
                os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            link.unlink(missing_ok=True)
            os.link(path, link)
            link.replace(previous(path))
            link.unlink(missing_ok=True)  # both were one file: the rename did nothing
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        # Also when interrupted: what is left over is never a file that somebody might read.
        temporary.unlink(missing_ok=True)
        link.unlink(missing_ok=True)


def previous(path: Path) -> Path:
    """Where the generation before ``path`` is kept."""
    return path.with_name(path.name + ".previous")


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def probe(folder: Path) -> None:
    """Create the folder and write to it once, so that a run fails at its start and not later.

    Raises:
        RunError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.rglob(".*.*.*"):
            owner = re.fullmatch(r"\..+\.(\d+)\.(?:tmp|link)", leftover.name)
            if owner and not _lives(int(owner[1])):
                leftover.unlink(missing_ok=True)
        test = folder / ".probe"
        test.write_bytes(b"fedistill")
        test.unlink()
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _lives(process: int) -> bool:
    """Whether another process of this number is there, and may be writing."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock falls with the process, too.

    Raises:
        RunError: another process holds it.
    """
    with (folder / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"{folder} is in use by another process: wait for it, or choose another "
                "folder with --out"
            ) from None
        yield


def remove(path: Path) -> None:
    """Take a file and the generation before it away, durably.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        previous(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> RunError:
    if error.errno == errno.ENOSPC:
        return RunError(f"disk full while writing {path}: free some space, then --resume")
    return RunError(f"cannot write {path} ({error.strerror}): choose another folder with --out")


def save_state(path: Path, arrays: State, meta: Mapping[str, Any], *, own: bool = False) -> None:
    """Write named arrays and JSON-able facts as the newest generation of ``path``.

    Args:
        path: of the state.
        arrays: named.
        meta: facts.
        own: for its owner's eyes alone: it may hold rows.
    """
    write_atomic(path, state_bytes(arrays, meta), keep_previous=True, own=own)


def state_bytes(arrays: State, meta: Mapping[str, Any]) -> bytes:
    """The content of a state file."""
    from safetensors.numpy import save

    tensors = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    content: bytes = save(tensors, metadata={"meta": json.dumps(meta)})
    digest = hashlib.sha256(content).digest()
    return MAGIC + SCHEMA.to_bytes(2, "little") + digest + content


def load_state(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any], str | None]:
    """The newest whole generation of ``path``: arrays, facts, and a note if it is the older one.

    Raises:
        CheckpointError: neither generation is whole, the format is newer than this program, or
            the file is of a kind that could carry code.
        FileNotFoundError: there is no such state.
    """
    try:
        return *_read(path), None
    except (CheckpointError, FileNotFoundError) as broken:
        if not previous(path).exists() or getattr(broken, "final", False):
            raise
    try:
        arrays, meta = _read(previous(path))
    except _Final:
        raise
    except CheckpointError:
        raise CheckpointError(
            f"{path} and the generation before it are damaged: put a copy of the folder back, or "
            "start in a new folder with --out"
        ) from None
    return arrays, meta, f"{path.name} is damaged, the generation before it was used"


class _Final(CheckpointError):
    """Not a damaged file but a wrong one: the older generation would not help."""

    final = True


def _read(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    return read_state_bytes(data, str(path))


def read_state_bytes(
    data: bytes, path: str = "a state"
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Arrays and facts from the content of a state file.

    Args:
        data: what :func:`state_bytes` gave.
        path: what to call it.

    Raises:
        CheckpointError: it is damaged, newer than this program, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if data[:2] in {b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}:
        raise _Final(f"{path} is a pickle or an archive, which can carry code: it is not opened")
    if data[: len(MAGIC)] != MAGIC or len(data) < HEADER:
        raise CheckpointError(f"{path} is damaged or not a fedistill state")
    schema = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 2], "little")
    content = data[HEADER:]
    if not schema or hashlib.sha256(content).digest() != data[len(MAGIC) + 2 : HEADER]:
        raise CheckpointError(f"{path} is damaged (its checksum does not hold)")
    if schema > SCHEMA:
        raise _Final(f"{path} has format {schema} and needs a newer fedistill (this one: {SCHEMA})")
    try:
        arrays = load(content)
        length = int.from_bytes(content[:8], "little")
        meta = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["meta"])
    except (SafetensorError, ValueError, KeyError):
        raise CheckpointError(f"{path} is damaged (its content cannot be read)") from None
    return arrays, meta


def same_names(saved: State, wanted: State, owner: str) -> None:
    """Refuse a state of another model, naming what differs.

    Raises:
        CheckpointError: names or shapes differ.
    """
    missing = sorted(set(wanted) - set(saved))
    extra = sorted(name for name in set(saved) - set(wanted) if not name.startswith(GROWS))
    shapes = [
        f"{name} {list(saved[name].shape)} instead of {list(wanted[name].shape)}"
        for name in sorted(set(saved) & set(wanted))
        if saved[name].shape != wanted[name].shape
    ]
    if missing or extra or shapes:
        parts = [
            f"missing {', '.join(missing[:4])}" if missing else "",
            f"unexpected {', '.join(extra[:4])}" if extra else "",
            f"other shape: {'; '.join(shapes[:4])}" if shapes else "",
        ]
        raise CheckpointError(
            f"the saved state of {owner} belongs to another model "
            f"({'; '.join(filter(None, parts))}): resume with the settings it was written with, "
            "or start in a new folder"
        )


def save_json(path: Path, value: Any) -> None:
    """Write JSON for people and tools, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def save_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines, atomically."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_atomic(path, text.encode())
