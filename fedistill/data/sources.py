"""Where rows come from: a name, or a prefix and a name, and the reader behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fedistill.config import DataSettings
from fedistill.data.builtin import read_breast_cancer, read_digits
from fedistill.data.csvfile import read_csv
from fedistill.data.idx import read_idx
from fedistill.data.npz import read_npz
from fedistill.data.online import read_hf, read_openml
from fedistill.data.parquet import read_parquet
from fedistill.data.records import of_arrays
from fedistill.data.sessions import read_sessions
from fedistill.data.table import Query, Table
from fedistill.errors import DataError, did_you_mean

SOURCES: Mapping[str, Callable[[Query], Table]] = {
    "digits": read_digits,
    "breast-cancer": read_breast_cancer,
    "idx": read_idx,
    "csv": read_csv,
    "npz": read_npz,
    "parquet": read_parquet,
    "sessions": read_sessions,
    "hf": read_hf,
    "openml": read_openml,
}

BUILTIN = ("digits", "breast-cancer")


def read(
    source: str,
    settings: DataSettings,
    *,
    column: str = "",
    labelled: bool = True,
    owned: bool | None = None,
) -> Table:
    """Read all rows of a source, unscaled.

    Args:
        source: a name, or a prefix and a name such as ``csv:heart/*.data``.
        settings: how files are read; its own ``source`` is not looked at.
        column: the column that holds the sites, where one is asked for.
        labelled: whether rows without labels are an error.
        owned: whether rows of which nobody knows whose they are are an error, where
            ``data.subject`` is set; not given: as ``labelled``.

    Raises:
        DataError: an unknown source, an absent file, or content that cannot be used.
        MissingExtra: a source that needs a package which is not installed.
    """
    prefix, colon, name = source.partition(":")
    if prefix not in SOURCES:
        raise DataError(f'unknown data source "{prefix}"{did_you_mean(prefix, SOURCES)}')
    if (prefix in BUILTIN) == bool(colon) or (colon and not name):
        wanted = f'"{prefix}" alone' if prefix in BUILTIN else f'"{prefix}:" and a name'
        raise DataError(f'data source: expected {wanted}, found "{source}": write it so')
    owned = labelled if owned is None else owned
    table = SOURCES[prefix](Query(name, settings, column, labelled, owned))
    if labelled and table.records is None:
        table = replace(table, records=of_arrays(table.inputs, table.labels))
    if owned and settings.subject and table.subjects is None:
        raise DataError(
            f'{source}: expected a column "{settings.subject}" (data.subject) that says whose row '
            "it is, found none: only csv, parquet, hf and openml sources have columns, and "
            "sessions know theirs; leave data.subject out"
        )
    return table
