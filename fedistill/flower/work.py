"""A site's work for one message: whatever happens, what leaves is an upload or a short code.

Flower starts a new process for every message and sends the text of an exception to the server;
a text may hold a row. So everything is caught here, and the log of the site itself tells the
kind of an error and where it arose, not what it said.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedistill import store
from fedistill.client import Site
from fedistill.deployment import STATE, Workplace, open_site
from fedistill.errors import (
    CheckpointError,
    DataError,
    LedgerError,
    Rejected,
    RunError,
    SettingsError,
)
from fedistill.evaluate import measure
from fedistill.log import event, events_to
from fedistill.models import threads as computing
from fedistill.runs import EVENTS
from fedistill.wire.messages import Plan

Answering = Callable[[bytes], bytes]

CODES: Mapping[type[Exception], str] = {
    CheckpointError: "state",
    LedgerError: "ledger",
    RunError: "site",
    DataError: "data",
    SettingsError: "settings",
}
"""What a site says of an error of its own; anything else is ``failed``."""
MOST_PATIENCE = 7 * 86_400.0
"""Seconds that a step may take, whatever the message says."""
LAST_RESORT = 15.0
"""Seconds after the time limit when a step that did not notice it is ended with its process."""


def respond(
    answering: Callable[[], Answering], message: bytes, patience: float = 0.0
) -> dict[str, bytes | str]:
    """One message in, the fields of the answer out; never raises.

    Args:
        answering: opens the site; may fail, too.
        message: the plan, as it came.
        patience: seconds after which the step is broken off; 0: never.
    """
    started = time.monotonic()
    facts = _facts(message)
    event("plan_received", **facts, bytes_down=len(message))
    try:
        with time_limit(patience):
            upload = answering()(message)
    except Rejected as refusal:
        event("step_refused", **facts, reason=refusal.reason)
        return {"reason": refusal.reason}
    except TooSlow:
        event("step_failed", **facts, kind="TooSlow")
        return {"reason": "too_slow"}
    except Exception as error:
        kind, place = type(error).__name__, _place(error)
        event("step_failed", **facts, kind=f"{kind} at {place}")
        return {"reason": code_of(error)}
    seconds = round(time.monotonic() - started, 3)
    event("step_done", **facts, bytes_up=len(upload), seconds=seconds)
    return {"upload": upload}


def code_of(error: Exception) -> str:
    """The short code of an error: its class, nothing of its text."""
    known = [code for kind, code in CODES.items() if isinstance(error, kind)]
    return known[0] if known else "failed"


def _place(error: Exception) -> str:
    """File and line where an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def _facts(message: bytes) -> dict[str, Any]:
    """Run and round of a plan, for the log; empty where it cannot be read."""
    with contextlib.suppress(Rejected):
        plan = Plan.from_bytes(message)
        return {"run": plan.run, "round": plan.round}
    return {}


# --- a real site ---------------------------------------------------------------------------------


def at_real_site(folder: Path, message: bytes, patience: float) -> dict[str, bytes | str]:
    """The answer of the site whose ``site.toml`` lies in ``folder``.

    Args:
        folder: of the site.
        message: the plan, as it came.
        patience: seconds after which nobody waits for the answer any more.
    """
    folder = folder.resolve()

    def opened() -> Answering:
        return functools.partial(answer_and_measure, open_site(folder, cache=True, willing=True))

    log = events_to(folder / STATE / EVENTS) if folder.is_dir() else contextlib.nullcontext()
    with log:
        # It comes from outside, and may be anything.
        limit = patience if 0 < patience < MOST_PATIENCE else MOST_PATIENCE
        return respond(opened, message, limit)


def answer_and_measure(place: Workplace, message: bytes) -> bytes:
    """One round; what the student then makes of the site's own test rows stays in its own log."""
    site = place.site
    store.probe(place.state)
    with store.held(place.state), computing(place.agreed.backend.threads):
        with time_limit(place.settings.policy.seconds):
            place.prepare(message)
            before = site.round
            upload = site.answer(message)
        if site.client.test is not None and site.round != before:
            # The upload is final by now, whatever becomes of this.
            with contextlib.suppress(Exception, TooSlow):
                found = measure(site.learner, site.client.test)["accuracy"]
                event("measured", run=site.run, round=site.round, accuracy=found)
        return upload


class TooSlow(BaseException):
    """The step took too long; no handler of ordinary exceptions stops it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Break off what takes longer than so many seconds; 0: no limit.

    A site's node serves one message after another: a step that never ends would take the site out
    for good. First :class:`TooSlow` is raised, and the site can say so. Code that hangs where no
    Python runs does not notice; a while later the whole process is ended, and the node says so.
    Either way the state on disk is that of the round before.

    For the main thread; limits may be nested, the shortest holds. A timer of somebody else goes on
    where it was.
    """
    if seconds <= 0:
        yield
        return
    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, _too_slow)
    theirs = signal.setitimer(signal.ITIMER_REAL, 0)[0] if not _ENDS else 0.0
    _ENDS.append(began + (min(seconds, theirs) if theirs else seconds))
    _arm()
    try:
        yield
    finally:
        _ENDS.pop()
        _arm()
        signal.signal(signal.SIGALRM, handler)
        if theirs:
            signal.setitimer(signal.ITIMER_REAL, max(theirs - (time.monotonic() - began), 1e-3))


_ENDS: list[float] = []
"""When the limits that hold now are over."""


def _arm() -> None:
    """Set both clocks to the nearest end."""
    faulthandler.cancel_dump_traceback_later()
    left = max(min(_ENDS) - time.monotonic(), 1e-3) if _ENDS else 0.0
    signal.setitimer(signal.ITIMER_REAL, left)
    if left:
        faulthandler.dump_traceback_later(left + LAST_RESORT, exit=True)


def _too_slow(number: int, frame: object) -> None:
    del number, frame
    raise TooSlow


# --- a simulated site ----------------------------------------------------------------------------


def answer_from_disk(site: Site, message: bytes) -> bytes:
    """One round of a site whose last step may have been done by another process."""
    site.recall(Plan.from_bytes(message, len(message)))  # its size is for the site to judge
    return site.answer(message)
