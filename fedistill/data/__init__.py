"""Where rows come from, and who holds which: sources, scaling, partitions."""

from __future__ import annotations

from fedistill.config import DataSettings, ProxySettings
from fedistill.data.overlap import overlap
from fedistill.data.partition import by_column, by_file, dirichlet, iid, shards
from fedistill.data.prepare import Federated, load, prepare
from fedistill.data.scale import Scaler
from fedistill.data.sources import read
from fedistill.data.stream import Experience, Stream, experiences, streams
from fedistill.data.table import Table
from fedistill.types import Dataset

__all__ = [
    "Experience",
    "Federated",
    "Scaler",
    "Stream",
    "Table",
    "breast_cancer",
    "by_column",
    "by_file",
    "digits",
    "dirichlet",
    "experiences",
    "iid",
    "load",
    "overlap",
    "prepare",
    "read",
    "shards",
    "streams",
]


def digits(seed: int = 7, proxy_rows: int = 400, test_rows: int | float = 360) -> Dataset:
    """1,797 handwritten digits, 64 pixels in [0, 1], 10 classes."""
    return load(
        DataSettings(source="digits", test_rows=test_rows), ProxySettings(rows=proxy_rows), seed
    )


def breast_cancer(seed: int = 7, proxy_rows: int = 100, test_rows: int | float = 0.2) -> Dataset:
    """569 tumours, 30 measurements scaled by the public rows, malignant or benign."""
    return load(
        DataSettings(source="breast-cancer", test_rows=test_rows),
        ProxySettings(rows=proxy_rows),
        seed,
    )
