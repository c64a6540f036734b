"""Several targets a row: k-means by hand, against a naive loop, and without an order of clients."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.aggregate import rules
from fedistill.aggregate.clusters import clusters, nearest
from fedistill.errors import FedistillError
from fedistill.testing import check_rule

# Row 0 has two camps, row 1 one.
PROBS = np.array(
    [
        [[0.8, 0.1, 0.1], [0.5, 0.25, 0.25]],
        [[0.6, 0.3, 0.1], [0.5, 0.25, 0.25]],
        [[0.1, 0.1, 0.8], [0.5, 0.25, 0.25]],
    ]
)
LOGITS = np.log(PROBS)


def random_case(seed, clients=6, rows=5, classes=4):
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(clients, rows, classes))
    weights = random.uniform(0.2, 2.0, size=(clients, rows))
    weights[random.random((clients, rows)) < 0.2] = 0.0
    return logits, weights


def naive(logits, weights, centroids):
    """One row after another, one client after another."""
    count = min(centroids, max(1, (weights > 0).sum(axis=0).max()))
    probs = rules.softmax(logits)
    table = []
    for row in range(logits.shape[1]):
        voices = [(p, w) for p, w in zip(probs[:, row], weights[:, row], strict=True) if w > 0]
        if not voices:
            table.append(np.full((count, logits.shape[2]), np.nan))
            continue
        mean = sum(w * p for p, w in voices) / sum(w for _, w in voices)
        centres = []
        for _ in range(count):
            others = centres or [mean]
            gaps = [w * min(((p - c) ** 2).sum() for c in others) for p, w in voices]
            centres.append(voices[int(np.argmax(gaps))][0])
        sides = None
        while True:
            again = [int(np.argmin([((p - c) ** 2).sum() for c in centres])) for p, _ in voices]
            if again == sides:
                break
            sides = again
            for j in range(count):
                mine = [v for v, side in zip(voices, sides, strict=True) if side == j]
                if mine:
                    centres[j] = sum(w * p for p, w in mine) / sum(w for _, w in mine)
        behind = [
            sum(w for (_, w), side in zip(voices, sides, strict=True) if side == j)
            for j in range(count)
        ]
        best = int(np.argmax(behind))
        centres = [c if b > 0 else centres[best] for c, b in zip(centres, behind, strict=True)]
        table.append([centres[j] for j in np.argsort([-b for b in behind], kind="stable")])
    return np.array(table)


def test_by_hand():
    found = clusters(LOGITS, np.ones(3))
    expected = [[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], [[0.5, 0.25, 0.25]] * 2]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_weights_by_hand():
    # The first camp's mean by 3 : 1; with 5 the lone voice comes first.
    found = clusters(LOGITS, np.array([3.0, 1.0, 2.0]))
    np.testing.assert_allclose(found[0], [[0.75, 0.15, 0.1], [0.1, 0.1, 0.8]])
    found = clusters(LOGITS, np.array([3.0, 1.0, 5.0]))
    np.testing.assert_allclose(found[0], [[0.1, 0.1, 0.8], [0.75, 0.15, 0.1]])


def test_a_tie_of_weights_is_ordered_by_content():
    found = clusters(LOGITS[[2, 0]], np.ones(2))
    np.testing.assert_allclose(found[0], [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (3, 3), (4, 3), (50, 3)])
def test_no_more_centres_than_clients(asked, given):
    assert clusters(LOGITS, np.ones(3), centroids=asked).shape == (2, given, 3)


def test_centres_are_counted_by_those_who_answered():
    assert clusters(LOGITS, np.array([1.0, 0.0, 0.0])).shape == (2, 1, 3)
    by_row = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(clusters(LOGITS, by_row)[:, 0], [PROBS[0, 0], PROBS[2, 1]])
    nobody = clusters(LOGITS, np.zeros(3))
    assert nobody.shape == (2, 1, 3)
    assert np.isnan(nobody).all()


def test_a_row_with_one_answer_repeats_it_beside_a_row_with_more():
    weights = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    found = clusters(LOGITS, weights)
    np.testing.assert_allclose(found[0], [PROBS[0, 0], PROBS[1, 0]])
    np.testing.assert_allclose(found[1], [PROBS[0, 1]] * 2)


def test_an_unanswered_row_is_nan_and_silence_is_not_read():
    weights = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    quiet = LOGITS.copy()
    quiet[:, 0] = quiet[2] = np.nan
    found = clusters(quiet, weights)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], [[0.5, 0.25, 0.25]] * 2)


def test_one_centre_is_the_mean():
    logits, weights = random_case(0)
    found = clusters(logits, weights, centroids=1)[:, 0]
    np.testing.assert_allclose(found, rules.mean(logits, weights))
    check_rule(lambda z, w: clusters(z, w, centroids=1)[:, 0])


@pytest.mark.parametrize("number", [0, 1])
def test_each_centre_keeps_the_promises_of_a_rule(number):
    """With the checker's three clients two centres never weigh alike, so names decide nothing."""

    def centre(logits, weights):
        found = clusters(logits, weights)
        return found[:, min(number, found.shape[1] - 1)]

    check_rule(centre)


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_all_rows_at_once_equal_the_naive_loop(seed, centroids):
    logits, weights = random_case(seed)
    found = clusters(logits, weights, centroids=centroids)
    np.testing.assert_allclose(found, naive(logits, weights, centroids), atol=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_order_of_clients_does_not_matter_to_the_last_bit(seed, centroids):
    random = np.random.default_rng(seed)
    logits, weights = random_case(seed)
    logits = logits.round()  # many ties
    order = random.permutation(len(logits))
    np.testing.assert_array_equal(
        clusters(logits[order], weights[order], centroids=centroids),
        clusters(logits, weights, centroids=centroids),
    )


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_centres_are_the_means_of_those_nearest_to_them(seed):
    """What k-means ends in; and together, by weight, the centres are the plain mean."""
    logits, weights = random_case(seed)
    weights[0] = 1.0
    found = clusters(logits, weights, centroids=3)
    probs = rules.softmax(logits)
    share = weights / weights.sum(axis=0)
    for row in range(logits.shape[1]):
        centres = np.unique(found[row].round(12), axis=0)
        gaps = ((probs[:, row, None] - centres) ** 2).sum(axis=2)
        side = gaps.argmin(axis=1)
        for j, centre in enumerate(centres):
            mine = (side == j) & (share[:, row] > 0)
            assert mine.any()
            mean = np.average(probs[mine, row], axis=0, weights=share[mine, row])
            np.testing.assert_allclose(centre, mean, atol=1e-9)


def test_separate_camps_are_found_exactly():
    random = np.random.default_rng(5)
    camps = np.array([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    sizes = [5, 3, 2]
    members = np.repeat(np.arange(3), sizes)
    noise = random.uniform(-0.02, 0.02, size=(10, 20, 1)) * np.array([1.0, -1.0, 0.0])
    probs = camps[members][:, None] + noise
    order = random.permutation(10)
    found = clusters(np.log(probs[order]), np.ones(10), centroids=3)
    expected = np.stack([probs[members == camp].mean(axis=0) for camp in range(3)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-12)


# --- the client's choice -------------------------------------------------------------------------


def test_nearest_by_hand():
    choices = np.array(
        [
            [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]],
            [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]],
        ]
    )
    own = np.array([[0.3, 0.1, 0.6], [0.375, 0.375, 0.25]])
    # Squared distances .42 and .08; then a tie.
    np.testing.assert_array_equal(nearest(choices, own), [[0.1, 0.1, 0.8], [0.5, 0.25, 0.25]])
    assert nearest(choices.astype(np.float32), own).dtype == np.float32


def test_a_row_without_choices_stays_nan():
    choices = np.full((2, 2, 3), np.nan)
    choices[1] = PROBS[:2, 1]
    found = nearest(choices, PROBS[0])
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1], PROBS[0, 1])
    assert nearest(choices[:0], PROBS[0, :0]).shape == (0, 3)


def test_each_client_is_given_the_centre_of_its_own_camp():
    found = clusters(LOGITS, np.ones(3))
    for client, centre in enumerate([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]):
        np.testing.assert_allclose(nearest(found, PROBS[client])[0], centre)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (partial(clusters, LOGITS, np.ones(3), centroids=0), "at least 1, found 0"),
        (partial(clusters, LOGITS[0], np.ones(3)), "logits must be"),
        (partial(clusters, LOGITS, np.ones(2)), "weights must be"),
        (partial(nearest, PROBS[0], PROBS[0]), r"found \[2, 3\] and \[2, 3\]"),
        (partial(nearest, PROBS, PROBS[0]), r"found \[3, 2, 3\] and \[2, 3\]"),
        (partial(nearest, PROBS[:, :0], PROBS[:, 0]), "at least one choice"),
    ],
)
def test_what_does_not_fit_is_refused(call, text):
    with pytest.raises(FedistillError, match=text):
        call()
