"""Gaps are filled and columns scaled with numbers that only public rows can change."""

from __future__ import annotations

import numpy as np
import pytest

from fedistill.data import Scaler
from fedistill.errors import DataError

NAN = np.nan


def test_standard_by_hand() -> None:
    public = np.array([[1.0, 5.0, NAN], [3.0, 5.0, NAN], [NAN, 5.0, NAN]], np.float32)
    scaler = Scaler.fit(public, "table", "auto")
    assert scaler.fill.tolist() == [2.0, 5.0, 0.0]
    spread = np.sqrt(2 / 3)
    got = scaler.apply(np.array([[4.0, 6.0, 3.0], [NAN, NAN, NAN]], np.float32))
    np.testing.assert_allclose(got, [[2 / spread, 1.0, 3.0], [0.0, 0.0, 0.0]], rtol=1e-6)
    assert got.dtype == np.float32


def test_a_wild_private_value_is_limited_to_four_deviations() -> None:
    scaler = Scaler.fit(np.array([[1.0], [3.0]], np.float32), "table", "standard")
    assert scaler.apply(np.array([[1e6], [-1e6]], np.float32)).tolist() == [[4.0], [-4.0]]


def test_private_rows_cannot_move_the_statistics() -> None:
    public = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    scaler = Scaler.fit(public, "table", "standard")
    rows = np.ones((3, 4), np.float32)
    alone = scaler.apply(rows)
    together = scaler.apply(np.concatenate([rows, np.full((9, 4), 1e6, np.float32)]))[:3]
    assert np.array_equal(alone, together)
    np.testing.assert_allclose(scaler.apply(public).mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(scaler.apply(public).std(axis=0), 1, atol=1e-5)


def test_indicators_for_columns_that_miss_values_in_public_rows() -> None:
    public = np.array([[1.0, NAN], [3.0, 4.0]], np.float32)
    scaler = Scaler.fit(public, "table", "none", indicators=0.0)
    got = scaler.apply(np.array([[NAN, NAN], [7.0, 8.0]], np.float32))
    assert got.tolist() == [[2.0, 4.0, 1.0], [7.0, 8.0, 0.0]]


def test_centred_and_unit_by_hand() -> None:
    images = np.array([[[[0.0, 255.0]]], [[[127.5, 51.0]]]], np.float32)
    centred = Scaler.fit(images, "image", "auto").apply(images)
    np.testing.assert_allclose(centred.ravel(), [-1, 1, 0, -0.6], atol=1e-6)
    unit = Scaler.fit(images, "image", "unit").apply(images)
    np.testing.assert_allclose(unit.ravel(), [0, 1, 0.5, 0.2], atol=1e-6)
    table = np.array([[-4.0, 0.0], [2.0, 0.0]], np.float32)
    assert Scaler.fit(table, "table", "unit").apply(table).tolist() == [[-1.0, 0.0], [0.5, 0.0]]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, 1e30, -123456.789])
def test_a_constant_column_stays_harmless(value: float) -> None:
    public = np.full((77, 2), value, np.float32)
    assert np.abs(Scaler.fit(public, "table", "standard").apply(public)).max() <= abs(value) * 1e-6


def test_a_small_column_beside_a_large_one_is_scaled() -> None:
    public = np.array([[1e-9, 1e12], [3e-9, 3e12]], np.float32)
    got = Scaler.fit(public, "table", "standard").apply(public)
    np.testing.assert_allclose(got, [[-1, -1], [1, 1]], rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "kind", "scale"), [(0, "table", "auto"), (2, "film", "auto"), (2, "table", "big")]
)
def test_impossible_wishes_are_refused(rows: int, kind: str, scale: str) -> None:
    with pytest.raises(DataError, match="expected public rows"):
        Scaler.fit(np.zeros((rows, 1), np.float32), kind, scale)
