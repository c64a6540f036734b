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
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded.sum(axis=1), 1, atol=1e-6)
    if not CODECS[name].draws:
        assert (decoded[np.arange(len(probs)), probs.argmax(axis=1)] > 0).all()


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
    np.testing.assert_allclose(twice, once, atol=0.03 if name in {"u8", "top-k"} else 1e-3)


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


# --- what every codec keeps ----------------------------------------------------------------------

EDGES = {
    "no rows": np.empty((0, 10)),
    "one class": np.ones((5, 1)),
    "one row of ten thousand classes": probabilities(1, 6, 10_000, scale=2.0),
    "one row of 70,000 classes": probabilities(1, 7, 70_000, scale=2.0),
    "smallest numbers": np.array([[1.0, 5e-324, 0.0], [1e-300, 1e-300, 1e-300]]),
    "float32": probabilities(20, 8, 12, scale=3.0).astype(np.float32),
    "not contiguous": np.asfortranarray(probabilities(20, 9, 12, scale=3.0))[::2],
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("probs", EDGES.values(), ids=EDGES.keys())
def test_edges_pass_every_codec(name: str, probs: np.ndarray) -> None:
    if name.startswith(("float", "u8")) and probs.shape == (2, 3):
        pytest.skip("these take rows as they are, and one of these sums to almost nothing")
    before = probs.copy()
    data = codec.encode(name, probs, seed=1)
    content = codec.unpack(codec.pack(data), codec.expected_size(name, *probs.shape))
    decoded = CODECS[name].decode(content, *probs.shape)
    np.testing.assert_array_equal(probs, before)
    assert content == data
    assert decoded.shape == probs.shape
    assert decoded.dtype == np.float32
    assert decoded.min(initial=0) >= 0
    np.testing.assert_allclose(decoded.sum(axis=1, dtype=np.float64), 1, atol=1e-6)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    ("bad", "reason"),
    [(np.nan, "nonfinite"), (np.inf, "nonfinite"), (-np.inf, "nonfinite"), (-0.1, "not_probs")],
)
def test_no_codec_takes_what_is_no_probability(name: str, bad: float, reason: str) -> None:
    probs = probabilities(4, 1, 10)
    probs[2, 3] = bad
    with pytest.raises(Rejected) as caught:
        codec.encode(name, probs)
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", [name for name in CODECS if not name.startswith(("float", "u8"))])
def test_a_row_of_zeros_has_no_shares(name: str) -> None:
    with pytest.raises(Rejected, match="not_probs"):
        codec.encode(name, np.zeros((1, 3)))


GOLDEN_ROWS = np.array([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9], [0.0, 1.0, 0.0]])
GOLDEN_WIDE = np.array([[0.3, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]])
GOLDEN = {
    "float32": "3333333fcdcc4c3ecdcccc3dcdcc4c3dcdcc4c3d6666663f000000000000803f00000000",
    "float16": "9a396632662e662a662a333b0000003c0000",
    "u8": "082231404002ff00ff",
    "simplex-1": "000201",
    "simplex-2": "020000010003000000",
    "simplex-3": "050100010007000000",
    "simplex-4": "0b010003010f000000",
    "simplex-5": "16020006011f000000",
    "simplex-6": "2c03000d033f000000",
    "simplex-7": "59070019067f000000",
    "simplex-8": "b30d00330dff000000",
    "top-k": "00010203040506071a2231314040404031",
    "label": "000201",
    "sampled-label": "000201",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    """Bytes on the wire are an agreement between versions: change them with the version only."""
    probs = GOLDEN_WIDE if name == "top-k" else GOLDEN_ROWS
    assert codec.encode(name, probs, seed=3).hex() == GOLDEN[name]


def test_every_codec_has_golden_bytes() -> None:
    assert list(GOLDEN) == list(CODECS)


@pytest.mark.parametrize("name", CODECS)
def test_only_a_codec_that_draws_heeds_the_seed(name: str) -> None:
    probs = REALISTIC["unsure"]
    once, again, other = (codec.encode(name, probs, seed=seed) for seed in (5, 5, 6))
    assert once == again
    assert (once != other) == CODECS[name].draws


# --- codes that no probabilities could have given ------------------------------------------------

REASONS = {"truncated", "shape", "not_probs", "nonfinite", "format", "reference"}


def harmless(name: str, data: bytes, rows: int, classes: int) -> bool:
    """Whether content was decoded to rows that the door can judge; else it was refused."""
    try:
        decoded = CODECS[name].decode(data, rows, classes)
    except Rejected as refusal:
        assert refusal.reason in REASONS  # noqa: PT017
        return False
    assert decoded.shape == (rows, classes)
    assert decoded.dtype == np.float32
    if not name.startswith("float"):  # the door looks at these as they are
        np.testing.assert_allclose(decoded.sum(axis=1), 1, atol=1e-6)
        assert decoded.min() >= 0
    return True


@pytest.mark.parametrize("name", CODECS)
@given(st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([1, 2, 3, 10, 300]))
@settings(deadline=None, max_examples=40)
def test_content_at_random_is_refused_or_makes_probabilities(
    name: str, seed: int, rows: int, classes: int
) -> None:
    random = np.random.default_rng(seed)
    size = codec.expected_size(name, rows, classes)
    harmless(name, random.bytes(size), rows, classes)
    data = bytearray(codec.encode(name, probabilities(rows, seed, classes, 3.0)))
    data[int(random.integers(size))] ^= 1 << int(random.integers(8))
    harmless(name, bytes(data), rows, classes)
    for wrong in (size - 1, size + 1, 0):
        assert not harmless(name, random.bytes(wrong), rows, classes)


@pytest.mark.parametrize(
    ("name", "data", "rows", "classes"),
    [
        ("label", b"\x00\x03", 2, 3),
        ("sampled-label", b"\x00\xff", 2, 3),
        ("simplex-1", b"\x03", 1, 3),
        ("label", b"\x2c\x01", 1, 300),
        ("simplex-2", bytes([4, 0, 0]), 1, 3),
        ("simplex-2", bytes([2, 2, 0]), 1, 3),
        ("simplex-2", bytes([3, 0, 1]), 1, 3),
        ("simplex-8", bytes([255, 1, 0, 0]), 1, 4),
        ("top-k", bytes([*range(7), 6, *[9] * 9]), 1, 9),
        ("top-k", bytes([*range(7), 9, *[9] * 9]), 1, 9),
    ],
)
def test_codes_that_cannot_be_are_refused(name: str, data: bytes, rows: int, classes: int) -> None:
    assert len(data) == codec.expected_size(name, rows, classes)
    with pytest.raises(Rejected, match="not_probs"):
        CODECS[name].decode(data, rows, classes)


@pytest.mark.parametrize("name", CODECS)
def test_decoding_costs_memory_by_rows_and_classes_only(name: str) -> None:
    rows, classes = 200, 100
    size = codec.expected_size(name, rows, classes)
    tracemalloc.start()
    try:
        harmless(name, bytes(size), rows, classes)
        harmless(name, np.random.default_rng(0).bytes(size), rows, classes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * rows * classes + (1 << 16)


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
