"""Whose rows are whose, and who is in a step: every unit by a coin of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from fedistill.errors import FedistillError
from fedistill.types import IntArray, Rows


@dataclass(frozen=True, eq=False)
class Units:
    """Rows by unit of privacy. Of equal records one is kept: a unit is drawn by one coin.

    Attributes:
        names: a digest of each unit, ``units`` of them, all different.
        order: ``[rows]`` row numbers, those of a unit side by side.
        starts: ``[units + 1]`` where in ``order`` the rows of each begin.
    """

    names: tuple[bytes, ...]
    order: IntArray
    starts: IntArray

    def __len__(self) -> int:
        return len(self.names)

    def rows_of(self, chosen: IntArray) -> tuple[IntArray, IntArray]:
        """Row numbers of the chosen units, and for each row its place among the chosen."""
        counts = self.starts[chosen + 1] - self.starts[chosen]
        owner = np.repeat(np.arange(len(chosen)), counts)
        first = np.repeat(self.starts[chosen] - np.cumsum(counts) + counts, counts)
        return self.order[first + np.arange(len(owner))], owner


def units_of(rows: Rows, unit: str) -> Units:
    """The units of these rows.

    A unit is a record (what was read of it, or its values and label where that is not known), or
    a user: the subject with all of its rows. A row
    whose subject is ``""`` is nobody's, and a unit of its own.

    Args:
        rows: own rows.
        unit: ``record`` or ``user``.

    Raises:
        FedistillError: users are asked for, and the rows do not say whose they are.
    """
    names = names_of(rows, unit)
    numbers: dict[bytes, int] = {}
    owner = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
    kept = np.arange(len(names))
    if unit == "record" or rows.subject is None or (rows.subject == "").any():
        nobody = np.ones(len(names), dtype=bool)
        if unit == "user" and rows.subject is not None:
            nobody = rows.subject == ""
        first = np.zeros(len(names), dtype=bool)
        first[np.unique(owner, return_index=True)[1]] = True
        kept = kept[first | ~nobody]
    order = kept[np.argsort(owner[kept], kind="stable")]
    counts = np.bincount(owner[kept], minlength=len(numbers))
    return Units(tuple(numbers), order, np.concatenate([[0], np.cumsum(counts)]))


def names_of(rows: Rows, unit: str) -> list[bytes]:
    """The digest of each row's unit, one a row: equal for rows of one unit.

    A record is known by what was read (``rows.record``). Its inputs are scaled by public rows, and
    with other ones they would be those of a stranger. Rows that were made in memory have no more
    than their inputs and label: keep these as they are for as long as a ledger counts.

    Raises:
        FedistillError: as :func:`units_of`.
    """
    if unit == "user" and rows.subject is None and len(rows):
        raise FedistillError(
            'privacy.unit = "user" needs to know whose each row is, and these rows do not say it: '
            'name the column in data.subject, or protect single records with unit = "record"'
        )
    owners = rows.subject if unit == "user" else None
    return [
        _digest("user", str(owners[row]).encode())
        if owners is not None and owners[row]
        else _record(rows, row)
        for row in range(len(rows))
    ]


def poisson(units: int, rate: float, generator: torch.Generator) -> IntArray:
    """Numbers of the units in a step: each with probability ``rate``, whatever the others do."""
    coins = torch.rand(units, dtype=torch.float64, generator=generator)
    drawn: IntArray = np.flatnonzero((coins < rate).numpy())
    return drawn


def _record(rows: Rows, row: int) -> bytes:
    if rows.record is not None and rows.record[row]:
        return _digest("read", bytes(rows.record[row]))
    values = rows.inputs[row] + np.float32(0.0)  # -0.0 and 0.0 are one value
    return _digest("record", values.tobytes() + rows.labels[row].astype("<i8").tobytes())


def _digest(kind: str, content: bytes) -> bytes:
    return hashlib.sha256(kind.encode() + b"\0" + content).digest()
