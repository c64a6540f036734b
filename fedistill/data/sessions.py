"""Sessions of clicks as rows to classify: the last clicks are the input, the next is the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedistill.data.files import find_file
from fedistill.data.interactions import session_clicks
from fedistill.data.npz import load_arrays
from fedistill.data.table import Query, Table, Texts
from fedistill.errors import DataError
from fedistill.types import IntArray


def read_sessions(query: Query) -> Table:
    """Sessions of clicks: sessions:FILE.npz, arrays period, c1 (session) and c2 (item).

    Every click but the first of its session is a row, in time order: the ``data.history`` clicks
    before it as item numbers from 1, latest last, 0 for nothing, and its item as the class, one
    less than its number. The catalogue is the ``data.items`` most frequent items of the file,
    most frequent first, ties by their number in the file; clicks on others are left out, as if
    they had not been made. The column ``period`` may serve as site. Another file has another
    catalogue: take proxy rows from the same one.

    A row is its user's where the file has an array ``user``; else each session of each period is
    somebody of its own, called PERIOD-SESSION, which hides that a person comes back.
    """
    place = find_file(query.settings.path, query.name)
    periods, sessions, items = session_clicks(place)
    whose = owners(place, query.settings.subject, periods, sessions) if query.owned else None
    most = query.settings.items or len(items)
    found, counts = np.unique(items, return_counts=True)
    catalogue = found[np.lexsort((found, -counts))][:most]
    number = np.zeros(int(items.max()) + 1, dtype=np.int64)
    number[catalogue] = np.arange(1, len(catalogue) + 1)
    kept = number[items] > 0
    periods, sessions, items = periods[kept], sessions[kept], number[items[kept]]
    whose = None if whose is None else whose[kept]
    before = clicks_before(
        periods * (int(sessions.max()) + 1) + sessions, items, query.settings.history
    )
    rows = np.flatnonzero(before[:, -1] > 0)
    if not len(rows):
        raise DataError(
            f"{place}: expected sessions of two clicks or more among the {len(catalogue)} most "
            "frequent items, found none: raise data.items"
        )
    columns = {"period": periods[rows].astype(np.str_)} if query.column == "period" else {}
    subjects = None if whose is None else whose[rows]
    inputs = before[rows].astype(np.float32)
    source = f"sessions:{query.name}"
    if not query.labelled:
        unknown = np.full(len(rows), -1, dtype=np.int64)
        return Table(source, inputs, unknown, (), auto="none", columns=columns)
    classes = tuple(str(item) for item in catalogue)
    labels = items[rows] - 1
    return Table(source, inputs, labels, classes, auto="none", columns=columns, subjects=subjects)


def owners(place: Path, asked: str, periods: IntArray, sessions: IntArray) -> Texts:
    """Whose click each is ``[n]``: the user's, or somebody's of whom only the session is known.

    Args:
        place: the archive, which may have an array ``user``, one number a click.
        asked: "user", "session", or "" for the former where there are users.
        periods: ``[n]``, in the order in which :func:`session_clicks` gives clicks.
        sessions: ``[n]``, likewise.

    Raises:
        DataError: users were asked for and there are none, or not one a click.
    """
    if asked not in {"", "user", "session"}:
        raise DataError(
            f'{place}: expected "user" or "session" as data.subject, found "{asked}": sessions '
            "have no other column; leave it out"
        )
    arrays = load_arrays(place, ["period", "user"]) if asked != "session" else {}
    users = arrays.get("user")
    if asked == "user" or users is not None:
        if users is None or users.shape != periods.shape or users.dtype.kind not in "iu":
            raise DataError(
                f"{place}: expected whole numbers user, one a click, found others: get the file "
                'anew, or set data.subject = "session"'
            )
        return users[np.argsort(arrays["period"].astype(np.int64), kind="stable")].astype(np.str_)
    width = int(sessions.max()) + 1
    visits, number = np.unique(periods * width + sessions, return_inverse=True)
    names = np.array([f"{visit // width}-{visit % width}" for visit in visits.tolist()])
    return names[number]


def clicks_before(sessions: IntArray, items: IntArray, length: int) -> IntArray:
    """For each click, in order, the last items of its session before it ``[n, length]``.

    Args:
        sessions: ``[n]`` any numbers; clicks of a session need not lie together.
        items: ``[n]`` numbers from 1.
        length: how many, latest last; 0 where there are fewer.
    """
    order = np.argsort(sessions, kind="stable")
    ordered = sessions[order]
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    starts = np.searchsorted(ordered, sessions, side="left")
    return windows(items[order], starts, places, length)


def windows(values: IntArray, starts: IntArray, ends: IntArray, length: int) -> IntArray:
    """The last ``length`` of ``values[start:end]`` for each pair, 0 in front where it is shorter.

    Args:
        values: ``[v]``, in groups.
        starts: ``[n]`` where the group of each begins.
        ends: ``[n]`` up to where it is looked at.
        length: numbers in a row.

    Returns:
        ``[n, length]``.
    """
    at = ends[:, None] - np.arange(length, 0, -1)
    there = at >= starts[:, None]
    if not len(values):
        return np.zeros(at.shape, dtype=np.int64)
    return np.where(there, values[np.where(there, at, 0)], 0)
