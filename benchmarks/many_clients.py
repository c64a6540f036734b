"""Ten thousand clients on one machine: memory, and what a round costs beside clients that idle.

`python benchmarks/many_clients.py` prints one JSON line for each model and backend, after about two
minutes of processor time:

* `seconds`: processor time of a round of 10,000 clients that asks 100 (median);
* `times_fewer`: the quickest of them, against that of 1,000 clients of which 100 are asked, too,
  and as many awake. Both federations are in one process and take turns, a round each;
* `peak_mb`: the most memory that a process of its own held which did nothing but such a run, rows
  of the clients (`rows_mb`) and imports (`start_mb`) included;
* `state_bytes`: bytes of a sleeping client in the store (mean), and `store`, which one it is.

The clients have 20 rows of 784 inputs each and train one epoch on them and one on 200 public rows.
`--clients`, `--fewer`, `--asked`, `--rounds`, `--store` change it. `--everybody` asks all clients
once before memory is looked at, so that each of them has a state: minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from fedistill import models
from fedistill.backends.serial import Serial
from fedistill.backends.vectorized import Vectorized
from fedistill.client import Client
from fedistill.distill.recipe import Recipe
from fedistill.dormant import AWAKE, Dormant
from fedistill.federation import Federation
from fedistill.presets import method
from fedistill.state_store import DiskStore
from fedistill.types import ProxySet, Rows

INPUTS, CLASSES, PRIVATE, PUBLIC = 784, 10, 20, 200
BUILDS = {
    "linear": partial(models.Linear, INPUTS, CLASSES),
    "mlp": partial(models.MLP, INPUTS, CLASSES, width=128),
}
BACKENDS = {"serial": Serial, "vectorized": Vectorized}


def shared(clients: int) -> Rows:
    """The rows of all clients, below each other: a client's own are a view of some of them."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((clients * PRIVATE, INPUTS), dtype=np.float32)
    return Rows(inputs, random.integers(CLASSES, size=len(inputs)))


def federation(model: str, clients: int, asked: int, rows: Rows, store: str) -> Federation:
    """The task, without a student at the server."""
    recipe = Recipe(epochs=1, batch_size=20, lr=0.05)
    people = [
        Client(f"client-{start // PRIVATE:05}", BUILDS[model], own, training=recipe)
        for start in range(0, clients * PRIVATE, PRIVATE)
        for own in [Rows(*(part[start : start + PRIVATE] for part in (rows.inputs, rows.labels)))]
    ]
    random = np.random.default_rng(1)
    public = ProxySet(random.standard_normal((PUBLIC, INPUTS), dtype=np.float32))
    return Federation(
        people,
        public,
        None,
        method("ds-fl", rule="mean"),
        classes=[str(label) for label in range(CLASSES)],
        seed=1,
        device="cpu",
        participation=asked / clients,
        awake=AWAKE,
        store=store,
    )


def peak() -> float:
    """Megabytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def turns(model: str, backend: str, task: argparse.Namespace) -> dict[str, Any]:
    """A round of the many, a round of the few, and so on."""
    rows = shared(task.clients)
    feds = {
        count: federation(model, count, task.asked, rows, task.store)
        for count in (task.clients, task.fewer)
    }
    runs = {n: fed.run(task.rounds + 1, backend=BACKENDS[backend]) for n, fed in feds.items()}
    spent: dict[int, list[float]] = {count: [] for count in feds}
    for run in runs.values():
        next(run)
    for turn in range(task.rounds):
        for count in (*runs,) if turn % 2 else (*reversed(runs),):  # A B B A
            before = time.process_time()
            next(runs[count])
            spent[count].append(time.process_time() - before)
    many, few = (spent[count] for count in feds)
    return {
        "seconds": round(statistics.median(many), 3),
        "times_fewer": round(min(many) / min(few), 3),
    }


def memory(model: str, backend: str, task: argparse.Namespace) -> dict[str, Any]:
    """What one run of many clients needs."""
    began = peak()
    rows = shared(task.clients)
    asked = task.clients if task.everybody else task.asked
    fed = federation(model, task.clients, asked, rows, task.store)
    for _ in fed.run(1 if task.everybody else task.rounds, backend=BACKENDS[backend]):
        pass
    assert isinstance(fed.sites, Dormant)
    rest = fed.sites.rest
    lengths = (
        [place.length for place in rest._places.values()]
        if isinstance(rest, DiskStore)
        else [len(state) for state in rest._states.values()]  # type: ignore[attr-defined]
    )
    return {
        "peak_mb": round(peak()),
        "start_mb": round(began),
        "rows_mb": round(rows.inputs.nbytes / 2**20),
        "store": task.store,
        "state_bytes": round(statistics.mean(lengths)) if lengths else None,
        "asleep_with_a_state": len(lengths),
    }


def in_process(call: Any, *arguments: Any) -> dict[str, Any]:
    """What a function gives that has a fresh process to itself."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: dict[str, Any] = pool.apply(call, arguments)
    return found


def lines(task: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line for each model and backend."""
    for model in task.models:
        for backend in task.backends:
            told = {"model": model, "backend": backend}
            told |= {"clients": task.clients, "asked": task.asked}
            if not task.everybody:
                told |= in_process(turns, model, backend, task)
            told |= in_process(memory, model, backend, task)
            yield told | {"torch": torch.__version__, "load": round(os.getloadavg()[0], 2)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--fewer", type=int, default=1000)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=list(BUILDS), choices=list(BUILDS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--store", default="disk", choices=["disk", "memory"])
    parser.add_argument("--everybody", action="store_true")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that measure
    for line in lines(parser.parse_args()):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
