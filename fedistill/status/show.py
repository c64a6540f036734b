"""A status as lines for a terminal, as a page, and as facts for other programs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fedistill.report import words
from fedistill.report.live import columns
from fedistill.report.page import fill
from fedistill.report.words import clean
from fedistill.status.folder import (
    ENDS,
    STATES,
    WELL,
    Attendance,
    RunStatus,
    SiteStatus,
    Status,
    read_status,
)


def lines(status: Status) -> list[str]:
    """The status for a terminal."""
    told = [f"{tile['name']} {tile['value']}" for tile in tiles(status)[1:]]
    shown = [headline(status), " · ".join(told)]
    if status.reason:
        shown.append(f"last trouble: {status.reason}")
    for _, head, rows in tables(status):
        widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
        shown.append("")
        shown += [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
    return [*shown, "", *remarks(status)] if remarks(status) else shown


def page(status: Status) -> str:
    """The status as a page that shows everything it holds, runs nothing and renews itself."""
    values = {
        "name": status.name,
        "headline": headline(status),
        "trouble": status.reason,
        "tiles": tiles(status),
        "tables": tables(status),
        "remarks": remarks(status),
    }
    return fill("status.html", values)


def headline(status: Status) -> str:
    """One line: who, how, and how far."""
    if isinstance(status, RunStatus):
        of = f" of {status.rounds}" if status.rounds else ""
        going = f", round {status.current} is going on" if status.current else ""
        far = f"{status.round}{of} rounds done{going}"
    else:
        far = f"answered round {status.round}" if status.round else "no round answered yet"
    why = "" if status.state in WELL else f" ({STATES[status.state]})"
    return f"{status.name}: {status.state}{why} · {far}"


def tiles(status: Status) -> list[dict[str, Any]]:
    """The figures at the top, the state first."""
    shown = [
        ("state", status.state, STATES[status.state]),
        ("accuracy", words.percent(status.accuracy), "student, last round"),
        ("up", words.human_bytes(status.bytes_up), "bytes of uploads so far"),
        ("down", words.human_bytes(status.bytes_down), "bytes of plans so far"),
        ("time", words.duration(status.seconds or None), "of all rounds so far"),
        ("last event", ago(status.idle), "as this page was made"),
    ]
    if isinstance(status, RunStatus):
        last = status.recent[-1] if status.recent else {}
        if status.accuracy is None and last.get("client_accuracy_mean") is not None:
            # Methods that exchange tables have no student.
            mean = words.percent(last["client_accuracy_mean"])
            shown[1] = ("accuracy", mean, "clients' mean, last round")
        present = f"{status.answering}/{len(status.sites)}"
        shown.insert(1, ("sites", present, "answered when last asked"))
    else:
        shown[1] = ("accuracy", words.percent(status.accuracy), "of this site's own model")
        shown[4] = ("time", words.duration(status.seconds or None), "of all steps so far")
    if told := _privacy(status):
        shown.insert(-1, told)
    bad = status.state not in WELL
    return [
        {"name": name, "value": value, "context": context, "bad": bad and name == "state"}
        for name, value, context in shown
    ]


def _privacy(status: Status) -> tuple[str, str, str] | None:
    """What was spent of the privacy budget; None where nobody keeps one."""
    if isinstance(status, SiteStatus):
        if status.epsilon is None and not status.exhausted:
            return None
        of = f" of {status.limit:.3g}" if status.limit else ""
        word = "the budget is spent" if status.exhausted else "of this site's rows, ever"
        return "epsilon", f"{words.epsilon(status.epsilon)}{of}", word
    assert isinstance(status, RunStatus)
    known = [site.epsilon for site in status.sites if site.epsilon is not None]
    if not known:
        return None
    out = sum(site.exhausted for site in status.sites)
    word = f"; the budget of {words.count(out, 'site')} is spent" if out else ""
    return "epsilon", words.epsilon(max(known)), f"of the site that spent most{word}"


def ago(seconds: float | None) -> str:
    """``12 s ago``; a dash for never."""
    return words.MISSING if seconds is None else f"{words.duration(seconds)} ago"


class Table(NamedTuple):
    """Texts in rows, under their heads."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(status: Status) -> list[Table]:
    """The sites and the last rounds, or at a site its own rounds."""
    found = [_sites(status), _rounds(status)] if isinstance(status, RunStatus) else [_steps(status)]
    return [table for table in found if table.rows]


def _sites(status: RunStatus) -> Table:
    private = _private(status)
    rows: list[tuple[str, ...]] = [
        (
            clean(site.site, 32),
            words.MISSING if site.answered is None else f"round {site.answered}",
            str(site.missed),
            words.human_bytes(site.bytes_up),
            words.duration(site.seconds),
            *((_spent(site),) if private else ()),
            site.reason or words.MISSING,
        )
        for site in status.sites
    ]
    head = ("site", "answered", "missed", "up", "took", *(("epsilon",) if private else ()))
    return Table("Sites", (*head, "last drop"), rows)


def _private(status: RunStatus) -> bool:
    return any(site.epsilon is not None or site.exhausted for site in status.sites)


def _spent(site: Attendance) -> str:
    return words.epsilon(site.epsilon) + (", budget spent" if site.exhausted else "")


def _rounds(status: RunStatus) -> Table:
    shown = columns(private=any(row.get("epsilon_max") is not None for row in status.recent))
    rows: list[tuple[str, ...]] = [
        (str(row["round"]), *(column.text(row) for column in shown)) for row in status.recent
    ]
    return Table("Rounds", ("round", *(column.head for column in shown)), rows)


def _steps(status: Status) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            str(row["round"]),
            words.percent(row["accuracy"]),
            words.human_bytes(row["bytes_up"]),
            words.duration(row["seconds"]),
        )
        for row in (status.recent if isinstance(status, SiteStatus) else ())
    ]
    return Table("Rounds", ("round", "accuracy", "up", "took"), rows)


def remarks(status: Status) -> list[str]:
    """What a reader must know about these figures."""
    if isinstance(status, RunStatus) and status.cut:
        return ["The oldest events are gone: figures by site count from the first that is left."]
    return []


def health(status: Status) -> dict[str, Any]:
    """The status for a supervisor."""
    found = {
        "status": "ok" if status.state in WELL else "failing",
        "state": status.state,
        "round": status.round,
        "seconds_since_last_event": None if status.idle is None else round(status.idle, 1),
    }
    if isinstance(status, RunStatus):
        return found | {"rounds": status.rounds, "sites_answering": status.answering}
    return found | {"site": status.name}


def facts(status: Status) -> dict[str, Any]:
    """Everything, for other programs."""
    kind = "run" if isinstance(status, RunStatus) else "site"
    return {"kind": kind, **dataclasses.asdict(status), "health": health(status)}


def watch(folder: str | Path, show: Callable[[Status], None], pause: float = 2.0) -> None:
    """Show the status again and again, until the run has ended or Ctrl-C.

    Raises:
        RunError: the folder is neither a run's nor a site's.
    """
    try:
        while True:
            status = read_status(folder)
            show(status)
            if status.state in ENDS.values() and isinstance(status, RunStatus):
                return
            time.sleep(pause)
    except KeyboardInterrupt:
        return
