"""Soft targets as they travel: those of one round's rows, whole or as what a client lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedistill.errors import Rejected
from fedistill.types import IntArray, Probs
from fedistill.wire import codec as codecs
from fedistill.wire.delta import delta_decode, restore
from fedistill.wire.envelope import (
    check_types,
    count_bits,
    exact_keys,
    unpack_mask,
)
from fedistill.wire.grid import Codes
from fedistill.wire.rows import RowSpec, read_spec, spec_fields
from fedistill.wire.shelf import Shelf, mark

MOST_CHOICES = 64


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The soft targets of one round, coded for one receiver or for all.

    Attributes:
        round: in which they were combined.
        spec: the rows of that round.
        codec: of the values.
        classes: number of classes.
        choices: targets a row, of which each client takes one.
        mark: checksum of rows and codes, where a receiver is relied on to hold some of them.
        missing: a bit for each row of ``spec``: it has no target.
        held: a bit for each row with a target: the receiver holds it already.
        based: a bit for each row with a target: it is told as a change of what the receiver holds.
        payload: coded targets of the rows that are not held.
    """

    round: int
    spec: RowSpec
    codec: str
    classes: int
    payload: bytes
    choices: int = 1
    mark: str = ""
    missing: bytes = b""
    held: bytes = b""
    based: bytes = b""

    def rows(self) -> IntArray:
        """Proxy row numbers with a target, in the order of the codes."""
        rows: IntArray = self.spec.rows()[~unpack_mask(self.missing, self.spec.count)]
        return rows

    def read(self, shelf: Shelf | None = None) -> tuple[IntArray, Codes]:
        """Rows and codes ``[rows * choices, columns]``; the shelf is left as it is.

        Args:
            shelf: what this side holds; None: nothing.

        Raises:
            Rejected: ``reference`` where the sender relies on what is not held here.
        """
        rows = self.rows()
        held, based = unpack_mask(self.held, len(rows)), unpack_mask(self.based, len(rows))
        if (held & based).any() or ((held | based).any() and self.choices > 1):
            raise Rejected("shape", "a row is either held or told, and alone")
        fresh = ~held
        reference = None
        if based.any() and shelf is not None:
            reference = shelf.codes[rows[fresh]]
            reference[~based[fresh]] = 0
        told = delta_decode(
            self.codec, self.payload, int(fresh.sum()) * self.choices, self.classes, reference
        )
        if held.any():
            if shelf is None:
                raise Rejected("reference", "the sender relies on targets that are not held here")
            codes = shelf.codes[rows]
            codes[fresh] = told
        else:
            codes = told
        if self.mark and self.mark != mark(rows, codes):
            raise Rejected("reference", "the targets held here are not those that were sent")
        return rows, codes

    def probs(self, shelf: Shelf | None = None) -> Probs:
        """Decoded targets ``[rows, classes]``, or ``[rows, choices, classes]``; as :meth:`read`."""
        rows, codes = self.read(shelf)
        probs = restore(self.codec, codes, self.classes)
        return probs if self.choices == 1 else probs.reshape(len(rows), self.choices, -1)

    def header(self) -> dict[str, Any]:
        """What the plan's header says of them."""
        return {
            "round": self.round,
            "spec": spec_fields(self.spec),
            "codec": self.codec,
            "classes": self.classes,
            "choices": self.choices,
            "mark": self.mark,
        }

    def parts(self) -> list[bytes]:
        """What the plan's payload holds of them."""
        return [self.missing, self.held, self.based, self.payload]

    @classmethod
    def read_header(cls, raw: Mapping[str, Any], parts: list[bytes]) -> Targets:
        """Targets whose parts fit together; the payload is judged when it is decoded.

        Raises:
            Rejected: with the reason code.
        """
        names = {"round": int, "spec": dict, "codec": str, "classes": int}
        names |= {"choices": int, "mark": str}
        check_types(raw, names)
        exact_keys(raw, set(names))
        if raw["codec"] not in codecs.CODECS:
            raise Rejected("codec", "the targets come in an unknown codec")
        if not 1 <= raw["classes"] < 1 << 20 or not 1 <= raw["choices"] <= MOST_CHOICES:
            raise Rejected("shape", "the targets name classes or choices that cannot be")
        missing, held, based, payload = parts
        targets = cls(
            round=raw["round"],
            spec=read_spec(raw["spec"]),
            codec=raw["codec"],
            classes=raw["classes"],
            choices=raw["choices"],
            mark=raw["mark"],
            missing=missing,
            held=held,
            based=based,
            payload=payload,
        )
        told = targets.spec.count - count_bits(missing, targets.spec.count)
        for bits in (held, based):
            count_bits(bits, told)
        return targets
