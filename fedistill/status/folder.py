"""A run folder or a site folder, read while the run is on: how it stands."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedistill.errors import RunError
from fedistill.log import Event, read_events
from fedistill.report.words import clean, number
from fedistill.settings import DeploymentSettings, SiteSettings
from fedistill.status import budget, files

STATES: Mapping[str, str] = {
    "waiting": "no round has begun",
    "running": "rounds are going on",
    "stalled": "not ended, and silent for too long",
    "done": "the last round is done",
    "failed": "it gave up",
    "interrupted": "it was stopped, and can be resumed",
}
"""Every state, with what it means."""
WELL = ("waiting", "running", "done")
"""The states in which nobody needs to look."""

LAST_EVENTS = 50_000
"""Events that are read: a run of 100 sites and 500 rounds."""
RECENT = 12
"""Rounds that are shown one by one."""
SILENCE = 120.0
"""Seconds without an event, beside the deadline, that are never yet a stall."""
PATIENCE = 3
"""Plans a site may refuse in a row before somebody should look."""
BEGINS = ("run_started", "run_resumed")
ENDS = {"run_done": "done", "run_failed": "failed", "run_interrupted": "interrupted"}
WRITTEN = ("events.jsonl", "rounds.jsonl", "config.toml")
"""What tells when a run was last heard of, the best first."""
Clock = Callable[[], float]
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a coordinator's and a site's folder have in common.

    Attributes:
        name: the folder's, or the site's id.
        state: one of :data:`STATES`.
        run: the run's name, as in its messages.
        round: the last round that is done; at a site, the last one it answered.
        accuracy: the student's after that round; at a site, its own.
        bytes_up: bytes of uploads so far.
        bytes_down: bytes of plans so far.
        seconds: time that rounds, or a site's steps, have taken so far.
        idle: seconds since the last event; None if there is none.
        reason: why it failed, or what a site last refused.
    """

    name: str
    state: str
    run: str = ""
    round: int = 0
    accuracy: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    idle: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Attendance:
    """One site as the coordinator sees it.

    Attributes:
        site: its id.
        answered: the last round it answered, or None.
        missed: rounds missed in a row, among those it was asked in.
        reason: why its last missing upload was missing, with the round; or an empty text.
        bytes_up: bytes of its uploads so far.
        seconds: what its last answer took.
        epsilon: privacy loss it told last; None without a mechanism.
        exhausted: whether its privacy budget is spent.
    """

    site: str
    answered: int | None = None
    missed: int = 0
    reason: str = ""
    bytes_up: int = 0
    seconds: float | None = None
    epsilon: float | None = None
    exhausted: bool = False


@dataclass(frozen=True, kw_only=True)
class RunStatus(Status):
    """A run as its coordinator sees it.

    Attributes:
        rounds: how many there will be, or None.
        current: the round that is going on, or None.
        method: the name of the method.
        recent: the last rounds, as in ``rounds.jsonl``.
        sites: every enrolled site.
        cut: whether older events are missing, so that figures by site are too small.
    """

    rounds: int | None = None
    current: int | None = None
    method: str = ""
    recent: tuple[Row, ...] = ()
    sites: tuple[Attendance, ...] = ()
    cut: bool = False

    @property
    def answering(self) -> int:
        """Sites that answered the last round they were asked in."""
        return sum(site.answered is not None and not site.missed for site in self.sites)


@dataclass(frozen=True, kw_only=True)
class SiteStatus(Status):
    """A site as it sees itself.

    Attributes:
        recent: the last rounds answered: round, accuracy (or None), bytes_up, seconds.
        epsilon: privacy loss of its rows, earlier runs included; None without a mechanism.
        limit: the most it may be, where that is known.
        exhausted: whether the last request would have cost more than is left.
    """

    recent: tuple[Row, ...] = ()
    epsilon: float | None = None
    limit: float | None = None
    exhausted: bool = False


def read_status(folder: str | Path, *, now: Clock = time.time) -> Status:
    """The status of a run folder or of a site folder.

    Raises:
        RunError: the folder is neither, or cannot be read.
    """
    home = Path(folder)
    try:
        found = {entry.name for entry in home.iterdir()} if home.is_dir() else set()
        if "site.toml" in found:
            return _site(home, now)
        if found & {"config.toml", "rounds.jsonl", "events.jsonl"}:
            return _run(_running(home, found), now)
        what = (
            "a file" if home.is_file() else "another folder" if home.is_dir() else "nothing there"
        )
    except OSError as error:
        what = f"one that cannot be read ({error.strerror})"
    raise RunError(
        f"expected a run folder (config.toml) or a site folder (site.toml), found {what}: "
        f"{clean(home, 200)}; name the folder of 'fedistill run --out', or a site's own"
    )


def _running(home: Path, found: set[str]) -> Path:
    """Of a run with several seeds the one that is going on, until all are done."""
    seeds = [home / name for name in found if name.startswith("seed-")]
    if not seeds or found & {"rounds.jsonl", "events.jsonl"}:
        return home
    return max(seeds, key=lambda seed: (_changed(*(seed / name for name in WRITTEN)) or 0, seed))


# --- a run ---------------------------------------------------------------------------------------


def _run(home: Path, now: Clock) -> RunStatus:
    config = files.toml(home / "config.toml")
    summary = files.table(files.text(home / "summary.json"))
    rounds = files.text(home / "rounds.jsonl").splitlines()
    rows = [row for line in rounds if (row := _row(line))]
    every = read_events(home / "events.jsonl", LAST_EVENTS)
    begun = next((entry for entry in reversed(every) if entry["event"] in BEGINS), None)
    name = (begun or (every[-1] if every else {})).get("run")
    events = [entry for entry in every if entry.get("run") == name]
    done = int(rows[-1]["round"]) if rows else 0
    started = [_whole(entry.get("round")) for entry in events if entry["event"] == "round_started"]
    heard = _time(events[-1]) if events else _changed(*(home / name for name in WRITTEN))
    idle = None if heard is None else max(0.0, now() - heard)
    ended, reason = _ending(home, events, summary)
    slowest = max((number(row.get("seconds")) or 0 for row in rows), default=0)
    current = started[-1] if started and started[-1] > done and not ended else None
    state = ended or ("running" if rows or started else "waiting")
    if (
        state == "running"
        and idle is not None
        and idle > _patience(_deadline(config) or 0, slowest)
    ):
        state = "stalled"
    return RunStatus(
        name=clean(home.resolve().name),
        state=state,
        run=clean(name or ""),
        round=done,
        rounds=_whole(config.get("rounds")) or _whole((begun or {}).get("rounds")) or None,
        current=current,
        method=clean((begun or summary).get("method") or ""),
        accuracy=number(rows[-1].get("student_accuracy")) if rows else None,
        bytes_up=sum(_whole(row.get("bytes_up")) for row in rows),
        bytes_down=sum(_whole(row.get("bytes_down")) for row in rows),
        seconds=round(sum(number(row.get("seconds")) or 0 for row in rows) + 0.0, 3),
        idle=idle,
        reason=reason,
        recent=tuple(rows[-RECENT:]),
        sites=_attendance(events, budget.told(rounds)),
        cut=bool(events) and all(entry["event"] != "run_started" for entry in events),
    )


def _ending(home: Path, events: Sequence[Event], summary: Row) -> tuple[str, str]:
    """How the run ended, and why; empty while it goes on.

    The last word of the events counts, unless the summary is newer: a full disk may have lost
    the event, and a run without events has a summary all the same.
    """
    last = next((one for one in reversed(events) if one["event"] in {*BEGINS, *ENDS}), None)
    if last and last["event"] in ENDS:
        return ENDS[last["event"]], clean(last.get("reason") or "")
    state, _, reason = str(summary.get("status") or "").partition(":")
    begun = _time(last) if last else None
    written = _changed(home / "summary.json")
    newer = begun is None or (written is not None and written > begun)
    return (state, clean(reason)) if state in ENDS.values() and newer else ("", "")


def _deadline(config: Row) -> float | None:
    """Seconds that a site has to answer, where the settings say so."""
    deployment = config.get("deployment")
    return number(deployment.get("deadline")) if isinstance(deployment, Mapping) else None


def _patience(deadline: float, slowest: float) -> float:
    """Seconds of silence that are still in order."""
    return max(2 * slowest, SILENCE + deadline)


def _attendance(events: Sequence[Event], spent: Mapping[str, float]) -> tuple[Attendance, ...]:
    """Every enrolled site, from the events of a run in their order, and what it has spent."""
    asked: dict[int, set[str]] = {}
    came: dict[int, set[str]] = {}
    lost: dict[int, set[str]] = {}
    closed: set[int] = set()
    enrolled: list[str] = []
    facts: dict[str, dict[str, Any]] = {}
    for entry in events:
        kind, place, site = entry["event"], _whole(entry.get("round")), clean(entry.get("site", ""))
        if kind in BEGINS:
            enrolled = _names(entry.get("sites")) or enrolled
        elif kind == "round_started":
            asked.setdefault(place, set()).update(_names(entry.get("asked")))
        elif kind == "round_done":
            closed.add(place)
        elif kind == "answered":
            came.setdefault(place, set()).add(site)
            found = facts.setdefault(site, {})
            found["bytes_up"] = found.get("bytes_up", 0) + _whole(entry.get("bytes_up"))
            took = number(entry.get("seconds"))
            found |= {"answered": place, "seconds": took, "exhausted": False}
        elif kind == "dropped":
            lost.setdefault(place, set()).add(site)
            why = clean(entry.get("reason") or "unknown", 40)
            told = {"reason": f"{why} (round {place})", "exhausted": why == budget.EXHAUSTED}
            facts.setdefault(site, {}).update(told)
    # A sender that is not enrolled may call itself anything, and gets no line of its own.
    names = enrolled or sorted(set().union(*asked.values(), *came.values(), *lost.values()))
    return tuple(
        Attendance(
            site=name,
            missed=_missed(name, asked, came, lost, closed),
            epsilon=spent.get(name),
            **facts.get(name, {}),
        )
        for name in names
    )


def _missed(
    name: str,
    asked: Mapping[int, set[str]],
    came: Mapping[int, set[str]],
    lost: Mapping[int, set[str]],
    closed: set[int],
) -> int:
    """Rounds in a row without an answer; one that is going on counts once it is lost."""
    missed = 0
    for place in sorted(asked, reverse=True):
        if name in came.get(place, ()):
            break
        missed += name in lost.get(place, ()) or (place in closed and name in asked[place])
    return missed


# --- a site --------------------------------------------------------------------------------------


def _site(home: Path, now: Clock) -> SiteStatus:
    settings = files.toml(home / "site.toml")
    every = read_events(home / "state" / "events.jsonl", LAST_EVENTS)
    run = next((entry["run"] for entry in reversed(every) if entry.get("run")), None)
    events = [entry for entry in every if entry.get("run") in {run, None}]
    told = [entry for entry in events if entry["event"].startswith("step_")]
    bad = [entry for entry in told if entry["event"] != "step_done"]
    steps = _steps(events)
    idle = max(0.0, now() - _time(events[-1])) if events else None
    accuracies = [step["accuracy"] for step in steps if step["accuracy"] is not None]
    return SiteStatus(
        name=_site_id(settings, every) or clean(home.resolve().name),
        state=_site_state(events, told, idle or 0, _allowed(home, settings, steps)),
        run=clean(run or ""),
        round=steps[-1]["round"] if steps else 0,
        accuracy=accuracies[-1] if accuracies else None,
        bytes_up=sum(_whole(entry.get("bytes_up")) for entry in told),
        bytes_down=sum(_whole(entry.get("bytes_down")) for entry in events),
        seconds=round(sum(number(entry.get("seconds")) or 0 for entry in told) + 0.0, 3),
        idle=idle,
        reason=_trouble(bad[-1]) if bad else "",
        recent=tuple(steps[-RECENT:]),
        **budget.account(home / "state"),
    )


def _steps(events: Sequence[Event]) -> list[Row]:
    """The rounds that a site answered, in order; one that was sent again counts once."""
    steps: dict[int, dict[str, Any]] = {}
    accuracies: dict[int, float | None] = {}
    for entry in events:
        place = _whole(entry.get("round"))
        if number(entry.get("accuracy")) is not None:
            accuracies[place] = number(entry.get("accuracy"))
        if entry["event"] == "step_done":
            known = steps.setdefault(place, {"round": place})
            known["bytes_up"] = _whole(entry.get("bytes_up"))
            known.setdefault("seconds", number(entry.get("seconds")))
    return [steps[place] | {"accuracy": accuracies.get(place)} for place in sorted(steps)]


def _allowed(home: Path, settings: Row, steps: Sequence[Row]) -> float:
    """Seconds that a step may take, by the deadline that all sites agreed on."""
    name = settings.get("federation")
    agreed = files.toml(home / (name if isinstance(name, str) else SiteSettings().federation))
    slowest = max((step["seconds"] or 0 for step in steps), default=0)
    return _patience(_deadline(agreed) or DeploymentSettings().deadline, slowest)


def _site_state(events: Sequence[Event], told: Sequence[Event], idle: float, allowed: float) -> str:
    """``failed`` after a broken step or three refusals in a row, ``stalled`` in a long step."""
    if all(entry["event"] != "plan_received" for entry in events) and not told:
        return "waiting"
    if events[-1]["event"] == "plan_received" and idle > allowed:
        return "stalled"
    refused = [
        entry["event"] == "step_refused" and entry.get("reason") != budget.EXHAUSTED
        for entry in told[-PATIENCE:]
    ]
    broken = bool(told) and told[-1]["event"] == "step_failed"
    return "failed" if broken or (len(refused) == PATIENCE and all(refused)) else "running"


def _trouble(entry: Event) -> str:
    code = clean(entry.get("reason") or entry.get("kind") or "unknown", 40)
    word = "refused" if entry["event"] == "step_refused" else "failed"
    return f"round {_whole(entry.get('round'))} {word}: {code}"


def _site_id(settings: Row, events: Sequence[Event]) -> str:
    """The id that the site's settings give, else the one in its events."""
    logged = next((entry["site"] for entry in reversed(events) if entry.get("site")), "")
    return clean(settings.get("id") or logged)


# --- reading -------------------------------------------------------------------------------------


def _row(line: str) -> Row | None:
    """A line of ``rounds.jsonl`` without what is not shown; None if it is torn."""
    row = files.table(line)
    if type(row.get("round")) is not int:
        return None
    shown = (
        "student_accuracy",
        "client_accuracy_mean",
        "client_accuracy_min",
        "agreement",
        "bytes_up",
        "bytes_down",
        "clients_ok",
        "clients_failed",
        "epsilon_max",
        "seconds",
    )
    return {"round": row["round"]} | {key: number(row.get(key)) for key in shown}


def _whole(value: object) -> int:
    return int(number(value) or 0)


def _names(value: object) -> list[str]:
    return [clean(name) for name in value] if isinstance(value, list) else []


def _time(entry: Event) -> float:
    try:
        return datetime.fromisoformat(entry["time"]).timestamp()
    except ValueError:
        return 0.0


def _changed(*paths: Path) -> float | None:
    """When the first of these files that exists was written."""
    for path in paths:
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return None
