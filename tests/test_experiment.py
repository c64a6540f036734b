"""From a settings file to a run folder."""

from __future__ import annotations

import dataclasses
import json

import pytest
from builders import read_lines, write_settings

import fedistill as fd
from fedistill import assembly, config, experiment, store
from fedistill.client import Site
from fedistill.config import Settings
from fedistill.errors import CheckpointError, DataError, RunError, SettingsError

KEYS = {
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
}
FACTS = {
    "bytes_up_per_client_round",
    "bytes_down_per_client_round",
    "fedavg_bytes_per_client_round",
    "bytes_saving",
    "backend",
    "seed",
    "proxy_sha256",
    "soft_targets_sha256",
    "versions",
}


@pytest.fixture
def answers(monkeypatch):
    """The rounds that sites really took part in."""
    calls = []
    answer = Site.answer

    def counted(site, *given):
        calls.append(site.client.id)
        return answer(site, *given)

    monkeypatch.setattr(Site, "answer", counted)
    return calls


def small(tmp_path, *overrides, rounds=2, **options):
    path = write_settings(tmp_path, rounds=rounds)
    given = ["clients.epochs=1", "student.epochs=1", *overrides]
    return fd.run(path, overrides=given, out=tmp_path / "run", **options)


def test_the_run_folder_holds_what_is_promised(tmp_path):
    summary = small(tmp_path)
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2]
    assert set(rows[0]) >= KEYS
    saved = json.loads((folder / "summary.json").read_text())
    assert set(saved) >= FACTS | (KEYS - {"seconds"})
    assert saved["status"] == "done"
    assert saved["student_accuracy"] == rows[-1]["student_accuracy"] == summary["student_accuracy"]
    assert (folder / "report.html").stat().st_size > 1000
    assert (folder / "checkpoint" / "server").exists()
    assert sorted(path.name for path in (folder / "sites").iterdir()) == sorted(saved["rows"])
    assert config.load(folder / "config.toml").rounds == 2
    assert summary["folder"] == str(folder)


def test_equal_runs_are_equal_but_for_the_time(tmp_path):
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        summary = small(tmp_path / name)
        summary = {k: v for k, v in summary.items() if k not in {"seconds", "folder", "history"}}
        found.append((summary, read_lines(tmp_path / name / "run" / "rounds.jsonl")))
    assert found[0] == found[1]


def test_a_finished_run_is_not_computed_again(tmp_path, answers):
    first = small(tmp_path)
    done = len(answers)
    assert done == 8
    second = small(tmp_path, resume=True)
    assert len(answers) == done
    assert "all 2 rounds were done before: more --rounds go on" in second["notes"]
    assert not any("done before" in note for note in first["notes"])
    assert second["soft_targets_sha256"] == first["soft_targets_sha256"]


def test_more_rounds_go_on_from_the_last_and_equal_one_run(tmp_path, answers):
    small(tmp_path)
    answers.clear()
    longer = small(tmp_path, resume=True, rounds=3)
    assert len(answers) == 4
    (tmp_path / "whole").mkdir()
    whole = small(tmp_path / "whole", rounds=3)
    assert longer["soft_targets_sha256"] == whole["soft_targets_sha256"]
    assert read_lines(tmp_path / "run" / "rounds.jsonl") == read_lines(
        tmp_path / "whole" / "run" / "rounds.jsonl"
    )


def test_other_settings_do_not_resume(tmp_path):
    small(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a run with other settings \(seed\)"):
        small(tmp_path, "seed=4", resume=True)
    with pytest.raises(CheckpointError, match=r"other settings \(backend.name, backend.threads\)"):
        small(tmp_path, "backend.name=vectorized", "backend.threads=2", resume=True)


def test_what_changes_memory_and_time_alone_may_change(tmp_path):
    small(tmp_path)
    longer = small(
        tmp_path,
        *("backend.awake=1", "backend.store=memory", "backend.workers=3"),
        resume=True,
        rounds=3,
    )
    (tmp_path / "whole").mkdir()
    assert (
        longer["soft_targets_sha256"]
        == (small(tmp_path / "whole", rounds=3)["soft_targets_sha256"])
    )


def test_repeats_are_seeds_with_mean_and_deviation(tmp_path, answers):
    summary = small(tmp_path, "evaluation.repeats=2")
    folder = tmp_path / "run"
    each = [json.loads((folder / f"seed-{seed}" / "summary.json").read_text()) for seed in (3, 4)]
    assert summary["repeats"] == 2
    assert summary["seeds"] == [3, 4]
    scores = [entry["student_accuracy"] for entry in each]
    assert each[0]["soft_targets_sha256"] != each[1]["soft_targets_sha256"]
    assert summary["student_accuracy"] == pytest.approx(sum(scores) / 2)
    if scores[0] != scores[1]:
        deviation = abs(scores[0] - scores[1]) / 2**0.5
        assert summary["student_accuracy_sd"] == pytest.approx(deviation)
    assert len(read_lines(folder / "rounds.jsonl")) == 2
    assert len(answers) == 16


def test_baselines_run_on_the_same_rows(tmp_path, answers):
    summary = small(
        tmp_path, 'evaluation.baselines=["local", "centralised", "fedavg"]', "clients.group=[]"
    )
    folder = tmp_path / "run" / "baselines"
    told = {
        name: json.loads((folder / name / "summary.json").read_text())
        for name in ("local", "centralised", "fedavg")
    }
    assert {entry["proxy_sha256"] for entry in told.values()} == {summary["proxy_sha256"]}
    assert {name: entry["method"] for name, entry in told.items()} == {n: n for n in told}
    assert told["local"]["rows"] == summary["rows"]
    figures = next(iter(summary["sites"].values()))["figures"]
    assert {"first round", "client", "student", "local", "centralised", "fedavg"} <= set(figures)
    before = len(answers)
    small(
        tmp_path,
        'evaluation.baselines=["local", "centralised", "fedavg"]',
        "clients.group=[]",
        resume=True,
    )
    assert len(answers) == before, "a finished baseline is not computed again"


def test_leave_one_out_leaves_each_site_out_once(tmp_path, answers):
    summary = small(tmp_path, "evaluation.leave_one_out=true", "clients.count=3", rounds=1)
    folder = tmp_path / "run" / "leave-one-out"
    sites = sorted(summary["rows"])
    assert sorted(path.name for path in folder.iterdir()) == sites
    for site in sites:
        told = json.loads((folder / site / "summary.json").read_text())
        assert sorted(told["rows"]) == [other for other in sites if other != site]
        assert told["models"] == {k: v for k, v in summary["models"].items() if k != site}
        found = summary["sites"][site]["figures"]["left-out student"]
        assert found["accuracy"] == told["student_accuracy"], "all sites share the test rows"
    assert len(answers) == 3 + 3 * 2


def test_leave_one_out_works_when_groups_name_every_client(tmp_path):
    groups = 'clients.group=[{count=1, model="linear"}, {count=2, width=4}]'
    summary = small(tmp_path, "evaluation.leave_one_out=true", "clients.count=3", groups, rounds=1)
    assert sorted(summary["models"].values()) == ["linear", "mlp", "mlp"]


def test_clients_are_measured_as_often_as_is_asked(tmp_path):
    small(tmp_path, "evaluation.every=3", rounds=5)
    rows = read_lines(tmp_path / "run" / "rounds.jsonl")
    measured = [row["round"] for row in rows if row["client_accuracy_mean"] is not None]
    assert measured == [1, 3, 5]
    assert all(row["student_accuracy"] is not None for row in rows)


def test_breast_cancer_by_iid_learns_with_auc(tmp_path):
    settings = config.parse("""
rounds = 3
[data]
source = "breast-cancer"
[proxy]
rows = 100
[clients]
count = 3
partition = "iid"
width = 16
epochs = 3
batch_size = 20
[[clients.group]]
count = 1
model = "logistic-regression"
[student]
width = 16
epochs = 4
[evaluation]
baselines = ["local"]
leave_one_out = true
[backend]
device = "cpu"
""")
    summary = fd.run(settings, out=tmp_path / "run")
    assert summary["student_accuracy"] > 0.85
    assert summary["student_auc"] > 0.9
    assert "logistic-regression" in summary["models"].values()
    for entry in summary["sites"].values():
        assert {"client", "student", "local", "left-out student", "best single other"} <= set(
            entry["figures"]
        )


def test_a_used_default_folder_is_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert experiment.default_folder("x", resume=False).as_posix() == "runs/x"
    for name in ("x", "x-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").write_text("")
    assert experiment.default_folder("x", resume=False).as_posix() == "runs/x-3"
    assert experiment.default_folder("x", resume=True).as_posix() == "runs/x-2"


def test_settings_change_the_preset():
    settings = config.parse("[method]\npreset = 'ds-fl'\nrule = 'mean'\nsoft_weight = 0.5")
    found = assembly.method_of(settings)
    assert (found.name, found.rule, found.codec) == ("ds-fl", "mean", "float32")
    assert found.client["soft_weight"] == 0.5
    assert found.client["distil"] == "phase"


def test_every_method_setting_reaches_the_method():
    texts = {
        "rule": "median-of-none",
        "codec": "u8",
        "sharpen": "power:3",
        "temperature": 3.0,
        "distil": "never",
        "distil_epochs": 7,
        "soft_weight": 0.25,
        "prior_rows": 5.0,
        "codec_down": "simplex-4",
        "cache": True,
        "rows": "fixed",
        "student_rule": "median",
        "teach": "student",
        "familiarity": "kulsif",
    }
    of_a_rule = {
        "prior_rows": "distribution-weighted",
        "exponent": "power",
        "trim": "trimmed-mean",
        "byzantine": "krum",
        "diversity": "consensus",
        "centroids": "clusters",
        "rate": "trust",
        "forget": "trust",
    }
    for item in dataclasses.fields(config.MethodSettings):
        if item.name in {"preset", "rule"}:
            continue
        value = texts.get(item.name, 1)
        needs = {"rule": of_a_rule[item.name]} if item.name in of_a_rule else {}
        needs |= {"cache": True} if item.name == "cache_rounds" else {}
        changed = config.MethodSettings(preset="ds-fl", **({item.name: value} | needs))
        found = assembly.method_of(dataclasses.replace(Settings(), method=changed))
        places = getattr(found, item.name, None), found.client.get(item.name)
        assert value in {*places, found.options.get(item.name)}, item.name


def test_student_settings_reach_the_students_recipe():
    settings = config.parse("[student]\nepochs = 0\nlr = 0.5\nbatch_size = 3")
    assert assembly.student_options(settings) == {"distil_epochs": 0, "lr": 0.5, "batch_size": 3}


def test_a_wrong_file_is_told_before_a_folder_is_made(tmp_path):
    with pytest.raises(SettingsError):
        fd.run(tmp_path / "no.toml", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_written_over(tmp_path):
    small(tmp_path)
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(RunError, match="holds a run already: add --resume"):
        small(tmp_path, "clients.lr=0.5")
    with pytest.raises(CheckpointError, match="other settings"):
        small(tmp_path, "clients.lr=0.5", rounds=9, resume=True)
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        small(tmp_path)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_two_processes_cannot_share_a_run_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with store.held(tmp_path / "run"), pytest.raises(RunError, match="in use by another process"):
        small(tmp_path)


def test_a_start_that_fails_leaves_the_name_free(tmp_path):
    with pytest.raises(DataError):
        small(tmp_path, "data.source=csv:nowhere.csv")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_left_out_site_gives_no_proxy_rows(tmp_path):
    lines = ["x,y,site,label"]
    lines += [f"{k % 7},{k % 5},{'abc'[k % 3]},{k % 2}" for k in range(120)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    settings = config.parse(
        f'[data]\nsource = "csv:rows.csv"\npath = "{tmp_path}"\n[proxy]\nrows = 30\n'
        '[clients]\npartition = "by-column"\ncolumn = "site"\n'
    )
    whole = fd.data.prepare(settings.data, settings.proxy, settings.clients, settings.seed)
    rest = experiment.without("b", whole, settings)
    assert set(rest.parts) == {"a", "c"}
    assert set(rest.tests) == {"a", "b", "c"}
    assert set(rest.dataset.public.site.tolist()) == {"a", "c"}
    assert len(rest.dataset.public) < len(whole.dataset.public)
    for name in ("a", "c"):
        assert rest.parts[name].ids.tolist() == whole.parts[name].ids.tolist()
