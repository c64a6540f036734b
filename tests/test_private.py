"""A federation of private clients: terms, accounts, budgets and what is said of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from builders import CLASSES, INPUTS, federation, gaussian, held_out, participants
from sklearn.tree import DecisionTreeClassifier

import fedistill as fd
from fedistill import cli, config, experiment, models
from fedistill.client import Client, Site
from fedistill.errors import BudgetExhausted, FedistillError, LedgerError, Rejected, SettingsError
from fedistill.newcomer import private_client
from fedistill.presets import method
from fedistill.privacy.accounting import epsilon
from fedistill.privacy.events import Sampled, Spending
from fedistill.privacy.terms import Terms
from fedistill.wire.messages import Plan, Upload

HOW = fd.Privacy(mechanism="dpsgd", epsilon=3.0, sample_rate=0.5, steps=4)
PRIVATE = """
[privacy]
mechanism = "dpsgd"
epsilon = 3
sample_rate = 0.5
steps = 4
"""


def private(clients: Any = 4, how: Any = HOW, **options: Any) -> fd.Federation:
    return federation(clients, privacy=how, **options)


def upload_of(site: Site) -> Upload:
    return Upload.from_bytes(site.upload)


# --- a run ---------------------------------------------------------------------------------------


def test_every_client_spends_its_budget_over_the_run_and_no_more() -> None:
    fed = private()
    rows = list(fed.run(5, test=held_out()))
    spent = [row["epsilon_max"] for row in rows]
    assert spent == sorted(spent)
    assert 2.9 < spent[-1] <= 3.0
    assert set(rows[-1]["epsilon"]) == {client.id for client in fed.members}
    site = fed.sites["site-0"]
    by_hand = Spending.of(Sampled(0.5, site.account.sigma), 5 * 4)
    assert spent[-1] == pytest.approx(epsilon(by_hand, 1e-5))
    told = fed.summary()["privacy"]
    assert (told["mechanism"], told["unit"], told["relation"]) == ("dpsgd", "record", "add-remove")
    assert told["sites"]["site-1"]["releases"] == 5
    assert told["epsilon_max"] == spent[-1]


def test_the_upload_tells_what_was_spent_and_the_head_of_the_ledger() -> None:
    fed = private()
    list(fed.run(1))
    for site in fed.sites.values():
        upload = upload_of(site)
        assert upload.epsilon == pytest.approx(site.account.spent())
        assert site.account.ledger.holds(upload.ledger)
        assert not upload.familiarity
        assert upload.seen == "0"


def test_without_a_mechanism_nothing_is_claimed() -> None:
    fed = federation(4)
    row = next(fed.run(1))
    assert row["epsilon_max"] is None
    assert "epsilon" not in row
    assert fed.summary()["privacy"] == {
        "mechanism": "none",
        "statement": "no differential privacy",
    }


def test_rounds_after_the_private_ones_cost_nothing_and_still_share() -> None:
    fed = private(how=fd.Privacy(**(vars(HOW) | {"rounds": 2})))
    rows = list(fed.run(5))
    spent = [row["epsilon_max"] for row in rows]
    assert spent[1] == spent[-1]
    assert spent[0] < spent[1] <= 3.0
    assert all(row["clients_ok"] == 4 for row in rows)


def test_noise_is_the_operating_systems_and_not_the_seeds() -> None:  # fault 63
    def once() -> Any:
        fed = private()
        list(fed.run(1))
        return {name: upload_of(site).payload for name, site in fed.sites.items()}

    first, second = once(), once()
    assert all(first[name] != second[name] for name in first)
    same = participants(1)[0].data
    twins = [Client(f"twin-{k}", participants(1)[0].build, same) for k in range(3)]
    fed = private(twins)
    list(fed.run(1))
    assert len({upload_of(site).payload for site in fed.sites.values()}) == 3


# --- the budget ----------------------------------------------------------------------------------


def test_one_client_without_budget_stops_and_the_federation_goes_on(tmp_path: Path) -> None:
    poor = private_client(participants(1)[0], fd.Privacy(**(vars(HOW) | {"sigma": 2.5})), 6)
    assert poor.terms is not None
    rich = [
        private_client(one, fd.Privacy(**(vars(HOW) | {"sigma": 2.5, "epsilon": 100.0})), 6)
        for one in participants(4)[1:]
    ]
    fed = private([poor, *rich], how=fd.Privacy(**(vars(HOW) | {"sigma": 2.5})))
    rows = list(fed.run(6, out=tmp_path))
    assert "site-0" not in rows[0]["dropped"]
    assert rows[-1]["dropped"] == {"site-0": "budget_exhausted"}
    assert rows[-1]["clients_ok"] == 3
    told = fed.summary()["privacy"]["sites"]
    assert told["site-0"]["exhausted"]
    assert not told["site-1"]["exhausted"]
    assert told["site-0"]["epsilon"] <= 3.0 < told["site-1"]["epsilon"]


def test_a_run_that_nobody_can_pay_for_ends_with_exit_code_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = builders.write_settings(tmp_path, rounds=9, more=PRIVATE + "sigma = 2.5\n")
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as leaving:
        cli.main(["run", str(settings), "--out", str(out)])
    assert leaving.value.code == 4
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "have spent their privacy budget" in said[0]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "failed:budget"
    assert 0 < summary["rounds"] < 9
    assert summary["privacy"]["epsilon_max"] <= 3.0
    assert (out / "report.html").exists()


def test_more_rounds_than_were_planned_are_not_run_on_the_same_budget(tmp_path: Path) -> None:
    settings = config.load(builders.write_settings(tmp_path, rounds=2, more=PRIVATE))
    experiment.run(settings, out=tmp_path / "run")
    longer = config.parse(config.to_toml(settings), ["rounds=6"])
    with pytest.raises(BudgetExhausted):
        experiment.run(longer, out=tmp_path / "run", resume=True)


def test_a_run_goes_on_with_what_was_spent_before(tmp_path: Path) -> None:
    fed = private()
    rows = fed.run(4, out=tmp_path)
    first = [next(rows), next(rows)]
    rows.close()
    again = private()
    rest = list(again.run(4, out=tmp_path, resume=True))
    spent = [row["epsilon_max"] for row in first + rest]
    assert len(spent) == 4
    assert spent == sorted(spent)
    assert spent[-1] <= 3.0
    assert again.sites["site-0"].account.sigma == fed.sites["site-0"].account.sigma


# --- what is refused -----------------------------------------------------------------------------


def test_a_ledger_that_was_deleted_between_rounds_is_refused(tmp_path: Path) -> None:  # fault 37
    fed = private()
    rows = fed.run(4, out=tmp_path)
    next(rows)
    rows.close()
    for file in (tmp_path / "sites" / "site-0").glob("ledger.sqlite*"):
        file.unlink()
    with pytest.raises(LedgerError, match="acknowledge-loss"):
        list(private().run(4, out=tmp_path, resume=True))


def test_the_servers_receipt_finds_out_what_ledger_and_state_together_hide(tmp_path: Path) -> None:
    fed = private()
    list(fed.run(1, out=tmp_path))
    plan = fed.server.plan(2)
    receipt = fed.server.receipts["site-0"]
    assert Plan.from_bytes(plan.message("site-0")).receipt == receipt
    newcomer = private().site(private_client(participants(1)[0], HOW, 4), None)
    with pytest.raises(LedgerError, match="gone"):
        newcomer.answer(plan.message("site-0"))


@pytest.mark.parametrize("mechanism", ["", "hard-label"])
def test_a_request_without_the_agreed_privacy_is_refused(mechanism: str) -> None:  # fault 58
    fed = private()
    list(fed.run(1))
    fed.server.mechanism = mechanism or "none"
    with pytest.raises(Rejected, match="policy"):
        fed.sites["site-0"].answer(fed.server.plan(2).message("site-0"))


def test_a_site_without_an_account_refuses_to_pass_for_private() -> None:
    fed = federation(4)
    list(fed.run(1))
    fed.server.mechanism = "dpsgd"
    with pytest.raises(Rejected, match="policy"):
        fed.sites["site-0"].answer(fed.server.plan(2).message("site-0"))


@pytest.mark.parametrize("name", ["selective-fd", "ssfl", "fedaux", "fd", "fedproto", "fedavg"])
def test_methods_that_tell_more_than_predictions_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="private"):
        private(method=method(name))


def test_terms_need_a_learner_that_is_paid_for() -> None:
    open_one = Client(
        "open",
        partial(models.Linear, INPUTS, 3),
        gaussian(20, 1),
        terms=Terms(mechanism="dpsgd", agreed="dpsgd"),
    )
    with pytest.raises(FedistillError, match="paid for"):
        list(private([open_one, *participants(3)]).run(1))


def test_a_model_that_is_no_torch_module_is_told_what_to_take() -> None:
    trees = Client("trees", partial(DecisionTreeClassifier, max_depth=3), gaussian(40, 1))
    with pytest.raises(SettingsError, match="gnmax"):
        list(private([trees, *participants(2)]).run(1))


# --- other mechanisms ----------------------------------------------------------------------------


def test_a_group_may_vote_where_the_others_learn_by_noisy_steps() -> None:
    how = fd.Privacy(**(vars(HOW) | {"teachers": 10}))
    trees = Client("trees", partial(DecisionTreeClassifier, max_depth=3), gaussian(200, 9))
    voting = private_client(trees, how, 3, "gnmax")
    fed = private([voting, *participants(3)], how=how)
    rows = list(fed.run(3))
    assert rows[-1]["clients_ok"] == 4
    assert 0 < rows[-1]["epsilon"]["trees"] <= 3.0
    told = fed.summary()["privacy"]["sites"]
    assert told["trees"]["mechanism"] == "gnmax"
    assert told["site-0"]["mechanism"] == "dpsgd"


def test_hard_labels_leave_as_labels_and_no_privacy_is_claimed() -> None:
    fed = federation(4, privacy=fd.Privacy(mechanism="hard-label"), method="ds-fl")
    row = next(fed.run(1))
    assert row["epsilon_max"] is None
    probs = upload_of(fed.sites["site-0"]).decode()[0]
    assert set(np.unique(probs.round(4))) == {0.0, 1.0}
    assert "NOT differentially private" in fed.summary()["privacy"]["statement"]


def test_noise_at_the_server_needs_many_clients_and_is_charged_once_a_round() -> None:
    how = fd.Privacy(mechanism="central-gauss", epsilon=5.0)
    with pytest.raises(FedistillError, match="100"):
        list(federation(4, privacy=how).run(1))
    many = [
        Client(f"c{k:03}", partial(models.Linear, INPUTS, 3), gaussian(6, k)) for k in range(100)
    ]
    fed = federation(many, privacy=how, classes=CLASSES)
    rows = list(fed.run(2))
    assert rows[0]["epsilon_max"] < rows[1]["epsilon_max"] <= 5.0
    told = fed.summary()["privacy"]
    assert (told["unit"], told["relation"]) == ("client", "replace-one")


def test_the_student_of_a_trusted_server_learns_from_the_noisy_mean_alone() -> None:
    how = fd.Privacy(mechanism="central-gauss", epsilon=5.0)
    many = [
        Client(f"c{k:03}", partial(models.Linear, INPUTS, 3), gaussian(6, k)) for k in range(100)
    ]
    exact = method("ds-fl", rule="mean", student_rule="median")
    with pytest.raises(FedistillError, match="student_rule"):
        list(federation(many, privacy=how, classes=CLASSES, method=exact).run(1))
    changes = ["clients.count=100", "method.student_rule=mean"]
    with pytest.raises(SettingsError, match="noisy mean"):
        config.parse('[privacy]\nmechanism = "central-gauss"\n', changes)


def test_what_privacy_costs_is_shown_beside(tmp_path: Path) -> None:
    more = PRIVATE + "[evaluation]\nwithout_privacy = true\n"
    settings = builders.write_settings(tmp_path, rounds=2, more=more)
    summary = experiment.run(settings, out=tmp_path / "run")
    figures = summary["sites"]["site-0"]["figures"]
    assert figures["without privacy"]["accuracy"] is not None
    other = json.loads((tmp_path / "run/baselines/without-privacy/summary.json").read_text())
    assert other["privacy"]["mechanism"] == "none"
    assert summary["privacy"]["mechanism"] == "dpsgd"


STREAM = """
[stream]
experiences = 3
shift = "class-incremental"
every = 2
[privacy]
mechanism = "dpsgd"
epsilon = 3
sample_rate = 0.5
steps = 4
"""


@pytest.mark.parametrize(("buffer", "cohorts"), [(0, 3), (30, 5)])
def test_rows_that_stay_in_a_memory_pay_for_all_rounds_and_others_for_their_own(
    tmp_path: Path, buffer: int, cohorts: int
) -> None:
    more = STREAM + f"[continual]\nbuffer = {buffer}\n"
    settings = builders.write_settings(tmp_path, rounds=6, more=more)
    summary = experiment.run(settings, out=tmp_path / "run")
    ledger = fd.Ledger(tmp_path / "run/sites/site-0/ledger.sqlite")
    spent = [epsilon(one, 1e-5) for one in ledger.cohorts().values()]
    assert max(spent) <= 3.0
    assert max(spent) == pytest.approx(summary["privacy"]["epsilon_max"])
    if buffer:  # rows of the first experience that stayed pay for six rounds, the last for two
        assert len(spent) >= cohorts - 2
        assert min(spent) < 0.7 * max(spent)
    else:  # disjoint rows: the costliest counts, and all cost the same
        assert len(spent) == cohorts
        assert min(spent) == pytest.approx(max(spent))
    steps = {entry.spending for entry in ledger.entries() if entry.kind == "reserve"}
    assert len(steps) == 1  # one noise for the whole run


# --- what is told before anything is spent -------------------------------------------------------


def test_the_plan_tells_noise_and_epsilon_after_each_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = builders.write_settings(tmp_path, rounds=3, more=PRIVATE)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["check", str(settings)])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert "4 noisy steps a round, each row in 50% of them" in said
    assert "after rounds 1 to 3" in said
    assert "unit record, relation add-remove" in said
