"""The few shapes of data that pass between the parts. NumPy only: this floor imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedistill.errors import DataError

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]
Logits: TypeAlias = FloatArray
"""Scores before softmax, ``[rows, classes]``; of several clients ``[clients, rows, classes]``."""
Probs: TypeAlias = FloatArray
"""Rows that sum to one, ``[rows, classes]``."""
State: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""What a stateful part saves: flat names to arrays, nothing that could carry code."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled rows of one owner.

    Attributes:
        inputs: ``[n, ...]`` float32.
        labels: ``[n]`` int64, class numbers from 0.
        ids: ``[n]`` int64 row numbers in the source, to prove that no row is used twice.
        site: ``[n]`` strings, the value of the site column, where the source has one.
        subject: ``[n]`` strings, whose row it is, where the source says so; ``""`` is nobody.
        record: ``[n]`` digests of the records as they were read, which a privacy ledger knows
            them by, however they are scaled since; ``b""`` where that is not known.
    """

    inputs: FloatArray
    labels: IntArray
    ids: IntArray | None = None
    site: npt.NDArray[np.str_] | None = None
    subject: npt.NDArray[np.str_] | None = None
    record: npt.NDArray[np.bytes_] | None = None

    def __post_init__(self) -> None:
        try:
            inputs = np.asarray(self.inputs, dtype=np.float32)
        except (TypeError, ValueError):
            raise DataError(
                "inputs must be numbers in rows of one shape: encode texts first"
            ) from None
        labels = np.asarray(self.labels)
        if labels.dtype.kind not in "iub" and not (
            labels.dtype.kind == "f" and (labels == np.floor(labels)).all()
        ):
            raise DataError(
                f"labels must be whole numbers from 0, found {labels.dtype}: map classes to numbers"
            )
        if len(inputs) != len(labels):
            raise DataError(
                f"inputs and labels must have equal length, found {len(inputs)} and "
                f"{len(labels)}: check how the rows were read"
            )
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "labels", labels.astype(np.int64, copy=False))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: npt.ArrayLike) -> Rows:
        """The given row numbers, in that order."""
        index = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            inputs=self.inputs[index],
            labels=self.labels[index],
            ids=None if self.ids is None else self.ids[index],
            site=None if self.site is None else self.site[index],
            subject=None if self.subject is None else self.subject[index],
            record=None if self.record is None else self.record[index],
        )


def joined_records(parts: Sequence[Rows]) -> npt.NDArray[np.bytes_] | None:
    """``record`` of all parts below each other, ``b""`` where a part has none; None: nobody has.

    A part without must not cost the others theirs: a ledger would take them for new ones.
    """
    known = [rows.record for rows in parts if rows.record is not None]
    if not known:
        return None
    width = known[0].dtype
    return np.concatenate(
        [np.zeros(len(rows), dtype=width) if rows.record is None else rows.record for rows in parts]
    )


@dataclass(frozen=True, eq=False)
class Dataset:
    """A source, split into what clients may own, what everybody sees, and what measures.

    ``public.labels`` are -1, but for the rows of ``proxy.labelled``, whose labels the server knows;
    no client is ever given them.
    """

    name: str
    train: Rows
    test: Rows
    public: Rows
    classes: tuple[str, ...]


def row_digest(row: FloatArray) -> bytes:
    """What a row ``[...]`` is known by: equal rows, and they alone, have equal digests."""
    content = np.ascontiguousarray(row, dtype="<f4").tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class ProxySet:
    """The shared unlabelled rows ``[n, ...]``, known by their fingerprint."""

    inputs: FloatArray

    def __post_init__(self) -> None:
        if len(self.inputs) == 0:
            raise DataError("a proxy set needs at least one row, found none: raise [proxy] rows")
        if not np.isfinite(self.inputs).all():
            row = int(np.argwhere(~np.isfinite(self.inputs).reshape(len(self), -1).all(1))[0, 0])
            raise DataError(f"proxy rows must be finite, row {row} is not: clean or impute it")
        object.__setattr__(self, "inputs", np.ascontiguousarray(self.inputs, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over shape and content; part of every message."""
        return self.measure()

    @cached_property
    def digests(self) -> frozenset[bytes]:
        """What the rows are known by, to find them among others."""
        return frozenset(map(row_digest, self.inputs))

    def measure(self) -> str:
        """The fingerprint computed afresh, to notice rows that changed since the start."""
        digest = hashlib.sha256(repr(self.inputs.shape).encode())
        digest.update(
            np.ascontiguousarray(self.inputs, dtype="<f4").reshape(-1).view(np.uint8).data
        )
        return digest.hexdigest()

    def take(self, rows: IntArray) -> FloatArray:
        """The given rows, to be read only: all of them in order are not copied."""
        if len(rows) == len(self) and (rows == np.arange(len(self))).all():
            return self.inputs
        return self.inputs[rows]


def fingerprint_classes(classes: tuple[str, ...]) -> str:
    """sha256 (hex) of the class names in order: two sites must mean the same by class 3."""
    return hashlib.sha256("\x1f".join(classes).encode()).hexdigest()
