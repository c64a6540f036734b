"""kill -9: at every disk operation (in this process), and at random moments (of a real one)."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from builders import federation, participants, read_lines, timeless

# --- at every disk operation ---------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing in the package may catch it and tidy up."""


class Axe:
    """Falls at the k-th operation that changes the disk; half of a write is on the disk by then."""

    def __init__(self, patch: pytest.MonkeyPatch, k: int) -> None:
        self.calls = 0
        self.k = k
        for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, self.guard(getattr(owner, name)))
        real = Path.open

        def opening(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" in mode:
                self.fall(lambda: path.write_text("half"))
            return real(path, mode, *args, **kwargs)

        patch.setattr(Path, "open", opening)

    def fall(self, leave: Callable[[], Any] = lambda: None) -> None:
        self.calls += 1
        if self.calls == self.k:
            self.k = 0
            leave()
            raise Killed

    def guard(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.fall()
            return real(*args, **kwargs)

        return call


def small() -> Any:
    """Two sites and the server: two rounds are some fifty operations on the disk."""
    return federation(participants(2), student=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str, int]:
    """Rows and targets of an undisturbed run, and how many operations on the disk it takes."""
    fed, out = small(), tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        axe = Axe(patch, 0)
        rows = timeless(fed.run(2, out=out))
    return rows, fed.server.digest(), axe.calls


def test_killed_at_any_operation_on_the_disk_it_resumes_to_the_same_end(
    whole: tuple[list[dict[str, Any]], str, int], tmp_path: Path
) -> None:
    rows, digest, calls = whole
    assert calls > 40
    for k in range(1, calls + 1):
        out = tmp_path / str(k)
        with pytest.MonkeyPatch.context() as patch:
            Axe(patch, k)
            with pytest.raises(Killed):
                list(small().run(2, out=out))
        again = small()
        list(again.run(2, out=out, resume=True))
        assert (k, timeless(again.history)) == (k, rows)
        assert (k, again.server.digest()) == (k, digest)
        assert (k, read_lines(out / "rounds.jsonl")) == (k, rows)
        left = [item.name for item in out.rglob(".*") if item.name != ".lock"]
        assert (k, left) == (k, [])


def test_killed_again_while_it_resumes_it_still_comes_to_the_same_end(
    whole: tuple[list[dict[str, Any]], str, int], tmp_path: Path
) -> None:
    rows, digest, calls = whole
    random = np.random.default_rng(1)
    for turn in range(6):
        out, kills = tmp_path / str(turn), 0
        for _ in range(4):
            with pytest.MonkeyPatch.context() as patch:
                Axe(patch, int(random.integers(1, calls)))
                try:
                    list(small().run(2, out=out, resume=True))
                except Killed:
                    kills += 1
        again = small()
        list(again.run(2, out=out, resume=True))
        assert kills
        assert timeless(again.history) == rows
        assert again.server.digest() == digest


# --- at random moments of a real process ---------------------------------------------------------


class Runner:
    """Starts ``fedistill run`` in processes that find everything imported already.

    They are forked from a server process that has imported and never computed, so that the
    time until the kill is time in the run and not in the imports.
    """

    def __init__(self, folder: Path, rounds: int) -> None:
        self.settings = builders.write_settings(folder, rounds=rounds)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["__main__", "fedistill.cli", "fedistill.experiment", "fedistill.report"]
        )

    def start(self, out: Path) -> Any:
        arguments = ["run", str(self.settings), "--out", str(out), "--resume"]
        process = self.context.Process(target=builders.command_line, args=(arguments,))
        process.start()
        return process

    def finish(self, out: Path) -> float:
        """Run to the end; seconds it took."""
        started = time.monotonic()
        process = self.start(out)
        process.join(120)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        process.close()
        assert code == 0
        return time.monotonic() - started

    def cut(self, out: Path, after: float) -> bool:
        """Start, and kill after some seconds; whether it was still running."""
        process = self.start(out)
        process.join(after)  # a run that has ended is not waited for
        process.kill()
        process.join(60)
        code = process.exitcode
        process.close()
        assert code in {0, -9}
        return bool(code == -9)


def facts(out: Path) -> tuple[list[dict[str, Any]], str, str]:
    summary = json.loads((out / "summary.json").read_text())
    return read_lines(out / "rounds.jsonl"), summary["soft_targets_sha256"], summary["status"]


def kill_and_resume(folder: Path, kills: int, seed: int) -> Iterator[tuple[int, Any, Any]]:
    """Runs that are killed up to three times and then end: kills, facts, expected facts."""
    runner = Runner(folder, rounds=6)
    runner.finish(folder / "warm")  # the first one waits for the imports
    seconds = runner.finish(folder / "whole")
    expected = facts(folder / "whole")
    assert expected[2] == "done"
    random = np.random.default_rng(seed)
    done = 0
    for turn in range(10 * kills):
        out = folder / f"run-{turn}"
        struck = sum(
            runner.cut(out, float(random.uniform(0.02, 0.95)) * seconds)
            for _ in range(int(random.integers(1, 4)))
        )
        runner.finish(out)
        done += struck
        yield struck, facts(out), expected
        if done >= kills:
            return
    raise AssertionError(f"only {done} of {kills} kills struck a running process")


def test_three_kills_at_random_moments_end_in_the_same_bytes(tmp_path: Path) -> None:
    for _, found, expected in kill_and_resume(tmp_path, 3, seed=1):
        assert found == expected


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_in_the_same_bytes(tmp_path: Path) -> None:
    for _, found, expected in kill_and_resume(tmp_path, 20, seed=2):
        assert found == expected
