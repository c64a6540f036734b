"""The two small sets that come with scikit-learn: no download, no files."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fedistill.data.labels import number_labels
from fedistill.data.table import Query, Table


def read_digits(query: Query) -> Table:
    """1,797 handwritten digits, 64 pixels in [0, 1], 10 classes (scikit-learn)."""
    found = _datasets().load_digits()
    inputs = (found.data / 16).astype(np.float32)
    labels, classes = number_labels(
        found.target, lambda row: f"digits, row {row}", query.settings.positive_above
    )
    return Table("digits", inputs, labels, classes, auto="none")


def read_breast_cancer(query: Query) -> Table:
    """569 tumours, 30 measurements, malignant or benign (scikit-learn)."""
    found = _datasets().load_breast_cancer()
    labels, _ = number_labels(found.target, lambda row: f"breast-cancer, row {row}")
    classes = tuple(str(name) for name in found.target_names)
    features = tuple(str(name) for name in found.feature_names)
    return Table("breast-cancer", found.data.astype(np.float32), labels, classes, features=features)


def _datasets() -> Any:
    return importlib.import_module("sklearn.datasets")
