"""Trust: what a round does to it, what rounds do, and who survives on digits."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedistill.aggregate import robust
from fedistill.aggregate.basics import softmax
from fedistill.aggregate.evidence import evidence
from fedistill.aggregate.trust import LOWEST, AnchoredTrust, Trust
from fedistill.errors import FedistillError
from fedistill.testing import check_rule

BOTH = pytest.mark.parametrize("kind", [Trust, AnchoredTrust])


def names(count):
    return [f"c{k}" for k in range(count)]


def call(rule, logits, weights=None, clients=None, labels=None, **extras):
    """A round, with anchors for a rule that wants them: every third row of ``labels``."""
    weights = np.ones(len(logits)) if weights is None else weights
    if isinstance(rule, AnchoredTrust):
        rows = np.arange(logits.shape[1])
        labels = rows % logits.shape[2] if labels is None else labels
        extras.setdefault("anchors", np.where(rows % 3 == 0, labels, -1))
    return rule(logits, weights, clients=clients or names(len(logits)), **extras)


def fresh(kind):
    """A rule without memory: a new one for each call, so that it is checked as a function.

    Anchors are class numbers: renaming classes alone would rename the truth, so there are none.
    """

    def extras(logits):
        return {"anchors": np.full(logits.shape[1], -1)} if kind is AnchoredTrust else {}

    def plain(logits, weights):
        return call(kind(), logits, weights, **extras(logits))

    def familiar(logits, weights, *, familiarity, sizes):
        known = {"familiarity": familiarity, "sizes": sizes}
        return call(kind(), logits, weights, **known, **extras(logits))

    return plain, familiar


@BOTH
def test_both_keep_the_promises_of_a_rule(kind):
    for rule in fresh(kind):
        check_rule(rule)


@BOTH
def test_what_a_client_of_weight_zero_says_moves_nobody(kind):
    logits, labels = crowd(0)
    weights = np.array([1.0, 0.5, 1, 1, 1, 0])
    lied = logits.copy()
    lied[5] = logits[0]
    one, two = kind(), kind()
    np.testing.assert_array_equal(
        call(one, logits, weights, labels=labels), call(two, lied, weights, labels=labels)
    )
    assert one.state_dict() == two.state_dict()
    assert "c5" not in one.memory


# --- one round by hand -------------------------------------------------------------------------


def at(*first):
    """Clients of two classes whose first class has these probabilities, one row."""
    probs = np.array(first, dtype=float)
    return np.log(np.stack([probs, 1 - probs], axis=1))[:, None]


def test_a_round_of_trust_by_hand():
    # Base: the client between, 0.5. L1 distances .2, .1, 0, .1, .9: the median is .1, the least
    # 0, so that the limit is .2; the last client is .7 beyond.
    rule = Trust(rate=2.0)
    found = call(rule, at(0.4, 0.45, 0.5, 0.55, 0.95))
    trust = math.exp(-1.4)
    expected = (0.4 + 0.45 + 0.5 + 0.55 + trust * 0.95) / (4 + trust)
    np.testing.assert_allclose(found[0], [expected, 1 - expected], atol=1e-4)
    logs = {name: log for name, (log,) in rule.memory.items()}
    assert logs == pytest.approx({"c0": 0, "c1": 0, "c2": 0, "c3": 0, "c4": -1.4}, abs=1e-3)
    call(rule, at(0.4, 0.45, 0.5, 0.55, 0.95))
    assert rule.memory["c4"][0] == pytest.approx(0.8 * -1.4 - 1.4, abs=1e-3)
    call(rule, at(0.4, 0.45, 0.5, 0.55, 0.5))
    assert rule.memory["c4"][0] == pytest.approx(0.8 * (0.8 * -1.4 - 1.4), abs=1e-3)


def test_a_round_of_anchored_trust_by_hand():
    # The first row is an anchor of class 0: probabilities .8, .6, .1 are .5 in the mean; credit
    # of the last is .2, with one anchor of credit 1 before it .6; cubed .216.
    probs = np.array([[[0.8, 0.2], [0.7, 0.3]], [[0.6, 0.4], [0.6, 0.4]], [[0.1, 0.9], [0.2, 0.8]]])
    rule = AnchoredTrust()
    found = rule(np.log(probs), np.ones(3), clients=names(3), anchors=np.array([0, -1]))
    trust = 0.6**3
    first = (0.7 + 0.6 + trust * 0.2) / (2 + trust)
    np.testing.assert_allclose(found[1], [first, 1 - first], atol=2e-3)
    assert rule.memory["c2"] == pytest.approx([0.2, 1.0], abs=2e-3)
    rule(np.log(probs), np.ones(3), clients=names(3), anchors=np.array([0, -1]))
    assert rule.memory["c2"] == pytest.approx([0.8 * 0.2 + 0.2, 1.8], abs=4e-3)


def test_familiarity_weighs_what_is_said_and_on_what_one_is_judged():
    # Two specialists, each wrong about the other's row, and two that know both.
    said = np.array([[0.9, 0.9], [0.1, 0.1], [0.9, 0.1], [0.85, 0.15]])
    logits = np.log(np.stack([said, 1 - said], axis=-1))
    familiarity = np.array([[2.0, -2.0], [-2.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    sizes = np.full(4, 512.0)
    rule = Trust()
    found = call(rule, logits, familiarity=familiarity, sizes=sizes)
    assert rule.memory == {name: [0.0] for name in names(4)}
    shares = evidence(np.ones(4), familiarity, sizes)
    np.testing.assert_allclose(found, robust.weighted_mean(logits, shares), atol=1e-12)
    anchored = AnchoredTrust()
    call(anchored, logits, familiarity=familiarity, sizes=sizes, anchors=np.array([0, 1]))
    for name in ("c0", "c1"):
        credit, count = anchored.memory[name]
        assert credit > 0.9 * count
    blind = AnchoredTrust()
    call(blind, logits, anchors=np.array([0, 1]))
    assert blind.memory["c0"][0] < 0.9 * blind.memory["c0"][1]


# --- many rounds -------------------------------------------------------------------------------


def crowd(seed, bad=1, rows=40, clients=6):
    """Honest clients and, last, such as say the opposite."""
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=rows)
    logits = 4 * np.eye(3)[labels] + random.normal(size=(clients, rows, 3))
    if bad:
        logits[-bad:] *= -2
    return logits, labels


def share_of(rule, seed=99):
    """How much of the pool the last client is, seen from a target with and without it."""
    logits, _ = crowd(seed, bad=0)
    logits[-1] = -logits[-1]
    if isinstance(rule, AnchoredTrust):
        found = call(rule, logits, anchors=np.full(logits.shape[1], -1))
    else:
        logs = [rule.memory[name][0] for name in names(6)]
        return math.exp(logs[-1]) / np.exp(logs).sum()
    probs = softmax(logits)
    rest = probs[:-1].mean(axis=0)
    return float(np.abs(found - rest).sum() / np.abs(probs[-1] - rest).sum())


@BOTH
def test_a_liar_loses_its_say_and_wins_it_back(kind):
    rule = kind()
    for number in range(5):
        logits, labels = crowd(number)
        call(rule, logits, labels=labels)
    assert share_of(rule) < 1e-3
    shares = []
    for number in range(20):
        logits, labels = crowd(100 + number, bad=0)
        call(rule, logits, labels=labels)
        shares.append(share_of(rule))
    assert shares[-1] > 0.1
    assert (np.diff(shares) > -0.02).all()


@BOTH
def test_hundreds_of_rounds_neither_underflow_nor_exclude_for_good(kind):
    rule = kind(forget=1.0) if kind is Trust else kind()
    rounds = [crowd(number) for number in range(7)]
    for number in range(300):
        logits, labels = rounds[number % 7]
        found = call(rule, logits, labels=labels)
    assert np.isfinite(found).all()
    if kind is Trust:
        assert min(log for (log,) in rule.memory.values()) == LOWEST
        assert max(log for (log,) in rule.memory.values()) == 0
    else:
        assert all(0 <= held[1] <= 14 / (1 - 0.8) + 1e-6 for held in rule.memory.values())


@BOTH
def test_who_is_away_keeps_its_trust(kind):
    rule = kind()
    logits, labels = crowd(0)
    call(rule, logits, labels=labels)
    before = list(rule.memory["c5"])
    call(rule, logits[:5], labels=labels)
    # Present with weight 0 is away, too; its predictions do not matter.
    weights = np.array([1.0, 1, 1, 1, 1, 0])
    call(rule, -logits, weights, labels=labels)
    assert rule.memory["c5"] == before


@BOTH
def test_who_answers_alone_is_not_made_the_best_by_it(kind):
    rule = kind()
    for number in range(5):
        logits, labels = crowd(number)
        call(rule, logits, labels=labels)
    before = rule.state_dict()
    found = rule(
        logits[5:],
        np.ones(1),
        clients=["c5"],
        **({"anchors": np.full(40, -1)} if kind is AnchoredTrust else {}),
    )
    np.testing.assert_allclose(found, softmax(logits[5]), atol=1e-12)
    assert rule.state_dict() == before


def test_two_clients_cannot_be_told_apart():
    rule = Trust()
    found = call(rule, at(0.9, 0.1))
    np.testing.assert_allclose(found, [[0.5, 0.5]], atol=1e-12)
    assert rule.memory == {}


@BOTH
def test_state_goes_through_json_and_continues(kind):
    rules = kind(), kind()
    for number in range(3):
        logits, labels = crowd(number)
        call(rules[0], logits, labels=labels)
    rules[1].load_state_dict(json.loads(json.dumps(rules[0].state_dict())))
    assert rules[1].state_dict() == rules[0].state_dict()
    logits, labels = crowd(9)
    one, two = (call(rule, logits, labels=labels) for rule in rules)
    np.testing.assert_array_equal(one, two)
    state = rules[0].state_dict()
    call(rules[0], logits, labels=labels)
    assert state == rules[1].state_dict()


@BOTH
def test_order_of_clients_means_nothing_and_ids_are_memory_alone(kind):
    usual, turned, renamed = kind(), kind(), kind()
    turn = [3, 5, 0, 1, 4, 2]
    other = [f"site {k}" for k in "zyxwvu"]
    for number in range(4):
        logits, labels = crowd(number)
        weights = np.random.default_rng(number).random((6, 40))
        found = call(usual, logits, weights, labels=labels)
        again = call(
            turned, logits[turn], weights[turn], [names(6)[k] for k in turn], labels=labels
        )
        np.testing.assert_allclose(again, found, atol=1e-9)
        np.testing.assert_allclose(
            call(renamed, logits, weights, other, labels=labels), found, atol=1e-12
        )
    for name, held in usual.memory.items():
        assert turned.memory[name] == pytest.approx(held, abs=1e-9)


@BOTH
def test_rows_in_blocks_are_the_same_as_all_at_once(kind, monkeypatch):
    logits, labels = crowd(3, rows=101)
    whole = kind()
    wanted = call(whole, logits, labels=labels)
    monkeypatch.setattr(robust, "CELLS", 1)
    monkeypatch.setattr(robust, "FEWEST", 7)
    parts = kind()
    np.testing.assert_allclose(call(parts, logits, labels=labels), wanted, atol=1e-12)
    for name, held in whole.memory.items():
        assert parts.memory[name] == pytest.approx(held, abs=1e-12)


@BOTH
def test_rows_without_weight_are_nan_and_do_not_spoil_trust(kind):
    logits, labels = crowd(3)
    weights = np.ones((6, 40))
    weights[:, 0] = 0
    weights[5, :20] = 0
    rule = kind()
    found = call(rule, logits, weights, labels=labels)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()
    assert np.isfinite(list(rule.memory.values())).all()
    assert np.isnan(call(kind(), logits, np.zeros(6), labels=labels)).all()
    assert call(kind(), logits[:, :0], labels=labels[:0]).shape == (0, 3)


def test_without_anchors_anchored_trust_stays():
    rule = AnchoredTrust()
    logits, labels = crowd(0)
    none = np.full(40, -1)
    found = call(rule, logits, anchors=none)
    np.testing.assert_allclose(found, softmax(logits).mean(axis=0), atol=1e-12)
    assert rule.memory == {}
    call(rule, logits, labels=labels)
    before = rule.state_dict()
    first, second = (call(rule, logits, anchors=none) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert rule.state_dict() == before
    assert np.abs(first - found).max() > 0.1


def test_one_anchor_excludes_nobody_many_do():
    rule = AnchoredTrust()
    logits, labels = crowd(0)
    found = []
    for number in range(20):
        anchors = np.full(40, -1)
        anchors[number] = labels[number]
        call(rule, logits, anchors=anchors)
        found.append(share_of(rule))
    assert found[0] > 0.02
    assert found[-1] < 0.5 * found[0]
    assert found[-1] < 0.005


@BOTH
@pytest.mark.parametrize("options", [{"rate": -1}, {"forget": 1.5}, {"prior_rows": float("nan")}])
def test_options_out_of_range_are_refused(kind, options):
    with pytest.raises(FedistillError, match="trust: expected rate and prior_rows of at least 0"):
        kind(**options)


@BOTH
@pytest.mark.parametrize("clients", [["a", "b"], ["a", "b", "b"], list("abcd")])
def test_ids_that_do_not_fit_are_refused(kind, clients):
    with pytest.raises(FedistillError, match="expected 3 different client ids"):
        call(kind(), at(0.1, 0.2, 0.3), clients=clients, labels=np.zeros(1, dtype=int))


@pytest.mark.parametrize("anchors", [[0, 1], [2], [-2]])
def test_anchors_that_do_not_fit_are_refused(anchors):
    with pytest.raises(FedistillError, match="anchors: expected 1 class numbers below 2"):
        call(AnchoredTrust(), at(0.1, 0.2, 0.3), anchors=np.array(anchors))


def test_a_state_of_the_other_rule_is_refused():
    with pytest.raises(FedistillError, match="expected 2 numbers for each client"):
        AnchoredTrust().load_state_dict({"clients": {"a": [0.0]}})


# --- who survives ------------------------------------------------------------------------------

CLIENTS = 10
SEEDS = range(3)
ATTACKS = ("noise", "flip", "fdla", "least-likely", "likeliest-wrong")


@dataclass
class Federation:
    """Ten linear models on digits: logits on 400 proxy rows, their labels, and what is known."""

    logits: np.ndarray
    labels: np.ndarray
    familiarity: np.ndarray
    sizes: np.ndarray


def federation(alpha, seed):
    inputs, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    inputs = np.concatenate([inputs / 8 - 1, np.ones((len(labels), 1))], axis=1)[order]
    labels = labels[order]
    proxy, truth = inputs[:400], labels[:400]
    inputs, labels = inputs[400:], labels[400:]
    owner = np.zeros(len(labels), dtype=int)
    for label in range(10):
        mine = labels == label
        owner[mine] = random.choice(CLIENTS, mine.sum(), p=random.dirichlet([alpha] * CLIENTS))
    logits, counts = [], np.zeros((CLIENTS, 10))
    for client in range(CLIENTS):
        own, target = inputs[owner == client], np.eye(10)[labels[owner == client]]
        counts[client] = target.sum(axis=0)
        weights = np.zeros((65, 10))
        for _ in range(150):
            error = softmax(own @ weights) - target
            weights -= 0.3 * own.T @ error / max(len(own), 1)
        logits.append(proxy @ weights)
    mix = (counts + 0.5) / (counts + 0.5).sum(axis=1, keepdims=True)
    ratio = np.log(mix / (np.bincount(truth, minlength=10) / len(truth)))[:, truth]
    ratio += 0.5 * random.normal(size=ratio.shape)
    sizes = 2.0 ** np.round(np.log2(np.maximum(counts.sum(axis=1), 1)))
    return Federation(np.array(logits), truth, ratio, sizes)


@pytest.fixture(scope="module")
def alike():
    return [federation(100, seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def different():
    return [federation(0.5, seed) for seed in SEEDS]


def attacked(logits, kind, bad):
    """The last ``bad`` clients say the same wrong thing (of their own, where it is noise)."""
    if not bad:
        return logits
    honest, rows = logits[:-bad], np.arange(logits.shape[1])
    mean = softmax(honest).mean(axis=0)
    if kind == "noise":
        said = 5 * np.random.default_rng(bad).normal(size=logits[-bad:].shape)
    elif kind == "flip":
        said = -100 * honest.mean(axis=0)
    elif kind == "fdla":
        said = honest[0].copy()
        top, least = said.argmax(axis=1), said.argmin(axis=1)
        said[rows, top], said[rows, least] = honest[0][rows, least], honest[0][rows, top]
    elif kind == "least-likely":
        said = 30 * np.eye(10)[mean.argmin(axis=1)]
    else:
        mean[rows, mean.argmax(axis=1)] = -1
        said = 30 * np.eye(10)[mean.argmax(axis=1)]
    logits = logits.copy()
    logits[-bad:] = said
    return logits


def accuracy(federations, kind="", bad=0, rule=Trust, rounds=1, familiar=False, anchors=30):
    """Share of proxy rows whose target names the right class, mean over seeds."""
    found = []
    for seed, each in enumerate(federations):
        logits = attacked(each.logits, kind, bad)
        extras = {"familiarity": each.familiarity, "sizes": each.sizes} if familiar else {}
        made = rule() if isinstance(rule, type) else rule
        for number in range(rounds):
            if isinstance(made, AnchoredTrust):
                known = np.random.default_rng([seed, number]).choice(400, anchors, replace=False)
                extras["anchors"] = np.full(400, -1)
                extras["anchors"][known] = each.labels[known]
            if isinstance(rule, type):
                extras["clients"] = names(CLIENTS)
            targets = made(logits, np.ones(CLIENTS), **extras)
        found.append((targets.argmax(axis=1) == each.labels).mean())
    return float(np.mean(found))


@pytest.mark.parametrize("rounds", [1, 6])
@pytest.mark.parametrize("kind", ATTACKS)
def test_trust_survives_four_of_ten_that_are_alike(alike, kind, rounds):
    assert accuracy(alike, kind, 4, rounds=rounds) >= 0.93


@pytest.mark.parametrize("rounds", [1, 6])
@pytest.mark.parametrize("kind", ATTACKS)
def test_trust_survives_two_of_ten_that_differ(different, kind, rounds):
    assert accuracy(different, kind, 2, rounds=rounds) >= 0.87


@pytest.mark.parametrize("kind", ATTACKS)
def test_with_familiarity_two_of_ten_cost_less_than_two_points(different, kind):
    clean = accuracy(different, familiar=True)
    assert clean >= 0.95
    for rounds in (1, 6):
        found = accuracy(different, kind, 2, familiar=True, rounds=rounds)
        assert found >= clean - 0.02


def test_trust_costs_little_where_nobody_is_bad(alike, different):
    for federations in (alike, different):
        for familiar in (False, True):
            mean = accuracy(federations, rule=Trust, familiar=familiar, rounds=6)
            assert mean >= accuracy(federations, rule=pooled, familiar=familiar) - 0.015


def pooled(logits, weights, familiarity=None, sizes=None):
    if familiarity is not None:
        weights = evidence(weights, familiarity, sizes)
    return robust.weighted_mean(logits, weights)


@pytest.mark.parametrize("familiar", [False, True])
@pytest.mark.parametrize("kind", ATTACKS)
def test_anchors_save_from_four_colluders_where_clients_differ(different, kind, familiar):
    clean = accuracy(different, rule=AnchoredTrust, familiar=familiar)
    for rounds, anchors in ((1, 30), (6, 20)):
        found = accuracy(different, kind, 4, AnchoredTrust, rounds, familiar, anchors)
        assert found >= clean - 0.05


def test_without_anchors_four_colluders_are_too_many(different):
    # The promise is two of ten; nobody should read more into it.
    assert accuracy(different, "likeliest-wrong", 4) < 0.5


def test_anchored_trust_keeps_honest_clients_with_few_classes(different):
    clean = accuracy(different, rule=AnchoredTrust, rounds=6)
    assert clean >= accuracy(different, rule=pooled) - 0.01


def test_the_geometric_median_of_clients_survives_four_of_ten_that_are_alike(alike):
    for kind in ATTACKS[:4]:
        assert accuracy(alike, kind, 4, robust.geometric_median_client) >= 0.92
