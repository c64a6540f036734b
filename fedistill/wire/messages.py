"""What travels: one plan down, one upload up, each a header and a payload.

A message is ``magic, version, length of header, header (JSON), payload, sha256``. The header is a
whitelist: a field that is not named here cannot be sent, and a header with any other key is
refused. Sizes are checked from the header before anything is unfolded.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedistill.errors import Rejected
from fedistill.seeding import generator
from fedistill.types import FloatArray, IntArray, Probs
from fedistill.wire import codec as codecs

MAGIC = b"FDst"
VERSION = 1
CHECKSUM = 16
MAX_HEADER = 64 * 1024


@dataclass(frozen=True)
class RowSpec:
    """A set of proxy rows that costs a few bytes: it is drawn from a seed, not listed.

    Rows are drawn in passes: every pass deals out all proxy rows once, in an order of its own, so
    that no row waits long for its first soft target.
    """

    seed: int
    round: int
    count: int
    total: int

    def rows(self) -> IntArray:
        """The row numbers, ``[count]``; those of one round are distinct."""
        start = (self.round - 1) * self.count
        chosen: list[IntArray] = []
        missing = self.count
        while missing:
            number, offset = divmod(start, self.total)
            order = generator(self.seed, "proxy-pass", number).permutation(self.total)
            if chosen:
                order = order[~np.isin(order, chosen[0])]
            part = order[offset : offset + missing] if not chosen else order[:missing]
            chosen.append(part)
            missing -= len(part)
            start += len(part)
        return np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Soft targets on the rows of one round, coded; ``answered`` leaves out rows without any."""

    spec: RowSpec
    codec: str
    classes: int
    payload: bytes
    missing: tuple[int, ...] = ()

    def probs(self) -> Probs:
        """Decoded targets of the answered rows, ``[rows, classes]``."""
        rows = self.spec.count - len(self.missing)
        size = codecs.expected_size(self.codec, rows, self.classes)
        return codecs.CODECS[self.codec].decode(
            codecs.unpack(self.payload, size), rows, self.classes
        )

    def rows(self) -> IntArray:
        """Proxy row numbers of the answered rows, in the order of :meth:`probs`."""
        return np.delete(self.spec.rows(), np.asarray(self.missing, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the server asks of the clients in one round, with the last round's soft targets."""

    run: str
    round: int
    ask: RowSpec
    proxy: str
    classes: str
    targets: Targets | None = None
    weights: bytes = b""
    clients: tuple[str, ...] = field(default=(), compare=False)
    """Who is asked. The server's own note: it does not travel."""

    def to_bytes(self) -> bytes:
        """The message as it travels."""
        header: dict[str, Any] = {
            "kind": "plan", "run": self.run, "round": self.round, "proxy": self.proxy,
            "classes": self.classes, "ask": _spec(self.ask),
        }
        payload = self.weights
        if self.targets is not None:
            header["targets"] = {
                "spec": _spec(self.targets.spec), "codec": self.targets.codec,
                "classes": self.targets.classes, "missing": list(self.targets.missing),
            }
            payload = self.targets.payload
        return seal(header, payload)

    @classmethod
    def from_bytes(cls, data: bytes, limit: int = 64 << 20) -> Plan:
        """Read a plan, or raise :class:`Rejected`."""
        header, payload = unseal(data, limit)
        keys = {"kind", "run", "round", "proxy", "classes", "ask"}
        _exact_keys(header, keys | ({"targets"} if "targets" in header else set()))
        if header["kind"] != "plan":
            raise Rejected("kind", "expected a plan")
        targets = None
        if "targets" in header:
            told = header["targets"]
            targets = Targets(
                spec=RowSpec(**told["spec"]), codec=told["codec"], classes=told["classes"],
                missing=tuple(told["missing"]), payload=payload,
            )
        return cls(
            run=header["run"], round=header["round"], proxy=header["proxy"],
            classes=header["classes"], ask=RowSpec(**header["ask"]), targets=targets,
            weights=b"" if targets else payload,
        )


UPLOAD_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "kind": str, "client": str, "run": str, "round": int, "proxy": str, "classes": str,
    "share": str, "codec": str, "temperature": float, "shape": list, "familiarity": bool,
    "seen": str, "size": int, "epsilon": (float, type(None)), "ledger": str,
}
"""The whitelist (invariant 1): nothing else can be in an upload's header."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A client's answer: predictions on proxy rows and what is needed to combine them.

    Attributes:
        client: who answers.
        run: which run.
        round: which round, from 1.
        proxy: fingerprint of the proxy set the predictions were made on.
        classes: fingerprint of the class names in order.
        share: ``probs`` (predictions), ``none`` (a client without rows of its own) or
            ``weights`` (the FedAvg baseline only; refused unless the server runs that).
        codec: name of the codec.
        temperature: of the softmax before coding; 1.
        shape: rows and classes of the predictions.
        familiarity: whether one byte a row of log density ratio follows the predictions.
        seen: the classes the client has met, as a bit mask in hexadecimal.
        size: number of own rows, rounded to a power of two; 0 for none.
        epsilon: privacy spent so far; None means no differential privacy.
        ledger: head of the client's privacy ledger, empty without one.
        payload: the coded predictions, then the familiarity, compressed.
    """

    client: str
    run: str
    round: int
    proxy: str
    classes: str
    share: str = "probs"
    codec: str = "u8"
    temperature: float = 1.0
    shape: tuple[int, int] = (0, 0)
    familiarity: bool = False
    seen: str = "0"
    size: int = 0
    epsilon: float | None = None
    ledger: str = ""
    payload: bytes = b""

    def to_bytes(self) -> bytes:
        """The message as it travels."""
        header: dict[str, Any] = {"kind": "upload"}
        header |= {name: getattr(self, name) for name in UPLOAD_FIELDS if name != "kind"}
        return seal(header | {"shape": list(self.shape)}, self.payload)

    @classmethod
    def from_bytes(cls, data: bytes, limit: int = 64 << 20) -> Upload:
        """Read an upload; the header's keys and types are checked here, its values at the door.

        Raises:
            Rejected: with the reason code.
        """
        header, payload = unseal(data, limit)
        _exact_keys(header, set(UPLOAD_FIELDS))
        for name, kind in UPLOAD_FIELDS.items():
            value = header[name]
            if name == "temperature" and type(value) is int:
                value = float(value)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                reason = "size" if name == "size" else "field"
                raise Rejected(reason, f"field {name} has the wrong type")
            if isinstance(value, str) and len(value) > 256:
                raise Rejected("field", f"field {name} is longer than 256 characters")
        if header["kind"] != "upload":
            raise Rejected("kind", "expected an upload")
        shape = header["shape"]
        if len(shape) != 2 or not all(type(side) is int and side >= 0 for side in shape):
            raise Rejected("shape", "expected two counts, rows and classes")
        fields = {name: header[name] for name in UPLOAD_FIELDS if name != "kind"}
        return cls(**(fields | {"shape": (shape[0], shape[1])}), payload=payload)

    def decode(self) -> tuple[Probs, FloatArray | None]:
        """Predictions ``[rows, classes]`` and familiarity ``[rows]`` or None."""
        rows, classes = self.shape
        size = codecs.expected_size(self.codec, rows, classes)
        whole = codecs.expected_size(self.codec, rows, classes, self.familiarity)
        content = codecs.unpack(self.payload, whole)
        probs = codecs.CODECS[self.codec].decode(content[:size], rows, classes)
        return probs, codecs.decode_familiarity(content[size:]) if self.familiarity else None

    def seen_classes(self, classes: int) -> IntArray:
        """The bit mask as booleans ``[classes]``."""
        mask = int(self.seen, 16)
        return np.array([mask >> c & 1 for c in range(classes)], dtype=bool)


@dataclass(frozen=True)
class Failure:
    """A client that did not answer; ``reason`` is a short code."""

    client: str
    round: int
    reason: str


def bucket(count: int) -> int:
    """A count rounded to a power of two, so that the exact number of rows stays at the site.

    >>> [bucket(n) for n in (0, 1, 20, 2006)]
    [0, 1, 16, 2048]
    """
    return 0 if count <= 0 else 1 << round(float(np.log2(count)))


def seen_mask(seen: Any) -> str:
    """Booleans ``[classes]`` as a bit mask in hexadecimal."""
    return format(sum(1 << c for c, met in enumerate(seen) if met), "x")


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


def _spec(spec: RowSpec) -> dict[str, int]:
    return {"seed": spec.seed, "round": spec.round, "count": spec.count, "total": spec.total}


def _exact_keys(header: Mapping[str, Any], expected: set[str]) -> None:
    if extra := sorted(set(header) - expected):
        raise Rejected("fields", f"unexpected field, e.g. {extra[0][:40]!r}")
    if missing := sorted(expected - set(header)):
        raise Rejected("fields", f"missing field, e.g. {missing[0]}")
