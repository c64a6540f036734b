"""Who took part: uploads dropped, with their reasons, and flags raised."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedistill.report.folder import Run
from fedistill.report.words import clean, count, number, ranges

REASONS: Mapping[str, str] = {
    # dropped
    "late": "came after the round had closed",
    "timeout": "did not answer in time",
    "deadline": "answered after the deadline",
    "offline": "was away",
    "busy": "its last answer was still on its way",
    "lost": "the message or its answer did not arrive",
    "too_slow": "broke off a step that took too long",
    "policy": "the site does not allow it",
    "budget_exhausted": "its privacy budget is spent: it trains on own rows no more",
    "stale_round": "an answer to another round",
    "duplicate": "answered already",
    "reference": "both sides held different copies; the next message goes whole",
    "nonfinite": "NaN or infinity",
    "extreme": "values far too large",
    "not_probs": "rows that do not sum to 1",
    # flagged
    "identical": "same predictions as another client: one weight in all",
    "constant": "same prediction for every row: no weight, while enough others are left",
    "echo": "repeats the last soft targets: no weight, while enough others are left",
    "overconfident": "certain of every row: smoothed by 1%",
    "width": "features of another width than most: it is left out and learns alone",
    "clipped": "a few logits beyond 10,000, clipped at the site",
    "inactive": "three rounds without an answer: asked every third round",
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
    """How many uploads were used, of how many, and how many more of rounds before."""
    used = int(run.total("clients_ok"))
    asked = used + int(run.total("clients_failed"))
    if not asked:
        return ""
    short = sum((number(row.get("clients_failed")) or 0) > 0 for row in run.rounds)
    if used == asked:
        return f"All {count(asked, 'upload')} were used."
    late = int(run.total("clients_late"))
    came = f" {count(late, 'more upload')} came late and counted less." if late else ""
    return (
        f"{used:,} of {count(asked, 'upload')} were used in their round; "
        f"{short:,} of {count(len(run.rounds), 'round')} went on without a client.{came}"
    )


def _codes(value: object) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    return [str(code) for code in value[:10]] if isinstance(value, list) else []
