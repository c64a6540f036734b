"""The ledger: what was done to whose rows, debited before it is done.

The protocol is reserve, train, release. A reservation is on disk before the first private step; a
crash after it leaves it charged; what was trained may leave the client once its digest is on the
ledger too. Nothing is ever removed, so what was spent is a function of the rows, at any time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.errors import BudgetExceeded, LedgerError
from fedistill.privacy.accounting import RELATIONS, upper_bound
from fedistill.privacy.chain import Entry
from fedistill.privacy.cohorts import NEWCOMERS, Touch, charged, sizes, touch, undominated
from fedistill.privacy.events import Claim, Spending
from fedistill.privacy.known import known_epsilon
from fedistill.privacy.ledger_file import LedgerFile, keyed, keyed_digest

__all__ = ["LEDGER", "Entry", "Ledger"]

LEDGER = "ledger.sqlite"
"""Its name in the folder of a site."""
SHORTEST_HEAD = 12
"""Digits of a head that are enough to say which is meant."""


class Ledger:
    """What one owner of rows has spent of its privacy, over all rounds, runs and restarts.

    Every method proves the chain first if another process has written since, and raises
    :class:`~fedistill.errors.LedgerError` where it does not hold, where the file is damaged or
    newer, cannot be written, or is held by another process for half a minute.

    Attributes:
        path: an SQLite file, made (mode 0600, with ``NAME.key`` beside it) by the first row.
            ``None`` keeps the ledger in memory, which is only for trying things out.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file = LedgerFile(path)
        self._mine: dict[str, Entry] = {}
        self._lock = threading.RLock()

    # --- the protocol ----------------------------------------------------------------------------

    def reserve(
        self,
        *,
        run: str,
        round: int,
        mechanism: str,
        spending: Spending,
        unit: str,
        relation: str,
        units: Sequence[bytes],
        epsilon: float,
        delta: float,
        fits: Callable[[], bool] | None = None,
    ) -> Entry:
        """Debit what a step is going to cost, durably, before it is taken.

        Args:
            run: run that asks.
            round: its round. Reserving again is a new debit (a retry after a crash).
            mechanism: how the noise comes in.
            spending: all that the step may do: planned steps, not those that turn out.
            unit: whose presence is hidden (record or user).
            relation: neighbouring data sets that the limit is meant for.
            units: names of all whose data the step touches, remembered rows included.
            epsilon: the most that may be spent of any unit, this step included.
            delta: its delta.
            fits: a proof that all units stay within the limit, quicker than computing it (a plan
                that was computed as a whole); asked where a quick bound is not enough. It must
                hold for what the ledger holds *now* (see :meth:`spending`); it is asked again if
                another process has written meanwhile. What is charged does not depend on it.

        Raises:
            BudgetExceeded: some unit would be beyond the limit: nothing is debited.
            LedgerError: see the class; also where units are counted otherwise than so far, or were
                erased. Nothing may be computed then.
            ValueError: no units, an unknown relation, a limit that is none.
        """
        if not units or relation not in RELATIONS or not (epsilon > 0 and 0 < delta < 1):
            raise ValueError(
                "expected units, a relation, epsilon > 0 and 0 < delta < 1, found "
                f"{len(units)} units, {relation!r}, {epsilon:g}, {delta:g}"
            )
        with self._lock:
            key = self._file.key(create=True)
            assert key is not None
            set_digest = keyed_digest(key, units)
            while True:
                entries = self._file.entries()
                self._same_unit(entries, unit)
                touched = self._touch(entries, units, key, set_digest)
                dear = self._uncertain(entries, touched, spending, relation, epsilon, delta)
                if dear and not (fits and fits()):
                    self._afford(dear, spending, relation, epsilon, delta)
                with self._file.writing():
                    if self._file.entries() != entries:
                        continue  # another process was faster: look again
                    for cohort, moved in touched.moves.items():
                        self._file.move(moved, cohort)
                    entry = self._append(
                        kind="reserve",
                        entry_id=f"{run}/{round}/{_attempts(entries, run, round) + 1}",
                        run=run,
                        round=round,
                        mechanism=mechanism,
                        spending=spending,
                        unit=unit,
                        relation=relation,
                        epsilon=float(epsilon),
                        delta=float(delta),
                        cohorts=touched.cohorts,
                        splits=touched.splits,
                        touched=set_digest,
                        moved=bool(touched.moves),
                    )
                self._mine[entry.entry_id] = entry
                return entry

    def started(self, entry: Entry) -> None:
        """Private rows are touched from here on: the debit stays, whatever happens."""
        self._mine.pop(entry.entry_id, None)

    def release(self, entry: Entry, sha256: str) -> None:
        """Note what the reserved step gave. It may leave the client once this has returned.

        Noting the same bytes again does nothing, so a recovery may.

        Raises:
            LedgerError: not reserved here, taken back, or released with other bytes.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"expected a SHA-256 in hexadecimal, found {sha256!r}")
        with self._lock, self._file.writing():
            rows = {row.kind: row for row in self._file.entries() if row.entry_id == entry.entry_id}
            if rows.get("reserve") != entry or "void" in rows:
                raise LedgerError(
                    f"{entry.entry_id} is not a reservation of {self._file.name} that stands: "
                    "nothing is released, reserve first"
                )
            if "release" not in rows:
                self._follow(entry, "release", release_sha256=sha256)
            elif rows["release"].release_sha256 != sha256:
                raise LedgerError(
                    f"{entry.entry_id} was released with other bytes: send those that are stored"
                )
        self._mine.pop(entry.entry_id, None)

    def void(self, entry: Entry) -> None:
        """Take a debit back, as nothing was computed.

        Only who reserved it can know that: the very object that :meth:`reserve` gave, in the same
        process, before :meth:`started`. After a crash nobody knows, and the debit stays.

        Raises:
            LedgerError: something may have been computed.
        """
        with self._lock:
            if self._mine.get(entry.entry_id) is not entry:
                raise LedgerError(
                    f"{entry.entry_id} stays charged: it was started, or reserved by another "
                    "process"
                )
            with self._file.writing():
                self._follow(entry, "void")
            del self._mine[entry.entry_id]

    def acknowledge_loss(self, epsilon: float, delta: float, heads: Sequence[str] = ()) -> Entry:
        """Go on with a restored backup, or anew, charging all units for what it does not know.

        Newcomers are charged as well: nobody can tell any more who was among the lost.

        Args:
            epsilon: the most that the lost rows can have spent.
            delta: its delta. It uses up the delta of the budget, so it has to be a part of that.
            heads: of the lost ledger, as checkpoints and the server have them, or their first 12
                digits: :meth:`holds` says yes to these from now on.

        Raises:
            ValueError: a head that is none.
        """
        if any(not re.fullmatch(f"[0-9a-f]{{{SHORTEST_HEAD},64}}", head) for head in heads):
            raise ValueError("expected the first 12 digits of a head at least")
        claim = Spending.of(Claim(float(epsilon), float(delta)))
        with self._lock:
            self._file.drop_leftovers()
            with self._file.writing():
                seq = len(self._file.entries()) + 1
                return self._append(
                    kind="loss",
                    entry_id=f"loss/{seq}",
                    mechanism="claim",
                    spending=claim,
                    heads=tuple(heads),
                )

    # --- what was spent --------------------------------------------------------------------------

    def cohorts(self) -> Mapping[str, Spending]:
        """All that each cohort was charged. Units of a cohort took part in the same steps."""
        total = self._charged()
        return {cohort: spent for cohort, spent in total.items() if cohort != NEWCOMERS}

    def spending(self, units: Sequence[bytes] | None = None) -> tuple[Spending, ...]:
        """What the costliest of these units were charged: the costliest is one of these.

        Args:
            units: names; ``None`` stands for all, those included that the ledger has not met.
        """
        total = self._charged()
        names = set(total) if units is None else self._cohorts_of(units)
        return undominated(total[name] for name in names)

    def worst(self, units: Sequence[bytes], delta: float) -> Spending:
        """What the costliest of these units was charged; no events for newcomers."""
        candidates = self.spending(units)
        if len(candidates) == 1:
            return candidates[0]
        return max(candidates, key=lambda one: self.epsilon(one, delta), default=Spending())

    def spent(self, delta: float, relation: str = "add-remove") -> float:
        """Epsilon so far: that of the costliest cohort."""
        return max(self.epsilon(one, delta, relation) for one in self.spending())

    def epsilon(self, spending: Spending, delta: float, relation: str = "add-remove") -> float:
        """Epsilon of any events; those that were asked for earlier are known to the ledger."""
        with self._lock:
            return known_epsilon(self._file, spending, delta, relation)

    # --- the rows --------------------------------------------------------------------------------

    def entries(self) -> tuple[Entry, ...]:
        """All rows, in their order."""
        with self._lock:
            return self._file.entries()

    def unreleased(self) -> tuple[Entry, ...]:
        """Reservations that are charged and have no release: a crash, or work in progress."""
        entries = self.entries()
        done = {entry.entry_id for entry in entries if entry.kind in ("release", "void")}
        return tuple(e for e in entries if e.kind == "reserve" and e.entry_id not in done)

    def released(self, run: str, round: int) -> str | None:
        """Digest of what a round released: a retry sends those bytes, and costs nothing."""
        found = [
            entry.release_sha256
            for entry in self.entries()
            if (entry.kind, entry.run, entry.round) == ("release", run, round)
        ]
        return found[-1] if found else None

    @property
    def head(self) -> str:
        """Hash of the last row, ``""`` where there is none."""
        return _head(self.entries())

    def holds(self, head: str) -> bool:
        """Whether the ledger goes on from this head: a deleted or restored one does not.

        Rows cut off at the end are seen by this and by nothing else.
        """
        rows = self.entries()
        forgiven = tuple(start for row in rows for start in row.heads)
        return head == "" or head.startswith(forgiven) or any(row.hash == head for row in rows)

    def verify(self) -> None:
        """Prove everything anew, the key included where it is there.

        Raises:
            LedgerError: with the reason, and the row.
        """
        with self._lock:
            self._file.close()
            if self._file.exists:
                self._file.entries()
                if self.path is not None and self.path.with_suffix(".key").exists():
                    self._file.key()

    # --- erasure ---------------------------------------------------------------------------------

    def tombstone(self, units: Sequence[bytes]) -> None:
        """Note that these units must not be used again. What they were charged stays charged."""
        with self._lock:
            key = self._file.key(create=True)
            assert key is not None
            names = set(keyed(key, units))
            with self._file.writing():
                seq = len(self._file.entries()) + 1  # proved before anything is changed
                if names <= self._file.erased():
                    return
                self._file.erase(names)
                self._append(
                    kind="erase",
                    entry_id=f"erase/{seq}",
                    touched=keyed_digest(key, units),
                    moved=True,
                )

    def erased(self, units: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which of these units were erased, one by one."""
        with self._lock:
            self._file.entries()
            gone = self._file.erased()
            key = self._file.key() if gone else None
            if key is None:
                return np.zeros(len(units), dtype=bool)
            return np.array([keyed(key, [unit])[0] in gone for unit in units], dtype=bool)

    def close(self) -> None:
        """Let the file go; the next use opens it again."""
        with self._lock:
            self._file.close()

    # --- inside ----------------------------------------------------------------------------------

    def _charged(self) -> dict[str, Spending]:
        return charged(self.entries())

    def _cohorts_of(self, units: Sequence[bytes]) -> set[str]:
        with self._lock:
            entries = self._file.entries()
            key = self._file.key() if entries else None
            if key is None:
                return {NEWCOMERS} if units else set()
            same = _touched_last(entries, keyed_digest(key, units))
            if same:
                return set(same.cohorts)
            members = self._file.members()
            return {members.get(unit, NEWCOMERS) for unit in keyed(key, units)}

    def _touch(
        self, entries: tuple[Entry, ...], units: Sequence[bytes], key: bytes, set_digest: str
    ) -> Touch:
        same = _touched_last(entries, set_digest)
        if same:
            return Touch(same.cohorts)
        names = keyed(key, units)
        gone = len(self._file.erased().intersection(names))
        if gone:
            raise LedgerError(
                f"{gone} of the units were erased and must not be used again: leave their rows out"
            )
        members = self._file.members()
        return touch(names, members, len(entries) + 1, sizes=sizes(members))

    def _uncertain(
        self,
        entries: tuple[Entry, ...],
        touched: Touch,
        spending: Spending,
        relation: str,
        limit: float,
        delta: float,
    ) -> list[Spending]:
        """Charges so far with which the quick bound does not prove that the step can be paid."""
        total = charged(entries)
        so_far = undominated(total[cohort] for cohort in touched.before())
        if relation != "add-remove":  # the bound is for this relation alone
            return list(so_far)
        return [one for one in so_far if upper_bound(one + spending, delta) > limit]

    def _afford(
        self, so_far: list[Spending], spending: Spending, relation: str, limit: float, delta: float
    ) -> None:
        for before in so_far:
            asked = self.epsilon(before + spending, delta, relation)
            if asked > limit:
                raise BudgetExceeded(self.epsilon(before, delta, relation), asked, limit)

    def _same_unit(self, entries: tuple[Entry, ...], unit: str) -> None:
        other = {entry.unit for entry in entries if entry.kind == "reserve"} - {unit}
        if other:
            raise LedgerError(
                f"{self._file.name} counts by {other.pop()}, this run by {unit}: what was spent of "
                "one is not known of the other; use one unit, or a ledger of its own"
            )

    def _follow(self, entry: Entry, kind: str, release_sha256: str | None = None) -> None:
        self._append(
            kind=kind,
            entry_id=entry.entry_id,
            run=entry.run,
            round=entry.round,
            release_sha256=release_sha256,
        )

    def _append(self, *, moved: bool = False, **columns: Any) -> Entry:
        entries = self._file.entries()
        stale = moved or not entries
        return self._file.append(
            Entry(
                seq=len(entries) + 1,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                members=self._file.members_digest() if stale else entries[-1].members,
                prev=_head(entries),
                **{"run": "", "round": 0, **columns},
            )
        )


def _head(entries: tuple[Entry, ...]) -> str:
    return entries[-1].hash if entries else ""


def _touched_last(entries: tuple[Entry, ...], set_digest: str) -> Entry | None:
    """The last debit, if it touched just these units: since then no cohort was split or erased."""
    last = next((e for e in reversed(entries) if e.kind in ("reserve", "erase")), None)
    return last if last and last.kind == "reserve" and last.touched == set_digest else None


def _attempts(entries: tuple[Entry, ...], run: str, round: int) -> int:
    return sum((e.kind, e.run, e.round) == ("reserve", run, round) for e in entries)
