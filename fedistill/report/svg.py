"""Line charts as inline SVG: no script, no outside resource, colours from the page's style."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from fedistill.report import scale
from fedistill.report.folder import Point
from fedistill.report.scale import Axis

COLOURS = 7
"""How many series colours the style sheet knows: ``--c0`` to ``--c6``."""
SHADES = 13
"""How many it knows for areas: beside those also ``--c7`` to ``--c12``, paler ones."""
DASHES = ("", "6 4", "2 3", "9 3 2 3")
CHARACTER = 6.9
"""Mean width of a character at the charts' 12 px, to leave room for texts."""
ZERO = re.compile(r"(\.\d*?)0(\D*)$")
HOVER = 200
"""Above so many points a chart carries no values to hover over."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: shown at the line's end, or in the legend.
        points: in order of x; a deviation on the points draws a band.
        colour: number of a colour of the style sheet.
        dash: number of a dash pattern; 0 is a full line.
        weight: ``bold``, ``plain`` or ``thin``.
        level: a reference without a course of its own, drawn across the whole chart.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    weight: str = "plain"
    level: bool = False


@dataclass(frozen=True)
class Shift:
    """An upright line where something new begins; its name stands above, if it has one."""

    x: float
    name: str = ""


@dataclass(frozen=True)
class Sign:
    """A small triangle that points at a value, or at the x axis, and says why on hovering."""

    x: float
    y: float | None
    words: str
    colour: int = 0
    size: float = 5.0


Keys = Sequence[tuple[str, str]]
"""Further entries of a legend: a symbol drawn from (0, 0) to (26, 0), and what it means."""


@dataclass(frozen=True)
class Plot:
    """The rectangle in which data are drawn, and its axes."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a value is drawn."""
        return (self.x.place(x, self.left, self.right), self.y.place(y, self.bottom, self.top))


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """One SVG element; ``klass`` is written ``class``, ``_`` becomes ``-``; content is markup."""
    written = "".join(
        f' {"class" if key == "klass" else key.replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value != ""
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def text(words: str, x: float, y: float, /, **attributes: object) -> str:
    """A line of text; the words are escaped."""
    return element("text", escape(words), x=x, y=y, **attributes)


def picture(
    ident: str, title: str, description: str, width: float, height: float, *parts: str
) -> str:
    """The outer element with what a screen reader says."""
    head = element("title", escape(title), id=f"{ident}-t") + element(
        "desc", escape(description), id=f"{ident}-d"
    )
    return element(
        "svg",
        head + "".join(parts),
        klass="chart",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{ident}-t {ident}-d",
    )


def line_chart(
    series: Sequence[Series],
    *,
    ident: str,
    title: str,
    x_label: str,
    y_label: str,
    x_format: Format,
    y_format: Format,
    width: float = 900,
    height: float = 320,
    log_x: bool = False,
    least: float | None = None,
    most: float | None = None,
    zero: bool = False,
    span: tuple[float, float] | None = None,
    names_at_ends: bool = True,
    shifts: Sequence[Shift] = (),
    signs: Sequence[Sign] = (),
    keys: Keys = (),
) -> str:
    """Several series over a common x; an empty text when none has a point.

    Args:
        series: what to draw, the most important first.
        ident: a name unique in the page.
        title: what the chart shows, for screen readers.
        x_label: under the axis.
        y_label: above the axis.
        x_format: from a tick to its text.
        y_format: from a value to its text, on ticks and at the lines' ends.
        width: of the drawing; text is 12 units high.
        height: of the drawing.
        log_x: a logarithmic x axis.
        least: the y axis never goes below.
        most: the y axis never goes above.
        zero: the y axis begins at zero, so that heights can be compared.
        span: values of x that the axis takes in, beside those of the points.
        names_at_ends: names stand at the lines' ends, else in a legend above.
        shifts: where something new begins.
        signs: marks on values.
        keys: what these are called, in the legend.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return ""
    ends = [_end_label(one, y_format, names_at_ends) for one in drawn]
    legend, legend_height = ("", 0.0)
    named = drawn if not names_at_ends and len(drawn) > 1 else []
    if named or keys:
        legend, legend_height = legend_rows(named, width, keys)
    ys = [p.y + side * (p.sd or 0) for one in drawn for p in one.points for side in (-1, 1)]
    xs = [p.x for one in drawn if not one.level for p in one.points] or [
        p.x for one in drawn for p in one.points
    ]
    xs += span or ()
    wide = width > 600
    x_axis = (
        scale.log10(xs, tight=True)
        if log_x
        else scale.linear(xs, count=10 if wide else 5, whole=True, tight=True)
    )
    ys += [0.0] if zero else []
    y_axis = scale.linear(ys, count=5 if height > 220 else 3, least=least, most=most)
    plot = Plot(
        x_axis,
        y_axis,
        left=10 + CHARACTER * max(map(len, ticks(y_axis, y_format))),
        right=width - 14 - CHARACTER * max(map(len, ends)),
        top=(30 if y_label else 10) + legend_height,
        bottom=height - 40,
    )
    spoken = "; ".join(f"{one.name} ends at {y_format(one.points[-1].y)}" for one in drawn)
    lines = "".join(_draw(one, plot, x_format, y_format) for one in reversed(drawn))
    return picture(
        ident,
        title,
        spoken,
        width,
        height,
        legend,
        frame(plot, x_label, y_label, x_format, y_format, legend_height),
        *(_shift(shift, plot) for shift in shifts),
        lines,
        *(_sign(sign, plot) for sign in signs),
        _ends(drawn, ends, plot),
    )


def frame(
    plot: Plot, x_label: str, y_label: str, x_format: Format, y_format: Format, drop: float = 0
) -> str:
    """Grid lines, ticks and axis names."""
    parts = [text(y_label, 0, 14 + drop, klass="axis-name")] if y_label else []
    for tick, words in zip(plot.y.ticks, ticks(plot.y, y_format), strict=True):
        _, y = plot.at(plot.x.low, tick)
        parts.append(element("line", klass="grid", x1=plot.left, x2=plot.right, y1=y, y2=y))
        parts.append(text(words, plot.left - 6, y + 4, klass="tick", text_anchor="end"))
    parts.append(
        element("line", klass="axis", x1=plot.left, x2=plot.right, y1=plot.bottom, y2=plot.bottom)
    )
    for tick in plot.x.ticks:
        x, _ = plot.at(tick, plot.y.low)
        parts.append(element("line", klass="axis", x1=x, x2=x, y1=plot.bottom, y2=plot.bottom + 4))
        parts.append(text(x_format(tick), x, plot.bottom + 18, klass="tick", text_anchor="middle"))
    parts.append(
        text(
            x_label,
            (plot.left + plot.right) / 2,
            plot.bottom + 36,
            klass="axis-name",
            text_anchor="middle",
        )
    )
    return "".join(parts)


def ticks(axis: Axis, form: Format) -> list[str]:
    """The texts at an axis, without decimals that are zero in all of them."""
    texts = [form(tick) for tick in axis.ticks]
    while (pointed := [t for t in texts if "." in t]) and all(ZERO.search(t) for t in pointed):
        texts = [ZERO.sub(_without_zero, t) for t in texts]
    return texts


def legend_rows(series: Sequence[Series], width: float, keys: Keys = ()) -> tuple[str, float]:
    """A legend that wraps, and its height."""
    parts, x, y = [], 0.0, 12.0
    lines = [
        (
            element(
                "line",
                klass=_classes(one),
                x1=0,
                x2=26,
                y1=0,
                y2=0,
                stroke_dasharray=DASHES[one.dash],
            ),
            one.name,
        )
        for one in series
    ]
    for symbol, name in [*lines, *keys]:
        room = 34 + CHARACTER * len(name) + 14
        if x and x + room > width:
            x, y = 0.0, y + 18
        parts.append(element("g", symbol, transform=f"translate({x:.1f} {y - 4:.1f})"))
        parts.append(text(name, x + 32, y, klass="tick"))
        x += room
    return "".join(parts), y + 8


def triangle(x: float, y: float, size: float, klass: str, words: str = "") -> str:
    """A triangle whose tip, below, is at the place."""
    title = element("title", escape(words)) if words else ""
    corners = [(x, y), (x - size, y - 1.8 * size), (x + size, y - 1.8 * size)]
    return element("polygon", title, klass=f"sign {klass}", points=_path(corners))


def _shift(shift: Shift, plot: Plot) -> str:
    """Where something begins; at the left edge the axis is line enough."""
    x = max(plot.at(shift.x, plot.y.low)[0], plot.left)
    line = element("line", klass="shift", x1=x, x2=x, y1=plot.top, y2=plot.bottom)
    name = text(shift.name, x + 3, plot.top - 3, klass="tick") if shift.name else ""
    return (line if x > plot.left + 1 else "") + name


def _sign(sign: Sign, plot: Plot) -> str:
    x, y = plot.at(sign.x, plot.y.low if sign.y is None else sign.y)
    return triangle(x, y - 2, sign.size, f"f{sign.colour}", sign.words)


def _draw(one: Series, plot: Plot, x_format: Format, y_format: Format) -> str:
    if one.level:
        _, y = plot.at(plot.x.low, one.points[-1].y)
        return element(
            "line",
            klass=_classes(one),
            x1=plot.left,
            x2=plot.right,
            y1=y,
            y2=y,
            stroke_dasharray=DASHES[one.dash],
        )
    places = [plot.at(point.x, point.y) for point in one.points]
    line = element(
        "polyline", klass=_classes(one), points=_path(places), stroke_dasharray=DASHES[one.dash]
    )
    dots = ""
    if len(places) <= HOVER:
        radius = 3.0 if len(places) == 1 or (len(places) <= 16 and one.weight != "thin") else 0.0
        dots = "".join(
            _dot(place, point, one, radius, x_format, y_format)
            for place, point in zip(places, one.points, strict=True)
        )
    return _band(one, plot) + line + dots


def _dot(
    place: tuple[float, float],
    point: Point,
    one: Series,
    radius: float,
    x_format: Format,
    y_format: Format,
) -> str:
    """A mark, and around it a larger unseen one that shows the value on hovering."""
    spread = "" if point.sd is None else f" ± {y_format(point.sd)}"
    words = f"{one.name}, {x_format(point.x)}: {y_format(point.y)}{spread}"
    x, y = place
    seen = element("circle", klass=f"dot f{one.colour}", cx=x, cy=y, r=radius) if radius else ""
    title = element("title", escape(words))
    return seen + element("circle", title, klass="hover", cx=x, cy=y, r=7)


def _band(one: Series, plot: Plot) -> str:
    spread = [point for point in one.points if point.sd is not None]
    if len(spread) < 2:
        return ""
    upper = [plot.at(p.x, min(p.y + (p.sd or 0), plot.y.high)) for p in spread]
    lower = [plot.at(p.x, max(p.y - (p.sd or 0), plot.y.low)) for p in reversed(spread)]
    return element("polygon", klass=f"band f{one.colour}", points=_path([*upper, *lower]))


def _ends(series: Sequence[Series], labels: Sequence[str], plot: Plot) -> str:
    """The texts at the lines' ends, moved apart where they would overlap."""
    wished = [plot.at(plot.x.low, one.points[-1].y)[1] for one in series]
    placed = spread_out(wished, gap=15, low=plot.top, high=plot.bottom)
    parts = []
    for one, label, wish, y in zip(series, labels, wished, placed, strict=True):
        end = plot.right if one.level else plot.at(one.points[-1].x, 0)[0]
        if abs(y - wish) > 3 or end < plot.right - 1:
            parts.append(
                element(
                    "polyline",
                    klass="leader",
                    points=_path([(end + 3, wish), (plot.right + 4, wish), (plot.right + 9, y)]),
                )
            )
        weight = " strong" if one.weight == "bold" else ""
        parts.append(text(label, plot.right + 11, y + 4, klass=f"end f{one.colour}{weight}"))
    return "".join(parts)


def spread_out(wished: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions in the same order, at least ``gap`` apart, near the wished ones and in range."""
    order = sorted(range(len(wished)), key=lambda k: wished[k])
    gap = min(gap, (high - low) / max(len(wished) - 1, 1))
    pools: list[list[float]] = []  # neighbours that move together: where their first one would be
    for place, k in enumerate(order):
        pools.append([wished[k] - gap * place])
        while len(pools) > 1 and _mean(pools[-2]) >= _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    starts = [_mean(pool) for pool in pools for _ in pool]
    last = high - gap * (len(wished) - 1)
    placed = [0.0] * len(wished)
    for place, (k, start) in enumerate(zip(order, starts, strict=True)):
        placed[k] = min(max(start, low), last) + gap * place
    return placed


def _without_zero(found: re.Match[str]) -> str:
    return found[1].removesuffix(".") + found[2]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _end_label(one: Series, y_format: Format, named: bool) -> str:
    value = y_format(one.points[-1].y)
    return f"{one.name} {value}" if named else value


def _classes(one: Series) -> str:
    return f"line {one.weight} s{one.colour}"


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _attribute(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value))
