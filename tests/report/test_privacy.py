"""The report's privacy section, its chart, its warnings and the disclosure beside it."""

import json
import re
import xml.etree.ElementTree as Tree

import pytest

from fedistill.report import compare, write_report
from fedistill.report.folder import read_run
from fedistill.report.privacy import curves, section, table, told
from fedistill.report.shared import method_of
from fedistill.report.words import epsilon

NAMES = ["north", "south", "east"]


def site(**changes):
    return {
        "mechanism": "dpsgd",
        "epsilon": 2.9951,
        "delta": 1e-5,
        "unit": "record",
        "budget": 3.0,
        "sigma": 1.254,
        "reservations": 8,
        "releases": 8,
        "head": "ab" * 32,
        "exhausted": False,
        "rows": 128,
    } | changes


def privacy(**changes):
    return {
        "mechanism": "dpsgd",
        "statement": "students trained by DP-SGD; what they predict is post-processing",
        "private": True,
        "unit": "record",
        "relation": "add-remove",
        "budget": 3.0,
        "epsilon_max": 2.9951,
        "accountant": "dp-accounting 0.6.0 PLD",
        "rng": "torch mt19937, not a CSPRNG",
        "clip_norm": 1.0,
        "sample_rate": 0.25,
        "rounds": 8,
        "purpose": "readmission",
        "sites": {name: site() for name in NAMES},
    } | changes


def change_rounds(folder, change):
    path = folder / "rounds.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | change(row)) + "\n" for row in rows))


def course(row):
    """Two sites spend alike, the third less and not in all rounds."""
    spent = round(0.25 * row["round"], 3)
    spends = {"north": spent, "south": spent}
    if row["round"] <= 5:
        spends["east"] = spent / 2
    return {"epsilon": spends, "epsilon_max": spent}


@pytest.fixture
def private_run(make_run):
    def build(folder="run", baselines=(), **changes):
        made = make_run(
            folder, rounds=12, names=NAMES, baselines=baselines, privacy=privacy(**changes)
        )
        change_rounds(made, course)
        return made

    return build


def plain(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    return " ".join(re.sub(r"<[^>]+>", " ", text[text.index("<main>") :]).split())


# --- the section ---------------------------------------------------------------------------------


def test_a_private_run_tells_number_conditions_sites_and_what_is_open(private_run):
    seen = plain(private_run())
    assert "For each record ε = 3 at δ = 1e-5: students trained by DP-SGD" in seen
    assert "north 3 3 1e-5 1.25 8 8 128" in seen
    for words in (
        "relation add-remove",
        "ε 3, of a budget of 3",
        "accountant dp-accounting 0.6.0 PLD",
        "audit none took place: run fedistill audit",
        "clipping norm 1",
        "sampling each by its own coin, with probability 0.25",
        "private rounds the first 8",
        "randomness torch mt19937, not a CSPRNG",
        "purpose readmission",
        "What is not protected",
        "mix of labels",
        "A person at two sites pays the sum of both.",
        "not legal advice",
    ):
        assert words in seen, words
    assert "Nothing bounds" not in seen


def test_the_tile_says_of_what_epsilon_is(private_run):
    seen = plain(private_run()).replace("\N{NO-BREAK SPACE}", " ")
    assert "Privacy ε = 3 of 3 at most; per record, δ = 1e-5" in seen


@pytest.mark.parametrize(
    ("told_by_run", "words"),
    [
        ({"mechanism": "none", "statement": "no differential privacy"}, "no differential privacy."),
        ({}, "no differential privacy."),
        ({"mechanism": "hard-label"}, "labels in place of probabilities, which is NOT"),
        ({"mechanism": "dpsgd"}, "dpsgd: unit, relation and δ are not stated"),
    ],
)
def test_a_run_that_promises_nothing_says_so(told_by_run, words, make_run):
    folder = make_run(privacy=told_by_run)
    seen = plain(folder).lower()
    assert words.lower() in seen
    assert "nothing bounds mathematically" in seen
    assert "what the number depends on" not in seen
    found = json.loads((folder / "disclosure.json").read_text())
    assert found["differentially_private"] is False


def test_a_run_cut_short_has_the_mechanism_of_its_settings(private_run):
    folder = private_run()
    (folder / "summary.json").unlink()
    with (folder / "config.toml").open("a") as file:
        file.write('[privacy]\nmechanism = "dpsgd"\n')
    seen = plain(folder)
    assert "dpsgd: unit, relation and δ are not stated" in seen
    assert "no DP" not in seen


def test_a_private_run_shares_no_familiarity(private_run):
    folder = private_run()
    assert "how familiar" not in plain(folder)
    assert method_of(read_run(folder)).familiarity == ""


def test_what_others_wrote_is_escaped(private_run):
    bad = "<script>alert(1)</script>\x1b\u202e"
    folder = private_run(
        statement=bad,
        purpose=bad,
        unit=bad,
        notes=[bad],
        sites={bad: site(mechanism=bad), "b": site()},
    )
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\u202e" not in (folder / "disclosure.json").read_text(encoding="utf-8")


def test_columns_that_say_nothing_are_left_out():
    heads, rows = table({"a": told_of(rows=None), "b": told_of(rows=None)})
    assert heads == ("site", "ε", "budget", "δ", "noise σ", "charges", "releases")
    assert rows[0] == ("a", "3", "3", "1e-5", "1.25", "8", "8")
    heads, rows = table({"a": told_of(), "b": told_of(mechanism="gnmax", exhausted=True)})
    assert "mechanism" in heads
    assert rows[1][-1] == "budget spent"


def told_of(**changes):
    found = site(**changes)
    return found | {"rate": None, "steps": None}


# --- the chart -----------------------------------------------------------------------------------


def test_sites_with_one_course_share_a_line_and_the_budget_is_a_level(private_run):
    run = read_run(private_run())
    lines = curves(run)
    assert [(line.name, line.points[-1]) for line in lines] == [
        ("2 sites", (12.0, 3.0, None)),
        ("east", (5.0, 0.625, None)),
    ]
    figure = section(run).figure
    for drawn in (figure.wide, figure.narrow):
        Tree.fromstring(drawn)
    assert "budget ends at 3" in figure.wide


def test_of_many_kinds_of_sites_the_extremes_are_drawn(make_run):
    folder = make_run(rounds=3, privacy=privacy())
    change_rounds(
        folder, lambda row: {"epsilon": {f"s{k}": k * row["round"] / 10 for k in range(1, 10)}}
    )
    lines = curves(read_run(folder))
    assert [(line.name, line.points[-1].y) for line in lines] == [
        ("largest", 2.7),
        ("middle", 1.5),
        ("least", 0.3),
    ]


def test_without_a_loss_by_site_that_of_the_worst_is_drawn(make_run):
    folder = make_run(rounds=3, privacy=privacy())
    change_rounds(folder, lambda row: {"epsilon_max": float(row["round"])})
    (line,) = curves(read_run(folder))
    assert [point.y for point in line.points] == [1, 2, 3]


@pytest.mark.parametrize("junk", [1, "x", [], {"a": "b"}, None, {"a": {}}])
def test_junk_in_the_rounds_is_no_chart(junk, make_run):
    folder = make_run(rounds=3, privacy=privacy())
    change_rounds(folder, lambda row: {"epsilon": junk, "epsilon_max": None})
    assert section(read_run(folder)).figure is None
    write_report(folder)


# --- what must not be missed ---------------------------------------------------------------------


def test_a_site_whose_budget_is_spent_is_a_warning(private_run):
    folder = private_run()
    change_rounds(folder, lambda row: {"dropped": {"east": "budget_exhausted"}})
    seen = plain(folder)
    assert "The privacy budget of 1 site is spent (east)" in seen
    assert "its privacy budget is spent: it trains on own rows no more" in seen
    assert "The budget of east did not last" in seen
    assert told(read_run(folder))["sites"]["east"]["exhausted"] is True
    assert told(read_run(folder))["sites"]["east"]["epsilon"] == 2.9951


def test_a_run_that_ended_for_it_says_so(private_run):
    folder = private_run()
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "failed:budget"}))
    assert "The run failed: every site has spent its privacy budget." in plain(folder)


def test_an_audit_in_the_folder_is_shown_and_a_failed_one_warned_of(private_run):
    folder = private_run()
    audit = {
        "audited": True,
        "passed": True,
        "epsilon_lower": 0.41,
        "ceiling": 5.31,
        "verdict": "passed: epsilon is at least 0.41",
        "label_mix_error": 0.12,
        "label_mix_guess": 0.44,
    }
    (folder / "audit.json").write_text(json.dumps(audit))
    seen = plain(folder)
    assert "audit passed: epsilon is at least 0.41" in seen
    assert "with a total-variation error of 0.12, a uniform guess having 0.44" in seen
    assert "Do not rely" not in seen
    failed = {"passed": False, "verdict": "FAILED: the updates hold no noise"}
    (folder / "audit.json").write_text(json.dumps(audit | failed))
    assert "Do not rely on what is claimed of privacy. The audit: FAILED: the updates" in plain(
        folder
    )
    (folder / "audit.json").write_text("{")
    assert "none took place" in plain(folder)


def test_baselines_without_privacy_are_told_to_lie_outside(private_run):
    seen = plain(private_run(baselines=("local", "without-privacy")))
    assert "figures of the baselines local, without-privacy" in seen


# --- beside the page -----------------------------------------------------------------------------


def test_the_disclosure_lies_beside_the_page_and_says_the_same(private_run):
    folder = private_run()
    write_report(folder)
    text = (folder / "disclosure.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert found == json.loads(json.dumps(told(read_run(folder))))
    assert found["guarantee"]["epsilon"] == 3.0
    assert list(found["sites"]) == NAMES
    write_report(folder)
    assert (folder / "disclosure.json").read_text(encoding="utf-8") == text


def test_runs_side_by_side_name_their_epsilon(private_run, make_run):
    paths = [
        private_run("a"),
        make_run("b"),
        make_run("c", privacy={"mechanism": "hard-label"}),
    ]
    (line,) = [line for line in compare(paths).lines if line.name == "privacy"]
    assert [entry.text for entry in line.entries] == ["ε = 3", "no DP", "no DP"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.9951, "3"), (2.991, "3"), (0.12301, "0.124"), (8.0, "8"), (10.04, "10.1"), (0, "0")],
)
def test_a_loss_is_never_told_smaller_than_it_is(value, text):
    assert epsilon(value) == text
    assert float(text) >= value
