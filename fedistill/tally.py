"""What came back in one round: who was let in, who was not and why, and what it weighed."""

from __future__ import annotations

import time
from typing import Any

from fedistill.backends import Reply
from fedistill.errors import Rejected
from fedistill.log import event
from fedistill.server import Answer, Server
from fedistill.wire.messages import Failure, Plan


class Tally:
    """What came back in one round, and what it weighed.

    Args:
        plan: what was asked.
        travels: whether messages leave the process in a deployment, and so count.
        before: the tally of a former attempt at this round, whose bytes were sent too.
    """

    def __init__(self, plan: Plan, *, travels: bool, before: Tally | None = None) -> None:
        self.plan = plan
        self.travels = travels
        self.answers: list[Answer] = []
        self.dropped: dict[str, str] = {}
        self.seen: set[str] = set()
        self.heard = 0
        self.started = time.monotonic()
        self.uploads: int = before.uploads if before else 0
        self.bytes_up: int = before.bytes_up if before else 0
        self.bytes_down: int = before.bytes_down if before else 0
        self._told: set[str] = set()

    def take(self, reply: Reply | Failure, server: Server) -> None:
        """Count a reply, and let it in or note why not."""
        self.heard += 1
        # Who was not enrolled may call itself anything: its name is not for the log as it is.
        name = reply.client if reply.client in server.enrolled else _code(reply.client)
        if reply.asked and name in self.plan.clients and name not in self._told:
            self._told.add(name)
            if self.travels:
                self.bytes_down += len(self.plan.message(name)) * reply.asked
        if isinstance(reply, Failure):
            if reply.reason == "reference":
                server.forget(name)
            self._drop(name, _code(reply.reason))
            return
        self.uploads += 1
        self.bytes_up += len(reply.data) if self.travels else 0
        try:
            self.answers.append(server.check(reply.data, self.plan, reply.client, self.seen))
        except Rejected as refusal:
            if reply.asked:
                self._drop(name, refusal.reason)
            else:  # of a round before, and of no use in this one
                self._tell("dropped", name, reason=refusal.reason)
            return
        self._tell("answered", name, bytes_up=len(reply.data), seconds=self._seconds())

    @property
    def late(self) -> int:
        """How many of the answers are of a round before."""
        return sum(answer.age > 0 for answer in self.answers)

    def _drop(self, name: str, reason: str) -> None:
        self.dropped.setdefault(name, reason)
        self._tell("dropped", name, reason=reason)

    def _seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def _tell(self, what: str, name: str, **facts: Any) -> None:
        event(what, run=self.plan.run, round=self.plan.round, site=name, **facts)


def _code(reason: str) -> str:
    """A reason that came from outside, made safe for logs: short, one line, plain."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_:-") else "_" for c in reason)[:40]
