"""Sets of rows as a header says them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedistill.errors import Rejected
from fedistill.wire.rows import RowSpec, read_spec, spec_fields

HONEST = spec_fields(RowSpec(3, 2, 6, 40))


@given(
    seed=st.integers(-(1 << 70), 1 << 70),
    number=st.integers(1, 1 << 31),
    total=st.integers(1, 1 << 39),
    share=st.floats(0, 1),
)
def test_rows_that_can_be_drawn_read_back(seed: int, number: int, total: int, share: float) -> None:
    spec = RowSpec(seed, number, int(share * total), total)
    assert read_spec(spec_fields(spec)) == spec


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 0}, "shape"),
        ({"round": -1}, "shape"),
        ({"count": 41}, "shape"),
        ({"count": -1}, "shape"),
        ({"total": 0, "count": 0}, "shape"),
        ({"total": 1 << 40}, "shape"),
        ({"total": "40"}, "field"),
        ({"count": True}, "field"),
        ({"seed": 1.5}, "field"),
        ({"seed": None}, "field"),
        ({"more": 1}, "fields"),
    ],
)
def test_rows_that_cannot_be_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        read_spec(HONEST | changes)
    assert caught.value.reason == reason


@pytest.mark.parametrize("raw", [None, [], 3, "rows", {}, {"seed": 1}])
def test_what_is_no_set_of_rows_is_refused(raw: Any) -> None:
    with pytest.raises(Rejected):
        read_spec(raw)


@given(
    seed=st.integers(-(1 << 70), 1 << 70),
    total=st.integers(1, 30),
    count=st.integers(1, 30),
    number=st.integers(1, 60),
)
def test_rows_of_a_round_are_distinct_and_exist(
    seed: int, total: int, count: int, number: int
) -> None:
    count = min(count, total)
    rows = RowSpec(seed, number, count, total).rows()
    assert len(np.unique(rows)) == len(rows) == count
    assert rows.min() >= 0
    assert rows.max() < total


def test_no_rows_at_all_are_drawn_without_a_draw() -> None:
    assert RowSpec(1, 5, 0, 1 << 39).rows().shape == (0,)
