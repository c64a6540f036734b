"""How steady a student stays: its gap to full retraining, block by block, as a Markdown table.

    python simulations/fluctuation.py --streams movielens gowalla --seeds 0 1 2 3 4

At each step a student is tested on a block first and taught it then; the oracle is trained from
scratch on everything before the block and tested on the same. Finished runs are kept in the folder
--out, one JSON file for each stream and seed, with fluctuation.md beside them; the same command
after an interruption goes on where it stopped.

A stream is an entry of ``STREAMS``: a function that yields blocks, and one that makes a student. A
student has ``quality(block)`` and ``learn(block)``, and ``go_on(strategy)`` gives a copy of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from readout import table
from runner import main_of

import fedistill as fd
from fedistill.config import DataSettings
from fedistill.data.interactions import gowalla, movielens
from fedistill.data.sources import read
from fedistill.errors import Problem, RunError, SettingsError, did_you_mean
from fedistill.metrics.point import accuracy
from fedistill.metrics.shift_gap import (
    Bounds,
    bounds,
    fluctuation,
    noise_floor,
    relative_gaps,
    worst_gap,
)
from fedistill.models import threads
from fedistill.recommend import STRATEGIES, Recommender, Training, with_strategy
from fedistill.store import write_atomic
from fedistill.types import Rows

ORACLE = "retrain"

# --- streams -------------------------------------------------------------------------------------


class Student(Protocol):
    """What a stream hands out."""

    def quality(self, block: Any) -> Mapping[str, float]:
        """What it is worth on a block that it has not learned; ``quality`` is what is compared."""
        ...

    def learn(self, block: Any) -> None:
        """Take in a block."""
        ...

    def go_on(self, strategy: str) -> Student:
        """A copy that goes on by another strategy."""
        ...


@dataclass(frozen=True)
class Stream:
    """One thing to be current on.

    Attributes:
        blocks: reads them, oldest first.
        student: from a seed to a student that has learned nothing.
        measure: what quality is.
        strategies: those that there are; the oracle is ``retrain``.
    """

    blocks: Callable[[], Sequence[Any]]
    student: Callable[[int], Student]
    measure: str
    strategies: tuple[str, ...]


@dataclass
class Recommending:
    """A recommender as a student of a stream."""

    student: Recommender

    def quality(self, block: Any) -> Mapping[str, float]:
        """NDCG@20 and Recall@20 over users with history, and what new users had."""
        tested = self.student.test(block.everything())
        return {
            "quality": tested.ndcg,
            "recall": tested.recall,
            "users": len(tested.users),
            "unseen": tested.unseen,
            "new users": tested.new_users,
            "new quality": tested.new_ndcg,
        }

    def learn(self, block: Any) -> None:
        """Take in a block without another test."""
        self.student.learn(block, test=False)

    def go_on(self, strategy: str) -> Student:
        """A copy that goes on by another strategy."""
        return Recommending(with_strategy(self.student, strategy))


def recommending(training: Training, width: int) -> Callable[[int], Student]:
    """A factory of recommenders."""

    def make(seed: int) -> Student:
        return Recommending(Recommender(strategy="none", width=width, training=training, seed=seed))

    return make


REMEMBERED = 450
"""Rows of the electricity student's memory: 2 % of the first half."""
OBJECTIVES = {"none": "fine-tune", "retrain": "fine-tune"}
"""What a step minimises where the strategy is no objective."""


@dataclass
class Classifying:
    """A classifier as a student; every strategy learns the first block itself."""

    seed: int
    strategy: str = "none"
    history: list[Rows] = field(default_factory=list)
    student: fd.IncrementalDistiller | None = None

    def quality(self, block: Any) -> Mapping[str, float]:
        """Accuracy."""
        assert self.student is not None
        return {"quality": accuracy(self.student.predict(block.inputs), block.labels)}

    def learn(self, block: Any) -> None:
        """Take in a block, as the strategy has it."""
        self.history.append(block)
        if self.student is not None and self.strategy == "none":
            return
        if self.student is None or self.strategy == "retrain":
            self.student = self._untaught()
            inputs = np.concatenate([rows.inputs for rows in self.history])
            block = Rows(inputs, np.concatenate([rows.labels for rows in self.history]))
        self.student.learn(block)

    def go_on(self, strategy: str) -> Student:
        """Another one, by another strategy, that has learned the same blocks."""
        other = Classifying(self.seed, strategy)
        for block in self.history:
            other.learn(block)
        return other

    def _untaught(self) -> fd.IncrementalDistiller:
        remembers = self.strategy in {"er", "steady"}
        return fd.IncrementalDistiller(
            partial(fd.models.MLP, 7, 2, width=64),
            OBJECTIVES.get(self.strategy, self.strategy),
            replay=fd.ReplayBuffer(REMEMBERED, seed=self.seed) if remembers else None,
            training=fd.Recipe(epochs=5, batch_size=32, lr=0.05, average=0.99),
            seed=self.seed,
        )


def electricity() -> Sequence[Any]:
    """Elec2: half of it, and then five tenths, in time order; scaled by the first half."""
    table = read(
        "csv:drift_elec/elec2_full.csv.gz", DataSettings(label="class", drop=("date",), path="")
    )
    half, tenth = len(table) // 2, len(table) // 10
    first = table.inputs[:half]
    inputs = (table.inputs - first.mean(axis=0)) / np.maximum(first.std(axis=0), 0.05)
    ends = [0, half, *(half + tenth * (place + 1) for place in range(5))]
    return [
        Rows(inputs[start:end], table.labels[start:end]) for start, end in itertools.pairwise(ends)
    ]


STREAMS: dict[str, Stream] = {
    "movielens": Stream(
        movielens,
        recommending(
            Training(fade=0.25, smooth=20, update_steps=60, update_lr=0.1, penalty=0.15), 24
        ),
        "NDCG@20",
        tuple(STRATEGIES),
    ),
    "movielens-gradient": Stream(
        movielens,
        recommending(
            Training(
                fade=0.25,
                solver="gradient",
                steps=80,
                lr=0.1,
                update_steps=60,
                update_lr=0.2,
                penalty=0.15,
            ),
            32,
        ),
        "NDCG@20",
        tuple(STRATEGIES),
    ),
    "gowalla": Stream(
        gowalla,
        recommending(
            Training(
                fade=0.5,
                update_steps=40,
                update_lr=0.02,
                penalty=0.05,
                batch_size=2048,
                negatives=1024,
            ),
            64,
        ),
        "NDCG@20",
        tuple(STRATEGIES),
    ),
    "electricity": Stream(
        electricity,
        Classifying,
        "accuracy",
        ("none", "fine-tune", "er", "lwf", "steady", "retrain"),
    ),
}

# --- runs ----------------------------------------------------------------------------------------

Curves = dict[str, list[dict[str, float]]]
"""From strategy to what it was worth on each block after the first."""


def run(stream: Stream, seed: int, place: Path, say: Callable[[str], None]) -> Curves:
    """All strategies of one stream and seed; each is written when it is finished."""
    curves: Curves = json.loads(place.read_text()) if place.exists() else {}
    wanted = sorted(stream.strategies, key=lambda name: name != ORACLE)
    if all(name in curves for name in wanted):
        return curves
    blocks = stream.blocks()
    start = stream.student(seed)
    start.learn(blocks[0])
    for name in wanted:
        if name in curves:
            continue
        began = time.monotonic()
        student = start.go_on(name)
        curve: list[dict[str, float]] = []
        for number, block in enumerate(blocks[1:], 1):
            curve.append(dict(student.quality(block)))
            if number < len(blocks) - 1:  # nobody is tested after the last
                student.learn(block)
        curves[name] = curve
        write_atomic(place, json.dumps(curves, indent=1).encode())
        shown = " ".join(f"{step['quality']:.4f}" for step in curve)
        say(f"{name}: {shown} ({time.monotonic() - began:.0f} s)")
    return curves


# --- tables --------------------------------------------------------------------------------------


def tables(name: str, found: Mapping[int, Curves]) -> str:
    """The table of one stream, as Markdown."""
    stream = STREAMS[name]
    seeds = sorted(found)
    sides = {
        one: np.array([[step["quality"] for step in found[seed][one]] for seed in seeds])
        for one in stream.strategies
    }
    oracle = sides[ORACLE]
    rows = []
    for one in stream.strategies:
        curve = sides[one].mean(axis=0)
        values = [told(oracle, sides[one], s) for s in (worst_gap, fluctuation, one_sided)]
        raw = f"{100 * (curve.max() - curve.min()) / curve.max():.1f} %"
        label = f"{one} (oracle)" if one == ORACLE else one
        rows.append([label, f"{curve.mean():.4f}", *values, raw])
    heads = [
        "strategy",
        f"mean {stream.measure}",
        "worst gap",
        "fluctuation",
        "one-sided",
        "naive (max - min) / max",
    ]
    steps = "; ".join(
        f"{one}: " + ", ".join(f"{100 * gap:.1f}" for gap in relative_gaps(oracle, sides[one]))
        for one in stream.strategies
        if one != ORACLE
    )
    return "\n\n".join(
        [
            f"{name}: {len(seeds)} seed{'s' * (len(seeds) > 1)}, {oracle.shape[1]} blocks. In "
            "brackets 95 % bounds over seeds, blocks as they are. Gaps are those of the means over "
            "seeds.",
            table(heads, rows),
            f"Noise floor: {floor_of(oracle)}. Gaps in % block by block: {steps}.",
        ]
    )


def floor_of(oracle: Any) -> str:
    """The fluctuation between oracles of the even and of the odd seeds in the list.

    Half as many seeds on each side: a little more than chance does to the figures above.
    """
    if len(oracle) < 2:
        return "unknown with one seed"
    return f"{100 * noise_floor(oracle[::2], oracle[1::2]):.1f} % (one half of the seeds' oracles)"


def one_sided(gaps: Any) -> float:
    """Fluctuation that does not punish being better than the oracle."""
    return fluctuation(gaps, one_sided=True)


def told(oracle: Any, side: Any, statistic: Callable[[Any], float]) -> str:
    """``1.2 % [0.8, 1.7]``; a single seed has no bounds."""
    if len(oracle) < 2:
        return f"{100 * statistic(relative_gaps(oracle, side)):.1f} %"
    found: Bounds = bounds(oracle, side, statistic, blocks=False)
    return f"{100 * found.value:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


# --- all of it -----------------------------------------------------------------------------------


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--streams", nargs="+", default=list(STREAMS), metavar="NAME", help="default: all"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N", help="%(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / "fluctuation", help="%(default)s"
    )
    parser.add_argument(
        "--only-finished", action="store_true", help="run nothing, show what is there"
    )
    given = parser.parse_args(words)
    for name in given.streams:
        if name not in STREAMS:
            hint = did_you_mean(name, STREAMS)
            raise SettingsError([Problem("--streams", f'unknown stream "{name}"{hint}')])
    return given


def finished(given: argparse.Namespace, name: str) -> dict[int, Curves]:
    """What is there of a stream: the seeds with all strategies."""
    wanted = {*STREAMS[name].strategies}
    found: dict[int, Curves] = {}
    for seed in given.seeds:
        place = place_of(given, name, seed)
        if place.exists() and wanted <= set(curves := json.loads(place.read_text())):
            found[seed] = curves
    return found


def place_of(given: argparse.Namespace, name: str, seed: int) -> Path:
    """The file of one stream and seed."""
    return Path(given.out) / f"{name}-{seed}.json"


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, then show what is there."""
    given = parse(words)
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.only_finished:
        jobs = [(name, seed) for seed in given.seeds for name in given.streams]
        with threads(1):
            for number, (name, seed) in enumerate(jobs, 1):
                head = f"[{number}/{len(jobs)}] {name}, seed {seed}"

                def say(text: str, head: str = head) -> None:
                    print(f"{head}, {text}", file=sys.stderr, flush=True)

                run(STREAMS[name], seed, place_of(given, name, seed), say)
    shown = [tables(name, found) for name in given.streams if (found := finished(given, name))]
    if not shown:
        raise RunError(f"no run in {given.out} is finished: leave --only-finished out to run them")
    text = "\n\n".join(shown)
    write_atomic(given.out / "fluctuation.md", f"{text}\n".encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main_of(main))
