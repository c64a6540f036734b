"""The documentation is true: its examples run, and every name the program knows is in it.

A block of a page may have a comment before it that says how it is tested:

* ``<!-- test: quick -->``: ``fedistill run`` gets ``--rounds 2``;
* ``<!-- test: rounds N -->``: the same with N;
* ``<!-- test: syntax -->``: commands and options are looked up, Python is compiled, nothing is run;
* ``<!-- test: needs MODULE -->``: skipped where the module is not installed.

The blocks of a page run in their order, in a folder of their own with copies of ``simulations``.
Python blocks share their names. A toml block whose first line is ``# NAME.toml`` becomes that file;
one that names an ``id`` is the file of a real site.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedistill import catalog, config, errors, log
from fedistill.cli import AUDIT_FAILED, INTERRUPTED, app, main
from fedistill.exchange import EXCHANGES
from fedistill.presets import METHODS, discreet
from fedistill.privacy import audit_log
from fedistill.privacy.disclosure import disclosure
from fedistill.report.live import COLUMNS, head
from fedistill.spent import EXHAUSTED
from fedistill.wire.envelope import unseal
from fedistill.wire.messages import UPLOAD_FIELDS, Plan, RowSpec, Targets
from fedistill.wire.table import Table

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
            if kind != "syntax":
                exec(code, names)
        elif block.language == "toml":
            read_as = config.parse_site if config.speaks_of_a_site(block.text) else config.parse
            assert read_as(block.text, source=f"{page.name}, line {block.line}") is not None
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
    given = " ".join(words[1:]) + " "
    name = max((one for one in command_names() if given.startswith(f"{one} ")), key=len, default="")
    assert name, f"{shlex.join(words)}: no such command"
    name = name.split()
    known = help_of(*name)
    for word in words[1 + len(name) :]:
        if word.startswith("--"):
            assert word in known, f"{shlex.join(words)}: no option {word}"


# --- the command line ----------------------------------------------------------------------------


def help_of(*arguments):
    shown = CliRunner().invoke(app, [*arguments, "--help"])
    assert shown.exit_code == 0, shown.output
    return shown.output


def command_names(*group):
    """Every command, in the order of the help; those of a group as ``deploy init``."""
    listed = help_of(*group).partition("Commands:")[2]
    found = []
    for name in re.findall(r"^  ([a-z]\S*)  ", listed, flags=re.MULTILINE):
        inner = command_names(*group, name) if "Commands:" in help_of(*group, name) else []
        found += [f"{name} {one}" for one in inner] or [name]
    return found


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
    shown = help_of(*name.split())
    real = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", shown, flags=re.MULTILINE))
    assert documented == real


def test_only_real_commands_are_documented():
    text = read("settings.md")
    assert re.findall(r"^### fedistill (.+)$", text, flags=re.MULTILINE) == command_names()


def test_every_exit_code_is_documented_and_no_other():
    table = read("settings.md").partition("## Exit codes")[2]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if hasattr(kind, "exit_code")]
    assert documented == {0, AUDIT_FAILED, INTERRUPTED} | {kind.exit_code for kind in kinds}


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


def test_the_generated_parts_are_what_the_program_says(maker):
    for place in maker.PAGES:
        page = read(place)
        assert page == maker.render(page), f"{place.name}: run: python docs/make_settings.py"


def test_every_generated_part_stands_on_one_page(maker):
    found = [part[1] for page in DOCS.glob("*.md") for part in maker.PART.findall(read(page))]
    assert sorted(found) == sorted(maker.parts())


def test_every_field_of_a_method_is_shown_or_told_apart(maker):
    told = {"name", "summary", "paper", "formula", "deviations", "options", "client", "student"}
    assert {item.name for item in dataclasses.fields(maker.Method)} == told | set(maker.SEAMS)


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_has_its_section(name):
    text = part("methods.md", f"\n### {name}")
    method = METHODS[name]
    assert " ".join(method.formula.split()) in " ".join(text.split())
    assert method.paper in text
    assert len(re.findall(r"^- ", text, flags=re.MULTILINE)) == len(
        method.deviations.split("; ") if method.deviations else []
    )


def test_every_key_is_documented_under_its_section(maker):
    for name, kind in maker.sections():
        title = {"": "Top of the file", "[clients.group]": "[[clients.group]]"}.get(name, name)
        text = section(title)
        for item in maker.keys(kind):
            assert f"| `{item.name}` |" in text, f"{title} {item.name}"


def test_what_differs_in_the_rows_of_a_site_names_real_keys():
    named = set(re.findall(r"`(\w+)(?: = [^`]+)?`", section("site.toml [data]")))
    known = {item.name for item in dataclasses.fields(config.DataSettings)}
    assert named - {"arrivals"} <= known  # what comes later is a site's own affair


@pytest.mark.parametrize("kind", catalog.TABLES)
def test_every_name_is_in_the_docs(kind):
    text = "\n".join(read(page) for page in DOCS.glob("*.md"))
    named = set(re.findall(r"`([\w+-]+)[`:]", text))
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
    assert sorted(table_under("### Upload")) == sorted([*UPLOAD_FIELDS, "drift"])


def test_the_plan_has_the_documented_fields_and_no_other():
    rows = RowSpec(1, 1, 1, 2)
    targets = Targets(round=1, spec=rows, codec="u8", classes=2, payload=b"")
    table = Table(np.zeros((2, 2)))
    told = {"extra": 1, "consolidate": True, "watch": True}
    told |= {"mechanism": "dpsgd", "purpose": "triage", "receipt": "0" * 64}
    plan = Plan(
        run="r", round=2, ask=rows, proxy="p", classes="c", targets=targets, table=table, **told
    )
    header, _ = unseal(plan.to_bytes(), 1 << 20)
    assert sorted(table_under("### Plan")) == sorted(header)
    text = read("round.md")
    for name in (*header["ask"], *header["targets"]):
        assert f"`{name}`" in text, name


def test_every_reason_code_is_documented_and_no_other():
    sources = "\n".join(file.read_text() for file in (REPO / "fedistill").rglob("*.py"))
    codes = set(re.findall(r'Rejected\(\s*"(\w+)"', sources))
    at_the_door, over_a_network = table_under("## At the door"), table_under("### Over a network")
    assert sorted(set(at_the_door) | (set(over_a_network) & codes)) == sorted(codes)


def test_every_code_of_a_simulated_loss_is_documented():
    source = (REPO / "fedistill" / "backends" / "unreliable.py").read_text()
    codes = set(re.findall(r'Failure\([^"\n]+"(\w+)"', source))
    assert codes
    assert codes <= set(re.findall(r"`(\w+)`", part("round.md", "### Late uploads")))


def test_every_kind_of_exchange_is_documented():
    for page in ("methods.md", "privacy.md"):
        for name, method in METHODS.items():
            if method.exchange in EXCHANGES:
                assert f"`{name}`" in read(page), f"{page}: {name}"


def test_the_measured_table_of_bad_clients_has_its_place():
    assert read("bad-clients.md").count("<!-- bad clients -->") == 1
    assert read("bad-clients.md").count("<!-- end bad clients -->") == 1


def test_every_code_in_place_of_an_upload_is_documented_and_no_other():
    work = pytest.importorskip("fedistill.flower.work")
    home = REPO / "fedistill" / "flower"
    sources = [(home / name).read_text() for name in ("backend.py", "convert.py")]
    of_the_way = {
        code
        for source in sources
        for pair in re.findall(r'"(\w+)" if [^"\n]+ else "(\w+)"', source)
        for code in pair
    }
    of_the_site = {*work.CODES.values(), work.code_of(ValueError()), "policy", EXHAUSTED}
    of_the_site |= set(re.findall(r'"reason": "(\w+)"', (home / "work.py").read_text()))
    assert sorted(table_under("### Over a network")) == sorted(of_the_way | of_the_site)


def test_every_flag_is_documented_and_no_other():
    places = ("aggregate/vigilance.py", "federation.py")
    source = "\n".join((REPO / "fedistill" / place).read_text() for place in places)
    flags = set(re.findall(r'\[\]\)\.append\("(\w+)"\)', source))
    tables = (REPO / "fedistill" / "tables.py").read_text()
    flags |= set(re.findall(r'flags=\{name: \["(\w+)"\]', tables))
    assert sorted(table_under("## What is flagged")) == sorted(flags)


# --- real sites ----------------------------------------------------------------------------------


def part(page, title):
    """The text of a page below a heading, up to the next one."""
    _, found, rest = read(page).partition(f"{title}\n")
    assert found, f"{page}: expected a heading {title}"
    return re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]


def test_every_event_and_every_field_is_documented_and_no_other():
    text = part("deployment.md", "### Events")
    rows = re.findall(r"^\|(.+?)\|(.+?)\|(.+?)\|$", text, flags=re.MULTILINE)
    events = [name for names, *_ in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(events) == sorted(log.EVENTS)
    fields = {name for *_, told in rows for name in re.findall(r"`(\w+)`", told)}
    assert fields <= set(log.FIELDS)
    assert set(log.FIELDS) <= set(re.findall(r"`(\w+)`", text))


def test_every_test_that_the_deployment_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", part("deployment.md", "## Faults")))
    sources = "\n".join(file.read_text() for file in (REPO / "tests").rglob("test_*.py"))
    assert named
    assert named <= set(re.findall(r"^(?:async )?def (test_\w+)", sources, flags=re.MULTILINE))


def test_the_figures_of_the_deployment_page_are_those_of_the_kit():
    kit = pytest.importorskip("fedistill.flower.kit")
    text = read("deployment.md")
    assert f"{kit.keys.SERVER_DAYS} days" in text
    assert f"{kit.keys.AUTHORITY_DAYS // 365} years" in text
    assert len(kit.FLEET) == 10, "the page speaks of ten calls"
    assert kit.FLWR.rpartition(".")[0] in text
    for port in (8443, 9091, 8080, 8001):
        assert str(port) in text


def test_the_apps_of_the_deployment_page_run_a_federation(tmp_path, monkeypatch):
    pytest.importorskip("flwr")
    from flwr.app import Context, RecordDict

    spec = importlib.util.spec_from_file_location("grid", REPO / "tests" / "flower" / "grid.py")
    grid = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "grid", grid)
    spec.loader.exec_module(grid)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    (block,) = [one for one in blocks(DOCS / "deployment.md") if "server_app(" in one.text]
    exec(block.text, names)
    told = {"states": str(tmp_path / "states")}
    nodes = [{"partition-id": number, "num-partitions": 3} for number in range(3)]
    over = grid.InProcessGrid(names["client"], nodes, run_config=told)
    names["server"](over, Context(1, 1, {}, RecordDict(), told))
    rows = (tmp_path / "over-flower" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(row)["clients_ok"] for row in rows] == [3, 3]
    assert sorted(place.name for place in (tmp_path / "states").iterdir()) == [
        "bern",
        "lyon",
        "ulm",
    ]


# --- privacy -------------------------------------------------------------------------------------


def test_every_event_of_the_audit_log_is_documented_and_no_other():
    table = part("data-protection-officer.md", "## The audit log")
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == [*audit_log.EVENTS]


def test_every_key_of_a_disclosure_is_documented():
    table = part("privacy.md", "## What the report says")
    assert {*disclosure({})} - {"format", "notice"} <= set(re.findall(r"`(\w+)`", table))


def test_every_field_that_the_template_names_is_in_a_disclosure():
    site = {"epsilon": 1.0, "delta": 1e-5}
    conditions = {"mechanism": "dpsgd", "unit": "record", "relation": "add-remove"}
    told = {"sites": {"ID": site}, "audit": {"epsilon_lower": 0.1}}
    found = disclosure({"privacy": conditions | told})
    named = re.findall(r"\{([\w.]+)\}", part("data-protection-officer.md", "## A template"))
    assert len(named) > 20
    for name in named:
        place = found
        for key in name.split("."):
            assert key in place, name
            place = place[key]


def test_every_mechanism_has_its_row():
    rows = re.findall(r"^\| `([\w-]+)` \|", part("privacy.md", "## The mechanisms"), re.MULTILINE)
    assert rows == ["none", "hard-label", "dpsgd", "dp-head", "gnmax", "central-gauss"]
    assert sorted(rows) == sorted(catalog.known("mechanisms"))


def test_the_methods_that_can_be_private_are_named_and_no_other():
    def can_be(method):
        try:
            return bool(discreet(method))
        except errors.SettingsError:
            return False

    text = part("methods.md", "## Private methods")
    named = set(re.findall(r"`([\w-]+)`", text)) & set(METHODS)
    assert named == {name for name, method in METHODS.items() if can_be(method)}


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
