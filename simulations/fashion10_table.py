"""The fashion10 table: methods x splits x seeds, as Markdown.

    python simulations/fashion10_table.py --methods fedistill --splits dir01 iid --seeds 0 1

Finished runs are kept and not run again, so an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import fedistill as fd

HERE = Path(__file__).parent
SPLITS = ["dir01", "dir05", "two_class", "one_class", "iid"]


def summary_of(
    method: str, split: str, seed: int, out: Path, *, only_finished: bool
) -> dict | None:
    """The summary of one run, run now unless it is finished; None if it may not be run."""
    folder = out / f"{method}-{split}-{seed}"
    done = folder / "summary.json"
    if done.exists() and (found := json.loads(done.read_text())).get("status") == "done":
        return found
    if only_finished:
        return None
    changes = [f"method.preset={method}", f"clients.partition_key={split}", f"seed={seed}"]
    resume = (folder / "config.toml").exists()
    return fd.run(HERE / "fashion10.toml", overrides=changes, out=folder, resume=resume)


def cell(summaries: list[dict], key: str) -> str:
    """Mean and standard deviation over seeds, in percent; a dash without runs."""
    values = [100 * summary[key] for summary in summaries if summary.get(key) is not None]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({len(values)})"


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/fashion10"))
    parser.add_argument("--methods", nargs="+", default=["ds-fl", "fedavg", "fedistill"])
    parser.add_argument("--splits", nargs="+", default=SPLITS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only-finished", action="store_true", help="print, run nothing")
    given = parser.parse_args()
    found = {
        (method, split): [
            summary
            for seed in given.seeds
            if (
                summary := summary_of(
                    method, split, seed, given.out, only_finished=given.only_finished
                )
            )
        ]
        for method in given.methods
        for split in given.splits
    }
    for title, key in (
        ("student", "student_accuracy"),
        ("clients' own mean", "client_accuracy_mean"),
    ):
        print(f"\n{title}, % of the test rows: mean ± sd over seeds (number of seeds)\n")
        print("| method |", " | ".join(given.splits), "| upload per client-round |")
        print("|---|" + "---|" * (len(given.splits) + 1))
        for method in given.methods:
            cells = [cell(found[method, split], key) for split in given.splits]
            some = [s for split in given.splits for s in found[method, split]]
            sent = [s["bytes_up_per_client_round"] for s in some]
            upload = f"{statistics.mean(sent):,.0f} B" if sent else "–"
            print(f"| {method} |", " | ".join(cells), f"| {upload} |")


if __name__ == "__main__":
    main()
