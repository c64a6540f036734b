"""What bad clients cost: attacks against rules, as Markdown.

    python simulations/bad_clients.py --count 2 --splits dir05 --seeds 0 1 2
    python simulations/bad_clients.py --count 4 --collude --rules trust trust-anchored

Every rule is run clean and under every attack, with the same bad clients, drawn from the seed.
`krum` and `trimmed-mean` are told how many are bad; for `trust-anchored` the server knows the
labels of some proxy rows. Runs are kept in the folder --out; the same command after an interruption
goes on where it stopped. Attacks and rules are explained by `fedistill list`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readout import put, read, spread, table
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
from fedistill.catalog import known
from fedistill.errors import Problem, RunError, SettingsError, did_you_mean
from fedistill.presets import METHODS
from fedistill.report.words import MINUS, MISSING
from fedistill.settings import Settings
from fedistill.store import write_atomic

HERE = Path(__file__).parent
RULES = (
    "distribution-weighted",
    "trust",
    "geometric-median-client",
    "median",
    "krum",
    "mean",
    "trust-anchored",
)
TOLD = {"krum": ("byzantine", 0.0), "trimmed-mean": ("trim", 0.3)}
"""Rules that assume a share of bad clients: the name of it, and the least that they are told."""
ANCHORED = "trust-anchored"
CLEAN = "clean"
DECIDED = {
    "method.preset": "--method",
    "method.rule": "--rules",
    "attack.kind": "--attacks",
    "attack.count": "--count",
    "attack.collude": "--collude",
    "seed": "--seeds",
    "rounds": "--rounds",
    "clients.partition_key": "--splits",
}

Found = Mapping[tuple[str, str, str], Mapping[int, float]]
"""From rule, attack and split to the student's accuracy with each seed."""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with what it leaves open filled in from the settings."""
    parser, _ = arguments((__doc__ or "").strip(), HERE / "fashion10.toml")
    bad = parser.add_argument_group("who is bad, and what is done about it")
    bad.add_argument("--attacks", nargs="+", metavar="KIND", help="default: all")
    bad.add_argument(
        "--rules", nargs="+", default=[*RULES], metavar="RULE", help=f"default: {', '.join(RULES)}"
    )
    bad.add_argument("--method", default="fedistill", metavar="NAME", help="default: %(default)s")
    bad.add_argument("--count", type=int, default=2, metavar="N", help="default: %(default)s")
    bad.add_argument("--collude", action="store_true", help="the bad train as one, and hide it")
    bad.add_argument(
        "--anchors", type=int, default=100, metavar="N", help=f"labelled rows for {ANCHORED} (100)"
    )
    bad.add_argument(
        "--bar", type=float, default=2.0, metavar="POINTS", help="a loss that is borne (2)"
    )
    given = parser.parse_args(words)
    check_arguments(given, DECIDED)
    check_methods([given.method])
    _check(given)
    settings = config.load(given.settings, given.changes)
    if given.splits is None:
        offered = own_splits(settings)
        given.splits = ["dir05"] if "dir05" in offered else offered[:1]
    given.out = given.out or Path("runs") / f"{given.settings.stem}-bad-clients"
    return given


def _check(given: argparse.Namespace) -> None:
    """Unknown names and numbers out of range, all at once; no attacks named stands for all."""
    problems = []
    if METHODS[given.method].exchange != "predictions":
        text = f"expected a method that shares predictions, found {given.method}: no rule combines"
        problems.append(Problem("--method", text))
    given.attacks = given.attacks or [*known("attacks")]
    for kind, names in (("rules", given.rules), ("attacks", given.attacks)):
        problems += [
            Problem(f"--{kind}", f'unknown "{name}"{did_you_mean(name, known(kind))}')
            for name in names
            if name not in known(kind)
        ]
    problems += [
        Problem(f"--{name}", f"expected 1 or more, found {getattr(given, name)}")
        for name in ("count", "anchors")
        if getattr(given, name) < 1
    ]
    if problems:
        raise SettingsError(problems, "command line")


# --- the runs ------------------------------------------------------------------------------------


def planned(given: argparse.Namespace) -> list[Job]:
    """Every rule under every attack and without any, on every split; seeds outermost."""
    settings = config.load(given.settings, given.changes)
    dealt = {split: split_changes(settings, split) for split in given.splits}
    who = "colluding" if given.collude else "bad"
    made = []
    for seed in given.seeds:
        for split in given.splits:
            for attack in (CLEAN, *given.attacks):
                for rule in given.rules:
                    told, label = preparation(rule, given, settings)
                    mark = CLEAN if attack == CLEAN else f"{given.count}-{who}-{attack}"
                    changes = [
                        f"method.preset={given.method}",
                        f"method.rule={rule}",
                        f"seed={seed}",
                        *dealt[split],
                        *told,
                        *misdeeds(attack, given),
                    ]
                    name = f"{given.method}-{label}-{mark}-{split}-{seed}"
                    made.append(job(given, (rule, attack, split, str(seed)), changes, name))
    return made


def misdeeds(attack: str, given: argparse.Namespace) -> list[str]:
    """What an attack changes in the settings."""
    if attack == CLEAN:
        return ["attack.count=0"]
    collude = str(given.collude).lower()
    return [f"attack.kind={attack}", f"attack.count={given.count}", f"attack.collude={collude}"]


def preparation(rule: str, given: argparse.Namespace, settings: Settings) -> tuple[list[str], str]:
    """What a rule is told, and the name under which it is kept, which says so."""
    if rule == ANCHORED:
        if any(change.startswith("proxy.labelled") for change in given.changes):
            return [], rule
        return [f"proxy.labelled={given.anchors}"], f"{rule}-{given.anchors}"
    if rule not in TOLD:
        return [], rule
    option, least = TOLD[rule]
    if any(change.startswith(f"method.{option}") for change in given.changes):
        return [], rule
    share = min(max(given.count / settings.clients.count, least), 0.45)
    return [f"method.{option}={share:g}"], f"{rule}-{share:g}"


def figures_of(jobs: Sequence[Job]) -> Found:
    """The student's accuracy in each finished run."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for one in jobs:
        if standing(one) == "done":
            rule, attack, split, seed = one.key
            student = read(one.folder, one.settings.rounds, "predictions").student
            if student is not None:
                found.setdefault((rule, attack, split), {})[int(seed)] = student
    return found


# --- the tables ----------------------------------------------------------------------------------


def losses(found: Found, rule: str, attack: str, split: str) -> list[float]:
    """Accuracy lost under an attack, for each seed that was also run clean."""
    clean, attacked = (found.get((rule, kind, split), {}) for kind in (CLEAN, attack))
    return [clean[seed] - attacked[seed] for seed in clean if seed in attacked]


def tables(found: Found, given: argparse.Namespace, clients: int) -> str:
    """A table for each split, with what it comes to, as Markdown."""
    how = ", colluding" if given.collude else ""
    said = (
        f"Bad clients: {given.count} of {clients}{how}. Accuracy of the server's student in % "
        "where nobody is bad, and the points lost under each attack: mean ± sd over seeds (number "
        "of seeds); below zero is gained. Last row: the rule with the highest accuracy under the "
        "attack, and how far that is below the best rule where nobody is bad."
    )
    if ANCHORED in given.rules:
        said += f" `{ANCHORED}`: the server knows the labels of {given.anchors} proxy rows."
    parts = [said]
    for split in given.splits:
        parts += [table_of(found, given, split), verdict(found, given, split)]
    return "\n\n".join(part for part in parts if part)


def table_of(found: Found, given: argparse.Namespace, split: str) -> str:
    """Rules as rows, attacks as columns, and a row for the best of the rules."""
    rows = []
    for rule in given.rules:
        lost = [losses(found, rule, attack, split) for attack in given.attacks]
        known = [statistics.mean(values) for values in lost if values]
        worst = points(max(known)) if len(known) == len(lost) else MISSING
        clean = spread([*found.get((rule, CLEAN, split), {}).values()])
        rows.append([rule, clean, *map(spread, lost), worst])
    usual = best_rule(found, given, CLEAN, split)
    last = ["**best rule**", usual[0] if usual else MISSING]
    for attack in given.attacks:
        best = best_rule(found, given, attack, split)
        last.append(f"{points(best[1])} {best[0]}" if best else MISSING)
    return table([split, CLEAN, *given.attacks, "worst"], [*rows, [*last, ""]])


def best_rule(
    found: Found, given: argparse.Namespace, attack: str, split: str
) -> tuple[str, float] | None:
    """The rule with the highest mean under an attack, and how far below the best clean one.

    A rule that is poor without attacks has little to lose: its own loss would flatter it.
    """

    def middle(rule: str, kind: str) -> float | None:
        values = found.get((rule, kind, split), {}).values()
        return statistics.mean(values) if values else None

    clean = [value for rule in given.rules if (value := middle(rule, CLEAN)) is not None]
    left = [(value, rule) for rule in given.rules if (value := middle(rule, attack)) is not None]
    if not clean or not left:
        return None
    highest = max(value for value, _ in left)
    rule = next(rule for value, rule in left if value == highest)
    return rule, max(clean) - highest


def verdict(found: Found, given: argparse.Namespace, split: str) -> str:
    """Whether every attack is borne by some rule, and which are not; empty without figures."""
    best = {attack: best_rule(found, given, attack, split) for attack in given.attacks}
    known = {attack: one for attack, one in best.items() if one}
    if not known:
        return ""
    bar = f"{given.bar:g} points"
    lost = [attack for attack, (_, loss) in known.items() if 100 * loss >= given.bar]
    if not lost:
        return f"{split}: under each attack the best rule loses less than {bar}."
    named = "; ".join(f"{a} ({points(known[a][1])} with {known[a][0]})" for a in lost)
    return f"{split}: no rule here keeps the loss below {bar} under {named}."


def points(loss: float) -> str:
    """A share as points with one decimal, with a typographic minus."""
    return f"{100 * loss:.1f}".replace("-0.0", "0.0").replace("-", MINUS)


def record(found: Found, given: argparse.Namespace, problems: Mapping[Job, str]) -> dict[str, Any]:
    """All figures, for other programs."""
    return {
        "settings": str(given.settings),
        "changes": given.changes,
        "method": given.method,
        "count": given.count,
        "collude": given.collude,
        "runs": [
            {"rule": rule, "attack": attack, "split": split, "seed": seed, "student": student}
            for (rule, attack, split), seeds in found.items()
            for seed, student in sorted(seeds.items())
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
    shown = tables(found, given, jobs[0].settings.clients.count)
    stem = f"{given.count}-{'colluding' if given.collude else 'bad'}"
    write_atomic(given.out / f"{stem}.md", f"{shown}\n".encode())
    content = json.dumps(record(found, given, problems), indent=1)
    write_atomic(given.out / f"{stem}.json", f"{content}\n".encode())
    print(shown)
    if given.readme:
        put(given.readme, f"{given.settings.stem} {stem}", shown)
    print(f"\n{stem}.md and .json: in {given.out}", file=sys.stderr)
    return finish(problems, given.out)


if __name__ == "__main__":
    sys.exit(main_of(main))
