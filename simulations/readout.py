"""From run folders to figures, and from figures to Markdown."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedistill.errors import DataError
from fedistill.report.words import MINUS, MISSING


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or one that was cut short."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The rounds of a run; a last line that is being written is not among them."""
    try:
        text = (folder / "rounds.jsonl").read_text()
    except OSError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


@dataclass(frozen=True)
class Step:
    """A round in which the accuracy was measured.

    Attributes:
        round: its number.
        sent: bytes up and down until its end, for each client of the federation.
        accuracy: of the student; of the clients on average where there is no student.
    """

    round: int
    sent: float
    accuracy: float


@dataclass(frozen=True)
class Figures:
    """What one run came to.

    Attributes:
        student: accuracy of the server's student after the last round, None without one.
        clients: mean accuracy of the clients' own models after the last round.
        up: bytes that a client sent in a round; None where nothing counted is exchanged.
        down: bytes that a client was sent in a round.
        seconds: of all rounds.
        course: the rounds that were measured.
    """

    student: float | None
    clients: float | None
    up: float | None
    down: float | None
    seconds: float
    course: tuple[Step, ...]

    def reached(self, level: float) -> Step | None:
        """The first measured round at or above a level."""
        return next((step for step in self.course if step.accuracy >= level), None)

    def exactly(self, step: Step) -> bool:
        """Whether the round before was measured too, so that this one is not merely the latest."""
        place = self.course.index(step)
        before = self.course[place - 1].round if place else 0
        return step.round == before + 1


def read(folder: Path, rounds: int, exchange: str) -> Figures:
    """The figures of a finished run after ``rounds`` rounds, whatever came later.

    Args:
        folder: the run folder.
        rounds: how many rounds count.
        exchange: what the method exchanges; of pooled rows and of nothing no bytes are counted,
            and the one model on pooled rows is the student, not a client.
    """
    rows = [row for row in lines_of(folder) if row["round"] <= rounds]
    people = read_json(folder / "summary.json").get("clients") or 1
    key = "client_accuracy_mean"
    if any(row.get("student_accuracy") is not None for row in rows):
        key = "student_accuracy"
    course, sent = [], 0.0
    for row in rows:
        sent += (row["bytes_up"] + row["bytes_down"]) / people
        if row.get(key) is not None:
            course.append(Step(row["round"], sent, row[key]))
    answered = sum(row["clients_ok"] for row in rows)
    asked = answered + sum(row["clients_failed"] for row in rows)
    counted = exchange not in {"rows", "nothing"}
    return Figures(
        student=rows[-1].get("student_accuracy"),
        clients=None if exchange == "rows" else rows[-1].get("client_accuracy_mean"),
        up=sum(row["bytes_up"] for row in rows) / max(answered, 1) if counted else None,
        down=sum(row["bytes_down"] for row in rows) / max(asked, 1) if counted else None,
        seconds=sum(row.get("seconds", 0.0) for row in rows),
        course=tuple(course),
    )


# --- Markdown ------------------------------------------------------------------------------------


def spread(values: Sequence[float | None]) -> str:
    """``62.3 ± 0.6 (3)``: mean and deviation in percent and how many; a dash without any."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return MISSING
    deviation = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    middle = f"{statistics.mean(known):.1f}".replace("-0.0", "0.0").replace("-", MINUS)
    return f"{middle}{deviation} ({len(known)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def put(page: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- MARKER -->`` and ``<!-- end MARKER -->`` in a page.

    Raises:
        DataError: no such page, or the markers are not in it, each once and in this order.
    """
    start, end = f"<!-- {marker} -->", f"<!-- end {marker} -->"
    try:
        before = page.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"expected a page at {page} ({error.strerror}): check --readme") from None
    between = re.compile(re.escape(start) + r"\n.*?" + re.escape(end), re.DOTALL)
    if before.count(start) != 1 or len(between.findall(before)) != 1:
        raise DataError(
            f"{page}: expected {start} and below it {end}, each on its own line and once: put both "
            "where the tables belong"
        )
    page.write_text(between.sub(lambda _: f"{start}\n\n{text}\n\n{end}", before), encoding="utf-8")
