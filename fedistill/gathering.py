"""Who takes part in a federation, judged before its first round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedistill.course import Timetable
from fedistill.errors import DataError
from fedistill.exchange import EXCHANGES
from fedistill.members import Client, Member
from fedistill.types import ProxySet, Rows, joined_records
from fedistill.wire.messages import bucket


def declared_rows(member: Client | Member, exchange: str) -> int | None:
    """Rows a client declares: rounded to a power of two, but for FedAvg, which weighs by them."""
    if isinstance(member, Member):
        return None if member.rows is None else bucket(member.rows)
    rows = len(member.data)
    return rows if exchange == "weights" else bucket(rows)


def class_names(clients: Sequence[Client]) -> tuple[str, ...]:
    """Names of the classes where nobody gave any: "0", "1", ... up to the largest label."""
    parts = [rows for client in clients for rows in client.experiences()]
    labels = [int(rows.labels.max()) for rows in parts if len(rows)]
    return tuple(str(label) for label in range(max(labels, default=0) + 1))


def check_members(members: Sequence[Client | Member], exchange: str) -> None:
    """Refuse nobody, two of one id, and real sites where rows or weights would have to travel.

    Raises:
        DataError: with what to do.
    """
    if not members:
        raise DataError("a federation needs at least one client, found none")
    ids = Counter(member.id for member in members)
    if twice := sorted(name for name, count in ids.items() if count > 1):
        raise DataError(f'client ids must differ, "{twice[0]}" stands twice: rename one')
    possible = {"predictions", *EXCHANGES} - {"weights"}
    if exchange not in possible and any(isinstance(member, Member) for member in members):
        raise DataError(
            "real sites (Member) share predictions, or what their policy allows, found a method "
            f"that exchanges {exchange}: choose another method"
        )


def check_clients(clients: Sequence[Client], classes: int, proxy: ProxySet) -> None:
    """Refuse rows that cannot be learned, of every experience that is known beforehand.

    Raises:
        DataError: with the client and the row, without its values.
    """
    for client, rows in [(one, rows) for one in clients for rows in one.experiences()]:
        labels, inputs = rows.labels, rows.inputs
        if len(inputs) and inputs.shape[1:] != proxy.inputs.shape[1:]:
            raise DataError(
                f"{client.id}: rows must have the shape of proxy rows, {proxy.inputs.shape[1:]}, "
                f"found {inputs.shape[1:]}: prepare both alike"
            )
        bad = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(bad):
            raise DataError(
                f"{client.id}: labels must be 0 to {classes - 1}, row {bad[0]} is outside: "
                "map the labels, or name all classes"
            )
        finite = np.isfinite(inputs).all(axis=tuple(range(1, inputs.ndim)))
        unclean = np.flatnonzero(~finite)
        if len(unclean):
            raise DataError(
                f"{client.id}: inputs must be finite, row {unclean[0]} is not: clean or impute it"
            )


def _whose(parts: Sequence[Rows]) -> npt.NDArray[np.str_] | None:
    """Whose row each is, where all say so."""
    names = [rows.subject for rows in parts if rows.subject is not None]
    return np.concatenate(names) if len(names) == len(parts) else None


def pooled(clients: Sequence[Client]) -> list[Client]:
    """All rows at one client, with the first client's model; of a stream, by position."""
    first = clients[0]
    met = [client.experiences() for client in clients]
    together = tuple(
        Rows(
            np.concatenate([rows.inputs for rows in parts]),
            np.concatenate([rows.labels for rows in parts]),
            subject=_whose(parts),
            record=joined_records(parts),
        )
        for parts in zip(*met, strict=True)
    )
    course = None
    if isinstance(first.course, Timetable):
        course = Timetable(together, first.course.starts)
    return [
        Client("pooled", first.build, together[0], None, first.training, None, course, first.make)
    ]
