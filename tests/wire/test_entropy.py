"""Entropy coding brings everything back, and unfolds nothing that it was not promised."""

from __future__ import annotations

import lzma
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.errors import Rejected
from fedistill.wire.entropy import FILTERS, RANGE_CODED, SPLIT, pack, unpack

RANDOM = np.random.default_rng(0)
CONTENT = {
    "nothing": b"",
    "one zero": b"\0",
    "zeros": bytes(100_000),
    "few": (RANDOM.random(5000) < 0.02).astype(np.uint8).tobytes(),
    "skewed": RANDOM.geometric(0.3, 5000).astype(np.uint8).tobytes(),
    "drifting": (RANDOM.geometric(0.3, 5000) + np.arange(5000) // 50).astype(np.uint8).tobytes(),
    "random": RANDOM.bytes(3000),
}
FORMS = {pack(content, hard=True)[:1] for content in CONTENT.values()}


def test_the_examples_take_every_form() -> None:
    assert {b"x", RANGE_CODED, SPLIT} == FORMS


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("content", CONTENT.values(), ids=CONTENT.keys())
def test_what_was_packed_comes_back(content: bytes, hard: bool) -> None:
    packed = pack(content, hard=hard)
    assert len(packed) <= len(zlib.compress(content, 6))
    assert unpack(packed, len(content)) == content


@given(st.binary(max_size=300), st.floats(0, 1), st.booleans())
@settings(deadline=None)
def test_packing_is_undone(data: bytes, zeros: float, hard: bool) -> None:
    content = bytes(len(data) - int(zeros * len(data))) + data[: int(zeros * len(data))]
    assert unpack(pack(content, hard=hard), len(content)) == content


def test_what_hardly_compresses_stays_as_zlib_makes_it() -> None:
    content = CONTENT["random"]
    assert pack(content) == zlib.compress(content, 6)


def refused(data: bytes, size: int) -> bool:
    try:
        content = unpack(data, size)
    except Rejected as refusal:
        assert refusal.reason in {"truncated", "shape"}  # noqa: PT017
        return True
    assert len(content) == size
    return False


@pytest.mark.parametrize("content", CONTENT.values(), ids=CONTENT.keys())
def test_cut_lengthened_or_of_another_size_it_is_refused(content: bytes) -> None:
    packed = pack(content, hard=True)
    for end in range(0, len(packed), max(1, len(packed) // 40)):
        assert refused(packed[:end], len(content))
    assert refused(packed + b"x", len(content))
    assert refused(packed, len(content) + 1)
    if content:
        assert refused(packed, len(content) - 1)
        assert refused(packed, len(content) // 2)


@given(
    st.sampled_from([b"", b"x", b"x\x9c", RANGE_CODED, SPLIT, SPLIT + b"\4\0\0\0"]),
    st.binary(max_size=200),
    st.integers(0, 400),
)
@settings(deadline=None, max_examples=300)
def test_any_bytes_unfold_to_what_was_said_or_are_refused(
    head: bytes, tail: bytes, size: int
) -> None:
    refused(head + tail, size)


@given(st.sampled_from([*CONTENT]), st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_a_changed_bit_is_refused_or_makes_other_content(name: str, seed: int) -> None:
    packed = bytearray(pack(CONTENT[name], hard=True))
    random = np.random.default_rng(seed)
    packed[int(random.integers(len(packed)))] ^= 1 << int(random.integers(8))
    refused(bytes(packed), len(CONTENT[name]))


def raw(content: bytes) -> bytes:
    return RANGE_CODED + lzma.compress(content, format=lzma.FORMAT_RAW, filters=FILTERS)


def test_bombs_of_every_form_are_refused_before_they_unfold() -> None:
    zeros = bytes(50 << 20)
    thin = raw(zeros)
    many = zlib.compress(b"\xff" * (1 << 20))
    bombs = [
        thin,
        SPLIT + len(thin).to_bytes(4, "little") + thin + zlib.compress(b""),
        SPLIT + len(many).to_bytes(4, "little") + many + thin,
        SPLIT + b"\xff\xff\xff\xff" + many,
    ]
    del zeros
    for bomb in bombs:
        tracemalloc.start()
        try:
            assert refused(bomb, 30_000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 << 20


def test_a_split_must_be_the_one_that_packing_makes() -> None:
    """Bits behind the end missing, zeros among what is not zero, values that no bit announces."""

    def split(bits: bytes, values: bytes) -> bytes:
        first = zlib.compress(bits)
        return SPLIT + len(first).to_bytes(4, "little") + first + zlib.compress(values)

    assert unpack(split(b"\x87", b"\x07"), 5) == b"\x07\0\0\0\0"
    for bits, values in (
        (b"\x84", b"\7\7"),
        (b"\x80", b"\0"),
        (b"\x80", b"\7\7"),
        (b"\xc0", b"\7"),
    ):
        with pytest.raises(Rejected, match="shape"):
            unpack(split(bits, values), 5)
