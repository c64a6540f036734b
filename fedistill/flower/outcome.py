"""How a run ended: a small file between the process that runs it and the one that waits."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
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
            store.save_json(path, {"code": error.exit_code, "text": str(error)})
        except BaseException as error:
            text = f"the server broke off ({type(error).__name__}): see the log of the SuperLink"
            store.save_json(path, {"code": 3, "text": text})
            raise
        else:
            store.save_json(path, {"code": 0, "text": ""})


def outcome(path: Path) -> tuple[int, str] | None:
    """How the server ended; None while it has not said."""
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return int(told["code"]), str(told["text"])


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
