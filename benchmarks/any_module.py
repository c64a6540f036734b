"""The standard round with image models: what this package's student takes against a naive loop.

`python benchmarks/any_module.py --model lenet` prints a JSON line for each engine: `times_naive`,
how often its processor time goes into that of the naive loop, and how far its mean prediction
(`dq`) and its weights (`dw`) are from the loop's. The round is that of `fd_round.py`, its rows seen
as 1x28x28. `naive` has PyTorch's own layers, ReLU before the pool, and predicts all public rows at
once, as tutorials do; `serial` is this package's student, one client after another. The engines
take turns on one thread; each figure is of the fastest turn. A minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from functools import partial

import fd_round
import torch
from fd_round import Outcome, Task, seconds_of
from torch import Tensor, nn

from fedistill.models import LeNet, threads
from fedistill.pooling import MaxPool

SHAPE = (1, 28, 28)


def plain_lenet() -> nn.Module:
    """LeNet of PyTorch's layers."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def cnn(pooled: Callable[[], list[nn.Module]]) -> nn.Module:
    """Two convolutions with GroupNorm and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        *pooled(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        *pooled(),
        nn.Flatten(),
        nn.Linear(784, 10),
    )


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "lenet": plain_lenet,
    "cnn": partial(cnn, lambda: [nn.ReLU(), nn.MaxPool2d(2)]),
}
OURS: dict[str, Callable[[], nn.Module]] = {
    "lenet": partial(LeNet, 10),
    "cnn": partial(cnn, lambda: [MaxPool(), nn.ReLU()]),
}


def images(model: str, clients: int, batch: int) -> Task:
    """The standard round with rows as images."""
    fd_round.BUILDS[model] = PLAIN[model]  # type: ignore[assignment,index]
    made = fd_round.task(model, clients, batch)
    made.inputs = made.inputs.unflatten(-1, SHAPE)
    made.proxy = made.proxy.unflatten(-1, SHAPE)
    return made


ENGINES: dict[str, Callable[[Task], Outcome]] = {
    "naive": fd_round.naive,
    "serial": fd_round.serial,
}


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(PLAIN), default="lenet")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--batch", type=int, default=100, help="public rows of a step")
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    with threads(1):
        given = images(asked.model, asked.clients, asked.batch)
        builds = {name: OURS[asked.model] for name in ENGINES} | {"naive": PLAIN[asked.model]}
        best: dict[str, float] = {}
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for _ in range(asked.turns):
            for name, engine in ENGINES.items():
                given.build = builds[name]
                took, found[name] = seconds_of_result(partial(engine, given))
                best[name] = min(took, best.get(name, took))
        for name in ENGINES:
            gaps = [
                float((one - other).abs().max())
                for one, other in zip(found[name], found["naive"], strict=True)
            ]
            line = {
                "engine": name,
                "model": asked.model,
                "clients": asked.clients,
                "batch": asked.batch,
                "times_naive": round(best["naive"] / best[name], 2),
                "dq": gaps[0],
                "dw": gaps[1],
                "load": round(os.getloadavg()[0], 1),
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
            print(json.dumps(line), flush=True)


def seconds_of_result(work: Callable[[], Outcome]) -> tuple[float, Outcome]:
    """Processor time of a call, and what it found."""
    held: list[Outcome] = []
    return seconds_of(lambda: held.append(work())), held[0]


if __name__ == "__main__":
    main()
