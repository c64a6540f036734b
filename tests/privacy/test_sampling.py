"""Whose rows are whose, and who is in a step."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedistill.errors import FedistillError
from fedistill.privacy.sampling import poisson, units_of
from fedistill.types import Rows


def rows(values, labels=None, subject=None):
    inputs = np.array(values, dtype=np.float32)[:, None]
    labels = np.zeros(len(inputs), dtype=np.int64) if labels is None else np.array(labels)
    return Rows(inputs, labels, subject=None if subject is None else np.array(subject))


def test_equal_records_are_one_unit():
    """Fault 48: a record that lies there twice would be drawn twice."""
    units = units_of(rows([1, 2, 1, 0.0, -0.0], [0, 0, 0, 1, 1]), "record")
    assert len(units) == 3
    np.testing.assert_array_equal(units.order, [0, 1, 3])


def test_a_record_is_its_values_and_its_label():
    units = units_of(rows([1, 1], [0, 1]), "record")
    assert len(units) == 2
    content = np.float32(1).tobytes() + np.array(1, dtype="<i8").tobytes()
    assert units.names[1] == hashlib.sha256(b"record\0" + content).digest()


def test_a_record_that_was_read_is_known_however_it_is_scaled():
    read = np.array([b"a" * 32, b"b" * 32, b"a" * 32])
    first = units_of(replace(rows([1, 2, 1]), record=read), "record")
    again = units_of(replace(rows([-3, 0, -3], [5, 5, 5]), record=read), "record")
    assert first.names == again.names
    assert first.names[0] == hashlib.sha256(b"read\0" + b"a" * 32).digest()
    np.testing.assert_array_equal(first.order, [0, 1])


def test_one_that_was_not_read_is_known_by_its_content():
    mixed = replace(rows([1, 2]), record=np.array([b"", b"b" * 32]))
    assert units_of(mixed, "record").names[0] == units_of(rows([1]), "record").names[0]
    assert units_of(mixed, "record").names[1] != units_of(rows([2]), "record").names[0]


def test_rows_of_nobody_are_known_by_what_was_read_and_users_by_their_name():
    read = np.array([b"a" * 32, b"b" * 32])
    units = units_of(replace(rows([1, 2], subject=["", "x"]), record=read), "user")
    assert units.names[0] == units_of(replace(rows([9, 9]), record=read), "record").names[0]
    assert units.names[1] == hashlib.sha256(b"user\0x").digest()


def test_names_do_not_depend_on_the_order():
    first = units_of(rows([1, 2, 3]), "record").names
    assert set(units_of(rows([3, 1, 2, 2]), "record").names) == set(first)


def test_a_user_is_all_of_its_rows():
    units = units_of(rows([1, 2, 3, 4, 5], subject=["b", "a", "b", "c", "b"]), "user")
    assert units.names[0] == hashlib.sha256(b"user\0b").digest()
    index, owner = units.rows_of(np.array([2, 0]))
    np.testing.assert_array_equal(index, [3, 0, 2, 4])
    np.testing.assert_array_equal(owner, [0, 1, 1, 1])


def test_rows_of_nobody_are_units_of_their_own():
    units = units_of(rows([1, 1, 2, 7, 7], subject=["", "", "", "a", "a"]), "user")
    assert len(units) == 3
    np.testing.assert_array_equal(units.rows_of(np.arange(3))[0], [0, 2, 3, 4])


def test_a_user_called_like_a_record_is_another():
    named = units_of(rows([1], subject=["x"]), "user").names
    assert named != units_of(rows([1]), "record").names


def test_users_have_to_be_known():
    with pytest.raises(FedistillError, match=r"data\.subject"):
        units_of(rows([1, 2]), "user")


def test_no_rows_are_no_units():
    assert len(units_of(rows([]), "record")) == 0
    assert len(units_of(rows([]), "user")) == 0


def test_nobody_chosen_has_no_rows():
    index, owner = units_of(rows([1, 2]), "record").rows_of(np.empty(0, dtype=np.int64))
    assert len(index) == len(owner) == 0


def test_every_unit_is_drawn_by_its_own_coin():
    random = torch.Generator().manual_seed(1)
    drawn = np.zeros((2000, 50), dtype=bool)
    for step in drawn:
        step[poisson(50, 0.2, random)] = True
    each = drawn.mean(0)
    assert np.abs(each - 0.2).max() < 5 * (0.16 / 2000) ** 0.5
    # The size of a step varies as a binomial number does: no step of a fixed size.
    assert drawn.sum(1).var() == pytest.approx(50 * 0.16, rel=0.2)
    together = np.corrcoef(drawn.T) - np.eye(50)
    assert np.abs(together).max() < 5 / 2000**0.5


def test_a_rate_of_one_is_everybody():
    np.testing.assert_array_equal(poisson(5, 1.0, torch.Generator()), np.arange(5))
