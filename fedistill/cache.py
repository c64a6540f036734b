"""Who holds which soft target: what has to be asked again, and what has to be sent to whom.

The soft-label cache of SCARLET (arXiv 2504.19602) with one predicate, :meth:`TargetCache.fresh`,
that is evaluated once, when a round is planned. Requests, and what is told to whom, both come
from that plan. The server keeps, for every client and row, the round of the copy that the client
is known to hold; a copy counts as held when an upload came back for the plan that brought it, and
as not held when none came. So a client that was away, that is new or whose message was lost is
told what it lacks, and every plan names a checksum of what it relies on.

Deviations: in SCARLET's code requests are decided at age < D and told at age <= D, an expired
target is deleted where it should be replaced, and a client that missed a round meets targets that
it never got. CFD's deltas (arXiv 2012.00632) are made against the copy that is held, row by row.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.errors import Rejected
from fedistill.types import IntArray, State
from fedistill.wire.delta import PLAIN, delta_encode
from fedistill.wire.envelope import Mask, pack_mask, unpack_mask
from fedistill.wire.grid import Codes
from fedistill.wire.rows import RowSpec
from fedistill.wire.shelf import Shelf, mark
from fedistill.wire.targets import Targets

Held = npt.NDArray[np.int32]


class TargetCache:
    """The latest soft target of each row as it travels, the one before, and who holds which.

    Args:
        codec: of the targets.
        total: number of proxy rows.
        classes: number of classes.
        lifetime: rounds that a target stays fresh; 0: every row is asked whenever it is drawn.
    """

    def __init__(self, codec: str, total: int, classes: int, lifetime: int) -> None:
        self.latest = Shelf(codec, total, classes)
        self.before = Shelf(codec, total, classes)
        self.lifetime = lifetime
        self.held: dict[str, Held] = {}
        self._sent: tuple[IntArray, Held] | None = None

    def fresh(self, rows: IntArray, number: int) -> Mask:
        """Which rows have a target that is younger than the life time in round ``number``."""
        made = self.latest.round[rows]
        young: Mask = (made > 0) & (number - made < self.lifetime)
        return young

    def put(self, rows: IntArray, codes: Codes, number: int) -> None:
        """Replace the targets of some rows by those made in round ``number``."""
        self.before.codes[rows] = self.latest.codes[rows]
        self.before.round[rows] = self.latest.round[rows]
        self.latest.put(rows, codes, number)

    def tell(
        self, clients: Collection[str], spec: RowSpec, missing: Mask, number: int
    ) -> dict[str, Targets]:
        """The targets of a round as each client needs to be told them.

        Args:
            clients: who is told.
            spec: the rows of the round.
            missing: bool for each of them: it has no target.
            number: the round in which they were combined.
        """
        rows = spec.rows()[~missing]
        made = self.latest.round[rows].copy()
        self._sent = rows, made
        nothing = np.zeros(len(rows), dtype=np.int32)
        told: dict[bytes, Targets] = {}
        messages = {}
        for client in clients:
            has = self.held[client][rows] if client in self.held else nothing
            key = has.tobytes()
            if key not in told:  # those who hold the same are told the same
                told[key] = self._targets(spec, missing, rows, has, number)
            messages[client] = told[key]
        return messages

    def _targets(
        self, spec: RowSpec, missing: Mask, rows: IntArray, has: Held, number: int
    ) -> Targets:
        held = (has > 0) & (has == self.latest.round[rows])
        based = ~held & (has > 0) & (has == self.before.round[rows])
        codes = self.latest.codes[rows]
        reference = None
        if based.any():
            reference = self.before.codes[rows[~held]]
            reference[~based[~held]] = 0
        payload = delta_encode(self.latest.codec, codes[~held], reference)
        if payload[0] == PLAIN:
            based[:] = False
        return Targets(
            round=number,
            spec=spec,
            codec=self.latest.codec,
            classes=self.latest.classes,
            mark=mark(rows, codes) if held.any() or based.any() else "",
            missing=pack_mask(missing),
            held=pack_mask(held),
            based=pack_mask(based),
            payload=payload,
        )

    def settle(self, asked: Collection[str], answered: Collection[str]) -> None:
        """A round is over: who answered holds what it was sent; of the others nobody knows."""
        if self._sent is None:
            return
        rows, made = self._sent
        for client in asked:
            held = self.held.setdefault(client, np.zeros(len(self.latest.round), dtype=np.int32))
            held[rows] = made if client in answered else 0
        self._sent = None

    def forget(self, client: str) -> None:
        """A client lacks what it was known to hold: of none of its rows does anybody know."""
        self.held.pop(client, None)

    def state_dict(self) -> State:
        """Both generations and, compressed, who holds what."""
        names = sorted(self.held)
        table = np.array([self.held[name] for name in names], dtype="<i4")
        packed = zlib.compress(table.tobytes(), 1)
        state = {f"latest.{k}": v for k, v in self.latest.state_dict().items()}
        state |= {f"before.{k}": v for k, v in self.before.state_dict().items()}
        return state | {"held": np.frombuffer(packed, dtype=np.uint8)}

    def facts(self) -> dict[str, Any]:
        """Whose rows of ``held`` are whose."""
        return {"clients": sorted(self.held)}

    def load_state_dict(self, state: State, facts: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` and :meth:`facts` gave."""
        for shelf, name in ((self.latest, "latest"), (self.before, "before")):
            shelf.load_state_dict({k: state[f"{name}.{k}"] for k in ("codes", "round")})
        table = np.frombuffer(zlib.decompress(state["held"].tobytes()), dtype="<i4")
        rows = table.reshape(len(facts["clients"]), len(self.latest.round))
        self.held = {name: np.array(row) for name, row in zip(facts["clients"], rows, strict=True)}
        self._sent = None


class Heard:
    """The server's copies of what clients predicted, against which they may send changes."""

    def __init__(self, codec: str, total: int, classes: int) -> None:
        self._shelf = codec, total, classes
        self.shelves: dict[str, Shelf] = {}
        self.last: dict[str, int] = {}

    def reference(self, client: str, rows: IntArray) -> Codes | None:
        """What is known of a client's predictions on some rows."""
        return self.shelves[client].reference(rows) if client in self.shelves else None

    def note(self, client: str, rows: IntArray, codes: Codes, number: int) -> None:
        """An upload of round ``number`` was let in."""
        self.shelves.setdefault(client, Shelf(*self._shelf)).put(rows, codes, number)
        self.last[client] = number

    def forget(self, client: str) -> None:
        """Both sides hold different copies: begin again with none."""
        self.shelves.pop(client, None)
        self.last.pop(client, None)

    def state_dict(self) -> State:
        """The copies, by client."""
        return {
            f"{client}.{k}": v
            for client, shelf in self.shelves.items()
            for k, v in shelf.state_dict().items()
        }

    def facts(self) -> dict[str, Any]:
        """The last round of each client."""
        return {"last": self.last}

    def load_state_dict(self, state: State, facts: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` and :meth:`facts` gave."""
        self.last = {str(client): int(number) for client, number in facts["last"].items()}
        self.shelves = {}
        for client in self.last:
            shelf = self.shelves[client] = Shelf(*self._shelf)
            shelf.load_state_dict({k: state[f"{client}.{k}"] for k in ("codes", "round")})


def own_fields(
    cache: TargetCache | None,
    heard: Heard | None,
    clients: Collection[str],
    targets: Targets | None,
) -> dict[str, dict[str, Any]]:
    """By client the fields of a plan that are its own: what it lacks, and what was heard of it.

    Without a cache there are none: all are told the same.
    """
    if cache is None or heard is None:
        return {}
    own: dict[str, dict[str, Any]] = {name: {"heard": heard.last.get(name, 0)} for name in clients}
    if targets is not None:
        missing = unpack_mask(targets.missing, targets.spec.count)
        for name, told in cache.tell(clients, targets.spec, missing, targets.round).items():
            own[name]["targets"] = told
    return own


class Said:
    """A client's own copies of what it predicted: those that the server is known to hold.

    What was sent last counts as held once a plan says that it was heard.
    """

    def __init__(self, codec: str, total: int, classes: int) -> None:
        self.shelf = Shelf(codec, total, classes)
        self.last = 0
        self.rows: IntArray = np.empty(0, dtype=np.int64)
        self.codes: Codes = self.shelf.codes[:0]
        self.round = 0

    def learn(self, heard: int) -> None:
        """What the server heard last decides what it holds.

        Raises:
            Rejected: ``reference``: of that nothing is known here; the server then begins anew.
        """
        if heard and heard == self.round:
            self.shelf.put(self.rows, self.codes, self.round)
        elif heard != self.last:
            if heard:
                raise Rejected("reference", "the server heard what is not known here any more")
            self.shelf.forget()
        self.last = heard

    def encode(self, rows: IntArray, codes: Codes, number: int) -> bytes:
        """Predictions of round ``number`` as they travel."""
        self.rows, self.codes, self.round = rows, codes, number
        return delta_encode(self.shelf.codec, codes, self.shelf.reference(rows))

    def state_dict(self) -> State:
        """Copies that are held, and those of the last upload."""
        own = {"last": np.array([self.last, self.round]), "rows": self.rows, "sent": self.codes}
        return {**self.shelf.state_dict(), **own}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.shelf.load_state_dict(state)
        self.last, self.round = (int(number) for number in state["last"])
        self.rows, self.codes = np.array(state["rows"]), np.array(state["sent"])
