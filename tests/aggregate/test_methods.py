"""Rules of published methods: targets computed by hand, properties, naive loops, bad input."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.aggregate import methods, rules
from fedistill.errors import FedistillError
from fedistill.testing import check_rule

A = [[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]
B = [[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]
LOGITS = np.log([A, B])
EQUAL = np.ones(2)
UNKNOWN = np.array([-1, -1])
FAMILIARITY = np.log([[3.0, 1.0], [1 / 3, 1.0]])


def random_case(seed, clients=3, rows=8, classes=4):
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(clients, rows, classes))
    return logits, random.uniform(0.2, 2.0, size=(clients, rows))


def unlabelled(logits, weights, *, soft=False):
    anchors = np.full(logits.shape[1], -1)
    return methods.best_teacher(logits, weights, anchors=anchors, soft=soft)


def certain(logits, weights):
    familiarity = np.linspace(-2, 2, logits.shape[0] * logits.shape[1])
    return methods.certainty(
        logits, weights, familiarity=familiarity.reshape(logits.shape[0], logits.shape[1])
    )


FITTING = {
    "confidence": methods.confidence,
    "entropy": methods.entropy_weighted,
    "entropy, small scale": partial(methods.entropy_weighted, scale=1e-3),
    "vote": methods.vote,
    "consensus": methods.consensus,
    "consensus, label only": partial(methods.consensus, diversity=0.0),
    "certainty": methods.certainty,
    "best teacher": unlabelled,
    "best teacher, soft": partial(unlabelled, soft=True),
}
ALL = FITTING | {"certainty": certain}


@pytest.mark.parametrize("name", FITTING)
def test_every_rule_keeps_its_promises(name):
    check_rule(FITTING[name])


@pytest.mark.parametrize("name", ALL)
def test_an_unanswered_row_is_nan_and_silence_has_no_say_whatever_it_holds(name):
    logits, weights = random_case(1)
    weights[1, 3] = weights[:, 5] = 0.0
    quiet = logits.copy()
    quiet[1, 3] = quiet[:, 5] = np.nan
    found = ALL[name](quiet, weights)
    assert np.isnan(found[5]).all()
    assert np.isfinite(np.delete(found, 5, axis=0)).all()
    np.testing.assert_array_equal(found, ALL[name](logits, weights))
    without = ALL[name](np.delete(logits, 1, axis=0)[:, 3:4], np.delete(weights, 1, axis=0)[:, 3:4])
    if name != "certainty":  # whose made-up familiarity hangs on the shape
        np.testing.assert_allclose(found[3:4], without, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_weights_are_shares(name):
    logits, weights = random_case(2)
    np.testing.assert_allclose(
        ALL[name](logits, 8 * weights), ALL[name](logits, weights), atol=1e-12
    )
    assert ALL[name](logits[:, :0], weights[:, :0]).shape == (0, 4)


# --- weights by row ------------------------------------------------------------------------------


def test_confidence_by_hand():
    # Top probabilities .5 and .5, then .8 and .6: shares 1:1 and 4:3.
    expected = [[0.375, 0.375, 0.25], [3.8 / 7, 1 / 7, 2.2 / 7]]
    np.testing.assert_allclose(methods.confidence(LOGITS, EQUAL), expected)
    # Three times the second: 1:3 and 4:9.
    expected = [[0.3125, 0.4375, 0.25], [5 / 13, 2.2 / 13, 5.8 / 13]]
    np.testing.assert_allclose(methods.confidence(LOGITS, np.array([1.0, 3.0])), expected)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        # Entropies 0 and ln 3, then ln 2 and ln 3: weights 1 : 1/3 and 1/2 : 1/3.
        (1.0, [[10 / 12, 1 / 12, 1 / 12], [13 / 30, 13 / 30, 4 / 30]]),
        # Halved scale squares them: 1 : 1/9 and 1/4 : 1/9.
        (0.5, [[28 / 30, 1 / 30, 1 / 30], [35 / 78, 35 / 78, 8 / 78]]),
    ],
)
def test_entropy_by_hand(scale, expected):
    logits = np.array([[[0, -1e3, -1e3], [0, 0, -1e3]], [[0.0, 0, 0], [0, 0, 0]]])
    found = methods.entropy_weighted(logits, EQUAL, scale=scale)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_large_scale_of_entropy_is_the_mean_and_a_tiny_one_the_surest():
    logits, weights = random_case(3)
    mean = methods.entropy_weighted(logits, weights, scale=1e12)
    np.testing.assert_allclose(mean, rules.mean(logits, weights), atol=1e-9)
    surest = methods.entropy_weighted(logits, weights, scale=1e-9)
    np.testing.assert_allclose(surest, unlabelled(logits, weights), atol=1e-12)


def test_certainty_by_hand():
    # Ratios 3 and 1/3 are scores 3/4 and 1/4; the second row has 1/2 and 1/2.
    first = [2**-1.25, 2**-1.75, 2**-2]
    second = [0.4, math.sqrt(0.02), math.sqrt(0.06)]
    expected = [np.divide(first, sum(first)), np.divide(second, sum(second))]
    found = methods.certainty(LOGITS, EQUAL, familiarity=FAMILIARITY)
    np.testing.assert_allclose(found, expected)
    # Weights 1 and 3 make the first row even.
    first = [math.sqrt(0.125), math.sqrt(0.125), 0.25]
    found = methods.certainty(LOGITS, np.array([1.0, 3.0]), familiarity=FAMILIARITY)
    np.testing.assert_allclose(found[0], np.divide(first, sum(first)))


def test_certainty_is_bounded_and_even_certainty_is_the_geometric_mean():
    claims = [np.array([[limit, -limit], [-limit, limit]]) for limit in (8.0, 1e9)]
    found = [methods.certainty(LOGITS, EQUAL, familiarity=claim) for claim in claims]
    np.testing.assert_array_equal(*found)
    even = methods.certainty(LOGITS, EQUAL, familiarity=np.full((2, 2), -3.0))
    np.testing.assert_allclose(even, rules.mean_logits(LOGITS, EQUAL))


# --- vote ----------------------------------------------------------------------------------------


def test_vote_by_hand():
    # Labels 0, 1, 1 and 0, 2, 1; then the second client alone outweighs both others.
    logits = np.log([*[A, B], [[0.2, 0.6, 0.2], [0.1, 0.7, 0.2]]])
    found = methods.vote(logits, np.ones(3))
    np.testing.assert_array_equal(found[0], [0, 1, 0])
    np.testing.assert_array_equal(
        methods.vote(logits, np.array([1.0, 3.0, 1.0])), [[0, 1, 0], [0, 0, 1]]
    )
    # One abstains, and the other decides.
    by_row = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(methods.vote(logits, by_row), [[1, 0, 0], [0, 0, 1]])


def test_equal_votes_go_to_the_likelier_class_and_of_equal_labels_to_the_lowest():
    # Votes 0 and 2 on both rows; mean probabilities .5, .15, .35 and .3, .25, .45.
    logits = np.log([[A[1], [0.4, 0.3, 0.3]], [B[1], [0.2, 0.2, 0.6]]])
    np.testing.assert_array_equal(methods.vote(logits, EQUAL), [[1, 0, 0], [0, 0, 1]])
    # 0.1 + 0.2 against 0.3 in any order of summing.
    labels = np.log(np.maximum(np.eye(3)[[[2], [2], [1]]], 1e-12))
    weights = np.array([0.1, 0.2, 0.3])
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        np.testing.assert_array_equal(methods.vote(labels[order], weights[order]), [[0, 1, 0]])


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_votes_of_labels_equal_the_naive_count(seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, size=(5, 6))
    logits = np.log(np.maximum(np.eye(3)[labels], 1e-12))
    expected = [np.bincount(labels[:, row], minlength=3).argmax() for row in range(6)]
    np.testing.assert_array_equal(methods.vote(logits, np.ones(5)), np.eye(3)[expected])


# --- consensus -----------------------------------------------------------------------------------

# Variances 2, 2/3 and 2/3, so shares 3:1:1; weighted sums (1.2, -.2, -1) and (-.4, -.4, .8).
TERNARY = np.array(
    [
        [[2.0, -1.0, -1.0], [-1.0, -1.0, 2.0]],
        [[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0]],
        [[0.0, 1.0, -1.0], [0.0, -1.0, 1.0]],
    ]
)


def test_consensus_by_hand():
    # The second and third disagree on row 0: d = softmax(0, 1, -1) = (.244728, .665241, .090031).
    found = methods.consensus(TERNARY, np.ones(3), diversity=0.2)
    expected = [[1.0489457 / 1.2, 0.1330482 / 1.2, 0.0180061 / 1.2], [0, 0, 1]]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    # A constant per row and client, and a sum of one half, change nothing.
    shifted = TERNARY + np.array([[[3.0], [-2.0]], [[0.0], [1.0]], [[5.0], [9.0]]])
    np.testing.assert_allclose(methods.consensus(shifted, np.full(3, 0.5)), expected, atol=1e-7)


def test_variance_outvotes_heads_and_weights_outvote_variance():
    label = partial(methods.consensus, diversity=0.0)
    np.testing.assert_array_equal(label(TERNARY, np.ones(3))[0], [1, 0, 0])
    np.testing.assert_array_equal(label(TERNARY, np.array([1.0, 9.0, 9.0]))[0], [0, 1, 0])


def test_dissenters_are_weighed_by_variance():
    # Shares 6:3:1 from variances 8, 2 times 2 and 4/3 (= 2/3 times 2); the others say 1 and 2.
    logits = np.array([[[4.0, -2.0, -2.0]], [[-1.0, 2.0, -1.0]], [[-1.0, 0.0, 1.0]]])
    weights = np.array([1.0, 2.0, 2.0])
    found = methods.consensus(logits, weights, diversity=0.5)
    d = 0.75 * rules.softmax(logits[1]) + 0.25 * rules.softmax(logits[2])
    np.testing.assert_allclose(found, (np.array([[1, 0, 0]]) + 0.5 * d) / 1.5)


def test_uniform_clients_agree_with_anything():
    flat = np.zeros((2, 1, 3))
    np.testing.assert_array_equal(methods.consensus(flat, EQUAL), [[1, 0, 0]])
    mixed = np.array([[[0.0, 0.0, 0.0]], [[0.0, 0.0, 3.0]], [[0.0, 2.0, 2.0]]])
    np.testing.assert_array_equal(methods.consensus(mixed, np.ones(3)), [[0, 0, 1]])


@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
@settings(max_examples=25, deadline=None)
def test_the_gradient_of_one_target_is_that_of_label_and_diversity(seed, diversity):
    logits, weights = random_case(seed, clients=4, rows=5, classes=3)
    targets = torch.tensor(methods.consensus(logits, weights, diversity=diversity))
    scores = torch.tensor(np.random.default_rng(seed).normal(size=(5, 3)), requires_grad=True)
    log_p = scores.log_softmax(dim=1)
    for row in range(5):
        logs = rules.log_softmax(logits[:, row])
        share = weights[:, row] * logs.var(axis=1)
        label = int((share[:, None] * (logs - logs.mean(axis=1, keepdims=True))).sum(0).argmax())
        against = logs.argmax(axis=1) != label
        loss, factor = -log_p[row, label], 1.0
        if against.any():
            d = np.average(np.exp(logs[against]), axis=0, weights=share[against])
            target = torch.tensor(d)
            loss = loss + diversity * (target * (target.log() - log_p[row])).sum()
            factor = 1 + diversity
        (wanted,) = torch.autograd.grad(loss, scores, retain_graph=True)
        one = factor * -(targets[row] * log_p[row]).sum()
        (found,) = torch.autograd.grad(one, scores, retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# --- best teacher --------------------------------------------------------------------------------


def test_best_teacher_by_hand():
    # Class 1 of row 0 has .25 and .5; row 1 is unknown, and .8 .1 .1 is surer than .2 .2 .6.
    found = methods.best_teacher(LOGITS, EQUAL, anchors=np.array([1, -1]))
    np.testing.assert_allclose(found, [B[0], A[1]])
    # The label, not confidence, decides where it is known; equal losses teach together.
    found = methods.best_teacher(LOGITS, EQUAL, anchors=np.array([2, 2]))
    np.testing.assert_allclose(found, [[0.375, 0.375, 0.25], B[1]])
    found = methods.best_teacher(LOGITS, np.array([1.0, 3.0]), anchors=np.array([2, 2]))
    np.testing.assert_allclose(found, [[0.3125, 0.4375, 0.25], B[1]])


def test_best_teacher_softly_by_hand():
    # exp(-CE) is the probability of the label: weights e^.25 and e^.5, the second's share .562177;
    # on the second row e^.1 and e^.2, the second's share .524979.
    found = methods.best_teacher(LOGITS, EQUAL, anchors=np.array([1, 1]), soft=True)
    first = [0.359456, 0.390544, 0.25]
    second = [0.8 - 0.6 * 0.524979, 0.1 + 0.1 * 0.524979, 0.1 + 0.5 * 0.524979]
    np.testing.assert_allclose(found, [first, second], atol=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_best_teacher_equals_the_naive_loop_and_follows_renamed_classes(seed):
    logits, weights = random_case(seed)
    anchors = np.random.default_rng(seed).integers(-1, 4, size=8)
    probs = rules.softmax(logits)
    expected = []
    for row, label in enumerate(anchors):
        cost = [
            -np.log(p[row, label]) if label >= 0 else -(p[row] * np.log(p[row])).sum()
            for p in probs
        ]
        expected.append(probs[int(np.argmin(cost)), row])
    found = methods.best_teacher(logits, weights, anchors=anchors)
    np.testing.assert_allclose(found, expected)
    order = np.array([2, 3, 1, 0])
    renamed = np.where(anchors >= 0, np.argsort(order)[anchors], -1)
    for soft in (False, True):
        usual = methods.best_teacher(logits, weights, anchors=anchors, soft=soft)
        other = methods.best_teacher(logits[:, :, order], weights, anchors=renamed, soft=soft)
        np.testing.assert_allclose(other, usual[:, order], atol=1e-12)
        turned = methods.best_teacher(logits[::-1], weights[::-1], anchors=anchors, soft=soft)
        np.testing.assert_allclose(turned, usual, atol=1e-12)


def test_the_best_teacher_without_weight_is_not_asked():
    found = methods.best_teacher(LOGITS, np.array([1.0, 0.0]), anchors=np.array([1, 2]))
    np.testing.assert_allclose(found, A)


# --- after the rule ------------------------------------------------------------------------------


def test_keep_clear_by_hand():
    # Distances to the nearest one-hot: .5, 1, 4/3.
    targets = np.array([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    before = targets.copy()
    gone = {
        limit: np.isnan(methods.keep_clear(targets, limit)).all(axis=1).tolist()
        for limit in (0.5, 0.51, 1.0, 1.01, 2.0, np.inf)
    }
    assert gone == {
        0.5: [True, True, True],
        0.51: [False, True, True],
        1.0: [False, True, True],
        1.01: [False, False, True],
        2.0: [False, False, False],
        np.inf: [False, False, False],
    }
    np.testing.assert_array_equal(methods.keep_clear(targets, 2.0), before)
    np.testing.assert_array_equal(targets, before)


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_two_keeps_even_flat_rows_and_nan_stays_nan(classes):
    targets = np.array([np.full(classes, 1 / classes), np.full(classes, np.nan)])
    np.testing.assert_array_equal(methods.keep_clear(targets, 2.0), targets)


def test_the_distance_is_the_l1_distance_to_the_nearest_one_hot():
    probs = rules.softmax(random_case(4)[0][0])
    distance = np.abs(probs - np.eye(4)[probs.argmax(axis=1)]).sum(axis=1)
    kept = ~np.isnan(methods.keep_clear(probs, 0.8)).any(axis=1)
    np.testing.assert_array_equal(kept, distance < 0.8)
    assert 0 < kept.sum() < len(kept)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (partial(methods.confidence, LOGITS[0], EQUAL), "logits must be"),
        (partial(methods.vote, LOGITS, np.ones(3)), "weights must be"),
        (partial(methods.entropy_weighted, LOGITS, EQUAL, scale=0.0), "above 0, found 0.0"),
        (partial(methods.entropy_weighted, LOGITS, EQUAL, scale=np.nan), "above 0, found nan"),
        (partial(methods.consensus, LOGITS, EQUAL, diversity=-0.1), "from 0, found -0.1"),
        (partial(methods.consensus, LOGITS, EQUAL, diversity=np.inf), "from 0, found inf"),
        (
            partial(methods.certainty, LOGITS, EQUAL, familiarity=np.zeros(2)),
            r"\[clients, rows\] = \[2, 2\], found \[2\]",
        ),
        (
            partial(methods.best_teacher, LOGITS, EQUAL, anchors=UNKNOWN[:1]),
            r"\[rows\] = \[2\], found int64 \[1\]",
        ),
        (partial(methods.best_teacher, LOGITS, EQUAL, anchors=np.zeros(2)), "found float64"),
        (
            partial(methods.best_teacher, LOGITS, EQUAL, anchors=np.array([3, 0])),
            "a class from 0 to 2, found 0 to 3",
        ),
        (partial(methods.best_teacher, LOGITS, EQUAL, anchors=UNKNOWN - 1), "found -2 to -2"),
        (partial(methods.keep_clear, np.array(A), 0.0), "above 0, found 0.0: 2.0 keeps every"),
        (partial(methods.keep_clear, np.array(A), np.nan), "above 0, found nan"),
        (partial(methods.keep_clear, LOGITS, 1.0), r"\[rows, classes\], found \[2, 2, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, text):
    with pytest.raises(FedistillError, match=text):
        call()
