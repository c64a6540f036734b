"""Parquet tables and pictures; skipped where pyarrow or Pillow is absent."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedistill.config import DataSettings
from fedistill.data import Table, extras, read
from fedistill.errors import DataError, MissingExtra

arrow = pytest.importorskip("pyarrow", reason="pyarrow absent: pip install 'fedistill[parquet]'")
parquet = importlib.import_module("pyarrow.parquet")


def load(root: Path, columns: dict[str, Any], column: str = "", **changes: Any) -> Table:
    parquet.write_table(arrow.table(columns), root / "t.parquet")
    settings = replace(DataSettings(path=str(root)), **changes)
    return read("parquet:t.parquet", settings, column=column)


def picture(value: int, size: tuple[int, int] = (4, 3), mode: str = "RGB") -> bytes:
    pillow = pytest.importorskip("PIL.Image", reason="Pillow absent")
    target = io.BytesIO()
    pillow.new(mode, size, value).save(target, "PNG")
    return target.getvalue()


def test_numbers_texts_and_gaps(tmp_path: Path) -> None:
    table = load(
        tmp_path,
        {
            "a": [1, None, 3],
            "b": [True, False, None],
            "c": ["x", None, "y"],
            "label": ["n", "y", "n"],
        },
    )
    assert table.features == ("a", "b", "c=x", "c=y")
    expected = [[1, 1, 1, 0], [np.nan, 0, 0, 0], [3, np.nan, 0, 1]]
    np.testing.assert_array_equal(table.inputs, np.array(expected, np.float32))
    assert (table.classes, table.labels.tolist()) == (("n", "y"), [0, 1, 0])


def test_columns_by_number_and_sites(tmp_path: Path) -> None:
    columns = {"a": [1.0, 2.0], "when": [b"x", b"y"], "ward": [7, 8], "z": [0, 1]}
    table = load(tmp_path, columns, "ward", label="-1", drop=("when",))
    assert table.features == ("a",)
    assert table.columns["ward"].tolist() == ["7", "8"]


def test_pictures_as_bytes_or_as_struct(tmp_path: Path) -> None:
    raw = [picture(255), picture(0)]
    for cells in (raw, [{"bytes": content, "path": None} for content in raw]):
        table = load(tmp_path, {"img": cells, "label": [1, 0], "lossless": [True, True]})
        assert (table.inputs.shape, table.kind, table.auto) == ((2, 3, 3, 4), "image", "centred")
        assert table.inputs[0, :, 0, 0].tolist() == [255, 0, 0]
        assert table.labels.tolist() == [1, 0]
    grey = load(tmp_path, {"img": [picture(9, mode="L")], "label": [0]})
    assert grey.inputs.shape == (1, 1, 3, 4)


def test_fault_47_bad_pictures_and_labels_are_named_by_row(tmp_path: Path) -> None:
    good = picture(1)
    with pytest.raises(DataError, match="row 1: expected an image, found bytes"):
        load(tmp_path, {"img": [good, good[:20]], "label": [0, 1]})
    with pytest.raises(DataError, match="row 1: expected an image of shape"):
        load(tmp_path, {"img": [good, picture(1, (5, 5))], "label": [0, 1]})
    with pytest.raises(DataError, match="row 1: expected a label"):
        load(tmp_path, {"img": [good, good], "label": [0, None]})


def test_fault_47_infinite_features_are_named_by_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='row 1, column "a": expected a finite number'):
        load(tmp_path, {"a": [1.0, np.inf], "label": [0, 1]})


def test_other_kinds_of_column_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'add "a" to data\.drop'):
        load(tmp_path, {"a": [[1], [2]], "label": [0, 1]})
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="expected whole parquet files"):
        read("parquet:t.parquet", DataSettings(path=str(tmp_path)))


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"'pyarrow'.*fedistill\[parquet\]"):
        read("parquet:t.parquet", DataSettings())


def test_cifar10(real: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason="Pillow absent")
    whole = parquet.read_table(real("cifar10/test.parquet"))
    parquet.write_table(whole.slice(0, 500), tmp_path / "c.parquet")
    table = read("parquet:c.parquet", DataSettings(path=str(tmp_path)))
    assert table.inputs.shape == (500, 3, 32, 32)
    assert (table.classes[0], table.classes[9]) == ("airplane", "truck")
    assert 100 < float(table.inputs.mean()) < 140
