"""Local training alone, per user: a plain loop, this package's kernels, and pfl-research.

`python benchmarks/local_training.py --model mlp` prints a JSON line for each engine: milliseconds
of processor time a user, how often that goes into the plain loop's (`times_loop`), how far the mean
of all trained weights is from the loop's. One round of FedAvg on the rows of `task.py`: all users
begin with the same weights and train one epoch, batches of 20, rate 0.05, without momentum (pfl has
no algorithm of federated distillation to compare with). In turns, each in a process of its own, the
fastest turn. Half a minute. `pfl` is skipped where it is not installed: pip install pfl==0.6.0
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from functools import partial
from importlib.util import find_spec

import torch
from fd_round import apart, descend, picked, stacked, steady, unstack
from task import BATCH, CLASSES, INPUTS, OWN, RATE, Engine, Outcome, Task, begin, flat, task
from torch.nn import functional as F
from turns import measure

from fedistill.backends.precision import best_mode, matmul_precision
from fedistill.backends.tuning import block_of


def common(model: str, clients: int) -> Task:
    """The standard task with one beginning for all."""
    given = task(model, clients)
    return dataclasses.replace(given, starts=[given.starts[0]] * clients)


def loop(given: Task) -> Outcome:
    """One module and optimizer for each user, rows picked by index."""
    found = []
    for client in range(len(given)):
        model = begin(given.plain, given.starts[client])
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        rows, labels = given.inputs[client], given.labels[client]
        for index in given.orders[client].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(rows[index]), labels[index]).backward()
            optimizer.step()
        found.append(flat(list(model.parameters())))
    return torch.empty(0), torch.stack(found).mean(0)


def kernels(given: Task) -> Outcome:
    """Blocks of users side by side."""
    sizes = [INPUTS, *[len(bias) for bias in given.starts[0][1::2]]]
    count = sum(weight.numel() for weight in given.starts[0])
    block, found = block_of(count), torch.empty(len(given), count)
    with matmul_precision(best_mode()), torch.inference_mode():
        hot = F.one_hot(given.labels, CLASSES).float().flatten(0, 1)
        rows = given.inputs.flatten(0, 1)
        for start in range(0, len(given), block):
            stack = stacked(given.starts[start : start + block], sizes)
            orders = given.orders[start : start + block]
            whole = orders + torch.arange(start, start + len(stack))[:, None] * OWN
            steps = whole.view(len(stack), -1, BATCH).transpose(0, 1)
            descend(stack, ((picked(rows, index), picked(hot, index)) for index in steps), 0.0)
            unstack(stack, found[start:])
    return torch.empty(0), found.mean(0)


def pfl(given: Task):
    """pfl-research; imported in its own process."""
    from peers.pfl_users import users

    return users(given)


ENGINES: dict[str, Engine] = {
    "loop": partial(steady, loop),
    "kernels": partial(steady, kernels),
    "pfl": pfl,
}


def main() -> None:
    """Measure, and print a line for each engine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=["mlp", "linear"], default="mlp")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--turns", type=int, default=7, help="rounds of each after its first")
    asked = parser.parse_args()
    known = dict(ENGINES)
    if find_spec("pfl") is None:
        known.pop("pfl")
        why = "pfl is not installed: pip install pfl==0.6.0"
        print(json.dumps({"engine": "pfl", "skipped": why}), flush=True)
    make = partial(common, asked.model, asked.clients)
    found = measure(known, make, asked.turns, lambda: None)
    for name, figures in found.items():
        line = {
            "engine": name,
            "model": asked.model,
            "clients": asked.clients,
            "ms_per_user": round(1000 * figures.cpu / asked.clients, 3),
            "times_loop": round(found["loop"].cpu / figures.cpu, 2),
            "dw": apart(figures.found[1], found["loop"].found[1]),
            "rss_mb": round(figures.memory),
            "load": round(os.getloadavg()[0], 1),
            "mode": best_mode(),
            "turns": asked.turns,
            "torch": torch.__version__,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
