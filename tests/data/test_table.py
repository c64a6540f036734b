"""Two sources of one kind speak of the same features and classes; what differs is named."""

from __future__ import annotations

import numpy as np
import pytest

from fedistill.data import Table, overlap
from fedistill.data.table import align, align_features, rows_of
from fedistill.errors import DataError


def table(features: str, classes: str = "a b", labels: tuple[int, ...] = (0, 1)) -> Table:
    names = tuple(features.split())
    inputs = np.arange(len(labels) * len(names), dtype=np.float32).reshape(len(labels), -1)
    return Table("t", inputs, np.array(labels), tuple(classes.split()), features=names)


def test_columns_are_put_in_order_and_unseen_categories_are_zero() -> None:
    got = align(table("c=z c=x age", "b a"), table("age c=x c=y"))
    assert got.inputs.tolist() == [[2, 1, 0], [5, 4, 0]]
    assert (got.labels.tolist(), got.classes) == ([1, 0], ("a", "b"))


def test_a_dot_behind_each_class_is_forgiven() -> None:
    assert align(table("x", "a. b."), table("x")).labels.tolist() == [0, 1]


def test_what_cannot_be_aligned_is_named() -> None:
    with pytest.raises(DataError, match="another one in row 1"):
        align(table("x", "a c"), table("x"))
    with pytest.raises(DataError, match='expected a column "age"'):
        align_features(table("x"), table("x age"))
    with pytest.raises(DataError, match='found "age" besides'):
        align_features(table("x age"), table("x"))
    with pytest.raises(DataError, match='expected a column "c" of the same kind'):
        align_features(table("c"), table("c=x"))
    small = Table("s", np.zeros((1, 1, 4, 4), np.float32), np.zeros(1, np.int64), ("a",))
    large = Table("l", np.zeros((1, 1, 5, 5), np.float32), np.zeros(1, np.int64), ("a",))
    with pytest.raises(DataError, match=r"expected rows of shape \(1, 5, 5\)"):
        align_features(small, large)


def test_sites_need_a_source_with_columns() -> None:
    assert rows_of(table("x")).site is None
    with pytest.raises(DataError, match="only csv, parquet"):
        rows_of(table("x"), "ward")


def test_fault_54_rows_that_occur_in_both_sets_are_found() -> None:
    rows = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    assert overlap(rows, np.array([[5, 6], [1, 3]], np.float32)).tolist() == [2]
    assert overlap(rows, rows[:0]).tolist() == []
