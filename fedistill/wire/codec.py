"""Codecs: probabilities to bytes and back.

A codec sees ``probs [rows, classes]`` and returns bytes before compression; :func:`pack` adds
zlib. What a row lost in a codec is measured by KL(sent || decoded) in nats. One set of
probabilities carries the logits (up to a constant per row), so a receiver may still apply any
temperature: that is why the default keeps the tail, as log-probabilities, and not the head.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.errors import Rejected
from fedistill.types import FloatArray, Probs

LOWEST = 12.0
"""Log-probabilities below minus this are sent as minus this (a probability of 6e-6)."""


@dataclass(frozen=True)
class Codec:
    """A pair of functions, the bytes that a value takes, and one line that says what it is."""

    summary: str
    encode: Callable[[Probs], bytes]
    decode: Callable[[bytes, int, int], Probs]
    bytes_per_value: float


def _floats(dtype: str) -> tuple[Callable[[Probs], bytes], Callable[[bytes, int, int], Probs]]:
    def encode(probs: Probs) -> bytes:
        return np.ascontiguousarray(probs, dtype=dtype).tobytes()

    def decode(data: bytes, rows: int, classes: int) -> Probs:
        return np.frombuffer(data, dtype=dtype).reshape(rows, classes).astype(np.float32)

    return encode, decode


def _encode_u8(probs: Probs) -> bytes:
    logs = np.log(np.maximum(probs, np.exp(-LOWEST)))
    codes = np.rint(logs * (-255.0 / LOWEST)).clip(0, 255).astype(np.uint8)
    return bytes(codes.tobytes())


def _decode_u8(data: bytes, rows: int, classes: int) -> Probs:
    codes = np.frombuffer(data, dtype=np.uint8).reshape(rows, classes)
    values = np.exp(codes * (-LOWEST / 255.0))
    probs: Probs = values / values.sum(axis=1, keepdims=True)
    return probs.astype(np.float32)


CODECS: Mapping[str, Codec] = {
    "float32": Codec("four bytes a value, exact", *_floats("<f4"), 4),
    "float16": Codec("two bytes a value; probabilities below 3e-8 become 0", *_floats("<f2"), 2),
    "u8": Codec(
        "one byte a value: log-probability in [-12, 0] in steps of 0.047",
        _encode_u8,
        _decode_u8,
        1,
    ),
}


def encode_familiarity(ratios: FloatArray) -> bytes:
    """Log density ratios ``[rows]`` as one byte each, clamped to the limit, step 0.063."""
    limited = np.clip(ratios, -FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)
    codes = np.rint((limited + FAMILIARITY_LIMIT) * (255 / (2 * FAMILIARITY_LIMIT)))
    return bytes(codes.astype(np.uint8).tobytes())


def decode_familiarity(data: bytes) -> FloatArray:
    """The inverse of :func:`encode_familiarity`, float32 ``[rows]``."""
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.float32)
    return codes * np.float32(2 * FAMILIARITY_LIMIT / 255) - np.float32(FAMILIARITY_LIMIT)


def expected_size(codec: str, rows: int, classes: int, familiarity: bool = False) -> int:
    """Bytes of a payload before compression, known from the header alone."""
    return int(CODECS[codec].bytes_per_value * rows * classes) + (rows if familiarity else 0)


def pack(data: bytes) -> bytes:
    """Compress."""
    return zlib.compress(data, 6)


def unpack(data: bytes, size: int) -> bytes:
    """Decompress to exactly ``size`` bytes and never more: a bomb is refused before it unfolds.

    Raises:
        Rejected: ``truncated`` or ``shape``, when the content is shorter or longer.
    """
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, size + 1)
    except zlib.error:
        raise Rejected("truncated", "the payload does not decompress") from None
    if len(content) != size or stream.unconsumed_tail or stream.unused_data:
        raise Rejected("shape", f"the payload must unfold to {size} bytes and does not")
    if not stream.eof:
        raise Rejected("truncated", "the payload ends early")
    return content


def kl(sent: Probs, received: Probs) -> float:
    """Mean over rows of KL(sent || received) in nats; what a codec lost."""
    p = np.maximum(np.asarray(sent, dtype=np.float64), 1e-30)
    q = np.maximum(np.asarray(received, dtype=np.float64), 1e-30)
    return float((p * (np.log(p) - np.log(q))).sum(axis=1).mean())
