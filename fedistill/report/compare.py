"""Several runs side by side, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from fedistill.errors import RunError
from fedistill.report import charts, headline, shared, simulated, words
from fedistill.report.charts import Figure
from fedistill.report.folder import Point, Run, read_run
from fedistill.report.page import fill, write
from fedistill.report.svg import COLOURS, DASHES, Series, line_chart
from fedistill.report.words import clean, number

SIDE_BY_SIDE = 4
"""Up to so many runs stand as columns in the terminal; more stand as rows."""


@dataclass(frozen=True)
class Entry:
    """One value of one run, and whether it is the best of its line."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One thing that is compared, with an entry per run."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def same(self) -> bool:
        """Whether all runs have the same."""
        return len({entry.text for entry in self.entries}) == 1


@dataclass(frozen=True)
class Comparison:
    """Runs, their labels, the lines of the table, and what makes a comparison unfair."""

    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    lines: tuple[Line, ...]
    cautions: tuple[str, ...]

    def render(self) -> Table:
        """The table for a terminal."""
        return render(self)

    @property
    def wide(self) -> bool:
        """Whether runs stand as rows, being too many for columns."""
        return len(self.runs) > SIDE_BY_SIDE

    @property
    def shown(self) -> tuple[Line, ...]:
        """The lines of the table; of many runs only those that differ."""
        return tuple(line for line in self.lines if not (self.wide and line.same))

    @property
    def shared(self) -> str:
        """What many runs have in common, in one sentence; else empty."""
        same = [f"{line.name} {line.entries[0].text}" for line in self.lines if line.same]
        return f"The same in all runs: {'; '.join(same)}." if self.wide and same else ""


def compare(paths: Sequence[str | Path]) -> Comparison:
    """Read the runs and lay them side by side.

    Raises:
        RunError: no paths, or one of them is no run.
    """
    if not paths:
        raise RunError("expected at least one run folder, found none: name the folders to compare")
    runs = tuple(read_run(path) for path in paths)
    lines = [
        _words("method", [run.method for run in runs]),
        _words("shared", _exchanged(runs)),
        _words("bad sites", _unless_none([simulated.attack(run) for run in runs])),
        _words("losses", _unless_none([simulated.losses(run) for run in runs])),
        _words("split", [split(run) for run in runs]),
        _words("sites", [_sites(run) for run in runs]),
        _words("seed", [_seeds(run) for run in runs]),
        _line(
            "student",
            runs,
            lambda run: run.figure("student_accuracy"),
            words.percent,
            sd="student_accuracy",
            digits=3,
        ),
        _line(
            "student AUC",
            runs,
            lambda run: run.figure("student_auc"),
            words.share,
            sd="student_auc",
            digits=3,
        ),
        _line(
            "clients, mean",
            runs,
            lambda run: run.figure("client_accuracy_mean"),
            words.percent,
            sd="client_accuracy_mean",
            digits=3,
        ),
        _line(
            "clients, least",
            runs,
            lambda run: run.figure("client_accuracy_min"),
            words.percent,
            sd="client_accuracy_min",
            digits=3,
        ),
        _streams(runs, "stream average", "average_accuracy"),
        _streams(runs, "prequential", "prequential"),
        _words("rounds", [f"{len(run.rounds):,}" for run in runs]),
        _line(
            "up, client-round",
            runs,
            lambda run: run.figure("bytes_up_per_client_round"),
            words.human_bytes,
            lowest=True,
            digits=0,
        ),
        _line(
            "down, client-round",
            runs,
            lambda run: run.figure("bytes_down_per_client_round"),
            words.human_bytes,
            lowest=True,
            digits=0,
        ),
        _line(
            "saving vs FedAvg", runs, lambda run: headline.savings(run).total, words.times, digits=2
        ),
        _words("privacy", [headline.epsilon(run) for run in runs]),
        _line(
            "time",
            runs,
            lambda run: run.total("seconds") or None,
            words.duration,
            lowest=True,
            digits=1,
        ),
    ]
    kept = tuple(line for line in lines if any(e.text != words.MISSING for e in line.entries))
    return Comparison(runs, _labels(runs), kept, tuple(_cautions(runs)))


def render(comparison: Comparison) -> Table:
    """The table for a terminal: few runs as columns, many as rows."""
    gap = 1 if comparison.wide else 2
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, gap, 0, 0))
    labels = [Text(label, style="bold") for label in comparison.labels]
    lines = comparison.shown
    if not comparison.wide:
        table.add_column("")
        for label in labels:
            table.add_column(label, justify="right", overflow="fold")
        for line in lines:
            table.add_row(Text(line.name, style="dim"), *map(_mark, line.entries))
    else:
        table.add_column("run", overflow="fold", min_width=12)
        for line in lines:
            table.add_column(Text(line.name), justify="right", overflow="fold")
        for place, label in enumerate(labels):
            table.add_row(label, *(_mark(line.entries[place]) for line in lines))
    marked = any(entry.best for line in lines for entry in line.entries)
    said = ["● best"] if marked else []
    said += [comparison.shared] if comparison.shared else []
    said += comparison.cautions
    if said:
        table.caption = Text("\n" + "\n".join(said))
        table.caption_style = "dim"
        table.caption_justify = "left"
    return table


def write_comparison(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Write the comparison as a self-contained page to the file ``out`` and return its path.

    Raises:
        RunError: one of the paths is no run, or the page cannot be written.
    """
    comparison = compare(paths)
    content = fill(
        "compare.html",
        {
            "safe": Markup,
            "name": "comparison",
            "labels": comparison.labels,
            "lines": comparison.shown,
            "wide": comparison.wide,
            "shared": comparison.shared,
            "cautions": comparison.cautions,
            "streams": any(run.table("stream") for run in comparison.runs),
            "figures": figures(comparison),
        },
    )
    return write(Path(out), content)


def figures(comparison: Comparison) -> list[Figure]:
    """Accuracy by round, and by bytes sent until then: the students', else the clients' mean."""
    by_round, by_bytes = [], []
    for place, (run, label) in enumerate(zip(comparison.runs, comparison.labels, strict=True)):
        points = run.curve("student_accuracy") or run.curve("client_accuracy_mean")
        sent = {point.x: point.y for point in charts.cumulative(run)}
        one = Series(
            clean(label, 28), points, colour=place % COLOURS, dash=place // COLOURS % len(DASHES)
        )
        by_round.append(one)
        by_bytes.append(
            replace(one, points=tuple(Point(sent[p.x], p.y, p.sd) for p in points if sent.get(p.x)))
        )
    students = any(run.curve("student_accuracy") for run in comparison.runs)
    who = "student (of the clients, where there is none)" if students else "clients, on average"
    drawn = [
        charts.both(
            "rounds",
            "Accuracy by round",
            f"Accuracy of the {who}. A run whose line ends early had fewer rounds.",
            by_round,
            "correct",
            words.percent,
        ),
        _by_bytes(by_bytes),
    ]
    return [figure for figure in drawn if figure.wide]


def split(run: Run) -> str:
    """How the rows were dealt, in a few words."""
    clients = run.setting("clients")
    table = clients if isinstance(clients, dict) else {}
    kind = clean(table.get("partition") or "", 24)
    detail = {
        "dirichlet": f"α={clean(table.get('alpha'), 8)}",
        "shards": f"{clean(table.get('classes_per_client'), 8)} each",
        "by-column": clean(table.get("column") or "", 24),
        "file": clean(table.get("partition_key") or "", 24),
    }.get(kind, "")
    return f"{kind} {detail}".strip()


def _by_bytes(series: list[Series]) -> Figure:
    title = "Accuracy by bytes sent"

    def draw(width: float, height: float, named: bool) -> str:
        return line_chart(
            series,
            ident=f"sent-{width:g}",
            title=title,
            y_label="correct",
            log_x=True,
            x_label="bytes sent so far, all clients, both ways (logarithmic)",
            least=0,
            most=1,
            x_format=words.round_bytes,
            y_format=words.percent,
            width=width,
            height=height,
            names_at_ends=named,
        )

    caption = "Further left is cheaper, further up is better."
    return Figure(title, caption, draw(900, 340, True), draw(charts.NARROW, 300, False))


def _words(name: str, texts: Sequence[str]) -> Line:
    return Line(name, tuple(Entry(text or words.MISSING) for text in texts))


def _line(
    name: str,
    runs: Sequence[Run],
    value: Callable[[Run], float | None],
    form: Callable[..., str],
    *,
    digits: int,
    lowest: bool = False,
    sd: str = "",
) -> Line:
    """A line of figures; the best are marked where they are known of several and not all equal.

    Having sent nothing is no merit: zero is never the lowest.
    """
    found = [value(run) for run in runs]
    known = [round(v, digits) for v in found if v or (v is not None and not lowest)]
    best = (min if lowest else max)(known, default=None)
    marked = len(known) > 1 and any(v != best for v in known)
    spreads = [number(run.summary.get(f"{sd}_sd")) if sd else None for run in runs]
    texts = [form(v) if s is None else form(v, s) for v, s in zip(found, spreads, strict=True)]
    return Line(
        name,
        tuple(
            Entry(text, marked and v is not None and round(v, digits) == best)
            for text, v in zip(texts, found, strict=True)
        ),
    )


def _streams(runs: Sequence[Run], name: str, key: str) -> Line:
    """A line of the figures that only a run on a stream has."""
    return _line(
        name, runs, lambda run: number(run.table("stream").get(key)), words.percent, digits=3
    )


def _mark(entry: Entry) -> Text:
    return Text(f"● {entry.text}" if entry.best else entry.text, style="bold" if entry.best else "")


def _labels(runs: Sequence[Run]) -> tuple[str, ...]:
    """A label per run: its name, with the folder and then a number where names are shared."""
    names = [run.name for run in runs]
    folders = [
        f"{name} ({clean(run.path.resolve().name, 24)})" if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]
    return tuple(
        f"{label} {place}" if folders.count(label) > 1 else label
        for place, label in enumerate(folders, start=1)
    )


def _cautions(runs: Sequence[Run]) -> list[str]:
    """Differences in what the runs were given, which a reader must know before comparing."""
    checks: list[tuple[str, Callable[[Run], str]]] = [
        ("how rows were dealt to sites", split),
        ("number of sites", _sites),
        ("proxy rows", lambda run: run.text("proxy_sha256", 80)),
        ("seed", _seeds),
        ("bad sites", lambda run: simulated.attack(run) or "none"),
        ("lost and late sites", lambda run: simulated.losses(run) or "none"),
        ("data", lambda run: clean(run.setting("data", "source") or "")),
    ]
    differing = [
        name for name, value in checks if len({found for run in runs if (found := value(run))}) > 1
    ]
    if not differing:
        return []
    return [
        f"The runs differ in more than the method: {', '.join(differing)}. "
        "A difference in accuracy may come from there."
    ]


def _exchanged(runs: Sequence[Run]) -> list[str]:
    """What the sites exchanged, where in one of the runs it was no predictions."""
    names = [shared.exchange(run) for run in runs]
    return names if {*names} - {"", shared.PREDICTIONS} else [""] * len(names)


def _unless_none(texts: list[str]) -> list[str]:
    """The texts, ``none`` where there is none; a line on which nobody has one is left out."""
    return [text or "none" for text in texts] if any(texts) else texts


def _sites(run: Run) -> str:
    amount = run.figure("clients")
    return "" if amount is None else f"{amount:,.0f}"


def _seeds(run: Run) -> str:
    if run.repeats:
        return words.count(len(run.repeats), "seed")
    seed = run.summary.get("seed", run.setting("seed"))
    return "" if seed is None else clean(seed, 24)
