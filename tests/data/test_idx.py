"""The idx parser by hand, and cut at every eighth of its length."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedistill.config import DataSettings
from fedistill.data import read
from fedistill.data.idx import parse_idx
from fedistill.errors import DataError

PIXELS = bytes(range(24))


def images(count: int = 4, magic: int = 0x803) -> bytes:
    return struct.pack(">4I", magic, count, 2, 3) + PIXELS


def labels(count: int = 4) -> bytes:
    return struct.pack(">2I", 0x801, count) + bytes([0, 2, 1, 0])[:count]


def put(root: Path, pictures: bytes, marks: bytes, end: str = "") -> DataSettings:
    pack = gzip.compress if end else bytes
    (root / f"t-images-idx3-ubyte{end}").write_bytes(pack(pictures))
    (root / f"t-labels-idx1-ubyte{end}").write_bytes(pack(marks))
    return DataSettings(path=str(root))


@pytest.mark.parametrize("end", ["", ".gz"])
def test_images_become_rows_with_a_channel(tmp_path: Path, end: str) -> None:
    table = read("idx:t", put(tmp_path, images(), labels(), end))
    assert table.inputs.shape == (4, 1, 2, 3)
    assert table.inputs.dtype == np.float32
    assert table.inputs.ravel().tolist() == list(range(24))
    assert (table.kind, table.auto, table.classes) == ("image", "centred", ("0", "1", "2"))
    assert table.labels.tolist() == [0, 2, 1, 0]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("eighth", range(8))
def test_a_file_cut_at_any_eighth_is_refused(tmp_path: Path, end: str, eighth: int) -> None:
    settings = put(tmp_path, images(), labels(), end)
    place = tmp_path / f"t-images-idx3-ubyte{end}"
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) * eighth // 8])
    with pytest.raises(DataError, match="download it again"):
        read("idx:t", settings)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (images(magic=0x801), "another kind of file"),
        (images() + b"\0", "found 41"),
        (images(count=5), "expected 46 bytes for 5 items, found 40"),
        (struct.pack(">4I", 0x803, 0, 2, 3), "cut off or damaged"),
        (struct.pack(">4I", 0x803, *[2**32 - 1] * 3), "cut off or damaged"),
        (b"", "header of 16 bytes"),
    ],
)
def test_wrong_headers_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_idx(content, 3, Path("x"))


def test_fault_47_counts_of_images_and_labels_must_agree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 4 labels, one for each image, found 3"):
        read("idx:t", put(tmp_path, images(), labels(3)))


def test_proxy_images_need_no_labels(tmp_path: Path) -> None:
    settings = put(tmp_path, images(), labels())
    (tmp_path / "t-labels-idx1-ubyte").unlink()
    assert read("idx:t", settings, labelled=False).labels.tolist() == [-1] * 4
    with pytest.raises(DataError, match="t-labels-idx1-ubyte, found none"):
        read("idx:t", settings)


def test_fashion_mnist(real: Callable[[str], Path]) -> None:
    real("fashion_mnist")
    table = read("idx:fashion_mnist/t10k", DataSettings())
    assert table.inputs.shape == (10000, 1, 28, 28)
    assert np.bincount(table.labels).sum() == 10000
    assert len(table.classes) == 10
