"""kill -9 during private training: no release without a debit, and nothing is under-counted."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest

from fedistill.privacy.account import LEDGER, RELEASES
from fedistill.privacy.accounting import epsilon
from fedistill.privacy.events import Spending
from fedistill.privacy.ledger import Ledger

ROUNDS = 6
PRIVATE = """
[privacy]
mechanism = "dpsgd"
epsilon = 6
sample_rate = 0.5
steps = 6
"""


class Runner:
    """Starts private runs in processes that find everything imported already."""

    def __init__(self, folder: Path) -> None:
        settings = builders.write_settings(folder, rounds=ROUNDS, more=PRIVATE)
        self.settings = settings
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [
                "__main__",
                "fedistill.cli",
                "fedistill.experiment",
                "fedistill.report",
                "fedistill.privacy.dpsgd",
                "opacus.validators",
                "opacus.grad_sample",
                "opacus.optimizers",
                "dp_accounting.pld.privacy_loss_distribution",
            ]
        )

    def start(self, out: Path) -> Any:
        arguments = ["run", str(self.settings), "--out", str(out), "--resume"]
        process = self.context.Process(target=builders.command_line, args=(arguments,))
        process.start()
        return process

    def whole(self, out: Path) -> tuple[int, float]:
        """Run to the end: its exit code, and the seconds it took."""
        started = time.monotonic()
        process = self.start(out)
        process.join(240)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        process.close()
        return code, time.monotonic() - started

    def cut(self, out: Path, after: float) -> bool:
        """Start, and kill after some seconds; whether it was still running."""
        process = self.start(out)
        process.join(after)  # a run that has ended is not waited for
        process.kill()
        process.join(60)
        code = process.exitcode
        process.close()
        assert code in {0, 4, -9}
        return bool(code == -9)


def check_site(site: Path) -> int:
    """What must hold of a site's ledger and releases at any moment; how many were released."""
    if not (site / LEDGER).exists():
        assert not (site / RELEASES).exists()
        return 0
    ledger = Ledger(site / LEDGER)
    ledger.verify()
    entries = ledger.entries()
    reserved = Counter((e.run, e.round) for e in entries if e.kind == "reserve")
    released = Counter((e.run, e.round) for e in entries if e.kind == "release")
    assert max(released.values(), default=0) <= 1  # no round is released twice
    assert set(released) <= set(reserved)  # nor without a debit
    for file in (site / RELEASES).glob("*.upload"):
        run, _, number = file.stem.rpartition("-")
        assert (run, int(number)) in reserved, "bytes were written that nobody had paid for"
        digest = ledger.released(run, int(number))
        assert digest in {None, hashlib.sha256(file.read_bytes()).hexdigest()}
    total = Spending()
    for entry in entries:
        if entry.kind == "reserve":
            total += entry.spending
    assert ledger.spent(1e-5) == pytest.approx(epsilon(total, 1e-5), rel=1e-6)
    assert ledger.spent(1e-5) <= 6.0
    ledger.close()
    with sqlite3.connect(site / LEDGER) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return sum(released.values())


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    runner = Runner(folder)
    runner.whole(folder / "warm")  # the first one waits for the imports, which take seconds
    code, seconds = runner.whole(folder / "whole")
    assert code == 0
    random = np.random.default_rng(seed)
    done = turn = 0
    while done < kills:
        out = folder / f"run-{turn}"
        for _ in range(int(random.integers(3, 9))):
            done += runner.cut(out, float(random.uniform(0.05, 0.95)) * seconds)
            for site in sorted((out / "sites").glob("*")):
                check_site(site)
        code, _ = runner.whole(out)
        sites = sorted((out / "sites").glob("*"))
        assert len(sites) == 4
        counts = [check_site(site) for site in sites]
        # A step that was lost stays charged; noise makes up for it, or the client stops in time.
        assert code in {0, 4}
        assert code == 4 or counts == [ROUNDS] * 4 or max(counts) < ROUNDS + 1
        told = json.loads((out / "summary.json").read_text())["privacy"]
        for site in sites:
            assert told["sites"][site.name]["epsilon"] == pytest.approx(
                Ledger(site / LEDGER).spent(1e-5)
            )
        turn += 1


@pytest.mark.timeout(600)
def test_a_few_kills_during_private_training(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 4, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_kills_during_private_training(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 100, seed=2)
