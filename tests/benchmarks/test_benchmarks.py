"""Benchmarks run, and what they compare is the same round; nothing here looks at a clock."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedistill.models import threads

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def load(monkeypatch):
    """Import a script as if it lay on the path; nothing of it stays."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_imported_and_says_what_it_measures(name, load):
    assert load(name).__doc__.count("\n") >= 2


@pytest.mark.parametrize("name", ["bound", "buffer", "fd_round", "local_training"])
def test_help_is_shown(name, load, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        load(name).main()
    assert capsys.readouterr().out.startswith(f"usage: {name}")


@pytest.mark.parametrize(
    ("model", "predicted", "trained"),
    [
        # Multiply-adds M of the forward pass; training is 2 (3 M - those of the first layer).
        ("linear", 2 * 7840, 2 * (3 * 7840 - 7840)),
        ("mlp", 2 * 101_632, 2 * (3 * 101_632 - 100_352)),
        ("cnn", 2 * 290_080, 2 * (3 * 290_080 - 56_448)),
        ("lenet", 2 * 416_520, 2 * (3 * 416_520 - 117_600)),
    ],
)
def test_operations_are_those_of_the_hand_count(model, predicted, trained, load):
    shape, plain, _ = load("task").MODELS[model]
    assert load("bound").flops_of(plain, shape) == (predicted, trained)


def test_the_bound_of_a_phase_is_the_slower_of_products_and_memory(load):
    bound = load("bound")
    machine = bound.Machine(flops=100.0, bytes=10.0, cache=1 << 20)
    assert bound.Phase(flops=300, bytes=10).seconds(machine) == 3.0
    assert bound.Phase(flops=300, bytes=50).seconds(machine) == 5.0


def test_weights_that_leave_the_cache_are_moved_in_every_step(load):
    bound = load("bound")
    weights = 4 * 101_770
    fits = bound.phases("mlp", 100, bound.Machine(1.0, 1.0, cache=64 << 20))
    spills = bound.phases("mlp", 100, bound.Machine(1.0, 1.0, cache=1 << 10))
    rows = 4 * 784 * 200
    assert fits["train"].bytes == rows + 2 * weights
    assert spills["train"].bytes == rows + 4 * weights * 10
    assert fits["distil"].bytes == 2 * weights
    assert spills["distil"].bytes == 4 * 784 * 2000 + 4 * weights * 20


@pytest.fixture
def fd_round(load, monkeypatch):
    """The standard round with few public rows."""
    found = load("fd_round")
    for module in (found, load("task"), load("split")):
        monkeypatch.setattr(module, "PUBLIC", 120)
    return found


@pytest.mark.parametrize("model", ["mlp", "linear", "lenet", "cnn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forking, 3.12
def test_engines_do_the_same_round(model, fd_round):
    given = fd_round.task(model, 3, 40)
    found = {}
    with threads(1):
        for name, engine in fd_round.engines(model, workers=2).items():
            with engine(given) as run:
                run()
                found[name] = run()  # the first has left nothing behind
    wanted = found.pop("naive")
    assert {"serial", "processes"} <= found.keys()
    for mean, weights in found.values():
        torch.testing.assert_close(mean, wanted[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(weights, wanted[1], atol=5e-5, rtol=0)


@pytest.mark.slow
def test_a_round_on_two_processes_is_printed_beside_the_loop():
    asked = ["--clients", "3", "--turns", "1", "--engines", "naive,processes"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "fd_round.py"), *asked],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = {line["engine"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert lines["naive"]["times_naive"] == 1.0
    assert 0 < lines["processes"]["dq"] < 1e-5
    assert lines["processes"]["dw"] < 5e-5
    assert {"times_bound", "rss_mb", "load", "first", "path"} <= lines["processes"].keys()


def test_an_unknown_engine_is_refused(load, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fd_round", "--engines", "naive,nobody"])
    with pytest.raises(SystemExit, match="2"):
        load("fd_round").main()
    assert "nobody" in capsys.readouterr().err


def test_peers_that_are_not_installed_are_named(load, monkeypatch):
    peers = load("peers")
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert "blaze.py" in peers.absent("blazefl")
    assert "flwr[simulation]" in peers.absent("flower")
    assert peers.absent("naive") == ""
