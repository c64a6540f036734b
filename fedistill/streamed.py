"""What a stream did to a federation: a line for each experience, when it has been learned.

Measured where the test rows are at hand, in a simulation; nothing here travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedistill.client import Site
from fedistill.continual.replay import Stats
from fedistill.course import WINDOW, Met
from fedistill.distill.learner import Learner
from fedistill.evaluate import measure
from fedistill.metrics.continual import (
    anytime_accuracy,
    average_accuracy,
    backward_transfer,
    forgetting,
)
from fedistill.types import Rows

Line = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Streamed:
    """The experiences of a federation, and when each has been learned.

    Attributes:
        names: of the experiences, by number.
        tests: test rows of each, by number.
        ends: the regular round with which each position ends.
        same: whether all clients meet them in order.
    """

    names: tuple[str, ...]
    tests: tuple[Rows, ...]
    ends: tuple[int, ...]
    same: bool = True

    def ends_in(self, regular: int) -> int | None:
        """The position that ends with a regular round, from 0; None if none does."""
        return self.ends.index(regular) if regular in self.ends else None


def experience_line(
    stream: Streamed,
    position: int,
    number: int,
    sites: Mapping[str, Site],
    student: Learner | None,
    history: Sequence[Mapping[str, Any]],
) -> Line:
    """The figures of an experience that has just been learned, as they stand in ``stream.jsonl``.

    Args:
        stream: what was met.
        position: which, from 0.
        number: the round that has just ended.
        sites: the clients, with what they noted when they met it.
        student: the server's, or None.
        history: rows of the rounds before this one. What came after the line before counts here,
            also a round of distillation that followed it at once.
    """
    told = max((row["round"] for row in history if "experience" in row), default=0)
    since = [row for row in history if row["round"] > told]
    tables, memories, curves, anew = [], [], {}, []
    came: dict[str, Met] = {}
    for name, site in sites.items():  # once: of many clients, most are woken for it
        if site.client.wrap is None:
            tables.append(_on_all(site.learner, stream.tests))
        memories += _memory(site.learner)
        if (one := _met(site, position)) is not None:
            came[name], curves[name] = one, _curve(site.met, one)
            anew.append(_anew(site.met, one))
    shares = {name: one.accuracy for name, one in came.items() if one.accuracy is not None}
    return {
        "experience": position + 1,
        "name": stream.names[position] if stream.same else f"experience {position + 1}",
        "round": number,
        "rows": sum(one.rows for one in came.values()),
        "student": _on_all(student, stream.tests),
        "clients": _means(tables),
        "prequential": float(np.mean([*shares.values()])) if shares else None,
        "prequential_by_client": shares,
        "curve": curves,
        "alarms": {name: list(one.alarms) for name, one in came.items() if one.alarms},
        "consolidated": any(row.get("extra") for row in since),
        "buffer": _buffers(memories),
        "seconds": round(sum(row["seconds"] for row in since), 3),
        "rows_trained": sum(one.trained for one in came.values()),
        "rows_retrain": round(sum(anew)),
    }


def summary_of(lines: Sequence[Mapping[str, Any]], *, same: bool) -> Line | None:
    """Average and anytime accuracy, forgetting, transfer; None before the first experience.

    Of the server's student, or of the clients' mean where there is none. Forgetting and transfer
    need one order for all: otherwise nobody can say when an experience was learned.
    """
    if not lines:
        return None
    who = "student" if lines[-1]["student"] is not None else "clients"
    told = [line[who] for line in lines]
    table = np.array([[np.nan if v is None else v for v in row] for row in told], dtype=float)
    tested = [line["prequential"] for line in lines if line["prequential"] is not None]
    whole = len(lines) == table.shape[1]
    figures: Line = {
        "of": who,
        "experiences": len(lines),
        "average_accuracy": average_accuracy(table) if same or whole else None,
        "anytime_accuracy": anytime_accuracy(table) if same else None,
        "forgetting": forgetting(table) if same and len(lines) > 1 else None,
        "backward_transfer": backward_transfer(table) if same and len(lines) > 1 else None,
        "forward_transfer": None,
        "prequential": float(np.mean(tested)) if tested else None,
    }
    return figures


def _met(site: Site, position: int) -> Met | None:
    return next((one for one in site.met if one.position == position), None)


def _anew(met: Sequence[Met], one: Met) -> float:
    """Rows that steps would see if all rows so far were learned as these were, from scratch."""
    so_far = sum(other.rows for other in met if other.position <= one.position)
    return one.trained * so_far / max(one.rows, 1)


def _curve(met: Sequence[Met], one: Met) -> list[list[float]]:
    """Points [rows so far, share known] of one experience."""
    before = sum(other.rows for other in met if other.position < one.position)
    ends = [before + WINDOW * place for place in range(1, len(one.curve))] + [before + one.rows]
    return [[end, round(share, 6)] for end, share in zip(ends, one.curve, strict=False)]


def _on_all(learner: Learner | None, tests: Sequence[Rows]) -> list[float | None] | None:
    """Accuracy on the test rows of every experience."""
    return None if learner is None else [measure(learner, rows)["accuracy"] for rows in tests]


def _means(tables: Sequence[list[float | None] | None]) -> list[float | None] | None:
    known = [table for table in tables if table is not None]
    return np.mean(np.array(known, dtype=float), axis=0).tolist() if known else None


def _memory(learner: Learner) -> list[Stats]:
    """What a learner's memory holds, if it has one; a private one does not say."""
    held = getattr(learner, "replay", None)
    return [held.stats()] if held is not None and hasattr(held, "stats") else []


def _buffers(stats: Sequence[Stats]) -> Line | None:
    """What all memories hold together."""
    if not stats:
        return None
    classes: dict[str, int] = {}
    for one in stats:
        for label, count in one.classes.items():
            classes[str(label)] = classes.get(str(label), 0) + count
    return {
        "rows": sum(one.rows for one in stats),
        "capacity": sum(one.capacity for one in stats),
        "classes": dict(sorted(classes.items(), key=lambda item: int(item[0]))),
    }
