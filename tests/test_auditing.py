"""What ``fedistill audit`` does, from a settings file to figures and a page."""

import json
import re

import pytest

from fedistill import config
from fedistill.auditing import audit, charged_rounds, claim, lines, result
from fedistill.errors import RunError
from fedistill.privacy import dpsgd, votes
from fedistill.privacy.attacks import LabelMix
from fedistill.privacy.audit import Attack, Audit
from fedistill.privacy.bounds import Guesses
from fedistill.privacy.events import Gaussian, Spending
from fedistill.privacy.ledger import Ledger

SETTINGS = """
seed = 3
rounds = 2
[data]
source = "digits"
test_rows = 300
[proxy]
rows = 400
[clients]
count = 6
partition = "iid"
model = "mlp"
width = 32
epochs = 5
"""


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "run.toml"

    def write(*changes):
        path.write_text(config.to_toml(config.parse(SETTINGS, changes)))
        return path

    return write


def found(lower=0.5, ceiling=5.0, spent=3.0, noise=None, draws=0):
    attack = Attack("model", "loss", Guesses(lower, ceiling, 100, 60), 0.2, 0.6, 0.02, ((0, 0),))
    return Audit(1000, 500, (attack,), LabelMix(0.1, 0.4), 1.0, noise, draws, spent)


# --- the verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audits", "claimed", "passed", "informative", "says"),
    [
        ([found()], 3.0, True, True, "passed: epsilon is at least 0.50, claimed is 3.00"),
        ([found(ceiling=2.5)], 3.0, True, False, "not informative at this epsilon"),
        ([found(lower=3.1)], 3.0, False, True, "FAILED: epsilon is at least 3.10"),
        ([found(), found(lower=3.1)], 3.0, False, True, "FAILED"),
        ([found(noise=0.0, draws=500)], 3.0, False, True, "holds noise of 0.000 where 1.000"),
        ([found(lower=3.1)], None, True, False, "no claim"),
    ],
)
def test_the_verdict(audits, claimed, passed, informative, says):
    told = result(audits, claimed)
    assert (told["passed"], told["informative"]) == (passed, informative)
    assert says in told["verdict"]


def test_the_claim_is_that_of_the_costliest_ledger(tmp_path):
    paths = []
    for name, times in (("a", 1), ("b", 4)):
        home = tmp_path / "sites" / name
        home.mkdir(parents=True)
        paths.append(home / "ledger.sqlite")
        ledger = Ledger(paths[-1])
        for number in range(times):
            ledger.reserve(
                run="r",
                round=number,
                mechanism="dpsgd",
                spending=Spending.of(Gaussian(5.0)),
                unit="record",
                relation="add-remove",
                units=[b"x"],
                epsilon=8.0,
                delta=1e-5,
            )
    claimed, source = claim(paths, 1e-5, [found()])
    cheap, dear = (Ledger(path).spent(1e-5) for path in paths)
    assert claimed == dear > cheap
    assert source == "ledgers of the run"
    assert [charged_rounds(paths, name) for name in ("a", "b", "c")] == [1, 4, 0]
    assert claim([], 1e-5, [found(spent=2.0), found(spent=3.0)])[0] == 3.0
    assert claim(paths, 1e-5, [found(spent=float("inf"))])[0] is None


# --- from a file ---------------------------------------------------------------------------------


def test_without_privacy_there_is_no_claim_and_the_rows_are_given_away(settings, tmp_path):
    said = []
    told = audit(
        settings("clients.epochs=40", "clients.lr=0.3"),
        canaries=600,
        out=tmp_path / "out",
        say=said.append,
    )
    assert told["passed"]
    assert told["epsilon_claimed"] is None
    assert told["epsilon_lower"] > 1
    saved = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert saved == told
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "no claim" in page
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=|<script|https?://(?!www\.w3\.org)", page)
    assert any(line.startswith("no claim") for line in said)
    assert len(list(lines(told))) >= 6


def test_a_run_folder_is_audited_from_its_settings_and_left_as_it_was(settings, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(settings().read_text())
    told = audit(run, canaries=100, client="site-2")
    assert told["client"] == "site-2"
    assert sorted(path.name for path in run.iterdir()) == [
        "audit.html",
        "audit.json",
        "config.toml",
    ]


def test_of_many_rows_some_are_drawn(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("fedistill.auditing.MOST_OWN_ROWS", 50)
    first, again = (audit(settings(), canaries=100, out=tmp_path) for _ in range(2))
    assert first["rows"] == 50
    assert first == again


def test_noise_at_the_server_is_not_audited_this_way(settings, tmp_path):
    told = audit(
        settings("privacy.mechanism=central-gauss", "clients.count=100"), out=tmp_path / "out"
    )
    assert told["passed"]
    assert not told["audited"]
    assert "central-gauss" in told["verdict"]
    assert "Not audited" in (tmp_path / "out" / "audit.html").read_text()


def test_what_cannot_be_audited_is_said(settings):
    with pytest.raises(RunError, match='no client "nobody"'):
        audit(settings(), client="nobody")
    with pytest.raises(RunError, match="at least 100 canaries"):
        audit(settings(), canaries=10)


# --- the bar: every mechanism --------------------------------------------------------------------

MECHANISMS = ("dpsgd", "dp-head", "gnmax")


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_honest_runs_pass_with_five_seeds(settings, tmp_path, mechanism):
    path = settings(f"privacy.mechanism={mechanism}", "privacy.epsilon=3")
    told = audit(path, canaries=1000, seeds=5, out=tmp_path)
    assert told["passed"]
    assert told["epsilon_lower"] < told["epsilon_claimed"] <= 3
    assert told["informative"]
    assert len(told["audits"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_noise_that_was_switched_off_fails(settings, tmp_path, monkeypatch, mechanism):
    allow = dpsgd.PrivateStudent.allow
    monkeypatch.setattr(dpsgd.PrivateStudent, "allow", lambda self, sigma: allow(self, 0.0))
    monkeypatch.setattr(votes, "noisy_counts", lambda counts, sigma, random: counts.astype(float))
    path = settings(f"privacy.mechanism={mechanism}", "privacy.epsilon=1")
    told = audit(path, canaries=1000, out=tmp_path)
    assert not told["passed"]
    assert told["verdict"].startswith("FAILED")
    assert told["epsilon_claimed"] <= 1
