"""The report's charts, each from a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fedistill.report import words
from fedistill.report.bars import Bar, bar_chart, step_chart
from fedistill.report.folder import Point, Run
from fedistill.report.svg import Series, line_chart
from fedistill.report.words import number

NARROW = 400


@dataclass(frozen=True)
class Figure:
    """A chart, once for a wide page and once for a narrow one, with its caption."""

    title: str
    caption: str
    wide: str
    narrow: str = ""


def figures(run: Run) -> list[Figure]:
    """The large charts: accuracy, and AUC where there is one."""
    accuracy = "Share of test rows classified correctly. Hover over a line for its values."
    if any(point.sd is not None for point in run.curve("student_accuracy")):
        accuracy += " Bands: ± one standard deviation over the repeats."
    drawn = [
        both(
            "accuracy",
            "Accuracy by round",
            accuracy,
            accuracy_series(run, "accuracy"),
            "correct",
            words.percent,
        ),
        both(
            "auc",
            "Area under the curve by round",
            "AUC: 0.5 is a guess, 1 is perfect.",
            accuracy_series(run, "auc"),
            "AUC",
            words.share,
        ),
    ]
    return [figure for figure in drawn if figure.wide]


def both(
    ident: str,
    title: str,
    caption: str,
    series: list[Series],
    y_label: str,
    y_format: Callable[[float], str],
) -> Figure:
    """A line chart by round in both widths."""

    def draw(width: float, height: float, named: bool) -> str:
        return line_chart(
            series,
            ident=f"{ident}-{width:g}",
            title=title,
            x_label="round",
            y_label=y_label,
            x_format=_plain,
            y_format=y_format,
            width=width,
            height=height,
            least=0,
            most=1,
            names_at_ends=named,
        )

    return Figure(title, caption, draw(900, 340, True), draw(NARROW, 300, False))


def accuracy_series(run: Run, kind: str) -> list[Series]:
    """Student, clients' mean and least, and the baselines as thin lines."""
    series = [
        Series("student", run.curve(f"student_{kind}"), colour=0, weight="bold"),
        Series("clients, mean", run.curve(f"client_{kind}_mean"), colour=1),
        Series("clients, least", run.curve(f"client_{kind}_min"), colour=1, dash=1, weight="thin"),
    ]
    for place, (name, other) in enumerate(run.baselines.items()):
        points = other.curve(f"student_{kind}") or other.curve(f"client_{kind}_mean")
        if not points and (last := other.figure(f"student_{kind}")) is not None:
            points = (Point(1, last),)
        level = len(points) == 1 and len(run.rounds) > 1
        series.append(
            Series(
                name, points, colour=2 + place % 5, dash=2 + place % 2, weight="thin", level=level
            )
        )
    return series


def agreement(run: Run) -> list[Figure]:
    """Small charts of agreement with the soft targets, and of the targets' entropy."""
    classes = run.summary.get("classes")
    guess = math.log(len(classes)) if isinstance(classes, list) and len(classes) > 1 else 0
    entropy = f"Mean entropy in nats: 0 is certain{f', {guess:.2f} is a guess' if guess else ''}."
    drawn = [
        small(
            "agreement",
            "Agreement with the soft targets",
            "Share of proxy rows on which a client's first choice is that of the soft targets; "
            "mean over clients.",
            run.curve("agreement"),
            2,
            words.percent,
            most=1,
        ),
        small(
            "entropy",
            "How undecided the soft targets are",
            entropy,
            run.curve("target_entropy"),
            3,
            "{:.2f}".format,
        ),
    ]
    return [figure for figure in drawn if figure.wide]


def small(
    ident: str,
    title: str,
    caption: str,
    points: Sequence[Point],
    colour: int,
    y_format: Callable[[float], str],
    most: float | None = None,
) -> Figure:
    """A single line at half the page's width."""
    return Figure(
        title,
        caption,
        line_chart(
            [Series(title, points, colour=colour)],
            ident=ident,
            title=title,
            x_label="round",
            y_label="",
            x_format=_plain,
            y_format=y_format,
            width=430,
            height=200,
            least=0,
            most=most,
            names_at_ends=False,
        ),
    )


def traffic(run: Run) -> list[Figure]:
    """Bytes per client and round as bars, and the bytes of the whole run as they add up."""
    if not run.total("bytes_up", "bytes_down"):
        return []
    up = run.figure("bytes_up_per_client_round")
    down = run.figure("bytes_down_per_client_round")
    fedavg = run.figure("fedavg_bytes_per_client_round")
    bars = bar_chart(
        [
            Bar("up, this run", up or 0, 0),
            Bar("up, FedAvg", fedavg or 0, 6),
            Bar("down, this run", down or 0, 0),
            Bar("down, FedAvg", fedavg or 0, 6),
        ],
        ident="bytes",
        title="Bytes per client and round",
        value_format=words.human_bytes,
    )
    ours, theirs = cumulative(run), fedavg_cumulative(run)
    growing = line_chart(
        [
            Series("this run", ours, colour=0, weight="bold"),
            Series("FedAvg", theirs, colour=6, dash=1),
        ],
        ident="traffic",
        title="Bytes of the whole run",
        x_label="round",
        y_label="",
        x_format=_plain,
        y_format=words.human_bytes,
        width=430,
        height=200,
        least=0,
    )
    drawn = [
        Figure("Per client and round", "What one client sends and receives in one round.", bars),
        Figure("All clients, added up", "Both ways, all clients, from round 1 on.", growing),
    ]
    return [figure for figure in drawn if figure.wide]


def cumulative(run: Run) -> tuple[Point, ...]:
    """Bytes sent until each round, both ways, all clients."""
    sums = accumulate(
        (number(row.get("bytes_up")) or 0) + (number(row.get("bytes_down")) or 0)
        for row in run.rounds
    )
    found = tuple(
        Point(float(row["round"]), total) for row, total in zip(run.rounds, sums, strict=True)
    )
    return found if found and found[-1].y else ()


def fedavg_cumulative(run: Run) -> tuple[Point, ...]:
    """What FedAvg would have sent until each round: down to all asked, up from those that did."""
    each = run.figure("fedavg_bytes_per_client_round")
    if each is None:
        return ()
    sums = accumulate(each * messages(row) for row in run.rounds)
    found = tuple(
        Point(float(row["round"]), total) for row, total in zip(run.rounds, sums, strict=True)
    )
    return found if found and found[-1].y else ()


def messages(row: Mapping[str, Any]) -> float:
    """Messages of a round: down to all asked, up from those who answered, in time or late."""
    ok, failed, late = (
        number(row.get(key)) or 0 for key in ("clients_ok", "clients_failed", "clients_late")
    )
    return 2 * ok + failed + late


def attendance(run: Run) -> str:
    """Clients per round whose upload was used, and those whose was not."""
    points = {
        key: [Point(float(row["round"]), number(row.get(key)) or 0) for row in run.rounds]
        for key in ("clients_ok", "clients_failed")
    }
    if not any(point.y for layer in points.values() for point in layer):
        return ""
    return step_chart(
        [("upload used", 0, points["clients_ok"]), ("not used", 1, points["clients_failed"])],
        ident="attendance",
        title="Clients in each round",
        x_label="round",
        y_label="clients",
    )


def _plain(value: float) -> str:
    return f"{value:g}"
