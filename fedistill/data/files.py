"""Where data files lie, how they are opened, and what to do when one is absent."""

from __future__ import annotations

import glob
import gzip
import lzma
import os
import re
import zlib
from pathlib import Path

from fedistill.errors import DataError

PACKED = (".gz", ".xz")

WELL_KNOWN = {
    "fashion_mnist": "https://github.com/zalandoresearch/fashion-mnist",
    "mnist": "https://huggingface.co/datasets/ylecun/mnist",
    "cifar10": "https://huggingface.co/datasets/uoft-cs/cifar10",
    "pneumoniamnist": "https://medmnist.com",
    "heart_disease": "https://archive.ics.uci.edu/dataset/45",
    "credit_default": "https://archive.ics.uci.edu/dataset/350",
    "adult": "https://archive.ics.uci.edu/dataset/2",
    "diabetes130": "https://archive.ics.uci.edu/dataset/296",
    "german_credit": "https://archive.ics.uci.edu/dataset/144",
}


def data_root(path: str) -> Path:
    """The folder that file sources are relative to: the setting, $FEDISTILL_DATA, or here."""
    return Path(path or os.environ.get("FEDISTILL_DATA") or ".")


def find_file(path: str, name: str) -> Path:
    """The one file ``name`` under the data root, packed or not."""
    place = data_root(path) / name
    for candidate in (place, *(Path(f"{place}{end}") for end in PACKED)):
        if candidate.is_file():
            return candidate
    raise missing(path, name)


def find_files(path: str, pattern: str) -> list[Path]:
    """The files that match ``pattern`` under the data root, sorted by name."""
    if not glob.has_magic(pattern):
        return [find_file(path, pattern)]
    found = sorted(Path(name) for name in glob.glob(str(data_root(path) / pattern), recursive=True))
    if files := [place for place in found if place.is_file()]:
        return files
    raise missing(path, pattern)


def missing(path: str, name: str) -> DataError:
    """One sentence: the expected path, and where the file can be downloaded."""
    plain = name.lower().replace("-", "_")
    found = [url for known, url in WELL_KNOWN.items() if known in plain]
    advice = f"download it from {found[0]} and put it there" if found else "put the file there"
    place = data_root(path) / name
    return DataError(
        f"expected a data file at {place}, found none: {advice}, or set data.path or "
        "FEDISTILL_DATA to the folder that holds it"
    )


def read_bytes(place: Path) -> bytes:
    """The whole content, unpacked by the name's end."""
    try:
        if place.suffix == ".gz":
            with gzip.open(place) as packed:
                return packed.read()
        if place.suffix == ".xz":
            with lzma.open(place) as packed:
                return packed.read()
        return place.read_bytes()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        raise DataError(
            f"{place}: expected a whole {place.suffix[1:]} file, found it cut off or damaged: "
            "download it again"
        ) from None
    except OSError as error:
        raise DataError(
            f"{place}: expected a readable file, found {type(error).__name__}: check its rights"
        ) from None


def short_names(places: list[Path]) -> list[str]:
    """What differs between the paths: ``processed.va.data`` among its kind is ``va``.

    >>> short_names([Path("a/site-ulm.csv"), Path("a/site-bern.csv.gz")])
    ['ulm', 'bern']
    """
    plain = [re.sub(r"\.(gz|xz)$", "", place.as_posix()) for place in places]
    if len(plain) == 1:
        return [Path(plain[0]).stem]
    parts = [re.split(r"([._/\-])", name) for name in plain]
    head = common(parts)
    tail = common([part[head:][::-1] for part in parts])
    names = ["".join(part[head : len(part) - tail]) for part in parts]
    if "" in names or len(set(names)) < len(names):
        return [place.as_posix() for place in places]
    return names


def common(parts: list[list[str]]) -> int:
    """How many leading pieces all lists share."""
    columns = list(zip(*parts, strict=False))
    return next((at for at, pieces in enumerate(columns) if len(set(pieces)) > 1), len(columns))
