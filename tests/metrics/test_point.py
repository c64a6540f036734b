"""What is measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fedistill import metrics
from fedistill.aggregate import chunked

LOGITS = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.5], [0.2, 0.1]])


def test_accuracy_counts_the_top_class():
    assert metrics.accuracy(LOGITS, np.array([0, 1, 1, 0])) == 0.75


def test_accuracy_without_rows_is_unknown_and_not_zero():
    assert math.isnan(metrics.accuracy(LOGITS[:0], np.array([], dtype=int)))


def test_auc_is_that_of_scikit_learn():
    labels = np.array([0, 1, 1, 0])
    expected = roc_auc_score(labels, LOGITS[:, 1] - LOGITS[:, 0])
    assert metrics.auc(LOGITS, labels) == pytest.approx(expected)
    assert metrics.auc(100 * LOGITS, labels) == pytest.approx(expected)


def test_auc_is_unknown_for_one_class_or_three():
    assert metrics.auc(LOGITS, np.array([1, 1, 1, 1])) is None
    assert metrics.auc(np.zeros((2, 3)), np.array([0, 1])) is None


def test_agreement():
    probs = np.array([[0.6, 0.4], [0.1, 0.9]])
    assert metrics.agreement(probs, probs[:, ::-1]) == 0.0
    assert metrics.agreement(probs, np.array([[0.9, 0.1], [0.8, 0.2]])) == 0.5


def test_entropy_in_nats_also_with_zeros():
    assert metrics.entropy(np.full((3, 4), 0.25)) == pytest.approx(math.log(4))
    assert metrics.entropy(np.eye(3)) == pytest.approx(0.0)
    assert metrics.entropy(np.empty((0, 3))) == 0.0


def test_entropy_of_many_rows_is_taken_in_parts_to_the_same_bits(monkeypatch):
    probs = np.random.default_rng(0).dirichlet(np.ones(7), size=50)
    whole = metrics.entropy(probs)
    monkeypatch.setattr(chunked, "PART", 7 * 13)
    assert metrics.entropy(probs) == whole
