"""The report says what was shared beside predictions, and what was done to clients on purpose."""

import json
import re
import subprocess
import sys

import pytest

from fedistill.exchange import EXCHANGES
from fedistill.report import compare, write_report
from fedistill.report.charts import messages
from fedistill.report.folder import read_run
from fedistill.report.participation import incidents
from fedistill.report.shared import exchange, method_of
from fedistill.report.simulated import attack, bad, losses
from fedistill.status import read_status
from fedistill.status.show import tiles


def seen(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    body = text[text.index("<main>") :]
    return " ".join(re.sub(r"<[^>]+>", " ", body).replace("&#39;", "'").split())


def configure(folder, text):
    path = folder / "config.toml"
    path.write_text(path.read_text() + text)


def change(folder, edit, **summary):
    """Edit every line of the rounds, and replace keys of the summary."""
    path = folder / "rounds.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(edit(row)) + "\n" for row in rows))
    found = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(found | summary))


def without_student(make_run, name="run", method="fd"):
    folder = make_run(name, rounds=4, baselines=(), method=method)
    change(
        folder,
        lambda row: row | {"student_accuracy": None, "student_auc": None, "agreement": None},
        student_accuracy=None,
        student_auc=None,
    )
    return folder


@pytest.mark.parametrize(
    ("method", "name"),
    [("fd", "class-logits"), ("fedproto", "prototypes"), ("fedhenn", "kernel")],
)
def test_what_a_table_tells_is_a_warning_and_stands_under_privacy(make_run, method, name):
    page = seen(without_student(make_run, method=method))
    told = EXCHANGES[name].tells
    assert f"The sites shared more than predictions. It tells {told}." in page
    assert f"Rows never left a site. What was shared tells {told}." in page
    assert f"exchanged tables: {EXCHANGES[name].summary}." in page
    assert "predictions on the proxy rows did" not in page
    assert "rule distribution-weighted" not in page


def test_a_run_without_a_student_has_no_empty_figures_of_one(make_run):
    page = seen(without_student(make_run))
    assert re.search(r"8 sites: \d\d\.\d% correct on average after 4 rounds", page)
    assert "Student none the server has no model" in page
    assert "for the same student" not in page
    assert "for the student of the settings" in page


def test_the_status_of_a_run_without_a_student_shows_the_clients(make_run):
    found = {tile["name"]: tile for tile in tiles(read_status(without_student(make_run)))}
    assert re.fullmatch(r"\d\d\.\d%", found["accuracy"]["value"])
    assert found["accuracy"]["context"] == "clients' mean, last round"
    found = {tile["name"]: tile for tile in tiles(read_status(make_run("other")))}
    assert found["accuracy"]["context"] == "student, last round"


def test_without_any_measurement_nothing_is_said_of_a_student(make_run):
    folder = without_student(make_run)
    nothing = {"client_accuracy_mean": None, "client_accuracy_min": None}
    change(folder, lambda row: row | nothing, **nothing)
    assert "the server has no model" not in seen(folder)


def test_of_an_unknown_method_it_claims_only_what_the_summary_says(make_run):
    folder = make_run(method="my-own")
    assert exchange(read_run(folder)) == ""
    assert "Rows never left a site" not in seen(folder)
    change(folder, lambda row: row, exchange="predictions")
    assert "predictions on the proxy rows did" in seen(folder)
    change(folder, lambda row: row, exchange="my-table", tells="what I had for lunch")
    assert "It tells what I had for lunch." in seen(folder)


def test_familiarity_and_declined_rows_are_told_with_predictions(make_run):
    assert "how familiar the row is to the site" in seen(make_run("a"))
    assert "which ones shows, more coarsely" in seen(make_run("b", method="selective-fd"))
    assert "how familiar" not in seen(make_run("c", method="ds-fl"))


def test_changes_of_the_settings_count(make_run):
    folder = make_run(method="ds-fl")
    path = folder / "config.toml"
    path.write_text(path.read_text().replace("[student]", 'rule = "calibrated"\n\n[student]'))
    assert "Each site told which classes it has met." in seen(folder)
    path.write_text(path.read_text().replace('"calibrated"', '"no-such-rule"'))
    assert method_of(read_run(folder)).rule == "sharpened"


def test_a_report_of_predictions_imports_no_torch(make_run):
    code = "import sys; from fedistill.report import write_report; write_report(sys.argv[1]); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(make_run())], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


# --- on purpose ----------------------------------------------------------------------------------


def attacked(make_run, name="run", **more):
    folder = make_run(name, rounds=3, baselines=(), **more)
    configure(folder, '\n[attack]\nkind = "fdla"\ncount = 2\ncollude = true\n')

    def honest(row):
        each = {k: v for k, v in row["client_accuracy"].items() if k not in {"site-1", "site-4"}}
        return row | {"client_accuracy": each}

    change(folder, honest)
    return folder


def test_bad_sites_are_named_and_marked(make_run):
    folder = attacked(make_run)
    run = read_run(folder)
    assert attack(run) == "2 × fdla, colluding"
    assert bad(run) == ("site-1", "site-4")
    page = seen(folder)
    assert "made bad on purpose: 2 × fdla, colluding (site-1, site-4)." in page
    assert page.count("made bad: what its model can do, not what it says") == 2


def test_names_are_not_guessed(make_run):
    folder = attacked(make_run)
    change(folder, lambda row: row | {"client_accuracy": {"site-0": 0.5}})
    assert bad(read_run(folder)) == ()
    assert "made bad on purpose: 2 × fdla, colluding." in seen(folder)
    change(folder, lambda row: row, bad=["site-7"])
    assert bad(read_run(folder)) == ("site-7",)


def test_losses_are_told_and_late_uploads_counted(make_run):
    folder = make_run(rounds=5, baselines=())
    path = folder / "config.toml"
    lost = "dropout = 0.3\nstragglers = 0.1\nlateness = 2\ncolumn ="
    path.write_text(path.read_text().replace("column =", lost))
    change(folder, lambda row: row | {"clients_late": 1, "dropped": {"site-2": "offline"}})
    assert losses(read_run(folder)) == "30% offline, 10% late by 2"
    page = seen(folder)
    assert "lost and late on purpose, in each round: 30% offline, 10% late by 2." in page
    assert "39 of 40 uploads were used in their round; 1 of 5 rounds went on" in page
    assert "5 more uploads came late and counted less." in page
    assert "dropped: offline was away" in page


def test_without_any_of_it_nothing_is_said(make_run):
    run = read_run(make_run())
    assert (attack(run), losses(run), bad(run)) == ("", "", ())
    assert "on purpose" not in seen(make_run())


@pytest.mark.parametrize(
    "code", ["identical", "constant", "echo", "overconfident", "width", "clipped", "inactive"]
)
def test_every_flag_is_explained(make_run, code):
    folder = make_run(rounds=3)
    change(folder, lambda row: row | {"flags": {"site-3": [code]}, "dropped": {}})
    (found,), more = incidents(read_run(folder))
    assert (found.kind, found.code, found.rounds) == ("flagged", code, "1–3")
    assert found.meaning
    assert not more


def test_an_upload_that_is_late_is_a_message_too():
    assert messages({"clients_ok": 3, "clients_failed": 2}) == 8
    assert messages({"clients_ok": 3, "clients_failed": 2, "clients_late": 1}) == 9


def test_runs_that_differ_in_it_are_cautioned(make_run):
    runs = [make_run("clean"), attacked(make_run, "bad"), without_student(make_run, "fd")]
    comparison = compare(runs)
    assert "bad sites" in comparison.cautions[0]
    lines = {line.name: [entry.text for entry in line.entries] for line in comparison.lines}
    assert lines["bad sites"] == ["none", "2 × fdla, colluding", "none"]
    assert lines["shared"] == ["predictions", "predictions", "class-logits"]
    assert lines["student"][2] == "–"
    assert "losses" not in lines
    same = compare([runs[0], runs[0]])
    assert "shared" not in {line.name for line in same.lines}
