"""Deltas: lossless, small where little changed, and refused against other codes than those held."""

from __future__ import annotations

import numpy as np
import pytest
from builders import probabilities
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.errors import Rejected
from fedistill.wire import codec, grid
from fedistill.wire.codec import CODECS
from fedistill.wire.delta import PLAIN, SAME, delta_decode, delta_encode, quantise, restore

ALIKE = probabilities(1000, 1, 10, scale=4.0)


def moved(probs: np.ndarray, seed: int, by: float) -> np.ndarray:
    """The rows after a round in which logits moved by about ``by``."""
    noise = np.random.default_rng(seed).normal(size=probs.shape)
    values = probs * np.exp(by * noise)
    return values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", CODECS)
@given(
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.sampled_from([1, 2, 3, 10, 300]),
    st.floats(0, 20),
    st.sampled_from([None, 0.0, 1e-3, 0.1, 3.0]),
)
@settings(deadline=None, max_examples=40)
def test_what_is_decoded_is_what_was_quantised(
    name: str, seed: int, rows: int, classes: int, scale: float, by: float | None
) -> None:
    probs = probabilities(rows, seed, classes, scale)
    held = None if by is None else quantise(name, moved(probs, seed, by), seed=seed)
    codes = quantise(name, probs, seed=seed)
    before = codes.copy(), None if held is None else held.copy()
    data = delta_encode(name, codes, held)
    found = delta_decode(name, data, rows, classes, held)
    np.testing.assert_array_equal(found, codes)
    assert found.dtype == codes.dtype
    np.testing.assert_array_equal(codes, before[0])
    if held is not None:
        np.testing.assert_array_equal(held, before[1])
    plain = CODECS[name].decode(codec.encode(name, probs, seed=seed), rows, classes)
    np.testing.assert_array_equal(restore(name, found, classes), plain)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("rows", [1, 1000])
def test_nothing_new_costs_five_bytes(name: str, rows: int) -> None:
    codes = quantise(name, ALIKE[:rows], seed=3)
    data = delta_encode(name, codes, codes.copy())
    assert len(data) == 5
    assert data[0] == SAME
    found = delta_decode(name, data, rows, 10, codes)
    assert not np.shares_memory(found, codes)


@pytest.mark.parametrize("name", [name for name in CODECS if not name.startswith("float")])
def test_one_changed_row_of_a_thousand_costs_a_few_dozen_bytes(name: str) -> None:
    held = quantise(name, ALIKE, seed=3)
    probs = ALIKE.copy()
    probs[500] = np.roll(probs[500], 1)
    assert len(delta_encode(name, quantise(name, probs, seed=3), held)) < 100


@pytest.mark.parametrize("name", ["u8", "simplex-2", "simplex-4", "simplex-8", "label"])
def test_a_small_step_costs_less_than_the_codes_and_a_large_one_no_more(name: str) -> None:
    held = quantise(name, ALIKE)
    near, far = (quantise(name, moved(ALIKE, 2, by)) for by in (0.05, 20.0))
    assert len(delta_encode(name, near, held)) < 0.8 * len(delta_encode(name, near))
    assert len(delta_encode(name, far, held)) <= len(delta_encode(name, far))


def test_by_hand() -> None:
    """Plain codes of three labels; three unchanged; one changed."""
    held, codes = (np.array([[0], [2], [c]], dtype=np.uint8) for c in (1, 2))
    assert delta_encode("label", held) == bytes([PLAIN]) + codec.pack(b"\0\2\1", hard=True)
    assert delta_decode("label", delta_encode("label", codes, held), 3, 3, held).tolist() == [
        *([0], [2], [2])
    ]


@pytest.mark.parametrize("name", ["u8", "simplex-4", "label", "top-k", "float16"])
def test_another_reference_is_refused(name: str) -> None:
    held = quantise(name, ALIKE)
    codes = quantise(name, moved(ALIKE, 2, 0.05))
    other = held.copy()
    other[7] = other[8]
    for data in (delta_encode(name, codes, held), delta_encode(name, held, held)):
        if data[0] == PLAIN:
            continue
        for wrong in (None, other, held[:-1], held[:, :-1], held.astype(np.int64)):
            with pytest.raises(Rejected, match="reference"):
                delta_decode(name, data, 1000, 10, wrong)
    with pytest.raises(Rejected, match="reference"):
        delta_encode(name, codes, held[:-1])


REASONS = {"truncated", "shape", "format", "reference", "not_probs"}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("by", [None, 0.0, 0.05])
def test_damaged_deltas_are_refused_or_make_codes_that_can_be(name: str, by: float | None) -> None:
    probs = ALIKE[:60]
    held = None if by is None else quantise(name, probs, seed=1)
    codes = quantise(name, moved(probs, 5, by or 0.0), seed=1)
    data = delta_encode(name, codes, held)
    random = np.random.default_rng(9)
    damaged = [data[: len(data) * eighth // 8] for eighth in range(8)] + [data + b"x", b"\4" + data]
    for _ in range(60):
        flipped = bytearray(data)
        flipped[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        damaged.append(bytes(flipped))
    damaged += [data[:k] + random.bytes(50) for k in (0, 1, 5)]
    for wrong in damaged:
        try:
            found = delta_decode(name, wrong, 60, 10, held)
        except Rejected as refusal:
            assert refusal.reason in REASONS  # noqa: PT017
        else:
            decoded = restore(name, found, 10)
            assert decoded.shape == (60, 10)
            if not name.startswith("float"):
                np.testing.assert_allclose(decoded.sum(axis=1), 1, atol=1e-6)
    for wrong in damaged[:9]:
        with pytest.raises(Rejected):
            delta_decode(name, wrong, 60, 10, held)


def test_a_codec_of_ones_own_has_no_deltas() -> None:
    with pytest.raises(KeyError):
        quantise("zip", ALIKE)


@pytest.mark.parametrize("classes", [2, 9, 130])
@pytest.mark.parametrize("name", [name for name, c in CODECS.items() if c.grid is not None])
def test_many_rows_are_converted_in_parts_to_the_same_bytes(
    name: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    probs = probabilities(23, 1, classes, scale=3.0)
    codes = quantise(name, probs, seed=3)
    decoded = restore(name, codes, classes)
    for rows in (1, 2, 5, 22):
        monkeypatch.setattr(grid, "CELLS", rows * classes)
        np.testing.assert_array_equal(quantise(name, probs, seed=3), codes)
        found = restore(name, codes, classes)
        assert found.dtype == decoded.dtype
        assert found.tobytes() == decoded.tobytes()
