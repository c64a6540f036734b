"""Codes in little memory: whatever is read of them is what was put in."""

from __future__ import annotations

import numpy as np
import pytest
from builders import probabilities
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.wire import folded
from fedistill.wire.codec import CODECS
from fedistill.wire.delta import quantise
from fedistill.wire.folded import Folded

CODED = [name for name, codec in CODECS.items() if codec.grid is not None]


def sparse(rows: int, columns: int = 50, dtype: str = "u1") -> np.ndarray:
    """Codes that are mostly zeros."""
    random = np.random.default_rng(1)
    codes = np.zeros((rows, columns), dtype=dtype)
    codes[np.arange(rows), random.integers(columns, size=rows)] = 60
    return codes


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 60),
    block=st.integers(1, 1000),
    dtype=st.sampled_from(["<u1", "<u2", "<u4"]),
    data=st.data(),
)
def test_any_rows_are_read_as_they_were(rows: int, block: int, dtype: str, data: st.DataObject):
    codes = sparse(rows, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folded, "SMALL", 0)
        patch.setattr(folded, "BLOCK", block)
        kept = Folded(codes)
    assert len(kept) == rows
    assert kept.shape == codes.shape
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2)))
    places = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=9)), dtype=np.int64)
    for wanted in (slice(None), slice(start, stop), places):
        found = kept[wanted]
        assert found.dtype == codes.dtype
        np.testing.assert_array_equal(found, codes[wanted])


def test_what_compresses_is_kept_compressed_and_what_does_not_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(256, size=(30_000, 50), dtype=np.uint8)
    assert Folded(noise).nbytes == noise.nbytes
    assert Folded(sparse(30_000)).nbytes < noise.nbytes / 10
    assert Folded(sparse(1000)).nbytes == 50_000, "not worth it"


@pytest.mark.parametrize("codec", CODED)
def test_no_rows_and_codes_of_every_codec(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded, "SMALL", 0)
    for rows in (0, 9):
        codes = quantise(codec, probabilities(rows, 1, 12), seed=1)
        np.testing.assert_array_equal(Folded(codes)[:], codes)
