"""NumPy archives: names, shapes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedistill.config import DataSettings
from fedistill.data import Table, read
from fedistill.errors import DataError


def load(root: Path, name: str = "a.npz", **arrays: Any) -> Table:
    np.savez(root / "a.npz", **arrays)
    return read(f"npz:{name}", DataSettings(path=str(root)))


@pytest.mark.parametrize(("inputs", "labels"), [("inputs", "labels"), ("x", "y"), ("X", "targets")])
def test_tables_under_usual_names(tmp_path: Path, inputs: str, labels: str) -> None:
    table = load(tmp_path, **{inputs: np.eye(3), labels: np.array([0, 1, 2])})
    assert (table.kind, table.auto, table.classes) == ("table", "standard", ("0", "1", "2"))
    assert table.inputs.tolist() == np.eye(3).tolist()


def test_a_split_by_its_prefix_and_labels_in_a_column(tmp_path: Path) -> None:
    pixels = np.zeros((2, 5, 6), np.uint8)
    table = load(
        tmp_path,
        "a.npz#val",
        val_images=pixels,
        val_labels=np.array([[1], [0]]),
        train_images=pixels,
    )
    assert (table.inputs.shape, table.kind, table.auto) == ((2, 1, 5, 6), "image", "centred")
    assert table.labels.tolist() == [1, 0]


def test_channels_come_first(tmp_path: Path) -> None:
    pixels = np.arange(2 * 5 * 6 * 3).reshape(2, 5, 6, 3).astype(np.float32)
    table = load(tmp_path, images=pixels, labels=np.array([0, 1]))
    assert table.inputs.shape == (2, 3, 5, 6)
    assert table.inputs[1, 2, 3, 4] == pixels[1, 3, 4, 2]
    assert table.auto == "none"


@pytest.mark.parametrize(
    ("labels", "row"),
    [
        ([0, -1, 1], 1),
        ([0, 1, 0.5], 2),
        ([0, 1, np.nan], 2),
        ([0, 1, 10**9], 2),
    ],
)
def test_fault_47_labels_out_of_range_are_named_by_row(
    tmp_path: Path, labels: list[float], row: int
) -> None:
    with pytest.raises(DataError, match=f"row {row}: expected a class number") as caught:
        load(tmp_path, x=np.eye(3), y=np.array(labels))
    assert str(10**9) not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_fault_47_features_must_be_finite(tmp_path: Path, value: float) -> None:
    inputs = np.zeros((4, 2))
    inputs[2, 1] = value
    with pytest.raises(DataError, match="row 2: expected finite numbers"):
        load(tmp_path, x=inputs, y=np.zeros(4, np.int64))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.array([{}, {}], object), "y": np.zeros(2)}, "Python objects"),
        ({"x": np.zeros((2, 2)), "y": np.zeros(3)}, "expected 2 labels.*found 3"),
        ({"x": np.zeros((2, 2)), "y": np.array(1)}, "found a single value"),
        ({"x": np.zeros(2), "y": np.zeros(2)}, "reshape"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "reshape"),
        ({"x": np.array([["a"]]), "y": np.zeros(1)}, "reshape"),
        ({"x": np.zeros((2, 2)), "y": np.array(["a", "b"])}, "one number per row"),
        ({"x": np.zeros((2, 2)), "y": np.zeros((2, 2))}, "one number per row"),
        ({"z": np.zeros((2, 2))}, "expected an array named inputs or"),
        ({"x": np.zeros((2, 2))}, "expected an array named labels or"),
    ],
)
def test_archives_without_use_are_refused(
    tmp_path: Path, arrays: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        load(tmp_path, **arrays)


@pytest.mark.parametrize("eighth", range(8))
def test_a_cut_archive_is_refused(tmp_path: Path, eighth: int) -> None:
    load(tmp_path, x=np.eye(3), y=np.arange(3))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) * eighth // 8])
    with pytest.raises(DataError, match="damaged file"):
        read("npz:a.npz", DataSettings(path=str(tmp_path)))


@pytest.mark.parametrize(("place", "value"), [(4, 250), (6, 1), (6, 64), (8, 99)])
def test_a_flipped_byte_is_refused(tmp_path: Path, place: int, value: int) -> None:
    load(tmp_path, x=np.eye(3), y=np.arange(3))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + place + 2] = value
    (tmp_path / "a.npz").write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged file"):
        read("npz:a.npz", DataSettings(path=str(tmp_path)))


def test_pneumonia(real: Callable[[str], Path]) -> None:
    real("pneumoniamnist_sub")
    table = read("npz:pneumoniamnist_sub/pneumoniamnist.npz#val", DataSettings())
    assert table.inputs.shape == (524, 1, 28, 28)
    assert table.classes == ("0", "1")
