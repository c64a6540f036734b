"""ADWIN: river's alarms to the row, and what it promises on calm and shifted streams."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from drift_streams import bell, blocks, flips, golden, streams
from hypothesis import given
from hypothesis import strategies as st

from fedistill.continual.adwin import LONGEST, Adwin
from fedistill.continual.watcher import DriftState
from fedistill.errors import FedistillError
from fedistill.seeding import generator

OPTIONS: list[dict[str, Any]] = [
    {},
    {"delta": 1e-4},
    {"delta": 0.3, "clock": 1},
    {"clock": 7, "max_buckets": 2},
    {"clock": 50, "max_buckets": 3, "min_window_length": 1, "grace_period": 0},
    {"max_buckets": 20, "min_window_length": 30, "grace_period": 500},
]


def naive(stream: np.ndarray, delta: float = 0.002, clock: int = 32) -> list[int]:
    """ADWIN value by value with the default sizes, written from the paper's bound."""
    found: list[int] = []
    window: list[float] = []
    for row, value in enumerate(stream.tolist()):
        window.append(value)
        n = len(window)
        if n % clock:
            continue
        sizes, arrived = [], n
        while arrived:
            up = max(arrived - 4, 0) // 2
            sizes.append(arrived - 2 * up)
            arrived = up
        ends, end = [], 0
        for level in reversed(range(len(sizes))):
            for _ in range(sizes[level]):
                end += 2**level
                ends.append(end)
        assert end == n
        prime = math.log(2 * math.log(n) / delta)
        for cut in ends:
            n0, n1 = cut, n - cut
            if n0 < 5 or n1 < 5:
                continue
            m = 1 / (n0 - 4) + 1 / (n1 - 4)
            bound = math.sqrt(2 * m * float(np.var(window)) * prime) + 2 / 3 * prime * m
            if abs(float(np.mean(window[:cut]) - np.mean(window[cut:]))) > bound:
                found.append(row)
                window = []
                break
    return found


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_alarms_are_those_of_river(option: dict[str, Any], size: int) -> None:
    said = golden("adwin", OPTIONS)
    for name, stream in streams().items():
        if size == 1:
            stream = stream[:700]
        want = [row for row in said[f"{json.dumps(option)} / {name}"] if row < len(stream)]
        assert blocks(Adwin(**option), stream, size) == want, name


def test_the_record_is_what_river_says() -> None:
    drift = pytest.importorskip("river.drift")
    asked = golden("adwin", OPTIONS, drift.ADWIN)
    assert asked == golden("adwin", OPTIONS)
    assert sum(map(len, asked.values())) > 100


@pytest.mark.parametrize("name", ["errors", "recurring", "calm"])
def test_alarms_are_those_of_a_loop_over_the_window(name: str) -> None:
    stream = streams()[name][:3500]
    assert blocks(Adwin(), stream, 10_000) == naive(stream)


def test_window_is_known() -> None:
    detector = Adwin()
    assert math.isnan(detector.mean)
    detector.update([0.0, 1.0, 0.5])
    assert detector.width == 3
    assert detector.mean == 0.5
    detector.update(np.full(61, 0.5))
    assert detector.width == 64
    assert detector.mean == 0.5


def test_calm_streams_do_not_alarm() -> None:
    """Promised: fewer false alarms than delta a check; seen: none in 10 000 rows."""
    for run in range(5):
        rng = generator("calm", run)
        assert Adwin().update(rng.beta(9, 1, 10_000)) is not DriftState.DRIFT
        assert Adwin().update(rng.random(10_000) < 0.1) is not DriftState.DRIFT


@pytest.mark.parametrize(("after", "within"), [(0.85, 400), (0.7, 80)])
def test_a_fall_of_confidence_is_found(after: float, within: int) -> None:
    for run in range(5):
        rng = generator("fall", run)
        stream = np.concatenate(
            [rng.beta(18, 2, 10_000), rng.beta(20 * after, 20 * (1 - after), 1000)]
        )
        found = blocks(Adwin(), stream, 500)
        assert len(found) == 1
        assert 10_000 <= found[0] < 10_000 + within


def test_a_jump_in_a_small_stream_is_found_by_hand() -> None:
    """0 then 1: 64 rows, s2 = 1/4, m = 2/28: bound 0.95 < 1; after 33..63 rows no check is due."""
    detector = Adwin()
    assert detector.update(np.zeros(32)) is DriftState.OK
    assert detector.update(np.ones(31)) is DriftState.OK
    prime = math.log(2 * math.log(64) / 0.002)
    m = 2 / 28
    bound = math.sqrt(2 * m * 0.25 * prime) + 2 / 3 * prime * m
    assert bound < 1
    assert detector.update(1.0) is DriftState.DRIFT
    assert detector.alarms == (63,)
    assert detector.width == 0
    assert detector.update([0.0]) is DriftState.OK
    assert detector.alarms == ()


def test_warning_comes_before_drift_and_changes_no_alarm() -> None:
    stream = streams()["slope"]
    quiet, warned = Adwin(warn=1.0), Adwin(warn=100.0)
    states = []
    for start in range(0, len(stream), 32):
        block = stream[start : start + 32]
        assert quiet.update(block) in (DriftState.OK, DriftState.DRIFT)
        states.append(warned.update(block))
        assert quiet.alarms == warned.alarms
    first = states.index(DriftState.DRIFT)
    assert DriftState.WARN in states[:first]


@given(st.lists(st.integers(0, 700), min_size=1, max_size=8), st.integers(1, 3))
def test_cutting_the_stream_changes_nothing(cuts: list[int], clock: int) -> None:
    stream = flips("cut", 0.1, 0.6, each=400)
    whole, parts = Adwin(clock=10 * clock), Adwin(clock=10 * clock)
    whole.update(stream)
    found: list[int] = []
    for part in np.split(stream, sorted(cuts)):
        parts.update(part)
        found += parts.alarms
    assert tuple(found) == whole.alarms
    left = {key: value for key, value in whole.state_dict().items() if key != "alarms"}
    assert {key: value for key, value in parts.state_dict().items() if key != "alarms"} == left


def test_blocks_longer_than_what_is_taken_at_once() -> None:
    stream = 0.5 + 0.1 * bell("long", 3 * LONGEST + 77)
    stream[2 * LONGEST :] += 0.05
    whole, parts = Adwin(), Adwin()
    whole.update(stream)
    assert blocks(parts, stream, 61) == list(whole.alarms) != []
    assert parts.mean == whole.mean


@pytest.mark.parametrize("at", [0, 1, 31, 32, 1777, 3100])
def test_resume_is_exact(at: int) -> None:
    stream = streams()["errors"]
    first, second = Adwin(), Adwin()
    first.update(stream[:at])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert first.update(stream[at:]) == second.update(stream[at:])
    assert first.alarms == second.alarms
    assert json.dumps(first.state_dict()) == json.dumps(second.state_dict())


def test_reset_forgets_the_window_and_keeps_the_count() -> None:
    detector = Adwin()
    detector.update(np.zeros(100))
    detector.reset()
    assert detector.width == 0
    assert detector.update(np.ones(100)) is DriftState.OK
    assert detector.seen == 200


@pytest.mark.parametrize("bad", [[0.1, float("nan")], [float("inf")], [[0.1]], ["x"], None])
def test_bad_values_change_nothing(bad: Any) -> None:
    detector = Adwin()
    detector.update(np.full(40, 0.2))
    before = detector.state_dict()
    with pytest.raises(FedistillError, match="adwin: expected"):
        detector.update(bad)
    assert detector.state_dict() == before


def test_no_values_change_nothing_but_the_alarms() -> None:
    detector = Adwin()
    detector.update(np.full(40, 0.2))
    before = detector.state_dict()
    assert detector.update([]) is DriftState.OK
    assert detector.state_dict() == before


@pytest.mark.parametrize(
    "option",
    [
        {"delta": 0.0},
        {"delta": 1.0},
        {"clock": 0},
        {"max_buckets": 0},
        {"min_window_length": 0},
        {"grace_period": -1},
        {"warn": 0.5},
        {"on": "entropi"},
        {"on": "predictions"},
    ],
    ids=str,
)
def test_bad_options(option: dict[str, Any]) -> None:
    with pytest.raises(FedistillError):
        Adwin(**option)


def test_the_state_of_another_is_refused() -> None:
    with pytest.raises(FedistillError, match="resume with the detector and the options"):
        Adwin(delta=0.01).load_state_dict(Adwin().state_dict())
