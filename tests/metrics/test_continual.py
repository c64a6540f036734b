"""The metrics of a stream, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill import metrics
from fedistill.errors import DataError

NAN = math.nan
TABLE = np.array(
    [
        [0.90, 0.20, 0.10],
        [0.70, 0.80, 0.30],
        [0.60, 0.50, 0.95],
    ]
)
"""R[i, j]: after experience i, on experience j."""

OF_A_TABLE = {
    # (0.60 + 0.50 + 0.95) / 3
    "average_accuracy": 2.05 / 3,
    # (0.90 + (0.70 + 0.80) / 2 + 2.05 / 3) / 3
    "anytime_accuracy": (0.90 + 0.75 + 2.05 / 3) / 3,
    # ((0.90 - 0.60) + (0.80 - 0.50)) / 2
    "forgetting": 0.30,
    # ((0.60 - 0.90) + (0.50 - 0.80)) / 2
    "backward_transfer": -0.30,
    "latest": 0.95,
    "retained": 2.05 / 3,
}


@pytest.mark.parametrize("name", OF_A_TABLE)
def test_by_hand_and_twice_the_same_without_changing_the_table(name):
    table = TABLE.copy()
    function = getattr(metrics, name)
    assert function(table) == pytest.approx(OF_A_TABLE[name])
    assert function(table) == function(table)
    np.testing.assert_array_equal(table, TABLE)


def test_forward_transfer_by_hand():
    # ((0.20 - 0.15) + (0.30 - 0.10)) / 2
    assert metrics.forward_transfer(TABLE, [0.5, 0.15, 0.10]) == pytest.approx(0.125)
    assert metrics.forward_transfer(TABLE[:2], [0.5, 0.15, 0.10]) == pytest.approx(0.125)
    assert math.isnan(metrics.forward_transfer([[0.9]], [0.5]))
    with pytest.raises(DataError, match="a baseline for each of 3"):
        metrics.forward_transfer(TABLE, [0.1])


def test_forgetting_may_be_negative():
    # The last row is no part of the maximum: 0.6 - 0.7.
    assert metrics.forgetting([[0.6, 0.1], [0.7, 0.9]]) == pytest.approx(-0.1)


def test_forgetting_looks_at_the_best_and_backward_transfer_at_the_first():
    table = [[0.5, 0, 0], [0.9, 0.8, 0], [0.6, 0.8, 0.7]]
    # ((0.9 - 0.6) + (0.8 - 0.8)) / 2 and ((0.6 - 0.5) + 0) / 2
    assert metrics.forgetting(table) == pytest.approx(0.15)
    assert metrics.backward_transfer(table) == pytest.approx(0.05)


def test_what_came_before_an_experience_was_learned_is_not_forgotten():
    # On experience 1 it was 0.99 before it was learned and 0.5 after: only 0.5 counts.
    table = [[0.5, 0.99, 0], [0.5, 0.5, 0], [0.5, 0.5, 0.5]]
    assert metrics.forgetting(table) == 0.0


def test_an_unfinished_stream_counts_what_was_learned():
    assert metrics.average_accuracy(TABLE[:2]) == pytest.approx(0.75)
    assert metrics.latest(TABLE[:2]) == 0.80
    assert metrics.anytime_accuracy(TABLE[:1]) == 0.90


def test_what_was_not_measured_is_left_out_and_nothing_is_nan():
    table = np.tril(np.ones((3, 3)) * 0.5)
    table[np.triu_indices(3, 1)] = NAN
    table[:, 1] = NAN
    table[2, 0] = 0.2
    assert metrics.average_accuracy(table) == pytest.approx(0.35)
    assert metrics.forgetting(table) == pytest.approx(0.3)
    assert metrics.backward_transfer(table) == pytest.approx(-0.3)
    assert math.isnan(metrics.forgetting([[0.9]]))
    assert math.isnan(metrics.average_accuracy([[NAN]]))


@pytest.mark.parametrize("table", [[], [0.5], [[0.1], [0.2]], [[math.inf]]])
def test_what_is_no_table_is_refused(table):
    with pytest.raises(DataError, match="a table of accuracies"):
        metrics.average_accuracy(table)


CURVES = [
    [0.9, 0.1],  # 0: the end of the first experience
    [0.4, 0.3],  # 1: right after the switch
    [0.7, 0.6],
    [0.8, 0.8],  # 3: the end of the second
    [0.1, 0.1],  # 4: not looked at
]


def test_the_drop_after_a_switch_by_hand():
    assert metrics.min_accuracy(CURVES, [0, 3]) == 0.4
    # 0.8 / 2 + (1 - 1/2) 0.4
    assert metrics.worst_case_accuracy(CURVES, [0, 3]) == pytest.approx(0.6)
    assert metrics.worst_case_accuracy(CURVES, [0]) == 0.9
    assert math.isnan(metrics.min_accuracy(CURVES, [0]))


def test_min_accuracy_takes_the_mean_over_the_past():
    curves = [[0.9, 0, 0], [0.5, 0.8, 0], [0.6, 0.3, 0.7]]
    # Experience 0: min(0.5, 0.6); experience 1: 0.3.
    assert metrics.min_accuracy(curves, [0, 1, 2]) == pytest.approx(0.4)
    # 0.7 / 3 + (2/3) 0.4
    assert metrics.worst_case_accuracy(curves, [0, 1, 2]) == pytest.approx(0.5)


@pytest.mark.parametrize("learned", [[], [3, 0], [0, 9], [-1], [0, 1, 2]])
def test_moments_that_do_not_fit_the_curve_are_refused(learned):
    with pytest.raises(DataError, match="curves of accuracy"):
        metrics.min_accuracy(CURVES, learned)


def test_the_harmonic_mean_by_hand():
    # 2 * 0.6 * 0.3 / 0.9
    assert metrics.h_mean(0.6, 0.3) == pytest.approx(0.4)
    assert metrics.h_mean(0.0, 0.0) == 0.0


def test_faded_by_hand_has_no_bias_at_the_start():
    # S: 1, 0.5, 1.25; N: 1, 1.5, 1.75
    np.testing.assert_allclose(metrics.faded([1.0, 0.0, 1.0], 0.5), [1.0, 1 / 3, 5 / 7])
    np.testing.assert_allclose(metrics.faded(np.full(50, 0.3)), 0.3)
    np.testing.assert_allclose(metrics.faded([1, 0, 0, 1], 1.0), [1, 1 / 2, 1 / 3, 1 / 2])
    assert metrics.faded([]).shape == (0,)


def test_faded_refuses_what_has_no_value():
    with pytest.raises(DataError, match="decay above 0"):
        metrics.faded([1.0], 0.0)
    with pytest.raises(DataError, match="1 not finite"):
        metrics.faded([1.0, NAN])


def test_prequential_is_the_mean_of_the_window():
    score = metrics.Prequential(window=3, every=2)
    assert math.isnan(score.value)
    assert score.update([1, 0]) == 0.5
    assert score.update(np.array([True])) == pytest.approx(2 / 3)
    assert score.update([1, 1, 1]) == 1.0
    # After 2, 4 and 6 rows: 1 0, then 0 1 1, then 1 1 1.
    np.testing.assert_allclose(score.curve, [0.5, 2 / 3, 1.0])
    assert score.update([]) == 1.0
    assert score.seen == 6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), max_size=60), st.data())
def test_prequential_does_not_see_how_the_stream_was_cut(values, data):
    at = data.draw(st.lists(st.integers(0, len(values)), max_size=5).map(sorted))
    whole, cut = metrics.Prequential(7, 3), metrics.Prequential(7, 3)
    whole.update(values)
    for block in np.split(np.array(values, float), at):
        cut.update(block)
    assert whole.state_dict() == cut.state_dict()


def test_prequential_resumes_exactly_from_json():
    values = np.random.default_rng(1).random(500)
    straight, stopped, resumed = (metrics.Prequential(50) for _ in range(3))
    straight.update(values)
    stopped.update(values[:333])
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    resumed.update(values[333:])
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.value == straight.value
    with pytest.raises(DataError, match="expected the state of window 9 and every 1"):
        metrics.Prequential(9).load_state_dict(stopped.state_dict())


def test_prequential_refuses_a_row_without_an_answer_and_keeps_its_state():
    score = metrics.Prequential(5)
    score.update([1, 0])
    with pytest.raises(DataError, match="leave out rows without a label"):
        score.update([1, NAN])
    assert (score.seen, score.value) == (2, 0.5)
    with pytest.raises(DataError, match="a window of at least 1"):
        metrics.Prequential(0)
