"""NumPy archives with inputs and labels; never with pickled objects."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.data.files import find_file
from fedistill.data.labels import number_labels
from fedistill.data.records import of_arrays
from fedistill.data.table import Query, Table
from fedistill.errors import DataError

INPUTS = ("inputs", "images", "data", "x", "X")
LABELS = ("labels", "y", "targets", "target")

DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What a damaged archive can raise; RuntimeError: a byte claims encryption or a later version."""

Arrays = dict[str, npt.NDArray[Any]]


def read_npz(query: Query) -> Table:
    """NumPy archive: npz:FILE has inputs and labels, npz:FILE#train has train_inputs and so on."""
    name, _, split = query.name.partition("#")
    place = find_file(query.settings.path, name)
    prefix = f"{split}_" if split else ""
    wanted = [prefix + key for key in (*INPUTS, *LABELS)]
    arrays = load_arrays(place, wanted)
    raw = _first(arrays, prefix, INPUTS, place)
    inputs, kind = shape_inputs(raw, place)
    source = f"npz:{query.name}"
    auto = "standard" if kind == "table" else "centred" if raw.dtype.kind == "u" else "none"
    if not query.labelled:
        unknown = np.full(len(inputs), -1, dtype=np.int64)
        return Table(source, inputs, unknown, (), kind=kind, auto=auto)
    found = _first(arrays, prefix, LABELS, place)
    if found.shape[:1] != raw.shape[:1]:
        raise DataError(
            f"{place}: expected {len(raw)} labels, one for each row of the inputs, found "
            f"{found.shape[0] if found.ndim else 'a single value'}: write both from the same rows"
        )
    labels, classes = number_labels(
        found, lambda row: f"{place}, row {row}", query.settings.positive_above
    )
    known = of_arrays(raw, found)
    return Table(source, inputs, labels, classes, kind=kind, auto=auto, records=known)


def load_arrays(place: Path, wanted: list[str] | None = None) -> Arrays:
    """The arrays of an archive, all or those wanted; code inside is refused."""
    try:
        # Opened here, because np.load leaves the file open when it finds no archive in it.
        with place.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError
            names = [name for name in archive.files if wanted is None or name in wanted]
            return {name: archive[name] for name in names}
    except DAMAGE:
        raise DataError(
            f"{place}: expected an npz archive of plain number arrays, found a damaged file or "
            "Python objects (which could carry code): write it again with numpy.savez"
        ) from None


def shape_inputs(raw: npt.NDArray[Any], place: Path) -> tuple[npt.NDArray[np.float32], str]:
    """Float inputs and their kind: two dimensions are a table, more are images, channels first."""
    if raw.ndim not in (2, 3, 4) or not raw.size or raw.dtype.kind not in "biuf":
        raise DataError(
            f"{place}: expected number inputs [rows, columns], [rows, h, w] or [rows, h, w, "
            f"channels], found {raw.dtype} {raw.shape}: reshape them"
        )
    with np.errstate(over="ignore"):
        inputs = raw.astype(np.float32)
    finite = np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{place}, row {int(np.argmin(finite))}: expected finite numbers, found NaN or inf: "
            "mend the row or leave it out"
        )
    if raw.ndim == 3:
        return inputs[:, None], "image"
    if raw.ndim == 4 and raw.shape[1] not in (1, 3, 4) and raw.shape[3] in (1, 3, 4):
        return np.ascontiguousarray(inputs.transpose(0, 3, 1, 2)), "image"
    return inputs, "table" if raw.ndim == 2 else "image"


def _first(arrays: Arrays, prefix: str, keys: tuple[str, ...], place: Path) -> npt.NDArray[Any]:
    for key in keys:
        if prefix + key in arrays:
            return arrays[prefix + key]
    raise DataError(
        f"{place}: expected an array named {' or '.join(prefix + key for key in keys)}, found "
        "none: rename it, or name the split as npz:FILE#SPLIT"
    )
