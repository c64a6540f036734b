"""Columns of Apache Arrow: parquet files, and what Hugging Face datasets hand over."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedistill.data.extras import optional
from fedistill.data.files import find_files
from fedistill.data.images import decode_images
from fedistill.data.records import of_bytes, of_cells
from fedistill.data.table import Query, Table
from fedistill.data.tabular import (
    Column,
    Frame,
    assemble,
    find_column,
    label_column,
    labels_of,
    site_column,
    sites,
    subject_column,
    subjects,
)
from fedistill.errors import DataError


def read_parquet(query: Query) -> Table:
    """Parquet: parquet:FILE or parquet:PATTERN, numbers, few texts, or an image column."""
    reader = optional("pyarrow.parquet", "parquet", "reading parquet files", package="pyarrow")
    arrow = optional("pyarrow", "parquet", "reading parquet files")
    places = find_files(query.settings.path, query.name)
    try:
        table = arrow.concat_tables([reader.read_table(place) for place in places])
    except (arrow.ArrowException, OSError):
        raise DataError(
            f"{places[0]}: expected whole parquet files with the same columns, found another or a "
            "damaged one: download it again"
        ) from None
    return from_arrow(table, f"parquet:{query.name}", query)


def from_arrow(table: Any, source: str, query: Query, names: tuple[str, ...] = ()) -> Table:
    """An Arrow table as a table of images where it has an image column, else of numbers.

    Args:
        table: a ``pyarrow.Table``.
        source: its name in messages.
        query: what is asked.
        names: the class names behind label numbers; empty: looked up in the table's metadata.
    """
    arrow = optional("pyarrow", "parquet", "reading parquet files")
    if not table.num_rows:
        raise DataError(f"{source}: expected rows, found none: check the file")

    def where(row: int) -> str:
        return f"{source}, row {row}"

    columns = tuple(table.column_names)
    bare = Frame(source, columns, (), where)
    dropped = {columns[find_column(name, bare, "data.drop")] for name in query.settings.drop}
    subject = subject_column(bare, query)
    special = label_column(bare, query), site_column(bare, query), subject
    needed = {columns[index] for index in special if index is not None}
    features = [name for name in columns if name not in dropped | needed]
    image = next((name for name in features if is_image(arrow, table, name)), None)
    # Beside an image only label, site and owner count. What is left out stays as a column of NaN,
    # so that columns can still be named by number.
    kept = needed | (set() if image else set(features))
    frame = Frame(
        source,
        columns,
        tuple(
            to_column(arrow, table, name, whole=index == subject)
            if name in kept
            else np.full(table.num_rows, np.nan)
            for index, name in enumerate(columns)
        ),
        where,
        classes=names or class_names(table.schema, query.settings.label),
        records=of_cells(columns, [as_read(arrow, table, name) for name in columns]),
    )
    if image is None:
        return assemble(frame, query)
    labels, classes = labels_of(frame, query)
    inputs = decode_images(pictures(table.column(image)), where)
    return Table(
        source,
        inputs,
        labels,
        classes,
        kind="image",
        auto="centred",
        columns=sites(frame, query),
        subjects=subjects(frame, query),
        records=frame.records,
    )


def is_image(arrow: Any, table: Any, name: str) -> bool:
    """Whether a column holds encoded pictures: bytes, or the struct of Hugging Face's Image."""
    kind = table.schema.field(name).type
    if arrow.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))


def pictures(column: Any) -> Iterator[bytes | None]:
    """The bytes of each picture; read from its path where the column holds only that."""
    for cell in column:
        value = cell.as_py()
        if not isinstance(value, dict):
            yield value
        elif value["bytes"] is None and value.get("path") and Path(value["path"]).is_file():
            yield Path(value["path"]).read_bytes()
        else:
            yield value["bytes"]


def as_read(arrow: Any, table: Any, name: str) -> list[Any]:
    """The cells of one Arrow column, of any type, for the digests of the rows."""
    column = table.column(name)
    if is_image(arrow, table, name):
        return [of_bytes(picture) for picture in pictures(column)]
    if arrow.types.is_temporal(column.type):  # as texts: no Python type has nanoseconds
        with contextlib.suppress(arrow.ArrowException):
            column = column.cast(arrow.string())
    return list(column.to_pylist())


def to_column(arrow: Any, table: Any, name: str, *, whole: bool = False) -> Column:
    """One Arrow column as numbers or texts.

    Args:
        arrow: the module ``pyarrow``.
        table: a ``pyarrow.Table``.
        name: of the column.
        whole: whole numbers become texts: ids may have more digits than a float keeps.
    """
    column = table.column(name)
    kinds, kind = arrow.types, column.type
    if kinds.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if whole and kinds.is_integer(kind):
        return list(column.cast(arrow.string()).to_pylist())
    if kinds.is_boolean(kind) or kinds.is_integer(kind) or kinds.is_floating(kind):
        numbers = column.cast(arrow.float64(), safe=False).to_numpy(zero_copy_only=False)
        return np.asarray(numbers, dtype=np.float64)
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        return [text or None for text in column.to_pylist()]
    raise DataError(
        f'column "{name}": expected numbers or texts, found {kind}: add "{name}" to data.drop'
    )


def class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The class names that Hugging Face writes into a parquet file's metadata, or none."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])
        names = found["info"]["features"][label]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return ()
