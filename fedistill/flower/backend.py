"""The backend over a Flower grid: one message to every site, one answer back, until the deadline.

A site that is offline is asked as soon as it is back; one whose answer got lost is asked again,
and sends what it stored. Nothing here depends on a clock that can jump, and a reply that stalls
half-way holds up nobody but its sender.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from fedistill.backends import Reply
from fedistill.errors import FedistillError, RunError
from fedistill.flower import convert
from fedistill.flower.roster import Roster
from fedistill.wire.messages import Failure, Plan

PULLERS = 8
"""Threads that fetch answers: so many may stall before the others have to wait for one."""
TRIES = 8
"""How often one site is asked in one round, if its answers keep getting lost."""
MOST_FAILURES = 30
"""Fetches in a row that may fail before the run gives up."""
RECOVERY = 1.0
"""Seconds of rest after the transport has failed."""
MARGIN = 30.0
"""Seconds a message outlives the deadline, so that the last answers are not lost on their way."""


@dataclass
class _Round:
    """Who was asked for what, and what is still out."""

    plan: Plan
    waiting: set[str]
    asked: dict[str, str] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    uploads: int = 0

    def unasked(self) -> set[str]:
        """Sites without a message on its way."""
        return self.waiting - set(self.asked.values())

    def forget(self, message: str) -> str | None:
        """A message is answered; the site it was for, if it is one of this round."""
        return self.asked.pop(message, None)


class FlowerBackend:
    """Runs a plan on the sites behind a Flower grid.

    Args:
        grid: Flower's, of a ``ServerApp``.
        roster: which node is which site.
        deadline: seconds that a site has to answer.
        grace: seconds that offline sites are waited for once all others have answered.
        pause: seconds between two looks at what has arrived.
        extra: texts that go with every plan, for client apps that need them.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        *,
        deadline: float = 600.0,
        grace: float = 15.0,
        pause: float = 0.2,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.grid = grid
        self.roster = roster
        self.deadline = deadline
        self.grace = grace
        self.pause = pause
        self.extra = dict(extra or {})

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        """One reply or failure for every client asked."""
        state = _Round(plan, set(plan.clients))
        started = quiet = time.monotonic()
        with _Inbox(self.grid, self.pause) as inbox:
            while state.waiting and (left := started + self.deadline - time.monotonic()) > 0:
                if state.unasked():
                    with inbox.tolerant():
                        self._ask(state, self.roster(self.grid), left, inbox)
                if state.asked or state.uploads < plan.quorum:
                    quiet = time.monotonic()
                elif time.monotonic() - quiet > self.grace:
                    break  # everybody who is there has answered, and they are enough
                for asked, answer in inbox.take(self.pause):
                    outcome = self._judge(state, asked, answer)
                    if outcome is not None:
                        yield outcome
        for site in sorted(state.waiting):
            reason = "deadline" if site in state.asked.values() else "offline"
            tries = state.tries.get(site, 0)
            yield Failure(site, plan.round, state.last.get(site, reason), tries)

    def _ask(
        self,
        state: _Round,
        online: Mapping[str, int],
        left: float,
        inbox: _Inbox,
    ) -> None:
        """Send the plan to whoever is here and has not got it."""
        ready = sorted(state.unasked() & set(online))
        requests = [
            convert.request(
                convert.ROUND,
                online[site],
                {"plan": state.plan.message(site), **self.extra},
                group=str(state.plan.round),
                ttl=left + MARGIN,
            )
            for site in ready
        ]
        if not requests:
            return
        for site in ready:  # counted before: a push that breaks off may have sent it
            state.tries[site] = state.tries.get(site, 0) + 1
        self.grid.push_messages(requests)
        for site, sent in zip(ready, requests, strict=True):
            if sent.metadata.message_id:  # else it was refused: it is tried again
                state.asked[sent.metadata.message_id] = site
                inbox.expect(sent.metadata.message_id)

    def _judge(self, state: _Round, asked: str, answer: Message | None) -> Reply | Failure | None:
        """What an answer means; None if it is none of this round, or if the site is asked again."""
        site = state.forget(asked)
        if site is None or site not in state.waiting:
            return None
        lost = Failure(site, state.plan.round, "lost")
        outcome = lost if answer is None else convert.heard(site, state.plan.round, answer)
        lasting = state.tries.get(site, 0) >= TRIES
        if isinstance(outcome, Failure) and outcome.reason == "lost" and not lasting:
            state.last[site] = outcome.reason
            return None
        state.waiting.discard(site)
        state.uploads += isinstance(outcome, Reply)
        return dataclasses.replace(outcome, asked=state.tries[site])


class _Inbox:
    """Fetches answers in threads of its own: Flower's fetching keeps to no deadline."""

    def __init__(self, grid: Grid, pause: float) -> None:
        self.grid = grid
        self.pause = pause
        # queue.SimpleQueue would do, but for threads that hang in its get(timeout=) on Python 3.11.
        self.expected: queue.Queue[str] = queue.Queue()
        self.arrived: queue.Queue[tuple[str, Message | None]] = queue.Queue()
        self.closed = threading.Event()
        self.threads = 0
        self.failures = 0
        self.trouble = ""

    def __enter__(self) -> _Inbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()  # a thread that is stuck in a fetch ends with it, or with the process

    @contextlib.contextmanager
    def tolerant(self) -> Iterator[None]:
        """Whatever the transport raises here is noted, and tried again later."""
        try:
            yield
        except FedistillError:
            raise
        except Exception as error:
            self._note(error)
        else:
            self.failures = 0

    def _note(self, error: Exception) -> None:
        """One more failure of the transport; wait a little before the next try."""
        self.failures, self.trouble = self.failures + 1, type(error).__name__
        self.closed.wait(RECOVERY)

    def expect(self, message: str) -> None:
        """An answer to this message may come."""
        self.expected.put(message)
        if self.threads < PULLERS:
            self.threads += 1
            threading.Thread(target=self._fetch, daemon=True, name="fedistill-inbox").start()

    def take(self, patience: float) -> Iterator[tuple[str, Message | None]]:
        """What has arrived, and for which message; waits a moment if nothing has.

        None stands for an answer that got lost between the SuperLink and here.

        Raises:
            RunError: the grid has been failing for a while.
        """
        if self.failures > MOST_FAILURES:
            raise RunError(
                f"answers cannot be fetched from the SuperLink ({self.trouble}): see whether it "
                "runs, then --resume"
            )
        try:
            yield self.arrived.get(timeout=patience)
            while True:
                yield self.arrived.get_nowait()
        except queue.Empty:
            return

    def _fetch(self) -> None:
        while not self.closed.is_set():
            try:
                # In one thread's hands at a time: two would both get, and count, the answer.
                message = self.expected.get(timeout=self.pause)
            except queue.Empty:
                continue
            try:
                answers = list(self.grid.pull_messages([message]))
            except Exception as error:
                # Whatever the transport raises: the SuperLink may have counted the answer as
                # fetched, so it has to be asked for again. The site has it in its store.
                self._note(error)
                self.arrived.put((message, None))
                continue
            self.failures = 0
            # An error that the SuperLink made up comes from node 1, and a call may bring messages
            # that nobody asked for: only this id says what an answer is for.
            found = [a for a in answers if a.metadata.reply_to_message_id == message]
            if found:
                self.arrived.put((message, found[0]))
            else:
                self.expected.put(message)
            self.closed.wait(self.pause / (1 + self.expected.qsize() // PULLERS))
