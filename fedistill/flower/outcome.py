"""How a run ended: a small file between the process that runs it and the one that waits."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedistill import store
from fedistill.errors import FedistillError


@contextlib.contextmanager
def outcome_in(path: Path) -> Iterator[None]:
    """Write how it ended, for the process that waits: an exit code, and what to tell the user.

    A lock tells it meanwhile that somebody is at work; that falls with this process, however it
    ends, also where nobody has asked for its exit code yet.
    """
    with _lock(path).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except FedistillError as error:
            _write(path, Outcome(error.exit_code, type(error).__name__, str(error)))
        except BaseException as error:
            kind = type(error).__name__
            text = f"the server broke off ({kind}): see the log of the SuperLink"
            _write(path, Outcome(3, kind, text))
            raise
        else:
            _write(path, Outcome())


@dataclass(frozen=True)
class Outcome:
    """How a run ended: an exit code, and the class and text of the error, if there was one."""

    code: int = 0
    kind: str = ""
    text: str = ""


def outcome(path: Path) -> Outcome | None:
    """How the server ended; None while it has not said."""
    try:
        return Outcome(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, ended: Outcome) -> None:
    store.save_json(path, dataclasses.asdict(ended))


def at_work(path: Path) -> bool:
    """Whether the server's process has begun and is there."""
    try:
        with _lock(path).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lock(path: Path) -> Path:
    return path.with_suffix(".lock")
