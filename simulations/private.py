"""What privacy costs: the settings of simulations/private at several budgets, as Markdown.

    python simulations/private.py
    python simulations/private.py --only digits breast-cancer --seeds 0 1 2

Each run is one `fedistill run` with its own ledgers, in a folder of its own under --out; the same
command after an interruption goes on with what is missing. Noise comes from the operating system,
so figures move a little from run to run; the spread over seeds says how much.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fedistill as fd

HERE = Path(__file__).parent
EPSILONS: Mapping[str, tuple[float, ...]] = {
    "digits": (8, 3),
    "breast-cancer": (3,),
    "credit": (3,),
    "diabetes": (3,),
    "fashion10": (8, 3, 1),
}
MORE: Mapping[tuple[str, float], Sequence[str]] = {("fashion10", 1): ("privacy.lr=40",)}
"""What else changes with the budget."""

Summary = Mapping[str, Any]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(EPSILONS), default=list(EPSILONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/what-privacy-costs"))
    return parser.parse_args(words)


def run(name: str, epsilon: float, seed: int, out: Path) -> tuple[Summary, Summary]:
    """One run and the same without privacy, or what an earlier call left of them.

    What does without privacy is run beside the first budget, and is the same for the others.
    """
    folder = out / f"{name}-{epsilon:g}-{seed}"
    first = EPSILONS[name][0]
    beside = out / f"{name}-{first:g}-{seed}" / "baselines" / "without-privacy" / "summary.json"
    if not (folder / "report.html").exists():
        changes = [f"privacy.epsilon={epsilon}", f"seed={seed}", *MORE.get((name, epsilon), ())]
        changes += [f"evaluation.without_privacy={str(epsilon == first).lower()}"]
        file = HERE / "private" / f"{name}.toml"
        fd.run(file, overrides=changes, out=folder, resume=folder.exists())
    return tuple(json.loads(path.read_text()) for path in (folder / "summary.json", beside))


def table(found: Mapping[tuple[str, float], Sequence[tuple[Summary, Summary]]]) -> Iterator[str]:
    """A line for each setting; AUC where there are two classes, else accuracy."""
    yield "| setting | epsilon | spent | student | without privacy | clients | noise | seeds |"
    yield "|---|---|---|---|---|---|---|---|"
    for (name, epsilon), runs in found.items():
        two = runs[0][0]["student_auc"] is not None
        key, unit = ("student_auc", "AUC") if two else ("student_accuracy", "accuracy")
        clients = "client_auc_mean" if two else "client_accuracy_mean"
        spent = max(private["epsilon_max"] for private, _ in runs)
        noise = {round(s["sigma"], 2) for s in runs[0][0]["privacy"]["sites"].values()}
        yield (
            f"| {name}, {unit} | {epsilon:g} | {spent:.2f} "
            f"| **{spread([private[key] for private, _ in runs])}** "
            f"| {spread([open_[key] for _, open_ in runs])} "
            f"| {spread([private[clients] for private, _ in runs])} "
            f"| {', '.join(f'{sigma:g}' for sigma in sorted(noise))} | {len(runs)} |"
        )


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in points."""
    mean = 100 * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    given = parse(words)
    found: dict[tuple[str, float], list[tuple[Summary, Summary]]] = {}
    for name in given.only:
        for epsilon in EPSILONS[name]:
            for seed in given.seeds:
                result = run(name, epsilon, seed, given.out)
                found.setdefault((name, epsilon), []).append(result)
                print(f"{name}, epsilon {epsilon:g}, seed {seed}: done", flush=True)
    text = "\n".join(table(found)) + "\n"
    (given.out / "private.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
