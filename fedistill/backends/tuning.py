"""How many clients side by side, how many rows at once, and which library multiplies.

All three change the bits of a result, though not what it is worth: products of other shapes add up
in another order. So the rule is one of facts (the caches and the kind of a processor): equal
machines choose alike. Who asks for it (``backend.tune``) has the choice measured instead, once for
each machine and shape of students. Either way it is written into the run folder before the first
round, and a run that goes on, goes on with it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fedistill import store
from fedistill.backends import kernels
from fedistill.backends.kernels import Stack
from fedistill.backends.precision import (
    LARGEST_ERROR,
    best_mode,
    error_of,
    matmul_precision,
    processor,
)
from fedistill.errors import RunError

FACTS = Path("/sys/devices/system/cpu/cpu0/cache")
CACHED_BYTES = (4 << 20, 16 << 20)
"""Of weights and momentum of a block, at least and at most."""
LARGEST_BLOCK = 25
"""Clients side by side; beyond this the stacks grow and nothing is gained."""
PREDICT_ROWS = 500
"""Rows of one product when predicting."""
GPU_BLOCK, GPU_ROWS = 100, 10_000
"""The same on a GPU, where launches cost and no cache must be fitted; not measured."""
TURNS = 3
"""How often each choice is measured; its fastest turn counts."""
GAIN = 0.95
"""A measured choice takes less than this share of the time of that by facts, or is not taken."""


def block_of(weights: int) -> int:
    """How many clients with this many weights to train side by side.

    Their weights and momentum fill an eighth of the processor's last cache, which others share.
    """
    least, most = CACHED_BYTES
    room = min(max(last_cache() // 8, least), most)
    return min(max(room // (8 * weights), 1), LARGEST_BLOCK)


@functools.cache
def last_cache() -> int:
    """Bytes of the processor's largest cache; 0 where the system does not say."""
    said = [path.read_text().strip() for path in FACTS.glob("index*/size")]
    sizes = [re.fullmatch(r"(\d+)([KM])", size) for size in said]
    return max((int(size[1]) << {"K": 10, "M": 20}[size[2]] for size in sizes if size), default=0)


# --- choices -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the students of a block have in common.

    Attributes:
        sizes: of the inputs, of each hidden layer, of the outputs.
        rows: of a step.
        device: the kind of device that they are on.
    """

    sizes: tuple[int, ...]
    rows: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))}, {self.rows} rows, {self.device}"

    @property
    def weights(self) -> int:
        """Weights and biases of one student."""
        return sum((before + 1) * after for before, after in pairwise(self.sizes))


@dataclass(frozen=True)
class Choice:
    """How students of one shape are worked with.

    Attributes:
        block: clients side by side.
        rows: of one product when predicting.
        mode: of products, as :func:`torch.set_float32_matmul_precision` names it.
    """

    block: int
    rows: int
    mode: str

    @classmethod
    def of(cls, found: Any) -> Choice | None:
        """From what a file holds; None where that is no choice, or products would not be exact."""
        if not isinstance(found, dict) or found.keys() != {"block", "rows", "mode"}:
            return None
        numbers = [found["block"], found["rows"]]
        if not all(type(number) is int and number > 0 for number in numbers):
            return None
        if found["mode"] != "highest" and (
            found["mode"] != "medium" or error_of("medium") >= LARGEST_ERROR
        ):
            return None
        return cls(**found)


def by_facts(shape: Shape) -> Choice:
    """The choice that needs no clock; a GPU is given as much at once as there is."""
    if shape.device != "cpu":
        return Choice(GPU_BLOCK, GPU_ROWS, "highest")
    return Choice(block_of(shape.weights), PREDICT_ROWS, best_mode())


class Choices:
    """What was chosen in a run, kept in a file of its folder.

    Args:
        path: of the file; None keeps it in memory.
        tune: measure what is not chosen yet.
    """

    def __init__(self, path: Path | None = None, tune: bool = False) -> None:
        self.path = path
        self.choose: Callable[[Shape], Choice] = tuned if tune else by_facts
        self._run = ""
        self._made: dict[str, Choice] = {}

    def of(self, run: str, shape: Shape) -> Choice:
        """The choice for students of a shape in a run, the same whenever it is asked.

        Raises:
            RunError: the folder of the run cannot be written.
        """
        if run != self._run:
            self._run, self._made = run, self._read(run)
        if str(shape) not in self._made:
            self._made[str(shape)] = self.choose(shape)
            self._write()
        return self._made[str(shape)]

    def _read(self, run: str) -> dict[str, Choice]:
        """What the file holds of this run; one of another run is none of ours."""
        held = {} if self.path is None else _read(self.path)
        if held.get("run") != run or not isinstance(held.get("choices"), dict):
            return {}
        found = {key: Choice.of(value) for key, value in held["choices"].items()}
        return {key: choice for key, choice in found.items() if choice is not None}

    def _write(self) -> None:
        if self.path is not None:
            choices = {key: dataclasses.asdict(choice) for key, choice in self._made.items()}
            store.save_json(self.path, {"run": self._run, "choices": choices})


def _read(path: Path) -> dict[str, Any]:
    """What a file of ours holds; nothing where there is none, or it is torn."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}


# --- measuring -----------------------------------------------------------------------------------


def tuned(shape: Shape) -> Choice:
    """What was measured to be fastest on this machine; measured now if it never was."""
    if shape.device != "cpu":  # the processor's clock knows nothing of it
        return by_facts(shape)
    path = cached()
    key = f"{_machine()}, {shape}"
    held = _read(path)
    known = Choice.of(held.get(key))
    if known is not None:
        return known
    found = measured(shape)
    # A place that cannot be written costs a second at each start, and nothing else.
    with suppress(OSError, RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        store.save_json(path, held | {key: dataclasses.asdict(found)})
    return found


def cached() -> Path:
    """The file of measured choices: ``FEDISTILL_CACHE``, or a place in the user's cache folder."""
    if own := os.environ.get("FEDISTILL_CACHE"):
        return Path(own) / "tuning.json"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "fedistill" / "tuning.json"


def measured(shape: Shape) -> Choice:
    """The fastest of some choices, in processor time; that of the facts unless one gains enough."""
    best = by_facts(shape)
    modes = [best.mode]
    modes += [mode for mode in ("highest", "medium") if mode != best.mode and _exact(mode)]
    with torch.no_grad():
        best = _fastest(best, [dataclasses.replace(best, mode=m) for m in modes[1:]], shape, _steps)
        blocks = {max(best.block // 4, 1), max(best.block // 2, 1), LARGEST_BLOCK, 5, 10}
        others = [dataclasses.replace(best, block=block) for block in sorted(blocks)]
        best = _fastest(best, others, shape, _steps)
        others = [dataclasses.replace(best, rows=rows) for rows in (250, 1000)]
        return _fastest(best, others, shape, _predictions)


def _exact(mode: str) -> bool:
    return error_of(mode) < LARGEST_ERROR


def _fastest(
    best: Choice, others: list[Choice], shape: Shape, work: Callable[[Choice, Shape], float]
) -> Choice:
    """The first choice, unless another is faster by more than the clock errs."""
    rivals = [best, *(other for other in others if other != best)]
    took = [float("inf")] * len(rivals)
    for _ in range(TURNS):
        for place, choice in enumerate(rivals):
            took[place] = min(took[place], work(choice, shape))
    fastest = min(range(len(rivals)), key=took.__getitem__)
    return rivals[fastest] if took[fastest] < GAIN * took[0] else best


def _steps(choice: Choice, shape: Shape) -> float:
    """Processor seconds of some steps, for each client."""
    stack = Stack.blank(shape.sizes, choice.block, torch.empty(0))
    momentum = stack.zeros()
    rows = torch.ones(choice.block, shape.rows, shape.sizes[0])
    with matmul_precision(choice.mode):
        began = time.process_time()
        for _ in range(2):
            outputs, given = kernels.forward(stack, rows)
            kernels.accumulate(momentum, given, kernels.backward(stack, given, outputs), 0.9)
            kernels.step(stack, momentum, 0.1)
        return (time.process_time() - began) / choice.block


def _predictions(choice: Choice, shape: Shape) -> float:
    """Processor seconds of predictions."""
    stack = Stack.blank(shape.sizes, choice.block, torch.empty(0))
    rows = torch.ones(1000, shape.sizes[0])
    with matmul_precision(choice.mode):
        began = time.process_time()
        for _ in kernels.predict(stack, rows, choice.rows):
            pass
        return time.process_time() - began


def _machine() -> str:
    """What the measured times depend on beside the shape."""
    said = re.search(r"model name\s*:\s*(.+)", processor())
    name = said[1] if said else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"
