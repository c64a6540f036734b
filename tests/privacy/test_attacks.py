"""Attacks on predictions: hand cases, and models that are known to leak or not to."""

import numpy as np
import pytest

from fedistill.privacy.attacks import label_mix, log_odds, loss_scores, reference_scores
from fedistill.privacy.bounds import auc


def test_log_odds_by_hand():
    logits = np.log(np.array([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]]))
    found = log_odds(logits, np.array([2, 0]))
    assert found == pytest.approx([0.0, np.log(9)])
    # Where the probability rounds to 1 the odds are still told apart.
    sure = log_odds(np.array([[50.0, 0.0], [80.0, 0.0]]), np.array([0, 0]))
    assert sure.tolist() == [50.0, 80.0]


def test_loss_scores_are_those_of_the_last_round():
    rounds = [np.zeros((1, 2)), np.log(np.array([[0.25, 0.75]]))]
    assert loss_scores(rounds, np.array([1])) == pytest.approx([np.log(0.75)])


def test_a_reference_takes_away_what_the_canaries_did_not_cause():
    rng = np.random.default_rng(3)
    easy = rng.normal(0, 3, size=(2000, 4))
    labels, coins = rng.integers(4, size=2000), rng.random(2000) < 0.5
    moved = easy.copy()
    moved[np.arange(2000), labels] += coins
    plain = auc(log_odds(moved, labels), coins)
    assert auc(reference_scores([moved], [easy], labels), coins) > 0.99 > 0.7 > plain


def test_a_reference_that_explains_nothing_takes_nothing_away():
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(50, 4)), rng.integers(4, size=50)
    found = reference_scores([logits], [np.zeros((50, 4))], labels)
    centred = log_odds(logits, labels)
    np.testing.assert_allclose(found, centred - centred.mean())


def test_label_mix_by_hand():
    # All labels are of class 0; the mean prediction says 0.7, 0.3; geometric: 0.9 * 0.5, 0.1 * 0.5.
    probs = np.array([[0.9, 0.1], [0.5, 0.5]])
    found = label_mix(probs, np.zeros(10, int), 2)
    share = np.sqrt(0.45) / (np.sqrt(0.45) + np.sqrt(0.05))
    assert found.error == pytest.approx(1 - share)
    assert found.guess == 0.5


def test_label_mix_of_a_skewed_client_is_told_better_than_by_a_guess():
    rng = np.random.default_rng(7)
    prior = np.array([0.6, 0.3, 0.1, 0.0])
    labels = rng.choice(4, size=500, p=prior)
    logits = rng.normal(0, 2, size=(200, 4)) + np.log(prior + 1e-3)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = label_mix(probs, labels, 4)
    assert found.error < 0.2 < found.guess
