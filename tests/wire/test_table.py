"""Tables: round trips with absent rows, and headers that claim too much."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedistill.errors import Rejected
from fedistill.wire.envelope import pack_mask
from fedistill.wire.table import MOST_VALUES, Table

NOBODY = np.nan


@given(st.integers(0, 20), st.integers(1, 5), st.integers(0, 99))
def test_a_table_reads_back_with_its_absent_rows(items: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=(items, width)).astype(np.float32)
    values[random.random(items) < 0.4] = np.nan
    found = Table.read([items, width], Table(values).parts())
    np.testing.assert_array_equal(found.values, values)
    assert found.values.dtype == np.float32
    assert found.shape == (items, width)


def test_an_absent_row_costs_a_bit_and_a_full_table_no_mask() -> None:
    values = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    assert Table(values).parts() == [b"", values.tobytes()]
    values[1] = np.nan
    mask, told = Table(values).parts()
    assert (mask, len(told)) == (b"\x40", 16)


def test_a_row_with_one_nan_is_absent_as_a_whole() -> None:
    values = np.array([[1, NOBODY], [2, 3]], dtype=np.float32)
    found = Table.read([2, 2], Table(values).parts()).values
    np.testing.assert_array_equal(found, [[NOBODY, NOBODY], [2, 3]])


FOUR = np.zeros(4, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        (None, [b"", FOUR]),
        ("22", [b"", FOUR]),
        ([2], [b"", FOUR]),
        ([2, 2, 1], [b"", FOUR]),
        ([2, -2], [b"", FOUR]),
        ([2.0, 2], [b"", FOUR]),
        ([True, 4], [b"", FOUR]),
        ([2, 3], [b"", FOUR]),
        ([2, 2], [b"", FOUR[:-1]]),
        ([2, 2], [b"\x80", FOUR]),
        ([2, 2], [b"\x01", FOUR]),
        ([2, 2], [b"\x80\x80", FOUR]),
        ([3, 2], [b"\xe0", FOUR]),
    ],
)
def test_a_table_that_does_not_fit_its_header_is_refused(shape: Any, parts: list[bytes]) -> None:
    with pytest.raises(Rejected) as caught:
        Table.read(shape, parts)
    assert caught.value.reason == "shape"


@pytest.mark.parametrize(
    "shape",
    [
        [1 << 40, 0],
        [0, 1 << 40],
        [1 << 80, 0],
        [0, 1 << 80],
        [1 << 40, 1 << 40],
        [MOST_VALUES + 1, 0],
    ],
)
def test_huge_sides_take_no_memory(shape: list[int]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Rejected) as caught:
            Table.read(shape, [b"", b""])
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    assert caught.value.reason == "shape"


def test_a_mask_of_absent_items_unfolds_to_a_bounded_table_only() -> None:
    items = 1 << 12
    mask = pack_mask(np.ones(items, dtype=bool))
    assert np.isnan(Table.read([items, 3], [mask, b""]).values).all()
    with pytest.raises(Rejected):
        Table.read([items, MOST_VALUES // items + 1], [mask, b""])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    told = np.array([1, value], dtype="<f4").tobytes()
    with pytest.raises(Rejected) as caught:
        Table.read([2, 1], [b"", told])
    assert caught.value.reason == "nonfinite"
