"""Small draws hold every class where there is room."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.data.draw import allot, count_of, stratified
from fedistill.errors import DataError


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.integers(0, 500))
def test_allot_adds_up_and_leaves_no_one_out(sizes: list[int], count: int) -> None:
    have = np.array(sizes)
    shares = allot(have, count)
    assert shares.sum() == min(count, have.sum())
    assert (shares >= 0).all()
    assert (shares <= have).all()
    if count >= (have > 0).sum():
        assert (shares[have > 0] >= 1).all()


def test_stratified_draws_distinct_rows_of_every_class() -> None:
    labels = np.array([0] * 97 + [1] * 3)
    drawn = stratified(labels, 20, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == 20
    assert set(labels[drawn].tolist()) == {0, 1}
    assert len(stratified(labels, 1000, np.random.default_rng(0))) == 100
    assert len(stratified(labels[:0], 5, np.random.default_rng(0))) == 0


def test_counts_and_shares() -> None:
    assert [count_of(amount, 10, "x") for amount in (3, 3.0, 0.25, 0.001, 0)] == [3, 3, 2, 1, 0]
    assert count_of(0.2, 1, "x") == 0
    for amount in (1.5, -1):
        with pytest.raises(DataError, match="x: expected a share below 1"):
            count_of(amount, 10, "x")
