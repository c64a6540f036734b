"""Rules: hand-computed targets, properties, and the calling of a user's own."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path

import builders
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedistill as fd
from fedistill.aggregate import rules
from fedistill.errors import FedistillError
from fedistill.testing import CheckFailed, check_rule
from fedistill.testing import parts as testing

GOLDEN = Path(__file__).with_name("golden_rules.json")

A = [[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]
B = [[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]
LOGITS = np.log([A, B])
EQUAL = np.ones(2)
ROOTS = [math.sqrt(0.125), math.sqrt(0.125), 0.25], [0.4, math.sqrt(0.02), math.sqrt(0.06)]


def shares(*rows):
    return [np.divide(row, sum(row)) for row in rows]


MEAN = [[0.375, 0.375, 0.25], [0.5, 0.15, 0.35]]
SURE = 0.8**0.8 * 0.1**0.2, 0.2**0.4 * 0.6**0.6  # exp(-entropy) of the second rows
# The anchor: 0.5 and 0.25 where the mean has 0.375. Credit 1.33 and 0.668 beside 1 to start with.
TRUSTED = ((0.251 / 0.376 + 1) / 2) ** 3
PAIR = ["a", "b"]

HAND = {
    "mean": ({}, MEAN),
    "mean-logits": ({}, shares(*ROOTS)),
    "sharpened": ({}, [[0.437349, 0.437349, 0.125303], [0.797876, 0.024094, 0.178031]]),
    "power": ({}, shares([9, 9, 4], [0.25, 0.0225, 0.1225])),
    "calibrated": (
        {"seen": np.array([[True, True, False], [True, True, True]])},
        shares([11, 10, 6], [49, 14, 54]),
    ),
    "confidence": ({}, [MEAN[0], [3.8 / 7, 1 / 7, 2.2 / 7]]),
    "entropy": ({}, [MEAN[0], np.average([A[1], B[1]], axis=0, weights=SURE)]),
    # Scores of 0.75 and 0.25 in the first row, 0.5 and 0.5 in the second.
    "certainty": (
        {"familiarity": np.log([[3.0, 1.0], [1 / 3, 1.0]])},
        shares(np.multiply(np.power(A[0], 0.75), np.power(B[0], 0.25)), ROOTS[1]),
    ),
    # A vote each: in the first row all is equal, in the second class 0 is the likelier.
    "vote": ({}, [[1, 0, 0], [1, 0, 0]]),
    # Both labels are 0, and the second client is against: 1 of it, 0.2 of what it says.
    "consensus": ({}, shares([1.05, 0.1, 0.05], [1.04, 0.04, 0.12])),
    # By its label the first row is the second client's, by its entropy the second the first's.
    "best-teacher": ({"anchors": np.array([1, -1])}, [B[0], A[1]]),
    "clusters": ({}, [[A[0], B[0]], [A[1], B[1]]]),
    # Of two clients every median is the mean, and there is no most.
    "median": ({}, MEAN),
    "trimmed-mean": ({}, MEAN),
    "geometric-median": ({}, MEAN),
    "geometric-median-client": ({}, MEAN),
    "krum": ({}, MEAN),
    "trust": ({"clients": PAIR}, MEAN),
    "trust-anchored": (
        {"clients": PAIR, "anchors": np.array([0, -1])},
        [np.average([A[row], B[row]], axis=0, weights=[1, TRUSTED]) for row in range(2)],
    ),
}


@pytest.mark.parametrize("name", rules.RULES)
def test_every_rule_keeps_its_promises(name):
    check_rule(name)


@pytest.mark.parametrize("name", HAND)
def test_two_clients_two_rows_three_classes_by_hand(name):
    extras, expected = HAND[name]
    found = rules.configure(name)(LOGITS, EQUAL, **extras)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("prior", "second"), [(0.0, [0.26, 0.19, 0.55]), (30.0, [0.35, 0.175, 0.475])]
)
def test_distribution_weighted_by_hand(prior, second):
    # Ratios 3:1 and 1:3 have mean 1 as 1.5:0.5 and 0.5:1.5; times 20 and 60 rows the first row
    # weighs 30 against 30, the second 10 against 90, and with 30 more each 40 against 120.
    found = rules.distribution_weighted(
        LOGITS,
        EQUAL,
        familiarity=np.log([[3.0, 1.0], [1.0, 3.0]]),
        sizes=np.array([20.0, 60.0]),
        prior_rows=prior,
    )
    np.testing.assert_allclose(found, [[0.375, 0.375, 0.25], second], atol=1e-12)


def test_every_rule_has_a_hand_computed_case():
    assert set(HAND) | {"distribution-weighted"} == set(rules.RULES)


def test_unequal_weights_are_shares():
    expected = [[0.3125, 0.4375, 0.25], [0.35, 0.175, 0.475]]
    np.testing.assert_allclose(rules.mean(LOGITS, np.array([1.0, 3.0])), expected)
    by_row = np.array([[1.0, 0.0], [3.0, 5.0]])
    np.testing.assert_allclose(rules.mean(LOGITS, by_row), [expected[0], B[1]])


def test_a_row_that_nobody_answers_is_nan_and_its_neighbour_is_not():
    found = rules.mean(LOGITS, np.array([[0.0, 1.0], [0.0, 1.0]]))
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], [0.5, 0.15, 0.35])


@pytest.mark.parametrize("name", rules.RULES)
def test_golden_table(name):
    """Targets of a fixed case, to six digits; FEDISTILL_GOLDEN=write renews the file."""
    case = testing._case(clients=3, rows=3)
    rule = rules.configure(name)
    extras = {key: case[key] for key in rules.takes(rule)}
    found = np.round(rule(case["logits"], case["weights"], **extras), 6).tolist()
    if os.environ.get("FEDISTILL_GOLDEN") == "write":
        table = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(table | {name: found}, indent=1, sort_keys=True) + "\n")
    expected = json.loads(GOLDEN.read_text())[name]
    np.testing.assert_allclose(found, expected, atol=2e-6)


# --- sharpeners ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "certain", "flat"),
    [(10, 0.9996, 0.506), (100, 0.9955, 0.159), (1000, 0.957, 0.020), (10_000, 0.688, 0.002)],
)
def test_era_flattens_many_classes(classes, certain, flat):
    one_hot = np.eye(1, classes)
    assert rules.era(one_hot)[0, 0] == pytest.approx(certain, abs=6e-4)
    likely = np.full((1, classes), 0.7 / (classes - 1))
    likely[0, 0] = 0.3
    assert rules.era(likely)[0, 0] == pytest.approx(flat, abs=6e-4)


@given(st.floats(0.2, 4.0), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_power_is_a_temperature_on_log_probabilities(exponent, seed):
    probs = builders.probabilities(4, seed)
    expected = rules.softmax(np.log(probs) * exponent)
    np.testing.assert_allclose(rules.power(probs, exponent), expected, atol=1e-12)


def test_power_one_changes_nothing_and_zeros_stay_harmless():
    probs = np.array([[0.7, 0.3, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(rules.power(probs, 1.0), probs, atol=1e-12)


def test_mean_logits_is_the_normalised_geometric_mean():
    probs = rules.softmax(np.random.default_rng(0).normal(size=(3, 5, 4)))
    product = probs.prod(axis=0) ** (1 / 3)
    expected = product / product.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(rules.mean_logits(np.log(probs), np.ones(3)), expected)


def test_softmax_and_log_softmax_survive_extreme_scores():
    scores = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    assert np.isfinite(rules.softmax(scores)).all()
    logs = rules.log_softmax(scores)
    assert np.isfinite(logs).all()
    assert logs[0, 1] == -2e4


# --- calibrated ----------------------------------------------------------------------------------


def test_a_client_says_nothing_about_a_class_it_never_met():
    seen = np.array([[True, True, False], [True, True, True]])
    loud = LOGITS.copy()
    loud[0, :, 2] += 50
    np.testing.assert_allclose(
        rules.calibrated(loud, EQUAL, seen=seen), rules.calibrated(LOGITS, EQUAL, seen=seen)
    )


def test_a_class_of_one_client_only_keeps_that_clients_word():
    seen = np.array([[True, False, False], [False, True, True]])
    found = rules.calibrated(LOGITS, EQUAL, seen=seen)
    np.testing.assert_allclose(found[0], np.array([1, 2 / 3, 1 / 3]) / 2)


def test_a_class_nobody_met_gets_nothing():
    seen = np.array([[True, True, False]] * 2)
    found = rules.calibrated(LOGITS, EQUAL, seen=seen)
    assert (found[:, 2] == 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)


# --- familiarity ---------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_normalised_ratios_have_mean_one_whatever_the_scale(seed, shift):
    familiarity = np.random.default_rng(seed).normal(size=(3, 20))
    ratios = rules.normalised_ratios(familiarity + shift, np.ones(3))
    np.testing.assert_allclose(ratios.mean(axis=1), 1)
    np.testing.assert_allclose(ratios, rules.normalised_ratios(familiarity, np.ones(3)), rtol=1e-9)


def test_familiarity_that_is_high_everywhere_gains_nothing():
    honest = np.random.default_rng(0).normal(size=(3, 12))
    logits = np.random.default_rng(1).normal(size=(3, 12, 4))
    silent, boastful = honest.copy(), honest.copy()
    silent[1], boastful[1] = 0.0, 1e9
    sizes = np.array([16.0, 16.0, 16.0])
    targets = [
        rules.distribution_weighted(logits, np.ones(3), familiarity=said, sizes=sizes)
        for said in (silent, boastful)
    ]
    np.testing.assert_allclose(*targets)


def test_no_client_outweighs_the_rows_it_was_asked():
    """One row claimed at the limit takes at most the evidence of all rows."""
    claim = np.full((1, 10), -8.0)
    claim[0, 3] = 8.0
    ratios = rules.normalised_ratios(claim, np.ones(1))
    assert 9.9 < ratios[0, 3] <= 10.0


def test_ratios_are_normalised_over_the_rows_a_client_was_asked():
    familiarity = np.log([[1.0, 3.0, 100.0]])
    ratios = rules.normalised_ratios(familiarity, np.array([[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(ratios[0, :2], [0.5, 1.5])


def test_rows_that_one_client_alone_claims_to_have_count_up_to_twice_the_median():
    flat = np.zeros((3, 4))
    boasted = rules.evidence(np.ones(3), flat, np.array([16.0, 16.0, 2.0**30]))
    np.testing.assert_allclose(boasted, np.repeat([[116.0], [116.0], [132.0]], 4, axis=1))
    # The median of those who have a say.
    paired = rules.evidence(np.array([1.0, 0.0, 1.0]), flat, np.array([16.0, 2.0**30, 64.0]))
    np.testing.assert_allclose(paired, np.repeat([[116.0], [0.0], [164.0]], 4, axis=1))


def test_a_large_prior_gives_the_plain_mean():
    case = testing._case()
    found = rules.distribution_weighted(
        case["logits"],
        case["weights"],
        familiarity=case["familiarity"],
        sizes=case["sizes"],
        prior_rows=1e12,
    )
    np.testing.assert_allclose(found, rules.mean(case["logits"], case["weights"]), atol=1e-8)


# --- calling a rule ------------------------------------------------------------------------------


def test_a_rule_is_given_what_its_signature_asks_for_and_no_more():
    def curious(logits, weights, *, sizes):
        assert sizes.tolist() == [1, 2]
        return rules.mean(logits, weights)

    assert rules.wants(curious) == {"sizes"}
    assert rules.wants(partial(rules.distribution_weighted, prior_rows=3)) == {
        "familiarity",
        "sizes",
    }
    extras = {"sizes": np.array([1, 2]), "seen": np.ones((2, 3)), "familiarity": np.ones((2, 2))}
    found = rules.combine(curious, LOGITS, EQUAL, **extras)
    np.testing.assert_allclose(found, HAND["mean"][1])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda logits, weights: logits[0, 0], "[rows, classes] = [2, 3], returned [3]"),
        (lambda logits, weights: logits.mean(0), "rows of probabilities that sum to 1"),
        (lambda logits, weights: rules.softmax(logits[0]) * 0.9, "that sum to 1"),
    ],
)
def test_a_wrong_result_is_refused_by_name(wrong, text):
    with pytest.raises(FedistillError) as caught:
        rules.combine(wrong, LOGITS, EQUAL)
    assert text in str(caught.value)
    assert "check_rule" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "function"),
    [("none", lambda q: q), ("era:0.1", rules.era), ("power:3", partial(rules.power, exponent=3))],
)
def test_sharpeners_by_their_text(spec, function):
    found = rules.combine(rules.mean, LOGITS, EQUAL, sharpen=spec)
    np.testing.assert_allclose(found, function(rules.mean(LOGITS, EQUAL)))


def test_options_reach_only_the_rules_that_know_them():
    assert rules.configure("mean", prior_rows=5) is rules.mean
    assert rules.configure("distribution-weighted", prior_rows=5).keywords == {"prior_rows": 5}
    with pytest.raises(FedistillError, match='unknown rule "meen"; known: mean, mean-logits'):
        rules.configure("meen")


def test_a_users_own_rule_runs_in_a_federation():
    calls = []

    def hottest(logits, weights, *, sizes):
        calls.append((logits.shape, weights.tolist(), sizes.tolist()))
        return rules.softmax(logits[sizes.argmax()])

    federation = builders.federation(
        builders.participants(3, rows=40), method=fd.method("ds-fl", rule=hottest)
    )
    (row,) = federation.run(1, builders.gaussian(30, 2000))
    assert row["clients_ok"] == 3
    assert calls == [((3, 40, 3), [1.0, 1.0, 1.0], [32.0, 32.0, 32.0])]
    assert federation.summary()["rule"] == "hottest"
    first = federation.sites["site-0"].learner.predict(federation.proxy.inputs)
    np.testing.assert_allclose(federation.server.table, rules.softmax(first), atol=1e-6)


def test_what_a_rule_can_do_without_is_handed_on_where_it_is_there():
    def modest(logits, weights, *, sizes, familiarity=None):
        told.append((sizes is not None, familiarity is not None))
        return rules.mean(logits, weights)

    told = []
    assert (rules.wants(modest), rules.takes(modest)) == ({"sizes"}, {"sizes", "familiarity"})
    extras = {"sizes": np.ones(2), "familiarity": None, "anchors": np.full(2, -1)}
    rules.combine(modest, LOGITS, EQUAL, **extras)
    rules.combine(modest, LOGITS, EQUAL, **(extras | {"familiarity": np.ones((2, 2))}))
    assert told == [(True, False), (True, True)]


def test_a_rule_that_remembers_is_made_anew_for_each_federation():
    one, two = (rules.configure("trust", rate=3.0, trim=0.2) for _ in range(2))
    assert type(one) is type(two) is rules.Trust
    assert one is not two
    assert one.rate == two.rate == 3.0
    assert rules.configure(one) is not one
    assert rules.configure(one).rate == 3.0


def test_a_rule_may_return_several_targets_a_row_and_each_is_checked():
    found = rules.combine(rules.clusters, LOGITS, EQUAL, sharpen="power:2")
    np.testing.assert_allclose(found, rules.power(HAND["clusters"][1]))

    def lopsided(logits, weights):
        several = rules.clusters(logits, weights)
        several[1, 1] *= 0.9
        return several

    with pytest.raises(FedistillError, match="that sum to 1"):
        rules.combine(lopsided, LOGITS, EQUAL)
    for axes in ((1, 0, 2), (0, 2, 1)):
        with pytest.raises(FedistillError, match=r"must return \[rows, classes\]"):
            rules.combine(lambda z, w, axes=axes: z[:, :1].transpose(axes), LOGITS, EQUAL)


# --- the checker itself --------------------------------------------------------------------------


def _weighted(logits, weights, sizes=None):
    return rules.mean(logits, weights if sizes is None else weights * sizes)


WRONG = {
    "not probabilities": (lambda z, w: z.mean(0), "at least 0"),
    "first client only": (lambda z, w: rules.softmax(z[0]), "clients in another order"),
    "wrong axis": (lambda z, w: rules.softmax(z).mean(1), r"\[rows, classes\] = \[7, 3\]"),
    "sums to two": (lambda z, w: 2 * rules.mean(z, w), "a row with sum 2"),
    "weights unread": (lambda z, w: rules.mean(z, np.ones(len(z))), "a client of weight zero"),
    "prefers class 0": (
        lambda z, w: rules.softmax(rules.log_softmax(z).mean(0) + 0.3 * np.eye(1, z.shape[2])),
        "classes renamed",
    ),
    "least likely": (
        lambda z, w: rules.softmax(-np.log(rules.mean(z, w) + 1e-30)),
        "unanimous clients",
    ),
    "overflows": (
        lambda z, w: np.exp(z).mean(0) / np.exp(z).mean(0).sum(-1, keepdims=True),
        "infinity",
    ),
    "random": (
        lambda z, w: np.random.default_rng().dirichlet(np.ones(z.shape[2]), z.shape[1]),
        "called twice",
    ),
    "zero where nobody speaks": (
        lambda z, w: np.nan_to_num(rules.mean(z, w)),
        "a row without weights",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_check_rule_rejects(name):
    wrong, text = WRONG[name]
    with pytest.raises(CheckFailed, match=text) as caught:
        check_rule(wrong)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)


def test_check_rule_rejects_a_rule_that_changes_its_arguments():
    def greedy(logits, weights):
        weights[0] = 0
        return rules.mean(logits, weights)

    with pytest.raises(CheckFailed, match="found weights changed"):
        check_rule(greedy)


def test_check_rule_rejects_a_rule_that_keeps_float16():
    def thin(logits, weights):
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs = probs / probs.sum(-1, keepdims=True)
        share = rules.spread(weights, logits.shape[1]).astype(logits.dtype)
        return np.einsum("kr,krc->rc", share, probs)

    with pytest.raises(CheckFailed, match="float16"):
        check_rule(thin)


class Counting:
    """The mean, and how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, logits, weights, *, clients):
        assert len(set(clients)) == len(logits)
        self.calls += 1
        return rules.power(rules.mean(logits, weights), self.calls)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_check_rule_judges_a_rule_that_remembers_round_by_round():
    check_rule(Counting)
    rule = Counting()
    rule.calls = 1
    check_rule(rule)
    assert rule.calls == 1  # what was checked are copies


class Secretive:
    """Remembers, and does not say so."""

    def __init__(self):
        self.calls = 0

    def __call__(self, logits, weights):
        return Counting.__call__(self, logits, weights, clients=range(len(logits)))


class Forgetting(Counting):
    def load_state_dict(self, state):
        pass


class Binary(Counting):
    def state_dict(self):
        return {"calls": np.array([self.calls])}


class Endless(Counting):
    def state_dict(self):
        return {"calls": math.inf}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Secretive, "called twice"),
        (Forgetting, "second round after restoring: expected the same result"),
        (Binary, "state: expected what JSON can say, found Object of type ndarray"),
        (Endless, "state: expected what JSON can say"),
    ],
)
def test_check_rule_rejects_a_memory_that_a_resumed_run_would_lose(kind, text):
    with pytest.raises(CheckFailed, match=f"rule {kind.__name__}, {text}"):
        check_rule(kind)


def test_clients_are_known_by_their_ids_in_every_order():
    def favour(logits, weights, favoured):
        share = rules.spread(weights, logits.shape[1])
        return rules.mean(logits, share * np.where(favoured, 2.0, 1.0)[:, None])

    check_rule(lambda z, w, clients: favour(z, w, [name == "site-1" for name in clients]))
    with pytest.raises(CheckFailed, match="clients in another order"):
        check_rule(lambda z, w: favour(z, w, np.arange(len(z)) == 1))


def test_labels_that_the_server_knows_are_renamed_with_the_classes():
    def told(logits, weights, *, anchors):
        known = np.eye(logits.shape[2])[anchors]
        return np.where(anchors[:, None] >= 0, known, rules.mean(logits, weights))

    def leaning(logits, weights, *, anchors):
        found = rules.mean(logits, weights)
        found[anchors >= 0] += 0.1 * np.eye(logits.shape[2])[0]
        return found / found.sum(axis=1, keepdims=True)

    check_rule(told)
    with pytest.raises(CheckFailed, match="classes renamed"):
        check_rule(leaning)


def test_what_a_rule_can_do_without_is_left_out_once():
    def lost(logits, weights, *, familiarity=None):
        return rules.mean(logits, weights) if familiarity is not None else logits[0]

    with pytest.raises(CheckFailed, match="rule lost, without familiarity: expected"):
        check_rule(lost)


def _opposite(probs):
    return (1 - probs) / (probs.shape[-1] - 1) if probs.shape[-1] > 1 else probs


SPOILT_CHOICES = {
    "one says the opposite": (
        lambda q: np.concatenate([q, _opposite(q[:, :1])], axis=1),
        "unanimous clients: expected the class they agree on",
    ),
    "in the order of the clients": (None, "clients in another order"),
    "rows and choices swapped": (lambda q: q.transpose(1, 0, 2), r"\[rows, classes\] = \[7, 3\]"),
    "none": (lambda q: q[:, :0], r"\[rows, classes\] = \[7, 3\], found \[7, 0, 3\]"),
    "one is half": (lambda q: q * np.r_[0.5, np.ones(q.shape[1] - 1)][:, None], "a row with sum"),
}


@pytest.mark.parametrize("name", SPOILT_CHOICES)
def test_check_rule_judges_each_of_several_targets(name):
    spoil, text = SPOILT_CHOICES[name]

    def several(logits, weights):
        if spoil is None:
            return rules.softmax(logits).transpose(1, 0, 2)
        return spoil(rules.clusters(logits, weights))

    with pytest.raises(CheckFailed, match=text):
        check_rule(several)


def test_check_failed_is_an_assertion_and_an_error_of_ours():
    assert issubclass(CheckFailed, AssertionError)
    assert issubclass(CheckFailed, FedistillError)
