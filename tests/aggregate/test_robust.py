"""Robust rules: hand-computed rows, the naive loop as oracle, blocks, weights and breakdown."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.aggregate import robust
from fedistill.aggregate.basics import softmax
from fedistill.errors import FedistillError
from fedistill.testing import check_rule

RULES = {
    "median": robust.median,
    "trimmed-mean": robust.trimmed_mean,
    "trimmed a little": partial(robust.trimmed_mean, trim=0.1),
    "not trimmed": partial(robust.trimmed_mean, trim=0.0),
    "trimmed to the median": partial(robust.trimmed_mean, trim=0.5),
    "geometric-median": robust.geometric_median,
    "geometric-median-client": robust.geometric_median_client,
    "krum": robust.krum,
    "krum, half bad": partial(robust.krum, byzantine=0.5),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def logits_of(clients, rows, classes, seed=0, scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=(clients, rows, classes))


def normalised(rows):
    return rows / rows.sum(axis=-1, keepdims=True)


@every_rule
def test_every_rule_keeps_its_promises(rule):
    check_rule(rule)


# --- medians and trimmed means -----------------------------------------------------------------


def test_two_clients_by_hand():
    # Of two, median and trimmed mean are the mean.
    probs = np.array([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], [[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]])
    expected = [[0.375, 0.375, 0.25], [0.5, 0.15, 0.35]]
    for rule in (robust.median, robust.trimmed_mean, robust.geometric_median):
        np.testing.assert_allclose(rule(np.log(probs), np.ones(2)), expected, atol=1e-12)


THREE = np.log([[[0.6, 0.3, 0.1]], [[0.5, 0.2, 0.3]], [[0.1, 0.1, 0.8]]])


def test_three_clients_by_hand():
    # Middle values 0.5, 0.2, 0.3.
    np.testing.assert_allclose(
        robust.median(THREE, np.ones(3)), normalised(np.array([[0.5, 0.2, 0.3]]))
    )
    # A cut of 0.3 leaves 1/3 - 0.3 = 1/30 of each outer client and 10/30 of the one between.
    outer, inner = 1 / 12, 10 / 12
    cut = [
        outer * 0.7 + inner * 0.5,
        outer * 0.4 + inner * 0.2,
        outer * 0.9 + inner * 0.3,
    ]
    np.testing.assert_allclose(
        robust.trimmed_mean(THREE, np.ones(3)), normalised(np.array([cut])), atol=1e-12
    )


def test_a_heavier_client_moves_the_median_by_hand():
    # Weights 2, 1, 1: half of the weight lies at or below the first client's value where it is
    # the smallest two: classes in order of value with cumulated weights.
    # class 0: 0.1 (1), 0.5 (2), 0.6 (4): half is reached at 0.5 exactly: mean of 0.5 and 0.6.
    # class 1: 0.1 (1), 0.2 (2), 0.3 (4): mean of 0.2 and 0.3.
    # class 2: 0.1 (2), 0.3 (3), 0.8 (4): mean of 0.1 and 0.3.
    found = robust.median(THREE, np.array([2.0, 1.0, 1.0]))
    np.testing.assert_allclose(found, normalised(np.array([[0.55, 0.25, 0.2]])), atol=1e-12)


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 9, 10])
def test_median_is_the_median_of_numpy(clients):
    logits = logits_of(clients, 11, 4, seed=clients)
    found = robust.median(logits, np.full(clients, 0.7))
    np.testing.assert_allclose(found, normalised(np.median(softmax(logits), axis=0)), atol=1e-12)


@pytest.mark.parametrize(("clients", "trim"), [(10, 0.1), (10, 0.3), (4, 0.25), (5, 0.4), (3, 0)])
def test_trimmed_mean_of_whole_clients_is_the_naive_loop(clients, trim):
    logits = logits_of(clients, 7, 3, seed=clients)
    probs, cut = softmax(logits), round(trim * clients)
    naive = np.zeros((7, 3))
    for row in range(7):
        for label in range(3):
            values = sorted(probs[:, row, label])
            naive[row, label] = np.mean(values[cut : clients - cut])
    found = robust.trimmed_mean(logits, np.ones(clients), trim=trim)
    np.testing.assert_allclose(found, normalised(naive), atol=1e-12)


@given(st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.45, 0.5]))
@settings(max_examples=40, deadline=None)
def test_whole_weights_are_repeated_clients(clients, seed, trim):
    random = np.random.default_rng(seed)
    logits = logits_of(clients, 5, 3, seed=seed)
    counts = random.integers(0, 4, size=clients)
    counts[random.integers(clients)] = 2
    repeated = np.repeat(logits, counts, axis=0)
    for rule in (partial(robust.trimmed_mean, trim=trim), robust.median):
        np.testing.assert_allclose(
            rule(logits, counts.astype(float)), rule(repeated, np.ones(len(repeated))), atol=1e-9
        )


def test_half_trimmed_is_the_median():
    logits, weights = logits_of(6, 5, 3), np.array([1.0, 2.0, 0.5, 0.0, 1.0, 1.0])
    for given_weights in (weights, np.ones(6)):
        np.testing.assert_array_equal(
            robust.trimmed_mean(logits, given_weights, trim=0.5),
            robust.median(logits, given_weights),
        )


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
def test_a_row_where_no_class_has_support_gets_the_mean(name):
    logits = 1e4 * np.eye(4)[:, None, :]
    np.testing.assert_allclose(RULES[name](logits, np.ones(4)), np.full((1, 4), 0.25))
    unequal = np.array([1.0, 1.2, 0.9, 1.0])
    found = RULES[name](logits, unequal)
    np.testing.assert_allclose(found, unequal[None] / unequal.sum(), atol=1e-12)


@pytest.mark.parametrize("trim", [-0.1, 0.51, float("nan")])
def test_a_cut_out_of_range_is_refused(trim):
    with pytest.raises(FedistillError, match=r"trim: expected a share from 0 to 0\.5"):
        robust.trimmed_mean(THREE, np.ones(3), trim=trim)


# --- geometric medians -------------------------------------------------------------------------


def sum_of_distances(point, points, weights):
    return sum(w * np.linalg.norm(p - point) for p, w in zip(points, weights, strict=True))


def test_a_majority_at_one_point_is_the_geometric_median():
    # Three of five agree exactly: the point is hit, and nothing is divided by zero.
    probs = np.array([[0.7, 0.2, 0.1]] * 3 + [[0.1, 0.1, 0.8], [0.05, 0.9, 0.05]])
    logits = np.log(probs)[:, None]
    for rule in (robust.geometric_median, robust.geometric_median_client):
        np.testing.assert_allclose(rule(logits, np.ones(5)), probs[:1], atol=1e-4)


def test_between_three_points_of_an_equal_triangle_is_the_middle():
    logits = 50 * np.eye(3)[:, None]
    for rule in (robust.geometric_median, robust.geometric_median_client):
        np.testing.assert_allclose(rule(logits, np.ones(3)), np.full((1, 3), 1 / 3), atol=1e-12)


def test_of_three_points_in_line_it_is_the_one_between():
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    found = robust.geometric_median(np.log(probs)[:, None], np.ones(3))
    np.testing.assert_allclose(found, [[0.6, 0.4]], atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_near_a_geometric_median_has_smaller_distances(seed):
    random = np.random.default_rng(seed)
    logits, weights = logits_of(7, 4, 3, seed=seed), random.random(7)
    probs = softmax(logits)
    rows = robust.geometric_median(logits, weights)
    whole = robust.geometric_median_client(logits, weights)
    step = random.normal(size=(200, 4, 3))
    step -= step.mean(axis=-1, keepdims=True)
    for size in (1e-1, 1e-2, 1e-3):
        for move in size * step:
            for row in range(4):
                here = sum_of_distances(rows[row], probs[:, row], weights)
                there = sum_of_distances(rows[row] + move[row], probs[:, row], weights)
                assert here <= there + 1e-4
            here = sum_of_distances(whole.ravel(), probs.reshape(7, -1), weights)
            there = sum_of_distances((whole + move).ravel(), probs.reshape(7, -1), weights)
            assert here <= there + 1e-4


def test_one_weight_a_client_and_that_weight_on_each_row_are_the_same():
    logits, weights = logits_of(6, 9, 4), np.array([1.0, 0.3, 2.0, 0.0, 1.0, 0.7])
    for rule in RULES.values():
        np.testing.assert_allclose(
            rule(logits, weights), rule(logits, np.tile(weights[:, None], 9)), atol=1e-12
        )


def test_a_client_is_measured_on_the_rows_it_answered():
    # The last client agrees where it answered; what stands in its other rows is not heard.
    logits = logits_of(4, 12, 3, scale=0.3) + 3 * np.eye(3)[np.arange(12) % 3]
    weights = np.ones((4, 12))
    weights[3, 6:] = 0
    loud = logits.copy()
    loud[3, 6:] *= -50
    for rule in RULES.values():
        np.testing.assert_allclose(rule(logits, weights), rule(loud, weights), atol=1e-12)


def test_a_client_that_lies_on_some_rows_loses_weight_on_all():
    random = np.random.default_rng(1)
    truth = 4 * np.eye(3)[random.integers(3, size=60)]
    logits = truth + random.normal(size=(7, 60, 3))
    logits[6, 30:] = -10 * truth[30:]
    probs = softmax(logits)
    found = robust.geometric_median_client(logits, np.ones(7))
    mean = probs.mean(axis=0)
    honest = probs[:6].mean(axis=0)
    pulled = np.abs(mean - honest)[:30].mean()
    assert np.abs(found - honest)[30:].mean() < 0.5 * np.abs(mean - honest)[30:].mean()
    assert np.abs(found - honest)[:30].mean() < pulled


# --- Krum --------------------------------------------------------------------------------------


def naive_krum(probs, byzantine):
    clients = len(probs)
    near = max(clients - int(byzantine * clients) - 2, 1)
    scores = []
    for k in range(clients):
        gaps = sorted(
            ((probs[k] - probs[other]) ** 2).sum(axis=-1).mean()
            for other in range(clients)
            if other != k
        )
        scores.append(sum(gaps[:near]))
    return probs[int(np.argmin(scores))]


@pytest.mark.parametrize("byzantine", [0.0, 0.2, 0.4])
def test_krum_is_the_naive_loop(byzantine):
    for seed in range(5):
        logits = logits_of(10, 6, 4, seed=seed)
        found = robust.krum(logits, np.ones(10), byzantine=byzantine)
        np.testing.assert_allclose(found, naive_krum(softmax(logits), byzantine), atol=1e-12)


def test_krum_ties_go_by_content():
    # Two of three are each other's nearest: the one that is closer to the third is chosen.
    probs = np.array([[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]])
    logits = np.log(probs)[:, None]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        np.testing.assert_allclose(robust.krum(logits[order], np.ones(3)), [[0.5, 0.5]])
    # Two alone tie in everything: neither is preferred.
    np.testing.assert_allclose(robust.krum(logits[:2], np.ones(2)), [[0.55, 0.45]])


def test_where_the_chosen_client_did_not_answer_the_next_does():
    logits = logits_of(5, 6, 3, scale=0.5)
    weights = np.ones((5, 6))
    chosen = np.abs(softmax(logits) - robust.krum(logits, weights)).max(axis=(1, 2)).argmin()
    weights[chosen, 4] = 0
    weights[:, 5] = 0
    found = robust.krum(logits, weights)
    assert np.isnan(found[5]).all()
    sources = np.abs(softmax(logits)[:, :5] - found[:5]).max(axis=2) < 1e-12
    assert sources.any(axis=0).all()
    assert not sources[chosen, 4]


def test_clients_without_a_common_row_are_no_obstacle():
    logits, weights = logits_of(4, 4, 3), np.eye(4)
    for rule in RULES.values():
        np.testing.assert_allclose(
            rule(logits, weights), softmax(logits)[np.arange(4), np.arange(4)], atol=1e-12
        )


def test_a_share_of_bad_clients_out_of_range_is_refused():
    with pytest.raises(FedistillError, match=r"byzantine: expected a share from 0 to 0\.5"):
        robust.krum(THREE, np.ones(3), byzantine=0.6)


# --- blocks, weights, order --------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("weights", ["equal", "by client", "by row"])
def test_rows_in_blocks_are_the_same_as_all_at_once(rule, weights, monkeypatch):
    logits, random = logits_of(9, 103, 5), np.random.default_rng(3)
    table = {
        "equal": np.ones(9),
        "by client": random.random(9),
        "by row": random.random((9, 103)) * (random.random((9, 103)) < 0.8),
    }[weights]
    whole = rule(logits, table)
    monkeypatch.setattr(robust, "CELLS", 1)
    for rows in (1, 10, 102):
        monkeypatch.setattr(robust, "FEWEST", rows)
        np.testing.assert_allclose(rule(logits, table), whole, rtol=0, atol=1e-12)


def test_blocks_are_softmax_and_shares():
    logits, weights = logits_of(3, 50, 4), np.array([1.0, 2.0, 1.0])
    seen = 0
    for rows, probs, shares in robust.blocks(logits, weights):
        np.testing.assert_allclose(probs.transpose(2, 1, 0), softmax(logits[:, rows]), atol=1e-15)
        np.testing.assert_allclose(shares, np.tile([0.25, 0.5, 0.25], (probs.shape[1], 1)))
        seen += probs.shape[1]
    assert seen == 50


@every_rule
def test_order_and_scale_of_weights_mean_nothing(rule):
    random = np.random.default_rng(5)
    logits = logits_of(8, 20, 4)
    for weights in (random.random(8), random.random((8, 20))):
        usual, turn = rule(logits, weights), random.permutation(8)
        np.testing.assert_allclose(rule(logits[turn], weights[turn]), usual, atol=1e-9)
        np.testing.assert_allclose(rule(logits, 64 * weights), usual, atol=1e-9)


@every_rule
def test_no_weight_is_nan_and_no_rows_are_no_rows(rule):
    logits = logits_of(4, 5, 3)
    assert np.isnan(rule(logits, np.zeros(4))).all()
    weights = np.ones((4, 5))
    weights[:, 2] = 0
    found = rule(logits, weights)
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()
    for empty in (np.ones(4), np.ones((4, 0))):
        assert rule(logits[:, :0], empty).shape == (0, 3)


@every_rule
def test_float32_and_read_only_arrays_are_fine(rule):
    logits = logits_of(4, 5, 3).astype(np.float32)
    weights = np.ones(4, dtype=np.float32)
    logits.flags.writeable = weights.flags.writeable = False
    assert rule(logits, weights).dtype == np.float64


# --- breakdown ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["median", "trimmed-mean", "geometric-median", "geometric-median-client", "krum"]
)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_three_liars_of_ten_do_not_turn_rows(name, scale):
    random = np.random.default_rng(2)
    labels = random.integers(5, size=300)
    logits = 4 * np.eye(5)[labels] + random.normal(size=(10, 300, 5))
    logits[7:] = -scale * logits[:7].mean(axis=0)
    found = RULES[name](logits, np.ones(10)).argmax(axis=1)
    assert (found == labels).mean() > 0.97
