"""Remarks on single clients, and who is asked again."""

from __future__ import annotations

import numpy as np
import pytest
from builders import probabilities

from fedistill.aggregate.vigilance import MISSES, PROBE_EVERY, Vigilance, flag_predictions


def honest(count=2):
    return {f"c{k}": probabilities(6, k) for k in range(count)}


def test_honest_clients_pass_unchanged():
    said = honest(3)
    probs, weights, flags = flag_predictions(said)
    np.testing.assert_array_equal(probs, list(said.values()))
    assert weights.tolist() == [1, 1, 1]
    assert flags == {}


def test_a_copy_shares_one_vote_with_its_original():
    said = honest(2) | {"rider": probabilities(6, 0)}
    _, weights, flags = flag_predictions(said)
    assert weights.tolist() == [0.5, 1.0, 0.5]
    assert flags == {"c0": ["identical"], "rider": ["identical"]}


def test_a_constant_answer_has_no_vote():
    said = honest(2) | {"dull": np.full((6, 3), 1 / 3)}
    _, weights, flags = flag_predictions(said)
    assert weights.tolist() == [1, 1, 0]
    assert flags == {"dull": ["constant"]}


def test_when_all_are_constant_all_are_heard():
    said = {"a": np.tile([0.5, 0.3, 0.2], (4, 1)), "b": np.full((4, 3), 1 / 3)}
    _, weights, flags = flag_predictions(said)
    assert weights.tolist() == [1, 1]
    assert flags == {"a": ["constant"], "b": ["constant"]}


def test_certainty_everywhere_is_smoothed_by_one_percent():
    said = honest(1) | {"sure": np.eye(3)[[0, 1, 2, 0, 1, 2]]}
    probs, weights, flags = flag_predictions(said)
    assert flags == {"sure": ["overconfident"]}
    assert weights.tolist() == [1, 1]
    np.testing.assert_allclose(probs[1].max(axis=1), 0.99 + 0.01 / 3)
    np.testing.assert_allclose(probs[1].sum(axis=1), 1)


def test_the_uploads_themselves_are_not_changed():
    said = {"sure": np.eye(3), "other": probabilities(3, 1)}
    flag_predictions(said)
    np.testing.assert_array_equal(said["sure"], np.eye(3))


def test_one_class_clients_tell_by_their_familiarity():
    """Two sites with one class each predict it everywhere; neither copies nor says nothing."""
    always = np.tile([0.98, 0.01, 0.01], (5, 1))
    familiarity = {"a": np.arange(5.0), "b": -np.arange(5.0)}
    _, weights, flags = flag_predictions({"a": always, "b": always}, familiarity)
    assert weights.tolist() == [1, 1]
    assert flags == {}


def test_one_row_is_no_evidence():
    row = np.array([[0.2, 0.3, 0.5]])
    _, weights, flags = flag_predictions({"a": row, "b": row})
    assert weights.tolist() == [1, 1]
    assert flags == {}


def test_a_silent_client_is_dropped_probed_and_taken_back():
    watch = Vigilance()
    for number in range(1, MISSES + 1):
        assert watch.worth_asking("mute", number)
        watch.note("mute", answered=False)
    assert watch.inactive() == ["mute"]
    asked = [number for number in range(4, 13) if watch.worth_asking("mute", number)]
    assert asked == [number for number in range(4, 13) if number % PROBE_EVERY == 0]
    watch.note("mute", answered=True)
    assert watch.inactive() == []
    assert watch.worth_asking("mute", 13)


def test_misses_must_come_in_a_row():
    watch = Vigilance()
    for answered in (False, False, True, False, False):
        watch.note("flaky", answered=answered)
    assert watch.inactive() == []


def test_state_round_trip():
    watch, other = Vigilance(), Vigilance()
    for _ in range(MISSES):
        watch.note("mute", answered=False)
    other.load_state_dict(watch.state_dict())
    assert other.inactive() == ["mute"]
    other.note("mute", answered=True)
    assert watch.inactive() == ["mute"], "the copy must not share counts with its source"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_unknown_client_is_worth_asking(number):
    assert Vigilance().worth_asking("new", number)
