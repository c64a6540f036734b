"""What worker processes save: the standard round on 1 and 2 workers, and without any.

`python benchmarks/worker_processes.py` prints one JSON line for each backend: seconds of a round on
the wall clock (median), its `path` in processor time (that of the run's own process and of its
busiest worker: what the wall clock would show if each had a core), the ratios of both to those with
one worker, processor time of all processes, seconds until the first round was done, megabytes that
this took (shared pages once), whether soft targets are those of `serial` to the bit, and the load
of the machine. The backends take turns, a round each. About a minute.

The round is that of the reference: 784-128-10, 200 private rows a client, 2,000 public rows, one
epoch of each; `--clients`, `--rounds`, `--workers` change it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedistill import models
from fedistill.backends import Backend
from fedistill.backends.processes import Pool
from fedistill.backends.serial import Serial
from fedistill.client import Client, Site
from fedistill.distill.recipe import Recipe
from fedistill.federation import Federation
from fedistill.presets import method
from fedistill.types import ProxySet, Rows

INPUTS, CLASSES, PRIVATE, PUBLIC = 784, 10, 200, 2000


def rows(count: int, seed: int) -> Rows:
    """Rows around ten centres."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, INPUTS))
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=count)
    inputs = centres[labels] + 2 * random.normal(size=(count, INPUTS))
    return Rows(inputs.astype(np.float32), labels)


def federation(clients: int) -> Federation:
    """The standard task, without a student at the server."""
    recipe = Recipe(epochs=1, batch_size=20, lr=0.05)
    people = [
        Client(
            f"client-{number}",
            partial(models.MLP, INPUTS, CLASSES, width=128),
            rows(PRIVATE, 1 + number),
            training=recipe,
        )
        for number in range(clients)
    ]
    public = ProxySet(rows(PUBLIC, 10**6).inputs)
    return Federation(people, public, None, method("ds-fl", rule="mean"), seed=1, device="cpu")


class Watched:
    """A backend whose workers can be looked at.

    Args:
        workers: how many; 0: the serial backend.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pool: Pool | None = None

    def __call__(self, sites: Mapping[str, Site]) -> Backend:
        """Start them."""
        if not self.workers:
            return Serial(sites)
        self.pool = Pool(sites, self.workers)
        return self.pool

    def used(self) -> list[float]:
        """Seconds of processor time so far: of this process, then of each worker."""
        ticks = os.sysconf("SC_CLK_TCK")
        found = [time.process_time()]
        for number in self.pool.numbers if self.pool else ():
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            found.append((int(fields[11]) + int(fields[12])) / ticks)
        return found


def memory() -> float:
    """Megabytes of this process and all that it started, shared pages counted once."""
    mine = os.getpid()
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int(
                (place / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except OSError:
            continue
    ours = {mine}
    while more := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= more
    total = 0
    for process in ours:
        try:
            told = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in told if line.startswith("Pss:"))
    return round(total / 1024, 1)


def main() -> None:
    """Take turns and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    asked = parser.parse_args()
    backends = {f"{n} workers" if n else "serial": Watched(n) for n in (0, *asked.workers)}
    feds = {name: federation(asked.clients) for name in backends}
    runs: dict[str, Iterator[Any]] = {}
    walls: dict[str, list[float]] = {name: [] for name in backends}
    paths: dict[str, list[float]] = {name: [] for name in backends}
    totals: dict[str, list[float]] = {name: [] for name in backends}
    first: dict[str, float] = {}
    more: dict[str, float] = {}
    for name, backend in backends.items():
        began, before = time.perf_counter(), memory()
        runs[name] = feds[name].run(asked.rounds + 1, backend=backend)
        next(runs[name])
        first[name], more[name] = time.perf_counter() - began, memory() - before
    for _ in range(asked.rounds):
        for name, run in runs.items():
            began, before = time.perf_counter(), backends[name].used()
            next(run)
            spent = [b - a for a, b in zip(before, backends[name].used(), strict=True)]
            walls[name].append(time.perf_counter() - began)
            paths[name].append(spent[0] + max(spent[1:], default=0.0))
            totals[name].append(sum(spent))
    for run in runs.values():
        list(run)
    yardstick = f"{asked.workers[0]} workers"
    for name in backends:
        wall, path = statistics.median(walls[name]), statistics.median(paths[name])
        line = {
            "backend": name,
            "clients": asked.clients,
            "wall": round(wall, 3),
            "path": round(path, 3),
            "times_wall": round(statistics.median(walls[yardstick]) / wall, 2),
            "times_path": round(statistics.median(paths[yardstick]) / path, 2),
            "cpu": round(statistics.median(totals[name]), 3),
            "until_first_round": round(first[name], 2),
            "more_mb": round(more[name], 1),
            "same": feds[name].server.digest() == feds["serial"].server.digest(),
            "load": round(os.getloadavg()[0], 2),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
