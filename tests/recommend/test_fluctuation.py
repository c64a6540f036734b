"""The simulation of how steady a student stays, on a small stream of its own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from fedistill.data.interactions import Block, Interactions, no_interactions
from fedistill.recommend import STRATEGIES, Training

SIMULATIONS = Path(__file__).resolve().parents[2] / "simulations"


def blocks():
    random = np.random.default_rng(0)
    found = []
    for number in range(3):
        who = np.repeat(np.arange(10 * number, 10 * number + 30), 8)
        what = 3 * random.integers(0, 20, len(who)) + who % 3
        found.append(Block(Interactions(who, what, np.arange(len(who))), no_interactions()))
    return found


@pytest.fixture
def fluctuation(monkeypatch):
    monkeypatch.syspath_prepend(str(SIMULATIONS))
    module = importlib.import_module("fluctuation")
    training = Training(update_steps=5, smooth=1.0)
    stream = module.Stream(blocks, module.recommending(training, 8), "NDCG@20", tuple(STRATEGIES))
    monkeypatch.setitem(module.STREAMS, "small", stream)
    return module


def test_it_goes_on_where_it_stopped_and_tells_the_table(fluctuation, tmp_path, capsys):
    words = ["--streams", "small", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert fluctuation.main(words) == 0
    first = capsys.readouterr()
    assert "[2/2] small, seed 1, retrain" in first.err
    assert "| retrain (oracle) |" in first.out
    assert "Noise floor" in first.out
    place = tmp_path / "small-1.json"
    whole = place.read_bytes()
    curves = json.loads(whole)
    assert set(curves) == set(STRATEGIES)
    assert {step["quality"] for step in curves["none"]} != {0.0}
    del curves["lwf"]  # as if interrupted before it
    place.write_text(json.dumps(curves))
    assert fluctuation.main(words) == 0
    again = capsys.readouterr()
    assert "seed 0" not in again.err
    assert "lwf" in again.err
    assert json.loads(place.read_text()) == json.loads(whole)
    assert again.out == first.out
    assert (tmp_path / "fluctuation.md").read_text() == first.out


def test_all_strategies_begin_alike_and_the_oracle_has_no_gap(fluctuation, tmp_path):
    found = fluctuation.run(fluctuation.STREAMS["small"], 0, tmp_path / "x.json", lambda text: None)
    starts = {round(curve[0]["quality"], 12) for curve in found.values()}
    assert len(starts) == 1
    assert found["none"][1]["unseen"] > 0
    assert found["fedistill"][1]["unseen"] == 0


def test_bad_words_are_told(fluctuation, tmp_path):
    with pytest.raises(fluctuation.SettingsError, match='did you mean "movielens"'):
        fluctuation.main(["--streams", "movielen"])
    with pytest.raises(fluctuation.RunError, match="no run in"):
        fluctuation.main(["--only-finished", "--streams", "small", "--out", str(tmp_path)])
