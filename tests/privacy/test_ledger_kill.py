"""kill -9 of a process that trains privately: no release without a debit, nothing under-counted."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedistill.privacy.events import Gaussian, Spending
from fedistill.privacy.ledger import Ledger

COST = Spending.of(Gaussian(50.0))

TRAINER = """
import hashlib, os, sys, time
from pathlib import Path
from fedistill.privacy.events import Gaussian, Spending
from fedistill.privacy.ledger import Ledger

home = Path(sys.argv[1])
ledger = Ledger(home / "ledger.sqlite")
print("ready", flush=True)

def stored(entry):
    return home / "releases" / entry.entry_id.replace("/", "-")

for entry in ledger.unreleased():  # killed between the file and the note of it
    if stored(entry).exists():
        ledger.release(entry, hashlib.sha256(stored(entry).read_bytes()).hexdigest())
for round in range(1, int(sys.argv[2]) + 1):
    if ledger.released("run", round):
        continue
    entry = ledger.reserve(
        run="run", round=round, mechanism="dpsgd", spending=Spending.of(Gaussian(50.0)),
        unit="record", relation="add-remove", units=[b"a", b"%d" % (round % 3)], epsilon=1e9,
        delta=1e-5,
    )
    ledger.started(entry)
    with open(home / "touched", "a") as file:  # private rows are touched from here on
        file.write(entry.entry_id + "\\n")
    time.sleep(0.002)
    upload = os.urandom(1000)
    draft = stored(entry).with_suffix(".tmp")
    with open(draft, "wb") as file:
        file.write(upload)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(stored(entry))
    ledger.release(entry, hashlib.sha256(upload).hexdigest())
"""


def run(home: Path, rounds: int, kill_after: float | None = None) -> None:
    """Train for some rounds, or until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(home), str(rounds)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if kill_after is not None:
            time.sleep(kill_after)
            process.kill()
        process.wait(60)
    assert process.returncode in (0, -9)


def check(home: Path) -> tuple[int, int]:
    """Number of releases and of debits, once all that must hold does."""
    ledger = Ledger(home / "ledger.sqlite")
    ledger.verify()
    entries = ledger.entries()
    debits = {entry.entry_id for entry in entries if entry.kind == "reserve"}
    noted = {e.entry_id: e.release_sha256 for e in entries if e.kind == "release"}
    files = {
        file.name.replace("-", "/"): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (home / "releases").iterdir()
        if not file.suffix
    }
    touched = (home / "touched").read_text().split() if (home / "touched").exists() else []
    assert set(files) <= debits, "a release without a debit"
    assert set(touched) <= debits, "private rows were touched without a debit"
    assert len(set(touched)) == len(touched), "one debit paid for two steps"
    assert noted == {name: files[name] for name in noted}, "what was noted is not what is stored"
    assert ledger.worst([b"a"], 1e-5) == COST * len(debits), "a debit that is not charged"
    ledger.close()
    return len(files), len(debits)


def trial(home: Path, kills: int, seed: int) -> None:
    moments = random.Random(seed)
    (home / "releases").mkdir()
    for _ in range(kills):
        run(home, 10_000, kill_after=moments.uniform(0, 0.3))
        check(home)
    rounds = len({entry.round for entry in Ledger(home / "ledger.sqlite").entries()}) + 3
    run(home, rounds)  # it goes on where it was
    releases, debits = check(home)
    assert releases == rounds
    assert debits - releases <= kills  # each kill costs one debit at the most


def test_killed_at_random_moments_nothing_is_released_without_a_debit(tmp_path: Path) -> None:
    trial(tmp_path, kills=8, seed=0)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_a_hundred_times(tmp_path: Path) -> None:
    trial(tmp_path, kills=100, seed=1)
