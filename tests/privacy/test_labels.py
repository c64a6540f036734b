"""Hard labels: one class a row, and no claim of privacy."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedistill.privacy.labels import STATEMENT, hard_labels


def test_the_likeliest_class_by_hand():
    found = hard_labels(np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4], [0.1, 0.1, 0.8]]))
    assert found.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert found.dtype == np.float64


def test_no_rows_are_no_labels():
    assert hard_labels(np.empty((0, 3))).shape == (0, 3)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_labels_of_labels_are_the_same(rows, classes, seed):
    probs = np.random.default_rng(seed).dirichlet(np.ones(classes), rows)
    labels = hard_labels(probs)
    assert (labels.sum(axis=1) == 1).all()
    assert (labels.argmax(axis=1) == probs.argmax(axis=1)).all()
    assert (hard_labels(labels) == labels).all()


def test_it_says_that_it_is_not_private():
    assert "NOT differentially private" in STATEMENT
