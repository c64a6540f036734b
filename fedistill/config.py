"""Settings: frozen dataclasses that are read from TOML and written back to it.

Each field carries its own documentation, range and choices; reading, checking, ``fedistill new``
and the settings page of the docs are all derived from them. A file is judged as a whole: every
problem is reported at once, with its line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedistill import catalog
from fedistill.errors import Problem, SettingsError, did_you_mean

OPTIMIZERS = ("sgd", "adam", "adamw")
SCALES = ("auto", "standard", "centred", "unit", "none")


def setting(
    default: Any,
    doc: str,
    *,
    choices: str | Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A field with its meaning and its limits.

    Args:
        default: the value when the file is silent.
        doc: one sentence, shown by ``fedistill new`` and in the docs.
        choices: a kind of ``fedistill.catalog``, or the allowed words.
        low: smallest value, itself allowed.
        high: largest value, itself allowed.
        above: smallest value, itself not allowed.
    """
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above}
    if isinstance(default, type) or callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the rows come from and how they are read."""

    source: str = setting(
        "digits", "digits, breast-cancer, idx:, csv:, npz:, parquet:, hf: or openml: and a name"
    )
    path: str = setting("", "data root for file sources; empty: $FEDISTILL_DATA, else .")
    test: str = setting("", "source of the test rows; empty: a share of the rows is held out")
    test_rows: int | float = setting(
        0.2, "held-out test rows: a count, or a share of each site below 1", above=0
    )
    label: str = setting(
        "label", "csv and parquet: name or number (-1 is last) of the label column"
    )
    header: bool = setting(True, "csv: the first line names the columns")
    separator: str = setting(",", "csv: what separates the columns")
    missing: str = setting(
        "?", "csv: the text that stands for a missing value, beside the empty one"
    )
    zero_missing: tuple[str, ...] = setting(
        (), "names or numbers of columns in which 0 stands for a missing value"
    )
    categorical: tuple[str, ...] = setting(
        (), "names or numbers of columns whose numbers are codes: a 0/1 column for each"
    )
    indicators: float = setting(
        1.0,
        "add a 0/1 column for columns missing in more than this share of the public rows; "
        "1: for none",
        low=0,
        high=1,
    )
    drop: tuple[str, ...] = setting((), "csv and parquet: names or numbers of columns to leave out")
    positive_above: float | None = setting(
        None, "make two classes: 1 where the label is above this number"
    )
    scale: str = setting(
        "auto",
        "standard (mean 0, deviation 1), centred ([0,255] to [-1,1]), unit (largest is 1), none; "
        "statistics from public rows only; auto: standard for tables, centred for images",
        choices=SCALES,
    )


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """The public rows on which clients share predictions."""

    rows: int = setting(400, "proxy rows, drawn from the seed", low=1)
    per_round: int = setting(0, "rows asked in a round; 0: all of them", low=0)
    path: str = setting(
        "", "source of the proxy rows, as in [data] source; empty: drawn from the data"
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a model is built and trained."""

    model: str = setting("mlp", "the kind of model", choices="models")
    width: int = setting(64, "hidden units, or channels of a cnn", low=1)
    depth: int = setting(1, "hidden layers of an mlp", low=1, high=64)
    epochs: int = setting(2, "passes over the own rows in a round", low=0)
    batch_size: int = setting(50, "rows in a step", low=1)
    lr: float = setting(0.1, "learning rate", above=0)
    optimizer: str = setting("sgd", "the optimizer", choices=OPTIMIZERS)
    momentum: float = setting(0.0, "momentum of sgd", low=0, high=1)
    weight_decay: float = setting(0.0, "weight decay", low=0)
    clip: float = setting(5.0, "largest gradient norm; 0: not clipped", low=0)


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """Clients of another kind; what is not set here comes from [clients]."""

    count: int = setting(0, "how many of the clients, in order; 0: those named in sites", low=0)
    sites: tuple[str, ...] = setting((), "the clients by id")
    model: str | None = setting(None, "the kind of model", choices="models")
    width: int | None = setting(None, "hidden units, or channels of a cnn", low=1)
    depth: int | None = setting(None, "hidden layers of an mlp", low=1, high=64)
    epochs: int | None = setting(None, "passes over the own rows in a round", low=0)
    batch_size: int | None = setting(None, "rows in a step", low=1)
    lr: float | None = setting(None, "learning rate", above=0)
    optimizer: str | None = setting(None, "the optimizer", choices=OPTIMIZERS)
    momentum: float | None = setting(None, "momentum of sgd", low=0, high=1)
    weight_decay: float | None = setting(None, "weight decay", low=0)
    clip: float | None = setting(None, "largest gradient norm; 0: not clipped", low=0)


@dataclass(frozen=True, kw_only=True)
class ClientsSettings(TrainSettings):
    """Who takes part, which rows each holds, and how each trains."""

    count: int = setting(8, "clients; by column: as many as the column has values", low=1)
    partition: str = setting("dirichlet", "how rows are dealt to clients", choices="partitions")
    alpha: float = setting(0.3, "dirichlet: the smaller, the more unequal the classes", above=0)
    classes_per_client: int = setting(2, "shards: shards dealt to each client", low=1)
    column: str = setting("", "by-column: the column whose values are the sites; csv: also 'file'")
    partition_path: str = setting("", "file: an npz with arrays of row numbers")
    partition_key: str = setting("", "file: arrays are KEY_0 ... KEY_{n-1}, and 'public'")
    labelled: int | float = setting(
        0, "labelled rows of a client: a count, or a share below 1; 0: all", low=0
    )
    participation: float = setting(1.0, "share of the clients asked in a round", above=0, high=1)
    quorum: int = setting(0, "fewest usable uploads of a round; 0: 3, or all if fewer", low=0)
    group: tuple[GroupSettings, ...] = setting((), "clients of other kinds")


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """A preset, and what differs from it."""

    preset: str = setting("fedistill", "the method", choices="methods")
    rule: str | None = setting(None, "how predictions become soft targets", choices="rules")
    codec: str | None = setting(None, "how predictions become bytes", choices="codecs")
    sharpen: str | None = setting(None, "after the rule: none, era:TEMPERATURE or power:EXPONENT")
    temperature: float | None = setting(None, "temperature of the distillation loss", above=0)
    distil: str | None = setting(
        None,
        "clients distil inside the local steps, in a phase before them, or never",
        choices=("inside", "phase", "never"),
    )
    distil_epochs: int | None = setting(None, "epochs of a distillation phase", low=1)
    soft_weight: float | None = setting(None, "weight of the soft part inside local steps", low=0)
    prior_rows: float | None = setting(
        None, "distribution-weighted: rows a client's familiarity must outweigh", low=0
    )


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """The server's student, taught by soft targets alone; what is not set, the method decides."""

    model: str | None = setting(
        None, "the kind of model; not set: that of [clients]", choices="models"
    )
    width: int = setting(128, "hidden units, or channels of a cnn", low=1)
    depth: int = setting(1, "hidden layers of an mlp", low=1, high=64)
    epochs: int | None = setting(None, "passes over the soft targets in a round", low=0)
    batch_size: int | None = setting(None, "rows in a step", low=1)
    lr: float | None = setting(None, "learning rate", above=0)
    optimizer: str | None = setting(None, "the optimizer", choices=OPTIMIZERS)
    momentum: float | None = setting(None, "momentum of sgd", low=0, high=1)
    weight_decay: float | None = setting(None, "weight decay", low=0)
    clip: float | None = setting(None, "largest gradient norm; 0: not clipped", low=0)


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Differential privacy of what a client shares."""

    mechanism: str = setting("none", "how predictions are made private", choices="mechanisms")


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """What runs the clients."""

    name: str = setting("serial", "the backend", choices="backends")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one")
    threads: int = setting(1, "torch threads of a worker", low=1)
    max_message_mb: float = setting(64.0, "largest message accepted, in MiB", above=0)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What the run is measured against; all of it lands in the report's per-site table."""

    baselines: tuple[str, ...] = setting((), "methods run on the same rows for comparison")
    leave_one_out: bool = setting(False, "also federate without each client and test on its rows")
    every: int = setting(
        1, "rounds between measurements of the clients; the last round always is", low=1
    )
    repeats: int = setting(1, "seeds, counted up from seed; figures are mean and deviation", low=1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole experiment."""

    seed: int = setting(7, "everything random is derived from it", low=0)
    rounds: int = setting(10, "rounds of exchange", low=1)
    data: DataSettings = setting(DataSettings, "")
    proxy: ProxySettings = setting(ProxySettings, "")
    clients: ClientsSettings = setting(ClientsSettings, "")
    method: MethodSettings = setting(MethodSettings, "")
    student: StudentSettings = setting(StudentSettings, "")
    privacy: PrivacySettings = setting(PrivacySettings, "")
    backend: BackendSettings = setting(BackendSettings, "")
    evaluation: EvaluationSettings = setting(EvaluationSettings, "")


# --- reading -----------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a settings file, apply ``key=value`` overrides, report all problems at once.

    Raises:
        SettingsError: unreadable file, TOML that does not parse, unknown keys, wrong types,
            impossible values; each problem with its line and the nearest known key.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "expected a settings file, found none: fedistill new FILE.toml writes one"
        raise SettingsError([Problem(str(path), hint)], "settings") from None
    except (OSError, UnicodeDecodeError) as error:
        hint = f"expected a readable UTF-8 text file ({type(error).__name__})"
        raise SettingsError([Problem(str(path), hint)], "settings") from None
    return parse(text, overrides, source=str(path))


def parse(text: str, overrides: Sequence[str] = (), source: str = "settings") -> Settings:
    """As :func:`load`, from the text of the file."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        line = int(found[1]) if found else None
        raise SettingsError([Problem("TOML", f"cannot be read: {error}", line)], source) from None
    lines = key_lines(text)
    problems: list[Problem] = []
    for override in overrides:
        apply_override(raw, override, problems)
    settings = read_table(Settings, raw, (), lines, problems)
    if settings is not None:
        problems.extend(contradictions(settings, lines))
    if problems:
        problems.sort(key=lambda problem: problem.line or 0)
        raise SettingsError(problems, source)
    assert isinstance(settings, Settings)
    return settings


Path_ = tuple[str | int, ...]


def key_lines(text: str) -> dict[Path_, int]:
    """Line number of each key of a TOML text; tables of an array are numbered from 0."""
    lines: dict[Path_, int] = {}
    counts: dict[Path_, int] = {}
    table: Path_ = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if found := re.match(r"\s*\[\[\s*([^\]]+?)\s*\]\]", line):
            name: Path_ = tuple(part.strip().strip("\"'") for part in found[1].split("."))
            table = (*name, counts.get(name, 0))
            counts[name] = counts.get(name, 0) + 1
            lines.setdefault(name, number)
            lines[table] = number
        elif found := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$", line):
            table = tuple(part.strip().strip("\"'") for part in found[1].split("."))
            lines.setdefault(table, number)
        elif found := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            key = tuple(part.strip("\"'") for part in found[1].split("."))
            lines.setdefault((*table, *key), number)
    return lines


def apply_override(raw: dict[str, Any], override: str, problems: list[Problem]) -> None:
    """Put ``a.b=value`` into the raw table; the value is TOML, or else a plain word."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        problems.append(Problem(override, "expected key=value, e.g. clients.alpha=0.1"))
        return
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *parents, last = key.strip().split(".")
    table: Any = raw
    for part in parents:
        if isinstance(table, list) and part.isdigit() and int(part) < len(table):
            table = table[int(part)]
        elif isinstance(table, dict):
            table = table.setdefault(part, {})
        else:
            break
    if not isinstance(table, dict):
        problems.append(Problem(key, "names no table of the settings"))
        return
    table[last] = parsed


def read_table(
    kind: type[Any],
    raw: Mapping[str, Any],
    path: Path_,
    lines: Mapping[Path_, int],
    problems: list[Problem],
) -> Any:
    """Build one settings dataclass from a raw table; problems are collected, not raised."""
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        here = (*path, key)
        line = lines.get(here) or lines.get(path)
        if key not in fields:
            problems.append(Problem(dotted(here), f"unknown key{_hint(key, path, fields)}", line))
            continue
        before = len(problems)
        converted = read_value(hints[key], value, here, lines, problems)
        if len(problems) == before:
            values[key] = converted
            if text := out_of_range(fields[key], converted):
                problems.append(Problem(dotted(here), text, line))
    return kind(**values)


def _hint(key: str, path: Path_, fields: Mapping[str, Any]) -> str:
    hint = did_you_mean(key, fields)
    if not path and hint.startswith("; known"):
        return "; known sections: " + ", ".join(fields)
    return hint


def read_value(
    hint: Any, value: Any, path: Path_, lines: Mapping[Path_, int], problems: list[Problem]
) -> Any:
    """One value, converted to the field's type, or a problem that names both types."""
    line = lines.get(path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return read_table(typing.cast(type[Any], hint), value, path, lines, problems)
        problems.append(Problem(dotted(path), f"expected a table, found {describe(value)}", line))
        return None
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, list):
            return tuple(
                read_value(item, entry, (*path, number), lines, problems)
                for number, entry in enumerate(value)
            )
        problems.append(Problem(dotted(path), f"expected a list, found {describe(value)}", line))
        return None
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is float and type(value) in (int, float) and int not in options:
            return float(value)
        if type(value) is option:
            return value
    names = " or ".join(WORDS[option] for option in options if option is not types.NoneType)
    line = line or lines.get(path[:-1])
    problems.append(Problem(dotted(path), f"expected {names}, found {describe(value)}", line))
    return None


WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def describe(value: Any) -> str:
    """A raw value as the message shows it: its kind, and the value if it is short."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a table"
    shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
    return f"{WORDS.get(type(value), type(value).__name__)} ({shown[:40]})"


def out_of_range(item: dataclasses.Field[Any], value: Any) -> str | None:
    """What is impossible about a value of the right type, or None."""
    limits = item.metadata
    if isinstance(limits.get("choices"), str | tuple) and isinstance(value, str):
        choices = limits["choices"]
        names = catalog.known(choices) if isinstance(choices, str) else choices
        if value not in names:
            return f'unknown value "{value}"{did_you_mean(value, names)}'
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            return f"expected a finite number, found {value}"
        low, high, above = limits.get("low"), limits.get("high"), limits.get("above")
        wanted = [
            f"above {above:g}" if above is not None else "",
            f"at least {low:g}" if low is not None else "",
            f"at most {high:g}" if high is not None else "",
        ]
        if (
            (above is not None and value <= above)
            or (low is not None and value < low)
            or (high is not None and value > high)
        ):
            return f"expected a number {' and '.join(filter(None, wanted))}, found {value}"
    return None


def contradictions(settings: Settings, lines: Mapping[Path_, int]) -> Iterator[Problem]:
    """Values that are possible alone and impossible together."""

    def problem(key: str, text: str) -> Problem:
        return Problem(key, text, lines.get(tuple(key.split("."))))

    clients, proxy, method = settings.clients, settings.proxy, settings.method
    if proxy.per_round > proxy.rows and clients.partition != "file":
        yield problem(
            "proxy.per_round",
            f"expected at most proxy.rows ({proxy.rows}), found {proxy.per_round}",
        )
    if clients.partition == "by-column" and not clients.column:
        yield problem("clients.column", "by-column needs the name of a column, found none")
    if clients.partition == "file" and not (clients.partition_path and clients.partition_key):
        yield problem(
            "clients.partition_path",
            "a file partition needs partition_path and partition_key, found neither or one",
        )
    if clients.partition != "by-column":
        if clients.quorum > clients.count:
            yield problem(
                "clients.quorum",
                f"expected at most clients.count ({clients.count}), found {clients.quorum}",
            )
        grouped = sum(group.count for group in clients.group)
        if grouped > clients.count:
            yield problem(
                "clients.group",
                f"the counts of the groups add up to {grouped}, "
                f"expected at most clients.count ({clients.count})",
            )
    for number, group in enumerate(clients.group):
        if bool(group.count) == bool(group.sites):
            yield Problem(
                f"clients.group.{number}",
                "expected count or sites, found " + ("both" if group.count else "neither"),
                lines.get(("clients", "group", number)),
            )
    if method.sharpen is not None and not re.fullmatch(
        r"none|(era|power):(\d+\.?\d*|\.\d+)", method.sharpen
    ):
        yield problem(
            "method.sharpen", f'expected none, era:0.1 or power:2, found "{method.sharpen}"'
        )
    for name in settings.evaluation.baselines:
        if name not in catalog.known("methods"):
            yield problem(
                "evaluation.baselines",
                f'unknown method "{name}"' + did_you_mean(name, catalog.known("methods")),
            )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", settings.backend.device):
        yield problem(
            "backend.device", f'expected auto, cpu or cuda, found "{settings.backend.device}"'
        )


def dotted(path: Path_) -> str:
    """``("clients", "group", 0, "lr")`` as ``clients.group.0.lr``."""
    return ".".join(str(part) for part in path)


# --- writing -----------------------------------------------------------------------------------


def to_toml(settings: Settings, comment: Callable[[str], str] | None = None) -> str:
    """The settings as TOML that reads back to an equal object.

    Args:
        settings: what to write.
        comment: from a field's documentation to a comment line above it, or None for bare TOML.
    """
    lines: list[str] = []
    write_table(settings, (), lines, comment)
    return "\n".join(lines).strip() + "\n"


def write_table(
    table: Any, path: tuple[str, ...], lines: list[str], comment: Callable[[str], str] | None
) -> None:
    """Append one dataclass as a TOML table: plain values first, then its sub-tables."""
    nested: list[tuple[str, Any]] = []
    for item in dataclasses.fields(table):
        value = getattr(table, item.name)
        if dataclasses.is_dataclass(value) or (
            isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])
        ):
            nested.append((item.name, value))
        elif value is not None and not (item.name == "group" and not value):
            if comment and item.metadata.get("doc"):
                lines.append(comment(_with_choices(item)))
            lines.append(f"{item.name} = {to_value(value)}")
    for name, value in nested:
        here = (*path, name)
        if isinstance(value, tuple):
            for entry in value:
                lines.extend(["", f"[[{'.'.join(here)}]]"])
                write_table(entry, here, lines, comment)
        else:
            lines.extend(["", f"[{'.'.join(here)}]"])
            if comment:
                lines.append(comment((type(value).__doc__ or "").split("\n")[0]))
            write_table(value, here, lines, comment)


def _with_choices(item: dataclasses.Field[Any]) -> str:
    doc, choices = str(item.metadata["doc"]), item.metadata.get("choices")
    if isinstance(choices, str):
        return f"{doc}: {', '.join(catalog.known(choices))}"
    return doc


def to_value(value: Any) -> str:
    """One TOML value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A TOML text is a JSON text, but for the one control character that JSON lets through.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(to_value(entry) for entry in value) + "]"
    return repr(value)


def client_settings(clients: ClientsSettings, ids: Sequence[str]) -> dict[str, TrainSettings]:
    """Resolve the groups: each client id with the training settings that hold for it.

    Raises:
        SettingsError: a group names a site that does not exist.
    """
    base = {item.name: getattr(clients, item.name) for item in dataclasses.fields(TrainSettings)}
    resolved = {name: TrainSettings(**base) for name in ids}
    named = {name for group in clients.group for name in group.sites}
    if unknown := sorted(named - set(ids)):
        text = f'no client "{unknown[0]}"{did_you_mean(unknown[0], ids)}'
        raise SettingsError([Problem("clients.group", text)])
    waiting = iter([name for name in ids if name not in named])
    for group in clients.group:
        own = {key: getattr(group, key) for key in base if getattr(group, key) is not None}
        for name in group.sites or [next(waiting) for _ in range(group.count)]:
            resolved[name] = TrainSettings(**(base | own))
    return resolved
