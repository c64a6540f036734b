"""From named columns to a table: numbers as they are, few texts one-hot, many texts refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from fedistill.data import bands
from fedistill.data.labels import (
    Labels,
    Where,
    as_numbers,
    number_labels,
    number_text,
    value_labels,
)
from fedistill.data.records import Records, of_cells
from fedistill.data.table import Query, Table, Texts
from fedistill.errors import DataError, did_you_mean
from fedistill.types import FloatArray

Column: TypeAlias = FloatArray | Sequence[str | None]
"""Numbers with NaN where missing, or texts with None where missing."""

MOST_TEXTS = 50
LONGEST_NAME = 60
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Frame:
    """Named columns as a file holds them.

    Attributes:
        source: what the user called it.
        names: the column names; "0", "1" and so on where the file has none.
        columns: as many columns as names.
        where: from a row number to words, for messages.
        extras: columns that are never features, such as the file's name.
        classes: the class names behind label numbers, where the source knows them.
        records: ``[n]`` digests of the rows; None: the columns are all that was read.
    """

    source: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    where: Where
    extras: Mapping[str, Sequence[str]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    records: Records | None = None

    def __len__(self) -> int:
        return len(self.columns[0]) if self.columns else 0


def assemble(frame: Frame, query: Query) -> Table:
    """Split a frame into features, labels and sites."""
    if not len(frame):
        raise DataError(f"{frame.source}: expected rows, found none: check the file")
    settings = query.settings
    label = label_column(frame, query)
    special = label, site_column(frame, query), subject_column(frame, query)
    used = {index for index in special if index is not None}
    used |= {find_column(name, frame, "data.drop") for name in settings.drop}
    labels, classes = labels_of(frame, query)
    codes = {find_column(name, frame, "data.categorical") for name in settings.categorical}
    zeros = {find_column(name, frame, "data.zero_missing") for name in settings.zero_missing}
    encoded = [
        (part, np.where(values == 0, np.nan, values) if index in zeros else values)
        for index, name in enumerate(frame.names)
        if index not in used
        for part, values in (
            one_hot(name, code_texts(frame.columns[index]), frame.where)
            if index in codes
            else encode(name, frame.columns[index], frame.where)
        )
    ]
    if not encoded:
        raise DataError(f"{frame.source}: expected a feature column besides the label, found none")
    inputs = np.stack([values for _, values in encoded], axis=1).astype(np.float32)
    features = tuple(name for name, _ in encoded)
    return Table(
        frame.source,
        inputs,
        labels,
        classes,
        features=features,
        columns=sites(frame, query),
        subjects=subjects(frame, query),
        records=of_cells(frame.names, frame.columns) if frame.records is None else frame.records,
    )


def label_column(frame: Frame, query: Query) -> int | None:
    """Number of the label column, or None where it is absent and not needed."""
    try:
        return find_column(query.settings.label, frame, "data.label")
    except DataError:
        if query.labelled:
            raise
        return None


def labels_of(frame: Frame, query: Query) -> Labels:
    """Class numbers of the label column; all -1 where they are not needed."""
    index = label_column(frame, query)
    if index is None or not query.labelled:
        return np.full(len(frame), -1, dtype=np.int64), ()
    values, above = frame.columns[index], query.settings.positive_above
    if frame.classes and above is None and isinstance(values, np.ndarray):
        return number_labels(values, frame.where, names=frame.classes)
    return value_labels(values, frame.where, above, query.settings.positive)


def site_column(frame: Frame, query: Query) -> int | None:
    """Number of the column that holds the sites, where it is one of the frame's own.

    Columns that make sites together, or in bands, are none: they stay among the features.
    """
    if is_composite(frame, query.column):
        return None
    return _own_column(frame, query.column, "clients.column", needed=query.labelled)


def subject_column(frame: Frame, query: Query) -> int | None:
    """Number of the column that says whose row it is, where it is one of the frame's own.

    Raises:
        DataError: it is the label column, or it is absent and needed.
    """
    asked = query.settings.subject
    index = _own_column(frame, asked, "data.subject", needed=query.owned)
    if index is not None and index == label_column(frame, query):
        raise DataError(
            f"{frame.source}: expected another column as data.subject than as data.label, found "
            f'"{asked}" for both: name the column that says whose row it is'
        )
    return index


def _own_column(frame: Frame, asked: str, setting: str, *, needed: bool) -> int | None:
    if not asked or (asked in frame.extras and asked not in frame.names):
        return None
    try:
        return find_column(asked, frame, setting)
    except DataError:
        if needed:
            raise
        return None


def is_composite(frame: Frame, asked: str) -> bool:
    """Whether sites are made of several columns, or of bands of numbers."""
    return asked not in frame.names and ("+" in asked or ":" in asked)


def sites(frame: Frame, query: Query) -> dict[str, Texts]:
    """The requested site column as texts, none of them empty."""
    if not query.column:
        return {}
    if is_composite(frame, query.column):
        try:
            parts = [_banded(part, frame) for part in bands.parse(query.column)]
        except DataError:
            if query.labelled:
                raise
            return {}  # of public rows nobody asks where they come from
        return {query.column: bands.joined(parts)}
    index = site_column(frame, query)
    if index is None:
        extra = frame.extras.get(query.column)
        return {} if extra is None else {query.column: np.array(extra, dtype=np.str_)}
    return {query.column: _site_texts(frame, index)}


def _banded(part: bands.Part, frame: Frame) -> Texts:
    """One of the columns that make the sites: its bands, or its values."""
    index = find_column(part.name, frame, "clients.column")
    texts = _site_texts(frame, index)
    if not part.cuts:
        return np.array([f"{part.name}-{text}" for text in texts], dtype=np.str_)
    numbers = as_numbers(texts.tolist())
    if numbers is None:
        raise DataError(
            f'{frame.source}: expected numbers in column "{part.name}", which clients.column cuts '
            "into bands, found texts: leave the cuts out"
        )
    return bands.banded(part, numbers)


def _site_texts(frame: Frame, index: int) -> Texts:
    """The values of a column as texts, none of them empty."""
    column = frame.columns[index]
    texts = [] if isinstance(column, np.ndarray) else [text or "" for text in column]
    numbers = column if isinstance(column, np.ndarray) else as_numbers(texts)
    if numbers is not None:
        texts = [number_text(value) if np.isfinite(value) else "" for value in numbers]
    if "" in texts:
        raise DataError(
            f'{frame.where(texts.index(""))}: expected a site in column "{frame.names[index]}", '
            "found none: mend the row or leave it out"
        )
    return np.array(texts, dtype=np.str_)


def subjects(frame: Frame, query: Query) -> Texts | None:
    """Whose row each is ``[n]``, as the file has it; None where it does not say.

    Raises:
        DataError: a row is nobody's, where it must be known whose it is.
    """
    asked = query.settings.subject
    index = subject_column(frame, query)
    if index is None:
        extra = frame.extras.get(asked)
        return None if extra is None else np.array(extra, dtype=np.str_)
    column = frame.columns[index]
    texts = code_texts(column) if isinstance(column, np.ndarray) else [t or "" for t in column]
    if "" in texts and query.owned:
        raise DataError(
            f'{frame.where(texts.index(""))}: expected a person in column "{asked}" '
            "(data.subject), found none: mend the row or leave it out"
        )
    return np.array(texts, dtype=np.str_)


def find_column(wanted: str, frame: Frame, setting: str) -> int:
    """Number of a column from its name or its number; -1 is the last."""
    names = frame.names
    if wanted in names:
        return names.index(wanted)
    try:
        number = int(wanted)
    except ValueError:
        number = len(names)
    if -len(names) <= number < len(names):
        return number % len(names)
    # Such names are most likely the first row of the data, which must not be shown.
    hidden = any(len(name) > LONGEST_NAME or as_numbers([name]) is not None for name in names)
    hint = (
        f"; name it by a number from 0 to {len(names) - 1} (-1 is the last), and set data.header = "
        "false if the first line holds data"
        if hidden
        else did_you_mean(wanted, names)
    )
    raise DataError(f'{frame.source}: expected a column "{wanted}" ({setting}), found none{hint}')


def encode(name: str, column: Column, where: Where) -> Iterator[tuple[str, FloatArray]]:
    """One column as one or more feature columns."""
    if isinstance(column, np.ndarray):
        yield name, _finite(name, column, where)
        return
    texts = [text or "" for text in column]
    numbers = as_numbers(texts)
    if numbers is None:
        yield from one_hot(name, texts, where)
        return
    # An empty text is missing; a text that spells NaN or infinity is a fault of the file.
    spelt = np.isnan(numbers) & np.array([bool(text) for text in texts])
    if spelt.any():
        raise _not_finite(name, where(int(np.argmax(spelt))))
    yield name, _finite(name, numbers, where)


def code_texts(column: Column) -> list[str]:
    """A column of codes as texts, so that 1 and 1.0 are one code; a missing one is empty."""
    texts = [] if isinstance(column, np.ndarray) else [text or "" for text in column]
    numbers = column if isinstance(column, np.ndarray) else as_numbers(texts)
    if numbers is None:
        return texts
    return [number_text(value) if np.isfinite(value) else "" for value in numbers]


def one_hot(name: str, texts: Sequence[str], where: Where) -> Iterator[tuple[str, FloatArray]]:
    """A 0/1 column for each of few texts, sorted; a missing text is a row of zeros."""
    distinct = sorted(set(texts) - {""})
    if len(distinct) > MOST_TEXTS:
        numbers = {text: as_numbers([text]) is not None for text in distinct}
        if sum(numbers.values()) > len(distinct) / 2:
            row = next(row for row, text in enumerate(texts) if text and not numbers[text])
            raise DataError(
                f'{where(row)}, column "{name}": expected a number as in most rows, found a text: '
                "mend the row, or set data.missing if the text stands for a missing value"
            )
        raise DataError(
            f'{where(0)}: expected at most {MOST_TEXTS} different texts in column "{name}", found '
            f'{len(distinct)}: add "{name}" to data.drop'
        )
    values = np.array(texts)
    for text in distinct:
        yield f"{name}={text}", (values == text).astype(np.float64)


def _finite(name: str, numbers: FloatArray, where: Where) -> FloatArray:
    bad = np.abs(numbers) > LARGEST
    if bad.any():
        raise _not_finite(name, where(int(np.argmax(bad))))
    return numbers


def _not_finite(name: str, place: str) -> DataError:
    return DataError(
        f'{place}, column "{name}": expected a finite number, found none: mend the row, or leave '
        "the cell empty if the value is missing"
    )
