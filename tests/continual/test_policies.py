"""Policies: keys, who stays, thresholds, and the draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.continual import draws, policies
from fedistill.continual.policies import POLICIES, Candidates, find_policy, herd, stay
from fedistill.continual.thresholds import Thresholds
from fedistill.errors import FedistillError
from fedistill.testing import CheckFailed, check_policy


def evict_one_by_one(keys, labels, capacity):
    """The rule as it reads: the smallest key of the largest class, again and again."""
    left = list(range(len(keys)))
    while len(left) > capacity:
        counts = {c: sum(labels[r] == c for r in left) for c in labels}
        largest = max(c for c in counts if counts[c] == max(counts.values()))
        left.remove(min((r for r in left if labels[r] == largest), key=lambda r: keys[r]))
    return left


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 3), max_size=25), st.integers(0, 12), st.integers(0, 9))
def test_class_balanced_is_eviction_from_the_largest_class(labels, capacity, seed):
    keys = np.random.default_rng(seed).random(len(labels))
    found = stay(keys, keys, np.array(labels, dtype=np.int64), capacity, by_class=True)
    assert found.tolist() == evict_one_by_one(keys, labels, capacity)


def test_the_largest_keys_stay_and_lots_decide_between_equal_ones():
    keys, lots = np.array([1.0, 3.0, 1.0, 2.0]), np.array([0.1, 0.2, 0.9, 0.3])
    assert stay(keys, lots, np.zeros(4, np.int64), 3, by_class=False).tolist() == [1, 2, 3]


def test_keys_of_each_policy():
    rows = Candidates(
        np.array([0.5, 0.25]), np.array([7, 8]), np.array([0, 1]), scores=np.array([2.0, 3.0])
    )
    assert policies.reservoir(rows).tolist() == [0.5, 0.25]
    assert policies.class_balanced(rows).tolist() == [0.5, 0.25]
    assert policies.recent(rows).tolist() == [7.0, 8.0]
    assert policies.hardest(rows).tolist() == [2.0, 3.0]
    assert POLICIES["class-balanced"].name == "class-balanced"


def test_herding_by_hand():
    features, mean = np.array([[0.0], [3.0], [2.0], [7.0]]), np.array([3.0])
    # 3 is the mean; then (3 + 2) / 2 is nearest to it; then (5 + 7) / 3 = 4 beats 5 / 3.
    assert herd(features, mean).tolist() == [1, 2, 3, 0]


def test_herding_is_the_papers_argmin_and_beats_chance():
    random = np.random.default_rng(0)
    features = random.normal(size=(40, 3))
    mean = features.mean(axis=0)
    order, chosen = herd(features, mean), []
    for k in range(1, 41):
        left = [r for r in range(40) if r not in chosen]
        gaps = [np.linalg.norm(mean - features[[*chosen, r]].sum(axis=0) / k) for r in left]
        chosen.append(left[int(np.argmin(gaps))])
    assert order[:39].tolist() == chosen[:39]
    by_chance = np.linalg.norm(features[:5].mean(axis=0) - mean)
    assert np.linalg.norm(features[order[:5]].mean(axis=0) - mean) < by_chance / 3


def test_thresholds_rise_and_tell_groups_and_ties_apart():
    bar = Thresholds()
    one = np.ones(1, np.int64)
    assert bar.admit(one, np.zeros(1), np.zeros(1)).all()
    bar.lift(np.array([1, 1, 5]), np.array([0.3, 0.2, 0.9]), np.array([0.5, 0.6, 0.0]))
    bar.lift(one, np.array([0.1]), np.zeros(1))
    assert bar.keys.tolist() == [0.3, 0.9]
    groups, keys = np.array([1, 1, 1, 5, 2]), np.array([0.3, 0.3, 0.31, 0.8, 0.0])
    found = bar.admit(groups, keys, np.array([0.5, 0.51, 0.0, 1.0, 0.0]))
    assert found.tolist() == [False, True, True, False, True]


def test_draws_are_different_rows_and_fair():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    counts, by_class = np.zeros(100), np.zeros(3)
    random = np.random.default_rng(1)
    for _ in range(2000):
        rows = draws.uniform(labels, 10, random)
        assert len(set(rows.tolist())) == 10
        counts[rows] += 1
        rows = draws.balanced(labels, 10, random)
        assert len(set(rows.tolist())) == 10
        by_class += np.bincount(labels[rows], minlength=3)
    assert ((counts - 200) ** 2 / (200 * 0.9)).sum() < 149  # chi-square, 99 degrees, p > .001
    assert by_class[2] == 2000
    assert abs(by_class[0] - by_class[1]) < 0.1 * by_class[0]
    assert draws.balanced(labels[:0], 3, random).tolist() == []
    assert sorted(draws.balanced(labels, 1000, random).tolist()) == list(range(100))


def test_most_interfered_takes_the_largest():
    assert draws.most_interfered(np.array([1.0, 5.0, -1.0, 5.0]), 3).tolist() == [1, 3, 0]


def test_unknown_names_are_told():
    with pytest.raises(FedistillError, match='unknown buffer policy "resevoir"; did you mean'):
        find_policy("resevoir")
    with pytest.raises(FedistillError, match='unknown draw "unifrom"; did you mean "uniform"'):
        draws.find_draw("unifrom")
    rows = Candidates(np.ones(1), np.ones(1, np.int64), np.ones(1, np.int64))
    with pytest.raises(FedistillError, match="hardest: expected scores"):
        policies.hardest(rows)
    with pytest.raises(FedistillError, match="herding: expected features"):
        policies.herding(rows)


@pytest.mark.parametrize("policy", [*POLICIES, lambda rows: -rows.numbers])
def test_policies_keep_the_promises_of_their_seam(policy):
    check_policy(policy)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (lambda rows: rows.uniform[1:], "a finite key for each row"),
        (lambda rows: rows.uniform * np.nan, "a finite key for each row"),
        (lambda rows: np.arange(len(rows)), "fewer rows"),
        (lambda rows: rows.scores.sort() or rows.scores, "arguments left as they are"),
    ],
)
def test_a_bad_policy_is_found(keys, text):
    with pytest.raises(CheckFailed, match=text):
        check_policy(keys)
