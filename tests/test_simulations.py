"""Every settings file that ships is read and checked as a user would; the tables over many runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import builders
import numpy as np
import pytest

from fedistill import config, experiment
from fedistill.errors import DataError, SettingsError
from fedistill.plan import describe

REPO = Path(__file__).resolve().parents[1]
FILES = sorted((REPO / "simulations").rglob("*.toml"))


@pytest.fixture
def at_home(monkeypatch):
    """As from the repository's root, with the data where they lie here."""
    monkeypatch.chdir(REPO)
    root = Path(os.environ.get("FEDISTILL_DATA") or REPO.parent / "shared" / "data")
    monkeypatch.setenv("FEDISTILL_DATA", str(root))
    return root


def absent(settings, root):
    """The first thing a simulation needs that this machine has not."""
    home = Path(settings.data.path) if settings.data.path else root
    for source in (settings.data.source, settings.data.test, settings.proxy.path):
        prefix, colon, name = source.partition(":")
        if prefix in {"hf", "openml"}:
            return f"{source} is online"
        stem = home / name
        if colon and not [*stem.parent.glob(f"{stem.name}*")]:
            return f"{stem} is not here"
    path = settings.clients.partition_path
    if path and not (Path(path).exists() or (home / path).exists()):
        return f"{path} is not here"
    return None


def test_there_are_simulations():
    assert "digits" in {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_simulation_is_read_without_a_problem(path):
    settings = config.load(path)
    assert config.parse(config.to_toml(settings)) == settings


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_simulation_passes_its_check(path, at_home):
    settings = config.load(path)
    if missing := absent(settings, at_home):
        pytest.skip(missing)
    told = "\n".join(describe(settings))
    for word in ("data", "clients", "proxy", "method", "bytes", "privacy"):
        assert f"\n{word}" in f"\n{told}"


# --- comparisons over many runs ------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """One of the scripts as a module; they import one another from their own folder."""
    monkeypatch.syspath_prepend(str(REPO / "simulations"))
    return importlib.import_module


@pytest.fixture
def tiny(tmp_path):
    """Words of the command line for runs of a few tenths of a second."""
    path = builders.write_settings(tmp_path, rounds=2, epochs=1)
    return ["--settings", str(path), "--out", str(tmp_path / "out"), "--workers", "2"]


PAGE = """# A page
<!-- tiny -->
old
<!-- end tiny -->
<!-- tiny 1-bad -->
<!-- end tiny 1-bad -->
The end
"""


class Stops:
    """Breaks a run off after its first round."""

    def add(self, row):
        raise KeyboardInterrupt

    def advance(self, label, done, total):
        pass


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("rounds.jsonl")}


def test_methods_are_compared_and_an_interrupted_run_goes_on(script, tiny, tmp_path, capsys):
    compare, selection = script("compare_methods"), script("selection")
    page, out = tmp_path / "README.md", tmp_path / "out"
    page.write_text(PAGE)
    words = [*tiny, "--methods", "fedistill", "local", "--seeds", "0", "1", "--level", "0.2"]
    jobs = compare.planned(compare.parse(words))
    assert [one.key for one in jobs] == [
        (name, "iid", seed) for seed in "01" for name in ("fedistill", "local")
    ]
    with pytest.raises(KeyboardInterrupt):
        experiment.run(
            jobs[0].settings,
            out=jobs[0].folder,
            show=lambda title, rounds: contextlib.nullcontext(Stops()),
        )
    whole = experiment.run(jobs[0].settings, out=tmp_path / "whole")
    assert {selection.standing(one) for one in jobs} == {"open"}

    assert compare.main([*words, "--readme", str(page)]) == 0

    shown = capsys.readouterr()
    assert {selection.standing(one) for one in jobs} == {"done"}
    summary = json.loads((jobs[0].folder / "summary.json").read_text())
    assert summary["soft_targets_sha256"] == whole["soft_targets_sha256"]
    assert "4 runs in" in shown.err
    assert "[4/4 done]" in shown.err
    assert shown.out == (out / "compare.md").read_text()
    first, second, third = (part for part in shown.out.split("\n\n") if part.startswith("| m"))
    assert first.splitlines()[0] == "| method | iid | bytes per client-round, up + down |"
    assert re.search(
        r"^\| fedistill \| [\d.]+ ± [\d.]+ \(2\) \| \d+ \+ \d+ B \|$", first, re.MULTILINE
    )
    assert "| local | – | – |" in first
    assert re.search(r"^\| local \| [\d.]+ ± [\d.]+ \(2\) \|$", second, re.MULTILINE)
    assert "| local | round " in third
    written = page.read_text()
    assert written.startswith("# A page\n<!-- tiny -->\n\nStudent of the server")
    assert written.endswith(f"<!-- end tiny -->{PAGE.partition('<!-- end tiny -->')[2]}")
    assert "old" not in written
    found = json.loads((out / "compare.json").read_text())
    assert [(run["method"], run["seed"], len(run["course"])) for run in found["runs"]] == [
        ("fedistill", 0, 2),
        ("fedistill", 1, 2),
        ("local", 0, 2),
        ("local", 1, 2),
    ]
    assert found["left_out"] == {}
    drawing = ElementTree.parse(out / "compare.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert "local" in "".join(drawing.itertext())

    before = stamps(out)
    assert compare.main([*words, "--only-finished"]) == 0
    assert capsys.readouterr().out == shown.out
    assert compare.main([*words, "--readme", str(page)]) == 0
    assert page.read_text() == written
    assert stamps(out) == before


def test_a_run_that_fails_is_told_and_the_rest_goes_on(script, tiny, capsys):
    compare = script("compare_methods")
    lost = ["--set", "clients.quorum=4", "--set", "clients.dropout=0.99"]
    words = [*tiny, "--methods", "fedistill", "local", "--seeds", "0", "--rounds", "1", *lost]
    assert compare.main(words) == 3
    shown = capsys.readouterr()
    assert "| fedistill | – | – |" in shown.out
    assert re.search(r"^\| local \| [\d.]+ \(1\) \|$", shown.out, re.MULTILINE)
    assert "fedistill, iid, 0: failed: " in shown.err
    assert "left out: fedistill, iid, 0: " in shown.err
    assert "Traceback" not in shown.err


def test_nothing_is_run_if_only_the_finished_are_wanted(script, tiny, tmp_path, capsys):
    compare, runner = script("compare_methods"), script("runner")
    words = [*tiny, "--methods", "local", "--seeds", "0", "--only-finished"]
    assert runner.main_of(lambda: compare.main(words)) == 3
    assert "is finished: leave --only-finished out to run them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_no_process_and_says_how_to_go_on(
    script, tiny, tmp_path, monkeypatch, capsys
):
    compare, runner = script("compare_methods"), script("runner")

    def interrupt(progress, running):
        if any((one.folder / "rounds.jsonl").exists() for one in running):
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.Progress, "show", interrupt)
    with pytest.raises(SystemExit) as ended:
        compare.main([*tiny, "--methods", "fedistill", "--seeds", "0", "1", "--rounds", "500"])
    assert ended.value.code == 130
    assert not multiprocessing.active_children()
    said = capsys.readouterr().err
    assert "interrupted: 0 of 2 runs are done, the others keep their rounds. The same" in said


def test_bad_clients_are_told_rule_by_rule(script, tiny, tmp_path, capsys):
    bad = script("bad_clients")
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    words = [*tiny, "--rounds", "1", "--seeds", "0", "1", "--count", "1", "--readme", str(page)]
    words += ["--rules", "median", "krum", "--attacks", "likeliest-wrong"]
    assert bad.main(words) == 0
    shown = capsys.readouterr()
    assert "Bad clients: 1 of 4. Accuracy" in shown.out
    assert "| iid | clean | likeliest-wrong | worst |" in shown.out
    cell = r"−?[\d.]+ ± [\d.]+ \(2\)"
    assert re.search(rf"^\| median \| {cell} \| {cell} \| −?[\d.]+ \|$", shown.out, re.MULTILINE)
    assert "| **best rule** | " in shown.out
    assert re.search(r"^iid: (under each attack|no rule here keeps)", shown.out, re.MULTILINE)
    assert shown.out.strip() in page.read_text()
    names = {path.parent.name for path in (tmp_path / "out").glob("*/config.toml")}
    assert {
        "fedistill-krum-0.25-clean-iid-0",
        "fedistill-median-1-bad-likeliest-wrong-iid-1",
    } <= names
    told = config.load(tmp_path / "out" / "fedistill-krum-0.25-clean-iid-0" / "config.toml")
    assert (told.method.byzantine, told.attack.kind) == (0.25, None)
    found = json.loads((tmp_path / "out" / "1-bad.json").read_text())
    assert len(found["runs"]) == 8


def write_run(folder, rows, clients=2):
    folder.mkdir()
    keys = ("round", "student_accuracy", "client_accuracy_mean", "bytes_up", "bytes_down")
    lines = [
        dict(zip(keys, row, strict=True)) | {"clients_ok": 2, "clients_failed": 0, "seconds": 3.0}
        for row in rows
    ]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"r')
    (folder / "summary.json").write_text(json.dumps({"clients": clients}))


def test_figures_of_a_run(script, tmp_path):
    readout = script("readout")
    write_run(tmp_path / "a", [(1, 0.5, 0.4, 99, 20), (2, 0.7, None, 101, 60), (3, 0.8, 0.6, 4, 4)])
    found = readout.read(tmp_path / "a", 2, "predictions")
    assert (found.student, found.clients, found.up, found.down) == (0.7, None, 50.0, 20.0)
    assert found.seconds == 6.0
    step = found.reached(0.7)
    assert (step.round, step.sent) == (2, 140.0)
    assert found.exactly(step)
    assert found.reached(0.71) is None
    pooled = readout.read(tmp_path / "a", 3, "rows")
    assert (pooled.up, pooled.down, pooled.clients, pooled.student) == (None, None, None, 0.8)


def test_without_a_student_the_clients_stand_in(script, tmp_path):
    compare, readout = script("compare_methods"), script("readout")
    write_run(tmp_path / "a", [(1, None, 0.4, 2, 0), (2, None, None, 2, 0), (3, None, 0.8, 2, 0)])
    write_run(tmp_path / "b", [(1, None, 0.4, 2, 0), (2, None, 0.5, 2, 0)])
    one, other = (readout.read(tmp_path / name, 3, "prototypes") for name in "ab")
    assert one.student is None
    assert compare.reaching([one], 0.4) == "1 B, round 1 (1)"
    assert compare.reaching([one, other], 0.7) == "≤ 3 B, round ≤ 3 (1 of 2)"
    assert compare.reaching([other], 0.7) == "–"
    assert [step.accuracy for step in compare.mean_course([one, other])] == [0.4]


def test_a_rule_that_is_poor_without_attacks_is_not_the_best(script, tmp_path):
    bad = script("bad_clients")
    found = {
        ("good", "clean", "iid"): {0: 0.9, 1: 0.8},
        ("good", "lie", "iid"): {0: 0.85, 1: 0.75},
        ("poor", "clean", "iid"): {0: 0.3},
        ("poor", "lie", "iid"): {0: 0.31},
    }
    given = argparse.Namespace(
        rules=["good", "poor"], attacks=["lie"], splits=["iid"], count=2, collude=True, bar=2
    )
    assert bad.losses(found, "poor", "lie", "iid") == pytest.approx([-0.01])
    rule, loss = bad.best_rule(found, given, "lie", "iid")
    assert (rule, loss) == ("good", pytest.approx(0.05))
    told = bad.tables(found, given, 10)
    assert "Bad clients: 2 of 10, colluding." in told
    assert "| good | 85.0 ± 7.1 (2) | 5.0 ± 0.0 (2) | 5.0 |" in told
    assert "| poor | 30.0 (1) | −1.0 (1) | −1.0 |" in told
    assert "| **best rule** | good | 5.0 good |" in told
    assert "no rule here keeps the loss below 2 points under lie (5.0 with good)." in told
    given.bar = 6
    assert bad.verdict(found, given, "iid").endswith("the best rule loses less than 6 points.")


def test_a_finished_run_is_used_only_for_what_it_was(script, tiny, tmp_path):
    compare, selection = script("compare_methods"), script("selection")
    words = [*tiny, "--methods", "local", "--seeds", "0"]
    (one,) = compare.planned(compare.parse(words))
    experiment.run(one.settings, out=one.folder)
    assert selection.standing(one) == "done"
    (fewer,) = compare.planned(compare.parse([*words, "--rounds", "1"]))
    assert selection.standing(fewer) == "done"
    (more,) = compare.planned(compare.parse([*words, "--rounds", "3"]))
    assert selection.standing(more) == "open"
    (other,) = compare.planned(compare.parse([*words, "--set", "clients.lr=0.2"]))
    assert selection.standing(other).startswith("was run with other settings (clients): remove ")
    (one.folder / "method.json").write_text(json.dumps(selection.told(one.settings)))
    assert selection.standing(one) == "done"
    (one.folder / "method.json").write_text('{"rule": "median"}')
    assert selection.standing(one).startswith("was run when its method was another one: remove ")


def test_how_long_the_rest_takes(script, tiny, tmp_path):
    compare, runner = script("compare_methods"), script("runner")
    words = [*tiny, "--methods", "local", "fedavg", "--seeds", "0", "1", "--rounds", "4"]
    jobs = compare.planned(compare.parse(words))
    (tmp_path / "out").mkdir()
    write_run(jobs[0].folder, [(1, None, 0.4, 2, 0), (2, None, 0.5, 2, 0)])
    told = io.StringIO()
    progress = runner.Progress(jobs, jobs, 2, told)
    assert progress._left() == ["about 21 s left"]  # 2 + 3 * 4 rounds of 3 s, two at a time
    progress.ended(jobs[0], "")
    progress.ended(jobs[1], "no luck")
    assert told.getvalue().splitlines() == [
        "[1/4 done] local, iid, 0: 50.0 % in 6 s (about 18 s left)",
        "[1/4 done, 1 failed] fedavg, iid, 0: failed: no luck (about 12 s left)",
    ]


def test_splits_are_named_like_the_file_or_the_partition(script, tmp_path, monkeypatch):
    selection = script("selection")
    made = config.load(builders.write_settings(tmp_path))
    assert selection.own_splits(made) == ["iid"]
    assert selection.split_changes(made, "dirichlet:0.1") == [
        "clients.partition=dirichlet",
        "clients.alpha=0.1",
    ]
    with pytest.raises(SettingsError, match='expected "iid" without a value, found "iid:3"'):
        selection.split_changes(made, "iid:3")
    np.savez(tmp_path / "who.npz", public=[0], one_way_0=[1], one_way_1=[2], other_0=[3])
    changes = ["clients.partition=file", "clients.partition_path=who.npz"]
    monkeypatch.setenv("FEDISTILL_DATA", str(tmp_path))
    filed = config.load(tmp_path / "tiny.toml", [*changes, "clients.partition_key=other"])
    assert selection.own_splits(filed) == ["one_way", "other"]
    assert selection.split_changes(filed, "one_way") == ["clients.partition_key=one_way"]
    with pytest.raises(SettingsError, match='unknown split "one_wax"; did you mean "one_way"'):
        selection.split_changes(filed, "one_wax")


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("compare_methods", ["--methods", "ds-fll"], 'unknown method "ds-fll"; did you mean "ds-f'),
        ("compare_methods", ["--set", "seed=3"], "--set seed: is decided by the table: use --seed"),
        ("compare_methods", ["--rounds", "0"], "--rounds: expected 1 or more, found 0"),
        ("compare_methods", ["--level", "70"], "--level: expected a share above 0 and up to 1"),
        ("compare_methods", ["--plot-split", "dir"], "--plot-split: expected one of iid, found d"),
        ("compare_methods", ["--splits", "dri"], "clients.partition"),
        ("compare_methods", ["--set", "clients.lrr=1"], 'did you mean "lr"?'),
        ("bad_clients", ["--rules", "medain"], '--rules: unknown "medain"; did you mean "median"'),
        ("bad_clients", ["--method", "fd"], "--method: expected a method that shares predictions"),
        (
            "bad_clients",
            ["--count", "9", "--rules", "mean"],
            "expected at most clients.count (4), found 9",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(script, tiny, name, words, told, capsys):
    module, runner = script(name), script("runner")
    assert runner.main_of(lambda: module.main([*tiny, *words])) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


def test_missing_data_are_told_before_any_run(script, tiny, tmp_path, capsys):
    compare, runner = script("compare_methods"), script("runner")
    (tmp_path / "rows.npz").unlink()
    assert runner.main_of(lambda: compare.main([*tiny, "--methods", "local"])) == 3
    assert "expected a data file at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_page_without_the_markers_is_left_as_it_is(script, tmp_path):
    readout = script("readout")
    page = tmp_path / "page.md"
    page.write_text("<!-- end a -->\n<!-- a -->\n")
    with pytest.raises(DataError, match="expected <!-- a --> and below it <!-- end a -->"):
        readout.put(page, "a", "x")
    assert page.read_text() == "<!-- end a -->\n<!-- a -->\n"
    with pytest.raises(DataError, match=r"expected a page at .*none\.md \(No such file"):
        readout.put(tmp_path / "none.md", "a", "x")


def test_the_readme_has_the_markers_of_its_commands():
    text = (REPO / "simulations" / "README.md").read_text()
    for name in ("fashion10", "fashion10 2-bad", "fashion10 4-bad", "fashion10 4-colluding"):
        assert text.index(f"<!-- {name} -->\n") < text.index(f"<!-- end {name} -->\n")
