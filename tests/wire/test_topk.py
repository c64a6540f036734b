"""The most likely classes and one bucket for the rest."""

from __future__ import annotations

import numpy as np
import pytest
from builders import probabilities
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.wire import codec
from fedistill.wire.codec import CODECS
from fedistill.wire.topk import from_log_codes, top_k


def test_by_hand() -> None:
    """Two of four classes kept; .3 are left and shared by the other two."""
    grid = top_k(2)
    probs = np.array([[0.05, 0.5, 0.25, 0.2], [0.25, 0.25, 0.25, 0.25]])
    codes = grid.quantise(probs)
    steps = [round(-np.log(p) * 255 / 12) for p in (0.5, 0.25, 0.25)]
    assert codes[0].tolist() == [1, 2, *steps]
    assert codes[1, :2].tolist() == [0, 1]  # of equals the lower
    decoded = grid.restore(codes, 4)
    np.testing.assert_allclose(decoded[0], [0.125, 0.5, 0.25, 0.125], atol=0.01)
    np.testing.assert_allclose(decoded[1], [0.25] * 4, atol=0.01)
    assert decoded[0, 0] == decoded[0, 3]
    assert len(grid.dump(codes)) == 2 * grid.row_bytes(4) == 2 * (2 + 3)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@given(st.integers(0, 2**32), st.integers(0, 20), st.integers(1, 400), st.floats(0, 40))
@settings(deadline=None, max_examples=40)
def test_the_kept_classes_keep_their_mass_and_the_rest_is_even(
    k: int, seed: int, rows: int, classes: int, scale: float
) -> None:
    grid = top_k(k)
    probs = probabilities(rows, seed, classes, scale)
    codes = grid.quantise(probs)
    loaded = grid.load(grid.dump(codes), rows, classes)
    np.testing.assert_array_equal(loaded, codes)
    assert loaded.dtype == codes.dtype == np.dtype(grid.dtype(classes))
    assert codes.shape == (rows, grid.columns(classes))
    decoded = grid.restore(codes, classes)
    np.testing.assert_allclose(decoded.sum(axis=1), 1, atol=1e-6)
    if classes <= k:
        return
    sent, kept = (np.take_along_axis(p, codes[:, :k].astype(int), axis=1) for p in (probs, decoded))
    np.testing.assert_allclose(sent, -np.sort(-probs, axis=1)[:, :k], atol=1e-11)
    np.testing.assert_allclose(kept, sent, rtol=0.06, atol=2e-5)
    tail = 1 - sent.sum(axis=1)
    for row, numbers, mass in zip(decoded, codes[:, :k].astype(int), tail, strict=True):
        rest = np.delete(row, numbers)
        assert np.ptp(rest) == 0
        np.testing.assert_allclose(rest.sum(), mass, rtol=0.06, atol=2e-5)


def test_flat_rows_keep_their_tail() -> None:
    """P22: renormalising over the kept classes alone would cost a row of 100 equals 2.5 nats."""
    flat = np.full((3, 100), 0.01)
    decoded = CODECS["top-k"].decode(codec.encode("top-k", flat), 3, 100)
    assert codec.kl(flat, decoded) < 1e-3


def test_without_more_than_k_classes_it_is_u8() -> None:
    probs = probabilities(20, 3, 8, scale=3.0)
    assert codec.encode("top-k", probs) == codec.encode("u8", probs)


def test_eight_of_a_thousand_classes_fit_in_25_bytes() -> None:
    assert codec.expected_size("top-k", 1, 1000) == 25
    assert codec.expected_size("top-k", 1, 100) == 17
    assert codec.expected_size("top-k", 1, 10) == 17


def test_a_code_stands_for_the_exponential_of_its_steps() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(from_log_codes(codes), np.exp(codes * (-12.0 / 255.0)))
