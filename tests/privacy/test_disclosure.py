"""A disclosure says what is promised, on what it rests and what is open, and makes nothing up."""

import json
import math

import pytest

from fedistill.privacy import disclosure as module
from fedistill.privacy.disclosure import disclosure, guarantee, not_protected
from fedistill.privacy.terms import STATEMENTS

SITE = {
    "mechanism": "dpsgd",
    "epsilon": 2.5,
    "delta": 1e-5,
    "unit": "record",
    "budget": 3.0,
    "sigma": 1.25,
    "reservations": 10,
    "releases": 10,
    "head": "ab" * 32,
    "exhausted": False,
    "rows": 128,
}


def private(**changes):
    return {
        "mechanism": "dpsgd",
        "statement": STATEMENTS["dpsgd"],
        "private": True,
        "unit": "record",
        "relation": "add-remove",
        "budget": 3.0,
        "epsilon_max": 2.9,
        "accountant": "dp-accounting 0.6.0 PLD",
        "rng": "torch mt19937, not a CSPRNG",
        "clip_norm": 1.0,
        "sample_rate": 0.25,
        "rounds": 8,
        "purpose": "readmission",
        "sites": {"north": dict(SITE), "south": SITE | {"epsilon": 2.9, "delta": 2e-6}},
    } | changes


def summary(**changes):
    return {
        "name": "trial",
        "rounds": 12,
        "rule": "mean",
        "proxy_sha256": "3f" * 32,
        "versions": {"python": "3.11.9"},
        "privacy": private(**changes),
    }


def told(**changes):
    return disclosure(summary(**changes))


# --- the promise ---------------------------------------------------------------------------------


def test_a_private_run_tells_epsilon_with_all_that_it_depends_on():
    found = told()
    assert found["differentially_private"] is True
    assert found["guarantee"] == {
        "unit": "record",
        "relation": "add-remove",
        "epsilon": 2.9,
        "delta": 1e-5,
        "budget": 3.0,
        "accountant": "dp-accounting 0.6.0 PLD",
        "over": module.OVER_LEDGER,
    }
    assert found["noise"] == {
        "rng": "torch mt19937, not a CSPRNG",
        "sigma": None,
        "clip_norm": 1.0,
        "sample_rate": 0.25,
        "steps_per_round": None,
    }
    assert found["run"]["purpose"] == "readmission"
    assert found["run"]["proxy_sha256"] == "3f" * 32
    assert found["run"]["rule"] == "mean"
    assert found["run"]["versions"] == {"python": "3.11.9"}
    assert found["sites"]["south"]["ledger_head"] == "ab" * 32
    assert found["notice"] == "Templates and evidence, not legal advice."


def test_epsilon_is_that_of_the_site_that_spent_most_and_delta_the_largest():
    assert told(epsilon_max=None)["guarantee"]["epsilon"] == 2.9
    assert told(epsilon_max=2.95)["guarantee"]["epsilon"] == 2.95
    assert told(delta=1e-4)["guarantee"]["delta"] == 1e-4


@pytest.mark.parametrize("gone", ["unit", "relation"])
def test_without_its_conditions_an_epsilon_is_no_guarantee(gone):
    found = told(**{gone: None})
    assert found["guarantee"] is None
    assert found["differentially_private"] is False
    assert module.RECORDS in found["not_protected"]


def test_without_any_delta_there_is_no_guarantee():
    sites = {"north": SITE | {"delta": None}}
    assert guarantee(summary(sites=sites)) is None


@pytest.mark.parametrize("epsilon", [None, math.inf, math.nan, True, "2"])
def test_one_site_without_a_bound_and_the_federation_has_none(epsilon):
    found = told(sites={"north": dict(SITE), "south": SITE | {"epsilon": epsilon}})
    assert found["guarantee"] is None
    assert "south told no ε: for the federation as a whole nothing is promised." in " ".join(
        found["in_plain_words"]
    )


@pytest.mark.parametrize("name", ["none", "hard-label"])
def test_what_is_not_private_says_so_whatever_else_is_told(name):
    found = told(mechanism=name, statement=STATEMENTS[name])
    assert found["guarantee"] is None
    assert found["noise"] is None
    assert found["assumptions"] == []
    assert "no differential privacy" in found["statement"] or "NOT" in found["statement"]
    assert "othing bounds mathematically" in " ".join(found["in_plain_words"])


def test_every_mechanism_has_plain_words():
    assert set(module.PLAIN) == set(STATEMENTS)


def test_noise_at_the_server_is_a_guarantee_where_its_epsilon_and_delta_are_told():
    central = {"mechanism": "central-gauss", "private": False, "unit": "client"}
    assert (
        told(**central, sites={"north": {"epsilon": None}}, epsilon_max=None, delta=1e-5)[
            "guarantee"
        ]
        is None
    )
    found = told(**central, sites={"north": {"epsilon": None}}, epsilon_max=4.0, delta=1e-5)
    assert found["guarantee"]["over"] == module.OVER_RUN
    assert "not from the server" in " ".join(found["in_plain_words"])
    assert "whatever a single client said" in " ".join(found["in_plain_words"])
    assert found["noise"]["clip_norm"] is None
    assert module.SERVER in found["not_protected"]
    assert module.DISJOINT not in found["assumptions"]


def test_plain_words_name_the_unit_and_the_factor():
    said = " ".join(told(epsilon_max=3.0, unit="user")["in_plain_words"])
    assert "whether or not a single user was among a site's rows" in said
    assert "e^ε = 20.1 times" in said
    assert "e^ε = 2,981 times" in " ".join(told(epsilon_max=8.0)["in_plain_words"])
    assert told(epsilon_max=1e300)["guarantee"] is not None


def test_a_spent_budget_is_told():
    found = told(sites={"north": SITE | {"exhausted": True}, "south": dict(SITE)})
    assert "The budget of north did not last" in " ".join(found["in_plain_words"])


# --- what it rests on and what is open -----------------------------------------------------------


def test_what_it_rests_on():
    said = " ".join(told()["assumptions"])
    assert "A person at two sites pays the sum of both." in said
    assert "treated as public: noise and δ depend on the exact number" in said
    assert "one record added or removed" in said
    assert "A person with several records" in said
    assert "one user added or removed" in " ".join(told(unit="user")["assumptions"])


def test_what_is_not_protected_with_differential_privacy():
    said = " ".join(told(not_protected=["The weather."])["not_protected"])
    for words in ("mix of labels", "error 0.26 without and 0.15 with", "takes part", "The weather"):
        assert words in said
    assert module.RECORDS not in said


def test_the_label_mix_of_the_audit_replaces_that_of_the_trial():
    audit = {"label_mix_error": 0.123, "label_mix_guess": 0.456}
    said = " ".join(not_protected({"audit": audit}, private=True))
    assert "in this run's audit with a total-variation error of 0.12, a uniform guess" in said
    assert "0.26" not in said


def test_what_was_shared_beside_predictions_is_open():
    found = disclosure(summary(), shared=["Each site told which classes it has met."])
    assert "Beside predictions: Each site told which classes it has met." in found["not_protected"]


def test_of_tables_it_does_not_speak_of_predictions():
    found = disclosure(summary(mechanism="none"), exchange="prototypes")
    assert "predictions" not in " ".join(found["not_protected"])


def test_limits_name_what_lies_outside_epsilon():
    found = disclosure(summary(), measured=True, baselines=["local"], repeats=3)["known_limits"]
    said = " ".join(found)
    assert "measured without noise on test rows" in said
    assert "figures of the baselines local" in said
    assert "repeated 3 times on the same rows" in said
    assert "not made for cryptography" in said
    assert disclosure({}, baselines=["local"], repeats=3)["known_limits"] == []


# --- the audit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audit", "passed", "informative", "verdict"),
    [
        ({"epsilon_lower": 0.4, "ceiling": 5.3}, True, True, "passed: epsilon is at least 0.40"),
        ({"epsilon_lower": 0.4, "ceiling": 2.0}, True, False, "passed: epsilon is at least 0.40"),
        ({"epsilon_lower": 3.1, "ceiling": 5.3}, False, True, "FAILED: epsilon is at least 3.10"),
        (
            {"epsilon_lower": 3.1, "ceiling": 5.3, "passed": True, "verdict": "passed: another"},
            False,
            True,
            "FAILED: epsilon is at least 3.10",
        ),
        (
            {"epsilon_lower": 0.4, "ceiling": 5.3, "passed": False, "verdict": "FAILED: no noise"},
            False,
            True,
            "FAILED: no noise",
        ),
        ({"audited": False, "passed": True, "verdict": "not audited"}, True, False, "not audited"),
    ],
)
def test_the_audit_is_judged_by_the_claim_of_this_run(audit, passed, informative, verdict):
    found = told(audit=audit)["audit"]
    assert (found["passed"], found["informative"]) == (passed, informative)
    assert found["verdict"].startswith(verdict)


@pytest.mark.parametrize("audit", [None, {}, "x", {"epsilon_lower": None}])
def test_no_audit_is_none(audit):
    assert told(audit=audit)["audit"] is None


def test_exact_figures_of_an_audited_client_are_not_repeated():
    audit = {"epsilon_lower": 0.1, "rows": 137, "client": "north", "audits": [{"curve": [1]}]}
    assert "137" not in json.dumps(told(audit=audit))


# --- facts that may be anything ------------------------------------------------------------------


@pytest.mark.parametrize("junk", [1, "x", [], {"a": 1}, None, {"a": {"figures": 3}}, [[1]]])
@pytest.mark.parametrize("key", [None, *private(), "audit", "notes", "not_protected"])
def test_junk_is_no_promise_and_always_json(key, junk):
    found = disclosure({"privacy": junk} if key is None else summary(**{key: junk}))
    json.dumps(found, allow_nan=False)
    if key in {None, "unit", "relation"} and not isinstance(junk, str):
        assert found["guarantee"] is None


def test_an_empty_summary_promises_nothing():
    found = disclosure({})
    assert found["mechanism"] == "none"
    assert found["statement"] == "no differential privacy"
    assert found["guarantee"] is None


def test_texts_of_others_are_cut_and_printable():
    found = told(statement="a\x1b[2J\u202e" + "x" * 5000, notes=["y" * 5000])
    assert found["statement"].isprintable()
    assert len(found["statement"]) == 300
    assert len(found["notes"][0]) == 400
