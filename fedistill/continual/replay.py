"""What a buffer gives back: rows to replay, and figures on what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.continual.storage import Columns
from fedistill.types import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Replay:
    """Rows of a buffer; all arrays are copies with one entry a row.

    Attributes:
        inputs: ``[n, ...]``.
        labels: ``[n]`` int64; -1 where none is known.
        ids: ``[n]`` int64, the caller's; the place in the stream where none was given.
        numbers: ``[n]`` int64 place in the stream.
        uses: ``[n]`` int64, the first pass and this draw counted.
        logits: ``[n, c]`` float32 with c the most classes of any of these rows, zeros beyond what
            a row has; c is 0 where none is stored.
        logits_classes: ``[n]`` how many of them a row has: the classes known when it came.
        soft: ``[n, c]`` an ensemble's soft targets, likewise.
        soft_classes: ``[n]`` likewise.
        subjects: ``[n]`` whose row it is, ``""`` for public rows.
    """

    inputs: npt.NDArray[Any]
    labels: IntArray
    ids: IntArray
    numbers: IntArray
    uses: IntArray
    logits: FloatArray
    logits_classes: IntArray
    soft: FloatArray
    soft_classes: IntArray
    subjects: npt.NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def logits_known(self) -> npt.NDArray[np.bool_]:
        """``[n, c]`` where logits are stored ones."""
        return np.arange(self.logits.shape[1]) < self.logits_classes[:, None]

    @property
    def soft_known(self) -> npt.NDArray[np.bool_]:
        """``[n, c]`` where soft targets are stored ones."""
        return np.arange(self.soft.shape[1]) < self.soft_classes[:, None]


def replay_of(rows: Columns) -> Replay:
    """Columns as a :class:`Replay`, with empty ones where a buffer has none."""
    count = len(rows.get("labels", ()))
    none = np.zeros(count, dtype=np.int64)
    empty = np.zeros((count, 0), dtype=np.float32)
    return Replay(
        inputs=rows.get("inputs", empty),
        labels=rows.get("labels", none),
        ids=rows.get("ids", none),
        numbers=rows.get("numbers", none),
        uses=rows.get("uses", none),
        logits=rows.get("logits", empty),
        logits_classes=rows.get("logits_classes", none),
        soft=rows.get("soft", empty),
        soft_classes=rows.get("soft_classes", none),
        subjects=rows.get("subject", np.full(count, "", dtype=np.str_)),
    )


@dataclass(frozen=True)
class Stats:
    """A buffer in figures.

    Attributes:
        rows: held now.
        capacity: at most.
        fill: rows / capacity; 0 for capacity 0.
        seen: rows that ever came, without those of erased subjects.
        classes: rows held by label.
        age: mean and largest, on the buffer's clock; 0 when empty.
        uses: mean and largest, the first pass counted; 0 when empty.
        subjects: different ones, without public rows.
        expired: rows that left by ``ttl``.
        retired: rows that left by ``max_uses``.
        erased: rows that left by ``erase``.
        dropped: rows that left by ``drop``.
        bytes: of the rows held, with all that lies beside them.
    """

    rows: int
    capacity: int
    fill: float
    seen: int
    classes: Mapping[int, int]
    age: tuple[float, float]
    uses: tuple[float, float]
    subjects: int
    expired: int
    retired: int
    erased: int
    dropped: int
    bytes: int
