"""The envelope of every message: a header that is a whitelist, a payload, a checksum.

``magic, version, length of header, header (JSON), payload, sha256``. Sizes are checked from the
header before anything is unfolded.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.errors import Rejected

MAGIC = b"FDst"
VERSION = 2
CHECKSUM = 16
MAX_HEADER = 64 * 1024
Mask = npt.NDArray[np.bool_]


def seal(header: Mapping[str, Any], payload: bytes) -> bytes:
    """Header and payload as one message with a checksum at its end."""
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    body = MAGIC + struct.pack("<HI", VERSION, len(text)) + text + payload
    return body + hashlib.sha256(body).digest()[:CHECKSUM]


def unseal(data: bytes, limit: int) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a message.

    Raises:
        Rejected: ``too_large``, ``truncated``, ``format`` or ``version``.
    """
    if len(data) > limit:
        raise Rejected("too_large", f"{len(data)} bytes, at most {limit} are accepted")
    start = len(MAGIC) + 6
    if len(data) < start + CHECKSUM:
        raise Rejected("truncated", "shorter than the smallest message")
    if data[: len(MAGIC)] != MAGIC:
        raise Rejected("format", "not a fedistill message")
    version, length = struct.unpack("<HI", data[len(MAGIC) : start])
    if version != VERSION:
        raise Rejected("version", f"message version {version}, this side speaks {VERSION}")
    body = data[:-CHECKSUM]
    if hashlib.sha256(body).digest()[:CHECKSUM] != data[-CHECKSUM:]:
        raise Rejected("truncated", "the checksum does not hold")
    if length > min(MAX_HEADER, len(body) - start):
        raise Rejected("format", "the header does not fit")
    try:
        header = json.loads(body[start : start + length])
    except (ValueError, RecursionError):
        raise Rejected("format", "the header is not JSON") from None
    if not isinstance(header, dict):
        raise Rejected("format", "the header is not a table")
    return header, body[start + length :]


def join(parts: Sequence[bytes]) -> tuple[list[int], bytes]:
    """Parts one behind the other, and the length of each."""
    return [len(part) for part in parts], b"".join(parts)


def split(payload: bytes, lengths: Any, count: int) -> list[bytes]:
    """The inverse of :func:`join`.

    Raises:
        Rejected: ``format``: the lengths are no ``count`` numbers that add up to the payload.
    """
    if (
        not isinstance(lengths, list)
        or len(lengths) != count
        or not all(type(length) is int and length >= 0 for length in lengths)
        or sum(lengths) != len(payload)
    ):
        raise Rejected("format", "the parts do not add up to the payload")
    parts, start = [], 0
    for length in lengths:
        parts.append(payload[start : start + length])
        start += length
    return parts


def pack_mask(mask: Mask) -> bytes:
    """A bit for each row; nothing at all where no bit is set."""
    return np.packbits(mask).tobytes() if mask.any() else b""


def unpack_mask(data: bytes, rows: int) -> Mask:
    """The inverse of :func:`pack_mask`, bool ``[rows]``.

    Raises:
        Rejected: ``shape``: not a bit for each row.
    """
    if not data:
        return np.zeros(rows, dtype=bool)
    count_bits(data, rows)
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8))[:rows].astype(bool)


def count_bits(data: bytes, rows: int) -> int:
    """How many bits are set; takes no memory for an empty mask, whatever ``rows`` claims.

    Raises:
        Rejected: ``shape``: not a bit for each row.
    """
    if not data:
        return 0
    spare = -rows % 8
    if len(data) != -(-rows // 8) or data[-1] & ((1 << spare) - 1):
        raise Rejected("shape", "a mask must have a bit for each row")
    return int.from_bytes(data, "big").bit_count()


def check_types(header: Any, names: Mapping[str, type]) -> None:
    """Refuse what is no table, or holds one of these names with a value of another type."""
    if not isinstance(header, dict):
        raise Rejected("field", "expected a table")
    for name, kind in names.items():
        if type(header.get(name)) is not kind:
            raise Rejected("field", f"field {name} has the wrong type")


def exact_keys(header: Mapping[str, Any], expected: set[str]) -> None:
    """Refuse a table with other names than these."""
    if extra := sorted(set(header) - expected):
        raise Rejected("fields", f"unexpected field, e.g. {extra[0][:40]!r}")
    if missing := sorted(expected - set(header)):
        raise Rejected("fields", f"missing field, e.g. {missing[0]}")
