"""Lower bounds on epsilon: published figures, hand cases, and coverage by simulation."""

import math

import numpy as np
import pytest

from fedistill.privacy.bounds import (
    auc,
    best_rates_epsilon,
    clopper_pearson,
    one_run,
    one_run_epsilon,
    one_run_p_value,
    rates_epsilon,
    roc,
    tpr_at,
)


@pytest.mark.parametrize(
    ("made", "beta", "expected"),
    [
        (200, 0.05, 4.19),
        (400, 0.05, 4.89),
        (1000, 0.05, 5.81),
        (2000, 0.05, 6.50),
        (9000, 0.05, 8.01),
        (200, 0.05 / 7, 3.69),
        (1000, 0.05 / 7, 5.31),
        (2000, 0.05 / 7, 6.00),
    ],
)
def test_ceilings_are_those_of_the_closed_form(made, beta, expected):
    found = one_run_epsilon(made, made, canaries=made, beta=beta)
    root = beta ** (1 / made)
    assert found == pytest.approx(math.log(root / (1 - root)), abs=1e-6)
    assert found == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("canaries", "made", "right", "delta", "expected"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_figures_printed_in_the_paper(canaries, made, right, delta, expected):
    found = one_run_epsilon(made, right, canaries=canaries, delta=delta, beta=0.05)
    assert found == pytest.approx(expected, abs=1.1e-3)


def test_p_value_by_hand():
    # epsilon = ln 3: a guess is right with probability 3/4. Two of two: 9/16.
    assert one_run_p_value(2, 2, math.log(3), canaries=2) == pytest.approx(9 / 16)
    # Slack: 2 canaries x 0.01 x the smaller of 1/4 and 2 x max(P[W=1] / 1, P[W<2] / 2) = 3/4.
    assert one_run_p_value(2, 2, math.log(3), canaries=2, delta=0.01) == pytest.approx(
        9 / 16 + 0.02 / 4
    )
    assert one_run_p_value(5, 0, 1.0, canaries=5, delta=0.1) == 1.0


def test_delta_lowers_the_bound_and_no_guess_refutes_nothing():
    bounds = [one_run_epsilon(500, 400, canaries=1000, delta=d) for d in (0.0, 1e-5, 1e-4, 1e-3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 1.1 > bounds[-1] >= 0
    assert one_run_epsilon(0, 0, canaries=1000) == 0.0
    assert one_run_epsilon(1000, 500, canaries=1000) == 0.0


def test_clopper_pearson_by_hand():
    # No hit in n: the upper bound is 1 - beta^(1/n); n hits in n: the lower one is beta^(1/n).
    assert clopper_pearson(0, 10, 0.05) == (0.0, pytest.approx(1 - 0.05**0.1))
    assert clopper_pearson(10, 10, 0.05) == (pytest.approx(0.05**0.1), 1.0)
    low, high = clopper_pearson(5, 10, 0.025)
    assert (low, high) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))


def test_rates_by_hand():
    # All 100 inside caught, no false alarm among 100: TPR >= r, FPR <= 1 - r, r = 0.025^(1/100).
    r = 0.025**0.01
    expected = math.log((r - 1e-5) / (1 - r))
    assert rates_epsilon(100, 100, 0, 100, delta=1e-5) == pytest.approx(expected)
    # The other side: the false negative rate is what is small.
    assert rates_epsilon(100, 100, 50, 100) == pytest.approx(
        math.log((1 - clopper_pearson(50, 100, 0.025)[1]) / (1 - r))
    )
    assert rates_epsilon(50, 100, 50, 100) == 0.0
    assert rates_epsilon(0, 0, 0, 10) == 0.0


def randomised_response(rng, epsilon, canaries):
    """Scores that are the coins, each flipped with probability 1 / (1 + exp(epsilon))."""
    coins = rng.random(canaries) < 0.5
    kept = rng.random(canaries) < 1 / (1 + math.exp(-epsilon))
    return np.where(kept, coins, ~coins) + 1e-6 * rng.random(canaries), coins


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
@pytest.mark.parametrize("bound", ["one run", "rates"])
def test_randomised_response_is_bounded_from_below_in_95_of_100_draws(epsilon, bound):
    rng = np.random.default_rng(3)
    found = []
    for _ in range(200):
        scores, coins = randomised_response(rng, epsilon, 400)
        if bound == "one run":
            found.append(one_run(scores, coins).epsilon)
        else:
            found.append(best_rates_epsilon(scores, coins))
    above = np.mean(np.array(found) > epsilon)
    # Binomial with 200 draws at 5 %: more than 9 % would happen once in 100 tries.
    assert above <= 0.09
    assert np.median(found) > {"one run": 0.4, "rates": 0.1}[bound] * epsilon


def test_many_canaries_come_near_the_true_epsilon():
    scores, coins = randomised_response(np.random.default_rng(5), 1.5, 200_000)
    found = one_run(scores, coins)
    assert 1.45 < found.epsilon <= 1.5
    assert found.ceiling > 9
    assert 1.4 < best_rates_epsilon(scores, coins) <= 1.5


def test_delta_of_a_mechanism_that_gives_itself_away_is_covered():
    # With probability delta a canary's coin is told, else it is a fair guess: (0, delta)-DP.
    rng = np.random.default_rng(7)
    above = 0
    for _ in range(200):
        coins = rng.random(1000) < 0.5
        told = rng.random(1000) < 1e-2
        scores = np.where(told, np.where(coins, 2.0, -2.0), rng.random(1000) - 0.5)
        assert one_run(scores, coins, delta=0.0, shares=(0.01,)).epsilon >= 0
        above += one_run(scores, coins, delta=1e-2).epsilon > 0
    assert above <= 18


def test_scores_without_information_give_nothing():
    rng = np.random.default_rng(11)
    scores, coins = rng.random(1000), rng.random(1000) < 0.5
    assert one_run(scores, coins, delta=1e-5).epsilon == 0.0
    assert best_rates_epsilon(scores, coins, delta=1e-5) == 0.0
    assert 0.44 < auc(scores, coins) < 0.56


def test_perfect_scores_reach_the_ceiling():
    coins = np.arange(1000) % 2 == 0
    found = one_run(coins.astype(float), coins, delta=1e-5)
    assert found.epsilon == found.ceiling > 5.2
    assert (found.made, found.right) == (1000, 1000)
    assert auc(coins.astype(float), coins) == 1.0
    assert tpr_at(coins.astype(float), coins) == 1.0


def test_curve_of_rates_by_hand():
    scores = np.array([4.0, 3.0, 2.0, 2.0, 1.0])
    coins = np.array([True, False, True, False, False])
    false, true = roc(scores, coins)
    assert false.tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert true.tolist() == pytest.approx([0, 0.5, 0.5, 1, 1])
    # In-out pairs: (4; 3, 2, 1) all won; (2; 3) lost, (2; 2) tied, (2; 1) won.
    assert auc(scores, coins) == pytest.approx(4.5 / 6)
    assert tpr_at(scores, coins) == 0.5
    assert auc(scores, np.zeros(5, dtype=bool)) == 0.5
