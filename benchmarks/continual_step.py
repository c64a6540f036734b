"""What a step of incremental learning costs: DER++ here against a plain torch loop and avalanche.

`python benchmarks/continual_step.py` prints JSON lines: a line for each run (processor seconds of
training, accuracy after the last experience), in turns, then a line with the best of each and the
ratios of ours to theirs. Split-MNIST, five experiences of two classes, 200 remembered rows, an MLP
784-100-100-10, one pass in batches of 10, two draws of 128 rows from memory. The plain loop has
Vitter's reservoir without loops over rows and one forward pass for all rows of a step; avalanche is
as `peers/avalanche_der.py` says, and left out where it is not installed. `--quick` takes a tenth of
the rows. One thread; needs the idx files of MNIST under $FEDISTILL_DATA. Beside others' work the
seconds of all grow: look at the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fedistill as fd
from fedistill.config import DataSettings
from fedistill.data.sources import read
from fedistill.data.stream import Experience, experiences
from fedistill.distill.objectives import DerPlus
from fedistill.models import MLP, threads
from fedistill.types import IntArray, Rows

MEMORY, BATCH, REPLAYED, LR, ALPHA, BETA = 200, 10, 128, 0.03, 0.2, 1.0
Trained = tuple[float, Callable[[Tensor], Tensor]]
"""Processor seconds, and what predicts."""


def mnist(part: str, share: int) -> Rows:
    """Pixels from 0 to 1; every ``share``-th row."""
    found = read(f"idx:mnist/{part}", DataSettings())
    return Rows(found.inputs[::share] / np.float32(255), found.labels[::share])


# --- the plain loop ------------------------------------------------------------------------------


class PlainReservoir:
    """Algorithm R for a batch at once: the last row that falls on a slot wins."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seen = capacity, 0
        self.random = np.random.default_rng(seed)
        self.inputs = torch.zeros(capacity, 1, 28, 28)
        self.labels = torch.zeros(capacity, dtype=torch.long)
        self.logits = torch.zeros(capacity, 10)

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, inputs: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Rows came."""
        numbers = self.seen + np.arange(len(labels))
        drawn = (self.random.random(len(labels)) * (numbers + 1)).astype(np.int64)
        slots = np.where(numbers < self.capacity, numbers, drawn)
        self.seen += len(labels)
        held = dict(zip(slots.tolist(), range(len(slots)), strict=True))
        kept = [(slot, row) for slot, row in held.items() if slot < self.capacity]
        if kept:
            to, rows = (torch.tensor(part) for part in zip(*kept, strict=True))
            self.inputs[to], self.labels[to], self.logits[to] = (
                part[rows] for part in (inputs, labels, logits)
            )

    def draw(self, count: int) -> IntArray:
        """Different slots."""
        return self.random.permutation(len(self))[:count]


def plain(stream: Sequence[Experience], seed: int) -> Trained:
    """DER++ in one loop, without anything that it does not need."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    module = MLP(784, 10, width=100, depth=2)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    memory = PlainReservoir(MEMORY, seed)
    began = time.process_time()
    for experience in stream:
        inputs = torch.from_numpy(experience.train.inputs)
        labels = torch.from_numpy(experience.train.labels)
        order = torch.from_numpy(random.permutation(len(labels)))
        for index in torch.split(order, BATCH):
            rows, wanted = inputs[index], labels[index]
            if len(memory):
                first, second = (torch.from_numpy(memory.draw(REPLAYED)) for _ in range(2))
                seen = torch.cat([rows, memory.inputs[first], memory.inputs[second]])
                new, dark, known = torch.split(module(seen), [len(rows), len(first), len(second)])
                loss = F.cross_entropy(new, wanted)
                loss = loss + ALPHA * F.mse_loss(dark, memory.logits[first])
                loss = loss + BETA * F.cross_entropy(known, memory.labels[second])
            else:
                new = module(rows)
                loss = F.cross_entropy(new, wanted)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            memory.add(rows, wanted, new.detach())
    return time.process_time() - began, module


# --- ours ----------------------------------------------------------------------------------------


def ours(stream: Sequence[Experience], seed: int) -> Trained:
    """DER++ as anyone would ask for it."""
    student = fd.IncrementalDistiller(
        partial(MLP, 784, 10, width=100, depth=2),
        DerPlus(alpha=ALPHA, beta=BETA, rows=REPLAYED),
        replay=fd.ReplayBuffer(MEMORY, seed=seed),
        training=fd.Recipe(epochs=1, batch_size=BATCH, lr=LR, clip=0),
        seed=seed,
    )
    began = time.process_time()
    for experience in stream:
        student.learn(experience)
    seconds = time.process_time() - began
    return seconds, lambda rows: torch.from_numpy(student.predict(rows.numpy()))


# --- avalanche -----------------------------------------------------------------------------------


def avalanche(stream: Sequence[Experience], seed: int) -> Trained:
    """DER++ as avalanche has it."""
    from peers.avalanche_der import trained

    torch.manual_seed(seed)
    module = MLP(784, 10, width=100, depth=2)
    return trained(
        stream,
        module,
        memory=MEMORY,
        batch=BATCH,
        replayed=REPLAYED,
        rate=LR,
        alpha=ALPHA,
        beta=BETA,
    )


def accuracy(predict: Callable[[Tensor], Tensor], stream: Sequence[Experience]) -> float:
    """Percent of test rows that are right, mean over the experiences."""
    right = []
    for experience in stream:
        assert experience.test is not None
        with torch.inference_mode():
            said = predict(torch.from_numpy(experience.test.inputs)).argmax(dim=1).numpy()
        right.append(float((said == experience.test.labels).mean()))
    return 100 * float(np.mean(right))


def main() -> None:
    """All in turns, a line each, then the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=2, help="runs of each (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the training rows")
    given = parser.parse_args()
    train, test = mnist("train", 10 if given.quick else 1), mnist("t10k", 1)
    stream = experiences("class-incremental", train, test, 5, shuffle=False)
    ways = {"plain": plain, "ours": ours}
    if find_spec("avalanche") is not None:
        ways["avalanche"] = avalanche
    else:
        why = "avalanche is not installed: see peers/avalanche_der.py"
        print(json.dumps({"loop": "avalanche", "skipped": why}), flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    right: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.turns):
        for name, way in ways.items():
            took, predict = way(stream, turn)
            seconds[name].append(took)
            right[name].append(accuracy(predict, stream))
            line = {"loop": name, "seed": turn, "cpu_seconds": round(took, 2)}
            print(json.dumps(line | {"accuracy": round(right[name][-1], 2)}), flush=True)
    best = {name: min(values) for name, values in seconds.items()}
    summary = {f"{name}_cpu_seconds": round(value, 2) for name, value in best.items()}
    summary |= {f"{name}_accuracy": round(float(np.mean(right[name])), 2) for name in ways}
    for name in ways.keys() - {"ours"}:
        summary[f"of_{name}"] = round(best["ours"] / best[name], 3)
    about = {"quick": given.quick, "rows": len(train), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps(summary | about | {"torch": torch.__version__}))


if __name__ == "__main__":
    with threads(1):
        main()
