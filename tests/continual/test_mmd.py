"""MMD: the statistic against two loops, its level, its power, and exact resume."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fedistill.continual.mmd import Mmd, kernel, p_value, unbiased
from fedistill.continual.watcher import DriftState
from fedistill.errors import FedistillError
from fedistill.seeding import generator

QUICK: dict[str, Any] = {"alpha": 0.02, "reference": 60, "window": 40, "permutations": 99}


def predictions(name: str, n: int, *weights: float) -> np.ndarray:
    return generator("mmd", name).dirichlet(weights, n)


def test_kernel_by_hand() -> None:
    """Distances 1, 1, 2: median 1, so exp(-1/2) and exp(-2)."""
    table = kernel(np.array([[0.0], [1.0], [2.0]]))
    near, far = np.exp(-0.5), np.exp(-2.0)
    np.testing.assert_allclose(table, [[0, near, far], [near, 0, near], [far, near, 0]])


def test_kernel_of_equal_rows_is_one() -> None:
    np.testing.assert_array_equal(kernel(np.full((3, 2), 0.3)), 1.0 - np.eye(3))


def test_statistic_equals_the_loops() -> None:
    rows = predictions("loops", 9, 1, 2, 3)
    table = kernel(rows)
    chosen = np.zeros((2, 9))
    chosen[0, [0, 3, 4, 8]] = chosen[1, [1, 2, 5, 6]] = 1
    for way, found in zip(chosen, unbiased(table, chosen), strict=True):
        x, y = np.flatnonzero(way == 0), np.flatnonzero(way)
        within_x = np.mean([table[i, j] for i in x for j in x if i != j])
        within_y = np.mean([table[i, j] for i in y for j in y if i != j])
        across = np.mean([table[i, j] for i in x for j in y])
        np.testing.assert_allclose(found, within_x + within_y - 2 * across, rtol=1e-12)


def test_statistic_is_zero_on_average_over_all_splits() -> None:
    """Unbiased: over all ways to cut 4 rows into 2 and 2 it averages to 0."""
    table = kernel(predictions("all", 4, 1, 1))
    ways = np.array([[i in (a, b) for i in range(4)] for a in range(4) for b in range(a)], float)
    assert abs(unbiased(table, ways).mean()) < 1e-12


@pytest.mark.parametrize("enough", [None, 11])
def test_level(enough: int | None) -> None:
    """400 calm tests at 0.05: 20 expected, at most 20 + 4 standard deviations."""
    alarms = 0
    for run in range(400):
        rows = predictions(f"level {run}", 30, 0.5, 0.5, 0.5)
        alarms += p_value(rows[:18], rows[18:], 199, seed=run, enough=enough) <= 0.05
    assert 4 <= alarms <= 37


def test_stopping_early_decides_alike() -> None:
    for run in range(30):
        rows = predictions(f"early {run}", 40, 1, 1)
        rows[25:, 0] += 0.01 * run
        full = p_value(rows[:25], rows[25:], 199, seed=run)
        early = p_value(rows[:25], rows[25:], 199, seed=run, enough=11)
        assert (full <= 0.05) == (early <= 0.05)
        assert early == full or early > 0.05


def test_p_is_never_zero_and_equal_rows_are_alike() -> None:
    far = p_value(np.zeros((20, 1)) + np.arange(20)[:, None] / 100, np.full((20, 1), 9.0), 99)
    assert far == 1 / 100
    same = np.full((20, 3), 1 / 3)
    assert p_value(same, same, 99) == 1.0


def test_calm_streams_alarm_at_the_promised_rate() -> None:
    """20 streams of 10 tests at 0.02: 4 false alarms expected, 12 are beyond 4 deviations."""
    alarms = 0
    for run in range(20):
        detector = Mmd(**QUICK, seed=run)
        detector.update(predictions(f"calm {run}", 460, 1, 1, 1))
        alarms += len(detector.alarms)
    assert alarms <= 12


def test_swapped_classes_at_equal_confidence_are_found() -> None:
    """No confidence, entropy or margin can see this one."""
    for run in range(5):
        calm = predictions(f"before {run}", 600, 9, 0.5, 0.5)
        shifted = predictions(f"after {run}", 300, 0.5, 9, 0.5)
        detector = Mmd(seed=run)
        assert detector.update(calm) is not DriftState.DRIFT
        assert detector.update(shifted) is DriftState.DRIFT
        assert detector.alarms == (699,)
        assert np.isnan(detector.p)


def test_a_third_of_rows_shifted_is_found() -> None:
    for run in range(3):
        calm = predictions(f"calm part {run}", 900, 3, 1, 1)
        shifted = predictions(f"other part {run}", 400, 3, 1, 1)
        shifted[::3] = shifted[::3][:, [1, 0, 2]]
        detector = Mmd(seed=run)
        detector.update(np.concatenate([calm, shifted]))
        assert detector.alarms
        assert 900 <= detector.alarms[0] < 1300


def test_after_an_alarm_the_new_world_is_the_reference() -> None:
    rows = np.concatenate([predictions("old", 160, 9, 1), predictions("new", 400, 1, 9)])
    detector = Mmd(**QUICK | {"alpha": 0.01})
    detector.update(rows)
    assert detector.alarms == (179,)


def test_cutting_the_stream_changes_nothing() -> None:
    rows = np.concatenate([predictions("a", 333, 3, 1), predictions("b", 333, 1, 3)])
    whole = Mmd(**QUICK)
    whole.update(rows)
    parts, found = Mmd(**QUICK), []
    for part in np.array_split(rows, 37):
        parts.update(part)
        found += parts.alarms
    assert tuple(found) == whole.alarms != ()
    assert parts.state_dict() | {"alarms": 0} == whole.state_dict() | {"alarms": 0}


@pytest.mark.parametrize("at", [0, 10, 60, 137, 400])
def test_resume_is_exact(at: int) -> None:
    rows = np.concatenate([predictions("c", 333, 3, 1), predictions("d", 333, 1, 3)])
    first, second = Mmd(**QUICK, seed=3), Mmd(**QUICK, seed=3)
    first.update(rows[:at])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.update(rows[at:]) == second.update(rows[at:])
    assert first.alarms == second.alarms
    assert json.dumps(first.state_dict()) == json.dumps(second.state_dict())


def test_one_column() -> None:
    rng = generator("mmd", "column")
    detector = Mmd("confidence", **QUICK)
    detector.update(rng.beta(9, 1, 100))
    detector.update(0.3)
    assert detector.update(rng.beta(2, 2, 39)) is DriftState.DRIFT


def test_a_class_more_is_a_column_more() -> None:
    detector = Mmd(**QUICK)
    detector.update(predictions("two", 70, 5, 5))
    assert detector.update(predictions("three", 30, 1, 1, 8)) is DriftState.DRIFT
    assert detector.alarms == (99,)
    again = Mmd(**QUICK)
    again.update(predictions("three", 30, 1, 1, 8))
    before = again.state_dict()
    with pytest.raises(FedistillError, match="at least 3 columns, found 2"):
        again.update(predictions("two", 70, 5, 5))
    assert again.state_dict() == before


def test_bad_values_change_nothing() -> None:
    detector = Mmd(**QUICK)
    detector.update(predictions("held", 20, 1, 1))
    before = detector.state_dict()
    for bad in ([[0.5, np.nan]], np.zeros((2, 2, 2)), "rows"):
        with pytest.raises(FedistillError, match="mmd: expected"):
            detector.update(bad)
    assert detector.update(np.empty((0, 2))) is DriftState.OK
    assert detector.state_dict() == before


@pytest.mark.parametrize(
    "option",
    [
        {"alpha": 0},
        {"reference": 1},
        {"window": 1},
        {"permutations": 998},
        {"alpha": 0.05, "permutations": 18},
        {"warn": 0},
        {"on": "colour"},
    ],
    ids=str,
)
def test_bad_options(option: dict[str, Any]) -> None:
    with pytest.raises(FedistillError):
        Mmd(**option)
    Mmd(alpha=0.05, permutations=19)
