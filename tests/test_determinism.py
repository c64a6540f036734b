"""Same seed, same bytes; and nothing in this package touches what is global."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from builders import federation, held_out, participants, timeless

import fedistill
from fedistill import experiment
from fedistill.presets import METHODS
from fedistill.seeding import derive, generator

SOURCE = Path(fedistill.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("name", METHODS)
def test_one_seed_gives_one_run_and_another_seed_another(name: str, tmp_path: Path) -> None:
    def run(seed: int, folder: str) -> tuple[Any, str]:
        alike = name in {"fedavg", "centralised", "fedproto"}
        people = [participants(1)[0]] * 3 if alike else participants(3)
        people = [
            builders.Client(f"site-{k}", p.build, builders.gaussian(20, k), None, p.training)
            for k, p in enumerate(people)
        ]
        student = people[0].build if alike else builders.partial(builders.models.Linear, 4, 3)
        fed = federation(people, method=name, seed=seed, student=student, per_round=15)
        list(fed.run(3, held_out(), out=tmp_path / folder))
        return builders.read_lines(tmp_path / folder / "rounds.jsonl"), fed.server.digest()

    first, second, other = run(1, "a"), run(1, "b"), run(2, "c")
    assert first == second
    assert first[0] != other[0]
    if METHODS[name].exchange == "predictions":
        assert first[1] != other[1]


def test_two_runs_of_one_settings_file_write_equal_rows_and_targets(tmp_path: Path) -> None:
    settings = builders.write_settings(tmp_path, rounds=2)
    runs = [experiment.run(settings, out=tmp_path / name) for name in "ab"]
    other = experiment.run(settings, overrides=["seed=4"], out=tmp_path / "c")
    lines = [builders.read_lines(tmp_path / name / "rounds.jsonl") for name in "abc"]
    assert lines[0] == lines[1] != lines[2]
    assert runs[0]["soft_targets_sha256"] == runs[1]["soft_targets_sha256"]
    assert runs[0]["soft_targets_sha256"] != other["soft_targets_sha256"]
    texts = [(tmp_path / name / "config.toml").read_bytes() for name in "ab"]
    assert texts[0] == texts[1]


def test_the_order_of_the_clients_changes_no_target() -> None:
    forward, backward = federation(participants(4)), federation(participants(4)[::-1])
    list(forward.run(3))
    list(backward.run(3))
    assert forward.server.digest() == backward.server.digest()


def test_states_of_equal_runs_are_equal_but_for_the_name_of_the_run(tmp_path: Path) -> None:
    from fedistill import store

    for name in "ab":
        list(federation().run(2, out=tmp_path / name))
    for place in sorted((tmp_path / "a").rglob("state")):
        one, other = (
            store.load_state(p) for p in (place, tmp_path / "b" / place.relative_to(tmp_path / "a"))
        )
        assert set(one[0]) == set(other[0])
        for key in set(one[0]) - {"upload"}:
            np.testing.assert_array_equal(one[0][key], other[0][key])
        assert one[1]["run"] != other[1]["run"]


@pytest.mark.parametrize("name", ["ds-fl", "fedistill"])
def test_a_run_leaves_every_global_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    list(federation(method=name).run(2, held_out()))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    after = np.random.get_state()
    assert after[0] == before[1][0]
    np.testing.assert_array_equal(after[1], before[1][1])
    assert after[2:] == before[1][2:]
    assert random.getstate() == before[2]


def test_what_is_global_does_not_change_a_run() -> None:
    rows = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        rows.append(timeless(federation().run(2, held_out())))
    assert rows[0] == rows[1]


def test_seeds_are_the_same_in_every_process_and_of_63_bits() -> None:
    text = "from fedistill.seeding import derive; print(derive(7, 'site-3', 2, 'order'))"
    found = {
        subprocess.run(
            [sys.executable, "-c", text],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": str(seed), "PATH": ""},
        ).stdout.strip()
        for seed in (0, 1)
    }
    assert found == {str(derive(7, "site-3", 2, "order"))}
    seeds = {derive(7, name, number) for name in ("a", "b") for number in range(2000)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert derive(1) != derive("1")
    assert generator(1, "a").random() == generator(1, "a").random() != generator(1, "b").random()


# --- what the source must not hold ---------------------------------------------------------------

BANNED = {
    "pickle": "code on the wire or on disk",
    "cloudpickle": "as pickle",
    "dill": "as pickle",
    "shelve": "as pickle",
    "marshal": "as pickle",
    "joblib": "as pickle",
}


DATED = {"log.py", "status", "keys.py", "clock.py", "receipts.py", "audit_log.py", "ledger.py"}
"""Files and folders whose task is the date: of an event or an entry, of a certificate or a receipt,
of a site's clock. Nothing is decided by it."""


@pytest.mark.parametrize("place", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_pickle_no_wall_clock_no_global_seed(place: Path) -> None:
    text = place.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
        else:
            continue
        assert not names & set(BANNED)
    for pattern in (
        r"torch\.load\((?!.*weights_only=True)",
        r"torch\.save\(",
        r"allow_pickle=True",
        r"\btime\.time(_ns)?\(",
        r"datetime\.(now|utcnow|today)",
        r"np\.random\.seed",
        r"\brandom\.seed\(",
        r"np\.random\.(rand|randn|randint|permutation|choice|shuffle)\(",
        r"\beval\(|\bexec\(",
    ):
        if "time" in pattern and DATED & set(place.relative_to(SOURCE).parts):
            continue
        found = [
            line for line in text.splitlines() if re.search(pattern, line) and ".eval(" not in line
        ]
        assert found == [], pattern
    if "manual_seed" in text:
        assert "fork_rng" in text


def test_the_floor_imports_no_torch() -> None:
    """Refusing a message, reading settings and the state on disk need no torch."""
    text = (
        "import sys, fedistill, fedistill.cli, fedistill.config, fedistill.types, fedistill.errors,"
        " fedistill.seeding; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
