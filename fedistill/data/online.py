"""Data from the network: Hugging Face and OpenML. Without one, they say what to put where."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fedistill.data.extras import optional
from fedistill.data.files import data_root
from fedistill.data.parquet import from_arrow
from fedistill.data.table import Query, Table
from fedistill.data.tabular import Column, Frame, assemble
from fedistill.errors import DataError


def read_hf(query: Query) -> Table:
    """Hugging Face: hf:NAME or hf:NAME@SPLIT (split 'train'), or a folder of that name."""
    datasets = optional("datasets", "online", "reading Hugging Face datasets")
    name, _, split = query.name.partition("@")
    local = data_root(query.settings.path) / name
    try:
        found = datasets.load_dataset(
            str(local) if local.is_dir() else name, split=split or "train"
        )
    # The loader passes on errors of several network and format libraries, which share no root.
    except Exception as error:
        raise DataError(
            f"hf:{query.name}: expected to load it, found {type(error).__name__}: check the name, "
            f"the split and the network, or download https://huggingface.co/datasets/{name} and "
            f"put its parquet files into {local}"
        ) from None
    names = getattr(found.features.get(query.settings.label), "names", None) or ()
    return from_arrow(found.with_format("arrow")[:], f"hf:{query.name}", query, tuple(names))


def read_openml(query: Query) -> Table:
    """OpenML: openml:ID or openml:NAME, one-hot where a column is nominal."""
    fetch = importlib.import_module("sklearn.datasets").fetch_openml
    wanted = {"data_id": int(query.name)} if query.name.isdigit() else {"name": query.name}
    try:
        found = fetch(**wanted, as_frame=False, parser="liac-arff")
    # Network, archive and format errors of scikit-learn share no root either.
    except Exception as error:
        raise DataError(
            f"openml:{query.name}: expected to load it, found {type(error).__name__}: check the "
            "name and the network, or download the table as csv from "
            f"https://www.openml.org/search?type=data&q={query.name} and read it with csv:FILE"
        ) from None
    return assemble(*openml_frame(found, query))


def openml_frame(found: Any, query: Query) -> tuple[Frame, Query]:
    """What scikit-learn hands over, as columns; the target is the label column."""
    source = f"openml:{query.name}"
    if not isinstance(found.data, np.ndarray) or found.target is None or found.target.ndim != 1:
        raise DataError(
            f"{source}: expected a dense table with one target column, found another layout: "
            "choose another data set"
        )
    target = (getattr(found, "target_names", None) or ["target"])[0]
    names = (*(str(name) for name in found.feature_names), str(target))
    categories = getattr(found, "categories", None) or {}
    columns = (*_columns(found.data, found.feature_names, categories), _target(found.target))
    frame = Frame(source, names, columns, lambda row: f"{source}, row {row}")
    label = query.settings.label
    if label == "label" and label not in names:
        query = relabel(query, str(target))
    return frame, query


def relabel(query: Query, label: str) -> Query:
    """The query with the source's own target where the settings name no label."""
    return replace(query, settings=replace(query.settings, label=label))


def _columns(data: Any, names: Any, categories: dict[str, list[str]]) -> Iterator[Column]:
    for index, name in enumerate(names):
        values = data[:, index]
        if name in categories:
            known = [str(text) for text in categories[name]]
            yield [None if _is_missing(code) else known[int(code)] for code in values]
        else:
            yield np.asarray(values, dtype=np.float64)


def _target(values: Any) -> Column:
    if values.dtype.kind in "biuf":
        return np.asarray(values, dtype=np.float64)
    return [None if value is None else str(value) for value in values]


def _is_missing(code: Any) -> bool:
    return code is None or bool(np.isnan(code))
