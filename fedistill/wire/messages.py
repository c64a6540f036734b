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
MOST_ROUNDS = 1 << 31


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
        if not self.count:
            return np.empty(0, dtype=np.int64)
        number, offset = divmod((self.round - 1) * self.count, self.total)
        first = self._pass(number)[offset : offset + self.count]
        if len(first) == self.count:
            return first
        return np.concatenate([first, self._pass(number + 1)[: self.count - len(first)]])

    def _pass(self, number: int) -> IntArray:
        """All rows in the order in which pass ``number`` deals them out.

        A round that takes the last rows of one pass and the first of the next must not get a row
        twice: rows among the former wait until that round is over. That moves rows among the
        first ``count`` of a pass only, so in long passes the last rows are known at once; in
        short ones the pass before decides on them, back to one that began together with a round.
        """
        start = number
        while (
            start
            and start * self.total % self.count
            and (start == number or self.total < 2 * self.count)
        ):
            start -= 1
        order = generator(self.seed, "proxy-pass", start).permutation(self.total)
        for later in range(start + 1, number + 1):
            shared = later * self.total % self.count
            last = order[self.total - shared :]
            order = generator(self.seed, "proxy-pass", later).permutation(self.total)
            head = np.flatnonzero(~np.isin(order, last))[: self.count - shared]
            order = np.concatenate([order[head], np.delete(order, head)])
        return order


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
    quorum: int = field(default=0, compare=False)
    """Fewest uploads that are of use: a backend waits for these above all. It does not travel."""

    def to_bytes(self) -> bytes:
        """The message as it travels."""
        header: dict[str, Any] = {
            "kind": "plan",
            "run": self.run,
            "round": self.round,
            "proxy": self.proxy,
            "classes": self.classes,
            "ask": _spec(self.ask),
        }
        payload = self.weights
        if self.targets is not None:
            header["targets"] = {
                "spec": _spec(self.targets.spec),
                "codec": self.targets.codec,
                "classes": self.targets.classes,
                "missing": list(self.targets.missing),
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
        _check_types(header, {"run": str, "round": int, "proxy": str, "classes": str})
        targets = _read_targets(header["targets"], payload) if "targets" in header else None
        number, ask = header["round"], _read_spec(header["ask"])
        if not 0 < number < MOST_ROUNDS or ask.round != number:
            raise Rejected("stale_round", "the plan names impossible or different rounds")
        if targets is not None and not 0 < targets.spec.round < number:
            raise Rejected("stale_round", "the targets are of no earlier round")
        return cls(
            run=header["run"],
            round=number,
            proxy=header["proxy"],
            classes=header["classes"],
            ask=ask,
            targets=targets,
            weights=b"" if targets else payload,
        )


UPLOAD_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "kind": str,
    "client": str,
    "run": str,
    "round": int,
    "proxy": str,
    "classes": str,
    "share": str,
    "codec": str,
    "temperature": float,
    "shape": list,
    "familiarity": bool,
    "seen": str,
    "size": int,
    "epsilon": (float, type(None)),
    "ledger": str,
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
        seen: the classes the client has met, as a bit mask in hexadecimal; 0 where the rule does
            not ask for it.
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
            if name == "temperature" and type(value) is int and abs(value) < 1 << 53:
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
    asked: int = 1
    """How often the plan was sent to it; 0 to one that could not be reached."""


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


def _read_spec(raw: Any) -> RowSpec:
    """Rows that can be drawn: of ``total`` at least one, and no more than there are."""
    names = {"seed": int, "round": int, "count": int, "total": int}
    _check_types(raw, names)
    _exact_keys(raw, set(names))
    spec = RowSpec(**raw)
    if spec.round < 1 or not 0 <= spec.count <= spec.total < 1 << 40 or not spec.total:
        raise Rejected("shape", "the rows of a round must be a part of the proxy rows")
    return spec


def _read_targets(raw: Any, payload: bytes) -> Targets:
    """Targets whose parts fit together; the payload is judged when it is decoded."""
    names = {"spec": dict, "codec": str, "classes": int, "missing": list}
    _check_types(raw, names)
    _exact_keys(raw, set(names))
    spec, missing = _read_spec(raw["spec"]), raw["missing"]
    if raw["codec"] not in codecs.CODECS:
        raise Rejected("codec", "the targets come in an unknown codec")
    if not 1 <= raw["classes"] < 1 << 20 or not (
        all(type(row) is int and 0 <= row < spec.count for row in missing)
        and len(set(missing)) == len(missing)
    ):
        raise Rejected("shape", "the targets name rows or classes that cannot be")
    return Targets(
        spec=spec,
        codec=raw["codec"],
        classes=raw["classes"],
        missing=tuple(missing),
        payload=payload,
    )


def _check_types(header: Any, names: Mapping[str, type]) -> None:
    """Refuse what is no table, or holds one of these names with a value of another type."""
    if not isinstance(header, dict):
        raise Rejected("field", "expected a table")
    for name, kind in names.items():
        if type(header.get(name)) is not kind:
            raise Rejected("field", f"field {name} has the wrong type")


def _exact_keys(header: Mapping[str, Any], expected: set[str]) -> None:
    if extra := sorted(set(header) - expected):
        raise Rejected("fields", f"unexpected field, e.g. {extra[0][:40]!r}")
    if missing := sorted(expected - set(header)):
        raise Rejected("fields", f"missing field, e.g. {missing[0]}")
