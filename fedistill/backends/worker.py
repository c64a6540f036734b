"""A worker of the backend ``processes``: it holds its clients for a whole run, and does as told."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import threadpoolctl
import torch

from fedistill import store
from fedistill.backends.frames import Header, Shared, frame, told, unframe
from fedistill.client import Client, Site
from fedistill.dormant import Dormant
from fedistill.errors import Rejected
from fedistill.evaluate import measure
from fedistill.presets import Method
from fedistill.state_store import DiskStore, StateStore
from fedistill.types import ProxySet, Rows

BLAS = "OPENBLAS_NUM_THREADS"
"""Environment variable: numpy's threads, of which there is one where processes are forked off."""

Answer = tuple[Header, bytes]


@dataclass(frozen=True, eq=False)
class Place:
    """One client of a worker, and where it was.

    Attributes:
        client: who.
        folder: the run folder; None: its state stays in memory.
        state: its state so far, as in a state file; empty: untaught, or in its folder.
        since: run and last round of a state that is in its folder; ``("", 0)``: there is none.
    """

    client: Client
    folder: Path | None
    state: bytes
    since: tuple[str, int] = ("", 0)


@dataclass(frozen=True, eq=False)
class Crew:
    """What a worker is started with.

    Attributes:
        places: its clients.
        kind: of their sites.
        proxy: the public rows.
        classes: as in a federation, and all below.
        method: what is exchanged and how.
        seed: of the experiment.
        device: where learners compute.
        limit: largest plan accepted, in bytes.
        threads: torch threads.
        blas: numpy's threads: with another number its products differ in their last bits.
        environment: value of :data:`BLAS` in the run's own process.
        since: run and round that its clients go on in, from what they saved; None: they begin.
        awake: sites in memory at once; 0: all.
        rest: what keeps the states of the others.
    """

    places: tuple[Place, ...]
    kind: type[Site]
    proxy: Shared
    classes: tuple[str, ...]
    method: Method
    seed: int
    device: str
    limit: int
    threads: int
    blas: int
    environment: str | None
    since: tuple[str, int] | None = None
    awake: int = 0
    rest: Callable[[], StateStore] = DiskStore

    def sites(self) -> Mapping[str, Site]:
        """The clients at work, or ready to be woken."""
        proxy = ProxySet(self.proxy.array())
        places = {place.client.id: place for place in self.places}
        clients = {name: place.client for name, place in places.items()}
        folder = self.places[0].folder

        def opened(client: Client, folder: Path | None) -> Site:
            return self._site(client, folder, proxy)

        def recalled(site: Site) -> None:
            self._recall(site, places[site.client.id])

        if self.awake:
            rest = self.rest()
            return Dormant(clients, opened, folder, awake=self.awake, rest=rest, begin=recalled)
        sites = {name: opened(client, folder) for name, client in clients.items()}
        for site in sites.values():
            recalled(site)
        return sites

    def _site(self, client: Client, folder: Path | None, proxy: ProxySet) -> Site:
        site = self.kind.open(
            client,
            proxy,
            self.classes,
            self.method,
            seed=self.seed,
            device=self.device,
            limit=self.limit,
        )
        site.keep_in(folder)
        return site

    def _recall(self, site: Site, place: Place) -> None:
        """Bring a site to where it was."""
        if place.state:
            site.unpack(*store.read_state_bytes(place.state))
        if since := self.since or (place.since[0] and place.since):
            site.restore(*since)


def work(line: Connection, crew: Crew) -> None:
    """Answer what comes down the line, until it is closed.

    Args:
        line: to the run.
        crew: who works here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to hear: it closes the line
    end_with_parent()
    try:
        compute_alike(crew)
        hands = Hands(crew.sites())
    except Exception as error:
        line.send_bytes(frame({"turn": 0, "error": told(error)}))
        return
    try:
        line.send_bytes(frame({"turn": 0, "done": True}))
        while True:
            header, body = unframe(line.recv_bytes())
            for answer, data in hands.do(header, body):
                line.send_bytes(frame(answer | {"turn": header["turn"]}, data))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def end_with_parent() -> None:
    """End this process when the one that asked for it is gone, even if that was killed.

    Whoever resumes the run must not find somebody still writing states of the time before.
    """
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def compute_alike(crew: Crew) -> None:
    """Compute with as many threads as the run would itself: equal bytes need equal threads."""
    os.environ.pop(BLAS, None)
    if crew.environment is not None:
        os.environ[BLAS] = crew.environment
    threadpoolctl.threadpool_limits(crew.blas, user_api="blas")
    torch.set_num_threads(crew.threads)


class Hands:
    """The work of a worker.

    Args:
        sites: its clients.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites
        self.test: Rows | None = None
        self.skills: dict[str, Callable[[Site, bytes], Answer]] = {
            "answer": self.answer,
            "measure": self.measure,
            "state": self.state,
        }

    def do(self, header: Header, body: bytes) -> Iterator[Answer]:
        """An answer for each client named, then word that this was all; or an error."""
        try:
            if header["do"] == "test":
                arrays, _ = store.read_state_bytes(body)
                self.test = Rows(arrays["inputs"], arrays["labels"])
            for name in header.get("names", ()):
                answer, data = self.skills[header["do"]](self.sites[name], body)
                yield answer | {"client": name}, data
        except Exception as error:
            yield {"error": told(error)}, b""
            return
        yield {"done": True}, b""

    def answer(self, site: Site, message: bytes) -> Answer:
        """One round of a client: its upload, or why there is none."""
        reason, data = None, b""
        try:
            data = site.answer(message)
        except Rejected as refusal:
            reason = refusal.reason
        facts: dict[str, Any] = {
            "run": site.run,
            "round": site.round,
            "clipped": site.clipped,
            "exhausted": site.exhausted,
            "refusal": site.refusal and [site.refusal.reason, site.refusal.detail],
        }
        return {"reason": reason, "facts": facts, "kept": data == site.upload}, data

    def measure(self, site: Site, body: bytes) -> Answer:
        """Figures of a client on its own test rows, or else on the common ones."""
        del body
        rows = site.client.test if site.client.test is not None else self.test
        assert rows is not None
        return {"figures": measure(site.learner, rows)}, b""

    def state(self, site: Site, body: bytes) -> Answer:
        """The state of a client, as in a state file."""
        del body
        return {}, store.state_bytes(*site.packed())
