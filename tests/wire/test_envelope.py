"""The envelope: parts, masks and tables of a header, and what wrong ones can do (nothing)."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from builders import LIMIT
from hypothesis import given
from hypothesis import strategies as st

from fedistill.errors import Rejected
from fedistill.wire.envelope import (
    CHECKSUM,
    check_types,
    count_bits,
    exact_keys,
    join,
    pack_mask,
    seal,
    split,
    unpack_mask,
    unseal,
)


def refused(call: Any) -> str:
    with pytest.raises(Rejected) as caught:
        call()
    return caught.value.reason


@given(
    st.dictionaries(st.text(max_size=9), st.none() | st.integers() | st.text(max_size=9)),
    st.binary(max_size=99),
)
def test_what_is_sealed_is_unsealed(header: dict[str, Any], payload: bytes) -> None:
    assert unseal(seal(header, payload), LIMIT) == (header, payload)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_header_that_is_no_json_cannot_be_sealed(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        seal({"x": value}, b"")


def test_a_message_longer_than_agreed_is_refused_unread() -> None:
    data = seal({"a": 1}, bytes(100))
    assert unseal(data, len(data)) == ({"a": 1}, bytes(100))
    assert refused(lambda: unseal(data, len(data) - 1)) == "too_large"
    assert refused(lambda: unseal(data[:-CHECKSUM], LIMIT)) == "truncated"


# --- parts ---------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=9), max_size=6))
def test_parts_come_back_as_they_were_joined(parts: list[bytes]) -> None:
    lengths, payload = join(parts)
    assert split(payload, lengths, len(parts)) == parts


@pytest.mark.parametrize(
    "lengths",
    [
        [2, 2],
        [2, 1, 0],
        [3],
        [4, -1],
        [True, 2],
        [1.0, 2],
        ["1", 2],
        [None, 3],
        [1 << 70, 3 - (1 << 70)],
        "12",
        {"0": 1, "1": 2},
        None,
        3,
        [[1], 2],
    ],
)
def test_parts_that_do_not_add_up_are_refused(lengths: Any) -> None:
    assert split(b"abc", [1, 2], 2) == [b"a", b"bc"]
    assert refused(lambda: split(b"abc", lengths, 2)) == "format"


# --- masks ---------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=70))
def test_a_mask_reads_back_and_is_counted(bits: list[bool]) -> None:
    mask = np.array(bits, dtype=bool)
    packed = pack_mask(mask)
    np.testing.assert_array_equal(unpack_mask(packed, len(bits)), mask)
    assert count_bits(packed, len(bits)) == sum(bits)
    assert len(packed) == (-(-len(bits) // 8) if any(bits) else 0)


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b"\x80", 9),  # too short
        (b"\x80", 0),  # for no rows
        (b"\x80\x00", 8),  # too long
        (b"\x01", 7),  # a bit behind the last row
        (b"\xff\xff", 15),
        (b"\x80", 1 << 40),
        (b"\x00\x00", 3),
    ],
)
def test_a_mask_of_another_number_of_rows_is_refused(data: bytes, rows: int) -> None:
    assert refused(lambda: count_bits(data, rows)) == "shape"
    assert refused(lambda: unpack_mask(data, rows)) == "shape"


def test_counting_an_empty_mask_takes_no_memory_whatever_the_header_claims() -> None:
    tracemalloc.start()
    try:
        assert count_bits(b"", 1 << 60) == 0
        assert refused(lambda: count_bits(b"\x01", 1 << 60)) == "shape"
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


# --- tables of a header --------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, [], 3, "x", {}, {"n": True}, {"n": 1.0}, {"n": "1"}])
def test_a_field_of_another_type_is_refused(header: Any) -> None:
    check_types({"n": 1}, {"n": int})
    assert refused(lambda: check_types(header, {"n": int})) == "field"


@pytest.mark.parametrize("header", [{}, {"a": 1}, {"a": 1, "b": 2, "c": 3}])
def test_a_table_with_other_names_is_refused(header: dict[str, int]) -> None:
    exact_keys({"a": 1, "b": 2}, {"a", "b"})
    assert refused(lambda: exact_keys(header, {"a", "b"})) == "fields"
