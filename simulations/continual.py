"""Rules against forgetting, side by side on the published streams of MNIST, as Markdown.

    python simulations/continual.py --methods er der++ steady --buffers 200 500 --seeds 0 1 2
    python simulations/continual.py --benchmarks rotated-mnist --buffers 500 --seeds 0

Split-MNIST: five experiences of two classes, a head of ten outputs, nobody says which experience a
row is from. Rotated- and Permuted-MNIST: twenty experiences with all 60,000 rows each. One pass, an
MLP 784-100-100-10 from Glorot's initial weights, plain SGD; rates, replayed rows and weights of the
published methods are those that mammoth (aimagelab/mammoth, utils/best_args.py) found for each
benchmark and memory.

Finished runs are kept in the folder --out: the same command after an interruption goes on where it
stopped, and one whose settings have changed is run again. Needs the idx files of MNIST under
$FEDISTILL_DATA. One thread; to use more cores, start the command once more with other --seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from readout import put, read_json, table
from runner import main_of
from torch import nn

import fedistill as fd
from fedistill.config import DataSettings
from fedistill.data.shifts import angles, rotate
from fedistill.data.sources import read
from fedistill.data.stream import experiences
from fedistill.distill.objectives import objective
from fedistill.errors import Problem, SettingsError, did_you_mean
from fedistill.metrics import continual
from fedistill.models import MLP, threads
from fedistill.report.words import MINUS, MISSING
from fedistill.seeding import generator
from fedistill.settings import StreamSettings
from fedistill.store import write_atomic
from fedistill.types import FloatArray, IntArray, Rows

HERE = Path(__file__).parent
MARKER = "continual"
TASKS = 20
"""Experiences of the rotated and the permuted benchmark."""


# --- what is run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """How a method is trained on one benchmark with one memory.

    Attributes:
        lr: learning rate.
        options: of the objective.
        policy: what the memory keeps; empty: there is no memory.
        draw: how it is drawn from.
        batch: new rows in a step; 0: as the benchmark has it.
        average: decay of the averaged weights that predict.
    """

    lr: float
    options: Mapping[str, float] = field(default_factory=dict)
    policy: str = "reservoir"
    draw: str = "uniform"
    batch: int = 0
    average: float = 0.0


def _der(rows: int, alpha: float) -> dict[str, float]:
    return {"rows": rows, "alpha": alpha}


def _plus(rows: int, alpha: float, beta: float) -> dict[str, float]:
    return {"rows": rows, "alpha": alpha, "beta": beta}


def _same(how: How) -> dict[int, How]:
    return {200: how, 500: how, 5120: how}


SPLIT: Mapping[str, Mapping[int, How]] = {
    "fine-tune": _same(How(0.03, policy="")),
    "lwf": _same(How(0.03, {"weight": 1.0}, policy="")),
    "er": {m: How(lr, {"rows": 10}) for m, lr in ((200, 0.01), (500, 0.1), (5120, 0.1))},
    "er-ace": _same(How(0.03, {"rows": 10})),
    "der": {
        200: How(0.03, _der(10, 0.2)),
        500: How(0.03, _der(128, 1.0)),
        5120: How(0.1, _der(128, 0.5)),
    },
    "der++": {
        200: How(0.03, _plus(128, 0.2, 1.0)),
        500: How(0.03, _plus(10, 1.0, 0.5)),
        5120: How(0.1, _plus(64, 0.2, 0.5)),
    },
    "a-gem": _same(How(0.1, {"rows": 128})),
    "gdumb": _same(How(0.05, policy="class-balanced", batch=16)),
    "steady": _same(How(0.03, average=0.99)),
}
"""Split-MNIST. Nothing is published for er-ace, gdumb (in this form) and steady: they have one
setting for all memories."""

_LONG: Mapping[str, Mapping[int, How]] = {
    "fine-tune": _same(How(0.2, policy="")),
    "lwf": _same(How(0.2, {"weight": 1.0}, policy="")),
    "er": _same(How(0.2, {"rows": 128})),
    "er-ace": _same(How(0.2, {"rows": 128})),
    "a-gem": _same(How(0.1, {"rows": 128})),
    "gdumb": _same(How(0.05, policy="class-balanced")),
    "steady": _same(How(0.2, {"rows": 128}, average=0.99)),
}
ROTATED: Mapping[str, Mapping[int, How]] = {
    **_LONG,
    "der": {m: How(0.2, _der(128, a)) for m, a in ((200, 1.0), (500, 0.5), (5120, 0.5))},
    "der++": {
        200: How(0.1, _plus(128, 1.0, 0.5)),
        500: How(0.2, _plus(128, 0.5, 1.0)),
        5120: How(0.2, _plus(128, 0.5, 0.5)),
    },
}
PERMUTED: Mapping[str, Mapping[int, How]] = {
    **_LONG,
    "der": {m: How(0.2, _der(128, a)) for m, a in ((200, 1.0), (500, 1.0), (5120, 0.5))},
    "der++": {
        200: How(0.1, _plus(128, 1.0, 1.0)),
        500: How(0.2, _plus(128, 1.0, 0.5)),
        5120: How(0.2, _plus(128, 0.5, 1.0)),
    },
}


# --- the streams ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """An experience, and the test rows of it and of those before: made when its turn comes."""

    train: Rows
    tests: Sequence[Rows]


@cache
def mnist() -> tuple[Rows, Rows]:
    """Training and test rows, pixels from 0 to 1."""
    found = [read(f"idx:mnist/{part}", DataSettings()) for part in ("train", "t10k")]
    train, test = (Rows(part.inputs / np.float32(255), part.labels) for part in found)
    return train, test


def split(seed: int) -> Iterator[Lesson]:
    """Classes 0 1, then 2 3, and so on; always in this order."""
    parts = experiences("class-incremental", *mnist(), 5, seed=seed, shuffle=False)
    tests: list[Rows] = []
    for part in parts:
        assert part.test is not None
        tests.append(part.test)
        yield Lesson(part.train, tests)


def rotated(seed: int) -> Iterator[Lesson]:
    """All rows, turned by an angle of each experience."""
    how = StreamSettings(experiences=TASKS, shift="rotation", degrees=180.0)
    return _whole([partial(rotate, degrees=angle) for angle in angles(how, seed)])


def permuted(seed: int) -> Iterator[Lesson]:
    """All rows, their pixels in an order of each experience; the first as they are."""
    orders = [generator(seed, "permutation", at).permutation(784) for at in range(1, TASKS)]
    return _whole([partial(_permute, order=order) for order in (np.arange(784), *orders)])


def _whole(changes: Sequence[Callable[[FloatArray], FloatArray]]) -> Iterator[Lesson]:
    """All rows changed one way after another: never all of them in memory."""
    train, test = mnist()
    tests: list[Rows] = []
    for change in changes:
        tests.append(Rows(change(test.inputs), test.labels))
        yield Lesson(Rows(change(train.inputs), train.labels), tests)


def _permute(inputs: FloatArray, order: IntArray) -> FloatArray:
    return np.ascontiguousarray(inputs.reshape(len(inputs), -1)[:, order]).reshape(inputs.shape)


def published() -> nn.Module:
    """The network of the published figures, with Glorot's initial weights, which they had too.

    From torch's own, DER++ ends two points lower on Split-MNIST with 200 rows.
    """
    network = MLP(784, 10, width=100, depth=2)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


@dataclass(frozen=True)
class Benchmark:
    """A stream and how each method is trained on it."""

    stream: Callable[[int], Iterator[Lesson]]
    batch: int
    methods: Mapping[str, Mapping[int, How]]


BENCHMARKS: Mapping[str, Benchmark] = {
    "split-mnist": Benchmark(split, 10, SPLIT),
    "rotated-mnist": Benchmark(rotated, 128, ROTATED),
    "permuted-mnist": Benchmark(permuted, 128, PERMUTED),
}


# --- a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run: ``memory`` is 0 where a method has none."""

    benchmark: str
    method: str
    memory: int
    seed: int

    @property
    def how(self) -> How:
        """How it is trained."""
        by_memory = BENCHMARKS[self.benchmark].methods[self.method]
        return by_memory[self.memory] if self.memory else next(iter(by_memory.values()))

    @property
    def file(self) -> str:
        """Where it is kept."""
        return f"{self.benchmark}-{self.method}-{self.memory}-{self.seed}.json"

    @property
    def words(self) -> str:
        """What it is called in messages."""
        return f"{self.benchmark}, {self.method}, memory {self.memory}, seed {self.seed}"


def student(job: Job) -> fd.IncrementalDistiller:
    """A new student, as the job has it."""
    how, benchmark = job.how, BENCHMARKS[job.benchmark]
    replay = None
    if how.policy:
        replay = fd.ReplayBuffer(job.memory, how.policy, draw=how.draw, seed=job.seed)
    # No clipping: the published rates were found without.
    recipe = fd.Recipe(
        epochs=1, batch_size=how.batch or benchmark.batch, lr=how.lr, clip=0, average=how.average
    )
    return fd.IncrementalDistiller(
        published,
        objective(job.method, **how.options),
        replay=replay,
        training=recipe,
        seed=job.seed,
    )


def conduct(job: Job) -> dict[str, Any]:
    """Learn the stream; the table R and the processor seconds of learning."""
    made, accuracies, seconds = student(job), [], 0.0
    for lesson in BENCHMARKS[job.benchmark].stream(job.seed):
        began = time.process_time()
        made.learn(lesson.train)
        seconds += time.process_time() - began
        accuracies.append(
            [fd.metrics.accuracy(made.predict(test.inputs), test.labels) for test in lesson.tests]
        )
    return {"settings": settings(job), "accuracies": accuracies, "cpu_seconds": round(seconds, 2)}


def settings(job: Job) -> dict[str, Any]:
    """What a run depends on: a finished run counts while this is the same.

    The objective's text tells its defaults, which are not among the options.
    """
    made = objective(job.method, **job.how.options)
    return {**asdict(job), "how": asdict(job.how), "objective": repr(made)}


def planned(given: argparse.Namespace) -> list[Job]:
    """Every run, seeds outermost: half a table is even. One without memory stands once."""
    jobs = [
        Job(name, method, memory if BENCHMARKS[name].methods[method][memory].policy else 0, seed)
        for seed in given.seeds
        for name in given.benchmarks
        for memory in given.buffers
        for method in given.methods
    ]
    return list(dict.fromkeys(jobs))


def finished(job: Job, out: Path) -> dict[str, Any] | None:
    """What a run came to; None while it is missing or was run with other settings."""
    found = read_json(out / job.file)
    same = found.get("settings") == json.loads(json.dumps(settings(job)))
    return found if same else None


# --- the tables ----------------------------------------------------------------------------------

MEASURES: Mapping[str, Callable[[FloatArray], float]] = {
    "accuracy": continual.average_accuracy,
    "anytime": continual.anytime_accuracy,
    "forgetting": continual.forgetting,
    "BWT": continual.backward_transfer,
}


def square(accuracies: Sequence[Sequence[float]]) -> FloatArray:
    """R ``[T, T]``; NaN for experiences that had not come yet."""
    full = np.full((len(accuracies), len(accuracies)), np.nan)
    for number, row in enumerate(accuracies):
        full[number, : len(row)] = row
    return full


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``85.7 ± 0.4``; a dash without any."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return MISSING
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}".replace("-", MINUS)


def line(job: Job, runs: Mapping[int, dict[str, Any]]) -> list[str]:
    """The figures of one method, over its seeds."""
    squares = [square(run["accuracies"]) for run in runs.values()]
    figures = [spread([100 * of(one) for one in squares]) for of in MEASURES.values()]
    seconds = spread([run["cpu_seconds"] for run in runs.values()])
    return [job.method, str(job.memory or MISSING), *figures, seconds, str(len(runs))]


def tables(jobs: Sequence[Job], given: argparse.Namespace) -> str:
    """A table for each benchmark, as Markdown."""
    rows: dict[str, dict[tuple[str, int], tuple[Job, dict[int, dict[str, Any]]]]] = {}
    for job in jobs:
        if (run := finished(job, given.out)) is not None:
            of_method = rows.setdefault(job.benchmark, {}).setdefault(
                (job.method, job.memory), (job, {})
            )
            of_method[1][job.seed] = run
    head = ["method", "memory, rows", *MEASURES, "CPU seconds", "seeds"]
    order = {name: place for place, name in enumerate(given.methods)}
    parts = []
    for name, methods in rows.items():
        lines = sorted(methods.values(), key=lambda one: (one[0].memory, order[one[0].method]))
        parts.append(f"`{name}`:\n\n{table(head, [line(*one) for one in lines])}")
    return "\n\n".join(
        [
            "In %, mean ± sd over seeds. Accuracy: after the last experience, mean over all; "
            "anytime: mean over the way; forgetting: best before minus last; BWT: last minus "
            "first. CPU seconds: of learning.",
            *parts,
        ]
    )


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--benchmarks",
        nargs="+",
        default=["split-mnist"],
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)} (default: split-mnist)",
    )
    what.add_argument(
        "--methods", nargs="+", default=list(SPLIT), metavar="NAME", help="default: all"
    )
    what.add_argument(
        "--buffers",
        nargs="+",
        type=int,
        default=[200, 500],
        choices=[200, 500, 5120],
        metavar="ROWS",
        help="rows that are remembered: 200, 500, 5120 (default: 200 500)",
    )
    what.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / "continual",
        metavar="FOLDER",
        help="finished runs (default: %(default)s)",
    )
    how.add_argument("--only-finished", action="store_true", help="run nothing, show what is there")
    how.add_argument(
        "--readme",
        nargs="?",
        type=Path,
        const=HERE / "README.md",
        metavar="FILE",
        help=f"put the tables between the markers <!-- {MARKER} --> of a page",
    )
    given = parser.parse_args(words)
    for option, names, known in (
        ("--benchmarks", given.benchmarks, BENCHMARKS),
        ("--methods", given.methods, SPLIT),
    ):
        for name in names:
            if name not in known:
                text = f'unknown name "{name}"{did_you_mean(name, known)}'
                raise SettingsError([Problem(option, text)])
    return given


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, then show what is there."""
    given = parse(words)
    jobs = planned(given)
    missing = [job for job in jobs if finished(job, given.out) is None]
    for number, job in enumerate([] if given.only_finished else missing, 1):
        run = conduct(job)
        given.out.mkdir(parents=True, exist_ok=True)
        write_atomic(given.out / job.file, f"{json.dumps(run, indent=1)}\n".encode())
        told = f"{100 * continual.average_accuracy(square(run['accuracies'])):.2f} %"
        place = f"[{number}/{len(missing)}]"
        print(f"{place} {job.words}: {told}, {run['cpu_seconds']} CPU-s", file=sys.stderr)
    shown = tables(jobs, given)
    print(shown)
    if given.readme:
        put(given.readme, MARKER, shown)
    return 0


if __name__ == "__main__":
    with threads(1):
        sys.exit(main_of(main))
