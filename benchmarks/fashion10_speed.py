"""The whole of a simulation now and in an earlier version: processor time and accuracy.

`FEDISTILL_DATA=... python benchmarks/fashion10_speed.py EARLIER` runs `simulations/fashion10.toml`
with the code of this checkout and with that of another one in turn, each in a process of its own,
and prints a JSON line for each seed: `times_earlier`, how often the processor time of this one goes
into that of the other (children, imports and reading of the data included; the fastest turn of
each), and the accuracy that the server's student and the clients end with. EARLIER is a folder,
such as `git worktree add EARLIER 1d3144f` makes: the first version that ran this simulation from
end to end. Ten rounds take some minutes for each turn and version.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SIMULATION = "simulations/fashion10.toml"


def run(code: Path, rows: Path, seed: int, rounds: int, options: list[str]) -> dict[str, Any]:
    """One run by the code of a checkout: seconds of processor time, and the last round's line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "fedistill.cli", "run", SIMULATION, "--out", str(out)]
        command += ["--seed", str(seed), "--rounds", str(rounds)]
        command += ["--set", f"clients.partition_path={rows}", *options]
        environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=code, env=environment, check=True, stdout=subprocess.DEVNULL)
        last = (out / "rounds.jsonl").read_text().splitlines()[-1]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # The line has a "seconds" of its own: how long the last round took.
    return json.loads(last) | {"seconds": spent}


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("earlier", type=Path, help="folder of the other checkout")
    parser.add_argument("--rows", type=Path, default=HERE / "bench/fashion10.npz")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--backend", default="serial", help="of this checkout")
    asked = parser.parse_args()
    if not asked.rows.is_file():
        parser.error(f"no file of row numbers at {asked.rows}: give its path by --rows")
    versions = {
        "earlier": (asked.earlier.resolve(), []),
        "now": (HERE, ["--backend", asked.backend]),
    }
    for seed in map(int, asked.seeds.split(",")):
        best: dict[str, dict[str, Any]] = {}
        for _ in range(asked.turns):
            for name, (code, options) in versions.items():
                found = run(code, asked.rows.resolve(), seed, asked.rounds, options)
                if name not in best or found["seconds"] < best[name]["seconds"]:
                    best[name] = found
        line = {
            "seed": seed,
            "rounds": asked.rounds,
            "backend": asked.backend,
            "times_earlier": round(best["earlier"]["seconds"] / best["now"]["seconds"], 2),
            **{
                f"{who}_{name}": round(found[key], 4)
                for name, found in best.items()
                for who, key in (
                    ("seconds", "seconds"),
                    ("student", "student_accuracy"),
                    ("clients", "client_accuracy_mean"),
                )
            },
            "load": round(os.getloadavg()[0], 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
