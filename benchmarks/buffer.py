"""What a memory costs: microseconds to add rows and to draw some, by policy and size of batch.

`python benchmarks/buffer.py` prints a JSON line for each policy, capacity and batch: microseconds
of processor time of an `add` of the batch and of a `draw` of 128 rows, and how often they go into
those of `loop`, algorithm R with a Python loop over rows as in mammoth's buffer. Rows are 1x28x28
float32 with ten logits. Buffers take turns; each figure is of the fastest turn, once 2,000 rows
were there, when most rows are refused (`recent` and `herding` refuse none). Of the policies herding
alone has a loop over rows: it is greedy. `avalanche` is its reservoir as a loop over small
experiences uses it, left out where it is not installed (`peers/avalanche_der.py`). Half a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

import fedistill as fd
from fedistill.continual.policies import POLICIES
from fedistill.models import threads

SHAPE, CLASSES, FEATURES, DRAWN, BEFORE = (1, 28, 28), 10, 32, 128, 2000
Pair = tuple[Callable[[], object], Callable[[], object]]
"""What adds a batch, and what draws."""


def batch_of(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels, logits."""
    random = np.random.default_rng(0)
    inputs = random.random((count, *SHAPE), dtype=np.float32)
    logits = random.random((count, CLASSES), dtype=np.float32)
    return inputs, random.integers(0, CLASSES, count), logits


class Loop:
    """Algorithm R, a row at a time."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.seen = capacity, 0
        self.inputs = torch.zeros(capacity, *SHAPE)
        self.labels = torch.zeros(capacity, dtype=torch.long)
        self.logits = torch.zeros(capacity, CLASSES)

    def add(self, inputs: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Rows came."""
        for row in range(len(labels)):
            slot = self.seen if self.seen < self.capacity else np.random.randint(self.seen + 1)
            self.seen += 1
            if slot < self.capacity:
                self.inputs[slot] = inputs[row]
                self.labels[slot] = labels[row]
                self.logits[slot] = logits[row]

    def draw(self, count: int) -> tuple[Tensor, ...]:
        """Different rows."""
        held = min(self.seen, self.capacity)
        chosen = np.random.choice(held, size=min(count, held), replace=False)
        return self.inputs[chosen], self.labels[chosen], self.logits[chosen]


def loop(capacity: int, batch: int) -> Pair:
    """The loop."""
    held = Loop(capacity)
    rows = [torch.from_numpy(part) for part in batch_of(batch)]
    return partial(held.add, *rows), partial(held.draw, DRAWN)


def ours(policy: str, capacity: int, batch: int) -> Pair:
    """A buffer of this package."""
    held = fd.ReplayBuffer(capacity, policy)
    inputs, labels, logits = batch_of(batch)
    random = np.random.default_rng(1)
    more = {"scores": random.random(batch), "features": random.random((batch, FEATURES))}
    asked = {name: more[name] for name in (POLICIES[policy].needs,) if name}
    return partial(held.add, inputs, labels, logits=logits, **asked), partial(held.draw, DRAWN)


def avalanche(capacity: int, batch: int) -> Pair:
    """The reservoir of avalanche, and a loader over what it holds, which needs building anew."""
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training.storage_policy import ReservoirSamplingBuffer
    from torch.utils.data import DataLoader, TensorDataset

    held = ReservoirSamplingBuffer(capacity)
    inputs, labels, logits = (torch.from_numpy(part) for part in batch_of(batch))
    rows = TensorDataset(inputs, labels, logits)
    rows.targets = labels.tolist()

    def add() -> None:
        held.update_from_dataset(as_classification_dataset(rows))

    def draw() -> object:
        return next(iter(DataLoader(held.buffer, batch_size=DRAWN, shuffle=True)))

    return add, draw


def microseconds(work: Callable[[], object], times: int) -> float:
    """Processor time of one call."""
    began = time.process_time()
    for _ in range(times):
        work()
    return 1e6 * (time.process_time() - began) / times


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--capacities", type=int, nargs="+", default=[200, 500])
    parser.add_argument("--batches", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    kinds: dict[str, Callable[[int, int], Pair]] = {
        "loop": loop,
        **{policy: partial(ours, policy) for policy in POLICIES},
    }
    if find_spec("avalanche") is not None:
        kinds["avalanche"] = avalanche
    with threads(1):
        for capacity in asked.capacities:
            for batch in asked.batches:
                compare(kinds, capacity, batch, asked.turns)


def compare(
    kinds: dict[str, Callable[[int, int], Pair]], capacity: int, batch: int, turns: int
) -> None:
    """A line for each kind of buffer."""
    pairs = {name: make(capacity, batch) for name, make in kinds.items()}
    for add, _ in pairs.values():
        for _ in range(-(-BEFORE // batch)):
            add()
    best: dict[tuple[str, int], float] = {}
    for _ in range(turns):
        for name, pair in pairs.items():
            often = 5 if name in ("herding", "avalanche") else 50
            for which, work in enumerate(pair):
                took = microseconds(work, often)
                best[name, which] = min(took, best.get((name, which), took))
    for name in kinds:
        line = {
            "buffer": name,
            "capacity": capacity,
            "batch": batch,
            "add_us": round(best[name, 0], 1),
            "draw_us": round(best[name, 1], 1),
            "add_times_loop": round(best["loop", 0] / best[name, 0], 2),
            "draw_times_loop": round(best["loop", 1] / best[name, 1], 2),
            "load": round(os.getloadavg()[0], 1),
            "numpy": np.__version__,
            "torch": torch.__version__,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
