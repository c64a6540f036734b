"""One round of federated distillation by several engines: how much processor time each takes.

`python benchmarks/fd_round.py --model mlp` prints a JSON line for each engine:

- `times_naive`: how often its time goes into that of the naive loop; `wall_times_naive` likewise on
  the clock. To compare two engines, divide their figures.
- `times_bound`: how often the time that `bound.py` holds possible on one core goes into its own.
- `dq`, `dw`: the largest difference of the mean prediction, and of any weight, from those of the
  first engine.
- `rss_mb`: megabytes that it needed at its peak, beyond what the process held with the task ready.
- `cpu`, `wall`: seconds of the fastest turn; `path`: processor time of the engine's own process and
  of the busiest that it started, which is what the clock would show if each had a core; `first`:
  seconds until the first round was done, from nothing.

Engines work in turns, each in processes of its own (`turns.py`), on the round of `task.py`. Times
are processor time of all processes of an engine on one torch thread each. Two minutes.

`naive` is a loop as in a tutorial: a module, a loader and an optimizer for each client and phase,
ReLU before the pool, all public rows predicted at once. `serial` is this package's student, one
client after another. `vectorized` are the kernels of that backend, for models that it has some for.
`processes` is the faster of the two on `--workers` processes (`split.py`). `flower` and `blazefl`
are other simulators on the same round (`peers/`). What is not there is skipped, with a line that
says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import bound
import numpy as np
import peers
import torch
from split import split
from task import (
    BATCH,
    CLASSES,
    INPUTS,
    MODELS,
    MOMENTUM,
    OWN,
    PUBLIC,
    RATE,
    Engine,
    Outcome,
    Round,
    Task,
    begin,
    flat,
    task,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from turns import measure

from fedistill.backends import kernels
from fedistill.backends.kernels import Stack
from fedistill.backends.precision import best_mode, matmul_precision
from fedistill.backends.tuning import PREDICT_ROWS, block_of
from fedistill.distill.batches import Batch, Batches
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import TorchStudent
from fedistill.losses import soft_cross_entropy
from fedistill.models import parameter_count, threads

# --- engines -------------------------------------------------------------------------------------


def naive(given: Task) -> Outcome:
    """A module, a loader and an optimizer for each client and phase, as tutorials have it."""

    def epoch(model: nn.Module, rows: Tensor, wanted: Tensor, order: Tensor, size: int) -> float:
        loader = DataLoader(TensorDataset(rows, wanted), batch_size=size, sampler=order.tolist())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        total = 0.0
        model.train()
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    models, sums = [], torch.zeros(PUBLIC, CLASSES)
    for client in range(len(given)):
        model = begin(given.plain, given.starts[client])
        epoch(model, given.inputs[client], given.labels[client], given.orders[client], BATCH)
        model.eval()
        with torch.no_grad():
            sums += model(given.proxy).softmax(1)
        models.append(model)
    mean = given.mean(sums)
    for model in models:
        epoch(model, given.proxy, mean, given.order, given.batch)
    return mean, torch.stack([flat(list(model.parameters())) for model in models])


def serial(given: Task) -> Outcome:
    """This package's student, one client after another."""
    recipe = Recipe(lr=RATE, momentum=MOMENTUM, clip=0.0, batch_size=BATCH)

    def epoch(
        student: TorchStudent, rows: Tensor, wanted: Tensor, order: Tensor, size: int
    ) -> None:
        steps = order.split(size)
        even = torch.full((size,), 1 / size)

        def make(step: int) -> Batch:
            index = steps[step]
            return Batch(rows[index], wanted[index], even, even, size)

        def loss(part: Batch, whole: Batch) -> Tensor:
            return soft_cross_entropy(student.module(part.inputs), part.targets, part.weight)

        student.restart()
        student._train(Batches(len(steps), size, make), loss, seed=0)

    students, sums = [], torch.zeros(PUBLIC, CLASSES)
    hot = F.one_hot(given.labels, CLASSES).float()
    for client in range(len(given)):
        student = TorchStudent(
            partial(begin, given.build, given.starts[client]), recipe, classes=CLASSES, seed=0
        )
        epoch(student, given.inputs[client], hot[client], given.orders[client], BATCH)
        sums += torch.from_numpy(student.predict(given.proxy.numpy())).softmax(1)
        students.append(student)
    mean = given.mean(sums)
    for student in students:
        epoch(student, given.proxy, mean, given.order, given.batch)
    return mean, torch.stack([flat(list(student.module.parameters())) for student in students])


def vectorized(given: Task) -> Outcome:
    """Blocks of clients side by side, each step of a block one call of the kernels."""
    sizes = [INPUTS, *[len(bias) for bias in given.starts[0][1::2]]]
    count = sum(weight.numel() for weight in given.starts[0])
    block, weights = block_of(count), torch.empty(len(given), count)
    stacks, sums = [], torch.zeros(CLASSES, PUBLIC)
    with matmul_precision(best_mode()), torch.inference_mode():
        hot = F.one_hot(given.labels, CLASSES).float().flatten(0, 1)
        rows, proxy = given.inputs.flatten(0, 1), given.proxy[given.order]
        for start in range(0, len(given), block):
            stack = stacked(given.starts[start : start + block], sizes)
            orders = given.orders[start : start + block]
            whole = orders + torch.arange(start, start + len(stack))[:, None] * OWN
            steps = whole.view(len(stack), -1, BATCH).transpose(0, 1)
            descend(stack, ((picked(rows, index), picked(hot, index)) for index in steps))
            for part, logits in kernels.predict(stack, given.proxy, PREDICT_ROWS):
                sums[:, part] += logits.softmax(1).sum(0)
            stacks.append(stack)
        mean = given.mean(sums.t().contiguous())
        goals = mean[given.order]
        for number, stack in enumerate(stacks):
            descend(stack, zip(proxy.split(given.batch), goals.split(given.batch), strict=True))
            unstack(stack, weights[number * block :])
    return mean, weights


def descend(
    stack: Stack, steps: Iterable[tuple[Tensor, Tensor]], momentum: float = MOMENTUM
) -> None:
    """Steps of SGD for a block, on rows and targets of each client or of all."""
    moved = stack.zeros()
    for number, (rows, wanted) in enumerate(steps):
        even = torch.full((rows.shape[-2],), 1 / rows.shape[-2])
        logits, given = kernels.forward(stack, rows)
        deltas = kernels.backward(stack, given, kernels.soft_delta(logits, wanted.mT, even))
        kernels.accumulate(moved, given, deltas, momentum if number else 0.0)
        kernels.step(stack, moved, RATE)


def picked(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of each client, ``[c, rows, ...]``."""
    return rows.index_select(0, index.flatten()).view(*index.shape, -1)


def stacked(starts: list[list[Tensor]], sizes: list[int]) -> Stack:
    """The weights of a block of clients."""
    stack = Stack.blank(sizes, len(starts), starts[0][0])
    for place, start in enumerate(starts):
        for held, weight in zip(stack.as_modules(), start[::2], strict=True):
            held[place].copy_(weight)
        for held, bias in zip(stack.biases, start[1::2], strict=True):
            held[place].copy_(bias)
    return stack


def unstack(stack: Stack, weights: Tensor) -> None:
    """Write all weights of a block into the first rows of ``[clients, weights]``."""
    first, start = weights[: len(stack)], 0
    for pair in zip(stack.as_modules(), stack.biases, strict=True):
        for tensor in pair:
            size = tensor[0].numel()
            first[:, start : start + size].view(tensor.shape).copy_(tensor)
            start += size


VECTORIZED: dict[str, Callable[[Task], Outcome]] = {"mlp": vectorized, "linear": vectorized}
"""What the backend `vectorized` does with a model; `serial` with one that is not here."""


@contextmanager
def steady(once: Callable[[Task], Outcome], given: Task) -> Iterator[Round]:
    """An engine that keeps nothing between rounds."""
    yield partial(once, given)


def engines(model: str, workers: int) -> dict[str, Engine]:
    """Ours by name, for this model."""
    fast = {"vectorized": VECTORIZED[model]} if model in VECTORIZED else {}
    able = {"naive": naive, "serial": serial} | fast
    made: dict[str, Engine] = {name: partial(steady, once) for name, once in able.items()}
    return made | {"processes": partial(split, fast.get("vectorized", serial), workers)}


def absent(name: str, model: str) -> str:
    """Why an engine that there is cannot run this model here; empty if it can."""
    if name == "vectorized" and model not in VECTORIZED:
        return f"no kernels for {model}: the backend vectorized trains it as serial does"
    return peers.absent(name)


def main() -> None:
    """Read the arguments, measure, and print a line for each engine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--engines", help="with commas between; without: all that are ours")
    parser.add_argument("--batch", type=int, default=100, help="public rows of a step")
    parser.add_argument("--turns", type=int, default=5, help="rounds of each after its first")
    parser.add_argument("--workers", type=int, default=2, help="of processes, flower and blazefl")
    asked = parser.parse_args()
    ours = engines(asked.model, asked.workers)
    names = asked.engines.split(",") if asked.engines else list(ours)
    known = ours | peers.engines(asked.model, asked.clients, asked.batch, asked.workers)
    if unknown := set(names) - {*known, "vectorized"}:
        parser.error(f"unknown engines {sorted(unknown)}, known are {[*known]}")
    for name in names:
        if why := absent(name, asked.model):
            print(json.dumps({"engine": name, "skipped": why}), flush=True)
    names = [name for name in names if not absent(name, asked.model)]
    with threads(1):
        machine = bound.measure()

        def between() -> None:
            nonlocal machine
            machine = machine.faster(bound.measure())

        make = partial(task, asked.model, asked.clients, asked.batch)
        found = measure({name: known[name] for name in names}, make, asked.turns, between)
    least = bound.seconds(asked.model, asked.clients, asked.batch, machine)
    for name, figures in found.items():
        against = found.get("naive")
        line = {
            "engine": name,
            "model": asked.model,
            "clients": asked.clients,
            "batch": asked.batch,
            "times_naive": against and round(against.cpu / figures.cpu, 2),
            "wall_times_naive": against and round(against.wall / figures.wall, 2),
            "times_bound": round(figures.cpu / least, 2),
            "dq": apart(figures.found[0], found[names[0]].found[0]),
            "dw": apart(figures.found[1], found[names[0]].found[1]),
            "rss_mb": round(figures.memory),
            "cpu": round(figures.cpu, 4),
            "path": round(figures.path, 4),
            "wall": round(figures.wall, 4),
            "first": round(figures.first, 2),
            "load": round(os.getloadavg()[0], 1),
            "weights": parameter_count(MODELS[asked.model][1]()),
            "gflops": round(machine.flops / 1e9),
            "gbytes": round(machine.bytes / 1e9, 1),
            "mode": best_mode(),
            "workers": asked.workers if name in ("processes", "flower", "blazefl") else 1,
            "turns": asked.turns,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
        print(json.dumps(line), flush=True)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


if __name__ == "__main__":
    main()
