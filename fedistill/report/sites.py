"""The table of sites: what each had before, what it has after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedistill.report import simulated, words
from fedistill.report.bars import sparkline
from fedistill.report.folder import Run
from fedistill.report.words import clean, number

ORDER = (
    "local",
    "first round",
    "client",
    "student",
    "left-out student",
    "best single other",
    "mean single other",
    "fedavg",
    "without privacy",
    "centralised",
)
"""Columns in the order of reading; others follow."""
MEANING: Mapping[str, str] = {
    "local": "alone, with as much training",
    "first round": "own rows only",
    "client": "its model at the end",
    "student": "the server's model",
    "left-out student": "a student taught without this site",
    "best single other": "the best other site's model",
    "mean single other": "the other sites' models, their mean",
    "fedavg": "weights averaged",
    "without privacy": "the server's model of the same run, no noise",
    "centralised": "all rows in one place",
}
TONES = ("loss", "gain")
MOST = 500
"""Rows shown at most."""


@dataclass(frozen=True)
class Cell:
    """One figure: text, deviation, difference to the reference column, whether it is the best."""

    text: str
    spread: str = ""
    change: str = ""
    tone: str = ""
    best: bool = False


@dataclass(frozen=True)
class SiteRow:
    """One site's line."""

    name: str
    about: str
    spark: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class SiteTable:
    """One metric for all sites.

    Attributes:
        title: the metric.
        columns: names and meanings of the figures.
        reference: the column that differences refer to, or an empty text.
        rows: the sites.
        mean: the mean over sites, a cell per column.
        sentence: how many sites gained.
        left_out: sites beyond the longest table.
        unit: what a difference is counted in.
        sparks: whether any site has a curve.
    """

    title: str
    columns: tuple[tuple[str, str], ...]
    reference: str
    rows: tuple[SiteRow, ...]
    mean: tuple[Cell, ...]
    sentence: str
    left_out: int
    unit: str
    sparks: bool


def site_tables(run: Run) -> list[SiteTable]:
    """Accuracy, and AUC where any site has one; empty when the run tells nothing about sites."""
    table = run.table("sites")
    sites = {str(key): site for key, site in table.items() if isinstance(site, Mapping)}
    if not sites:
        return []
    for name in simulated.bad(run):
        if name in sites:
            sites[name] = {**sites[name], "bad": True}
    sparks = _sparks(run, list(sites))
    shown = [*METRICS, CALIBRATION] if _speaks_of_privacy(run) else METRICS
    tables = [_table(metric, sites, sparks if metric is METRICS[0] else {}) for metric in shown]
    return [table for table in tables if table.columns]


@dataclass(frozen=True)
class Metric:
    """What a table is of.

    Attributes:
        title: of the table.
        key: of the figure.
        form: how it is written.
        scale: from the figure to the unit.
        digits: after the point.
        unit: what a difference is counted in.
        lower: whether less is better.
    """

    title: str
    key: str
    form: Callable[[float | None], str]
    scale: float
    digits: int
    unit: str
    lower: bool = False


METRICS = (
    Metric("Accuracy", "accuracy", words.percent, 100, 1, "percentage points"),
    Metric("AUC", "auc", words.share, 1, 3, "AUC"),
)
CALIBRATION = Metric(
    "Calibration error",
    "calibration_error",
    words.percent,
    100,
    1,
    "percentage points (less is better)",
    lower=True,
)
"""How far confidence is from accuracy: noise can spoil it where accuracy is kept."""


def _speaks_of_privacy(run: Run) -> bool:
    table = run.table("privacy")
    return table.get("private") is True


def _table(
    metric: Metric, sites: Mapping[str, Mapping[str, Any]], sparks: Mapping[str, str]
) -> SiteTable:
    figures = {name: _figures(site, metric.key) for name, site in sites.items()}
    columns = _columns(figures.values())
    reference = next((name for name in ("local", "first round") if name in columns), "")
    rows = []
    for name in list(sites)[:MOST]:
        site, found = sites[name], figures[name]
        cells = _cells(found, columns, reference, metric)
        about = _about(site) if metric is METRICS[0] else ""
        rows.append(SiteRow(clean(name, 40), about, sparks.get(name, ""), cells))
    means: Figures = {
        column: (sum(values) / len(values), None)
        for column in columns
        if (values := [f[column][0] for f in figures.values() if column in f])
        and len(values) == len(figures)
    }
    return SiteTable(
        title=metric.title,
        columns=tuple((clean(c, 32), MEANING.get(c, "")) for c in columns),
        reference=reference,
        rows=tuple(rows),
        sentence=_sentence(figures, reference, lower=metric.lower),
        unit=metric.unit,
        mean=_cells(means, columns, reference, metric),
        sparks=any(row.spark for row in rows),
        left_out=max(0, len(sites) - MOST),
    )


Figures = dict[str, tuple[float, float | None]]


def _figures(site: Mapping[str, Any], metric: str) -> Figures:
    table = site.get("figures")
    found: Figures = {}
    for column, values in table.items() if isinstance(table, Mapping) else ():
        if isinstance(values, Mapping) and (value := number(values.get(metric))) is not None:
            found[str(column)] = (value, number(values.get(f"{metric}_sd")))
    return found


def _columns(figures: Iterable[Figures]) -> tuple[str, ...]:
    present = dict.fromkeys(column for found in figures for column in found)
    known = [column for column in ORDER if column in present]
    return (*known, *(column for column in present if column not in ORDER))


def _cells(
    found: Figures, columns: Sequence[str], reference: str, metric: Metric
) -> tuple[Cell, ...]:
    scale, digits = metric.scale, metric.digits
    shown = {column: round(value * scale, digits) for column, (value, _) in found.items()}
    top = (min if metric.lower else max)(shown.values(), default=0.0)
    mark = len(shown) > 1 and any(value != top for value in shown.values())
    base = found.get(reference)
    cells = []
    for column in columns:
        if column not in found:
            cells.append(Cell(words.MISSING))
            continue
        value, sd = found[column]
        change = tone = ""
        if base is not None and column != reference:
            change = words.signed(scale * (value - base[0]), digits)
            gain = words.MINUS if metric.lower else "+"
            tone = "" if change[0] not in {"+", words.MINUS} else TONES[change[0] == gain]
        spread = "" if sd is None else f"± {scale * sd:.{digits}f}"
        cells.append(Cell(metric.form(value), spread, change, tone, mark and shown[column] == top))
    return tuple(cells)


def _sentence(figures: Mapping[str, Figures], reference: str, *, lower: bool = False) -> str:
    """How many sites have a better model at the end than they would have had."""
    pairs = [
        (f["client"][0], f[reference][0])
        for f in figures.values()
        if "client" in f and reference in f
    ]
    if not pairs:
        return ""
    sign = -1 if lower else 1
    better = sum(round(sign * (after - before), 3) > 0 for after, before in pairs)
    worse = sum(round(sign * (after - before), 3) < 0 for after, before in pairs)
    what = "training alone" if reference == "local" else "their first round"
    return (
        f"Compared with {what}, {better} of {words.count(len(pairs), 'site')} ended better, "
        f"{worse} worse."
    )


def _sparks(run: Run, names: Sequence[str]) -> dict[str, str]:
    """Each site's accuracy over the rounds, all on one scale."""
    curves = {
        name: [
            value
            for row in run.rounds
            if isinstance(row.get("client_accuracy"), Mapping)
            and (value := number(row["client_accuracy"].get(name))) is not None
        ]
        for name in names[:MOST]
    }
    values = [value for curve in curves.values() for value in curve]
    if not values:
        return {}
    low, high = min(values), max(values)
    return {
        name: sparkline(curve, low, high, f"from {curve[0]:.1%} to {curve[-1]:.1%}")
        for name, curve in curves.items()
        if curve
    }


def _about(site: Mapping[str, Any]) -> str:
    """Rows, model and classes of a site in a few words."""
    rows, seen = number(site.get("rows")), number(site.get("classes_seen"))
    parts = [
        words.count(int(rows), "row") if rows is not None else "",
        clean(site.get("model") or "", 32),
        f"{seen:.0f} {'class' if seen == 1 else 'classes'}" if seen is not None else "",
        "made bad: what its model can do, not what it says" if site.get("bad") is True else "",
    ]
    return " · ".join(part for part in parts if part)
