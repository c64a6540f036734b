"""Page-Hinkley: river's alarms to the row, and what it promises on calm and shifted streams."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from drift_streams import blocks, golden, streams
from hypothesis import given
from hypothesis import strategies as st

from fedistill.continual.page_hinkley import PageHinkley
from fedistill.continual.watcher import DriftState
from fedistill.errors import FedistillError
from fedistill.seeding import generator

OPTIONS: list[dict[str, Any]] = [
    {},
    {"threshold": 5, "mode": "up"},
    {"threshold": 5, "mode": "down"},
    {"threshold": 1, "alpha": 0.9, "delta": 0, "min_instances": 1},
    {"threshold": 2, "alpha": 1.0, "delta": 0.1},
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_alarms_are_those_of_river(option: dict[str, Any], size: int) -> None:
    said = golden("page-hinkley", OPTIONS)
    for name, stream in streams().items():
        if size == 1:
            stream = stream[:700]
        want = [row for row in said[f"{json.dumps(option)} / {name}"] if row < len(stream)]
        assert blocks(PageHinkley(**option), stream, size) == want, name


def test_the_record_is_what_river_says() -> None:
    drift = pytest.importorskip("river.drift")
    asked = golden("page-hinkley", OPTIONS, drift.PageHinkley)
    assert asked == golden("page-hinkley", OPTIONS)
    assert sum(map(len, asked.values())) > 100


def test_by_hand() -> None:
    """0, 0, 3 with alpha 1, delta 0: the third is 2 above its mean of 1."""
    detector = PageHinkley(min_instances=1, delta=0, threshold=1.9, alpha=1.0)
    assert detector.update([0.0, 0.0]) is DriftState.OK
    assert detector.update(3.0) is DriftState.DRIFT
    assert detector.alarms == (2,)
    higher = PageHinkley(min_instances=1, delta=0, threshold=2.1, alpha=1.0)
    assert higher.update([0.0, 0.0, 3.0]) is DriftState.WARN
    later = PageHinkley(min_instances=4, delta=0, threshold=1.9, alpha=1.0)
    assert later.update([0.0, 0.0, 3.0]) is DriftState.OK


def test_direction() -> None:
    rise = np.concatenate([np.zeros(500), np.ones(500)])
    for mode, up, down in (("up", True, False), ("down", False, True), ("both", True, True)):
        options: dict[str, Any] = {"mode": mode, "threshold": 20.0}
        assert bool(blocks(PageHinkley(**options), rise, 100)) is up
        assert bool(blocks(PageHinkley(**options), 1.0 - rise, 100)) is down


def test_calm_streams_do_not_alarm() -> None:
    for run in range(5):
        rng = generator("calm", run)
        assert PageHinkley().update(rng.beta(9, 1, 10_000)) is not DriftState.DRIFT


def test_a_fall_of_confidence_is_found() -> None:
    """Slower than ADWIN: 230 to 250 rows where that needs 47."""
    for run in range(3):
        rng = generator("fall", run)
        stream = np.concatenate([rng.beta(18, 2, 10_000), rng.beta(14, 6, 400)])
        found = blocks(PageHinkley(), stream, 500)
        assert len(found) == 1
        assert 10_000 <= found[0] < 10_300


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=8))
def test_cutting_the_stream_changes_nothing(cuts: list[int]) -> None:
    stream = streams()["recurring"]
    whole, parts = PageHinkley(threshold=5), PageHinkley(threshold=5)
    whole.update(stream)
    found: list[int] = []
    for part in np.split(stream, sorted(cuts)):
        parts.update(part)
        found += parts.alarms
    assert tuple(found) == whole.alarms != ()


@pytest.mark.parametrize("at", [0, 1, 1777, 3100])
def test_resume_is_exact(at: int) -> None:
    stream = streams()["errors"]
    first, second = PageHinkley(on="error"), PageHinkley(on="error")
    first.update(stream[:at])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.update(stream[at:]) == second.update(stream[at:])
    assert first.alarms == second.alarms
    assert json.dumps(first.state_dict()) == json.dumps(second.state_dict())


def test_bad_values_change_nothing() -> None:
    detector = PageHinkley()
    detector.update([0.1, 0.2])
    before = detector.state_dict()
    with pytest.raises(FedistillError, match="row 1 is nan"):
        detector.update([0.1, float("nan")])
    assert detector.state_dict() == before
    assert detector.update(np.empty(0)) is DriftState.OK


@pytest.mark.parametrize(
    "option",
    [
        {"min_instances": 0},
        {"delta": -0.1},
        {"threshold": 0},
        {"threshold": float("inf")},
        {"alpha": 0},
        {"alpha": 1.1},
        {"mode": "sideways"},
        {"warn": 0},
    ],
    ids=str,
)
def test_bad_options(option: dict[str, Any]) -> None:
    with pytest.raises(FedistillError, match="page-hinkley: expected"):
        PageHinkley(**option)
