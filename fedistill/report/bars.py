"""Bars, stacked steps and sparklines as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fedistill.report import scale
from fedistill.report.folder import Point
from fedistill.report.svg import (
    CHARACTER,
    Format,
    Plot,
    Series,
    element,
    frame,
    legend_rows,
    picture,
    text,
)

LOG_ABOVE = 30.0
"""Bars whose lengths differ by more than this factor get a logarithmic axis."""


@dataclass(frozen=True)
class Bar:
    """One horizontal bar."""

    name: str
    value: float
    colour: int = 0


def bar_chart(
    bars: Sequence[Bar],
    *,
    ident: str,
    title: str,
    value_format: Format,
    width: float = 430,
    row: float = 30,
) -> str:
    """Horizontal bars with their values; logarithmic, and saying so, where lengths differ much."""
    shown = [bar for bar in bars if bar.value > 0]
    if not shown:
        return ""
    values = [bar.value for bar in shown]
    log = max(values) / min(values) > LOG_ABOVE
    axis = scale.log10([min(values) / 3, *values]) if log else scale.linear([0.0, *values])
    left = 10 + CHARACTER * max(len(bar.name) for bar in shown)
    right = width - 10 - CHARACTER * max(len(value_format(bar.value)) for bar in shown)
    parts = []
    for number, bar in enumerate(shown):
        y = 4 + number * row
        end = axis.place(bar.value, left, right)
        parts.append(text(bar.name, left - 8, y + row / 2 + 2, klass="tick", text_anchor="end"))
        parts.append(
            element(
                "rect",
                klass=f"f{bar.colour}",
                x=left,
                y=y,
                rx=2,
                width=max(end - left, 1.0),
                height=row - 10,
            )
        )
        parts.append(text(value_format(bar.value), end + 7, y + row / 2 + 2, klass="tick strong"))
    bottom = 2 + row * len(shown)
    parts.append(element("line", klass="axis", x1=left, x2=left, y1=0, y2=bottom))
    if log:
        parts.append(
            text("logarithmic: each bar is cut, read the numbers", left, bottom + 16, klass="tick")
        )
    spoken = "; ".join(f"{bar.name} {value_format(bar.value)}" for bar in shown)
    return picture(ident, title, spoken, width, bottom + (24 if log else 8), *parts)


def step_chart(
    layers: Sequence[tuple[str, int, Sequence[Point]]],
    *,
    ident: str,
    title: str,
    x_label: str,
    y_label: str,
    width: float = 430,
    height: float = 190,
    spoken: str = "",
) -> str:
    """Counts per round, stacked; each layer is a name, a colour and its points.

    ``spoken`` is what a screen reader says, if it is not the sums.
    """
    if not layers or not layers[0][2]:
        return ""
    rounds = [point.x for point in layers[0][2]]
    sums = [0.0] * len(rounds)
    legend, drop = legend_rows(
        [Series(name, (), colour=colour, weight="block") for name, colour, _ in layers], width
    )
    totals = [sum(points[k].y for _, _, points in layers) for k in range(len(rounds))]
    x_axis = scale.linear(
        [min(rounds) - 0.5, max(rounds) + 0.5],
        count=12 if width > 600 else 6,
        whole=True,
        tight=True,
    )
    y_axis = scale.linear([0.0, *totals], count=4, whole=True)
    plot = Plot(
        x_axis,
        y_axis,
        left=10 + CHARACTER * len(f"{y_axis.high:g}"),
        right=width - 8,
        top=30 + drop,
        bottom=height - 40,
    )
    parts = []
    for name, colour, points in layers:
        above = [low + point.y for low, point in zip(sums, points, strict=True)]
        if any(point.y for point in points):
            parts.append(_steps(rounds, sums, above, plot, colour, name))
        sums = above
    sums_said = (f"{name}: {sum(p.y for p in points):g} in all" for name, _, points in layers)
    return picture(
        ident,
        title,
        spoken or "; ".join(sums_said),
        width,
        height,
        legend,
        frame(plot, x_label, y_label, _whole, _whole, drop),
        *parts,
    )


def _steps(
    rounds: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    plot: Plot,
    colour: int,
    name: str,
) -> str:
    """One layer as bars; as a stepped area where the bars would be too thin."""
    wide = (plot.right - plot.left) / len(rounds)
    gap = 0.12 if wide > 5 else 0.0
    shapes = []
    for x, bottom, top in zip(rounds, low, high, strict=True):
        if top > bottom:
            left, upper = plot.at(x - 0.5 + gap, top)
            right, lower = plot.at(x + 0.5 - gap, bottom)
            shapes.append(f"M{left:.1f} {lower:.1f}V{upper:.1f}H{right:.1f}V{lower:.1f}z")
    title = element("title", escape(name))
    return element("path", title, klass=f"f{colour}", d="".join(shapes))


def sparkline(values: Sequence[float], low: float, high: float, label: str) -> str:
    """A word-sized line without axes, on a scale shared by its neighbours."""
    if len(values) < 2:
        return ""
    values = [*values[:: len(values) // 60 + 1][:-1], values[-1]]
    width, height, room = 96.0, 24.0, high - low or 1.0
    places = [
        (2 + (width - 8) * k / (len(values) - 1), height - 4 - (height - 8) * (v - low) / room)
        for k, v in enumerate(values)
    ]
    line = element(
        "polyline", klass="line s1 plain", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    )
    dot = element("circle", klass="f1", cx=places[-1][0], cy=places[-1][1], r=2.5)
    return element(
        "svg",
        line + dot,
        klass="spark",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
    )


def _whole(value: float) -> str:
    return f"{value:g}"
