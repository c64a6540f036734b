"""What this machine could do at best: how fast it multiplies matrices, how fast it moves memory.

`python benchmarks/bound.py --model mlp` prints a JSON line on one core (`gflops` of a product of
1024 x 1024 float32 matrices, `gbytes` a second that a copy of 256 MB reads and writes, `cache_mb`)
and one on each phase of the standard round: the bound of a client in milliseconds, and which of the
two sets it.

The bound of a phase is the larger of two times: its operations (multiply-adds of products and
convolutions, times two; the first layer's input has no gradient) at the rate of the product, and
its bytes at the rate of the copy. Bytes are those that no engine can do without: rows are read
once, weights read and, where they are trained, written. While weights and momentum of one client
fit into the largest cache, once a phase; else both are read and written in every step.

Only library modes whose products have the error of float32 count: one that is faster because it
rounds to bfloat16 is no bound for an exact round.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from task import BATCH, CLASSES, MODELS, OWN, PUBLIC, Build
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedistill.backends.precision import LARGEST_ERROR, error_of, matmul_precision
from fedistill.models import parameter_count, threads

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
COPIED = 256 << 20


@dataclass(frozen=True)
class Machine:
    """One core.

    Attributes:
        flops: operations a second of a product of large matrices.
        bytes: read and written a second by a large copy.
        cache: bytes of its largest cache.
    """

    flops: float
    bytes: float
    cache: int

    def faster(self, other: Machine) -> Machine:
        """The better of two measurements."""
        return Machine(max(self.flops, other.flops), max(self.bytes, other.bytes), self.cache)


@dataclass(frozen=True)
class Phase:
    """What one client has to do in a part of the round.

    Attributes:
        flops: operations.
        bytes: moved between memory and core.
    """

    flops: int
    bytes: int

    def seconds(self, machine: Machine) -> float:
        """The least time that it can take."""
        return max(self.flops / machine.flops, self.bytes / machine.bytes)


def seconds_of(work: Callable[[], object]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def exact_modes() -> list[str]:
    """Modes of PyTorch's float32 products that are float32."""
    return ["highest", *(["medium"] if error_of("medium") < LARGEST_ERROR else [])]


def measure(size: int = 1024) -> Machine:
    """Rates of one core, the best of some tries; one torch thread must be set."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    product = 0.0
    for mode in exact_modes():
        with matmul_precision(mode):
            took = min(seconds_of(partial(torch.mm, left, right)) for _ in range(5))
            product = max(product, 2 * size**3 / took)
    source = torch.ones(COPIED // 4)
    target = torch.ones(COPIED // 4)  # touched: its pages are there
    took = min(seconds_of(partial(target.copy_, source)) for _ in range(3))
    return Machine(product, 2 * COPIED / took, largest_cache())


def largest_cache() -> int:
    """Bytes; 32 MB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [
        int(told[1]) * units[told[2]]
        for path in CACHES.glob("index*/size")
        if (told := re.match(r"(\d+)([KM])", path.read_text()))
    ]
    return max(found, default=32 << 20)


def flops_of(build: Build, shape: tuple[int, ...]) -> tuple[int, int]:
    """Operations of predicting one row, and of training on one."""
    model = build()
    row = torch.zeros(1, *shape)
    with FlopCounterMode(display=False) as seen:
        loss = F.cross_entropy(model(row), torch.full((1, CLASSES), 1 / CLASSES))
        predicted = seen.get_total_flops()
        loss.backward()  # type: ignore[no-untyped-call]
    return predicted, seen.get_total_flops()


def phases(model: str, batch: int, machine: Machine) -> dict[str, Phase]:
    """The phases of the standard round for one client, with public batches of this size."""
    shape, build, _ = MODELS[model]
    predicted, trained = flops_of(build, shape)
    weights = 4 * parameter_count(build())
    row = 4 * torch.Size(shape).numel()
    # The public rows are the same for all: who keeps them in the cache reads them no second time.
    public = 0 if PUBLIC * row <= machine.cache else PUBLIC * row

    def moved(steps: int) -> int:
        return 2 * weights if 2 * weights <= machine.cache else 4 * weights * steps

    return {
        "train": Phase(OWN * trained, OWN * row + moved(-(-OWN // BATCH))),
        "predict": Phase(PUBLIC * predicted, public + weights),
        "distil": Phase(PUBLIC * trained, public + moved(-(-PUBLIC // batch))),
    }


def seconds(model: str, clients: int, batch: int, machine: Machine) -> float:
    """The least time that one core can take for a round."""
    return clients * sum(p.seconds(machine) for p in phases(model, batch, machine).values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument("--batch", type=int, default=100, help="public rows of a step")
    asked = parser.parse_args()
    with threads(1):
        machine = measure()
        line: dict[str, object] = {
            "gflops": round(machine.flops / 1e9),
            "gbytes": round(machine.bytes / 1e9, 1),
            "cache_mb": round(machine.cache / 2**20, 1),
            "exact": exact_modes(),
            "error_of_medium": error_of("medium"),
            "torch": torch.__version__,
        }
        print(json.dumps(line), flush=True)
        for name, phase in phases(asked.model, asked.batch, machine).items():
            memory = phase.bytes / machine.bytes > phase.flops / machine.flops
            line = {
                "model": asked.model,
                "phase": name,
                "mflop": round(phase.flops / 1e6, 1),
                "mb": round(phase.bytes / 1e6, 2),
                "bound_ms": round(1000 * phase.seconds(machine), 3),
                "bound_by": "memory" if memory else "products",
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
