"""Cohorts: units that took part in the same steps, and so have lost the same.

The chain is enough to know what each cohort was charged: a row names the cohorts it charges and
those that were born in it. Only *who* is in a cohort is kept in a table beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedistill.privacy.chain import Entry
from fedistill.privacy.events import Spending

NEWCOMERS = ""
"""Stands for units that the ledger has not met, wherever a cohort is named."""


@dataclass(frozen=True)
class Touch:
    """What a reservation does to the cohorts.

    Attributes:
        cohorts: which are charged.
        splits: cohorts born by it, and of which cohort.
        moves: who goes into a cohort that is born (keyed hashes).
    """

    cohorts: tuple[str, ...]
    splits: Mapping[str, str] = field(default_factory=dict)
    moves: Mapping[str, Sequence[bytes]] = field(default_factory=dict)

    def before(self) -> set[str]:
        """Cohorts whose charges the touched units bear so far."""
        return {self.splits.get(cohort, cohort) for cohort in self.cohorts}


def charged(entries: Iterable[Entry]) -> dict[str, Spending]:
    """What each cohort was charged: reservations that were not taken back, and losses.

    A cohort inherits what the one that it was split from was charged until then. What a loss took
    is unknown, so it is charged to all, newcomers too.
    """
    entries = tuple(entries)
    void = {entry.entry_id for entry in entries if entry.kind == "void"}
    total = {NEWCOMERS: Spending()}
    for entry in entries:
        for child, parent in entry.splits.items():
            total[child] = total[parent]
        if entry.kind == "loss":
            total = {cohort: spent + entry.spending for cohort, spent in total.items()}
        elif entry.kind == "reserve" and entry.entry_id not in void:
            for cohort in entry.cohorts:
                total[cohort] = total[cohort] + entry.spending
    return total


def touch(
    units: Sequence[bytes], members: Mapping[bytes, str], seq: int, *, sizes: Mapping[str, int]
) -> Touch:
    """Which cohorts these units are, with those split of which only some units are touched.

    Args:
        units: keyed hashes, each once.
        members: cohort of each unit that is known.
        seq: number of the row to come: cohorts are named after the row they were born in.
        sizes: how many units there are in a cohort.

    >>> touch([b"a", b"c"], {b"a": "1-1", b"b": "1-1"}, 2, sizes={"1-1": 2}).splits
    {'2-1': '', '2-2': '1-1'}
    """
    groups: dict[str, list[bytes]] = {}
    for unit in units:
        groups.setdefault(members.get(unit, NEWCOMERS), []).append(unit)
    cohorts: list[str] = []
    splits: dict[str, str] = {}
    moves: dict[str, Sequence[bytes]] = {}
    for cohort, group in sorted(groups.items()):
        if cohort != NEWCOMERS and len(group) == sizes[cohort]:
            cohorts.append(cohort)
            continue
        child = f"{seq}-{len(splits) + 1}"
        splits[child], moves[child] = cohort, group
        cohorts.append(child)
    return Touch(tuple(sorted(cohorts)), splits, moves)


def sizes(members: Mapping[bytes, str]) -> Counter[str]:
    """How many units there are in each cohort."""
    return Counter(members.values())


def undominated(spendings: Iterable[Spending]) -> tuple[Spending, ...]:
    """Those that no other contains: the costliest is among them, whatever else is added to all."""
    found: list[Spending] = []
    for one in sorted(set(spendings), key=lambda s: (-sum(s.counts.values()), s.to_json())):
        if not any(_contains(other, one) for other in found):
            found.append(one)
    return tuple(found)


def _contains(larger: Spending, smaller: Spending) -> bool:
    return all(larger.counts.get(event, 0) >= times for event, times in smaller.counts.items())
