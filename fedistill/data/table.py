"""What every reader returns, and what it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from fedistill.config import DataSettings
from fedistill.data.records import Records
from fedistill.errors import DataError
from fedistill.types import FloatArray, IntArray, Rows

Texts = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Query:
    """What a reader is asked for.

    Attributes:
        name: the source without its prefix.
        settings: how files are read.
        column: the column whose values are the sites; it is then no feature.
        labelled: whether labels are needed; those of proxy rows are not.
        owned: whether it must be known whose rows they are, where ``data.subject`` is set.
    """

    name: str
    settings: DataSettings
    column: str = ""
    labelled: bool = True
    owned: bool = True


@dataclass(frozen=True, eq=False)
class Table:
    """All rows of one source, as read: unscaled, in the order of the source.

    Attributes:
        name: the source.
        inputs: ``[n, ...]`` float32; NaN stands for a missing value, in tables only.
        labels: ``[n]`` int64, class numbers from 0; -1 where no label was needed and none found.
        classes: the class names, in the order of their numbers.
        kind: "table" or "image".
        auto: what ``scale = "auto"`` means for this source.
        features: names of the columns of a table, "column=value" for one of few texts.
        columns: the requested site column, by name.
        subjects: ``[n]`` whose row it is; None where the source does not say.
        records: ``[n]`` digests of the records (:mod:`fedistill.data.records`).
    """

    name: str
    inputs: FloatArray
    labels: IntArray
    classes: tuple[str, ...]
    kind: str = "table"
    auto: str = "standard"
    features: tuple[str, ...] = ()
    columns: Mapping[str, Texts] = field(default_factory=dict)
    subjects: Texts | None = None
    records: Records | None = None

    def __len__(self) -> int:
        return len(self.labels)


def rows_of(table: Table, column: str = "") -> Rows:
    """The table as rows with row numbers and owners, and with sites where a column is asked for."""
    if column and column not in table.columns:
        raise DataError(
            f'{table.name}: expected a column "{column}" that holds the sites, found none: '
            'only csv, parquet, hf and openml sources have columns; set clients.partition to "iid"'
        )
    ids = np.arange(len(table), dtype=np.int64)
    site = table.columns[column] if column else None
    return Rows(table.inputs, table.labels, ids, site, table.subjects, table.records)


def align(table: Table, like: Table) -> Table:
    """``table`` with the features and the class numbers of ``like``.

    A category that only one of the two has seen becomes a column of zeros.
    """
    aligned = align_features(table, like)
    if table.classes == like.classes:
        return aligned
    number = {name: index for index, name in enumerate(like.classes)}
    # The test file of Adult, in most copies, ends each label with a dot.
    numbers = np.array(
        [number.get(name, number.get(name.rstrip("."), -1)) for name in table.classes],
        dtype=np.int64,
    )
    labels = numbers[table.labels]
    if (labels < 0).any():
        raise DataError(
            f"{table.name}: expected the {len(like.classes)} classes of {like.name}, found another "
            f"one in row {int(np.argmax(labels < 0))}: compare the label columns of both"
        )
    return replace(aligned, labels=labels, classes=like.classes)


def align_features(table: Table, like: Table) -> Table:
    """``table`` with the features of ``like`` in their order; its labels stay as they are."""
    if table.features != like.features:
        return replace(table, inputs=_reorder(table, like), features=like.features)
    if table.inputs.shape[1:] != like.inputs.shape[1:]:
        raise DataError(
            f"{table.name}: expected rows of shape {like.inputs.shape[1:]} as in {like.name}, "
            f"found {table.inputs.shape[1:]}: use two sources of one kind"
        )
    return table


def _reorder(table: Table, like: Table) -> FloatArray:
    place = {name: index for index, name in enumerate(table.features)}
    encoded = {name.partition("=")[0] for name in table.features if "=" in name}
    inputs = np.zeros((len(table), len(like.features)), dtype=np.float32)
    for index, name in enumerate(like.features):
        if name in place:
            inputs[:, index] = table.inputs[:, place[name]]
        elif name.partition("=")[0] not in encoded or "=" not in name:
            shown = name.partition("=")[0]
            raise DataError(
                f'{table.name}: expected a column "{shown}" of the same kind as in {like.name}, '
                f"found none: compare the two, or name the column in data.drop"
            )
    surplus = [name for name in table.features if "=" not in name and name not in like.features]
    if surplus:
        raise DataError(
            f'{table.name}: expected the columns of {like.name}, found "{surplus[0]}" besides: '
            "name it in data.drop"
        )
    return inputs
