"""Accuracy on new rows before they were learned, along the stream.

Sites differ in how many rows they have, so a shift comes early in the rows of one site and late in
those of another. Every course is therefore laid along the experiences first: experience 3 reaches
from 2.5 to 3.5. Where all sites pass from one experience to the next at the same rows, the axis
is turned back into rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from statistics import fmean, pstdev

from fedistill.report import words
from fedistill.report.charts import NARROW, Figure
from fedistill.report.experiences import Experience
from fedistill.report.folder import Point
from fedistill.report.svg import Keys, Series, Shift, Sign, element, line_chart, triangle
from fedistill.report.words import clean, count

SITES = 8
"""Up to so many sites have a line each; of more, the mean and its band are drawn."""
POINTS = 100
"""A site's line has about so many points, at least one per experience; the mean twice as many."""
SHIFTS = 30
"""Above so many experiences no upright lines are drawn; the axis counts them."""
ALIKE = 0.02
"""Sites pass on together if their rows differ by at most this share of the stream."""

Pieces = Mapping[int, tuple[Point, ...]]


@dataclass(frozen=True)
class Track:
    """The course of one site.

    Attributes:
        name: the site.
        pieces: its points in each experience (counted from 0) in which it had any.
        alarms: where its detector alarmed.
        starts: rows it had seen when each experience began, and after the last.
    """

    name: str
    pieces: Pieces
    alarms: tuple[float, ...] = ()
    starts: tuple[float, ...] = ()

    @property
    def points(self) -> tuple[Point, ...]:
        """All points, in order."""
        return tuple(point for piece in self.pieces.values() for point in piece)


@dataclass(frozen=True)
class Ruler:
    """The x axis: experiences, or rows where all sites passed on at the same ones."""

    bounds: tuple[float, ...] = ()

    def place(self, x: float) -> float:
        """From experiences to what the axis counts."""
        if not self.bounds:
            return x
        k = min(max(int(x - 0.5), 0), len(self.bounds) - 2)
        low, high = self.bounds[k : k + 2]
        return low + (x - 0.5 - k) * (high - low)


def figure(found: Sequence[Experience]) -> Figure | None:
    """The chart in both widths; None where nothing was tested before it was learned."""
    sites = tracks(found)
    if not sites:
        return None
    ruler = rule(sites, len(found))
    many = len(sites) > SITES
    series = [averaged(sites, ruler, len(found))] if many else lines(sites, ruler, len(found))
    signs = together(sites, ruler, len(found)) if many else each(sites, ruler, len(found))
    shifts = _shifts(found, ruler)
    rows = bool(ruler.bounds)

    def draw(width: float, height: float, named: bool) -> str:
        return line_chart(
            series,
            ident=f"prequential-{width:g}",
            title="Accuracy on new rows, before they were learned",
            x_label="rows seen so far, each site" if rows else "experience",
            y_label="correct",
            x_format=_rows if rows else _experience,
            y_format=words.percent,
            width=width,
            height=height,
            least=0,
            most=1,
            span=(ruler.place(0.5), ruler.place(len(found) + 0.5)),
            names_at_ends=named,
            shifts=shifts,
            signs=signs,
            keys=_keys(bool(shifts), bool(signs)),
        )

    said = _caption(sites, rows, any(one.curves for one in found), len(found))
    title = "New rows, tested before they were learned"
    return Figure(title, said, draw(900, 340, True), draw(NARROW, 330, False))


def tracks(found: Sequence[Experience]) -> list[Track]:
    """A track per site; without curves a point per experience, of each site or of their mean."""
    names = dict.fromkeys(name for one in found for name in one.curves)
    if names:
        return [_track(name, found) for name in names]
    names = dict.fromkeys(name for one in found for name in one.by_client)
    by_site = [
        (name, {k: one.by_client[name] for k, one in enumerate(found) if name in one.by_client})
        for name in names
    ]
    means = {k: one.prequential for k, one in enumerate(found) if one.prequential is not None}
    flat = by_site or ([("sites, mean", means)] if means else [])
    return [Track(n, {k: (Point(k + 1.0, v),) for k, v in values.items()}) for n, values in flat]


def rule(sites: Sequence[Track], amount: int) -> Ruler:
    """Rows, where all sites passed from one experience to the next at nearly the same ones."""
    if amount > SHIFTS or not all(site.starts for site in sites):
        return Ruler()
    at = list(zip(*(site.starts for site in sites), strict=True))
    apart = max(max(rows) - min(rows) for rows in at)
    bounds = tuple(fmean(rows) for rows in at)
    rising = all(low < high for low, high in pairwise(bounds))
    return Ruler(bounds if rising and apart <= ALIKE * bounds[-1] else ())


def lines(sites: Sequence[Track], ruler: Ruler, amount: int) -> list[Series]:
    """A line per site."""
    return [
        Series(
            clean(site.name, 20),
            tuple(Point(ruler.place(p.x), p.y) for p in _thinned(site.pieces, amount)),
            colour=k % 7,
            dash=k // 7,
        )
        for k, site in enumerate(sites)
    ]


def averaged(sites: Sequence[Track], ruler: Ruler, amount: int) -> Series:
    """The mean over sites at places they share, and one standard deviation as its band."""
    values: dict[float, list[float]] = defaultdict(list)
    for site in sites:
        for k, piece in site.pieces.items():
            for x, y in zip(_grid(k, amount), _means(piece, k, _steps(amount)), strict=True):
                values[x].append(y)
    points = [Point(ruler.place(x), fmean(ys), pstdev(ys)) for x, ys in sorted(values.items())]
    return Series(f"mean of {len(sites)} sites", points, weight="bold")


def each(sites: Sequence[Track], ruler: Ruler, amount: int) -> list[Sign]:
    """A sign on a site's own line for each of its alarms."""
    found = []
    for k, (site, line) in enumerate(zip(sites, lines(sites, ruler, amount), strict=True)):
        for x in map(ruler.place, site.alarms):
            said = f"{clean(site.name, 20)}: drift alarm"
            found.append(Sign(x, level(line.points, x), said, k % 7))
    return found


def together(sites: Sequence[Track], ruler: Ruler, amount: int) -> list[Sign]:
    """A sign at the axis wherever sites alarmed, larger the more of them did."""
    alarmed: dict[float, set[str]] = defaultdict(set)
    for site in sites:
        for x in site.alarms:
            k = min(max(int(x - 0.5), 0), amount - 1)
            alarmed[_grid(k, amount)[_slot(x, k, _steps(amount))]].add(site.name)
    return [
        Sign(
            ruler.place(x),
            None,
            f"drift alarm at {len(names)} of {len(sites)} sites",
            1,
            min(3 + 5 * (len(names) / len(sites)) ** 0.5, 240 / amount),
        )
        for x, names in sorted(alarmed.items())
    ]


def level(points: Sequence[Point], x: float) -> float:
    """The height of a line at x."""
    xs = [point.x for point in points]
    after = min(bisect_left(xs, x), len(xs) - 1)
    before = max(after - 1, 0)
    (low, left, _), (high, right, _) = points[before], points[after]
    share = (x - low) / (high - low) if high > low else 1.0
    return left + (right - left) * min(max(share, 0.0), 1.0)


def _track(name: str, found: Sequence[Experience]) -> Track:
    pieces: dict[int, tuple[Point, ...]] = {}
    alarms: list[float] = []
    starts = [0.0]
    for k, one in enumerate(found):
        points, start = one.curves.get(name, ()), starts[-1]
        end = max(start, points[-1].x) if points else start
        place = _along(k, start, end)
        if points:
            pieces[k] = tuple(Point(place(p.x), p.y) for p in points)
        alarms += map(place, one.alarms.get(name, ()))
        starts.append(end)
    return Track(name, pieces, tuple(sorted(alarms)), tuple(starts))


def _along(k: int, start: float, end: float) -> Callable[[float], float]:
    """From rows to the place along the experiences, within experience ``k``."""

    def place(x: float) -> float:
        share = (x - start) / (end - start) if end > start else 0.5
        return k + 0.5 + min(max(share, 0.0), 1.0)

    return place


def _steps(amount: int) -> int:
    """How many points of the mean stand in one experience."""
    return 1 if amount > SHIFTS else min(20, 2 * POINTS // amount)


def _grid(k: int, amount: int) -> list[float]:
    """The middles of equal parts of experience ``k``."""
    steps = _steps(amount)
    return [k + 0.5 + (step + 0.5) / steps for step in range(steps)]


def _slot(x: float, k: int, steps: int) -> int:
    """In which part of experience ``k`` a place lies; a part's end belongs to it."""
    return min(max(ceil((x - k - 0.5) * steps - 1e-9) - 1, 0), steps - 1)


def _means(piece: Sequence[Point], k: int, steps: int) -> list[float]:
    """The mean of the points in each part of an experience; in an empty part the value before."""
    parts: dict[int, list[float]] = defaultdict(list)
    for point in piece:
        parts[_slot(point.x, k, steps)].append(point.y)
    means = [piece[0].y]
    for step in range(steps):
        means.append(fmean(parts[step]) if step in parts else means[-1])
    return means[1:]


def _thinned(pieces: Pieces, amount: int) -> list[Point]:
    """At most about :data:`POINTS` points: neighbours of one experience become their mean."""
    if amount > SHIFTS:
        return [Point(k + 1.0, fmean(p.y for p in piece)) for k, piece in pieces.items()]
    room = POINTS // amount
    thin = []
    for piece in pieces.values():
        size = -(-len(piece) // room)
        groups = [piece[at : at + size] for at in range(0, len(piece), size)]
        thin += [Point(group[-1].x, fmean(p.y for p in group)) for group in groups]
    return thin


def _shifts(found: Sequence[Experience], ruler: Ruler) -> list[Shift]:
    """Where experiences begin; with their numbers, where the axis does not count them."""
    if not 1 < len(found) <= SHIFTS:
        return []
    named = bool(ruler.bounds)
    places = [
        Shift(ruler.place(k + 0.5), f"{one.number}" if named else "") for k, one in enumerate(found)
    ]
    return places if named else places[1:]


def _keys(shifts: bool, signs: bool) -> Keys:
    line = element("line", klass="shift", x1=13, x2=13, y1=-8, y2=6)
    keys = [(line, "a new experience begins")] if shifts else []
    return [*keys, (triangle(13, 4, 5, "soft"), "drift alarm")] if signs else keys


def _caption(sites: Sequence[Track], rows: bool, windowed: bool, amount: int) -> str:
    said = ["Share of new rows that a site classified correctly before it learned from them."]
    if len(sites) > SITES:
        said.append(f"Mean of {count(len(sites), 'site')}; band: ± one standard deviation.")
    if not windowed or amount > SHIFTS:
        said.append("Each point is the mean of one experience.")
    else:
        said.append("Each point looks back over a window of rows.")
        if not rows:
            said.append(
                "Experiences are drawn equally wide: sites differ in how many rows they have."
            )
    if len(sites) > SITES and any(site.alarms for site in sites):
        said.append("Triangles on the axis: the larger, the more sites alarmed.")
    return " ".join(said)


def _rows(value: float) -> str:
    return f"{value:,.0f}"


def _experience(value: float) -> str:
    return f"{value:.3g}"
