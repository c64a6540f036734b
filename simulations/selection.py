"""Which runs a table consists of, from the command line, and how each of them stands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from readout import lines_of, read_json

from fedistill import config
from fedistill.catalog import known
from fedistill.data.files import data_root
from fedistill.errors import DataError, Problem, SettingsError, did_you_mean
from fedistill.presets import METHODS, method
from fedistill.settings import Settings

ALONE = ("evaluation.repeats=1", "evaluation.baselines=[]", "evaluation.leave_one_out=false")
"""Every run is one federation: seeds and baselines are runs of their own."""
VALUED = {"dirichlet": "alpha", "shards": "classes_per_client"}
"""Partitions whose strength a split names: ``dirichlet:0.1``, ``shards:2``."""
METHOD = "method.json"
"""In a run folder: what the method was, so that a preset that changed is noticed."""


@dataclass(frozen=True)
class Job:
    """One run of a table.

    Attributes:
        key: its place in the table: method, split and seed, for instance.
        settings: everything it is run with.
        folder: its run folder.
    """

    key: tuple[str, ...]
    settings: Settings
    folder: Path

    @property
    def words(self) -> str:
        """What it is called in messages."""
        return ", ".join(self.key)


# --- the command line ----------------------------------------------------------------------------


def arguments(
    description: str, settings: Path
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """What all comparisons can be told; and the group of what is run, for what only some can."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--settings", type=Path, default=settings, metavar="FILE", help=f"default: {settings.name}"
    )
    what.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting in all runs; may be repeated",
    )
    what.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME",
        help="how rows are dealt: a name in the file of row numbers, dirichlet:0.1, shards:2, iid",
    )
    what.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2"
    )
    what.add_argument("--rounds", type=int, metavar="N", help="default: as the settings say")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="runs at a time, each a process of one thread (default: one per core, %(default)s)",
    )
    how.add_argument("--only-finished", action="store_true", help="run nothing, show what is there")
    how.add_argument("--out", type=Path, metavar="DIR", help="default: a folder under runs/")
    how.add_argument(
        "--readme",
        nargs="?",
        type=Path,
        const=Path(__file__).with_name("README.md"),
        metavar="FILE",
        help="also put the tables between their markers in a page (default: README.md here)",
    )
    return parser, what


def check_arguments(given: argparse.Namespace, decided: Mapping[str, str]) -> None:
    """Refuse numbers out of range, and ``--set`` of what the table itself decides.

    What a list names twice is taken once.

    Args:
        given: the arguments.
        decided: from a key of the settings to the option that decides it here.
    """
    for name, value in vars(given).items():
        if isinstance(value, list) and name != "changes":
            setattr(given, name, [*dict.fromkeys(value)])
    problems = [
        Problem(f"--set {key}", f"is decided by the table: use {decided[key]}")
        for change in given.changes
        if (key := change.partition("=")[0].strip()) in decided
    ]
    for name in ("workers", "rounds"):
        value = getattr(given, name)
        if value is not None and value < 1:
            problems.append(Problem(f"--{name}", f"expected 1 or more, found {value}"))
    if problems:
        raise SettingsError(problems, "command line")


def check_methods(names: Sequence[str]) -> None:
    """Refuse names that are no methods.

    Raises:
        SettingsError: all of them at once.
    """
    problems = [
        Problem("methods", f'unknown method "{name}"{did_you_mean(name, METHODS)}')
        for name in names
        if name not in METHODS
    ]
    if problems:
        raise SettingsError(problems, "command line")


def own_splits(settings: Settings) -> list[str]:
    """The splits that a settings file offers: those in its file of row numbers, else its own."""
    clients = settings.clients
    if clients.partition == "file":
        path = next((p for p in _places(clients.partition_path) if p.is_file()), None)
        if path is None:
            raise DataError(
                f"clients.partition_path: expected an npz file at {clients.partition_path}, found "
                "none: set FEDISTILL_DATA, or name the splits with --splits"
            )
        with np.load(path, allow_pickle=False) as arrays:
            return [*dict.fromkeys(n.rpartition("_")[0] for n in arrays.files if n != "public")]
    value = VALUED.get(clients.partition)
    return [f"{clients.partition}:{getattr(clients, value):g}" if value else clients.partition]


def split_changes(settings: Settings, split: str) -> list[str]:
    """What a split changes in the settings.

    Raises:
        SettingsError: neither in the file of row numbers nor a partition.
    """
    kind, _, value = split.partition(":")
    if settings.clients.partition == "file":
        at_hand = any(place.is_file() for place in _places(settings.clients.partition_path))
        names = own_splits(settings) if at_hand else [split]
        if split in names:
            return [f"clients.partition_key={split}"]
        if kind not in known("partitions"):
            near = did_you_mean(split, [*names, *known("partitions")])
            raise SettingsError([Problem("--splits", f'unknown split "{split}"{near}')])
    changes = [f"clients.partition={kind}"]
    if value and kind not in VALUED:
        text = f'expected "{kind}" without a value, found "{split}"'
        raise SettingsError([Problem("--splits", text)])
    return [*changes, f"clients.{VALUED[kind]}={value}"] if value else changes


def job(given: argparse.Namespace, key: Sequence[str], changes: Sequence[str], name: str) -> Job:
    """One run of the settings file, with what differs; ``name`` is that of its folder.

    Raises:
        SettingsError: the settings with the changes cannot be.
    """
    rounds = [f"rounds={given.rounds}"] if given.rounds else []
    settings = config.load(given.settings, [*ALONE, *given.changes, *rounds, *changes])
    return Job(tuple(key), settings, given.out / name.replace(":", "-"))


def _places(path: str) -> tuple[Path, Path]:
    return Path(path), data_root("") / path


# --- how a run stands ----------------------------------------------------------------------------


def standing(job: Job) -> str:
    """``done``, ``open`` (not yet begun, or interrupted), or a sentence why it cannot be used."""
    folder = job.folder
    if not (folder / "config.toml").exists():
        return "open"
    hint = f"remove {folder} to run it again, or choose another folder with --out"
    try:
        before = config.load(folder / "config.toml")
    except SettingsError:
        return f"its settings cannot be read any more: {hint}"
    changed = [
        item.name
        for item in dataclasses.fields(Settings)
        if item.name != "rounds" and getattr(before, item.name) != getattr(job.settings, item.name)
    ]
    if changed:
        return f"was run with other settings ({', '.join(changed)}): {hint}"
    found = read_json(folder / METHOD)
    if found and found != told(job.settings):
        return f"was run when its method was another one: {hint}"
    rows, rounds = len(lines_of(folder)), job.settings.rounds
    whole = read_json(folder / "summary.json").get("status") == "done" and rows >= rounds
    return "done" if whole or rows > rounds else "open"


def told(settings: Settings) -> dict[str, Any]:
    """The method as JSON: what differs from a method that leaves everything open."""
    changes = {
        item.name: value
        for item in dataclasses.fields(settings.method)
        if item.name != "preset" and (value := getattr(settings.method, item.name)) is not None
    }
    chosen = method(settings.method.preset, **changes)
    fields = {
        item.name: getattr(chosen, item.name)
        for item in dataclasses.fields(chosen)
        if item.name not in {"summary", "paper", "formula", "deviations"}
        and getattr(chosen, item.name) != item.default
    }
    as_json: dict[str, Any] = json.loads(json.dumps(fields, default=dict, sort_keys=True))
    return as_json
