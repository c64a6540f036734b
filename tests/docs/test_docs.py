"""The documentation is true: its examples run, and every name the program knows is in it.

A block of a page may have a comment before it that says how it is tested:

* ``<!-- test: quick -->``: ``fedistill run`` gets ``--rounds 2``;
* ``<!-- test: rounds N -->``: the same with N;
* ``<!-- test: syntax -->``: commands and options are looked up, and not run;
* ``<!-- test: needs MODULE -->``: skipped where the module is not installed.

The blocks of a page run in their order, in a folder of their own with copies of ``simulations``.
Python blocks share their names. A toml block whose first line is ``# NAME.toml`` becomes that file.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedistill import catalog, config, errors
from fedistill.cli import INTERRUPTED, app, main
from fedistill.report.live import COLUMNS, head
from fedistill.wire.messages import UPLOAD_FIELDS, Plan, RowSpec, Targets, unseal

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *(page for page in [REPO / "README.md"] if page.exists())]
NAMES = [page.name for page in PAGES]

FENCE = re.compile(r"^(?P<indent>[ ]*)(?P<ticks>```+)(?P<language>[\w{}-]*)\s*$")
MARKER = re.compile(r"<!-- test: (quick|syntax|rounds \d+|needs [\w.]+) -->")
BLOCK = re.compile(r"^[ ]*(```+).*?^[ ]*\1\s*$", re.DOTALL | re.MULTILINE)
OTHER_TOOLS = {"pip", "pytest", "git", "python", "cd", "export", "ruff", "mypy", "lint-imports"}


@dataclass(frozen=True)
class Block:
    """A fenced block, the line it starts on, and how it is tested."""

    language: str
    text: str
    line: int
    marker: str = ""


def read(page):
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page):
    found, lines, marker, start = [], read(page).splitlines(), "", None
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if start is None and fence:
            start, opened = number, fence
        elif start is not None and fence and fence["ticks"] == opened["ticks"]:
            width = len(opened["indent"])
            text = "\n".join(row[width:] for row in lines[start + 1 : number])
            found.append(Block(opened["language"], text, start + 2, marker))
            start, marker = None, ""
        elif start is None and line.strip():
            told = MARKER.fullmatch(line.strip())
            assert told or "<!-- test" not in line, f"{page.name}: unknown marker: {line}"
            marker = told[1] if told else ""
    assert start is None, f"{page.name}: a block is not closed"
    return found


def prose(page):
    """The page without its blocks and code, which may hold brackets of another kind."""
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", read(page)))


def commands(block):
    """The commands of a block as lists of words; of a console block those behind a ``$``."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


# --- examples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDISTILL_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    torch.set_num_threads(1)
    shutil.copytree(REPO / "simulations", "simulations")
    names = {"__name__": "example"}
    for block in blocks(page):
        kind, _, value = block.marker.partition(" ")
        if kind == "needs" and importlib.util.find_spec(value) is None:
            continue
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, names)
        elif block.language == "toml":
            settings = config.parse(block.text, source=f"{page.name}, line {block.line}")
            assert settings is not None
            if file := re.match(r"# ([\w-]+\.toml)\n", block.text):
                Path(file[1]).write_text(block.text, encoding="utf-8")
        elif block.language in {"sh", "console"}:
            for words in commands(block):
                if words:
                    run_command(words, block, capsys)


def run_command(words, block, capsys):
    assert words[0] in OTHER_TOOLS | {"fedistill"}, f"line {block.line}: {words[0]}?"
    if words[0] != "fedistill":
        return
    kind, _, value = block.marker.partition(" ")
    if kind == "syntax":
        check_syntax(words)
        return
    arguments = words[1:]
    if kind in {"quick", "rounds"} and arguments[0] == "run":
        arguments += ["--rounds", value or "2"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capsys.readouterr()
    assert leaving.value.code == 0, f"line {block.line}: {shlex.join(words)}\n{told.err}"


def check_syntax(words):
    known = help_of(words[1])
    for word in words[2:]:
        if word.startswith("--"):
            assert word in known, f"{shlex.join(words)}: no option {word}"


# --- the command line ----------------------------------------------------------------------------


def help_of(*arguments):
    shown = CliRunner().invoke(app, [*arguments, "--help"])
    assert shown.exit_code == 0, shown.output
    return shown.output


def command_names():
    return re.findall(r"^  ([a-z]\S*)  ", help_of().partition("Commands:")[2], flags=re.MULTILINE)


def section(title):
    """The part of the settings page below a heading."""
    _, _, rest = read("settings.md").partition(f"\n### {title}\n")
    assert rest, f"settings.md: expected a heading {title}"
    return re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("name", command_names())
def test_every_option_is_documented_and_no_other(name):
    documented = set(
        re.findall(r"^\| `(--[a-z-]+)", section(f"fedistill {name}"), flags=re.MULTILINE)
    )
    real = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", help_of(name), flags=re.MULTILINE))
    assert documented == real


def test_only_real_commands_are_documented():
    text = read("settings.md")
    assert re.findall(r"^### fedistill (\S+)$", text, flags=re.MULTILINE) == command_names()


def test_every_exit_code_is_documented_and_no_other():
    table = read("settings.md").partition("## Exit codes")[2]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if hasattr(kind, "exit_code")]
    assert documented == {0, INTERRUPTED} | {kind.exit_code for kind in kinds}


def test_the_round_table_of_the_quickstart_has_the_real_columns():
    assert head(COLUMNS) in read("quickstart.md")


# --- settings and names --------------------------------------------------------------------------


@pytest.fixture
def maker(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    spec = importlib.util.spec_from_file_location("make_settings", DOCS / "make_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_is_what_the_program_says(maker):
    page = read(maker.PAGE)
    assert page == maker.render(page), "run: python docs/make_settings.py"


def test_every_generated_part_stands_on_the_settings_page(maker):
    page = read(maker.PAGE)
    assert {found[1] for found in maker.PART.findall(page)} == set(maker.parts())


def test_every_key_is_documented_under_its_section(maker):
    for name, kind in maker.sections():
        title = {"": "Top of the file", "clients.group": "[[clients.group]]"}.get(name, f"[{name}]")
        text = section(title)
        for item in maker.keys(kind):
            assert f"| `{item.name}` |" in text, f"{title} {item.name}"


@pytest.mark.parametrize("kind", catalog.TABLES)
def test_every_name_is_in_the_docs(kind):
    text = "\n".join(read(page) for page in DOCS.glob("*.md"))
    named = set(re.findall(r"`([\w-]+)[`:]", text))
    assert set(catalog.known(kind)) <= named


def test_every_rule_has_its_formula():
    _, _, rest = read("concepts.md").partition("## Rules in formulas")
    documented = re.findall(r"^\| `([\w-]+)` \|", rest.partition("\n## ")[0], flags=re.MULTILINE)
    assert sorted(documented) == sorted(catalog.known("rules"))


# --- messages ------------------------------------------------------------------------------------


def table_under(title):
    """The first column of the first table below a heading of the round's page."""
    _, _, rest = read("round.md").partition(f"{title}\n")
    rows = re.findall(
        r"^\|(.+?)\|", re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0], flags=re.MULTILINE
    )
    return [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]


def test_the_upload_has_the_documented_fields_and_no_other():
    assert sorted(table_under("### Upload")) == sorted(UPLOAD_FIELDS)


def test_the_plan_has_the_documented_fields_and_no_other():
    rows = RowSpec(1, 1, 1, 2)
    targets = Targets(spec=rows, codec="u8", classes=2, payload=b"")
    plan = Plan(run="r", round=2, ask=rows, proxy="p", classes="c", targets=targets)
    header, _ = unseal(plan.to_bytes(), 1 << 20)
    assert sorted(table_under("### Plan")) == sorted(header)
    text = read("round.md")
    for name in (*header["ask"], *header["targets"]):
        assert f"`{name}`" in text, name


def test_every_reason_code_is_documented_and_no_other():
    sources = "\n".join(file.read_text() for file in (REPO / "fedistill").rglob("*.py"))
    codes = set(re.findall(r'Rejected\(\s*"(\w+)"', sources))
    assert sorted(table_under("## At the door")) == sorted(codes)


def test_every_flag_is_documented_and_no_other():
    places = ("aggregate/vigilance.py", "federation.py")
    source = "\n".join((REPO / "fedistill" / place).read_text() for place in places)
    flags = set(re.findall(r'\[\]\)\.append\("(\w+)"\)', source))
    assert sorted(table_under("## What is flagged")) == sorted(flags)


# --- links and the site --------------------------------------------------------------------------


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#{1,3} (.+)$", BLOCK.sub("", read(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_in_the_contents():
    index = read("index.md")
    listed = index.partition("{toctree}")[2].partition("```")[0].split()
    assert sorted([*listed[1:], "index"]) == sorted(page.stem for page in DOCS.glob("*.md"))


def test_pages_name_nothing_of_one_machine():
    for page in PAGES:
        assert not re.search(r"/(work|tmp|home|root)/", read(page)), page.name


def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "index.html").exists()
