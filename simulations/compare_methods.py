"""Methods side by side: accuracy and bytes over splits and seeds, as Markdown and as a plot.

    python simulations/compare_methods.py --methods fedistill ds-fl --splits dir01 iid --seeds 0 1
    python simulations/compare_methods.py --settings simulations/digits.toml --seeds 7 1 2

Runs are kept in the folder --out, with compare.md, compare.json and compare.svg beside them. The
same command after an interruption goes on where it stopped; with another number of seeds, methods
or rounds it runs what is missing. Where a method has no student at the server (local, fd, fedproto,
fedhenn), the mean of its clients stands in for it in bytes, rounds and plot.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from readout import Figures, Step, put, read, spread, table
from runner import conduct, finish, main_of
from selection import (
    Job,
    arguments,
    check_arguments,
    check_methods,
    job,
    own_splits,
    split_changes,
    standing,
)

from fedistill import config
from fedistill.errors import Problem, RunError, SettingsError
from fedistill.presets import METHODS
from fedistill.report.folder import Point
from fedistill.report.svg import COLOURS, DASHES, Series, line_chart
from fedistill.report.words import MISSING, human_bytes, percent, round_bytes
from fedistill.store import write_atomic

HERE = Path(__file__).parent
DECIDED = {
    "method.preset": "--methods",
    "seed": "--seeds",
    "rounds": "--rounds",
    "clients.partition_key": "--splits",
}
DRAWN = re.compile(r"\.(chart|grid|axis|leader|line|band|hover|[sf]\d)\b")
"""Lines of the report's style sheet that a chart needs."""

Found = Mapping[tuple[str, str], Mapping[int, Figures]]
"""From method and split to the figures of each seed."""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with what it leaves open filled in from the settings."""
    description = (__doc__ or "").strip()
    parser, what = arguments(description, HERE / "fashion10.toml")
    what.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="NAME", help="default: all"
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--level", type=float, default=0.7, help="accuracy to be reached, a share (%(default)s)"
    )
    shown.add_argument("--plot-split", metavar="NAME", help="split of the plot (default: first)")
    given = parser.parse_args(words)
    check_arguments(given, DECIDED)
    check_methods(given.methods)
    if not 0 < given.level <= 1:
        text = f"expected a share above 0 and up to 1, such as 0.7, found {given.level:g}"
        raise SettingsError([Problem("--level", text)])
    settings = config.load(given.settings, given.changes)
    given.splits = given.splits or own_splits(settings)
    given.plot_split = given.plot_split or given.splits[0]
    if given.plot_split not in given.splits:
        text = f"expected one of {', '.join(given.splits)}, found {given.plot_split}"
        raise SettingsError([Problem("--plot-split", text)])
    given.out = given.out or Path("runs") / f"{given.settings.stem}-methods"
    return given


def planned(given: argparse.Namespace) -> list[Job]:
    """Every method on every split with every seed, seeds outermost: half a table is even."""
    settings = config.load(given.settings, given.changes)
    dealt = {split: split_changes(settings, split) for split in given.splits}
    return [
        job(
            given,
            (name, split, str(seed)),
            [f"method.preset={name}", f"seed={seed}", *dealt[split]],
            f"{name}-{split}-{seed}",
        )
        for seed in given.seeds
        for split in given.splits
        for name in given.methods
    ]


def figures_of(jobs: Sequence[Job]) -> Found:
    """What is there of each method and split."""
    found: dict[tuple[str, str], dict[int, Figures]] = {}
    for one in jobs:
        if standing(one) == "done":
            name, split, seed = one.key
            figures = read(one.folder, one.settings.rounds, METHODS[name].exchange)
            found.setdefault((name, split), {})[int(seed)] = figures
    return found


# --- tables --------------------------------------------------------------------------------------


def tables(found: Found, given: argparse.Namespace) -> str:
    """All tables, as Markdown."""
    splits, methods = given.splits, given.methods
    sent = [traffic([f for s in splits for f in runs(found, m, s)]) for m in methods]
    students = table(
        ["method", *splits, "bytes per client-round, up + down"],
        [
            [m, *(spread([f.student for f in runs(found, m, s)]) for s in splits), told]
            for m, told in zip(methods, sent, strict=True)
        ],
    )
    clients = table(
        ["method", *splits],
        [[m, *(spread([f.clients for f in runs(found, m, s)]) for s in splits)] for m in methods],
    )
    level = f"{100 * given.level:g} %"
    cost = table(
        ["method", *splits],
        [[m, *(reaching(runs(found, m, s), given.level) for s in splits)] for m in methods],
    )
    latest = any("≤" in line for line in cost.splitlines())
    caution = (
        " ≤: the round before was not measured (clients are measured every `evaluation.every` "
        "rounds; `--set evaluation.every=1` measures all)."
        if latest
        else ""
    )
    return "\n\n".join(
        [
            "Student of the server, accuracy in %: mean ± sd over seeds (number of seeds).",
            students,
            "The clients' own models on the same test rows, mean of the clients. (FedAvg: after "
            "local training, before averaging.)",
            clients,
            f"Bytes up and down for each client until the student reaches {level} for the first "
            "time, and the round, means over the seeds that reach it (their number). Without a "
            f"student: the clients' mean.{caution}",
            cost,
        ]
    )


def runs(found: Found, name: str, split: str) -> list[Figures]:
    """The figures of one method on one split."""
    return [*found.get((name, split), {}).values()]


def traffic(runs: Sequence[Figures]) -> str:
    """Mean bytes a client-round, up + down; a dash where nothing is counted."""
    sent = [(run.up, run.down) for run in runs if run.up is not None and run.down is not None]
    if not sent:
        return MISSING
    up, down = (statistics.mean(values) for values in zip(*sent, strict=True))
    return f"{up:,.0f} + {down:,.0f} B"


def reaching(runs: Sequence[Figures], level: float) -> str:
    """``1.2 MB, round 4.3 (3)``; ``(2 of 3)`` where some never do; a dash where none does."""
    reached = [(run, step) for run in runs if (step := run.reached(level))]
    if not reached:
        return MISSING
    sign = "" if all(run.exactly(step) for run, step in reached) else "≤ "
    number = f"{statistics.mean(step.round for _, step in reached):.1f}".removesuffix(".0")
    sent = human_bytes(statistics.mean(step.sent for _, step in reached))
    cost = f"{sign}{sent}, " if runs[0].up is not None else ""
    many = f"{len(reached)} of {len(runs)}" if len(reached) < len(runs) else f"{len(runs)}"
    return f"{cost}round {sign}{number} ({many})"


# --- the plot and the figures --------------------------------------------------------------------


def plot(found: Found, given: argparse.Namespace) -> str:
    """Accuracy against bytes by method, means over the seeds, as an SVG that stands alone.

    A method that exchanges nothing that is counted is a line across. Empty without runs.
    """
    split = given.plot_split
    drawn = [
        Series(
            name,
            tuple(Point(step.sent, step.accuracy) for step in mean_course(runs_here)),
            colour=place % COLOURS,
            dash=place // COLOURS % len(DASHES),
            weight="bold" if name == "fedistill" else "plain",
            level=runs_here[0].up is None,
        )
        for place, name in enumerate(given.methods)
        if (runs_here := runs(found, name, split))
    ]
    title = f"{given.settings.stem}, {split}: accuracy by bytes sent"
    picture = line_chart(
        drawn,
        ident="compare",
        title=title,
        x_label="bytes up and down so far, for each client (logarithmic)",
        y_label=f"{given.settings.stem}, {split}: student's accuracy (clients' mean without one)",
        x_format=round_bytes,
        y_format=percent,
        height=max(360.0, 90 + 16.0 * len(drawn)),
        log_x=True,
        least=0,
        most=1,
    )
    return alone(picture) if picture else ""


def mean_course(runs: Sequence[Figures]) -> list[Step]:
    """The rounds that all runs measured, each with the mean of its bytes and accuracies."""
    by_round = [{step.round: step for step in run.course} for run in runs]
    common = sorted(set.intersection(*(set(steps) for steps in by_round)))
    return [
        Step(
            number,
            statistics.mean(step.sent for step in steps),
            statistics.mean(step.accuracy for step in steps),
        )
        for number in common
        if (steps := [course[number] for course in by_round])
    ]


def alone(picture: str) -> str:
    """A chart of the report as a file of its own, with the part of the style that it needs."""
    style = files("fedistill.report").joinpath("style.css").read_text("utf-8")
    colours, _, rest = style.partition("* {")
    rules = [line for line in rest.splitlines() if DRAWN.match(line)]
    page = (
        "svg.chart { background: var(--page); font-family: system-ui, sans-serif; padding: 12px; "
        "box-sizing: border-box; }"
    )
    opening, _, content = picture.partition(">")
    opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    inside = "\n".join([colours.strip(), *rules, page])
    return f"{opening}><style>\n{inside}\n</style>{content}\n"


def record(found: Found, given: argparse.Namespace, problems: Mapping[Job, str]) -> dict[str, Any]:
    """All figures, for other programs."""
    return {
        "settings": str(given.settings),
        "changes": given.changes,
        "rounds": given.rounds or config.load(given.settings, given.changes).rounds,
        "level": given.level,
        "runs": [
            {"method": name, "split": split, "seed": seed}
            | asdict(figures)
            | {"reached": asdict(step) if (step := figures.reached(given.level)) else None}
            for (name, split), seeds in found.items()
            for seed, figures in sorted(seeds.items())
        ],
        "left_out": {one.words: text for one, text in problems.items()},
    }


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, then show what is there."""
    given = parse(words)
    jobs = planned(given)
    problems = conduct(jobs, given)
    found = figures_of(jobs)
    if not found:
        finish(problems, given.out)
        hint = "leave --only-finished out to run them" if given.only_finished else "see above"
        raise RunError(f"no run in {given.out} is finished: {hint}")
    shown = tables(found, given)
    write_atomic(given.out / "compare.md", f"{shown}\n".encode())
    content = json.dumps(record(found, given, problems), indent=1)
    write_atomic(given.out / "compare.json", f"{content}\n".encode())
    if picture := plot(found, given):
        write_atomic(given.out / "compare.svg", picture.encode())
    print(shown)
    if given.readme:
        put(given.readme, given.settings.stem, shown)
    print(f"\ncompare.md, .json and .svg: in {given.out}", file=sys.stderr)
    return finish(problems, given.out)


if __name__ == "__main__":
    sys.exit(main_of(main))
