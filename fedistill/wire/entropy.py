"""Entropy coding: content of a known size made small, and unfolded without trusting it.

Two general coders of the standard library, tried side by side, and no coder of our own: zlib,
and LZMA without its container, which is an adaptive range coder. Content that is mostly zeros is
first split into a bit for each byte and the bytes that are not zero. On codes that
:mod:`fedistill.wire.simplex` and :mod:`fedistill.wire.delta` have sorted by what both sides know
that takes 15 to 40 % off the best that zlib makes of the same codes row by row or bit by bit, on
predictions of models (``benchmarks/codecs.py``). An ideal coder that adapts to the same contexts
would take off up to a quarter again at two bits and a seventh at three or four; at five bits and
more ours is the smaller.
"""

from __future__ import annotations

import lzma
import zlib

import numpy as np

from fedistill.errors import Rejected

RANGE_CODED, SPLIT = b"L", b"S"
"""First bytes of content that is not zlib's, which begins with ``x``."""
FILTERS = [
    {
        "id": lzma.FILTER_LZMA1,
        "dict_size": 1 << 16,
        "lc": 0,
        "lp": 0,
        "pb": 0,
        "mode": lzma.MODE_NORMAL,
        "mf": lzma.MF_BT4,
        "nice_len": 64,
    }
]
"""Fixed on both sides, so that no payload can ask for a larger dictionary."""
LONGEST = 1 << 18
"""Bytes beyond which the range coder is not tried: it takes 0.3 s for a megabyte of codes."""


def pack(data: bytes, *, hard: bool = False) -> bytes:
    """Compress: zlib, and where that takes a quarter off, the smallest of what there is.

    Args:
        data: the content.
        hard: try everything in any case.
    """
    plain = zlib.compress(data, 6)
    if not hard and 4 * len(plain) > 3 * len(data):
        return plain
    mostly_zeros = 2 * data.count(0) > len(data)
    return min(plain, _split(data) if mostly_zeros else _coded(data), key=len)


def _coded(data: bytes) -> bytes:
    """The smallest form of bytes as they are."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    forms = [zlib.compress(data, 6), packer.compress(data) + packer.flush()]
    if len(data) <= LONGEST:
        packed = lzma.compress(data, format=lzma.FORMAT_RAW, filters=FILTERS)
        forms.append(RANGE_CODED + packed)
    return min(forms, key=len)


def _split(data: bytes) -> bytes:
    """A bit for each byte, and the bytes that are not zero: ``S``, length of the first, both.

    Bits behind the last byte are ones, so that no other size fits the number of values.
    """
    values = np.frombuffer(data, dtype=np.uint8)
    places = np.ones(8 * _octets(len(data)), dtype=bool)
    places[: len(data)] = values != 0
    bits = _coded(np.packbits(places).tobytes())
    return SPLIT + len(bits).to_bytes(4, "little") + bits + _coded(values[values != 0].tobytes())


def _octets(size: int) -> int:
    return -(-size // 8)


def unpack(data: bytes, size: int) -> bytes:
    """Decompress to exactly ``size`` bytes and never more: a bomb is refused before it unfolds.

    Raises:
        Rejected: ``truncated`` or ``shape``, when the content is shorter or longer.
    """
    return _joined(data, size) if data[:1] == SPLIT else _decoded(data, size)


def _decoded(data: bytes, size: int) -> bytes:
    stream: lzma.LZMADecompressor | zlib._Decompress
    try:
        if data[:1] == RANGE_CODED:
            stream = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=FILTERS)
            content, unread = stream.decompress(data[1:], max_length=size + 1), b""
        else:
            stream = zlib.decompressobj()
            content = stream.decompress(data, size + 1)
            unread = stream.unconsumed_tail
    except (zlib.error, lzma.LZMAError):
        raise Rejected("truncated", "the payload does not decompress") from None
    if len(content) != size or unread or stream.unused_data:
        raise Rejected("shape", f"the payload must unfold to {size} bytes and does not")
    if not stream.eof:
        raise Rejected("truncated", "the payload ends early")
    return content


def _joined(data: bytes, size: int) -> bytes:
    split = 5 + int.from_bytes(data[1:5], "little")
    if len(data) < split:
        raise Rejected("truncated", "the payload ends early")
    bits = np.frombuffer(_decoded(data[5:split], _octets(size)), dtype=np.uint8)
    places = np.unpackbits(bits).astype(bool)
    if not places[size:].all():
        raise Rejected("shape", f"the payload must unfold to {size} bytes and does not")
    found = _decoded(data[split:], int(places[:size].sum()))
    if b"\0" in found:
        raise Rejected("shape", "a zero among what is not zero")
    content = np.zeros(size, dtype=np.uint8)
    content[places[:size]] = np.frombuffer(found, dtype=np.uint8)
    return content.tobytes()
