"""Full-ranking metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedistill.errors import DataError
from fedistill.metrics.ranking import hit_rate_at, ndcg_at, rank_items, recall_at

RANKED = np.array([[4, 2, 7], [0, 1, 2], [5, -1, -1], [-1, -1, -1]])
RELEVANT = [[7, 4, 9, 4], [8], [5], [3]]


def test_by_hand():
    """User 0: hits at 1 and 3 of three relevant; user 1: none; user 2: all; user 3: unseen."""
    recall = recall_at(RANKED, RELEVANT, 3)
    assert recall.values.tolist() == [2 / 3, 0, 1, 0]
    assert recall.mean == pytest.approx(5 / 12)
    assert recall.unseen == 1
    assert hit_rate_at(RANKED, RELEVANT, 3).values.tolist() == [1, 0, 1, 0]
    best = 1 + 1 / math.log2(3) + 1 / 2
    ndcg = ndcg_at(RANKED, RELEVANT, 3)
    np.testing.assert_allclose(ndcg.values, [(1 + 1 / 2) / best, 0, 1, 0])
    assert ndcg.unseen == 1


def test_only_the_first_k_count_and_the_best_has_no_more_than_k_hits():
    assert recall_at(RANKED, RELEVANT, 1).values.tolist() == [1 / 3, 0, 1, 0]
    assert ndcg_at(RANKED, RELEVANT, 1).values.tolist() == [1, 0, 1, 0]


def test_users_without_relevant_items_are_no_part_of_the_mean():
    found = recall_at(RANKED, [[4], [], [], []], 3)
    assert found.mean == 1
    assert np.isnan(found.values[1:]).all()
    assert found.unseen == 0
    assert recall_at(RANKED[:0], [], 3).mean == 0


def test_what_was_trained_on_is_masked_and_the_rest_all_competes():
    scores = [[5.0, 4.0, 3.0, 2.0], [1.0, 1.0, 2.0, 1.0]]
    assert rank_items(scores, 2).tolist() == [[0, 1], [2, 0]]
    assert rank_items(scores, 2, seen=[[0, 2], [2]]).tolist() == [[1, 3], [0, 1]]
    assert rank_items(scores, 3, seen=[[0, 1, 2], []]).tolist() == [[3, -1, -1], [2, 0, 1]]
    assert rank_items(scores, 6)[0].tolist() == [0, 1, 2, 3, -1, -1]


def test_an_unknown_user_is_a_row_of_nan_and_counts_as_zero():
    scores = np.array([[np.nan, np.nan], [1.0, 2.0]])
    ranked = rank_items(scores, 1)
    assert ranked.tolist() == [[-1], [1]]
    found = ndcg_at(ranked, [[0], [1]], 1)
    assert (found.mean, found.unseen) == (0.5, 1)


def test_scores_are_left_as_they_were():
    scores = np.array([[1.0, 2.0]])
    rank_items(scores, 1, seen=[[1]])
    assert scores.tolist() == [[1.0, 2.0]]


def test_a_random_ranking_agrees_with_counting_by_hand():
    random = np.random.default_rng(0)
    scores = random.normal(size=(30, 50))
    relevant = [random.choice(50, size=random.integers(1, 9), replace=False) for _ in range(30)]
    ranked = rank_items(scores, 10)
    for row, wanted, value, gain in zip(
        ranked,
        relevant,
        recall_at(ranked, relevant, 10).values,
        ndcg_at(ranked, relevant, 10).values,
        strict=True,
    ):
        assert value == pytest.approx(len(set(row) & set(wanted)) / len(wanted))
        dcg = sum(1 / math.log2(place + 2) for place, item in enumerate(row) if item in wanted)
        best = sum(1 / math.log2(place + 2) for place in range(min(10, len(wanted))))
        assert gain == pytest.approx(dcg / best)


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(DataError, match="k of 1 at least"):
        recall_at(RANKED, RELEVANT, 0)
    with pytest.raises(DataError, match="expected 4 ranked items or more for each of 4 users"):
        recall_at(RANKED, RELEVANT, 4)
    with pytest.raises(DataError, match="for each of 3 users"):
        ndcg_at(RANKED, RELEVANT[:3], 2)
    with pytest.raises(DataError, match=r"scores \[n, items\] and n lists"):
        rank_items([[1.0]], 1, seen=[])
    with pytest.raises(DataError, match="rows with both"):
        rank_items([[1.0, np.nan]], 1)
