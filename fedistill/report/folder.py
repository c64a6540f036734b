"""A run folder, read back: strict about what is binding, patient about what is absent."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedistill.errors import FedistillError, RunError
from fedistill.report.words import clean, number

NUMBERS = (
    "student_accuracy",
    "client_accuracy_mean",
    "client_accuracy_min",
    "bytes_up",
    "bytes_down",
    "clients_ok",
    "clients_failed",
    "epsilon_max",
    "seconds",
)
"""The keys of a round that are binding; each holds a number or null, or is left out."""


class Point(NamedTuple):
    """One value of a curve, with its deviation where a run was repeated."""

    x: float
    y: float
    sd: float | None = None


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        path: the folder.
        rounds: the lines of rounds.jsonl, in order, each round once.
        summary: summary.json; empty when the run was cut short before writing it.
        config: config.toml as nested tables.
        stream: the lines of stream.jsonl, in order; empty when the run was no stream.
        baselines: name to the run in ``baselines/NAME``.
        repeats: the runs in ``seed-N``.
        remarks: sentences on what was absent or unreadable.
    """

    path: Path
    rounds: tuple[Mapping[str, Any], ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    stream: tuple[Mapping[str, Any], ...] = ()
    baselines: Mapping[str, Run] = field(default_factory=dict)
    repeats: tuple[Run, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the run calls itself, else the name of its folder."""
        return self.text("name") or clean(self.path.resolve().name)

    @property
    def method(self) -> str:
        """The method's preset name, or an empty text."""
        return self.text("method") or clean(self.setting("method", "preset") or "")

    @property
    def mechanism(self) -> str:
        """The privacy mechanism by name; ``none`` where none is named."""
        table = self.table("privacy")
        return clean(table.get("mechanism") or self.setting("privacy", "mechanism") or "none", 40)

    def text(self, key: str, cap: int = 60) -> str:
        """A text of the summary, cleaned, or an empty one."""
        value = self.summary.get(key)
        return clean(value, cap) if isinstance(value, str) else ""

    def figure(self, key: str) -> float | None:
        """A number of the summary, else the last one in the rounds, else None."""
        if (found := number(self.summary.get(key))) is not None:
            return found
        values = (number(row.get(key)) for row in reversed(self.rounds))
        return next((value for value in values if value is not None), None)

    def curve(self, key: str) -> tuple[Point, ...]:
        """The values of one key over the rounds, those that are there."""
        return tuple(
            Point(float(row["round"]), value, number(row.get(f"{key}_sd")))
            for row in self.rounds
            if (value := number(row.get(key))) is not None
        )

    def total(self, *keys: str) -> float:
        """The sum of some keys over all rounds."""
        return sum(number(row.get(key)) or 0 for row in self.rounds for key in keys)

    def setting(self, *path: str) -> Any:
        """A value of config.toml, or None."""
        found: Any = self.config
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def table(self, key: str) -> Mapping[str, Any]:
        """A table of the summary; empty when it is absent."""
        value = self.summary.get(key)
        return value if isinstance(value, Mapping) else {}


def read_run(path: str | Path) -> Run:
    """Read a run folder with its baselines and repeats.

    Raises:
        RunError: no folder, no rounds.jsonl in it, or a file whose content is not a run's.
    """
    folder = Path(path)
    run = _read_alone(folder)
    remarks = list(run.remarks)
    baselines = _read_many(sorted((folder / "baselines").glob("*/")), remarks)
    repeats = _read_many(sorted(folder.glob("seed-*/"), key=_seed), remarks)
    return Run(
        path=folder,
        rounds=run.rounds,
        summary=run.summary,
        config=run.config,
        stream=run.stream,
        baselines=baselines,
        repeats=tuple(repeats.values()),
        remarks=tuple(remarks),
    )


def _read_alone(folder: Path) -> Run:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise RunError(
            f"expected a run folder, found {found}: {folder}; name the folder that "
            f"'fedistill run --out' wrote"
        )
    if not (folder / "rounds.jsonl").is_file():
        names = ", ".join(sorted(clean(item.name, 24) for item in folder.iterdir())[:4])
        raise RunError(
            f"expected rounds.jsonl in {folder}, found {names or 'an empty folder'}: name the "
            f"folder that 'fedistill run --out' wrote"
        )
    remarks: list[str] = []
    rounds = _read_lines(folder / "rounds.jsonl", "round", NUMBERS, remarks)
    stream = folder / "stream.jsonl"
    return Run(
        path=folder,
        rounds=rounds,
        summary=_read_summary(folder / "summary.json", remarks),
        config=_read_config(folder / "config.toml", remarks),
        stream=_read_lines(stream, "experience", (), remarks) if stream.is_file() else (),
        remarks=tuple(remarks),
    )


def _read_many(folders: list[Path], remarks: list[str]) -> dict[str, Run]:
    """The runs in some sub-folders; one that cannot be read becomes a remark."""
    runs: dict[str, Run] = {}
    for folder in folders:
        try:
            runs[clean(folder.name, 32)] = _read_alone(folder)
        except FedistillError as error:
            remarks.append(f"{clean(folder.name, 32)} is left out: {clean(error, 200)}")
    return runs


def _seed(folder: Path) -> tuple[int, str]:
    digits = folder.name.removeprefix("seed-")
    return (int(digits) if digits.isdecimal() else 0, folder.name)


def _read_lines(
    path: Path, key: str, numbers: Sequence[str], remarks: list[str]
) -> tuple[Mapping[str, Any], ...]:
    """Lines of JSON objects, each counted by ``key``; of two with one count the later holds."""
    lines = _read_text(path).splitlines()
    rows: dict[int, Mapping[str, Any]] = {}
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if place == len(lines):
                remarks.append(f"The last line of {path.name} was cut short and is left out.")
                continue
            raise _bad_line(path, place, "a JSON object", clean(line, 40)) from None
        _check_row(row, key, numbers, path, place)
        rows[row[key]] = row
    return tuple(rows[count] for count in sorted(rows))


def _check_row(row: Any, key: str, numbers: Sequence[str], path: Path, place: int) -> None:
    if not isinstance(row, dict):
        raise _bad_line(path, place, "a JSON object", type(row).__name__)
    if type(row.get(key)) is not int or row[key] < 0:
        raise _bad_line(path, place, f"a whole number '{key}'", clean(row.get(key), 40))
    for name in numbers:
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise _bad_line(path, place, f"a number or null as '{name}'", clean(value, 40))


def _bad_line(path: Path, place: int, expected: str, found: str) -> RunError:
    return RunError(
        f"{path} line {place}: expected {expected}, found {found}: take the file from the run again"
    )


def _read_summary(path: Path, remarks: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        remarks.append("There is no summary.json: the run has not ended, or was cut short.")
        return {}
    try:
        summary = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise RunError(
            f"{path}: expected JSON, found a fault in line {error.lineno}: "
            "take the file from the run again"
        ) from None
    if not isinstance(summary, dict):
        raise RunError(
            f"{path}: expected a JSON object, found {type(summary).__name__}: "
            "take the file from the run again"
        )
    return summary


def _read_config(path: Path, remarks: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        remarks.append("There is no config.toml: the settings are unknown.")
        return {}
    try:
        return tomllib.loads(_read_text(path))
    except tomllib.TOMLDecodeError as error:
        remarks.append(f"config.toml cannot be read: {clean(error, 120)}.")
        return {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path}: expected a readable UTF-8 file, found {type(error).__name__}: "
            "check its permissions, or take it from the run again"
        ) from None
