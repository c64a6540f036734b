"""Who took part: uploads dropped, with their reasons, and flags raised."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedistill.report.folder import Run
from fedistill.report.words import clean, count, number, ranges

REASONS: Mapping[str, str] = {
    "late": "came after the round had closed",
    "timeout": "did not answer in time",
    "identical": "same predictions as another client",
    "constant": "same prediction for every row",
    "single-class": "one class for nearly every row",
}
"""Plain words for the codes that need them; others are shown as they are."""
MOST = 60


@dataclass(frozen=True)
class Incident:
    """Something that befell one client in some rounds."""

    client: str
    kind: str
    code: str
    meaning: str
    rounds: str


def incidents(run: Run) -> tuple[list[Incident], int]:
    """Drops first, then flags, a line per client and code; and how many more there are."""
    found: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for row in run.rounds:
        for kind in ("dropped", "flags"):
            table = row.get(kind)
            for client, codes in table.items() if isinstance(table, Mapping) else ():
                for code in _codes(codes):
                    found[kind, str(client), code].append(row["round"])
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]), item[0]))
    lines = [
        Incident(
            clean(client, 40),
            "dropped" if kind == "dropped" else "flagged",
            clean(code, 40),
            REASONS.get(code, ""),
            clean(ranges(rounds), 60),
        )
        for (kind, client, code), rounds in ordered
    ]
    return lines[:MOST], max(0, len(lines) - MOST)


def sentence(run: Run) -> str:
    """How many uploads were used, of how many."""
    used = int(run.total("clients_ok"))
    asked = used + int(run.total("clients_failed"))
    if not asked:
        return ""
    short = sum((number(row.get("clients_failed")) or 0) > 0 for row in run.rounds)
    if used == asked:
        return f"All {count(asked, 'upload')} were used."
    return (
        f"{used:,} of {count(asked, 'upload')} were used; "
        f"{short:,} of {count(len(run.rounds), 'round')} went on without a client."
    )


def _codes(value: object) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    return [str(code) for code in value[:10]] if isinstance(value, list) else []
