"""Clients dealt to worker processes, each of which holds its own for the whole run.

A plan goes to a worker once, uploads and a few facts come back; rows and learners stay where they
are. The sites of this process are told what is asked of them between rounds (round, upload,
refusal); their learners are brought up to date by :meth:`Pool.fetch`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import Any

import threadpoolctl
import torch

from fedistill import store
from fedistill.backends import Reply
from fedistill.backends.frames import Header, Shared, as_it_was, frame, unframe
from fedistill.backends.worker import BLAS, Crew, Place, work
from fedistill.client import Site
from fedistill.distill.torch_student import TorchStudent
from fedistill.dormant import Dormant, by_kind, client_of, standing
from fedistill.errors import CheckpointError, FedistillError, Rejected, RunError
from fedistill.evaluate import Figures
from fedistill.log import event
from fedistill.models import parameter_count
from fedistill.types import Rows
from fedistill.wire.messages import Failure, Plan

CONTEXT = multiprocessing.get_context("forkserver")
MOST_DEATHS = 3
"""Processes that may die in a row over the same client."""
NEEDED = ("fedistill.backends.worker", "fedistill.tables")
"""What every worker imports."""
SLOW = ("sklearn.linear_model", "sklearn.ensemble", "opacus", "dp_accounting")
"""What only some clients need; a run that has such clients has imported it by now."""
FAREWELL = 5.0
"""Seconds that an idle worker has to end in."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The backend ``processes``: ``federation.run(..., backend=Processes(workers=2))``.

    Attributes:
        workers: how many processes; 0: as many as there are cores for this one.
    """

    workers: int = 0

    def __call__(self, sites: Mapping[str, Site]) -> Pool:
        """Start the workers."""
        return Pool(sites, self.workers)


@dataclasses.dataclass(eq=False)
class _Request:
    """Something that some clients of one worker are to do.

    Attributes:
        do: what.
        names: those who have not done it yet.
        body: what they need for it.
    """

    do: str
    names: list[str]
    body: bytes = b""


class _Hand:
    """One worker, as the run sees it.

    Attributes:
        number: which, from 0.
        names: its clients.
        pending: what it is still to do; the first may be on its way.
        busy: whether it has been told to do something and has not said that it is done.
        began: whether its clients are at work.
        deaths: how often it died since it last answered.
    """

    def __init__(self, number: int, names: tuple[str, ...]) -> None:
        self.number = number
        self.names = names
        self.pending: deque[_Request] = deque()
        self.busy = self.began = False
        self.deaths = 0

    def start(self, crew: Crew) -> None:
        """Start its process.

        Raises:
            FedistillError: something of a client cannot be told to another process.
        """
        self.line, theirs = CONTEXT.Pipe()
        name = f"fedistill-worker-{self.number}"
        self.process = CONTEXT.Process(target=work, args=(theirs, crew), name=name, daemon=True)
        try:
            self.process.start()
        except (AttributeError, TypeError, ValueError, ImportError) as error:
            self.line.close()
            raise _untold(error) from error
        except Exception as error:
            self.line.close()
            if type(error).__name__ != "PicklingError":
                raise
            raise _untold(error) from error
        finally:
            theirs.close()
        self.busy, self.began = True, False  # until it says that its clients are at work

    def end(self) -> None:
        """End its process; one that is in the middle of something, at once."""
        self.line.close()
        if not self.busy:
            self.process.join(FAREWELL)
        self.process.kill()
        self.process.join()
        self.process.close()


class Pool:
    """Asks the sites in worker processes; what comes of it is what :class:`Serial` gives.

    Args:
        sites: the clients.
        count: workers; 0: as many as there are cores for this process.

    Raises:
        RunError: private clients without a run folder, where ledgers must be kept.
        FedistillError: a client that cannot be told to another process.
    """

    def __init__(self, sites: Mapping[str, Site], count: int = 0) -> None:
        self.sites = sites
        self._in_memory = False
        for _, site in by_kind(sites):
            self._in_memory |= site.path is None
            if self._in_memory and site.account is not None:
                raise RunError(
                    'private clients on the backend "processes" need a run folder for their '
                    "ledgers, found none: set out"
                )
        self._turn = 0
        self._now: tuple[str, int] | None = None
        self._stale: dict[str, None] = {}
        self._ahead: set[str] = set()
        self._test: tuple[Rows, bytes] | None = None
        self._proxy: Shared | None = None
        self._hands: list[_Hand] = []
        _ready_to_fork()
        try:
            for number, names in enumerate(deal(sites, count or cores())):
                hand = _Hand(number, names)
                hand.start(self._crew(names))
                self._hands.append(hand)
        except BaseException:
            self._end()
            raise
        self._home = {name: hand for hand in self._hands for name in hand.names}

    @property
    def numbers(self) -> list[int]:
        """Process ids of the workers."""
        return [hand.process.pid or 0 for hand in self._hands]

    # --- what is asked of the clients ------------------------------------------------------------

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        """One reply or failure for every client asked, in the order of the plan."""
        self._now = plan.run, plan.round
        self._stale |= dict.fromkeys(plan.clients)
        asked: dict[tuple[int, bytes], list[str]] = {}
        for name in plan.clients:
            key = self._home[name].number, plan.message(name)
            asked.setdefault(key, []).append(name)
        requests = [(n, _Request("answer", names, data)) for (n, data), names in asked.items()]
        there: dict[str, Reply | Failure] = {}
        waiting = deque(plan.clients)
        for name, header, data in self._ask(requests):
            there[name] = self._heard(plan, name, header, data)
            while waiting and waiting[0] in there:
                yield there.pop(waiting.popleft())

    def _heard(self, plan: Plan, name: str, header: Header, data: bytes) -> Reply | Failure:
        """What a client answered; its site here is told what others ask of it."""
        site, facts = self.sites[name], header["facts"]
        self._ahead.add(name)
        changed = (site.run, site.round) != (facts["run"], facts["round"])
        site.run, site.round, site.clipped = facts["run"], facts["round"], facts["clipped"]
        site.exhausted = facts["exhausted"]
        site.refusal = Rejected(*facts["refusal"]) if facts["refusal"] else None
        site.touched = True
        if header["kept"] or changed:
            site.upload = data
        if header["reason"] is None:
            return Reply(name, data)
        return Failure(name, plan.round, header["reason"])

    def measure(self, due: Mapping[str, Rows]) -> dict[str, Figures]:
        """Figures of clients, each on the rows named (its own test rows, or common ones)."""
        own = {name: client_of(self.sites, name).test for name in due}
        common = [rows for name, rows in due.items() if rows is not own[name]]
        requests = []
        if common and (self._test is None or self._test[0] is not common[0]):
            arrays = {"inputs": common[0].inputs, "labels": common[0].labels}
            self._test = common[0], store.state_bytes(arrays, {})
            requests = [(hand.number, _Request("test", [], self._test[1])) for hand in self._hands]
        requests += self._each("measure", due)
        found = {name: header["figures"] for name, header, _ in self._ask(requests)}
        return {name: found[name] for name in due}

    def fetch(self) -> None:
        """Bring the learners of this process to where those of the workers are."""
        for name, _, data in self._ask(self._each("state", tuple(self._stale))):
            self.sites[name].unpack(*store.read_state_bytes(data))
            self._stale.pop(name)
            self._ahead.discard(name)

    def close(self) -> None:
        """Fetch what can be had, and end the workers.

        Those who are in the middle of something are broken off, and what they saved last is read;
        without a run folder, where they save nothing, they may end it.
        """
        if self._in_memory:
            self._wait_for_all()
        if not any(hand.busy for hand in self._hands):
            with contextlib.suppress(RunError):
                self.fetch()
        self._end()
        for name in self._stale:
            with contextlib.suppress(CheckpointError):
                self.sites[name].restore(*self._now or ("", 0))
        self._stale = {}

    def _wait_for_all(self) -> None:
        """Until every worker has done what it was told last."""
        for hand in self._hands:
            with contextlib.suppress(EOFError, OSError, ValueError):  # or cut short by Ctrl-C
                while hand.busy:
                    header, _ = unframe(hand.line.recv_bytes())
                    hand.busy = "client" in header

    def _end(self) -> None:
        while self._hands:
            self._hands.pop().end()

    # --- the line --------------------------------------------------------------------------------

    def _each(self, do: str, names: Iterable[str]) -> list[tuple[int, _Request]]:
        """One request for each worker that has one of these clients."""
        asked: dict[int, list[str]] = {}
        for name in names:
            asked.setdefault(self._home[name].number, []).append(name)
        return [(number, _Request(do, found)) for number, found in asked.items()]

    def _ask(self, requests: Sequence[tuple[int, _Request]]) -> Iterator[tuple[str, Header, bytes]]:
        """What each client answered, as it comes: its name, header and body.

        A worker is told the next thing when it has done the one before: neither side ever waits
        for the other to read.
        """
        self._turn += 1
        for hand in self._hands:
            hand.pending = deque(request for number, request in requests if number == hand.number)
            self._next(hand)
        while at_work := [hand for hand in self._hands if hand.pending]:
            lines: dict[Any, _Hand] = {hand.line: hand for hand in at_work}
            for line in wait(list(lines)):
                hand = lines[line]
                try:
                    header, data = unframe(hand.line.recv_bytes())
                except (EOFError, OSError):
                    self._replace(hand)
                    continue
                if "error" in header:
                    hand.busy = False
                    raise as_it_was(header["error"], f"worker {hand.number}")
                current = header["turn"] == self._turn
                if "client" in header:
                    if current:
                        hand.pending[0].names.remove(header["client"])
                        hand.deaths = 0
                        yield header["client"], header, data
                    continue
                hand.busy, hand.began = False, True
                if current:
                    hand.pending.popleft()
                self._next(hand)

    def _next(self, hand: _Hand) -> None:
        """Tell a worker what it is to do next, if it waits for that."""
        if hand.busy or not hand.pending:
            return
        request = hand.pending[0]
        header = {"do": request.do, "names": request.names, "turn": self._turn}
        try:
            hand.line.send_bytes(frame(header, request.body))
        except OSError:
            self._replace(hand)
        else:
            hand.busy = True

    def _replace(self, hand: _Hand) -> None:
        """Start a worker in place of one that died; its clients go on from what they saved.

        Raises:
            RunError: they saved nothing, or the new ones die as well.
        """
        hand.busy = True  # nothing to wait for
        hand.process.join(FAREWELL)
        code = hand.process.exitcode
        hand.end()
        hand.deaths += 1
        event("worker_died", round=self._now[1] if self._now else 0, reason=f"exit:{code}")
        if self._in_memory and self._ahead.intersection(hand.names):
            self._hands.remove(hand)
            raise RunError(
                f"worker {hand.number} died (exit code {code}) with the state of "
                f"{len(hand.names)} clients, which was in memory alone: run with out=FOLDER, from "
                "which another one can go on"
            )
        if hand.deaths >= MOST_DEATHS or (code == 1 and not hand.began):
            self._hands.remove(hand)
            raise RunError(_why(hand, code))
        hand.start(self._crew(hand.names, self._now))
        if self._test is not None:
            hand.pending.appendleft(_Request("test", [], self._test[1]))

    # --- starting --------------------------------------------------------------------------------

    def _crew(self, names: tuple[str, ...], since: tuple[str, int] | None = None) -> Crew:
        """What the worker of these clients is started with."""
        site = self.sites[names[0]]
        if self._proxy is None:
            self._proxy = Shared.of(site.proxy.inputs, CONTEXT)
        pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        return Crew(
            tuple(_place(self.sites, name) for name in names),
            type(site),
            self._proxy,
            site.classes,
            site.method,
            site.seed,
            site.device,
            site.limit,
            torch.get_num_threads(),
            max((pool["num_threads"] for pool in pools), default=1),
            os.environ.get(BLAS),
            since,
            **self._sleep(len(names)),
        )

    def _sleep(self, clients: int) -> dict[str, Any]:
        """How a worker of so many clients lets them sleep: awake is its share of them."""
        if not isinstance(self.sites, Dormant):
            return {}
        share = max(1, self.sites.awake * clients // len(self.sites))
        return {"awake": share, "rest": type(self.sites.rest)}


def _place(sites: Mapping[str, Site], name: str) -> Place:
    """Where a client is; one that sleeps is woken only if its state must be told."""
    if isinstance(sites, Dormant):
        known = standing(sites, name)
        if sites.untouched(name) or (known.run and sites.rests_in(name, sites.folder)):
            folder = sites.folder and sites.folder.absolute()
            return Place(sites.clients[name], folder, b"", (known.run, known.round))
    site = sites[name]
    client = site.client
    if site.account is not None:
        client = dataclasses.replace(client, terms=site.account.terms)
    folder = None if site.path is None else site.path.absolute().parents[2]
    return Place(client, folder, store.state_bytes(*site.packed()) if site.touched else b"")


def deal(sites: Mapping[str, Site], count: int) -> list[tuple[str, ...]]:
    """The clients of each worker: alike in kinds of model, in rows, and in every run.

    >>> deal({}, 2)
    []
    """
    weight: dict[str, tuple[int, str, int]] = {}
    for names, site in by_kind(sites):
        learner = site.learner
        size = parameter_count(learner.module) if isinstance(learner, TorchStudent) else 0
        for name in names:
            weight[name] = -size, type(learner).__name__, -len(client_of(sites, name).data)
    count = min(count, len(sites))
    hands: list[list[str]] = [[] for _ in range(count)]
    there_and_back = itertools.cycle([*range(count), *reversed(range(count))])
    for name, number in zip(sorted(sites, key=weight.__getitem__), there_and_back, strict=False):
        hands[number].append(name)
    order = {name: place for place, name in enumerate(sites)}
    return [tuple(sorted(names, key=order.__getitem__)) for names in hands]


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ready_to_fork() -> None:
    """Start the process that workers are forked off, where it is not there yet.

    It has imported what they need, so that this is done once, and computes nothing. It has one
    thread: the only library here that starts some as it is imported is numpy's BLAS, which is kept
    from it; a worker then takes as many as the run's own process has.
    """
    CONTEXT.set_forkserver_preload([*NEEDED, *(name for name in SLOW if name in sys.modules)])
    before = os.environ.get(BLAS)
    os.environ[BLAS] = "1"
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop(BLAS)
        if before is not None:
            os.environ[BLAS] = before


def _untold(error: Exception) -> FedistillError:
    return FedistillError(
        'the backend "processes" builds clients anew in other processes: expected factories that '
        "are found by their name (a class or function of a module, or functools.partial of one), "
        f"found something that is not ({error})"
    )


def _why(hand: _Hand, code: int | None) -> str:
    """What to say of a worker that cannot be replaced."""
    if not hand.began:
        return (
            f"worker {hand.number} ended before it began (exit code {code}): see what it printed; "
            'a script that starts a run does so under `if __name__ == "__main__":`'
        )
    where = next((request.names[0] for request in hand.pending if request.names), "its end")
    return (
        f"worker {hand.number} died {MOST_DEATHS} times at {where} (exit code {code}): give it "
        "more memory or fewer workers, then --resume"
    )
