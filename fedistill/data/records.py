"""What a record is known by: a digest of what was read, before anything is made of it.

A privacy ledger charges each record for as long as it is used. It has to know a record again after
public rows, columns, scaling or settings have changed: so nothing that depends on these goes in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[np.bytes_]
"""``[n]`` digests in hexadecimal: raw bytes would lose the zeros at their end."""

BYTES = 16


def of_cells(names: Sequence[str], columns: Sequence[Iterable[Any]]) -> Records:
    """Digests ``[n]`` of the rows of a table, over all of its columns.

    The order of the columns does not matter, nor whether a whole number is written ``1`` or
    ``1.0``, as it is once a tool has read a gap in its column. Any other change makes another row:
    what looks like an equal number may be two codes.

    Args:
        names: of the columns.
        columns: their cells as they were read; None and NaN are missing.

    >>> one, other = of_cells(["age", "who"], [["7", "7.0"], ["ann", "ann"]])
    >>> one == other == of_cells(["who", "age"], [["ann"], [7.0]])[0]
    True
    """
    order = sorted(range(len(names)), key=lambda index: names[index])
    start = _hash(json.dumps([names[index] for index in order]))
    cells = [_texts(columns[index]) for index in order]
    return _digests(_after(start, json.dumps(row)) for row in zip(*cells, strict=True))


def of_arrays(*arrays: npt.NDArray[Any]) -> Records:
    """Digests ``[n]`` of rows that lie in arrays of numbers ``[n, ...]``, of whatever type.

    >>> bool((of_arrays(np.array([[1, 2]], np.uint8)) == of_arrays(np.array([[1.0, 2.0]]))).all())
    True
    """
    start = _hash(json.dumps([array.shape[1:] for array in arrays]))
    return _digests(
        _after(start, b"".join(_content(array[row]) for array in arrays))
        for row in range(len(arrays[0]))
    )


def of_bytes(content: bytes | None) -> str:
    """What stands for a picture in :func:`of_cells`."""
    return _hash(content or b"").hexdigest()


def _texts(column: Iterable[Any]) -> list[str]:
    cells = column.tolist() if isinstance(column, np.ndarray) else column
    return ["" if cell is None or cell != cell else str(cell).removesuffix(".0") for cell in cells]


def _content(row: npt.NDArray[Any]) -> bytes:
    return (np.asarray(row, dtype="<f8") + 0.0).tobytes()  # -0.0 and 0.0 are one value


def _hash(told: str | bytes) -> hashlib.blake2b:
    content = told.encode() if isinstance(told, str) else told
    return hashlib.blake2b(content, digest_size=BYTES)


def _after(start: hashlib.blake2b, told: str | bytes) -> str:
    digest = start.copy()
    digest.update(told.encode() if isinstance(told, str) else told)
    return digest.hexdigest()


def _digests(told: Iterable[str]) -> Records:
    return np.array(list(told), dtype=f"S{2 * BYTES}")
