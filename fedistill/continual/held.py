"""The rows of a buffer and the one law they follow: the largest keys stay.

What a buffer offers its users is in :mod:`fedistill.continual.buffer`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedistill.continual.means import ClassMeans
from fedistill.continual.policies import Candidates, Policy, stay
from fedistill.continual.storage import Columns, Table, rows_of
from fedistill.continual.thresholds import Thresholds
from fedistill.errors import FedistillError
from fedistill.types import FloatArray, IntArray


class Held:
    """Rows, thresholds and class means under a policy.

    Args:
        capacity: rows, from 0.
        policy: what stays.

    Raises:
        FedistillError: a capacity below 0.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        self.capacity = check_capacity(capacity)
        self.policy = policy
        self._table = Table(self.capacity)
        self._slots: IntArray = np.empty(0, dtype=np.int64)  # of the rows, in order of arrival
        self._thresholds, self._means = Thresholds(), ClassMeans()

    def __len__(self) -> int:
        return len(self._slots)

    def _keys(self, rows: Columns) -> FloatArray:
        features = rows.get("features")
        means = features is not None and self.policy.needs == "features"
        wanted = Candidates(
            uniform=rows["uniform"],
            numbers=rows["numbers"],
            labels=rows["labels"],
            scores=rows.get("scores"),
            features=features,
            means=self._means.of(rows["labels"]) if means else None,
        )
        keys = np.asarray(self.policy.keys(wanted), dtype=np.float64)
        if keys.shape != rows["labels"].shape or not np.isfinite(keys).all():
            raise FedistillError(
                f"policy {self.policy.name}: expected {len(rows['labels'])} finite keys, found "
                f"shape {list(keys.shape)} or NaN: return one number a row"
            )
        return keys

    def _groups(self, labels: IntArray) -> IntArray:
        return labels if self.policy.by_class else np.zeros_like(labels)

    def _above(self, rows: Columns) -> Columns:
        """The rows above the thresholds."""
        if not self.policy.lifelong or not len(self._thresholds):
            return rows
        groups = self._groups(rows["labels"])
        above = self._thresholds.admit(groups, rows["keys"], rows["uniform"])
        return rows if above.all() else rows_of(rows, above)

    def _insert(self, rows: Columns) -> int:
        """Let in as many rows as the policy wants, and evict for them; how many are in."""
        held, count = len(self), len(rows["labels"])
        if not count:
            return 0
        if held + count > self.capacity:
            keep = self._choose(rows)
            stays, comes = keep[:held], np.flatnonzero(keep[held:])
            self._table.clear(self._slots[~stays])
            self._slots, rows = self._slots[stays], rows_of(rows, comes)
            count = len(comes)
        slots = self._table.free(count)
        self._table.put(slots, rows)
        self._slots = np.concatenate([self._slots, slots])
        return count

    def _choose(self, rows: Columns) -> npt.NDArray[np.bool_]:
        """Which of the rows held and those that come stay; thresholds rise to the others."""
        names = ["labels", "uniform", "numbers"]
        names += ["keys"] if self.policy.lifelong else [n for n in ("features",) if n in rows]
        both = {name: rows[name] for name in names}
        if len(self):
            held = {name: self._table.columns[name][self._slots] for name in names}
            both = {name: np.concatenate([held[name], both[name]]) for name in names}
        keys = both["keys"] if self.policy.lifelong else self._keys(both)
        by_class = self.policy.by_class
        keep = np.zeros(len(keys), dtype=bool)
        keep[stay(keys, both["uniform"], both["labels"], self.capacity, by_class=by_class)] = True
        if self.policy.lifelong:
            gone = ~keep
            groups = self._groups(both["labels"][gone])
            self._thresholds.lift(groups, keys[gone], both["uniform"][gone])
        return keep

    def _rebuild(self, capacity: int) -> None:
        rows, self.capacity = self._table.take(self._slots), capacity
        columns = self._table.columns
        self._table = Table(capacity)
        self._slots = np.empty(0, dtype=np.int64)
        if columns:
            self._table.put(self._slots, {name: column[:0] for name, column in columns.items()})
            self._insert(rows)

    def _sort(self) -> None:
        """By arrival, so that a state does not depend on the order of merging."""
        if len(self):
            rows = self._table.take(self._slots)
            self._slots = self._slots[np.lexsort((rows["uniform"], rows["numbers"]))]

    def _recount(self) -> None:
        """Begin the class means anew from the rows that are there."""
        self._means = ClassMeans()
        if self.policy.needs == "features" and len(self):
            left = self._table.take(self._slots)
            self._means.add(left["labels"], left["features"])


def check_capacity(capacity: int) -> int:
    """The capacity, if it is one.

    Raises:
        FedistillError: it is below 0.
    """
    if capacity < 0:
        raise FedistillError(f"buffer: expected a capacity of at least 0, found {capacity}")
    return int(capacity)
