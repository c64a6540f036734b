"""The common start of a rule: shapes, weights, silence, and a top class without an order."""

from __future__ import annotations

import numpy as np
import pytest

from fedistill.aggregate.voices import top_class, voices
from fedistill.errors import FedistillError

LOGITS = np.log([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], [[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]])


def test_weights_by_client_become_weights_by_row():
    logs, given = voices(LOGITS + 7.0, np.array([1.0, 3.0]))
    np.testing.assert_allclose(logs, LOGITS)
    np.testing.assert_array_equal(given, [[1.0, 1.0], [3.0, 3.0]])
    np.testing.assert_array_equal(voices(LOGITS, given)[1], given)


def test_where_the_weight_is_zero_nothing_is_read():
    silent = LOGITS.copy()
    silent[1, 0] = np.nan
    logs, _ = voices(silent, np.array([[1.0, 1.0], [0.0, 1.0]]))
    np.testing.assert_allclose(logs[1], np.log([[1 / 3, 1 / 3, 1 / 3], [0.2, 0.2, 0.6]]))


def test_arguments_stay_as_they_are_and_float16_is_computed_in_float64():
    half = LOGITS.astype(np.float16)
    before = half.copy()
    logs, _ = voices(half, np.ones(2, dtype=np.float32))
    assert logs.dtype == np.float64
    np.testing.assert_array_equal(half, before)


@pytest.mark.parametrize(
    ("logits", "weights", "text"),
    [
        (LOGITS[0], np.ones(2), r"logits must be \[clients, rows, classes\] .* found \[2, 3\]"),
        (LOGITS[:0], np.ones(0), r"at least one client and one class, found \[0, 2, 3\]"),
        (LOGITS[:, :, :0], np.ones(2), r"found \[2, 2, 0\]"),
        (LOGITS, np.ones(3), r"weights must be \[clients\] = \[2\] .* found \[3\]"),
        (LOGITS, np.ones((2, 3)), r"\[clients, rows\] = \[2, 2\], found \[2, 3\]"),
        (LOGITS, np.array([1.0, -1.0]), "finite and at least 0"),
        (LOGITS, np.array([1.0, np.nan]), "finite and at least 0"),
        (LOGITS, np.array([1.0, np.inf]), "finite and at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(logits, weights, text):
    with pytest.raises(FedistillError, match=text):
        voices(logits, weights)


def test_the_lowest_of_equal_classes_whatever_the_order_of_the_sum():
    forth, back = 0.1 + 0.2, 0.3
    assert forth != back
    scores = np.array([[back, forth, 0.0], [forth, back, 0.0], [0.1, 0.2, 0.2], [-5.0, -4.0, -9]])
    assert top_class(scores).tolist() == [0, 0, 1, 1]
    assert top_class(np.array([[1e6 + 1e-4, 1e6 + 1e-3]])).tolist() == [0]
