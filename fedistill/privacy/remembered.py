"""Own rows that a private student trains on again: each stays by a coin of its own."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.continual import erasure
from fedistill.continual.erasure import ErasureReceipt, Tombstone
from fedistill.continual.storage import numbers_to_texts, texts_to_numbers
from fedistill.errors import CheckpointError, DataError, FedistillError, Problem, SettingsError
from fedistill.privacy import entropy
from fedistill.privacy.sampling import names_of
from fedistill.settings import ContinualSettings
from fedistill.types import FloatArray, Rows, State, joined_records

OBJECTIVES = ("er", "fine-tune")

CONTEST = (
    "it lets rows compete for places, so that one record decides which others are trained on, and "
    "no noise covers that"
)


class PrivateMemory:
    """Rows of earlier fits, kept at random and independently of one another.

    Every row draws a secret key, uniform on [0, 1), when it comes, and stays while its key is below
    capacity / rows seen so far. A row that falls out is gone. The number held is ``capacity`` in
    expectation once so many were seen, give or take its square root; a reservoir would hold that
    many exactly.

    Why not a reservoir: in a contest for places one record more pushes another one out. Two data
    sets that differ in one record then train on sets that differ in two, and in every later step.
    Here who stays depends on a row's own key and on a count. Given all keys (which do not depend on
    what is in the rows), training on the new and the remembered rows is DP-SGD on two sets that
    differ in that one record, in those steps in which it is still there; a mixture over keys is no
    less private than its worst part. So a remembered record is charged as one that certainly takes
    part, an upper bound. The count of rows seen is public, as the number of rows is everywhere
    here: the neighbour of a data set has a blank in the place of the record. It therefore counts
    all rows that come, those that are here already, too.

    Rows by choice (mir, herding, hardest, balanced over classes) compete as well, and choose by
    what is in the rows: :func:`private_memory` refuses them.

    Args:
        capacity: expected number of rows.

    Attributes:
        seen: rows that ever came.
        tombstones: of the persons erased, who are not let in again.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise FedistillError(f"a memory needs room for a row at least, found {capacity}")
        self.capacity = capacity
        self.seen = 0
        self.tombstones: tuple[Tombstone, ...] = ()
        self._rows: Rows | None = None
        self._keys: FloatArray = np.empty(0)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def rows(self) -> Rows | None:
        """What is held; None: nothing."""
        return self._rows if len(self) else None

    def beside(self, rows: Rows, unit: str) -> Rows:
        """These rows and the remembered ones that are not among them (fault 48).

        For users a row is the same if it is the same user's: one user's rows must not decide about
        another's.

        Args:
            rows: new rows.
            unit: ``record`` or ``user``.

        Raises:
            FedistillError: users are asked for, and the rows do not say whose they are.
        """
        held = self.rows
        if held is None or not len(rows):
            return rows
        known = set(_marks(rows, unit))
        old = held.take([n for n, mark in enumerate(_marks(held, unit)) if mark not in known])
        return _joined(rows, old)

    def add(self, rows: Rows, unit: str) -> None:
        """Toss a coin for each of these rows; older ones may fall out.

        Args:
            rows: new rows.
            unit: as :meth:`beside`.
        """
        self.seen += len(rows)
        held = self.rows
        known = set() if held is None else set(_marks(held, unit))
        marks = _marks(rows, unit)
        first = {mark: number for number, mark in reversed(list(enumerate(marks)))}
        new = [n for n, mark in enumerate(marks) if first[mark] == n and mark not in known]
        if rows.subject is not None:
            gone = erasure.erased(rows.subject, self.tombstones)
            new = [number for number in new if not gone[number]]
        arrived = replace(rows, ids=None, site=None, subject=_subjects(rows)).take(new)
        keys = entropy.numpy_generator().random(len(new))
        self._rows = arrived if held is None else _joined(held, arrived)
        self._keys = np.concatenate([self._keys, keys])
        self._keep(self._keys * self.seen < self.capacity)

    def erase(self, subject: object) -> ErasureReceipt:
        """Forget a person's rows, and let none of them in again.

        Raises:
            FedistillError: the empty subject, which is nobody.
        """
        name = str(subject)
        if not name:
            raise FedistillError("erase: expected a subject, found the empty one: name the person")
        count = 0
        if self._rows is not None:
            theirs = _subjects(self._rows) == name
            count = int(theirs.sum())
            self._keep(~theirs)
        salt = secrets.randbits(63)
        digest = erasure.digest_of({"keys": self._keys})
        stone = Tombstone(salt, erasure.mark_of(name, salt), float(self.seen), count, digest)
        if not any(old.marks(name) for old in self.tombstones):
            self.tombstones = (*self.tombstones, stone)
        return ErasureReceipt(stone, ())

    def drop(self, units: Collection[bytes], unit: str) -> int:
        """Let the rows of these units go (fault 50); how many rows left.

        Args:
            units: names, as :func:`fedistill.privacy.sampling.units_of` gives them.
            unit: ``record`` or ``user``.
        """
        held, wanted = self.rows, set(units)
        if held is None or not wanted:
            return 0
        keep = np.array([name not in wanted for name in names_of(held, unit)])
        self._keep(keep)
        return int((~keep).sum())

    def state_dict(self) -> State:
        """Rows, keys, counters and tombstones."""
        state: dict[str, npt.NDArray[Any]] = {
            "counters": np.array([self.capacity, self.seen], dtype=np.int64),
            **erasure.stones_to_state(self.tombstones),
        }
        if self._rows is None or not len(self):
            return state
        if self._rows.record is not None:
            state["records"] = texts_to_numbers(self._rows.record.astype(np.str_))
        return state | {
            "inputs": np.array(self._rows.inputs),
            "labels": np.array(self._rows.labels),
            "subjects": texts_to_numbers(_subjects(self._rows)),
            "keys": self._keys.copy(),
        }

    def load_state_dict(self, state: State) -> None:
        """Become what :meth:`state_dict` returned; who was erased here since stays out.

        Raises:
            CheckpointError: a damaged state; nothing has changed then.
        """
        try:
            seen = int(state["counters"][1])
            stones = erasure.stones_from_state(state)
            rows, keys = None, np.empty(0)
            if "keys" in state:
                subjects = numbers_to_texts(state["subjects"])
                record = None
                if "records" in state:
                    record = numbers_to_texts(state["records"]).astype(np.bytes_)
                rows = Rows(state["inputs"], state["labels"], subject=subjects, record=record)
                keys = np.array(state["keys"], dtype=np.float64)
                marks = subjects if record is None else record
                if not len(keys) == len(rows) == len(subjects) == len(marks):
                    raise ValueError("columns of unequal length")
        except (KeyError, IndexError, ValueError, DataError) as problem:
            raise CheckpointError(
                f"the remembered rows cannot be read ({problem}): they are damaged, put a copy back"
            ) from None
        self.seen, self._rows, self._keys = seen, rows, keys
        self.tombstones = tuple(dict.fromkeys((*stones, *self.tombstones)))
        if rows is not None:
            self._keep(~erasure.erased(_subjects(rows), self.tombstones))

    def _keep(self, keep: npt.NDArray[np.bool_]) -> None:
        if self._rows is not None:
            self._rows = self._rows.take(np.flatnonzero(keep))
            self._keys = self._keys[keep]


def private_memory(how: ContinualSettings) -> PrivateMemory | None:
    """The memory that the settings ask for; None: none.

    Raises:
        SettingsError: they ask for one that cannot be private, with the reason.
    """
    problems = []
    if how.objective is not None and how.objective not in OBJECTIVES:
        text = f'"{how.objective}" keeps or compares more than rows and cannot be private: use er'
        problems.append(Problem("continual.objective", text))
    if how.teacher != "none":
        text = "a teacher beside own rows is not part of a noisy step: set none"
        problems.append(Problem("continual.teacher", text))
    if how.buffer and how.policy != "reservoir":
        text = (
            f'"{how.policy}" cannot be private: {CONTEST}; use reservoir, which then tosses coins'
        )
        problems.append(Problem("continual.policy", text))
    if how.buffer and how.draw != "uniform":
        text = f'"{how.draw}" chooses rows by what is in them and cannot be private: use uniform'
        problems.append(Problem("continual.draw", text))
    if how.buffer and how.max_uses:
        text = "uses are not counted under a privacy budget, the ledger counts: set 0"
        problems.append(Problem("continual.max_uses", text))
    if problems:
        raise SettingsError(problems)
    return PrivateMemory(how.buffer) if how.buffer else None


def _marks(rows: Rows, unit: str) -> list[bytes]:
    """What a row is known again by: the record that it is, for users with its owner."""
    records = names_of(rows, "record")
    if unit == "record":
        return records
    return [a + b for a, b in zip(names_of(rows, unit), records, strict=True)]


def _subjects(rows: Rows) -> npt.NDArray[np.str_]:
    return np.full(len(rows), "", dtype=np.str_) if rows.subject is None else rows.subject


def _joined(first: Rows, second: Rows) -> Rows:
    parts: Sequence[Rows] = (first, second)
    known = any(part.subject is not None for part in parts)
    return Rows(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.labels for part in parts]),
        subject=np.concatenate([_subjects(part) for part in parts]) if known else None,
        record=joined_records(parts),
    )
