"""One round of federated distillation by several engines: how much processor time each takes.

`python benchmarks/fd_round.py --model mlp` prints a JSON line for each engine: `times_naive`, how
often its time goes into that of the naive loop, and `times_bound`, how often the time that the
matrix products alone would take goes into its own. The engines take turns on one thread; each
figure is of the fastest turn, in processor time. Two minutes.

The round: ten Gaussian classes in 784 dimensions; each client has 200 rows, 2,000 are public. A
client trains one epoch on its rows (batches of 20, SGD, rate 0.05, momentum 0.9), predicts the
public rows, and distils one epoch on the mean of all predictions (batches of 100, one order for
all). All orders are drawn before. `naive` is a loop as in a tutorial, `serial` this package's
student, one client after another, `vectorized` the kernels of that backend.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fedistill.backends import kernels
from fedistill.backends.kernels import Stack
from fedistill.backends.precision import best_mode, matmul_precision
from fedistill.backends.tuning import PREDICT_ROWS, block_of
from fedistill.distill.batches import Batch, Batches
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import TorchStudent
from fedistill.losses import soft_cross_entropy
from fedistill.models import MLP, Linear, parameter_count, threads

INPUTS, CLASSES, OWN, PUBLIC, WIDTH = 784, 10, 200, 2000, 128
BATCH, RATE, MOMENTUM = 20, 0.05, 0.9
BUILDS = {
    "mlp": partial(MLP, INPUTS, CLASSES, width=WIDTH),
    "linear": partial(Linear, INPUTS, CLASSES),
}


@dataclass
class Task:
    """The rows, the orders in which they are seen, and the weights to start from."""

    build: Callable[[], nn.Module]
    inputs: Tensor
    """Own rows ``[clients, rows, in]``."""
    labels: Tensor
    proxy: Tensor
    orders: Tensor
    """Of own rows, ``[clients, rows]``."""
    order: Tensor
    """Of public rows, one for all."""
    batch: int
    """Public rows of a step."""
    starts: list[list[Tensor]]

    def __len__(self) -> int:
        return len(self.inputs)


Outcome = tuple[Tensor, Tensor]
"""Mean prediction ``[rows, classes]`` and all weights ``[clients, weights]``."""


def task(model: str, clients: int, batch: int) -> Task:
    """The standard round."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, INPUTS, generator=random)
    draw = partial(torch.randn, generator=random)
    labels = torch.randint(CLASSES, (clients, OWN), generator=random)
    hidden = torch.randint(CLASSES, (PUBLIC,), generator=random)
    torch.manual_seed(1)
    return Task(
        BUILDS[model],
        centres[labels] + 2 * draw(clients, OWN, INPUTS),
        labels,
        centres[hidden] + 2 * draw(PUBLIC, INPUTS),
        torch.stack([torch.randperm(OWN, generator=random) for _ in range(clients)]),
        torch.randperm(PUBLIC, generator=random),
        batch,
        [[w.detach().clone() for w in BUILDS[model]().parameters()] for _ in range(clients)],
    )


def begin(given: Task, client: int) -> nn.Module:
    """The model of a client as it starts."""
    model = given.build()
    with torch.no_grad():
        for weight, value in zip(model.parameters(), given.starts[client], strict=True):
            weight.copy_(value)
    return model


def flat(weights: list[Tensor]) -> Tensor:
    """Weights of a model in one row."""
    return torch.cat([weight.detach().flatten() for weight in weights])


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
        model = begin(given, client)
        epoch(model, given.inputs[client], given.labels[client], given.orders[client], BATCH)
        model.eval()
        with torch.no_grad():
            sums += model(given.proxy).softmax(1)
        models.append(model)
    mean = sums / len(given)
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
        student = TorchStudent(partial(begin, given, client), recipe, classes=CLASSES, seed=0)
        epoch(student, given.inputs[client], hot[client], given.orders[client], BATCH)
        sums += torch.from_numpy(student.predict(given.proxy.numpy())).softmax(1)
        students.append(student)
    mean = sums / len(given)
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
        mean = sums.t().contiguous() / len(given)
        goals = mean[given.order]
        for number, stack in enumerate(stacks):
            descend(stack, zip(proxy.split(given.batch), goals.split(given.batch), strict=True))
            unstack(stack, weights[number * block :])
    return mean, weights


def descend(stack: Stack, steps: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Steps of momentum SGD for a block, on rows and targets of each client or of all."""
    momentum = stack.zeros()
    for number, (rows, wanted) in enumerate(steps):
        even = torch.full((rows.shape[-2],), 1 / rows.shape[-2])
        logits, given = kernels.forward(stack, rows)
        deltas = kernels.backward(stack, given, kernels.soft_delta(logits, wanted.mT, even))
        kernels.accumulate(momentum, given, deltas, MOMENTUM if number else 0.0)
        kernels.step(stack, momentum, RATE)


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


ENGINES: dict[str, Callable[[Task], Outcome]] = {
    "naive": naive,
    "serial": serial,
    "vectorized": vectorized,
}


# --- measuring -----------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def gemm_rate(size: int = 1024) -> float:
    """Multiply-adds a second of the faster of two libraries, times two."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for mode in ("highest", "medium"):
        with matmul_precision(mode):
            took = min(seconds_of(partial(torch.mm, left, right)) for _ in range(4))
            best = max(best, 2 * size**3 / took)
    return best


def flops(model: str, clients: int) -> int:
    """Operations of the matrix products in a round; the first layer's input has no gradient."""
    sizes = {"linear": [INPUTS, CLASSES], "mlp": [INPUTS, WIDTH, CLASSES]}[model]
    products = [before * after for before, after in itertools.pairwise(sizes)]
    trained = 2 * (3 * sum(products) - products[0])
    return clients * (OWN * trained + PUBLIC * 2 * sum(products) + PUBLIC * trained)


def resident() -> float:
    """Megabytes of this process in memory."""
    path = Path("/proc/self/statm")
    pages = int(path.read_text().split()[1]) if path.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(model: str, clients: int, names: list[str], batch: int, turns: int) -> None:
    """Print a line for each engine."""
    given = task(model, clients, batch)
    best: dict[str, float] = {}
    memory: dict[str, float] = {}
    found: dict[str, Outcome] = {}
    rate = 0.0
    for _ in range(turns):
        rate = max(rate, gemm_rate())
        for name in names:
            kept: list[Outcome] = []
            took = seconds_of(lambda name=name, kept=kept: kept.append(ENGINES[name](given)))
            best[name] = min(took, best.get(name, took))
            memory[name] = max(resident(), memory.get(name, 0.0))
            found[name] = kept[0]
    bound = flops(model, clients) / rate
    for name in names:
        line = {
            "engine": name,
            "model": model,
            "clients": clients,
            "batch": batch,
            "times_naive": round(best["naive"] / best[name], 2) if "naive" in best else None,
            "times_bound": round(best[name] / bound, 2),
            "dq": float((found[name][0] - found[names[0]][0]).abs().max()),
            "dw": float((found[name][1] - found[names[0]][1]).abs().max()),
            "rss_mb": round(memory[name]),
            "load": round(os.getloadavg()[0], 1),
            "weights": parameter_count(given.build()),
            "gflops": round(rate / 1e9),
            "mode": best_mode(),
            "turns": turns,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(BUILDS), default="mlp")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--batch", type=int, default=100, help="public rows of a step")
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    names = asked.engines.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        parser.error(f"unknown engines {unknown}, known are {list(ENGINES)}")
    with threads(1):
        measure(asked.model, asked.clients, names, asked.batch, asked.turns)


if __name__ == "__main__":
    main()
