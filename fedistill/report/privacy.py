"""The report's section on privacy: what is promised, how it is known, and what is not promised.

It shows the disclosure of :mod:`fedistill.privacy.disclosure`, which also lies beside the page as
``disclosure.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedistill.log import read_events
from fedistill.privacy import disclosure
from fedistill.report import shared, words
from fedistill.report.charts import NARROW, Figure
from fedistill.report.folder import Point, Run
from fedistill.report.svg import Series, line_chart
from fedistill.report.words import clean, number
from fedistill.runs import EVENTS
from fedistill.store import write_atomic

MOST_SITES = 500
"""Lines of the table at most."""
MOST_LINES = 6
"""Lines of the chart at most; of more kinds of sites the extremes are drawn."""
LONGEST_NAME = 24
EMPTY = {"", " ", words.MISSING}
AUDIT = "audit.json"
MOST_EVENTS = 5000
"""Of the log of a run, the newest are looked at."""
EXHAUSTED = "budget_exhausted"

Pairs = list[tuple[str, str]]
Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """What the page says of privacy.

    Attributes:
        promise: one sentence.
        bounded: whether anything is promised.
        plain: mechanism and promise for a reader who does not know the words.
        facts: names and values of what the promise depends on.
        figure: the loss by round against the budget, if there is one.
        columns: heads of the table of sites.
        rows: its lines.
        left_out: sites beyond the longest table.
        lists: headings with sentences under them.
        notice: what the section is not.
    """

    promise: str
    bounded: bool
    plain: list[str]
    facts: Pairs
    figure: Figure | None
    columns: tuple[str, ...]
    rows: list[Row]
    left_out: int
    lists: list[tuple[str, list[str]]]
    notice: str


def told(run: Run) -> dict[str, Any]:
    """The disclosure of a run folder."""
    measured = run.figure("client_accuracy_mean") is not None or bool(run.table("sites"))
    found = disclosure.disclosure(
        facts(run),
        exchange=shared.exchange(run),
        shared=shared.beside(run),
        measured=measured,
        baselines=[clean(name, 32) for name in run.baselines],
        repeats=len(run.repeats),
    )
    finite: dict[str, Any] = _finite(found)
    return finite


def facts(run: Run) -> Mapping[str, Any]:
    """The summary, with what stands elsewhere in the folder.

    Of a run that was cut short the settings name the mechanism; an audit leaves ``audit.json``;
    that a site's budget is spent shows where it was dropped for it.
    """
    table = dict(run.table("privacy"))
    table.setdefault("mechanism", run.mechanism)
    table["audit"] = table.get("audit") or _audit(run.path)
    known = table.get("sites")
    sites = {str(name): one for name, one in known.items()} if isinstance(known, Mapping) else {}
    for name in dropped(run):
        one = sites.get(name)
        sites[name] = {**(one if isinstance(one, Mapping) else {}), "exhausted": True}
    spent = run.figure("epsilon_max")
    return {**run.summary, "epsilon_max": spent, "privacy": {**table, "sites": sites}}


def dropped(run: Run) -> list[str]:
    """Sites that were dropped from a round because their budget is spent."""
    tables = [row["dropped"] for row in run.rounds if isinstance(row.get("dropped"), Mapping)]
    found = [name for table in tables for name, code in table.items() if code == EXHAUSTED]
    # The round in which a run gives up has no row, but an event for every site that was asked.
    told = read_events(run.path / EVENTS, last=MOST_EVENTS)
    found += [
        entry.get("site", "")
        for entry in told
        if (entry["event"], entry.get("reason")) == ("dropped", EXHAUSTED)
    ]
    return list(dict.fromkeys(map(str, found)))


def _audit(folder: Path) -> Mapping[str, Any] | None:
    """What ``fedistill audit`` wrote into the folder, if it did."""
    try:
        found = json.loads((folder / AUDIT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, Mapping) else None


def write_disclosure(run: Run, folder: Path) -> Path:
    """Write ``disclosure.json`` beside the report, and return its path.

    Raises:
        RunError: the folder cannot be written to.
    """
    path = folder / disclosure.NAME
    write_atomic(
        path, (json.dumps(told(run), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
    )
    return path


def section(run: Run) -> Section:
    """The section of a run."""
    found = told(run)
    columns, rows = table(found["sites"])
    lists = [
        ("What this rests on", found["assumptions"]),
        ("What is not protected", found["not_protected"]),
        ("Known limits", found["known_limits"]),
        ("Notes", found["notes"]),
    ]
    return Section(
        promise=promise(found),
        bounded=found["differentially_private"],
        plain=[clean(one, 600) for one in found["in_plain_words"]],
        facts=pairs(found),
        figure=figure(run, found["guarantee"]),
        columns=columns,
        rows=rows[:MOST_SITES],
        left_out=max(0, len(rows) - MOST_SITES),
        lists=[(name, [clean(one, 600) for one in said]) for name, said in lists if said],
        notice=found["notice"],
    )


def promise(found: Mapping[str, Any]) -> str:
    """One sentence: the number with its conditions, where there is one, and how it came about."""
    statement = clean(found["statement"], 300)
    if (promised := found["guarantee"]) is None:
        return statement
    number = f"ε = {words.epsilon(promised['epsilon'])} at δ = {words.delta(promised['delta'])}"
    return f"For each {clean(promised['unit'], 20)} {number}: {statement}"


def pairs(found: Mapping[str, Any]) -> Pairs:
    """What the promise depends on, by name; what is not known is left out."""
    promised, noise, run = found["guarantee"] or {}, found["noise"] or {}, found["run"]
    budget = promised.get("budget")
    spent = words.epsilon(promised["epsilon"]) if promised else ""
    shown = {
        "mechanism": found["mechanism"],
        "unit": promised.get("unit"),
        "relation": promised.get("relation"),
        "ε": f"{spent}, of a budget of {budget:.3g}" if spent and budget else spent,
        "δ": words.delta(promised["delta"]) if promised else "",
        "counted over": promised.get("over"),
        "accountant": promised.get("accountant"),
        "audit": (found["audit"] or {}).get("verdict", "none took place: run fedistill audit"),
        "noise σ": _with(noise.get("sigma"), "{:.3g}"),
        "clipping": _with(noise.get("clip_norm"), "norm {:.3g}"),
        "sampling": _with(noise.get("sample_rate"), "each by its own coin, with probability {:g}"),
        "noisy steps": _with(noise.get("steps_per_round"), "{:.0f} a round"),
        "private rounds": _with(run["private_rounds"] or None, "the first {:.0f}"),
        "randomness": noise.get("rng"),
        "rule": run["rule"],
        "purpose": run["purpose"],
    }
    return [(name, clean(text, 300)) for name, text in shown.items() if text]


def warnings(run: Run) -> list[str]:
    """What a reader must see before the numbers."""
    found = told(run)
    said = []
    if found["audit"] and not found["audit"]["passed"]:
        verdict = clean(found["audit"]["verdict"], 300)
        said.append(f"Do not rely on what is claimed of privacy. The audit: {verdict}.")
    if spent := [name for name, one in found["sites"].items() if one["exhausted"]]:
        these = ", ".join(clean(name, LONGEST_NAME) for name in spent[:6])
        said.append(
            f"The privacy budget of {words.count(len(spent), 'site')} is spent "
            f"({these}{', …' if len(spent) > 6 else ''}): there, training on own rows has stopped."
        )
    return said


# --- the loss by round ---------------------------------------------------------------------------


def figure(run: Run, promised: Mapping[str, Any] | None) -> Figure | None:
    """Epsilon of each site by round, against the budget; None where no round tells one."""
    lines = curves(run)
    if not lines:
        return None
    budget = number((promised or {}).get("budget")) or number(run.table("privacy").get("budget"))
    if budget is not None:
        level = (Point(lines[0].points[-1].x, budget),)
        lines.append(Series("budget", level, colour=6, dash=1, weight="thin", level=True))
    title = "Privacy loss by round"
    caption = (
        "ε that each site has spent of its rows until then, earlier runs on its ledger included. "
        "Rounds in which a site learns from soft targets alone cost nothing."
    )

    def draw(width: float, height: float, named: bool) -> str:
        return line_chart(
            lines,
            ident=f"epsilon-{width:g}",
            title=title,
            x_label="round",
            y_label="ε",
            x_format="{:g}".format,
            y_format=words.epsilon,
            width=width,
            height=height,
            least=0,
            zero=True,
            names_at_ends=named,
        )

    return Figure(title, caption, draw(900, 280, True), draw(NARROW, 260, False))


def curves(run: Run) -> list[Series]:
    """A line for all sites with one course, or the largest and the least where there are many.

    Sites with one plan spend alike: they share a line.
    """
    courses: dict[tuple[Point, ...], list[str]] = {}
    for name, points in _by_site(run).items():
        courses.setdefault(points, []).append(name)
    ordered = sorted(courses.items(), key=lambda item: -item[0][-1].y)
    if not ordered:
        points = run.curve("epsilon_max")
        return [Series("the site that spent most", points, weight="bold")] if points else []
    if len(ordered) > MOST_LINES:
        ordered = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
        names = ["largest", "middle", "least"]
    else:
        names = [_together(group, len(ordered) == 1) for _, group in ordered]
    return [
        Series(name, points, colour=place, weight="plain" if place else "bold")
        for place, (name, (points, _)) in enumerate(zip(names, ordered, strict=True))
    ]


def _by_site(run: Run) -> dict[str, tuple[Point, ...]]:
    found: dict[str, list[Point]] = {}
    for row in run.rounds:
        table = row.get("epsilon")
        for name, value in table.items() if isinstance(table, Mapping) else ():
            if (spent := number(value)) is not None:
                point = Point(float(row["round"]), float(f"{spent:.4g}"))
                found.setdefault(str(name), []).append(point)
    return {name: tuple(points) for name, points in found.items()}


def _together(names: Sequence[str], alone: bool) -> str:
    if len(names) == 1:
        return clean(names[0], LONGEST_NAME)
    return f"{'all ' if alone else ''}{words.count(len(names), 'site')}"


# --- the sites -----------------------------------------------------------------------------------


def table(sites: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, ...], list[Row]]:
    """Heads and lines; a column that all sites leave empty is left out."""
    mixed = len({one["mechanism"] for one in sites.values()}) > 1
    columns = [one for one in COLUMNS if mixed or one[0] != "mechanism"]
    lines = [(clean(name, 40), *(cell(one) for _, cell in columns)) for name, one in sites.items()]
    heads = ("site", *(head for head, _ in columns))
    kept = [place for place in range(len(heads)) if {line[place] for line in lines} - EMPTY]
    shown = [tuple(line[place] or words.MISSING for place in kept) for line in lines]
    return tuple(heads[place] for place in kept), shown


def _with(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _finite(value: Any) -> Any:
    """The same without numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


COLUMNS: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("ε", lambda one: words.epsilon(one["epsilon"])),
    ("budget", lambda one: _with(one["budget"], "{:.3g}")),
    ("δ", lambda one: words.delta(one["delta"])),
    ("mechanism", lambda one: clean(one["mechanism"] or "", 24)),
    ("noise σ", lambda one: _with(one["sigma"], "{:.3g}")),
    ("rate", lambda one: _with(one["rate"], "{:.3g}")),
    ("steps", lambda one: _with(one["steps"], "{:,.0f}")),
    ("charges", lambda one: _with(one["reservations"], "{:,.0f}")),
    ("releases", lambda one: _with(one["releases"], "{:,.0f}")),
    ("rows, about", lambda one: _with(one["rows"], "{:,.0f}")),
    ("remark", lambda one: "budget spent" if one["exhausted"] else " "),
)
"""What the table of sites shows, each column from a site's facts to a text."""
