"""Who chose what and when, in blocks of time: the streams that recommenders are kept current on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedistill.data.files import find_file, read_bytes
from fedistill.data.npz import Arrays, load_arrays
from fedistill.errors import DataError
from fedistill.types import IntArray

MOVIELENS = "movielens_100k/ml-100k.inter"
GOWALLA = "ccd_gowalla/gowalla_blocks.npz"
DIGINETICA = "ader_diginetica/diginetica.npz"


@dataclass(frozen=True, eq=False)
class Interactions:
    """Choices of items by users, oldest first.

    Attributes:
        users: ``[n]`` int64, from 0; of sessions, the session.
        items: ``[n]`` int64, from 0.
        times: ``[n]`` int64, never falling; the number of the row where a source has no clock.
    """

    users: IntArray
    items: IntArray
    times: IntArray

    def __post_init__(self) -> None:
        for name in ("users", "items", "times"):
            found = np.asarray(getattr(self, name))
            if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
                raise DataError(
                    f"interactions: expected {name} as a list of whole numbers, found "
                    f"{found.dtype} {list(found.shape)}: number users and items from 0"
                )
            object.__setattr__(self, name, found.astype(np.int64, copy=False))
        if not len(self.users) == len(self.items) == len(self.times):
            raise DataError(
                "interactions: expected users, items and times of equal length, found "
                f"{len(self.users)}, {len(self.items)} and {len(self.times)}: check how they were "
                "read"
            )
        if len(self) and min(self.users.min(), self.items.min()) < 0:
            raise DataError(
                "interactions: expected users and items from 0, found a negative number: number "
                "them anew"
            )

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: npt.ArrayLike) -> Interactions:
        """The given row numbers, or those where a mask is true, in that order."""
        index = np.asarray(rows)
        if index.dtype != np.bool_:
            index = index.astype(np.int64)
        return replace(
            self, users=self.users[index], items=self.items[index], times=self.times[index]
        )


@dataclass(frozen=True, eq=False)
class Block:
    """One stretch of time.

    Attributes:
        train: what a student may learn from.
        test: held out for good; empty where a stream is only tested before it is learned.
        valid: held out for choices; None where there is nothing of the kind.
    """

    train: Interactions
    test: Interactions
    valid: Interactions | None = None

    def everything(self) -> Interactions:
        """All that happened in the block: what a student is tested on before it learns it."""
        return join([self.train, *([] if self.valid is None else [self.valid]), self.test])


def no_interactions() -> Interactions:
    """None at all."""
    return Interactions(*(np.empty(0, dtype=np.int64) for _ in range(3)))


def join(parts: Sequence[Interactions]) -> Interactions:
    """Several, one after another."""
    parts = [no_interactions(), *parts]
    return Interactions(
        *(np.concatenate([getattr(p, n) for p in parts]) for n in ("users", "items", "times"))
    )


def movielens(path: str = "", tenths: int = 5) -> list[Block]:
    """MovieLens-100K in time order: its first half, then blocks of a tenth each.

    Every rating counts as a choice, whatever its stars. Users and items keep their numbers, less
    1. Ties in time keep the order of user and item, whatever the order of the file.

    Args:
        path: folder of the data; "" is $FEDISTILL_DATA.
        tenths: blocks after the first, 0 to 5.

    Raises:
        DataError: the file is absent or damaged, or ``tenths`` is out of range.
    """
    if not 0 <= tenths <= 5:
        raise DataError(f"movielens: expected 0 to 5 tenths after the first half, found {tenths}")
    place = find_file(path, MOVIELENS)
    lines = read_bytes(place).decode("utf-8", errors="replace").split("\n")
    try:
        cells = [line.split("\t") for line in lines[1:] if line.strip()]
        table = np.array([[c[0], c[1], c[3]] for c in cells], dtype=np.float64).astype(np.int64)
    except (ValueError, IndexError):
        raise _unreadable(place, "lines of user, item, rating and time with tabs") from None
    if not len(table) or table[:, :2].min() < 1:
        raise _unreadable(place, "users and items numbered from 1")
    table = table[np.lexsort((table[:, 1], table[:, 0], table[:, 2]))]
    whole = Interactions(table[:, 0] - 1, table[:, 1] - 1, table[:, 2])
    cuts = [0, *(len(whole) * (5 + k) // 10 for k in range(tenths + 1))]
    return [
        Block(whole.take(np.arange(start, stop)), no_interactions())
        for start, stop in itertools.pairwise(cuts)
    ]


def gowalla(path: str = "") -> list[Block]:
    """Gowalla as CCD (KDD 2024) cut it: half the check-ins, then five blocks, each with a split.

    The split inside a block is random for each user, and has no clock: the time is the block.

    Args:
        path: folder of the data; "" is $FEDISTILL_DATA.

    Raises:
        DataError: the file is absent or damaged.
    """
    place = find_file(path, GOWALLA)
    arrays = load_arrays(place)
    count = sum(name.startswith("train_") for name in arrays)
    if not count:
        raise _unreadable(place, "arrays train_0, valid_0, test_0 and so on")
    return [
        Block(*(_pairs(arrays, f"{part}_{k}", k, place) for part in ("train", "test", "valid")))
        for k in range(count)
    ]


def diginetica(path: str = "") -> list[Block]:
    """DIGINETICA as ADER (RecSys 2020) cut it: clicks of anonymous sessions in 17 weeks.

    A user is a session, and none goes on in the next week: new users all, known items. Items keep
    their numbers, less 1; sessions are numbered as they come.

    Args:
        path: folder of the data; "" is $FEDISTILL_DATA.

    Raises:
        DataError: the file is absent or damaged.
    """
    periods, sessions, items = session_clicks(find_file(path, DIGINETICA))
    _, users = np.unique(periods * (int(sessions.max()) + 1) + sessions, return_inverse=True)
    whole = Interactions(users, items - 1, np.arange(len(items)))
    return [
        Block(whole.take(periods == period), no_interactions()) for period in np.unique(periods)
    ]


def session_clicks(place: Path) -> tuple[IntArray, IntArray, IntArray]:
    """Period, session and item ``[n]`` of each click of an archive, in time order, items from 1.

    Raises:
        DataError: arrays ``period``, ``c1`` (session) and ``c2`` (item) are absent or do not fit.
    """
    arrays = load_arrays(place, ["period", "c1", "c2"])
    found = [arrays[name] for name in ("period", "c1", "c2") if name in arrays]
    whole = len(found) == 3 and all(a.ndim == 1 and a.dtype.kind in "iu" for a in found)
    if not whole or len({len(a) for a in found}) != 1 or not len(found[0]):
        raise _unreadable(place, "whole numbers period, c1 (session) and c2 (item), one a click")
    period, session, item = (a.astype(np.int64) for a in found)
    if item.min() < 1 or session.min() < 0:
        raise _unreadable(place, "items numbered from 1 and sessions from 0")
    order = np.argsort(period, kind="stable")
    return period[order], session[order], item[order]


def _pairs(arrays: Arrays, name: str, block: int, place: Path) -> Interactions:
    found = arrays.get(name)
    if found is None or found.ndim != 2 or found.shape[1] != 2 or found.dtype.kind not in "iu":
        raise _unreadable(place, f"whole numbers {name} [n, 2], a user and an item each")
    times = np.full(len(found), block, dtype=np.int64)
    try:
        return Interactions(found[:, 0], found[:, 1], times)
    except DataError:
        raise _unreadable(place, f"users and items of {name} numbered from 0") from None


def _unreadable(place: Path, expected: str) -> DataError:
    return DataError(f"{place}: expected {expected}, found others: get the file anew")
