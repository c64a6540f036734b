"""Private sites over Flower: what their ledgers hold, whatever befalls their answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import read_lines

from fedistill import config, experiment
from fedistill.client import Site
from fedistill.deployment import open_site
from fedistill.errors import BudgetExhausted, SettingsError
from fedistill.flower import client_app, launch, outcome, trial, work
from fedistill.flower.backend import FlowerBackend
from fedistill.flower.founding import write_deployment
from fedistill.flower.outcome import outcome_in
from fedistill.flower.roster import by_key, read_key
from fedistill.plan import describe_site
from fedistill.privacy import audit_log
from fedistill.privacy.account import RELEASES
from fedistill.privacy.ledger import LEDGER, Ledger
from fedistill.settings import PrivacySettings

from .grid import LOST, TWICE, Fates, InProcessGrid, fates
from .test_contract import simulation
from .test_founding import SITES, SMALL, as_before  # noqa: F401 - a fixture

DELTA = 1e-5
PRIVATE = """
[privacy]
mechanism = "dpsgd"
epsilon = 6
sample_rate = 0.5
steps = 3
purpose = "triage"
"""


def founded(folder: Path, more: str = PRIVATE, rounds: int = 2) -> Path:
    text = SMALL.replace("rounds = 2", f"rounds = {rounds}")
    write_deployment(folder, SITES, config.parse(text + more))
    return folder


def run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    resume: bool = False,
    fate: Fates | None = None,
) -> None:
    """The coordinator's half in its folder, every site in its own, a grid between them."""
    monkeypatch.chdir(folder / "coordinator")
    settings = config.load("federation.toml")
    names = settings.deployment.sites
    grid = InProcessGrid(
        client_app(),
        [{"site": str(folder / "sites" / name)} for name in names],
        keys=[read_key(folder / "sites" / name / "node.key.pub") for name in names],
    )
    grid.fate = fate or grid.fate
    roster = by_key(Path(settings.deployment.keys), names)
    backend = FlowerBackend(grid, roster, deadline=120, pause=0.002)
    out = folder / "run"
    experiment.run(
        settings, name="real", out=out, resume=resume, engine=lambda place: lambda sites: backend
    )


def told(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())


@contextlib.contextmanager
def ledger_in(state: Path) -> Iterator[Ledger]:
    ledger = Ledger(state / LEDGER)
    ledger.verify()
    yield ledger
    ledger.close()


def state_of(folder: Path, site: str) -> Path:
    return folder / "sites" / site / "state"


def check_books(state: Path) -> dict[str, list[int]]:
    """Rounds that were charged and released, once each ledger, log and kept upload agree."""
    audit_log.verify(state / audit_log.NAME)
    with ledger_in(state) as ledger:
        entries = ledger.entries()
        for path in (state / RELEASES).glob("*.upload"):
            name, _, number = path.stem.rpartition("-")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert ledger.released(name, int(number)) == digest
    return {
        kind: [entry.round for entry in entries if entry.kind == kind]
        for kind in ("reserve", "release")
    }


# --- real sites ----------------------------------------------------------------------------------


def test_every_site_of_a_private_federation_keeps_its_ledger_and_tells_its_epsilon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = founded(tmp_path / "d")
    run(folder, monkeypatch)
    rows = read_lines(folder / "run" / "rounds.jsonl")
    facts = told(folder / "run")["privacy"]
    for site in SITES:
        assert check_books(state_of(folder, site)) == {"reserve": [1, 2], "release": [1, 2]}
        with ledger_in(state_of(folder, site)) as ledger:
            assert rows[-1]["epsilon"][site] == pytest.approx(ledger.spent(DELTA))
            assert facts["sites"][site]["epsilon"] == pytest.approx(ledger.spent(DELTA))
            assert ledger.holds(facts["sites"][site]["head"])
            assert 5.8 < ledger.spent(DELTA) <= 6.0
    assert facts["mechanism"] == "dpsgd"
    assert facts["epsilon_max"] == rows[-1]["epsilon_max"]


def test_answers_that_get_lost_or_come_twice_are_charged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = founded(tmp_path / "d")
    lost = {(0, "1", 1): LOST, (0, "1", 2): LOST, (1, "2", 1): LOST, (2, "1", 1): TWICE}
    run(folder, monkeypatch, fate=fates(lost))
    assert [row["clients_ok"] for row in read_lines(folder / "run" / "rounds.jsonl")] == [3, 3]
    for site in SITES:
        assert check_books(state_of(folder, site)) == {"reserve": [1, 2], "release": [1, 2]}
    resent = [
        entry["event"]
        for site in SITES
        for entry in audit_log.verify(state_of(folder, site) / audit_log.NAME).entries
    ]
    assert resent.count("charged") == 6


def test_a_step_that_dies_costs_its_site_a_charge_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, died = founded(tmp_path / "d"), []
    real = Site.share

    def dies(site: Site, plan: Any, *said: Any) -> Any:
        if site.client.id == "south" and plan.round == 2 and not died:
            died.append(plan.round)
            raise MemoryError
        return real(site, plan, *said)

    monkeypatch.setattr(Site, "share", dies)
    run(folder, monkeypatch)
    assert read_lines(folder / "run" / "rounds.jsonl")[1]["dropped"] == {"south": "failed"}
    assert check_books(state_of(folder, "south")) == {"reserve": [1, 2], "release": [1]}
    assert check_books(state_of(folder, "west")) == {"reserve": [1, 2], "release": [1, 2]}


def test_private_sites_over_the_grid_stop_one_by_one_and_the_run_ends_with_code_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has a smaller budget: the others go on without it, until nobody is left."""
    folder = founded(tmp_path / "d", PRIVATE + "sigma = 1.7\n", rounds=8)
    policy = folder / "sites" / "west" / "site.toml"
    policy.write_text(policy.read_text().replace("epsilon = 6.0", "epsilon = 3.5"))
    assert open_site(folder / "sites" / "west").settings.policy.epsilon == 3.5
    with outcome_in(tmp_path / "outcome.json"):
        run(folder, monkeypatch)
    ended = outcome.outcome(tmp_path / "outcome.json")
    assert ended is not None
    assert (ended.code, ended.kind) == (4, "BudgetExhausted")
    error = launch._as_it_was(ended)
    assert isinstance(error, BudgetExhausted)
    assert error.exit_code == 4
    rows = read_lines(folder / "run" / "rounds.jsonl")
    alone = [row["dropped"] for row in rows if row["dropped"]]
    assert alone
    assert {reason for dropped in alone for reason in dropped.items()} == {
        ("west", "budget_exhausted")
    }
    limits = {"north": 6.0, "south": 6.0, "west": 3.5}
    for site, limit in limits.items():
        books = check_books(state_of(folder, site))
        assert books["reserve"] == books["release"] != []
        with ledger_in(state_of(folder, site)) as ledger:
            assert ledger.spent(DELTA) <= limit
    assert told(folder / "run")["status"] == "failed:budget"
    found = json.loads((folder / "run" / "disclosure.json").read_text())
    assert {name for name, one in found["sites"].items() if one["exhausted"]} == set(SITES)


def test_a_site_whose_ledger_is_gone_says_ledger_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = founded(tmp_path / "d", PRIVATE + "rounds = 2\n")
    run(folder, monkeypatch)
    for path in state_of(folder, "west").glob(f"{LEDGER}*"):
        path.unlink()
    more = (folder / "coordinator" / "federation.toml", *folder.glob("sites/*/federation.toml"))
    for path in more:
        path.write_text(path.read_text().replace("rounds = 2", "rounds = 3", 1))
    run(folder, monkeypatch, resume=True)
    last = read_lines(folder / "run" / "rounds.jsonl")[-1]
    assert last["round"] == 3
    assert last["dropped"] == {"west": "ledger"}
    assert last["clients_ok"] == 2


def test_an_error_of_the_ledger_travels_as_a_code() -> None:
    from fedistill.errors import LedgerError

    assert work.code_of(LedgerError("patient-4711")) == "ledger"


# --- what `deploy init` writes -------------------------------------------------------------------


def test_a_private_federation_is_founded_with_a_policy_that_holds_it_to_that(
    tmp_path: Path,
) -> None:
    folder = founded(tmp_path / "d")
    for site in SITES:
        policy = open_site(folder / "sites" / site).settings.policy
        assert policy.epsilon == 6.0
        assert "dpsgd" in policy.mechanisms
        assert policy.purposes == ("triage",)
        lines = list(describe_site(folder / "sites" / site))
        assert not any(line.startswith("refused") for line in lines)
        assert any("epsilon" in line for line in lines)
        notes = (folder / "sites" / site / "README.md").read_text()
        assert "## Privacy" in notes
        assert "No noise is added" not in notes
    for name in ("federation.toml", "proxy.npz"):
        place = folder / "sites" / "west" / name
        if name == "federation.toml":
            place.write_text(place.read_text().replace('"dpsgd"', '"none"'))
    lines = list(describe_site(folder / "sites" / "west"))
    assert any(line.startswith("refused   this site answers with dpsgd") for line in lines)


def test_a_federation_without_privacy_says_that_nothing_is_added(tmp_path: Path) -> None:
    folder = founded(tmp_path / "d", "")
    assert open_site(folder / "sites" / "west").settings.policy.mechanisms == ()
    notes = (folder / "sites" / "west" / "README.md").read_text()
    assert "**No noise is added to predictions**" in notes
    assert "## Privacy" not in notes


def test_a_group_with_its_own_private_mechanism_becomes_a_site_with_it(tmp_path: Path) -> None:
    group = '[[clients.group]]\nsites = ["west"]\nmodel = "random-forest"\nmechanism = "gnmax"\n'
    folder = founded(tmp_path / "d", group + PRIVATE + "teachers = 4\n")
    mechanisms = {
        site: open_site(folder / "sites" / site).site.account.terms.mechanism  # type: ignore[union-attr]
        for site in SITES
    }
    assert mechanisms == {"north": "dpsgd", "south": "dpsgd", "west": "gnmax"}


def test_users_cannot_be_told_apart_among_rows_that_are_dealt(tmp_path: Path) -> None:
    text = SMALL.replace("[data]", '[data]\nsubject = "who"') + PRIVATE + 'unit = "user"\n'
    with pytest.raises(SettingsError, match=r"privacy\.unit: rows that are dealt out"):
        write_deployment(tmp_path / "d", SITES, config.parse(text))
    assert not (tmp_path / "d").exists()


def test_the_trial_proves_every_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = founded(tmp_path / "d")
    run(folder, monkeypatch)
    lines = list(trial.accounts(folder, SITES))
    assert len(lines) == 3
    for line, site in zip(lines, SITES, strict=True):
        assert line.startswith(f"{site}: its ledger holds, 2 steps charged, 2 released, epsilon")
    assert list(trial.accounts(founded(tmp_path / "e", ""), SITES)) == []


# --- Flower's simulation -------------------------------------------------------------------------


def test_a_private_simulation_on_flower_keeps_its_ledgers_under_the_run(tmp_path: Path) -> None:
    how = PrivacySettings(mechanism="dpsgd", epsilon=6.0, sample_rate=0.5, steps=3)
    assert simulation(tmp_path, privacy=how) == (0, "")
    rows = read_lines(tmp_path / "run" / "rounds.jsonl")
    facts = told(tmp_path / "run")["privacy"]["sites"]
    for name in ("site-0", "site-1", "site-2"):
        state = tmp_path / "run" / "sites" / name
        assert check_books(state) == {"reserve": [1, 2, 3], "release": [1, 2, 3]}
        with ledger_in(state) as ledger:
            assert rows[-1]["epsilon"][name] == pytest.approx(ledger.spent(DELTA))
            assert facts[name]["epsilon"] == pytest.approx(ledger.spent(DELTA))
            assert (facts[name]["reservations"], facts[name]["releases"]) == (3, 3)
            assert facts[name]["sigma"] > 0


def test_a_private_simulation_on_flower_ends_with_code_4_when_the_budget_is_out(
    tmp_path: Path,
) -> None:
    how = PrivacySettings(mechanism="dpsgd", epsilon=3.0, sample_rate=0.5, steps=3, sigma=1.7)
    code, text = simulation(tmp_path, privacy=how)
    assert code == 4
    assert "have spent their privacy budget" in text
    assert told(tmp_path / "run")["status"] == "failed:budget"
    facts = told(tmp_path / "run")["privacy"]["sites"]
    assert all(facts[name]["exhausted"] for name in ("site-0", "site-1", "site-2"))


def test_a_private_simulation_goes_on_beyond_its_private_rounds_at_no_cost(
    tmp_path: Path,
) -> None:
    how = PrivacySettings(mechanism="dpsgd", epsilon=6.0, sample_rate=0.5, steps=3, rounds=2)
    assert simulation(tmp_path, privacy=how, rounds=2) == (0, "")
    assert simulation(tmp_path, privacy=how, rounds=3, resume=True) == (0, "")
    for name in ("site-0", "site-1", "site-2"):
        state = tmp_path / "run" / "sites" / name
        assert check_books(state) == {"reserve": [1, 2], "release": [1, 2]}
    rows = read_lines(tmp_path / "run" / "rounds.jsonl")
    assert [row["clients_ok"] for row in rows] == [3, 3, 3]
    assert rows[1]["epsilon"] == rows[2]["epsilon"]
