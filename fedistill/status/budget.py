"""What has been spent of privacy budgets, from what a run and a site write anyway."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedistill.privacy import audit_log
from fedistill.report.words import clean, number
from fedistill.status import files

EXHAUSTED = "budget_exhausted"
"""The code of a site that has spent its privacy budget."""


def told(rounds: Iterable[str]) -> dict[str, float]:
    """The privacy loss that each site told last, from the lines of ``rounds.jsonl``."""
    found: dict[str, float] = {}
    for line in rounds:
        table = files.table(line).get("epsilon")
        for name, value in table.items() if isinstance(table, dict) else ():
            if (spent := number(value)) is not None:
                found[clean(name)] = spent
    return found


def account(state: Path) -> dict[str, Any]:
    """What a site's audit log says of its budget: what is spent, the most, whether it is gone.

    The log is shown and not verified here.
    """
    known = audit_log.entries(state / audit_log.NAME)
    charges = [entry for entry in known if entry.get("event") in {"charged", "exhausted"}]
    spent = [value for one in charges if (value := number(one.get("epsilon"))) is not None]
    limits = [value for one in known if (value := number(one.get("limit"))) is not None]
    return {
        "epsilon": spent[-1] if spent else None,
        "limit": limits[-1] if limits else None,
        "exhausted": bool(charges) and charges[-1]["event"] == "exhausted",
    }
