"""Settings are read from TOML and written back to it.

A file is judged as a whole: every problem is reported at once, with its line and the nearest known
key. What there is to set stands in :mod:`fedistill.settings`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedistill import catalog
from fedistill.contradictions import contradictions, site_contradictions
from fedistill.errors import Problem, SettingsError, did_you_mean
from fedistill.settings import (
    AttackSettings,
    BackendSettings,
    ClientsSettings,
    ContinualSettings,
    DataSettings,
    DeploymentSettings,
    EvaluationSettings,
    GroupSettings,
    MethodSettings,
    PrivacySettings,
    ProxySettings,
    Settings,
    SiteSettings,
    StreamSettings,
    StudentSettings,
    TrainSettings,
)

__all__ = [
    "AttackSettings",
    "BackendSettings",
    "ClientsSettings",
    "ContinualSettings",
    "DataSettings",
    "DeploymentSettings",
    "EvaluationSettings",
    "GroupSettings",
    "MethodSettings",
    "PrivacySettings",
    "ProxySettings",
    "Settings",
    "SiteSettings",
    "StreamSettings",
    "StudentSettings",
    "TrainSettings",
    "client_settings",
    "comment",
    "load",
    "load_site",
    "parse",
    "parse_site",
    "read_text",
    "speaks_of_a_site",
    "to_toml",
]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a settings file, apply ``key=value`` overrides, report all problems at once.

    Raises:
        SettingsError: unreadable file, TOML that does not parse, unknown keys, wrong types,
            impossible values; each problem with its line and the nearest known key.
    """
    return parse(read_text(path), overrides, source=str(path))


def load_site(path: str | Path) -> SiteSettings:
    """As :func:`load`, for the file of one real site."""
    return parse_site(read_text(path), source=str(path))


def read_text(path: str | Path) -> str:
    """The content of a settings file.

    Raises:
        SettingsError: no such file, or no UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "expected a settings file, found none: fedistill new FILE.toml writes one"
        raise SettingsError([Problem(str(path), hint)]) from None
    except (OSError, UnicodeDecodeError) as error:
        hint = f"expected a readable UTF-8 text file ({type(error).__name__})"
        raise SettingsError([Problem(str(path), hint)]) from None


def speaks_of_a_site(text: str) -> bool:
    """Whether this is the file of one real site, and not of an experiment."""
    return re.match(r"(\s*(#.*)?\n)*\s*(id|federation)\s*=", text) is not None


def parse(text: str, overrides: Sequence[str] = (), source: str = "") -> Settings:
    """As :func:`load`, from the text of the file."""
    settings = _judge(Settings, contradictions, text, overrides, source)
    assert isinstance(settings, Settings)
    return settings


def parse_site(text: str, source: str = "") -> SiteSettings:
    """As :func:`load_site`, from the text of the file."""
    settings = _judge(SiteSettings, site_contradictions, text, (), source)
    assert isinstance(settings, SiteSettings)
    return settings


def _judge(
    kind: type[Any],
    impossible: Callable[[Any, Mapping[Path_, int]], Iterator[Problem]],
    text: str,
    overrides: Sequence[str],
    source: str,
) -> Any:
    """Read one kind of settings; all problems at once."""
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
    settings = read_table(kind, raw, (), lines, problems)
    if settings is not None:
        problems.extend(impossible(settings, lines))
    if problems:
        given = {override.partition("=")[0].strip() for override in overrides}
        problems = [Problem(p.key, p.text) if p.key in given else p for p in problems]
        problems.sort(key=lambda problem: problem.line or 0)
        raise SettingsError(problems, source)
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
            if choices == "mechanisms" and (why := catalog.refusal(value)):
                return f'"{value}": {why}'
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


def dotted(path: Path_) -> str:
    """``("clients", "group", 0, "lr")`` as ``clients.group.0.lr``."""
    return ".".join(str(part) for part in path)


# --- writing -----------------------------------------------------------------------------------


def to_toml(settings: Settings | SiteSettings, comment: Callable[[str], str] | None = None) -> str:
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


def comment(doc: str) -> str:
    """A field's documentation as comment lines."""
    return "\n".join(textwrap.wrap(doc, 96, initial_indent="# ", subsequent_indent="#   "))


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
    for name, group in _grouped(clients, ids):
        own = {key: getattr(group, key) for key in base if getattr(group, key) is not None}
        resolved[name] = TrainSettings(**(base | own))
    return resolved


def group_value(clients: ClientsSettings, ids: Sequence[str], key: str) -> dict[str, Any]:
    """For each client whose group sets it, what its group says of one key.

    Raises:
        SettingsError: a group names a site that does not exist.
    """
    found = {name: getattr(group, key) for name, group in _grouped(clients, ids)}
    return {name: value for name, value in found.items() if value is not None}


def _grouped(clients: ClientsSettings, ids: Sequence[str]) -> Iterator[tuple[str, GroupSettings]]:
    """Each client that is in a group, with its group."""
    named = {name for group in clients.group for name in group.sites}
    if unknown := sorted(named - set(ids)):
        text = f'no client "{unknown[0]}"{did_you_mean(unknown[0], ids)}'
        raise SettingsError([Problem("clients.group", text)])
    waiting = iter([name for name in ids if name not in named])
    for group in clients.group:
        for name in group.sites or [next(waiting) for _ in range(group.count)]:
            yield name, group
