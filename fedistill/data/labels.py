"""From raw label values to class numbers; a bad one is named by its row, never shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.errors import DataError
from fedistill.types import FloatArray, IntArray

Where = Callable[[int], str]
Labels = tuple[IntArray, tuple[str, ...]]

MOST_CLASSES = 10_000
MOST_FRACTIONS = 50


def number_labels(
    values: npt.NDArray[Any],
    where: Where,
    positive_above: float | None = None,
    names: Sequence[str] = (),
) -> Labels:
    """Labels that already are class numbers from 0 (images, npz), checked row by row."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise DataError(
            f"{where(0)}: expected one number per row as label, found {values.ndim} dimensions "
            f"of {values.dtype}: store class numbers from 0"
        )
    if positive_above is not None:
        return _above(values.astype(np.float64), where, positive_above)
    limit = len(names) or MOST_CLASSES
    bad = ~np.isfinite(values) | (values < 0) | (values >= limit) | (values != np.floor(values))
    if bad.any():
        raise DataError(
            f"{where(int(np.argmax(bad)))}: expected a class number from 0 to {limit - 1}, "
            "found another value: mend the row or leave it out"
        )
    labels = values.astype(np.int64)
    count = int(labels.max(initial=-1)) + 1
    return labels, tuple(names) or tuple(str(number) for number in range(count))


def value_labels(
    values: FloatArray | Sequence[str | None],
    where: Where,
    positive_above: float | None = None,
    positive: Sequence[str] = (),
) -> Labels:
    """Labels of a table, numbers or texts: the sorted distinct values become classes.

    Args:
        values: as the table has them.
        where: from a row number to words.
        positive_above: two classes: numbers above this one are positive.
        positive: two classes: these values are positive.
    """
    if positive and positive_above is not None:
        raise DataError("expected data.positive or data.positive_above, found both: leave one out")
    if positive:
        return _among(values, where, positive)
    texts = None if isinstance(values, np.ndarray) else [value or "" for value in values]
    numbers = values if isinstance(values, np.ndarray) else as_numbers(texts or [])
    for row, text in enumerate(texts or []):
        if not text:
            raise _absent(where(row))
    if numbers is not None:
        if not np.isfinite(numbers).all():
            raise _absent(where(int(np.argmin(np.isfinite(numbers)))))
        if positive_above is not None:
            return _above(numbers, where, positive_above)
        return _distinct_numbers(numbers, where)
    if positive_above is not None:
        raise DataError(
            f"{where(0)}: expected numbers as labels because data.positive_above is set, found "
            "texts: remove it or name another data.label"
        )
    distinct, labels = np.unique(np.array(texts), return_inverse=True)
    _check_count(len(distinct), len(labels), where)
    return labels.astype(np.int64), tuple(str(name) for name in distinct)


def as_numbers(texts: Sequence[str]) -> FloatArray | None:
    """The texts as float64, or None when one of them is no number; an empty one is NaN."""
    known: dict[str, float] = {"": np.nan}
    try:
        for text in set(texts) - {""}:
            if "_" in text:
                return None
            known[text] = float(text)
    except ValueError:
        return None
    return np.array([known[text] for text in texts], dtype=np.float64)


def number_text(value: float) -> str:
    """A number as a class name: 1.0 and 1 are the same class.

    >>> number_text(1.0), number_text(0.5)
    ('1', '0.5')
    """
    return str(int(value)) if value == int(value) else repr(float(value))


def _distinct_numbers(numbers: FloatArray, where: Where) -> Labels:
    distinct, labels = np.unique(numbers, return_inverse=True)
    if len(distinct) > MOST_FRACTIONS and (distinct != np.floor(distinct)).any():
        raise DataError(
            f"{where(0)}: expected classes as labels, found {len(distinct)} different fractions: "
            "set data.positive_above to make two classes, or name another data.label"
        )
    _check_count(len(distinct), len(labels), where)
    return labels.astype(np.int64), tuple(number_text(value) for value in distinct)


def _check_count(classes: int, rows: int, where: Where) -> None:
    if classes > MOST_CLASSES or (classes > MOST_FRACTIONS and classes > rows // 2):
        raise DataError(
            f"{where(0)}: expected classes as labels, found {classes} different values in {rows} "
            "rows: name another column as data.label"
        )


def _among(
    values: FloatArray | Sequence[str | None], where: Where, positive: Sequence[str]
) -> Labels:
    """Two classes: the others, and those that are named."""
    labels, names = value_labels(values, where)
    absent = [value for value in positive if value not in names]
    if absent:
        raise DataError(
            f'{where(0)}: expected labels such as "{absent[0]}" (data.positive), found none: '
            "write it as the file does"
        )
    chosen = np.array([name in positive for name in names], dtype=np.int64)
    return chosen[labels], ("other", " or ".join(positive))


def _above(numbers: FloatArray, where: Where, threshold: float) -> Labels:
    if not np.isfinite(numbers).all():
        raise _absent(where(int(np.argmin(np.isfinite(numbers)))))
    return (numbers > threshold).astype(np.int64), (f"<={threshold:g}", f">{threshold:g}")


def _absent(place: str) -> DataError:
    return DataError(
        f"{place}: expected a label, found none or no finite number: mend the row or leave it out"
    )
