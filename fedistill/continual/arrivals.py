"""Rows on their way into a buffer: checked whole before anything changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.continual.storage import RAGGED, Columns
from fedistill.errors import DataError


def read_rows(
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    *,
    held: Columns,
    needs: str,
    given: dict[str, npt.ArrayLike | None],
    subject: npt.ArrayLike | None,
) -> Columns:
    """Columns of the rows of one ``add``, each ``[n, ...]`` and owned by nobody else's hands.

    Args:
        inputs: ``[n, ...]``.
        labels: ``[n]`` or None.
        held: the columns of the buffer: inputs and features must have their shape and kind.
        needs: what the policy asks for, see :class:`~fedistill.continual.policies.Policy`.
        given: logits, soft, ids, scores, features; None where there is none.
        subject: one name for all rows, or ``[n]``.

    Raises:
        DataError: lengths or shapes differ, values are not finite, labels are no class numbers,
            or the policy lacks what it needs.
    """
    rows: Columns = {"inputs": _inputs(inputs, held)}
    count = len(rows["inputs"])
    rows["labels"] = _whole("labels", labels, count, -1)
    if given["ids"] is not None:
        rows["ids"] = _whole("ids", given["ids"], count, 0)
    for name, width in RAGGED.items():
        if given[name] is not None:
            table = _numbers(name, given[name], count, 2).astype(np.float32)
            rows[name] = table
            rows[width] = np.full(count, table.shape[1], dtype=np.int64)
    if needs and given[needs] is None:
        raise DataError(f"expected {needs} for this policy, found none: add(..., {needs}=)")
    if given["scores"] is not None:
        rows["scores"] = _numbers("scores", given["scores"], count, 1)
    if given["features"] is not None:
        rows["features"] = _features(given["features"], count, held)
    if subject is not None:
        names = read_subjects(subject)
        if names.ndim and names.shape != (count,):
            raise DataError(
                f"expected one subject or one for each of {count} rows, found shape "
                f"{list(names.shape)}: name the person of every row"
            )
        rows["subject"] = np.broadcast_to(names, (count,))
    return rows


def read_subjects(subject: object) -> npt.NDArray[np.str_]:
    """Names as texts; None is nobody.

    Raises:
        DataError: neither texts nor whole numbers: 7.0 and 7 would be two people to an erasure.
    """
    names = np.asarray(subject)
    if names.dtype.kind == "O":
        texts = [("" if name is None else name) for name in names.ravel().tolist()]
        if not all(isinstance(name, str | int) for name in texts):
            names = np.zeros((), np.float64)
        else:
            names = np.array([str(name) for name in texts], np.str_).reshape(names.shape)
    if names.dtype.kind not in "iuU":
        raise DataError(
            f"expected subjects as texts or whole numbers, found {np.asarray(subject).dtype}: "
            "write ids as texts"
        )
    return names.astype(str)


def read_times(time: npt.ArrayLike, count: int) -> npt.NDArray[np.float64]:
    """Times ``[n]`` of one time for all rows or of one for each.

    Raises:
        DataError: neither, or not finite.
    """
    times = np.asarray(time, dtype=np.float64)
    if times.shape not in {(), (count,)} or not np.isfinite(times).all():
        raise DataError(
            f"expected one finite time or one for each of {count} rows, found shape "
            f"{list(times.shape)} or NaN: give times on one clock"
        )
    return np.broadcast_to(times, (count,))


def _inputs(inputs: npt.ArrayLike, held: Columns) -> npt.NDArray[Any]:
    rows = np.asarray(inputs)
    if rows.dtype.kind not in "fiub" or not rows.ndim:
        raise DataError(
            f"expected inputs [rows, ...] of numbers, found {rows.dtype} with shape "
            f"{list(rows.shape)}: encode texts first"
        )
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        row = int(np.argwhere(~np.isfinite(rows).reshape(len(rows), -1).all(axis=1))[0, 0])
        raise DataError(f"inputs must be finite, row {row} is not: clean or impute it")
    if (known := held.get("inputs")) is None:
        return rows.astype(np.float32) if rows.dtype == np.float64 else rows
    if rows.shape[1:] != known.shape[1:]:
        raise DataError(
            f"expected inputs of shape {list(known.shape[1:])} a row as the buffer holds, found "
            f"{list(rows.shape[1:])}: one buffer holds rows of one kind"
        )
    if rows.dtype.kind != known.dtype.kind:
        raise DataError(
            f"expected inputs of {known.dtype} as the buffer holds, found {rows.dtype}: convert "
            "them"
        )
    return rows.astype(known.dtype, copy=False)


def _whole(
    name: str, values: npt.ArrayLike | None, count: int, least: int
) -> npt.NDArray[np.int64]:
    """Whole numbers ``[n]``; None is ``least`` everywhere."""
    if values is None:
        return np.full(count, least, dtype=np.int64)
    found = np.asarray(values)
    if found.shape != (count,):
        raise DataError(f"expected {count} {name}, found shape {list(found.shape)}: one for a row")
    if not count:
        return np.empty(0, dtype=np.int64)
    if found.dtype.kind not in "iub" and not (
        found.dtype.kind == "f" and (found == np.floor(found)).all()
    ):
        raise DataError(f"{name} must be whole numbers, found {found.dtype}: map them to numbers")
    if found.min() < least:
        raise DataError(f"{name} must be at least {least}, found {found.min()}: number them from 0")
    return found.astype(np.int64)


def _numbers(
    name: str, values: npt.ArrayLike | None, count: int, ndim: int
) -> npt.NDArray[np.float64]:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} must be numbers in rows of one length: add others apart") from None
    if found.ndim != ndim or len(found) != count:
        wanted = f"[{count}]" if ndim == 1 else f"[{count}, columns]"
        raise DataError(f"expected {name} {wanted}, found {list(found.shape)}: one row each")
    if not np.isfinite(found).all():
        raise DataError(f"{name} must be finite, found NaN or infinity: look at the model's output")
    return found


def _features(values: npt.ArrayLike | None, count: int, held: Columns) -> npt.NDArray[np.float64]:
    """Features ``[n, d]`` of length 1, as iCaRL has them; a row of zeros stays."""
    rows = _numbers("features", values, count, 2)
    if "features" in held and held["features"].shape[1] != rows.shape[1]:
        raise DataError(
            f"expected {held['features'].shape[1]} features a row as the buffer holds, found "
            f"{rows.shape[1]}: one buffer holds features of one network"
        )
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)
