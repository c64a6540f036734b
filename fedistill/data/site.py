"""One party's view of a federation of real sites: the public rows, and its own rows beside them.

No party sees all rows, so nothing may be learned from all: the public rows alone decide which
columns there are, which texts become columns of their own, and how everything is scaled. Every
site derives the same numbers from them; the fingerprint of what comes out proves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedistill.config import DataSettings, ProxySettings
from fedistill.data.draw import count_of, stratified
from fedistill.data.scale import Scaler
from fedistill.data.sources import read
from fedistill.data.table import Table, align, align_features, rows_of
from fedistill.errors import DataError
from fedistill.seeding import generator
from fedistill.types import FloatArray, IntArray, ProxySet, Rows


@dataclass(frozen=True, eq=False)
class Public:
    """The public rows, and what they decide for everybody's own.

    Attributes:
        table: as read, with the names of the classes that all agreed on.
        scaler: fills gaps and scales.
        proxy: the rows as models see them.
    """

    table: Table
    scaler: Scaler
    proxy: ProxySet

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        return self.table.classes

    def own(self, source: str, data: DataSettings, *, owned: bool = True) -> Rows:
        """Labelled rows of one party's own source, with the columns and classes of the public ones.

        Args:
            source: where they are; empty: none, for a party that learns and does not teach.
            data: how this party's files are read.
            owned: whether it must be known whose rows they are, where ``data.subject`` is set.

        Raises:
            DataError: a column that the public rows have is absent, a class is unknown, or it is
                not known whose row one is.
        """
        if not source:
            return self.none()
        table = _numbered(read(source, data, owned=owned), self.classes)
        if unknown := sorted(set(table.classes) - set(self.classes)):
            raise DataError(
                f"{table.name}: expected the {len(self.classes)} classes that were agreed on "
                f"({', '.join(self.classes)[:200]}), found {len(unknown)} more: map the labels, or "
                "leave those rows out"
            )
        rows = rows_of(align(table, self.table))
        return replace(rows, inputs=self.scaler.apply(rows.inputs))

    def inputs(self, source: str, data: DataSettings) -> FloatArray:
        """Inputs of rows that have no labels, or whose labels do not matter."""
        table = align_features(read(source, data, labelled=False), self.table)
        return self.scaler.apply(table.inputs)

    def none(self) -> Rows:
        """No rows, of the right shape."""
        return Rows(self.proxy.inputs[:0], np.empty(0, dtype=np.int64))


def read_public(
    data: DataSettings,
    proxy: ProxySettings,
    classes: Sequence[str],
    seed: int,
    fingerprint: str = "",
) -> Public:
    """The public rows from their file.

    Args:
        data: how columns are read and scaled, as all agreed.
        proxy: the file, and how many of its rows are used.
        classes: names of the classes, in order.
        seed: of the draw, where not all rows of the file are used.
        fingerprint: what the rows must come out as; empty: not checked.

    Raises:
        DataError: another fingerprint, or a file that cannot be used.
    """
    table = replace(read(proxy.path, data, labelled=False), classes=tuple(classes))
    if proxy.rows > len(table):
        raise DataError(
            f"proxy.rows: expected at most {len(table)}, the rows of {proxy.path}, found "
            f"{proxy.rows}: lower it"
        )
    numbers = np.sort(generator(seed, "public").permutation(len(table))[: proxy.rows])
    chosen = table.inputs[numbers]
    scale = table.auto if data.scale == "auto" else data.scale
    scaler = Scaler.fit(chosen, table.kind, scale, indicators=data.indicators)
    rows = ProxySet(scaler.apply(chosen))
    if fingerprint and rows.fingerprint != fingerprint:
        raise DataError(
            f"{proxy.path}: expected proxy rows with the fingerprint {fingerprint[:12]}, found "
            f"{rows.fingerprint[:12]}: fetch the file again, and read it with the agreed [data]"
        )
    return Public(table, scaler, rows)


def split(
    rows: Rows, data: DataSettings, seed: int, name: str, *, alone: bool = False
) -> tuple[Rows, Rows]:
    """Own rows to train on, and own rows to test on, stratified by class.

    Args:
        rows: all of them.
        data: how many are held out.
        seed: of the draw.
        name: of the site.
        alone: each row (or person) goes where a coin of its own says. A stratified draw lets one
            row more move others from one side to the other, and no privacy account covers that.

    Raises:
        DataError: a number of rows where each goes by its own coin, which knows only shares.
    """
    if not len(rows):
        return rows, rows
    if alone:
        if data.test_rows >= 1:
            raise DataError(
                f"data.test_rows: expected a share below 1 where rows are private, found "
                f"{data.test_rows}: a number would let one row decide about another; set a share, "
                "or name a file of test rows as data.test"
            )
        held = _coins(rows, f"{seed}/{name}/test") < data.test_rows
        return rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held))
    count = count_of(data.test_rows, len(rows), "data.test_rows")
    chosen: IntArray = stratified(rows.labels, count, generator(seed, "test", name))
    rest = np.setdiff1d(np.arange(len(rows), dtype=np.int64), chosen)
    return rows.take(rest), rows.take(np.sort(chosen))


def _coins(rows: Rows, salt: str) -> FloatArray:
    """A number from 0 to 1 for each row ``[n]``, of its content (or whose it is) alone."""

    def coin(row: int) -> float:
        subject = "" if rows.subject is None else str(rows.subject[row])
        read = b"" if rows.record is None else bytes(rows.record[row])
        content = rows.inputs[row].tobytes() + bytes([int(rows.labels[row]) % 256])
        own = subject.encode() or read or content
        digest = hashlib.sha256(salt.encode() + b"\0" + own).digest()
        return int.from_bytes(digest[:8], "big") / (1 << 64)

    return np.array([coin(row) for row in range(len(rows))])


def _numbered(table: Table, classes: tuple[str, ...]) -> Table:
    """Where a source knows classes by their numbers only (npz, idx), give them their names."""
    if table.name.partition(":")[0] not in {"npz", "idx"}:
        return table
    plain = tuple(str(number) for number in range(len(table.classes)))
    if table.classes != plain or set(plain) <= set(classes):
        return table
    if len(plain) > len(classes):
        raise DataError(
            f"{table.name}: expected class numbers from 0 to {len(classes) - 1}, found "
            f"{len(plain) - 1}: map the labels to the agreed classes"
        )
    return replace(table, classes=classes[: len(plain)])
