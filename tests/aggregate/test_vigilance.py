"""Remarks on single clients, and who is asked again."""

from __future__ import annotations

import numpy as np
import pytest
from builders import probabilities
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.aggregate.vigilance import (
    ECHO_ROWS,
    MISSES,
    PROBE_EVERY,
    Vigilance,
    Watch,
    flag_predictions,
    smoothed,
)
from fedistill.wire.codec import CODECS, encode


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


# --- echoes --------------------------------------------------------------------------------------


def echoing(rows=30, share=1.0, seed=50):
    """Published targets, and an upload that repeats a share of their rows."""
    published = probabilities(rows, seed)
    said = probabilities(rows, seed + 1)
    count = round(share * rows)
    said[:count] = published[:count]
    return published, said


def others(rows=30):
    return {f"c{k}": probabilities(rows, k) for k in range(2)}


def test_who_repeats_what_was_published_has_no_vote():
    published, said = echoing()
    _, weights, flags = flag_predictions(others() | {"rider": said}, published=published)
    assert weights.tolist() == [1, 1, 0]
    assert flags == {"rider": ["echo"]}


def test_two_echoes_are_identical_besides():
    published, said = echoing()
    _, weights, flags = flag_predictions(
        others() | {"r1": said, "r2": said.copy()}, published=published
    )
    assert weights.tolist() == [1, 1, 0, 0]
    assert flags == {"r1": ["identical", "echo"], "r2": ["identical", "echo"]}


@pytest.mark.parametrize(("share", "flagged"), [(0.9, True), (0.86, False), (0.0, False)])
def test_an_echo_repeats_nine_rows_of_ten(share, flagged):
    published, said = echoing(share=share)
    _, weights, flags = flag_predictions(others() | {"rider": said}, published=published)
    assert ("rider" in flags) == flagged
    assert weights[2] == (0 if flagged else 1)


@pytest.mark.parametrize(("told", "flagged"), [(20, True), (19, False), (0, False)])
def test_rows_without_a_target_do_not_count_and_twenty_with_one_are_needed(told, flagged):
    published, said = echoing()
    published[told:] = np.nan
    said[told:] = probabilities(30 - told, 99)
    _, _, flags = flag_predictions(others() | {"rider": said}, published=published)
    assert ("rider" in flags) == flagged


def test_certain_targets_do_not_count():
    """Whoever is sure of a row says the same of it, to the last code."""
    published = np.tile([0.995, 0.004, 0.001], (30, 1))
    said = published.copy()
    said[0] = [0.2, 0.3, 0.5]
    _, weights, flags = flag_predictions(others() | {"honest": said}, published=published)
    assert weights.tolist() == [1, 1, 1]
    assert flags == {}


def test_a_step_of_the_codec_away_is_no_echo():
    published, said = echoing()
    said[:, 0] += 1e-5
    said[:, 1] -= 1e-5
    _, _, flags = flag_predictions(others() | {"honest": said}, published=published)
    assert flags == {}


def test_with_a_coarse_codec_everybody_may_repeat_a_target():
    published, said = echoing()
    _, weights, flags = flag_predictions(
        others() | {"rider": said}, coarse=True, published=published
    )
    assert weights.tolist() == [1, 1, 1]
    assert flags == {}


def test_when_all_are_echoes_all_are_heard():
    published, _ = echoing()
    said = {"a": published, "b": published + 1e-8}
    _, weights, flags = flag_predictions(said, published=published)
    assert weights.tolist() == [1, 1]
    assert flags == {"a": ["echo"], "b": ["echo"]}


@pytest.mark.parametrize("codec", [name for name, c in CODECS.items() if c.loss < 1])
@pytest.mark.parametrize("classes", [2, 10])
def test_an_honest_client_that_learned_the_targets_is_no_echo(codec, classes):
    """It comes near every target, and only a copy is one, where the codec can tell them apart."""
    targets = probabilities(400, 1, classes)

    def coded(probs):
        return CODECS[codec].decode(encode(codec, probs), 400, classes)

    published = coded(targets).astype(np.float64)
    near = targets * np.exp(np.random.default_rng(2).normal(0, 0.05, targets.shape))
    near /= near.sum(axis=1, keepdims=True)
    said = {"near": coded(near), "copy": coded(published), "far": coded(targets[::-1])}
    _, _, flags = flag_predictions(said, published=published)
    fine = len(np.unique(published, axis=0)) >= ECHO_ROWS
    assert fine or (classes == 2 and codec in {"simplex-3", "simplex-4"})
    assert flags == ({"copy": ["echo"]} if fine else {})


# --- some rows at a time -------------------------------------------------------------------------


def suspicious(rows, seed):
    """Honest clients, a copy, a constant, an echo, one too sure, one that declines all."""
    published = probabilities(rows, 50)
    published[seed % rows] = np.nan
    echo = np.where(np.isnan(published), 1 / 3, published)
    own = min(seed % 5, rows)
    echo[:own] = probabilities(own, seed)
    said = {f"c{k}": probabilities(rows, seed + k) for k in range(3)} | {
        "copy": probabilities(rows, seed),
        "near": np.concatenate([probabilities(rows, seed)[:-1], [[0.2, 0.3, 0.5]]]),
        "dull": np.full((rows, 3), 1 / 3),
        "echo": echo,
        "sure": np.eye(3)[np.random.default_rng(seed).integers(3, size=rows)],
        "mute": np.full((rows, 3), 1 / 3),
    }
    answered = {name: np.ones(rows, dtype=bool) for name in said}
    answered["mute"][:] = False
    answered["c1"][seed % 3 :: 3] = False
    return said, answered, published


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("marked", [False, True])
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 40), seed=st.integers(0, 99), size=st.integers(1, 9))
def test_looking_at_some_rows_at_a_time_finds_the_same(rows, seed, size, coarse, marked):
    said, answered, published = suspicious(rows, seed)
    names, probs = list(said), np.array(list(said.values()))
    marks = np.random.default_rng(seed).integers(2, size=probs.shape[:2]) * 1.0 if marked else None
    told = None if marks is None else dict(zip(names, marks, strict=True))
    smooth, weights, flags = flag_predictions(
        said, told, answered=answered, coarse=coarse, published=published
    )
    watch = Watch(np.array(list(answered.values())), coarse=coarse, published=published)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        watch.look(part, probs[:, part], None if marks is None else marks[:, part])
    found, remarks, certain = watch.verdict(names)
    assert remarks == flags
    np.testing.assert_array_equal(found, weights)
    assert [names[k] for k in np.flatnonzero(certain)] == [
        name for name in names if "overconfident" in flags.get(name, ())
    ]
    np.testing.assert_array_equal(
        [smoothed(own) if sure else own for own, sure in zip(probs, certain, strict=True)], smooth
    )
    if rows > 25 and not coarse:
        assert flags["sure"] == ["overconfident"]
        assert seed % 5 > 1 or flags["echo"] == ["echo"]
        assert marked or flags["c0"] == flags["copy"] == ["identical"]
