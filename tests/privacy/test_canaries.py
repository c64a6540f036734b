"""Canaries: labels and coins that nothing else tells, and inputs far from one another."""

import numpy as np
import pytest

from fedistill.privacy.canaries import copied, mixed, planted, scattered
from fedistill.types import Rows

PUBLIC = np.arange(60, dtype=np.float32).reshape(20, 3)


def test_half_are_far_from_everything_and_half_copy_a_proxy_row_each():
    made = mixed(30, PUBLIC, 4, seed=3)
    near = made.proxy >= 0
    assert near.sum() == 15
    np.testing.assert_array_equal(made.rows.inputs[near], PUBLIC[made.proxy[near]])
    assert len(set(made.proxy[near])) == 15
    assert np.unique(np.abs(made.rows.inputs[~near])) == pytest.approx([58.41])


def test_with_few_proxy_rows_more_canaries_are_far():
    made = mixed(100, PUBLIC, 4, seed=3)
    assert (made.proxy >= 0).sum() == len(PUBLIC)


def test_far_canaries_are_almost_at_right_angles():
    rows = scattered(200, np.ones((5, 1, 10, 10)), seed=3)
    assert rows.shape == (200, 1, 10, 10)
    flat = rows.reshape(200, -1) / 10
    cosines = (flat @ flat.T)[np.triu_indices(200, 1)]
    assert abs(cosines.mean()) < 0.01
    assert np.abs(cosines).max() < 0.6
    assert np.abs(scattered(3, np.zeros((2, 2)), seed=1)).min() == 1.0


@pytest.mark.parametrize("make", [mixed, copied])
def test_coins_are_fair_and_independent_of_labels(make):
    made = make(10_000, PUBLIC, 5, seed=11)
    # Four standard deviations of a fair coin, and of a label among five.
    assert abs(made.included.mean() - 0.5) < 0.02
    counts = np.bincount(made.rows.labels[made.included], minlength=5)
    assert np.abs(counts / counts.sum() - 0.2).max() < 0.025


@pytest.mark.parametrize("make", [mixed, copied])
def test_one_seed_gives_the_same_canaries_another_seed_others(make):
    first, again, other = (make(100, PUBLIC, 3, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.rows.inputs, again.rows.inputs)
    np.testing.assert_array_equal(first.included, again.included)
    assert (first.included != other.included).any()
    assert (first.rows.labels != other.rows.labels).any()


def test_copies_name_their_proxy_row_and_share_a_label_only_when_all_are_taken():
    made = copied(50, PUBLIC, 3, seed=5)
    np.testing.assert_array_equal(made.rows.inputs, PUBLIC[made.proxy])
    pairs = set(zip(made.proxy.tolist(), made.rows.labels.tolist(), strict=True))
    assert len(pairs) == 50


def test_planted_holds_all_own_rows_and_exactly_those_canaries_that_are_in():
    own = Rows(-np.ones((4, 3)), np.zeros(4, int), ids=np.arange(10, 14))
    made = mixed(30, PUBLIC, 2, seed=5)
    together = planted(own, made, seed=5)
    assert len(together) == 4 + made.included.sum()
    assert (together.inputs == -1).all(axis=1).sum() == 4
    assert len(set(together.ids)) == len(together)
    expected = sorted(map(tuple, made.rows.inputs[made.included].tolist()))
    found = sorted(map(tuple, together.inputs[together.ids > 13].tolist()))
    assert found == expected
    assert together.subject is None


def test_every_canary_is_a_subject_of_its_own():
    own = Rows(np.zeros((3, 3)), np.zeros(3, int), subject=np.array(["a", "a", "b"]))
    made = mixed(30, PUBLIC, 2, seed=5)
    together = planted(own, made, seed=5)
    assert len(set(together.subject)) == 2 + made.included.sum()
