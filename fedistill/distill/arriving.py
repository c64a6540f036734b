"""Rows on their way into a student: read and checked whole before anything changes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fedistill.continual.arrivals import read_subjects
from fedistill.data.stream import Experience
from fedistill.distill.teachers import evaluating
from fedistill.errors import DataError
from fedistill.types import Rows


def rows_of(experience: Experience | Rows | tuple[Any, Any]) -> Rows:
    """The rows to learn of an experience, of rows, or of inputs and labels.

    Raises:
        DataError: it is something else, or no table of numbers.
    """
    if isinstance(experience, Experience):
        return experience.train
    if isinstance(experience, Rows):
        return experience
    if not isinstance(experience, tuple | list) or len(experience) != 2:
        raise DataError(
            "expected an Experience, Rows, or inputs and labels, found "
            f"{type(experience).__name__}: labels may be None"
        )
    return batch_of(*experience)


def batch_of(
    inputs: npt.ArrayLike, labels: npt.ArrayLike | None, subject: npt.ArrayLike | None = None
) -> Rows:
    """Rows of inputs ``[n, ...]``, labels ``[n]`` or None, and one owner or ``[n]``.

    Raises:
        DataError: no numbers in rows of one shape, or lengths that differ.
    """
    try:
        found = np.asarray(inputs, dtype=np.float32)
    except (TypeError, ValueError):
        found = np.zeros((), dtype=np.float32)
    if not found.ndim:
        raise DataError("inputs must be numbers in rows of one shape: encode texts first")
    try:
        known = np.full(len(found), -1) if labels is None else np.asarray(labels)
    except ValueError:
        raise DataError("labels must be one whole number for each row: map them") from None
    if known.ndim == 1 and not len(known):  # an empty list has no kind
        known = known.astype(np.int64)
    names = None if subject is None else read_subjects(subject)
    if names is not None and names.shape not in {(), found.shape[:1]}:
        raise DataError(
            f"expected one subject or one for each of {len(found)} rows, found shape "
            f"{list(names.shape)}: name the person of every row"
        )
    owners = None if names is None else np.broadcast_to(names, found.shape[:1])
    return Rows(found, known, subject=owners)


def check_rows(rows: Rows, shape: tuple[int, ...] | None) -> None:
    """Refuse rows that would spoil a student.

    Args:
        rows: of an experience.
        shape: of a row, as it was before; None: these are the first.

    Raises:
        DataError: with the first row that is wrong, without its values.
    """
    if rows.labels.ndim != 1:
        raise DataError(
            f"expected one label for each row, found shape {list(rows.labels.shape)}: give class "
            "numbers"
        )
    finite = np.isfinite(rows.inputs).all(axis=tuple(range(1, rows.inputs.ndim)))
    if not finite.all():
        raise DataError(
            f"inputs must be finite, row {int(np.flatnonzero(~finite)[0])} is not: clean or "
            "impute it"
        )
    wrong = np.flatnonzero(rows.labels < -1)
    if len(wrong):
        raise DataError(
            f"labels must be classes from 0, or -1 for none, row {int(wrong[0])} has another: "
            "map the labels"
        )
    found = rows.inputs.shape[1:]
    if len(rows) and shape is not None and found != shape:
        raise DataError(
            f"expected inputs of shape {list(shape)} a row as before, found {list(found)}: "
            "prepare all experiences alike"
        )


def try_out(module: nn.Module, inputs: Tensor, classes: int) -> None:
    """Show a module one row before it is shown thousands.

    Args:
        module: stays in the mode it is in.
        inputs: ``[1, ...]``.
        classes: what it shall tell apart.

    Raises:
        DataError: it cannot take the row, or does not turn it into logits.
    """
    name = type(module).__name__
    try:
        with evaluating(module):
            found = list(module(inputs).shape)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        shape = list(inputs.shape[1:])
        raise DataError(f"{name} cannot take rows of shape {shape}: {reason}") from None
    if found != [1, classes]:
        raise DataError(
            f"{name} must return logits [rows, {classes}], it returns {found}: say how many "
            "classes it has, classes="
        )


def fingerprint(rows: Rows) -> str:
    """What an experience is known by: its content."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.ascontiguousarray(rows.labels).tobytes())
    digest.update(np.ascontiguousarray(rows.inputs).tobytes())
    return digest.hexdigest()
