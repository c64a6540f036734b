"""Codecs: what is lost, what it weighs, and what a bad payload cannot do."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from builders import probabilities
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.errors import Rejected
from fedistill.wire import codec
from fedistill.wire.codec import CODECS
from fedistill.wire.messages import Upload, seen_mask

REALISTIC = {
    "unsure": probabilities(500, 1, 10, scale=0.3),
    "trained": probabilities(500, 2, 10, scale=3.0),
    "confident": probabilities(500, 3, 10, scale=12.0),
    "certain": np.eye(10)[np.arange(500) % 10],
    "nearly certain": np.full((500, 10), 1e-6) + (1 - 1e-5) * np.eye(10)[np.arange(500) % 10],
    "two classes": probabilities(500, 4, 2, scale=5.0),
    "a hundred classes": probabilities(500, 5, 100, scale=4.0),
    "uniform": np.full((50, 10), 0.1),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("probs", REALISTIC.values(), ids=REALISTIC.keys())
def test_every_codec_returns_probabilities_of_the_same_rows(name: str, probs: np.ndarray) -> None:
    data = CODECS[name].encode(probs)
    decoded = CODECS[name].decode(data, *probs.shape)
    assert len(data) == codec.expected_size(name, *probs.shape)
    assert decoded.shape == probs.shape
    assert decoded.dtype == np.float32
    assert decoded.min() >= 0
    np.testing.assert_allclose(decoded.sum(axis=1), 1, atol=5e-3)


@pytest.mark.parametrize("probs", REALISTIC.values(), ids=REALISTIC.keys())
def test_one_byte_a_value_loses_at_most_a_thousandth_of_a_nat(probs: np.ndarray) -> None:
    decoded = CODECS["u8"].decode(CODECS["u8"].encode(probs), *probs.shape)
    assert -1e-6 <= codec.kl(probs, decoded) <= 1e-3


@pytest.mark.parametrize("probs", REALISTIC.values(), ids=REALISTIC.keys())
def test_float32_is_exact(probs: np.ndarray) -> None:
    decoded = CODECS["float32"].decode(CODECS["float32"].encode(probs), *probs.shape)
    np.testing.assert_array_equal(decoded, probs.astype(np.float32))


@pytest.mark.parametrize("name", CODECS)
def test_coding_what_was_decoded_changes_nothing_more(name: str) -> None:
    once = CODECS[name].decode(CODECS[name].encode(REALISTIC["trained"]), 500, 10)
    twice = CODECS[name].decode(CODECS[name].encode(once), 500, 10)
    np.testing.assert_allclose(twice, once, atol=0.03 if name == "u8" else 1e-3)


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(2, 40), st.floats(0, 200))
@settings(deadline=None, max_examples=60)
def test_the_top_class_survives_one_byte_unless_it_is_a_near_tie(
    seed: int, rows: int, classes: int, scale: float
) -> None:
    probs = probabilities(rows, seed, classes, scale)
    decoded = CODECS["u8"].decode(CODECS["u8"].encode(probs), rows, classes)
    assert codec.kl(probs, decoded) <= 2e-3
    top, second = np.sort(probs, axis=1)[:, -1], np.sort(probs, axis=1)[:, -2]
    clear = top > 1.06 * second
    assert (decoded.argmax(axis=1) == probs.argmax(axis=1))[clear].all()


def test_familiarity_takes_one_byte_a_row_and_is_clamped() -> None:
    ratios = np.array([-100.0, -8.0, -1.0, 0.0, 2.5, 8.0, 1e30])
    data = codec.encode_familiarity(ratios)
    assert len(data) == len(ratios)
    error = np.abs(codec.decode_familiarity(data) - np.clip(ratios, -8, 8))
    assert error.max() <= 8 / 255 + 1e-6


def test_a_thousand_rows_of_ten_classes_with_familiarity_fit_in_11500_bytes() -> None:
    """Predictions that do not compress: every byte of the code is equally likely."""
    random = np.random.default_rng(0)
    probs = np.exp(-random.uniform(0, 12, size=(1000, 10)))
    content = CODECS["u8"].encode(probs) + codec.encode_familiarity(random.uniform(-8, 8, 1000))
    message = Upload(
        client="site-with-a-name",
        run="0" * 16,
        round=100,
        proxy="f" * 64,
        classes="e" * 64,
        shape=(1000, 10),
        familiarity=True,
        seen=seen_mask([True] * 10),
        size=2048,
        payload=codec.pack(content),
    ).to_bytes()
    assert len(content) == 11_000
    assert len(message) <= 11_500


def test_confident_predictions_weigh_a_fraction_of_that() -> None:
    packed = codec.pack(CODECS["u8"].encode(probabilities(1000, 3, 10, scale=12.0)))
    assert len(packed) < 8_000


# --- payloads that are not what they say ---------------------------------------------------------


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(deadline=None)
def test_any_bytes_unfold_to_the_size_that_was_said_or_are_refused(data: bytes, size: int) -> None:
    try:
        content = codec.unpack(data, size)
    except Rejected as refusal:
        assert refusal.reason in {"truncated", "shape"}  # noqa: PT017
    else:
        assert len(content) == size


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_packing_is_undone(data: bytes) -> None:
    assert codec.unpack(codec.pack(data), len(data)) == data


@pytest.mark.parametrize("eighth", range(8))
def test_a_payload_cut_short_is_refused(eighth: int) -> None:
    content = np.random.default_rng(1).bytes(1000)
    data = codec.pack(content)
    with pytest.raises(Rejected) as caught:
        codec.unpack(data[: len(data) * eighth // 8], 1000)
    assert caught.value.reason in {"truncated", "shape"}


def test_a_payload_with_something_behind_it_is_refused() -> None:
    with pytest.raises(Rejected, match="shape"):
        codec.unpack(codec.pack(b"a" * 10) + b"more", 10)


def test_a_zip_bomb_is_refused_before_it_unfolds() -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    assert len(bomb) < 1 << 18
    tracemalloc.start()
    try:
        with pytest.raises(Rejected, match="shape"):
            codec.unpack(bomb, 30_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_a_payload_of_the_wrong_length_is_refused() -> None:
    for size in (9, 11, 0):
        with pytest.raises(Rejected, match="shape"):
            codec.unpack(codec.pack(b"a" * 10), size)
