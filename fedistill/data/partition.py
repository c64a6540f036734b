"""How private rows are dealt to clients: each row to exactly one of them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.config import ClientsSettings
from fedistill.data.files import data_root
from fedistill.data.npz import load_arrays
from fedistill.errors import DataError
from fedistill.seeding import generator
from fedistill.types import IntArray, Rows

ATTEMPTS = 200
FLATTEST = 1e6


def iid(rows: Rows, clients: int, seed: int) -> list[Rows]:
    """Rows at random, equally many for each client."""
    if _positive(clients) > len(rows):
        raise DataError(
            f"iid: expected at least one row for each of {clients} clients, found {len(rows)} rows:"
            " lower clients.count"
        )
    order = generator(seed, "partition", "iid").permutation(len(rows))
    return _take(rows, np.array_split(order, clients))


def dirichlet(rows: Rows, clients: int, alpha: float, seed: int, min_rows: int = 0) -> list[Rows]:
    """Each class split in Dirichlet(alpha) shares: the smaller alpha, the more unequal.

    A client may get no row at all; it then takes part as a learner only.

    Args:
        rows: what is dealt.
        clients: how many parts.
        alpha: concentration, above 0.
        seed: of the draw.
        min_rows: draw again until every client has this many.
    """
    if not alpha > 0:
        raise DataError(f"dirichlet: expected alpha above 0, found {alpha}: 0.3 is a usual value")
    if min_rows * _positive(clients) > len(rows):
        raise DataError(
            f"dirichlet: expected at least {min_rows} rows for each of {clients} clients, found "
            f"{len(rows)} rows in all: lower min_rows or the number of clients"
        )
    for attempt in range(ATTEMPTS):
        rng = generator(seed, "partition", "dirichlet", attempt)
        parts = dirichlet_numbers(rows.labels, clients, alpha, rng)
        if min(map(len, parts)) >= min_rows:
            return _take(rows, parts)
    raise DataError(
        f"dirichlet: expected a draw with {min_rows} rows or more for each of {clients} clients, "
        f"found none in {ATTEMPTS}: raise alpha or lower min_rows"
    )


def dirichlet_numbers(
    labels: IntArray, clients: int, alpha: float, rng: np.random.Generator
) -> list[IntArray]:
    """Row numbers of each client."""
    shares: list[list[IntArray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        # Beyond FLATTEST the shares are equal to six digits, and gamma draws could overflow.
        portion = rng.dirichlet(np.full(clients, min(alpha, FLATTEST)))
        cuts = np.round(np.cumsum(portion)[:-1] * len(members)).astype(np.int64)
        for share, piece in zip(shares, np.split(members, cuts), strict=True):
            share.append(piece)
    return [rng.permutation(np.concatenate([_NONE, *share])) for share in shares]


_NONE: IntArray = np.zeros(0, dtype=np.int64)


def shards(rows: Rows, clients: int, classes_per_client: int, seed: int) -> list[Rows]:
    """Rows sorted by class, cut into equal shards; each client gets the same number of shards."""
    count = _positive(clients) * classes_per_client
    if classes_per_client < 1 or count > len(rows):
        raise DataError(
            f"shards: expected 1 to {len(rows)} shards for {len(rows)} rows, found {clients} x "
            f"{classes_per_client}: lower clients.count or clients.classes_per_client"
        )
    rng = generator(seed, "partition", "shards")
    mixed = rng.permutation(len(rows))
    ordered = mixed[np.argsort(rows.labels[mixed], kind="stable")]
    pieces = np.array_split(ordered, count)
    dealt = rng.permutation(count).reshape(clients, classes_per_client)
    return _take(rows, [np.concatenate([pieces[piece] for piece in hand]) for hand in dealt])


def by_column(rows: Rows) -> dict[str, Rows]:
    """One client for each value of a column, such as the hospital a row comes from."""
    if rows.site is None:
        raise DataError("by-column: expected rows with a site column, found none: name the column")
    names, numbers = np.unique(rows.site, return_inverse=True)
    clients = [client_id(str(name)) for name in names]
    if len(set(clients)) < len(clients):
        raise DataError(
            "by-column: expected sites that differ in letters or digits, found two that become "
            "the same client id: rename one"
        )
    parts = [np.flatnonzero(numbers == number) for number in range(len(names))]
    return dict(zip(clients, _take(rows, parts), strict=True))


def client_id(site: str) -> str:
    """A site's name as a client id, which is also the name of a folder.

    >>> client_id("St. Gallen/West"), client_id("Zürich"), client_id("(north)")
    ('St._Gallen_West', 'Zurich', 'north_')
    """
    plain = unicodedata.normalize("NFKD", site).encode("ascii", "ignore").decode()
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", plain)
    return re.sub(r"^[^A-Za-z0-9]+", "", safe)[:64] or "site"


def by_file(rows: Rows, path: str | Path, key: str) -> list[Rows]:
    """Row numbers from an npz file: arrays KEY_0, KEY_1 and so on, and 'public'."""
    if rows.ids is None:
        return [rows.take(part) for part in file_numbers(path, key, len(rows))[0]]
    # Some rows of the source may already be held out, so its length is not known here.
    parts, _ = file_numbers(path, key)
    length = 1 + max(int(numbers.max(initial=-1)) for numbers in (rows.ids, *parts))
    place = np.full(length, -1, dtype=np.int64)
    place[rows.ids] = np.arange(len(rows))
    for number, part in enumerate(parts):
        if (place[part] < 0).any():
            raise DataError(
                f"{path}: expected only rows that are private, array {key}_{number} holds another "
                f"at position {int(np.argmax(place[part] < 0))}: remove it"
            )
    return [rows.take(place[part]) for part in parts]


def file_numbers(path: str | Path, key: str, total: int = 2**31) -> tuple[list[IntArray], IntArray]:
    """Checked row numbers of each client, and of the public rows if there are any.

    Each row at most once over all of them; the file may leave rows out.

    Args:
        path: the npz file.
        key: what the arrays of the clients are called, before "_0" and so on.
        total: how many rows the source has, where that is known.
    """
    arrays = load_arrays(_partition_file(path))
    names: list[str] = []
    while f"{key}_{len(names)}" in arrays:
        names.append(f"{key}_{len(names)}")
    if not names:
        known = sorted({name.rpartition("_")[0] for name in arrays} - {""})
        raise DataError(
            f"{path}: expected arrays {key}_0, {key}_1 and so on, found none: set "
            f"clients.partition_key to one of {', '.join(known) or 'the names in the file'}"
        )
    used = [name for name in (*names, "public") if name in arrays]
    for name in used:
        _check_numbers(arrays[name], f"{path}: {name}", total)
    everything = np.concatenate([arrays[name] for name in used])
    owner = np.repeat(np.arange(len(used)), [len(arrays[name]) for name in used])
    order = np.argsort(everything, kind="stable")
    twice = np.flatnonzero(np.diff(everything[order]) == 0)
    if len(twice):
        one, other = (used[owner[order[at]]] for at in (twice[0], twice[0] + 1))
        raise DataError(
            f"{path}: expected each row at most once, found one in {one} and again in {other}: "
            "remove it from one"
        )
    public = arrays.get("public", _NONE).astype(np.int64)
    return [arrays[name].astype(np.int64) for name in names], public


def _check_numbers(numbers: npt.NDArray[Any], name: str, total: int) -> None:
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise DataError(
            f"{name}: expected a list of whole numbers, found {numbers.dtype} {numbers.shape}: "
            "store row numbers"
        )
    outside = (numbers < 0) | (numbers >= total)
    if outside.any():
        raise DataError(
            f"{name}: expected row numbers from 0 to {total - 1}, found another at position "
            f"{int(np.argmax(outside))}: was the file made for another source?"
        )


def _partition_file(path: str | Path) -> Path:
    for place in (Path(path), data_root("") / path):
        if place.is_file():
            return place
    raise DataError(
        f"clients.partition_path: expected an npz file at {path}, found none: check "
        "the path, which starts at the current folder or at FEDISTILL_DATA"
    )


def check_exactly_once(parts: Sequence[IntArray], total: int) -> None:
    """Refuse a partition that loses or repeats a row."""
    dealt = np.bincount(np.concatenate([_NONE, *parts]), minlength=total)
    if len(dealt) != total or (dealt != 1).any():
        row = int(np.argmax(dealt != 1))
        raise DataError(
            f"partition: expected each of {total} rows exactly once, found row {row} "
            f"{int(dealt[row])} times: mend the partition function"
        )


def _take(rows: Rows, parts: Sequence[IntArray]) -> list[Rows]:
    check_exactly_once(parts, len(rows))
    return [rows.take(part) for part in parts]


def _positive(clients: int) -> int:
    if clients < 1:
        raise DataError(f"partition: expected at least one client, found {clients}: add some")
    return clients


@dataclass(frozen=True)
class Partition:
    """A way to deal rows, as named in settings.

    Attributes:
        function: the public function; its docstring's first line is the summary.
        deal: the same, fed from the settings: client ids with their rows.
    """

    function: Callable[..., object]
    deal: Callable[[Rows, ClientsSettings, int], dict[str, Rows]]

    @property
    def summary(self) -> str:
        """One line for ``fedistill list partitions``."""
        return (self.function.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")


def named(parts: Sequence[Rows], to: ClientsSettings) -> dict[str, Rows]:
    """Parts as clients: those of the settings, else ``site-0``, ``site-1`` and so on."""
    names = to.names or tuple(f"site-{number}" for number in range(len(parts)))
    return dict(zip(names, parts, strict=True))


PARTITIONS: Mapping[str, Partition] = {
    "iid": Partition(iid, lambda rows, to, seed: named(iid(rows, to.count, seed), to)),
    "dirichlet": Partition(
        dirichlet, lambda rows, to, seed: named(dirichlet(rows, to.count, to.alpha, seed), to)
    ),
    "shards": Partition(
        shards,
        lambda rows, to, seed: named(shards(rows, to.count, to.classes_per_client, seed), to),
    ),
    "by-column": Partition(by_column, lambda rows, to, seed: by_column(rows)),
    "file": Partition(
        by_file,
        lambda rows, to, seed: named(by_file(rows, to.partition_path, to.partition_key), to),
    ),
}
