"""The report says what a reader must know, escapes what others wrote, and loads nothing."""

import json
import re
import xml.etree.ElementTree as Tree
from html.parser import HTMLParser

import pytest

from fedistill.errors import RunError
from fedistill.report import write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Balanced(HTMLParser):
    """Fails on tags that do not match."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    return text


def plain(text):
    """What a reader sees of a page."""
    body = text[text.index("<main>") :]
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def change_summary(folder, **values):
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_headline_and_the_tiles(make_run):
    seen = plain(report(make_run(rounds=12)))
    assert "8 sites, one student: 89.4% correct after 12 rounds" in seen
    assert "84.6× fewer, both ways together" in seen
    assert "Up: 412 B per client and round, 208× fewer bytes than FedAvg." in seen
    assert "shared only predictions on 400 proxy rows" in seen
    assert "no differential privacy" in seen


def test_every_part_is_there(make_run):
    text = report(make_run(left_out=True, baselines=("local", "fedavg", "centralised")))
    for title in (
        "Accuracy by round",
        "Area under the curve",
        "Each site",
        "Do the sites",
        "Bytes sent",
        "Who took part",
        "Privacy",
        "Notes",
        "To get this run",
        "Settings",
        "Words",
    ):
        assert f"<h2>{title}" in text
    seen = plain(text)
    for words in (
        "left-out student",
        "best single other",
        "centralised",
        "dropped: late",
        "flagged: single-class",
        "3f3f",
        "2.13.0",
        "gradient-boosting",
        "preset fedistill",
    ):
        assert words in seen


def test_charts_are_well_formed_and_their_names_unique(make_run):
    text = report(make_run(seeds=2))
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) > 8
    for one in drawn:
        Tree.fromstring(one)
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))


def test_nothing_is_loaded_and_nothing_runs(make_run):
    text = report(make_run())
    loading = r"https?://|<script|<link|<img|<iframe|\bsrc=|@import|url\(|\son\w+="
    assert not re.search(loading, text)
    assert "default-src 'none'" in text


def test_what_clients_wrote_is_escaped_and_capped(make_run):
    bad = "<script>alert(1)</script>"
    long = "x" * 5000
    folder = make_run(
        names=[bad, '"><img src=x onerror=y>', long, "a\x1b[2J\u202eb"],
        name=bad,
        status=f"failed:{bad}",
        notes=[bad],
        versions={bad: bad},
        classes=[bad],
    )
    (folder / "baselines" / "local").rename(folder / "baselines" / "<b>&")
    text = report(folder)
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;" in text
    assert "x" * 100 not in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_losing_against_fedavg_is_a_warning(make_run):
    text = report(make_run(fedavg=500))
    assert 'class="warning"' in text
    assert "This run sent 2.0× more bytes than FedAvg" in plain(text)
    assert "MORE, both ways" in plain(text)


def test_losing_one_way_is_a_warning_too(make_run):
    seen = plain(report(make_run(fedavg=1200)))
    assert "On the way down this run sent 1.34× more bytes than FedAvg." in seen


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("interrupted", "The run did not finish."),
        ("failed:quorum", "The run failed: too few usable uploads."),
    ],
)
def test_an_unfinished_run_says_so(make_run, status, words):
    assert words in plain(report(make_run(status=status)))


def test_a_finished_winning_run_has_no_warning(make_run):
    assert 'class="warning"' not in report(make_run())


def test_privacy_is_never_made_up(make_run):
    folder = make_run(privacy={"mechanism": "dpsgd"}, epsilon_max=2.5)
    seen = plain(report(folder))
    assert "ε = 2.5" in seen
    assert "Privacy loss by round" not in seen
    assert "dpsgd: unit, relation and δ are not stated" in seen
    change_summary(folder, epsilon_max=None)
    seen = plain(report(folder))
    assert "ε unknown" in seen
    assert "no DP" not in seen
    change_summary(folder, privacy={}, epsilon_max=None)
    assert "no differential privacy" in plain(report(folder))


@pytest.mark.parametrize("method", ["local", "centralised", "fedavg", "fedproto"])
def test_of_other_methods_it_does_not_say_that_only_predictions_were_shared(make_run, method):
    assert "predictions on" not in plain(report(make_run(method=method))).split("Words")[0]


def test_best_value_and_difference_to_the_reference(make_run):
    figures = {"local": {"accuracy": 0.8}, "client": {"accuracy": 0.85, "auc": None}}
    seen = plain(report(make_run(sites={"north": {"figures": figures}})))
    assert "north 80.0% ● 85.0% +5.0" in seen
    assert "difference to “local”, in percentage points" in seen
    assert "1 of 1 site ended better, 0 worse" in seen


def test_without_baselines_the_first_round_is_the_reference(make_run):
    figures = {"first round": {"accuracy": 0.8}, "client": {"accuracy": 0.7}}
    seen = plain(report(make_run(sites={"north": {"figures": figures}})))
    assert "● 80.0% 70.0% −10.0" in seen
    assert "Compared with their first round, 0 of 1 site ended better, 1 worse" in seen


def test_binding_keys_alone_are_enough(make_run):
    folder = make_run(rounds=4, baselines=())
    keep = (
        "round",
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
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    (folder / "rounds.jsonl").write_text(
        "".join(json.dumps({k: row[k] for k in keep}) + "\n" for row in rows)
    )
    (folder / "summary.json").unlink()
    (folder / "config.toml").unlink()
    seen = plain(report(folder))
    assert "The run did not finish." in seen
    assert "Each site" not in seen


@pytest.mark.parametrize("lines", ["", '{"round": 1}\n', '{"round": 0, "student_accuracy": 1}\n'])
def test_hardly_anything_is_still_a_page(tmp_path, lines):
    (tmp_path / "rounds.jsonl").write_text(lines)
    assert "<h1>" in report(tmp_path)


@pytest.mark.parametrize("junk", [1, "x", [], {"a": 1}, None, {"a": {"figures": 3}}])
def test_junk_in_the_extras_is_left_out(make_run, junk):
    folder = make_run(rounds=3)
    change_summary(folder, sites=junk, versions=junk, notes=junk, classes=junk, privacy=junk)
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    (folder / "rounds.jsonl").write_text(
        "".join(
            json.dumps(
                row
                | {
                    "client_accuracy": junk,
                    "agreement": junk,
                    "dropped": junk,
                    "flags": junk,
                    "student_auc": junk,
                }
            )
            + "\n"
            for row in rows
        )
    )
    report(folder)


def test_the_same_run_gives_the_same_page(make_run):
    folder = make_run()
    assert report(folder) == report(folder)


def test_the_page_is_replaced_whole_and_nothing_is_left_behind(make_run):
    folder = make_run()
    (folder / "report.html").write_text("old")
    report(folder)
    assert not list(folder.glob(".report*"))


def test_a_folder_that_is_no_run_is_left_as_it_is(tmp_path):
    with pytest.raises(RunError):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
