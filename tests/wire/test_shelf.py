"""Shelves: what both sides hold, and the mark by which they find that they do."""

from __future__ import annotations

import numpy as np
import pytest
from builders import probabilities
from hypothesis import given
from hypothesis import strategies as st

from fedistill.wire.codec import CODECS
from fedistill.wire.delta import quantise, restore
from fedistill.wire.shelf import Shelf, mark

CODED = [name for name, codec in CODECS.items() if codec.grid is not None]


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("classes", [3, 12, 300])
def test_what_is_put_on_a_shelf_is_what_is_taken_from_it(codec: str, classes: int) -> None:
    probs = probabilities(4, 1, classes)
    codes = quantise(codec, probs, seed=1)
    shelf = Shelf(codec, 9, classes)
    rows = np.array([7, 0, 3, 5])
    shelf.put(rows, codes, 2)
    np.testing.assert_array_equal(shelf.probs(rows), restore(codec, codes, classes))
    assert shelf.codes.dtype == codes.dtype
    assert shelf.round.tolist() == [2, 0, 0, 2, 0, 2, 0, 2, 0]


def test_the_latest_codes_of_a_row_stay_and_others_are_not_touched() -> None:
    first, second = (quantise("u8", probabilities(3, seed)) for seed in (1, 2))
    shelf = Shelf("u8", 5, 3)
    shelf.put(np.array([0, 1, 2]), first, 1)
    shelf.put(np.array([2, 3, 4]), second, 4)
    np.testing.assert_array_equal(shelf.codes, np.concatenate([first[:2], second]))
    assert shelf.round.tolist() == [1, 1, 4, 4, 4]


def test_a_reference_is_zero_where_nothing_is_held_and_none_where_nothing_is_held_at_all() -> None:
    codes = quantise("u8", probabilities(2, 1))
    shelf = Shelf("u8", 6, 3)
    assert shelf.reference(np.arange(6)) is None
    shelf.put(np.array([1, 4]), codes, 1)
    assert shelf.reference(np.array([0, 2])) is None
    assert shelf.reference(np.array([], dtype=int)) is None
    found = shelf.reference(np.array([4, 0, 1]))
    assert found is not None
    np.testing.assert_array_equal(found, [codes[1], [0, 0, 0], codes[0]])


def test_a_reference_is_a_copy() -> None:
    shelf = Shelf("u8", 2, 3)
    shelf.put(np.array([0]), quantise("u8", probabilities(1, 1)), 1)
    reference = shelf.reference(np.array([0]))
    assert reference is not None
    reference[:] = 99
    assert (shelf.codes[0] != 99).any()


def test_what_is_forgotten_is_held_no_more() -> None:
    shelf = Shelf("u8", 3, 3)
    shelf.put(np.arange(3), quantise("u8", probabilities(3, 1)), 1)
    shelf.forget(np.array([1]))
    assert shelf.round.tolist() == [1, 0, 1]
    assert not shelf.codes[1].any()
    shelf.forget()
    assert not shelf.round.any()
    assert not shelf.codes.any()


def test_a_shelf_restored_is_a_copy_of_the_one_that_was_saved() -> None:
    shelf = Shelf("simplex-4", 4, 3)
    shelf.put(np.array([0, 3]), quantise("simplex-4", probabilities(2, 1)), 7)
    again = Shelf("simplex-4", 4, 3)
    again.load_state_dict(shelf.state_dict())
    shelf.forget()
    assert again.round.tolist() == [7, 0, 0, 7]
    assert again.codes.any()


@given(st.integers(0, 5), st.integers(0, 2), st.integers(1, 255))
def test_any_other_code_row_or_order_has_another_mark(row: int, column: int, change: int) -> None:
    rows, codes = np.arange(6), quantise("u8", probabilities(6, 1))
    other = codes.copy()
    other[row, column] ^= np.uint8(change)
    moved = rows.copy()
    moved[row] += 6
    marks = {
        mark(rows, codes),
        mark(rows, other),
        mark(moved, codes),
        mark(rows[::-1], codes),
        mark(rows[::-1], codes[::-1]),
        mark(rows[:5], codes[:5]),
    }
    assert len(marks) == 6
    assert mark(rows.astype(np.int32), codes.copy()) == mark(rows, codes)
