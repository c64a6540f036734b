"""What a step of DP-SGD costs: Gram clipping against Opacus and against a step without privacy.

`python benchmarks/dp_step.py` prints a JSON line for each model (`--model mlp`, `linear`, `lenet`,
`cnn`), batch (`--rows`) and engine: milliseconds of processor time of a whole step (clipped sum,
noise, SGD with momentum), how many times as fast it is as a plain torch step and as Opacus's hooks
and ghost clipping (`times_...`), the share of the noise, and how far norms and clipped sums are
from those of Opacus's gradients of single rows, relative to the largest. `gram x 5` are five
clients side by side, per client. The engines take turns on one thread; each figure is the best of
`--turns`. A minute.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.distill.optimizer import Optimizer
from fedistill.distill.recipe import Recipe
from fedistill.models import CNN, MLP, LeNet, Linear, layers_of, threads
from fedistill.privacy import entropy
from fedistill.privacy.by_gram import gram_engine
from fedistill.privacy.clipping import Clipper, cross_entropy
from fedistill.privacy.rowwise import factors_of
from fedistill.privacy.stacked import Drawn, noisy_gradients

CLIENTS, CLIP, SIGMA, RATE, MOMENTUM = 5, 1.0, 1.0, 0.01, 0.9
SECONDS = 0.15
"""Of one turn of one engine."""
MODELS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (partial(MLP, 784, 10, width=128), (784,)),
    "linear": (partial(Linear, 784, 10), (784,)),
    "lenet": (LeNet, (1, 28, 28)),
    "cnn": (partial(CNN, 1, 10), (1, 28, 28)),
}
Step = Callable[[], object]


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """The same weights for every engine."""
    torch.manual_seed(0)
    return build().train()


# --- engines -------------------------------------------------------------------------------------


def plain(build: Callable[[], nn.Module], rows: Tensor, labels: Tensor) -> Step:
    """A step as in any tutorial."""
    module = made(build)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(rows), labels).backward()
        optimizer.step()

    return step


def hooks(build: Callable[[], nn.Module], rows: Tensor, labels: Tensor) -> Step:
    """Opacus with a gradient for every row."""
    module = GradSampleModule(made(build))
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=len(rows),
    )

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(rows), labels).backward()
        optimizer.step()

    return step


def ghost(build: Callable[[], nn.Module], rows: Tensor, labels: Tensor) -> Step:
    """Opacus's ghost clipping."""
    module = GradSampleModuleFastGradientClipping(made(build), max_grad_norm=CLIP)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=len(rows),
    )
    loss = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        optimizer.zero_grad()
        loss(module(rows), labels).backward()
        optimizer.step()

    return step


def gram(build: Callable[[], nn.Module], rows: Tensor, labels: Tensor) -> Step:
    """A step of a private student: its clipper and its optimizer."""
    module = made(build)
    optimizer = Optimizer(Recipe(momentum=MOMENTUM), list(module.parameters()))
    clipper = Clipper(
        module,
        clip=CLIP,
        sigma=SIGMA,
        expected=len(rows),
        generator=entropy.generator(),
        mode="gram",
    )
    clipper.__enter__()
    everybody = np.arange(len(rows))

    def step() -> None:
        clipper.step(everybody, lambda chosen: (rows, labels, None))
        optimizer.step(RATE)

    return step


def side_by_side(build: Callable[[], nn.Module], rows: Tensor, labels: Tensor) -> Step | None:
    """Steps of five clients at once; None where there are no kernels for the model."""
    modules = [made(build) for _ in range(CLIENTS)]
    found = [layers_of(module) for module in modules]
    layers = list(zip(*[one for one in found if one is not None], strict=True))
    if not layers:
        return None
    weights = [torch.stack([layer.weight.detach() for layer in each]) for each in layers]
    biases = [torch.stack([layer.bias.detach() for layer in each]) for each in layers]
    taught = [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]
    momentum = [torch.zeros_like(tensor) for tensor in taught]
    generators = [entropy.generator() for _ in range(CLIENTS)]
    expected = torch.full((CLIENTS,), float(len(rows)))

    def step() -> None:
        noisy_gradients(
            weights,
            biases,
            Drawn.of([rows] * CLIENTS, [labels] * CLIENTS),
            momentum,
            clip=CLIP,
            sigma=[SIGMA] * CLIENTS,
            expected=expected,
            generators=generators,
            keep=MOMENTUM,
        )
        for tensor, moved in zip(taught, momentum, strict=True):
            tensor.add_(moved, alpha=-RATE)

    return step


def noise(build: Callable[[], nn.Module], rows: Tensor, labels: Tensor) -> Step:
    """The noise alone."""
    del rows, labels
    held = [torch.empty_like(weight, requires_grad=False) for weight in build().parameters()]
    random = entropy.generator()
    return lambda: [tensor.normal_(0.0, 1.0, generator=random) for tensor in held]


ENGINES = {
    "plain": plain,
    "opacus hooks": hooks,
    "opacus ghost": ghost,
    "gram": gram,
    f"gram x {CLIENTS}": side_by_side,
    "noise": noise,
}

# --- equality ------------------------------------------------------------------------------------


def apart(build: Callable[[], nn.Module], rows: Tensor, labels: Tensor) -> tuple[float, float]:
    """Largest difference of norms and of clipped sums from Opacus, relative to the largest."""
    module = made(build)
    wrapped = GradSampleModule(module, loss_reduction="sum")
    F.cross_entropy(wrapped(rows), labels, reduction="sum").backward()
    each = [weight.grad_sample for weight in module.parameters()]
    norms = torch.stack([part.flatten(1).norm(dim=1) for part in each]).norm(dim=0)
    clip = float(norms.median())  # so that half of the rows are clipped
    sums = [torch.einsum("n,n...->...", factors_of(norms, clip), part) for part in each]
    wrapped.cleanup()
    engine = gram_engine(module, cross_entropy, clip)
    engine.open()
    part = rows, labels, None
    found = [torch.zeros_like(weight, requires_grad=False) for weight in module.parameters()]
    engine.add(part, found, 1.0)
    ours = engine.norms(part)
    engine.close()
    pairs = zip(found, sums, strict=True)
    return (
        float(((ours - norms) / norms).abs().max()),
        max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs),
    )


# --- timing --------------------------------------------------------------------------------------


def milliseconds(step: Step, times: int) -> float:
    """Processor time of one step."""
    began = time.process_time()
    for _ in range(times):
        step()
    return 1000 * (time.process_time() - began) / times


def compare(model: str, count: int, turns: int) -> None:
    """A line for each engine."""
    build, shape = MODELS[model]
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(count, *shape, generator=random)
    labels = torch.randint(10, (count,), generator=random)
    steps = {name: step for name, e in ENGINES.items() if (step := e(build, rows, labels))}
    best = {name: min(milliseconds(step, 3) for _ in range(2)) for name, step in steps.items()}
    times = {name: max(2, int(1000 * SECONDS / took)) for name, took in best.items()}
    for _ in range(turns):
        for name, step in steps.items():
            best[name] = min(best[name], milliseconds(step, times[name]))
    several = f"gram x {CLIENTS}"
    if several in best:
        best[several] /= CLIENTS
    drawing = best.pop("noise")
    norms, sums = apart(build, rows, labels)
    for name, took in best.items():
        line: dict[str, object] = {"model": model, "rows": count, "engine": name}
        line["ms"] = round(took, 3)
        for other, label in (
            ("plain", "plain"),
            ("opacus hooks", "hooks"),
            ("opacus ghost", "ghost"),
        ):
            line[f"times_{label}"] = round(best[other] / took, 2)
        if name != "plain":
            line["noise_share"] = round(drawing / took, 2)
        if name == "gram":
            line |= {"norms_apart": float(f"{norms:.1e}"), "sums_apart": float(f"{sums:.1e}")}
        load = round(os.getloadavg()[0], 1)
        print(json.dumps(line | {"load": load, "torch": torch.__version__}), flush=True)


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--turns", type=int, default=7)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    with threads(1):
        for model in asked.model or ("mlp", "linear", "cnn"):
            for count in asked.rows or (20, 100):
                compare(model, count, asked.turns)


if __name__ == "__main__":
    main()
