"""What travels: one plan down, one upload up, each a header and a payload.

The header is a whitelist: a field that is not named here cannot be sent, and a header with any
other key is refused. How a message is put together: :mod:`fedistill.wire.envelope`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fedistill.errors import Rejected
from fedistill.types import FloatArray, IntArray, Probs
from fedistill.wire import codec as codecs
from fedistill.wire.delta import delta_decode, restore
from fedistill.wire.envelope import (
    Mask,
    check_types,
    count_bits,
    exact_keys,
    join,
    seal,
    split,
    unpack_mask,
    unseal,
)
from fedistill.wire.grid import Codes
from fedistill.wire.rows import RowSpec as RowSpec
from fedistill.wire.rows import read_spec, spec_fields
from fedistill.wire.table import Table
from fedistill.wire.targets import Targets as Targets

MOST_ROUNDS = 1 << 31
OPTIONAL: Mapping[str, type] = {
    "extra": int,
    "consolidate": bool,
    "watch": bool,
    "mechanism": str,
    "purpose": str,
    "receipt": str,
}
"""Fields of a plan that are there only where rows change and drift is watched for, or where what
clients share is private."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the server asks of the clients in one round, with the last round's soft targets.

    Attributes:
        run: which run.
        round: which round, from 1.
        ask: the rows of the round.
        proxy: fingerprint of the proxy set.
        classes: fingerprint of the class names in order.
        skip: a bit for each row of ``ask``: its target is fresh enough, it is not asked.
        heard: the last round of which the receiver's upload was let in; 0: of none. Both sides
            hold those predictions, and what is sent may be told as a change of them.
        targets: soft targets to learn from.
        table: what a method exchanges that shares no predictions on proxy rows.
        clients: who is asked. The server's own note: it does not travel.
        quorum: fewest uploads that are of use: a backend waits for these above all. It does not
            travel.
        own: by client, the fields in which its message differs. Does not travel as such.
        extra: rounds of distillation up to this one, which are none of the regular ones.
        consolidate: this is such a round: clients learn from the targets and from what they
            remember, and from no row of the day.
        watch: clients tell whether their new rows set off an alarm.
        mechanism: how what is shared is made private, as all agreed; empty: not at all.
        purpose: what the run is for, as all agreed.
        receipt: head of the receiver's privacy ledger as it was last heard here.
    """

    run: str
    round: int
    ask: RowSpec
    proxy: str
    classes: str
    skip: bytes = b""
    heard: int = 0
    targets: Targets | None = None
    table: Table | None = None
    clients: tuple[str, ...] = field(default=(), compare=False)
    quorum: int = field(default=0, compare=False)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    extra: int = 0
    consolidate: bool = False
    watch: bool = False
    mechanism: str = ""
    purpose: str = ""
    receipt: str = ""

    def rows(self) -> IntArray:
        """The proxy rows to predict, in the order of the upload."""
        rows: IntArray = self.ask.rows()[~unpack_mask(self.skip, self.ask.count)]
        return rows

    def count(self) -> int:
        """How many rows are to be predicted."""
        return self.ask.count - count_bits(self.skip, self.ask.count)

    def message(self, client: str) -> bytes:
        """The message to one client, as it travels."""
        own = self.own.get(client)
        return (dataclasses.replace(self, **own) if own else self).to_bytes()

    def to_bytes(self) -> bytes:
        """The message to a client that is told nothing of its own."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        """Built once, for all who are asked and for whoever weighs it."""
        header: dict[str, Any] = {
            "kind": "plan",
            "run": self.run,
            "round": self.round,
            "proxy": self.proxy,
            "classes": self.classes,
            "ask": spec_fields(self.ask),
            "heard": self.heard,
        }
        header |= {n: getattr(self, n) for n in OPTIONAL if getattr(self, n)}
        parts = [self.skip]
        if self.targets is not None:
            header["targets"] = self.targets.header()
            parts += self.targets.parts()
        if self.table is not None:
            header["table"] = list(self.table.shape)
            parts += self.table.parts()
        header["parts"], payload = join(parts)
        return seal(header, payload)

    @classmethod
    def from_bytes(cls, data: bytes, limit: int = 64 << 20) -> Plan:
        """Read a plan, or raise :class:`Rejected`."""
        header, payload = unseal(data, limit)
        optional = {name for name in ("targets", "table", *OPTIONAL) if name in header}
        names = {"run": str, "round": int, "proxy": str, "classes": str, "heard": int}
        exact_keys(header, {"kind", "ask", "parts", *names} | optional)
        if header["kind"] != "plan":
            raise Rejected("kind", "expected a plan")
        there = {name: OPTIONAL[name] for name in OPTIONAL if name in header}
        check_types(header, names | there)
        number, ask = header["round"], read_spec(header["ask"])
        if not 0 < number < MOST_ROUNDS or ask.round > number:
            raise Rejected("stale_round", "the plan names impossible rounds")
        if not 0 <= header["heard"] < number:
            raise Rejected("stale_round", "the plan has heard of no earlier round")
        if not 0 <= header.get("extra", 0) < number:
            raise Rejected("stale_round", "the plan counts impossible extra rounds")
        count = 1 + 4 * ("targets" in header) + 2 * ("table" in header)
        skip, *parts = split(payload, header["parts"], count)
        count_bits(skip, ask.count)
        targets = Targets.read_header(header["targets"], parts[:4]) if "targets" in header else None
        if targets is not None and not (
            targets.spec.round <= targets.round and 0 < targets.round < number
        ):
            raise Rejected("stale_round", "the targets are of no earlier round")
        return cls(
            run=header["run"],
            round=number,
            proxy=header["proxy"],
            classes=header["classes"],
            ask=ask,
            skip=skip,
            heard=header["heard"],
            targets=targets,
            table=Table.read(header["table"], parts[-2:]) if "table" in header else None,
            **{name: header[name] for name in there},
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
    "parts": list,
}
"""The whitelist (invariant 1): nothing else can be in an upload's header.

But for ``drift``, a bool: it is there where the plan asks for it, only.
"""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A client's answer: predictions on proxy rows and what is needed to combine them.

    Attributes:
        client: who answers.
        run: which run.
        round: which round, from 1.
        proxy: fingerprint of the proxy set the predictions were made on.
        classes: fingerprint of the class names in order.
        share: ``probs`` (predictions), ``none`` (a client without rows of its own) or the name
            of another exchange (refused unless the server runs that).
        codec: name of the codec.
        temperature: of the softmax before coding; 1.
        shape: rows and classes of the predictions, the rows that the client answers.
        familiarity: whether one byte a row of log density ratio follows the predictions.
        seen: the classes the client has met, as a bit mask in hexadecimal; 0 where the rule does
            not ask for it.
        size: number of own rows, rounded to a power of two; 0 for none.
        epsilon: privacy spent so far; None means no differential privacy.
        ledger: head of the client's privacy ledger, empty without one.
        payload: the coded predictions, compressed.
        declined: a bit for each row asked: the client does not answer it.
        ratios: the familiarity, compressed.
        drift: whether new rows set off the client's detector; None where it was not asked.
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
    declined: bytes = b""
    ratios: bytes = b""
    drift: bool | None = None

    def to_bytes(self) -> bytes:
        """The message as it travels."""
        lengths, payload = join([self.payload, self.declined, self.ratios])
        header: dict[str, Any] = {"kind": "upload"}
        header |= {n: getattr(self, n) for n in UPLOAD_FIELDS if n not in {"kind", "parts"}}
        header |= {} if self.drift is None else {"drift": self.drift}
        return seal(header | {"shape": list(self.shape), "parts": lengths}, payload)

    @classmethod
    def from_bytes(cls, data: bytes, limit: int = 64 << 20) -> Upload:
        """Read an upload; the header's keys and types are checked here, its values at the door.

        Raises:
            Rejected: with the reason code.
        """
        header, payload = unseal(data, limit)
        drift = None
        if "drift" in header and type(drift := header.pop("drift")) is not bool:
            raise Rejected("field", "field drift has the wrong type")
        exact_keys(header, set(UPLOAD_FIELDS))
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
        parts = split(payload, header["parts"], 3)
        fields = {n: header[n] for n in UPLOAD_FIELDS if n not in {"kind", "parts"}}
        fields |= {"shape": (shape[0], shape[1]), "drift": drift}
        return cls(**fields, payload=parts[0], declined=parts[1], ratios=parts[2])

    def codes(self, reference: Codes | None = None) -> Codes:
        """Codes of the answered rows, given those that both sides hold of them."""
        return delta_decode(self.codec, self.payload, *self.shape, reference)

    def decode(self, reference: Codes | None = None) -> tuple[Probs, FloatArray | None]:
        """Predictions ``[rows, classes]`` and familiarity ``[rows]`` or None, of answered rows."""
        probs = restore(self.codec, self.codes(reference), self.shape[1])
        return probs, self.read_familiarity()

    def read_familiarity(self) -> FloatArray | None:
        """Log density ratios of the answered rows ``[rows]``, or None."""
        if not self.familiarity:
            if self.ratios:
                raise Rejected("shape", "familiarity that was not announced")
            return None
        return codecs.decode_familiarity(codecs.unpack(self.ratios, self.shape[0]))

    def answered(self, asked: int) -> Mask:
        """Which of the rows asked are answered, bool ``[asked]``."""
        return ~unpack_mask(self.declined, asked)

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
