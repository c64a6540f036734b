"""The accuracy on every experience after every experience, as a heat map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedistill.report import words
from fedistill.report.experiences import Accuracies, Experience
from fedistill.report.svg import element, picture, text

LEVELS = 10
"""Steps of colour: classes ``h0`` to ``h9`` of the style sheet."""
CELLS = 12
"""Up to so many experiences the map is a table with a number in each cell."""
MOST = 100
"""Of more experiences than this, evenly spaced ones are shown."""


@dataclass(frozen=True)
class Heat:
    """One figure of the map: its text, its colour, and whether it was just learned."""

    text: str
    shade: str = ""
    own: bool = False


@dataclass(frozen=True)
class HeatRow:
    """The accuracies after one experience, and their mean over the experiences so far."""

    number: int
    name: str
    cells: tuple[Heat, ...]
    average: str


@dataclass(frozen=True)
class Matrix:
    """A heat map.

    Attributes:
        who: whose accuracies these are.
        columns: number and name of each experience tested on.
        rows: a row per experience learned.
        scale: shades from the lowest to the highest, and what these two stand for.
        wide: the map as a picture, where there are too many for numbers; else empty.
        narrow: the same for a narrow page.
        skipped: every how manieth experience is shown; 1 if all are.
    """

    who: str
    columns: tuple[tuple[int, str], ...]
    rows: tuple[HeatRow, ...]
    low: str
    high: str
    wide: str = ""
    narrow: str = ""
    skipped: int = 1

    @property
    def shades(self) -> tuple[str, ...]:
        """All shades, from low to high."""
        return tuple(f"h{k}" for k in range(LEVELS))


def matrix(found: Sequence[Experience]) -> Matrix | None:
    """The student's accuracies, else those of the clients on average; None without either."""
    student = any(one.student for one in found)
    table = [one.student if student else one.clients for one in found]
    width = max(map(len, table), default=0)
    if not width:
        return None
    low, high = ends(value for row in table for value in row)
    step = max(1, -(-max(width, len(found)) // MOST))
    names = {one.number: one.name for one in found}
    down = _thin(len(found), step)
    across = _thin(width, step)
    shades = [[shade(_at(table[k], j), low, high) for j in across] for k in down]
    many = max(width, len(found)) > CELLS
    rows = tuple(
        HeatRow(
            found[k].number,
            found[k].name,
            tuple(
                Heat(_text(_at(table[k], j), many), colour, j == found[k].number - 1)
                for j, colour in zip(across, line, strict=True)
            ),
            _text(so_far(table[k], found[k].number), many),
        )
        for k, line in zip(down, shades, strict=True)
    )
    columns = tuple((j + 1, names.get(j + 1, "")) for j in across)
    said = f"After {rows[-1].number}: " + ", ".join(
        f"{n} {cell.text}" for (n, _), cell in zip(columns, rows[-1].cells, strict=True)
    )
    labels = [row.number for row in rows], [number for number, _ in columns]
    return Matrix(
        who="student" if student else "clients, on average",
        columns=columns,
        rows=rows,
        low=f"{low:.0%}",
        high=f"{high:.0%}",
        wide=drawn(shades, *labels, 620, said) if many else "",
        narrow=drawn(shades, *labels, 360, said) if many else "",
        skipped=step,
    )


def ends(values: Iterable[float | None]) -> tuple[float, float]:
    """The range of the colours: tens of per cent around all accuracies."""
    known = [value for value in values if value is not None]
    low = min(max(math.floor(min(known) * 10 + 1e-9) / 10, 0.0), 0.9)
    high = min(math.ceil(max(known) * 10 - 1e-9) / 10, 1.0)
    return low, max(high, low + 0.1)


def shade(value: float | None, low: float, high: float) -> str:
    """The colour class of an accuracy; empty where it is not known."""
    if value is None:
        return ""
    share = (value - low) / (high - low)
    return f"h{min(max(int(share * LEVELS), 0), LEVELS - 1)}"


def so_far(row: Accuracies, number: int) -> float | None:
    """The mean over the experiences met so far, where all of them were tested."""
    met = row[:number]
    known = [value for value in met if value is not None]
    return sum(known) / len(known) if known and len(known) == len(met) else None


def drawn(
    shades: Sequence[Sequence[str]],
    down: Sequence[int],
    across: Sequence[int],
    width: float,
    spoken: str,
) -> str:
    """The map without numbers: a path per colour, so that ten thousand cells stay small."""
    left, top = 40.0, 40.0
    side = (width - left) / len(across)
    tall = min(side, 36.0) if len(down) > 3 else max(side, 18.0)
    seam = 0.6  # cells reach a little under their neighbours, lest the page shine through
    paths: dict[str, list[str]] = {}
    for k, row in enumerate(shades):
        start = 0
        for j in range(1, len(row) + 1):
            if j == len(row) or row[j] != row[start]:
                if row[start]:
                    x, y = left + start * side, top + k * tall
                    long = (j - start) * side + (seam if j < len(row) else 0)
                    high = tall + (seam if k < len(shades) - 1 else 0)
                    paths.setdefault(row[start], []).append(
                        f"M{x:.1f} {y:.1f}h{long:.1f}v{high:.1f}h{-long:.1f}z"
                    )
                start = j
    height = top + tall * len(down)
    parts = [
        element("path", klass=colour, d="".join(shapes)) for colour, shapes in sorted(paths.items())
    ]
    parts += [
        element("path", klass="own", d=_steps(down, across, left, top, side, tall)),
        text("tested on experience", left, 12, klass="axis-name"),
        text("after", 0, top - 8, klass="axis-name"),
    ]
    for j in _labelled(len(across), side, 30):
        x = left + (j + 0.5) * side
        parts.append(text(f"{across[j]}", x, top - 8, klass="tick", text_anchor="middle"))
    for k in _labelled(len(down), tall, 16):
        y = top + (k + 0.5) * tall + 4
        parts.append(text(f"{down[k]}", left - 6, y, klass="tick", text_anchor="end"))
    title = "Accuracy on each experience after each experience"
    return picture(f"matrix-{width:g}", title, spoken, width, height + 4, *parts)


def _steps(
    down: Sequence[int],
    across: Sequence[int],
    left: float,
    top: float,
    side: float,
    tall: float,
) -> str:
    """The stair between what was met and what was not met yet."""
    said, y = "", top
    for k, number in enumerate(down):
        x = left + side * sum(column <= number for column in across)
        said += f"M{x:.1f} {y:.1f}" if not k else f"H{x:.1f}"
        y += tall
        said += f"V{y:.1f}"
    return said


def _labelled(amount: int, side: float, room: float) -> list[int]:
    """Which of the rows or columns have their number written: the first, the last, some between."""
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * side >= room or n == 100)
    marks = [k for k in range(amount) if (k + 1) % step == 0 or not k]
    clear = 0.7 * step
    return [k for k in marks if k in {0, amount - 1} or clear <= k <= amount - 1 - clear]


def _thin(amount: int, step: int) -> list[int]:
    """Every ``step``-th place, the last among them."""
    return list(range(amount))[::-step][::-1]


def _at(row: Accuracies, place: int) -> float | None:
    return row[place] if place < len(row) else None


def _text(value: float | None, short: bool) -> str:
    if short and value is not None:
        return f"{100 * value:.0f}"
    return words.percent(value)
