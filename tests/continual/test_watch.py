"""The values that detectors watch, on tables computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedistill.continual import watch
from fedistill.continual.adwin import Adwin
from fedistill.continual.mmd import Mmd
from fedistill.continual.watch import values
from fedistill.continual.watcher import DriftState, observe
from fedistill.errors import FedistillError

PROBS = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])


def test_unlabelled_by_hand() -> None:
    third = -(0.2 * np.log(0.2) + 0.3 * np.log(0.3) + 0.5 * np.log(0.5)) / np.log(3)
    np.testing.assert_allclose(values("entropy", PROBS), [0, np.log(2) / np.log(3), third])
    np.testing.assert_allclose(values("confidence", PROBS), [1, 0.5, 0.5])
    np.testing.assert_allclose(values("margin", PROBS), [1, 0, 0.2])
    np.testing.assert_array_equal(values("predictions", PROBS), PROBS)


def test_labelled_by_hand() -> None:
    np.testing.assert_array_equal(values("error", PROBS, [0, 1, 2]), [0, 1, 0])
    np.testing.assert_allclose(
        values("loss", PROBS, [1, 1, 2]), [1, -np.log(0.5) / 10, -np.log(0.5) / 10]
    )


def test_rows_without_a_label_are_left_out() -> None:
    np.testing.assert_array_equal(values("error", PROBS, [-1, 1, -1]), [1])
    assert len(values("loss", PROBS, [-1, -1, -1])) == 0


def test_a_class_that_has_no_output_yet_is_wrong() -> None:
    np.testing.assert_array_equal(values("error", PROBS, [7, 0, 2]), [1, 0, 0])
    assert values("loss", PROBS, [7, 0, 2])[0] == 1


@pytest.mark.parametrize("on", watch.VALUES)
def test_scale_is_0_to_1_and_empty_is_empty(on: str) -> None:
    probs = np.random.default_rng(1).dirichlet(np.full(5, 0.05), 500)
    found = values(on, probs, np.arange(500) % 5)
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert len(values(on, np.empty((0, 3)), np.empty(0, np.int64))) == 0
    assert len(values(on, np.ones((2, 1)), [0, 0])) == 2


@pytest.mark.parametrize(
    ("on", "probs", "labels", "text"),
    [
        ("entropie", PROBS, None, 'did you mean "entropy"'),
        ("error", PROBS, None, "needs labels"),
        ("error", PROBS, [0, 1], "expected 3 class numbers"),
        ("error", PROBS, [0.5, 1, 2], "expected 3 class numbers"),
        ("entropy", PROBS[0], None, r"\[rows, classes\]"),
        ("entropy", PROBS * np.nan, None, "row 0 is not"),
    ],
)
def test_bad_input(on: str, probs: Any, labels: Any, text: str) -> None:
    with pytest.raises(FedistillError, match=text):
        values(on, probs, labels)


def test_observe_is_values_then_update() -> None:
    rng = np.random.default_rng(5)
    sure, unsure = rng.dirichlet([20, 1, 1], 320), rng.dirichlet([1, 1, 1], 320)
    for detector in (Adwin(), Mmd(), Adwin(on="error")):
        assert observe(detector, sure, np.zeros(320, int)) is DriftState.OK
        assert observe(detector, unsure, np.zeros(320, int)) is DriftState.DRIFT
        assert len(detector.alarms) == 1
