"""The part of a report on a stream: rows that came in portions, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedistill.report import heat, prequential, words
from fedistill.report.bars import step_chart
from fedistill.report.charts import NARROW, Figure
from fedistill.report.experiences import Buffer, Experience, experiences
from fedistill.report.folder import Point, Run
from fedistill.report.headline import Tile
from fedistill.report.svg import Format, Series, legend_rows, line_chart
from fedistill.report.words import clean, count, number

CLASSES = 12
"""So many classes have a colour of their own in the buffers; the rest are called others."""
NAMES = 8
"""Up to so many experiences are named in the first sentence."""
FRACTIONS = (2, 20)
"""Ratios between these are said as 1/2 to 1/20."""


@dataclass(frozen=True)
class Numbers:
    """The charts as a table: names of the figures; number, name and figures per experience."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Section:
    """Everything the page says of a stream, in its order."""

    title: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...]
    curve: Figure | None
    matrix: heat.Matrix | None
    buffer: Figure | None
    cost: tuple[Figure, ...]
    cost_sentence: str
    numbers: Numbers


def section(run: Run) -> Section | None:
    """The part on the stream; None when the run was none."""
    found = experiences(run)
    if not found:
        return None
    return Section(
        title=f"A stream of {count(len(found), 'experience')}",
        sentences=tuple(s for s in (came(found), alarmed(run, found)) if s),
        tiles=tuple(tiles(run)),
        curve=prequential.figure(found),
        matrix=heat.matrix(found),
        buffer=buffer(found, _class_names(run)),
        cost=tuple(cost(found)),
        cost_sentence=cost_sentence(found),
        numbers=numbers(found),
    )


def tiles(run: Run) -> list[Tile]:
    """The figures of the summary, each with what it means; those not known are left out."""
    table = run.table("stream")
    points = "percentage points"
    told = [
        ("Average accuracy", "average_accuracy", words.percent,
         "mean over all experiences, after the last one"),
        ("Accuracy on the way", "anytime_accuracy", words.percent,
         "mean over the experiences met so far, after each one, averaged"),
        ("Forgetting", "forgetting", _points,
         f"{points} lost on earlier experiences, from the best to the end"),
        ("Before training", "prequential", words.percent,
         "correct on new rows, tested before they were learned (prequential)"),
        ("Backward transfer", "backward_transfer", _signed,
         f"{points}: what later learning changed on earlier experiences"),
        ("Forward transfer", "forward_transfer", _signed,
         f"{points} above an untrained model, on the experience that comes next"),
    ]  # fmt: skip
    return [
        Tile(name, form(value), context)
        for name, key, form, context in told
        if (value := number(table.get(key))) is not None
    ]


def came(found: Sequence[Experience]) -> str:
    """What came, in one sentence."""
    rows = [one.rows for one in found]
    total = f"{sum(r for r in rows if r is not None):,.0f} " if None not in rows else ""
    if len(found) == 1:
        return f"All {total}rows came at once{_named(found[0])}."
    names = [one.name for one in found if one.name]
    listed = f": {'; '.join(names)}" if len(names) == len(found) <= NAMES else ""
    return (
        f"The {total}rows came in {len(found)} portions, called experiences, one after the "
        f"other{listed}."
    )


def alarmed(run: Run, found: Sequence[Experience]) -> str:
    """Who noticed that the rows had changed, and what followed."""
    alarms = sum(len(rows) for one in found for rows in one.alarms.values())
    sites = len({name for one in found for name in one.alarms})
    rounds = [one.number for one in found if one.consolidated]
    if not alarms and not rounds:
        watched = clean(run.setting("continual", "drift") or "none", 24) not in {"none", "False"}
        return "No site's drift detector alarmed." if watched else ""
    said = f"Drift detectors alarmed {_times(alarms)}, at {count(sites, 'site')}"
    if rounds:
        many = "experience" if len(rounds) == 1 else "experiences"
        said += (
            f"; enough sites at once brought an extra round of distillation in {many} "
            f"{clean(words.ranges(rounds), 80)}"
        )
    return f"{said}."


def buffer(found: Sequence[Experience], names: Sequence[str]) -> Figure | None:
    """The classes in the replay buffers over time, stacked."""
    held = [(one, one.buffer) for one in found if one.buffer is not None and one.buffer.classes]
    if not held:
        return None
    layers = _layers(held, names)
    last, state = held[-1]
    spoken = f"After experience {last.number}: " + ", ".join(
        f"{name} {points[-1].y:,.0f}" for name, _, points in layers
    )

    def draw(width: float, height: float) -> str:
        _, legend = legend_rows([Series(name, ()) for name, _, _ in layers], width)
        return step_chart(
            layers,
            ident=f"buffer-{width:g}",
            title="Rows kept for replay, by class",
            x_label="after experience",
            y_label="rows",
            width=width,
            height=height + legend,
            spoken=spoken,
        )

    many = f" of {len(state.classes)} classes" if len(state.classes) > 1 else " of one class"
    full = f" of at most {state.capacity:,.0f}" if state.capacity else ""
    caption = (
        f"Rows the sites kept to learn from again, all sites together. At the end {state.rows:,.0f}"
        f"{full},{many}."
    )
    return Figure("What the buffers hold", caption, draw(900, 250), draw(NARROW, 250))


def cost(found: Sequence[Experience]) -> list[Figure]:
    """Rows trained on by each update and by training anew, and the time of each update."""
    rows = [
        Series("this update", _over(found, [one.trained for one in found]), 0, weight="bold"),
        Series("training anew", _over(found, [one.retrain for one in found]), 6, dash=1),
    ]
    time = [Series("this update", _over(found, [one.seconds for one in found]), 0)]
    drawn = [
        Figure(
            "Rows trained on",
            "A row counts each time it is learned from. Training anew: on everything so far.",
            _small("rows", "Rows trained on by each update", rows, _short),
        ),
        Figure(
            "Time of each update",
            "All sites, as measured in this run.",
            _small("update-time", "Time of each update", time, _time),
        ),
    ]
    return [figure for figure in drawn if figure.wide]


def cost_sentence(found: Sequence[Experience]) -> str:
    """What all updates cost, against training anew each time."""
    pairs = [(one.trained, one.retrain) for one in found]
    known = [(t, r) for t, r in pairs if t is not None and r]
    seconds = sum(one.seconds or 0 for one in found)
    took = f"All updates took {words.duration(seconds)}." if seconds else ""
    if not known:
        return took
    ratio = sum(r for _, r in known) / max(sum(t for t, _ in known), 1e-9)
    often = " after each experience" if len(found) > 1 else ""
    anew = f"training anew on everything so far{often} would have"
    return f"Updating trained on {_fraction(ratio)} {anew}. {took}".rstrip()


def numbers(found: Sequence[Experience]) -> Numbers:
    """The charts as a table; a column that nobody has a figure for is left out."""
    table: list[tuple[str, list[str]]] = [
        ("round", [_whole(one.round) for one in found]),
        ("new rows", [_whole(one.rows) for one in found]),
        ("correct before training", [words.percent(one.prequential) for one in found]),
        ("drift alarms", _alarms(found)),
        ("rows kept for replay", [_whole(_held(one.buffer)) for one in found]),
        ("rows trained on", [_whole(one.trained) for one in found]),
        ("training anew", [_whole(one.retrain) for one in found]),
        ("time", [words.duration(one.seconds) for one in found]),
    ]
    kept = [(name, cells) for name, cells in table if any(c != words.MISSING for c in cells)]
    return Numbers(
        tuple(name for name, _ in kept),
        tuple(
            (f"{one.number}", one.name, tuple(cells[k] for _, cells in kept))
            for k, one in enumerate(found)
        ),
    )


def _layers(
    held: Sequence[tuple[Experience, Buffer]], names: Sequence[str]
) -> list[tuple[str, int, list[Point]]]:
    """The classes that were most often kept, in their own order, and the others."""
    total: dict[str, float] = {}
    for _, state in held:
        for name, rows in state.classes.items():
            total[name] = total.get(name, 0) + rows
    top = sorted(total, key=lambda name: -total[name])[:CLASSES]
    top.sort(key=_order)
    layers = [
        (
            _class(name, names),
            k if k < 6 else k + 1,
            [Point(float(one.number), state.classes.get(name, 0)) for one, state in held],
        )
        for k, name in enumerate(top)
    ]
    if len(total) > len(top):
        rest = [
            Point(float(one.number), sum(v for k, v in state.classes.items() if k not in top))
            for one, state in held
        ]
        layers.append((f"{len(total) - len(top)} others", 6, rest))
    return layers


def _order(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def _class_names(run: Run) -> list[str]:
    names = run.summary.get("classes")
    return [clean(name, 20) for name in names] if isinstance(names, list) else []


def _class(name: str, names: Sequence[str]) -> str:
    """A class by its name, where the run names its classes."""
    known = name.isdecimal() and int(name) < len(names)
    told = names[int(name)] if known else clean(name, 20)
    return f"class {told}" if told.isdecimal() else told


def _over(found: Sequence[Experience], values: Sequence[float | None]) -> tuple[Point, ...]:
    pairs = zip(found, values, strict=True)
    return tuple(Point(float(one.number), value) for one, value in pairs if value is not None)


def _small(ident: str, title: str, series: list[Series], form: Format) -> str:
    return line_chart(
        series,
        ident=ident,
        title=title,
        x_label="experience",
        y_label="",
        x_format="{:g}".format,
        y_format=form,
        width=430,
        height=210,
        least=0,
        zero=True,
        names_at_ends=False,
    )


def _fraction(ratio: float) -> str:
    """How many rows, to be followed by whose."""
    if ratio >= FRACTIONS[1]:
        return f"{words.times(ratio)} fewer rows than"
    if ratio >= FRACTIONS[0]:
        return f"about 1/{ratio:.0f} of the rows that"
    if ratio >= 1:
        return f"{100 / ratio:.0f}% of the rows that"
    return f"{words.times(1 / ratio)} as many rows as"


def _alarms(found: Sequence[Experience]) -> list[str]:
    if not any(one.alarms or one.consolidated for one in found):
        return [words.MISSING] * len(found)
    return [
        f"{sum(map(len, one.alarms.values()))}" + (" + extra round" if one.consolidated else "")
        for one in found
    ]


def _held(state: Buffer | None) -> float | None:
    return None if state is None else state.rows


def _named(one: Experience) -> str:
    return f": {one.name}" if one.name else ""


def _times(amount: int) -> str:
    return {1: "once", 2: "twice"}.get(amount, f"{amount:,} times")


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return words.signed(100 * value, 1)


def _whole(value: float | None) -> str:
    return words.MISSING if value is None else f"{value:,.0f}"


def _time(value: float) -> str:
    return words.duration(value) if value else "0 s"


def _short(value: float) -> str:
    """A number of rows for an axis: ``20,000``, ``1.5 M``."""
    return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value:,.0f}"
