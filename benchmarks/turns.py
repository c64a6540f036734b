"""Engines in turns: each in a process of its own, a round each, over and over.

A process of its own makes memory the engine's alone, and keeps from it what another one does to the
process (settings of the allocator, warm caches). One engine works at a time. Times are those of the
fastest turn: processor time of the engine's process and of all that it started, and the wall clock.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from task import Engine, Outcome, Task

from fedistill.models import threads

CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class Figures:
    """What an engine was found to need.

    Attributes:
        cpu: seconds of processor time, the fewest of all turns.
        path: likewise, of the engine's own process and of the busiest that it started: what the
            clock would show if each had a core.
        wall: seconds on the clock, likewise.
        first: seconds until the first round was done, with all that was started for it.
        memory: megabytes at the peak, without what the process held when it had the task.
        found: mean prediction of the first round, weights that the second returned.
    """

    cpu: float
    path: float
    wall: float
    first: float
    memory: float
    found: Outcome


class Runner:
    """The parent's side of an engine's process.

    Args:
        build: an engine.
        make: the task.
        folder: where outcomes are left.
    """

    def __init__(self, build: Engine, make: Callable[[], Task], folder: Path) -> None:
        self.line, other = CONTEXT.Pipe()
        self.file = folder / f"{id(self)}.pt"
        # pfl takes a process of any other name for a loader's worker.
        self.process = CONTEXT.Process(
            target=work, args=(other, build, make, self.file), name="MainProcess"
        )
        self.process.start()
        other.close()
        self._hear()  # that it has the task
        self.first = self._ask("begin")[0]
        self._hear()
        self.best = [float("inf")] * 3

    def turn(self) -> None:
        """One more round."""
        self.best = [min(pair) for pair in zip(self.best, self._ask("turn"), strict=True)]

    def end(self) -> Figures:
        """End the process; what was found."""
        memory = self._ask("end")[0]
        self.process.join()
        found = torch.load(self.file, weights_only=True)
        return Figures(*self.best, self.first, memory, found)

    def stop(self) -> None:
        """End the process if it has not ended."""
        self.line.close()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()

    def _ask(self, what: str) -> tuple[float, ...]:
        self.line.send(what)
        return self._hear()

    def _hear(self) -> tuple[float, ...]:
        try:
            answer: tuple[float, ...] = self.line.recv()
        except EOFError:
            raise SystemExit("an engine's process has ended: what it printed says why") from None
        return answer


def work(line: Connection, build: Engine, make: Callable[[], Task], file: Path) -> None:
    """A process of one engine: rounds as told."""
    with threads(1), ExitStack() as stack:
        given = make()
        line.send(())
        before = from_here()
        while True:
            try:
                what = line.recv()
            except EOFError:
                return
            if what == "end":
                line.send((highest() - before + peak_of(others()),))
                return
            before_them = theirs()
            before_us, began = time.process_time(), time.perf_counter()
            if what == "begin":
                run = stack.enter_context(build(given))
                mean, _ = run()
                line.send((time.perf_counter() - began,))
                _, weights = run()
                torch.save((mean, weights), file)
                line.send(())
            else:
                run()
                wall, ours = time.perf_counter() - began, time.process_time() - before_us
                each = [now - before_them.get(number, 0.0) for number, now in theirs().items()]
                line.send((ours + sum(each), ours + max(each, default=0.0), wall))


def measure(
    engines: Mapping[str, Engine], make: Callable[[], Task], turns: int, between: Callable[[], None]
) -> dict[str, Figures]:
    """Figures of all engines.

    Args:
        engines: by name; processes are started by name, so they must be found by theirs.
        make: the task.
        turns: how many rounds each has to be fast in, after its first.
        between: called before each turn of all.
    """
    runners: dict[str, Runner] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, build in engines.items():
                runners[name] = Runner(build, make, Path(folder))
            for _ in range(turns):
                between()
                for runner in runners.values():
                    runner.turn()
            return {name: runner.end() for name, runner in runners.items()}
        finally:
            for runner in runners.values():
                runner.stop()


# --- what the system says of processes -----------------------------------------------------------


def others() -> list[int]:
    """Process ids of all that this process started, and what those did."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(place.name)] = int(fields[1])
    found: set[int] = set()
    ours = {multiprocessing.current_process().pid}
    while more := {child for child, parent in parents.items() if parent in ours | found} - found:
        found |= more
    return sorted(found)


def theirs() -> dict[int, float]:
    """Seconds of processor time so far of each process that this one started."""
    return {number: cpu_of(number) for number in others()}


def cpu_of(number: int) -> float:
    """Seconds of another process: of all threads in hundredths, or of its first one exactly."""
    place = Path(f"/proc/{number}")
    try:
        fields = (place / "stat").read_text().rpartition(")")[2].split()
        exact = int((place / "schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return 0.0
    return max((int(fields[11]) + int(fields[12])) / 100, exact)


def from_here() -> float:
    """Megabytes of this process in memory; its peak is counted anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return told("self/status", "VmRSS")


def highest() -> float:
    """Megabytes of this process at its peak."""
    return told("self/status", "VmHWM")


def peak_of(numbers: list[int]) -> float:
    """Megabytes that others had at their peak, without the pages that they share."""
    return sum(
        told(f"{number}/status", "VmHWM")
        - told(f"{number}/smaps_rollup", "Shared_Clean")
        - told(f"{number}/smaps_rollup", "Shared_Dirty")
        for number in numbers
    )


def told(file: str, field: str) -> float:
    """A figure of what the system says of a process, in megabytes; 0 where it does not."""
    try:
        found = re.search(rf"^{field}:\s+(\d+)", (Path("/proc") / file).read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0
