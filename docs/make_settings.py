"""Write the generated parts of the pages: ``python docs/make_settings.py``.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; all other text of a page
is written by hand and left alone. The parts come from the same tables that the program reads, and
``tests/docs`` fails when a page and the program disagree.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from fedistill import catalog, config
from fedistill.aggregate.rules import takes
from fedistill.attacks import ATTACKS
from fedistill.choice import Method
from fedistill.cli import app
from fedistill.exchange import EXCHANGES, Exchange
from fedistill.presets import METHODS

PAGES = [
    Path(__file__).with_name(f"{name}.md")
    for name in ("settings", "methods", "bad-clients", "continual")
]
"""The pages that have generated parts."""
ELSEWHERE = dict.fromkeys(("objectives", "policies", "detectors"), "continual.md")
"""Kinds of names that another page than the settings' has a section for."""
WIDTH = 95
"""Characters of a line of a formula."""
SEAMS = (
    "exchange",
    "rows",
    "familiarity",
    "accept",
    "rule",
    "student_rule",
    "sharpen",
    "ambiguity",
    "codec",
    "codec_down",
    "cache",
    "cache_rounds",
    "teach",
    "late",
    "memory",
)
"""The fields of a method that are a choice, in the order of the round."""
CODE = re.compile(r"--set [\w.]+=[\w.-]+|\[\w+\] \w+")
"""What in the text of a preset is a command or a setting."""
PART = re.compile(r"(<!-- generated: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
SITE = "site.toml"


def sections() -> Iterator[tuple[str, type[Any]]]:
    """The tables of both kinds of settings file by title: "" for a top, then [name] of the rest.

    First those of an experiment; then those of a real site's own file, whose titles begin with the
    name of that file.
    """
    yield from tables("", config.Settings)
    yield from tables(SITE, config.SiteSettings)


def tables(file: str, root: type[Any]) -> Iterator[tuple[str, type[Any]]]:
    """The tables of one kind of file, each title behind the name of the file."""
    pending: list[tuple[str, type[Any]]] = [("", root)]
    while pending:
        name, kind = pending.pop(0)
        yield f"{file} [{name}]".strip() if name else file, kind
        pending += [
            (f"{name}.{item.name}".lstrip("."), inner)
            for item in dataclasses.fields(kind)
            if (inner := table_of(kind, item.name)) is not None
        ]


def table_of(kind: type[Any], name: str) -> type[Any] | None:
    """The dataclass behind a key that holds a table, or a list of tables."""
    hint = typing.get_type_hints(kind)[name]
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint if dataclasses.is_dataclass(hint) else None


def keys(kind: type[Any]) -> Iterator[dataclasses.Field[Any]]:
    """The keys of a table that hold plain values."""
    return (item for item in dataclasses.fields(kind) if table_of(kind, item.name) is None)


def settings_table(kind: type[Any]) -> str:
    """A line for every key: its default, its range, its meaning."""
    hints = typing.get_type_hints(kind)
    rows = [
        [f"`{item.name}`", default(item), allowed(item, hints[item.name]), item.metadata["doc"]]
        for item in keys(kind)
    ]
    return markdown(["key", "default", "values", "meaning"], rows)


def default(item: dataclasses.Field[Any]) -> str:
    """The value where a file is silent."""
    return "not set" if item.default is None else f"`{config.to_value(item.default)}`"


def allowed(item: dataclasses.Field[Any], hint: Any) -> str:
    """The kind of value and its limits."""
    limits = item.metadata
    if isinstance(limits["choices"], str):
        kind = limits["choices"]
        return f"one of the [{kind}]({ELSEWHERE.get(kind, '')}#{kind})"
    if limits["choices"]:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    bounds = [
        f"above {limits['above']:g}" if limits["above"] is not None else "",
        f"at least {limits['low']:g}" if limits["low"] is not None else "",
        f"at most {limits['high']:g}" if limits["high"] is not None else "",
    ]
    return ", ".join([words(hint), *filter(None, bounds)])


def words(hint: Any) -> str:
    """A type as a reader calls it."""
    if typing.get_origin(hint) is tuple:
        return f"list of {words(typing.get_args(hint)[0])}s"
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    known = [option for option in options if option is not types.NoneType]
    return WORDS[float] if float in known else " or ".join(WORDS[option] for option in known)


def names_table(kind: str) -> str:
    """A line for every name of one kind, as ``fedistill list`` has them."""
    rows = [[f"`{name}`", catalog.summary(kind, name)] for name in catalog.known(kind)]
    return markdown(["name", "what it is"], rows)


def methods_table() -> str:
    """What each method that exchanges predictions is made of."""
    rows = [
        [f"`{method.name}`", f"`{method.rule}`", f"`{method.codec}`", *travels(method)]
        for method in METHODS.values()
        if method.exchange == "predictions"
    ]
    head = ["method", "rule", "codec", "down", "memory", "clients learn from", "beside predictions"]
    return markdown(head, rows)


def travels(method: Method) -> list[str]:
    """What goes down, what is taught, what is told beyond predictions."""
    down = "–" if method.down() == method.codec else f"`{method.down()}`"
    held = ", cache" if method.cache else ""
    told = "; ".join(tells(method)) or "–"
    return [down + held, f"{method.memory:g}", method.teach, told]


def tells(method: Method) -> Iterator[str]:
    """What a client tells beyond predictions on proxy rows."""
    if method.exchange in EXCHANGES:
        yield EXCHANGES[method.exchange].tells
    if method.exchange != "predictions":
        return
    if method.tells_familiarity():
        yield "how familiar each row is, a byte"
    if method.accept:
        yield "which rows it answers"
    if "seen" in takes(method.bound_rule()):
        yield "which classes it has"


def exchanges_table() -> str:
    """What is exchanged in place of predictions, and what that tells."""
    rows = [
        [f"`{entry.name}`", ", ".join(users(entry)), entry.summary, entry.tells]
        for entry in EXCHANGES.values()
    ]
    return markdown(["exchange", "method", "what", "tells"], rows)


def users(entry: Exchange) -> list[str]:
    """The methods with this exchange."""
    return [f"`{name}`" for name, method in METHODS.items() if method.exchange == entry.name]


def defaults_list() -> str:
    """What a preset has that names nothing else."""
    silent = Method(name="", summary="")
    return ", ".join(f"`{name} = {literal(getattr(silent, name))}`" for name in SEAMS)


def presets_list() -> str:
    """A section for every method."""
    return "\n\n".join(map(preset_text, METHODS.values()))


def preset_text(method: Method) -> str:
    """Where a method comes from, what it computes and sets, and where it departs from its paper."""
    source = f" {method.paper}." if method.paper else ""
    parts = [f"### {method.name}", f"{method.summary[0].upper()}{method.summary[1:]}.{source}"]
    if method.formula:
        parts.append("```text\n" + "\n".join(textwrap.wrap(method.formula, WIDTH)) + "\n```")
    if told := "; ".join(tells(method)):
        label = "Tells" if method.exchange in EXCHANGES else "Tells beside predictions"
        parts.append(f"**{label}**: {told}.")
    parts.append(f"**Sets**: {', '.join(chosen(method)) or 'nothing'}.")
    for who, changes in (("Clients", method.client), ("Student", method.student)):
        if changes:
            parts.append(f"**{who}**: {settled(changes)}.")
    if method.deviations:
        items = "\n".join(f"- {as_code(text)}" for text in method.deviations.split("; "))
        parts.append(f"**Deviations**:\n\n{items}")
    return "\n\n".join(parts)


def chosen(method: Method) -> Iterator[str]:
    """The fields in which a method differs from the defaults, and the options of its rule."""
    silent = Method(name="", summary="")
    for name in SEAMS:
        value = getattr(method, name)
        if value != getattr(silent, name):
            yield f"`{name} = {literal(value)}`"
    yield from (f"`{name} = {literal(value)}`" for name, value in method.options.items())


def literal(value: Any) -> str:
    """A value as a settings file has it."""
    return config.to_value(value)


def as_code(text: str) -> str:
    """The text, with commands and settings as code."""
    return CODE.sub(lambda found: f"`{found[0]}`", text)


def settled(changes: Mapping[str, Any]) -> str:
    """What a method fixes of the training."""
    return ", ".join(f"`{key} = {literal(value)}`" for key, value in changes.items())


def attacks_table() -> str:
    """What each simulated bad client does, and what bounds it."""
    rows = [
        [f"`{name}`", entry.summary, entry.bound, entry.paper or "–"]
        for name, entry in ATTACKS.items()
    ]
    return markdown(["attack", "what it does", "what bounds it", "paper"], rows)


def command_text(name: str) -> str:
    """Usage, help and options of one command, from the program itself."""
    command = commands()[name]
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["fedistill", name, *command.collect_usage_pieces(context)])
    rows = [
        [
            "`" + ", ".join([*item.opts]) + ("" if item.is_flag else f" {metavar(item)}") + "`",
            (item.help or "").rstrip(".") + silent(item),
        ]
        for item in command.params
        if item.param_type_name == "option"
    ]
    table = markdown(["option", "does"], [*rows, ["`--help`", "Show the command's help"]])
    return f"```text\n{usage}\n```\n\n{command.help}\n\n{table}"


def silent(item: Any) -> str:
    """What holds where an option is not given, if there is more to say than nothing."""
    if item.required:
        return "; must be given"
    return "" if item.is_flag or item.default in {None, ""} else f"; by default `{item.default}`"


def metavar(item: Any) -> str:
    """What stands for an option's value."""
    return item.metavar or {"integer": "N", "float": "NUMBER", "path": "PATH"}.get(
        item.type.name, "TEXT"
    )


def commands() -> dict[str, Any]:
    """The commands of the program by name, those of a group by two: ``deploy init``."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}": one for sub, one in inner.items()} if inner else {name: command}
    return found


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
    )


def parts() -> dict[str, Callable[[], str]]:
    """What can be generated, by name."""
    found: dict[str, Callable[[], str]] = {
        title or "top": lambda kind=kind: settings_table(kind)  # type: ignore[misc]
        for title, kind in sections()
    }
    found |= {kind: lambda kind=kind: names_table(kind) for kind in catalog.TABLES}  # type: ignore[misc]
    found |= {name: lambda name=name: command_text(name) for name in commands()}  # type: ignore[misc]
    return found | {
        "methods in full": methods_table,
        "defaults": defaults_list,
        "exchanges": exchanges_table,
        "presets": presets_list,
        "attacks in full": attacks_table,
    }


def render(page: str) -> str:
    """The page with every generated part written afresh.

    Raises:
        KeyError: the page has a part that nothing makes.
    """
    makers = parts()
    return PART.sub(lambda m: f"{m[1]}\n{makers[m[2]]()}\n\n{m[4]}", page)


if __name__ == "__main__":
    for place in PAGES:
        place.write_text(render(place.read_text(encoding="utf-8")), encoding="utf-8")
