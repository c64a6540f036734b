"""The idx format of MNIST and its kin: a big-endian header, then bytes."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedistill.data.files import find_file, read_bytes
from fedistill.data.labels import number_labels
from fedistill.data.records import of_arrays
from fedistill.data.table import Query, Table
from fedistill.errors import DataError


def read_idx(query: Query) -> Table:
    """Images: idx:PREFIX finds PREFIX-images-idx3-ubyte and PREFIX-labels-idx1-ubyte, or .gz."""
    path = query.settings.path
    images_at = find_file(path, f"{query.name}-images-idx3-ubyte")
    images = parse_idx(read_bytes(images_at), 3, images_at)
    inputs = images[:, None].astype(np.float32)
    name = f"idx:{query.name}"
    if not query.labelled:
        unknown = np.full(len(images), -1, dtype=np.int64)
        return Table(name, inputs, unknown, (), kind="image", auto="centred")
    labels_at = find_file(path, f"{query.name}-labels-idx1-ubyte")
    raw = parse_idx(read_bytes(labels_at), 1, labels_at)
    if len(raw) != len(images):
        raise DataError(
            f"{labels_at}: expected {len(images)} labels, one for each image, found {len(raw)}: "
            "take both files from the same download"
        )
    labels, classes = number_labels(
        raw, lambda row: f"{labels_at}, row {row}", query.settings.positive_above
    )
    known = of_arrays(images, raw)
    return Table(name, inputs, labels, classes, kind="image", auto="centred", records=known)


def parse_idx(content: bytes, dimensions: int, place: Path) -> npt.NDArray[np.uint8]:
    """Bytes of an idx file as an array of ``dimensions`` dimensions."""
    head = 4 + 4 * dimensions
    if len(content) < head:
        raise DataError(
            f"{place}: expected a header of {head} bytes, found {len(content)} bytes: the file is "
            "cut off, download it again"
        )
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:head])
    if magic != 0x800 + dimensions:
        raise DataError(
            f"{place}: expected idx bytes in {dimensions} dimensions (0x{0x800 + dimensions:08x}), "
            f"found 0x{magic:08x}: this is another kind of file"
        )
    size = math.prod(shape)
    expected = head + size
    if len(content) != expected or size == 0:
        raise DataError(
            f"{place}: expected {expected} bytes for {shape[0]} items, found {len(content)}: the "
            "file is cut off or damaged, download it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)
