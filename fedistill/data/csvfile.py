"""Text tables: one or many files with separated values, packed or not."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from fedistill.config import DataSettings
from fedistill.data.files import find_files, read_bytes, short_names
from fedistill.data.records import of_cells
from fedistill.data.table import Query, Table
from fedistill.data.tabular import Frame, assemble
from fedistill.errors import DataError

Numbered = list[tuple[int, list[str]]]
"""Cells of each row, with the number of its line."""


def read_csv(query: Query) -> Table:
    """Text tables: csv:FILE or csv:PATTERN, .gz and .xz too; column 'file' names the file."""
    settings = query.settings
    if len(settings.separator) != 1:
        raise DataError(
            f"data.separator: expected one character, found {len(settings.separator)}: write "
            r'"\t" for a tab'
        )
    places = find_files(settings.path, query.name)
    return assemble(read_frame(places, query), query)


def read_frame(places: list[Path], query: Query) -> Frame:
    """All files below each other, as columns of text."""
    settings = query.settings
    names: tuple[str, ...] | None = None
    rows: list[list[str]] = []
    origin: list[tuple[Path, int]] = []
    files: list[str] = []
    for place, short in zip(places, short_names(places), strict=True):
        lines = read_lines(place, settings)
        if not lines:
            raise DataError(f"{place}: expected rows, found an empty file: check it")
        width = len(lines[0][1])
        own = tuple(map(str, range(width)))
        if settings.header:
            own = header(place, lines.pop(0)[1])
        if names is not None and own != names:
            raise DataError(
                f"{place}: expected the same {len(names)} columns as {places[0].name}, found "
                "others: read them as two sources"
            )
        names = own
        check_width(place, lines, width)
        rows.extend(cells for _, cells in lines)
        origin.extend((place, number) for number, _ in lines)
        files.extend([short] * len(lines))

    def where(row: int) -> str:
        place, number = origin[row]
        return f"{place}, line {number}"

    empty = {"", *settings.missing.split()}
    cells = list(zip(*rows, strict=True))
    columns = tuple([None if cell in empty else cell for cell in column] for column in cells)
    known = of_cells(names or (), cells) if cells else None
    return Frame(f"csv:{query.name}", names or (), columns, where, {"file": files}, records=known)


def read_lines(place: Path, settings: DataSettings) -> Numbered:
    """The rows of one file that are not blank, cells stripped of spaces."""
    try:
        text = read_bytes(place).decode("utf-8-sig")
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=settings.separator, skipinitialspace=True
        )
        return [
            (reader.line_num, [cell.strip() for cell in cells])
            for cells in reader
            if any(cell.strip() for cell in cells)
        ]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: expected UTF-8 text, found another byte at position {error.start}: convert "
            "the file"
        ) from None
    except csv.Error as error:
        raise DataError(
            f"{place}: expected separated values, found text that cannot be split ({error}): check "
            "quotes and data.separator"
        ) from None


def header(place: Path, cells: list[str]) -> tuple[str, ...]:
    """The column names, all different."""
    if len(set(cells)) < len(cells):
        column = next(index for index, name in enumerate(cells) if name in cells[:index])
        raise DataError(
            f"{place}, line 1: expected different column names, found that of column {column} "
            "twice: rename it, or set data.header = false if the line holds data"
        )
    return tuple(cells)


def check_width(place: Path, lines: Numbered, width: int) -> None:
    """Every row must have as many cells as the first."""
    for number, cells in lines:
        if len(cells) != width:
            raise DataError(
                f"{place}, line {number}: expected {width} columns as in line 1, found "
                f"{len(cells)}: mend the line, or check data.separator"
            )
