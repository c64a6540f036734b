"""A round on several processes: each has its share of the clients, and they meet once in between.

Processes are forked once and stay, with one torch thread each. Rows are inherited and weights come
back in shared memory, so that only a word a round goes over the pipe. Where the mean prediction is
due, each leaves its sum in shared memory and waits for the others.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from task import CLASSES, PUBLIC, Outcome, Round, Task
from torch import Tensor

CONTEXT = multiprocessing.get_context("fork")
PATIENCE = 600.0
"""Seconds to wait for the others; one that died does not come."""


@dataclasses.dataclass
class Share(Task):
    """A task of which others have the rest.

    Attributes:
        number: which share this is.
        sums: of the predictions, ``[shares, rows, classes]``, seen by all.
        clients: of all shares.
        barrier: where they wait.
    """

    number: int
    sums: Tensor
    clients: int
    barrier: Any

    def mean(self, sums: Tensor) -> Tensor:
        """The mean prediction of the clients of all shares."""
        self.sums[self.number] = sums
        self.barrier.wait(PATIENCE)
        return self.sums.sum(0) / self.clients


@contextmanager
def split(once: Callable[[Task], Outcome], workers: int, given: Task) -> Iterator[Round]:
    """The round of one engine on this many processes."""
    clients = len(given)
    sums = torch.zeros(workers, PUBLIC, CLASSES).share_memory_()
    weights = torch.zeros(clients, sum(w.numel() for w in given.starts[0])).share_memory_()
    barrier = CONTEXT.Barrier(workers)
    edges = [clients * number // workers for number in range(workers + 1)]
    hands = []
    for number in range(workers):
        part = slice(edges[number], edges[number + 1])
        fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        fields |= {name: fields[name][part] for name in ("inputs", "labels", "orders", "starts")}
        share = Share(**fields, number=number, sums=sums, clients=clients, barrier=barrier)
        line, theirs = CONTEXT.Pipe()
        worker = CONTEXT.Process(target=serve, args=(theirs, once, share, weights[part]))
        worker.start()
        hands.append((line, worker))

    def run() -> Outcome:
        for line, _ in hands:
            line.send(True)
        for line, _ in hands:
            line.recv()
        return sums.sum(0) / clients, weights

    try:
        yield run
    finally:
        for line, worker in hands:
            line.send(False)
            worker.join(5)
            worker.kill()


def serve(line: Connection, once: Callable[[Task], Outcome], share: Share, out: Tensor) -> None:
    """A worker: a round whenever it is told."""
    while line.recv():
        out.copy_(once(share)[1])
        line.send(True)
