"""Many runs, a process each: what the comparisons in this folder stand on.

A run is a run folder. What is finished is kept, what was interrupted goes on from its last round,
what fails is told in a sentence while the rest goes on. Which runs: ``selection.py``; figures and
tables: ``readout.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from readout import lines_of
from selection import METHOD, Job, standing, told

from fedistill.data import prepare
from fedistill.errors import FedistillError
from fedistill.report.words import duration
from fedistill.runs import Watch

TICK = 0.5
"""Seconds between two looks at what is running."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# --- a run in a process of its own ---------------------------------------------------------------


class _Attached:
    """Ends a run whose table is gone: it would hold its folder, and nobody would know."""

    def add(self, row: Mapping[str, Any]) -> None:
        self._look()

    def advance(self, label: str, done: int, total: int) -> None:
        self._look()

    def _look(self) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit(130)


@contextlib.contextmanager
def attached(title: str, rounds: int) -> Iterator[Watch]:
    """Show nothing; see :class:`_Attached`."""
    yield _Attached()


def run_alone(job: Job, log: Path) -> None:
    """One run, with all that it says in a file; ends the process with the run's exit code."""
    from fedistill import experiment, store

    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        resume = (job.folder / "config.toml").exists()
        experiment.run(
            job.settings, name=job.folder.name, out=job.folder, resume=resume, show=attached
        )
        store.save_json(job.folder / METHOD, told(job.settings))
    except FedistillError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def run_all(jobs: Sequence[Job], workers: int, progress: Progress, logs: Path) -> dict[Job, str]:
    """Run the jobs, some at a time; returns why those that failed did.

    Whatever ends this, no process of it goes on.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = _forkserver()
    waiting, failed = deque(jobs), dict[Job, str]()
    running: dict[Any, Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                one = waiting.popleft()
                _log(logs, one).write_bytes(b"")  # what it said before is of no interest
                process = context.Process(target=run_alone, args=(one, _log(logs, one)))
                running[process] = one
                process.start()
            progress.show([*running.values()])
            connection.wait([process.sentinel for process in running], TICK)
            for process in [p for p in running if not p.is_alive()]:
                one = running.pop(process)
                process.join()
                if process.exitcode:
                    failed[one] = _reason(_log(logs, one), process.exitcode)
                progress.ended(one, failed.get(one, ""))
    finally:
        for process in running:
            if process.pid is not None:
                process.terminate()
                process.join()
        progress.clear()
    return failed


def _forkserver() -> Any:
    """Processes start from one that has imported torch once, and uses a single thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedistill.experiment"])
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _log(logs: Path, job: Job) -> Path:
    return logs / f"{job.folder.name}.log"


def _reason(log: Path, code: int) -> str:
    """Why a process failed: the last line of what it said."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}; SIGKILL often means too little memory"
    return said[-1] if said else f"ended with exit code {code} and said nothing"


# --- progress ------------------------------------------------------------------------------------


class Progress:
    """One line that says what is done, what is running, and about how long the rest takes.

    Args:
        jobs: all runs of the table, but those that cannot be used.
        todo: those that are run now.
        workers: how many run at a time.
        stream: where it is written; on a terminal the line is written over and over.
    """

    def __init__(
        self, jobs: Sequence[Job], todo: Sequence[Job], workers: int, stream: TextIO
    ) -> None:
        self.total = len(jobs)
        self.open = set(todo)
        self.workers = workers
        self.stream = stream
        self.live = stream.isatty()
        self.failed = 0
        self.pace: dict[Job, tuple[float, int]] = {}
        for one in jobs:
            self._time(one)

    def show(self, running: Sequence[Job]) -> None:
        """Write the line anew."""
        rounds = {one: self._time(one) for one in running}
        if not self.live:
            return
        now = ", ".join(f"{' '.join(j.key)} {n}/{j.settings.rounds}" for j, n in rounds.items())
        parts = [self._count(), *self._left(), now]
        width = os.get_terminal_size(self.stream.fileno()).columns or 80
        self.stream.write("\r\x1b[2K" + " | ".join(parts)[: width - 1])
        self.stream.flush()

    def ended(self, job: Job, failure: str) -> None:
        """A run is over, well if ``failure`` is empty: a line that stays."""
        self._time(job)
        self.open.discard(job)
        self.failed += bool(failure)
        self.clear()
        rows = lines_of(job.folder)
        last: Mapping[str, Any] = rows[-1] if rows else {}
        accuracy = last.get("student_accuracy")
        if accuracy is None:
            accuracy = last.get("client_accuracy_mean")
        figure = "no figure" if accuracy is None else f"{100 * accuracy:.1f} %"
        took = duration(sum(row.get("seconds", 0) for row in rows))
        words = f"failed: {failure}" if failure else f"{figure} in {took}"
        rest = "" if self.live else "".join(f" ({text})" for text in self._left())
        print(f"[{self._count()}] {job.words}: {words}{rest}", file=self.stream, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        if self.live:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()

    def _count(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.total - len(self.open) - self.failed}/{self.total} done{failed}"

    def _time(self, job: Job) -> int:
        rows = lines_of(job.folder)
        self.pace[job] = (sum(row.get("seconds", 0) for row in rows), len(rows))
        return len(rows)

    def _left(self) -> list[str]:
        """About how long the rest takes, once a round of anything is known."""
        if not self.open or not sum(rounds for _, rounds in self.pace.values()):
            return []
        everything = _pace([*self.pace.values()])
        kinds = {one.key[0] for one in self.open}
        own = {
            kind: _pace([p for one, p in self.pace.items() if one.key[0] == kind]) or everything
            for kind in kinds
        }
        each = [
            own[one.key[0]] * max(one.settings.rounds - self.pace[one][1], 0) for one in self.open
        ]
        return [f"about {duration(max(sum(each) / self.workers, *each, 1.0))} left"]


def _pace(found: Sequence[tuple[float, int]]) -> float:
    """Seconds of a round; 0 if none is known."""
    rounds = sum(number for _, number in found)
    return sum(seconds for seconds, _ in found) / rounds if rounds else 0.0


# --- all of it -----------------------------------------------------------------------------------


def conduct(jobs: Sequence[Job], given: argparse.Namespace) -> dict[Job, str]:
    """Run what is missing; returns why some runs have no figures.

    Raises:
        DataError: the rows of the first run cannot be had.
        SystemExit: 130, when interrupted, after a word about how to go on.
    """
    stands = {one: standing(one) for one in jobs}
    unusable = {one: text for one, text in stands.items() if text not in {"done", "open"}}
    todo = [one for one in jobs if stands[one] == "open"]
    if given.only_finished or not todo:
        return unusable
    # What is wrong with the data is wrong in all runs: better said once, before any of them.
    first = todo[0].settings
    prepare(first.data, first.proxy, first.clients, first.seed)
    done = len(jobs) - len(todo) - len(unusable)
    workers = min(given.workers, len(todo))
    print(
        f"{len(jobs)} runs in {given.out}: {done} done, {len(todo)} to run, {workers} at a time",
        file=sys.stderr,
    )
    usable = [one for one in jobs if one not in unusable]
    progress = Progress(usable, todo, workers, sys.stderr)
    # Ended by whoever, not only by Ctrl-C, it leaves no process behind; a thread cannot set this.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        failed = run_all(todo, workers, progress, given.out / "logs")
    except KeyboardInterrupt:
        there = sum(standing(one) == "done" for one in jobs)
        print(
            f"\ninterrupted: {there} of {len(jobs)} runs are done, the others keep their rounds. "
            "The same command goes on; with --only-finished it shows what is there.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    return unusable | failed


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def finish(problems: Mapping[Job, str], out: Path) -> int:
    """Say once more what has no figures, and why; returns the exit code."""
    for reason in dict.fromkeys(problems.values()):
        those = [one.words for one, text in problems.items() if text == reason]
        more = f" and {len(those) - 3} more" if len(those) > 3 else ""
        print(f"left out: {'; '.join(those[:3])}{more}: {reason}", file=sys.stderr)
    if problems:
        print(f"what failed runs said: {out / 'logs'}", file=sys.stderr)
    return 3 if problems else 0


def main_of(main: Callable[[], int]) -> int:
    """Call a ``main`` so that a foreseen error is one sentence and an exit code."""
    try:
        return main()
    except FedistillError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).stem}: interrupted before any run was started", file=sys.stderr)
        return 130
