"""A run's progress in the terminal: a line per finished round, and one that moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedistill.report import words
from fedistill.report.words import clean, number

REFRESH = 0.1
"""Fewest seconds between two drawings of the moving line."""
BAR = 20
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its head, its width, its text, and when to give way to a narrow terminal."""

    head: str
    width: int
    text: Callable[[Row], str]
    rank: int = 0


COLUMNS = (
    Column("student", 8, lambda row: words.percent(number(row.get("student_accuracy")))),
    Column("clients", 8, lambda row: words.percent(number(row.get("client_accuracy_mean")))),
    Column("least", 7, lambda row: words.percent(number(row.get("client_accuracy_min"))), 2),
    Column("agree", 7, lambda row: words.percent(number(row.get("agreement"))), 4),
    Column("up", 9, lambda row: words.human_bytes(number(row.get("bytes_up"))), 3),
    Column("down", 9, lambda row: words.human_bytes(number(row.get("bytes_down"))), 3),
    Column("ok", 7, lambda row: _attendance(row), 1),
    Column("time", 8, lambda row: _short(number(row.get("seconds"))), 5),
)
EPSILON = Column("epsilon", 8, lambda row: words.epsilon(number(row.get("epsilon_max"))))
"""A column of private runs: the loss of the site that spent most."""


def columns(*, private: bool) -> tuple[Column, ...]:
    """The columns of a run; in a private one what was spent stands behind the accuracies."""
    place = next(k for k, column in enumerate(COLUMNS) if column.head == "up")
    return (*COLUMNS[:place], EPSILON, *COLUMNS[place:]) if private else COLUMNS


class RoundTable:
    """A context manager that shows rounds as they finish.

    Finished rounds are printed and stay; only the last line is redrawn, at most ten times a
    second and by the caller's thread alone. Off a terminal there are plain lines and no moving one.

    Args:
        title: what runs, printed first.
        rounds: how many rounds there will be.
        console: where to print; by default standard output.
        fedavg_bytes: what FedAvg would send each way per client and round, for the last line; a
            row may carry it as ``fedavg_bytes_per_client_round`` instead.
        private: whether the run has a privacy loss to show.
    """

    def __init__(
        self,
        title: str,
        rounds: int,
        console: Console | None = None,
        *,
        fedavg_bytes: int | None = None,
        private: bool = False,
    ) -> None:
        self.title = clean(title, 100)
        self.rounds = rounds
        self.console = console or Console()
        self.fedavg_bytes: float | None = fedavg_bytes
        self._moving = self.console.is_terminal and not self.console.is_dumb_terminal
        self._live: Live | None = None
        self._drawn = self._began = 0.0
        self._last: Row = {}
        self._sent = self._messages = self._finished = 0
        self._columns = columns(private=private)
        if self._moving:
            self._columns = fitting(self.console.width, self._columns)

    def __enter__(self) -> RoundTable:
        self._began = time.monotonic()
        self._print(Text(self.title, style="bold"))
        self._print(Text(head(self._columns), style="dim"))
        if self._moving:
            self._live = Live(
                Text(),
                console=self.console,
                auto_refresh=False,
                transient=True,
                vertical_overflow="crop",
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
        if self._finished:
            self._print(Text(self.summary(cut_short=kind is not None), style="bold"))

    def advance(self, label: str, done: int, total: int) -> None:
        """Say how far the present round is, for example ``"client"``, 3 of 8."""
        now = time.monotonic()
        if self._live is None or (now - self._drawn < REFRESH and done < total):
            return
        self._drawn = now
        current = int(number(self._last.get("round")) or 0) + 1
        filled = round(BAR * min(done / total, 1)) if total > 0 else 0
        line = Text.assemble(
            (f"{min(current, self.rounds)}/{self.rounds}".rjust(7), "bold"),
            "  ",
            ("━" * filled, "cyan"),
            ("━" * (BAR - filled), "bright_black"),
            f"  {clean(label, 32)} {done} of {total}",
            (f"  {words.duration(now - self._began)}", "dim"),
        )
        line.no_wrap = True
        line.overflow = "ellipsis"
        self._live.update(line, refresh=True)

    def add(self, row: Row) -> None:
        """Append a finished round, a line as in rounds.jsonl."""
        self._last = row
        self._finished += 1
        self._sent += int((number(row.get("bytes_up")) or 0) + (number(row.get("bytes_down")) or 0))
        ok, failed, late = (
            number(row.get(key)) or 0 for key in ("clients_ok", "clients_failed", "clients_late")
        )
        # FedAvg: down to all asked, up from those that answered, in time or late.
        self._messages += int(2 * ok + failed + late)
        self.fedavg_bytes = number(row.get("fedavg_bytes_per_client_round")) or self.fedavg_bytes
        if self._live is not None:
            self._live.update(Text(), refresh=False)
        self._print(Text(self.line(row), style="yellow" if failed else ""))

    def line(self, row: Row) -> str:
        """A round's line: its number, its figures, and the time left."""
        place = f"{clean(row.get('round', words.MISSING), 6)}/{self.rounds}".rjust(7)
        cells = "".join(column.text(row).rjust(column.width + 1) for column in self._columns)
        return place + cells + _short(self._left()).rjust(10)

    def summary(self, *, cut_short: bool = False) -> str:
        """The last line: how long, how good, how many bytes, and how many FedAvg would send."""
        row = self._last
        rounds = words.count(self._finished, "round")
        parts = [
            ("stopped after " if cut_short else "")
            + rounds
            + f" in {words.duration(time.monotonic() - self._began)}"
        ]
        if (student := number(row.get("student_accuracy"))) is not None:
            parts.append(f"student {words.percent(student)}")
        if (mean := number(row.get("client_accuracy_mean"))) is not None:
            least = words.percent(number(row.get("client_accuracy_min")))
            parts.append(f"clients {words.percent(mean)} (least {least})")
        if (spent := number(row.get("epsilon_max"))) is not None:
            parts.append(f"epsilon {words.epsilon(spent)}")
        sent = f"sent {words.human_bytes(self._sent)}"
        if self.fedavg_bytes and self._messages and self._sent:
            theirs = self.fedavg_bytes * self._messages
            sent += (
                f"; FedAvg would send {words.human_bytes(theirs)}: "
                f"{words.against_fedavg(theirs / self._sent)}"
            )
        return " · ".join([*parts, sent])

    def _left(self) -> float | None:
        """Seconds that the remaining rounds will take at the pace so far."""
        done = number(self._last.get("round"))
        if done is None or done >= self.rounds:
            return None
        pace = (time.monotonic() - self._began) / max(self._finished, 1)
        return pace * (self.rounds - done)

    def _print(self, line: Text) -> None:
        """One line, never wrapped off a terminal, in characters that the output can carry."""
        encoding = self.console.encoding or "utf-8"
        line.plain = line.plain.encode(encoding, "replace").decode(encoding)
        self.console.print(line, soft_wrap=not self._moving, highlight=False)


def fitting(width: int, wanted: tuple[Column, ...] = COLUMNS) -> tuple[Column, ...]:
    """The columns that a terminal of this width can hold; those of high rank give way first."""
    room = width - 17
    kept = list(wanted)
    while sum(column.width + 1 for column in kept) > room and any(c.rank for c in kept):
        kept.remove(max(reversed(kept), key=lambda column: column.rank))
    return tuple(kept)


def head(columns: tuple[Column, ...]) -> str:
    """The heads of the columns."""
    return "round".rjust(7) + "".join(c.head.rjust(c.width + 1) for c in columns) + "left".rjust(10)


def _attendance(row: Row) -> str:
    ok, failed = number(row.get("clients_ok")), number(row.get("clients_failed")) or 0
    return words.MISSING if ok is None else f"{ok:.0f}/{ok + failed:.0f}"


def _short(seconds: float | None) -> str:
    """A duration of at most eight characters."""
    if seconds is None or seconds < 60:
        return words.duration(seconds)
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
