"""Run folders, whole, cut short and broken."""

import json
import re

import pytest

from fedistill.errors import FedistillError, RunError
from fedistill.report.folder import read_run


def test_a_whole_run_with_baselines_and_repeats(make_run):
    run = read_run(make_run(rounds=5, seeds=2))
    assert [row["round"] for row in run.rounds] == [1, 2, 3, 4, 5]
    assert (run.name, run.method, run.setting("clients", "alpha")) == (
        "heart-four-hospitals",
        "fedistill",
        0.3,
    )
    assert list(run.baselines) == ["fedavg", "local"]
    assert len(run.repeats) == 2
    assert run.curve("student_accuracy")[0].sd == 0.018
    assert not run.remarks


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: folder / "nowhere",
        lambda folder: folder,
        lambda folder: folder / "file",
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(tmp_path, build):
    (tmp_path / "file").write_text("")
    with pytest.raises(FedistillError, match=r"expected .* found .* name the folder") as caught:
        read_run(build(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[1]", "line 1: expected a JSON object, found list"),
        ('{"round": "one"}', "line 1: expected a whole number 'round', found one"),
        (
            '{"round": 1, "student_accuracy": "good"}',
            "a number or null as 'student_accuracy', found",
        ),
        ('{"round": 1, "seconds": true}', "expected a number or null as 'seconds', found True"),
        ("{{{", "line 1: expected a JSON object, found {{{"),
    ],
)
def test_a_broken_round_is_named_with_its_line(make_run, line, expected):
    folder = make_run(rounds=2, baselines=())
    path = folder / "rounds.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(RunError, match=re.escape(expected)):
        read_run(folder)


def test_a_torn_last_line_is_left_out(make_run):
    folder = make_run(rounds=3)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "stud')
    run = read_run(folder)
    assert len(run.rounds) == 3
    assert "cut short" in run.remarks[0]


def test_a_round_written_twice_counts_once(make_run):
    folder = make_run(rounds=3)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "student_accuracy": 0.25}\n')
    run = read_run(folder)
    assert [point.y for point in run.curve("student_accuracy")][1] == 0.25
    assert len(run.rounds) == 3


def test_without_summary_and_settings_the_last_round_speaks(make_run):
    folder = make_run(rounds=3, baselines=())
    (folder / "summary.json").unlink()
    (folder / "config.toml").unlink()
    run = read_run(folder)
    assert run.figure("student_accuracy") == run.rounds[-1]["student_accuracy"]
    assert run.name == folder.name
    assert len(run.remarks) == 2


@pytest.mark.parametrize("content", ["[]", "{", "\udce4"])
def test_a_broken_summary_is_refused(make_run, content):
    folder = make_run(rounds=1)
    (folder / "summary.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=r"summary\.json: expected"):
        read_run(folder)


def test_a_broken_baseline_is_a_remark(make_run):
    folder = make_run(rounds=2)
    (folder / "baselines" / "local" / "rounds.jsonl").unlink()
    run = read_run(folder)
    assert list(run.baselines) == ["fedavg"]
    assert run.remarks[0].startswith("local is left out: expected rounds.jsonl")


def test_not_a_number_counts_as_missing(make_run):
    folder = make_run(rounds=1, baselines=())
    row = json.loads((folder / "rounds.jsonl").read_text()) | {"student_accuracy": float("nan")}
    (folder / "rounds.jsonl").write_text(json.dumps(row) + "\n")
    assert read_run(folder).curve("student_accuracy") == ()
