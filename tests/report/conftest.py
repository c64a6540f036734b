"""Synthetic run folders: everything a run may write, and any part of it left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]

CONFIG = """\
seed = 7
rounds = {rounds}

[data]
source = "csv:heart.csv"
label = -1
drop = ["id", "note"]

[proxy]
rows = 400

[clients]
count = {clients}
partition = "{partition}"
alpha = 0.3
column = "hospital"

[[clients.group]]
count = 3
model = "gradient-boosting"

[method]
preset = "{method}"

[student]
width = 128
"""


def course(number: int, rounds: int, low: float, high: float) -> float:
    """A learning curve with a little unrest, the same in every process."""
    climb = 1 - math.exp(-4 * number / max(rounds, 1))
    return low + (high - low) * climb + 0.006 * math.sin(2.3 * number)


def round_row(
    number: int, rounds: int, names: list[str], student: float, *, sd: bool, binary: bool
) -> dict[str, Any]:
    """One line of rounds.jsonl."""
    each = {
        name: round(course(number, rounds, 0.5, student - 0.03 * (k % 4)), 4)
        for k, name in enumerate(names)
    }
    late = number % 7 == 3 and len(names) > 2
    ok = len(names) - late
    row: dict[str, Any] = {
        "round": number,
        "student_accuracy": round(course(number, rounds, 0.35, student), 4),
        "client_accuracy_mean": sum(each.values()) / len(each),
        "client_accuracy_min": min(each.values()),
        "bytes_up": 412 * ok,
        "bytes_down": 1610 * len(names),
        "clients_ok": ok,
        "clients_failed": int(late),
        "epsilon_max": None,
        "seconds": 0.82,
        "client_accuracy": each,
        "student_auc": round(course(number, rounds, 0.6, 0.93), 4) if binary else None,
        "client_auc_mean": round(course(number, rounds, 0.6, 0.9), 4) if binary else None,
        "agreement": round(course(number, rounds, 0.6, 0.95), 4),
        "target_entropy": round(course(number, rounds, 0.65 if binary else 1.9, 0.3), 4),
        "dropped": {names[-1]: "late"} if late else {},
        "flags": {names[0]: ["single-class"]} if number <= 2 else {},
    }
    if sd:
        row |= {f"{key}_sd": 0.018 for key in ("student_accuracy", "client_accuracy_mean")}
    return row


def site(k: int, student: float, *, binary: bool, left_out: bool) -> dict[str, Any]:
    """What summary.json says of one site."""
    first, end = 0.58 + 0.03 * (k % 4), student - 0.03 * (k % 4)
    columns = {
        "first round": first,
        "client": end,
        "student": student - 0.01 * (k % 3),
        "local": end - 0.03 + 0.02 * (k % 3),
        "centralised": student + 0.015,
    }
    if left_out:
        columns |= {"left-out student": end - 0.025, "best single other": end - 0.06}
    return {
        "rows": 140 + 37 * k,
        "model": "gradient-boosting" if k < 3 else "mlp 64",
        "classes_seen": 2 if binary else 4 + k % 6,
        "figures": {
            name: {
                "accuracy": round(value, 4),
                "auc": round(min(0.99, value + 0.04), 4) if binary else None,
            }
            for name, value in columns.items()
        },
    }


def summary_of(rows: list[dict[str, Any]], names: list[str], **more: Any) -> dict[str, Any]:
    """A summary.json to go with the rounds."""
    last = rows[-1] if rows else {}
    fedavg = more.pop("fedavg", 85_544)
    return (
        last
        | {
            "name": "heart-four-hospitals",
            "method": "fedistill",
            "method_summary": "Distribution-weighted soft targets, one byte per class.",
            "rounds": len(rows),
            "clients": len(names),
            "classes": ["healthy", "ill"],
            "proxy_rows": 400,
            "proxy_per_round": 200,
            "codec": "u8",
            "rule": "distribution-weighted",
            "bytes_up_per_client_round": 412.0,
            "bytes_down_per_client_round": 1610.0,
            "fedavg_bytes_per_client_round": fedavg,
            "bytes_saving": 2 * fedavg / (412 + 1610),
            "privacy": {"mechanism": "none", "statement": "no differential privacy"},
            "backend": "serial",
            "seed": 7,
            "proxy_sha256": "3f" * 32,
            "soft_targets_sha256": "a9" * 32,
            "versions": {
                "fedistill": "0.1.0",
                "numpy": "2.4.1",
                "python": "3.11.9",
                "torch": "2.13.0",
            },
            "status": "done",
            "notes": ["Two of the sites hold one class only."],
        }
        | more
    )


def write_run(
    folder: Path,
    /,
    *,
    rounds: int = 12,
    names: Iterable[str] | None = None,
    student: float = 0.9,
    binary: bool = True,
    left_out: bool = False,
    baselines: Iterable[str] = ("local", "fedavg"),
    seeds: int = 0,
    partition: str = "by-column",
    method: str = "fedistill",
    **summary: Any,
) -> Path:
    """Write a whole run folder; further names replace keys of summary.json."""
    ids = list(names if names is not None else (f"site-{k}" for k in range(8)))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        round_row(n, rounds, ids, student, sd=seeds > 0, binary=binary)
        for n in range(1, rounds + 1)
    ]
    sites = {name: site(k, student, binary=binary, left_out=left_out) for k, name in enumerate(ids)}
    told = summary_of(rows, ids, **{"method": method, "sites": sites} | summary)
    if seeds:
        told["student_accuracy_sd"] = 0.018
        for one in sites.values():
            for figures in one["figures"].values():
                figures["accuracy_sd"] = 0.021
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(told))
    (folder / "config.toml").write_text(
        CONFIG.format(rounds=rounds, clients=len(ids), partition=partition, method=method)
    )
    for k, name in enumerate(baselines):
        write_run(
            folder / "baselines" / name,
            rounds=1 if name == "centralised" else rounds,
            names=ids,
            student=student - 0.04 + 0.03 * k,
            binary=binary,
            baselines=(),
            method=name,
        )
    for seed in range(seeds):
        write_run(
            folder / f"seed-{seed}",
            rounds=rounds,
            names=ids,
            student=student,
            binary=binary,
            baselines=(),
            seed=seed,
        )
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A builder: ``make_run("name", rounds=5, ...)`` writes a run folder and returns its path."""

    def build(folder: str = "run", /, **settings: Any) -> Path:
        return write_run(tmp_path / folder, **settings)

    return build
