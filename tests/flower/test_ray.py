"""Flower's simulation engine, on Ray: whole runs, minutes long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import read_lines, write_settings

from fedistill import experiment

from .test_private import DELTA, PRIVATE, check_books, ledger_in

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def fedistill(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedistill.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=400, check=False, env=os.environ
    )


def told(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())


def test_a_run_on_ray_stops_goes_on_and_gives_every_figure_of_the_serial_backend(
    tmp_path: Path,
) -> None:
    """Two seeds; the first command does two of four rounds, the second the rest."""
    file = write_settings(tmp_path)
    repeats = ["--set", "evaluation.repeats=2"]
    out = ["--backend", "flower", "--out", "run", *repeats]
    first = fedistill("run", str(file), *out, "--rounds", "2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = fedistill("run", str(file), *out, "--resume", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "report:" in second.stdout
    experiment.run(file, overrides=["evaluation.repeats=2"], out=tmp_path / "serial")
    for seed in ("seed-3", "seed-4"):
        real, alike = tmp_path / "run" / seed, tmp_path / "serial" / seed
        assert told(real)["soft_targets_sha256"] == told(alike)["soft_targets_sha256"]
        assert read_lines(real / "rounds.jsonl") == read_lines(alike / "rounds.jsonl")
    assert told(tmp_path / "run")["seeds"] == [3, 4]
    leftover = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in leftover.stdout


def test_an_error_in_the_settings_is_said_before_ray_is_started(tmp_path: Path) -> None:
    file = write_settings(tmp_path)
    wrong = fedistill(
        "run", str(file), "--backend", "flower", "--set", "proxy.rows=5000", cwd=tmp_path
    )
    assert wrong.returncode == 3
    assert "proxy.rows" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_private_run_on_ray_keeps_every_ledger_under_the_run(tmp_path: Path) -> None:
    """Steps of a client are done by whatever worker is free: its ledger goes on all the same."""
    file = write_settings(tmp_path, rounds=2, more=PRIVATE)
    done = fedistill("run", str(file), "--backend", "flower", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sites = sorted((tmp_path / "run" / "sites").iterdir())
    facts = told(tmp_path / "run")["privacy"]["sites"]
    assert [site.name for site in sites] == sorted(facts)
    for site in sites:
        assert check_books(site) == {"reserve": [1, 2], "release": [1, 2]}
        with ledger_in(site) as ledger:
            assert facts[site.name]["epsilon"] == pytest.approx(ledger.spent(DELTA))
