"""Compress a large teacher into a small student, and see what each way of teaching gains.

    python simulations/compress.py --data digits
    python simulations/compress.py --data fashion --seeds 0 1 2

For each seed: a teacher trained on labels, then students of one small architecture from the same
initial weights, in equally many epochs. The table is Markdown. Fashion-MNIST is looked for under
$FEDISTILL_DATA; a seed of it takes two minutes of one core, one of the digits three seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import fedistill as fd
from fedistill.config import DataSettings, ProxySettings
from fedistill.distill.distiller import Distiller, Feature
from fedistill.distill.teachers import Teacher, born_again
from fedistill.losses import hint, regressor
from fedistill.models import parameter_count, threads
from fedistill.types import Dataset, Rows

SGD = fd.Recipe(batch_size=50, lr=0.05, momentum=0.9, weight_decay=1e-4, schedule="cosine")
TRUNKS = ("trunk", "trunk")


@dataclass(frozen=True)
class Setup:
    """One data set, two sizes of a model, how long both train, and w and T of the soft part."""

    data: Dataset
    large: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    epochs: int
    soft_weight: float
    temperature: float
    seed: int

    @property
    def more(self) -> Rows:
        """The training rows, and the public rows, which have no labels."""
        both = self.data.train, self.data.public
        return Rows(*(np.concatenate([getattr(r, k) for r in both]) for k in ("inputs", "labels")))


def digits(seed: int) -> Setup:
    """300 labelled digits, 800 without labels, 400 to measure; MLPs."""
    data = fd.data.digits(seed, proxy_rows=800, test_rows=400)
    data = replace(data, train=data.train.take(range(300)))
    large = partial(fd.models.MLP, 64, 10, width=256, depth=2)
    return Setup(data, large, partial(fd.models.MLP, 64, 10, width=10), 60, 0.9, 4.0, seed)


def fashion(seed: int) -> Setup:
    """4,000 labelled images, 8,000 without labels, 5,000 to measure; convolutional networks."""
    source = DataSettings(source="idx:fashion_mnist/train", test="idx:fashion_mnist/t10k")
    data = fd.data.load(source, ProxySettings(rows=8000), seed)
    data = replace(data, train=data.train.take(range(4000)), test=data.test.take(range(5000)))
    large, small = (partial(fd.models.CNN, 1, 10, width=width) for width in (16, 4))
    return Setup(data, large, small, 20, 0.5, 2.0, seed)


# --- ways to teach -------------------------------------------------------------------------------


def trained(
    setup: Setup, build: Callable[[], nn.Module], *teacher: nn.Module | Teacher, **options: Any
) -> nn.Module:
    """A module after all epochs, on the training rows unless ``rows`` are among the options."""
    rows = options.pop("rows", setup.data.train)
    made = Distiller(build, *teacher, training=SGD, seed=setup.seed, **options)
    for _ in made.fit(rows, setup.epochs):
        pass
    return made.student


def plain(setup: Setup, teacher: nn.Module) -> nn.Module:
    """Labels alone."""
    del teacher
    return trained(setup, setup.small)


def kd(setup: Setup, teacher: nn.Module | Teacher, **options: Any) -> nn.Module:
    """Labels and soft targets."""
    told = {"soft_weight": setup.soft_weight, "temperature": setup.temperature}
    return trained(setup, setup.small, teacher, **told, **options)


def kd_hint(setup: Setup, teacher: nn.Module) -> nn.Module:
    """The same, and beside it the trunk imitates the teacher's through a regressor."""
    return kd(setup, teacher, feature_losses={TRUNKS: Feature(hint, 0.1, regressor)})


def hint_first(setup: Setup, teacher: nn.Module) -> nn.Module:
    """The hint alone for a fifth of the epochs, as FitNets has it; then all together."""
    features = {TRUNKS: Feature(hint, 0.1, regressor)}
    return kd(setup, teacher, feature_losses=features, phases=[(setup.epochs // 5, [TRUNKS])])


def kd_more(setup: Setup, teacher: nn.Module) -> nn.Module:
    """Soft targets on rows without labels too, in as many steps: fewer passes over more rows."""
    passes = round(setup.epochs * len(setup.data.train) / len(setup.more))
    return kd(replace(setup, epochs=passes), teacher, rows=setup.more)


def again(setup: Setup, teacher: nn.Module) -> nn.Module:
    """Three small generations, each taught by the one before: no large teacher at all."""
    del teacher

    def train(before: Teacher | None, number: int) -> nn.Module:
        own = replace(setup, seed=1000 * number + setup.seed)
        return trained(own, setup.small) if before is None else kd(own, before)

    *_, last = born_again(train, 3)
    return last


WAYS = {
    "plain: labels alone": plain,
    "kd": kd,
    "kd + hint": kd_hint,
    "hint first, then both": hint_first,
    "kd, unlabelled rows too": kd_more,
    "born again, 3 generations": again,
}


# --- the table -----------------------------------------------------------------------------------


def accuracy(module: nn.Module, rows: Rows) -> float:
    """Percent of rows that are right."""
    return 100 * fd.metrics.accuracy(Distiller(module).predict(rows.inputs), rows.labels)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=["digits", "fashion"], default="fashion")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="in place of the usual number")
    given = parser.parse_args()
    home = Path(os.environ.get("FEDISTILL_DATA", "."))
    if given.data == "fashion" and not (home / "fashion_mnist").is_dir():
        print(
            f"skipped: {home / 'fashion_mnist'} is not there; set FEDISTILL_DATA, or --data digits"
        )
        return
    found: dict[str, list[float]] = {name: [] for name in ("teacher", *WAYS)}
    sizes: dict[str, int] = {}
    started = time.monotonic()
    for seed in given.seeds:
        setup = (digits if given.data == "digits" else fashion)(seed)
        if given.epochs:
            setup = replace(setup, epochs=given.epochs)
        teacher = trained(setup, setup.large)
        for name in found:
            module = teacher if name == "teacher" else WAYS[name](setup, teacher)
            found[name].append(accuracy(module, setup.data.test))
            sizes[name] = parameter_count(module)
            told = f"seed {seed}: {name} {found[name][-1]:.1f} %"
            print(f"{told} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    print(f"\n| {given.data}, seeds {' '.join(map(str, given.seeds))} | parameters | accuracy, % |")
    print("|---|---|---|")
    for name, values in found.items():
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        print(f"| {name} | {sizes[name]:,} | {statistics.mean(values):.1f}{spread} |")


if __name__ == "__main__":
    with threads(1):
        main()
