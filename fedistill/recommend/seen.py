"""Who is who, and who chose what: the books of a recommender."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedistill.data.sessions import windows
from fedistill.errors import CheckpointError
from fedistill.types import IntArray


class Numbering:
    """Ids of anybody's making to rows of a table, in order of appearance.

    Args:
        ids: ``[n]`` those of the first rows, all different.
    """

    def __init__(self, ids: npt.ArrayLike = ()) -> None:
        self.ids: IntArray = np.asarray(ids, dtype=np.int64).reshape(-1)
        self._sort()
        if len(self.ids) and (np.diff(self.ids[self._order]) == 0).any():
            raise CheckpointError("a saved numbering has an id twice: put a copy back")

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: npt.ArrayLike) -> IntArray:
        """``[n]`` rows of these ids, -1 for those that are not there."""
        wanted = np.asarray(ids, dtype=np.int64)
        if not len(self.ids):
            return np.full(wanted.shape, -1, dtype=np.int64)
        ordered = self.ids[self._order]
        place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        return np.where(ordered[place] == wanted, self._order[place], -1)

    def add(self, ids: npt.ArrayLike) -> int:
        """Give rows to ids that have none, in their order; returns how many."""
        given = np.asarray(ids, dtype=np.int64)
        different, first = np.unique(given, return_index=True)
        news = different[np.argsort(first)]
        news = news[self.rows(news) < 0]
        self.ids = np.concatenate([self.ids, news])
        self._sort()
        return len(news)

    def _sort(self) -> None:
        self._order: IntArray = np.argsort(self.ids, kind="stable")


@dataclass(frozen=True, eq=False)
class Seen:
    """What each user chose, oldest first, as rows of users and items.

    Serving needs it: what was chosen is not recommended again, and towers that look back read it.

    Attributes:
        users: ``[n]`` rows of users in order of arrival.
        items: ``[n]`` rows of items.
        blocks: ``[n]`` number of the block that it came with.
    """

    users: IntArray
    items: IntArray
    blocks: IntArray

    def __len__(self) -> int:
        return len(self.users)

    def plus(self, users: IntArray, items: IntArray, block: int) -> Seen:
        """These and then those of a later block."""
        blocks = np.full(len(users), block, dtype=np.int64)
        return Seen(
            np.concatenate([self.users, users]),
            np.concatenate([self.items, items]),
            np.concatenate([self.blocks, blocks]),
        )

    def without(self, user: int) -> Seen:
        """All but one user's."""
        others = self.users != user
        return Seen(self.users[others], self.items[others], self.blocks[others])


class Shelves:
    """:class:`Seen` sorted by user, to look up many users at once."""

    def __init__(self, seen: Seen, users: int) -> None:
        self.order = np.argsort(seen.users, kind="stable")
        self.items = seen.items[self.order]
        counts = np.bincount(seen.users, minlength=users)
        self.starts = np.concatenate([[0], counts.cumsum()])

    def of(self, users: IntArray) -> tuple[IntArray, IntArray]:
        """Which entry of ``users`` chose which item, as two flat arrays of equal length."""
        starts, counts = self.starts[users], self.starts[users + 1] - self.starts[users]
        owner = np.repeat(np.arange(len(users)), counts)
        within = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
        return owner, self.items[starts[owner] + within]

    def history(self, users: IntArray, length: int) -> IntArray:
        """The last items of users ``[n, length]``, numbers from 1, 0 for nothing, latest last."""
        return windows(self.items + 1, self.starts[users], self.starts[users + 1], length)

    def before(self, length: int) -> IntArray:
        """For each choice, in order of arrival, what its user had chosen just before it."""
        places = np.empty(len(self.order), dtype=np.int64)
        places[self.order] = np.arange(len(self.order))
        owner = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        return windows(self.items + 1, self.starts[owner][places], places, length)
