"""Noise on the mean: the bound by brute force, the figures, the projection."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedistill.aggregate.rules import combine, takes
from fedistill.errors import FedistillError
from fedistill.privacy.accounting import epsilon
from fedistill.privacy.central import (
    MIN_CLIENTS,
    RELATION,
    CentralNoise,
    NoisyMean,
    cost,
    describe,
    noise_std,
    noisy_mean,
    project_to_simplex,
    sensitivity,
)
from fedistill.privacy.events import Gaussian, Spending


def said(clients: int, rows: int = 6, classes: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), (clients, rows))


@pytest.mark.parametrize(("clients", "expected"), [(10, 5.28), (1000, 0.0528)])
def test_figures_of_the_noise(clients, expected):
    assert noise_std(clients, 100, 3.731) == pytest.approx(expected, rel=1e-3)


def test_no_client_moves_the_mean_further_than_is_reckoned_with():
    probs = said(100)
    mean = probs.mean(axis=0)
    for client in range(100):
        for label in range(3):
            other = probs.copy()
            other[client] = np.eye(3)[label]
            assert np.linalg.norm(other.mean(axis=0) - mean) <= sensitivity(100, 6)


def test_opposite_certainties_move_it_exactly_so_far():
    probs = said(100)
    probs[7] = [1, 0, 0]
    other = probs.copy()
    other[7] = [0, 1, 0]
    moved = np.linalg.norm(other.mean(axis=0) - probs.mean(axis=0))
    assert moved == pytest.approx(sensitivity(100, 6))


def test_one_gaussian_a_round():
    assert cost(3.731) == Spending.of(Gaussian(3.731))
    assert cost(3.731, 4) == Spending.of(Gaussian(3.731), 4)
    assert epsilon(cost(3.731), 1e-5) == pytest.approx(1.0, rel=5e-3)
    # Four rounds at twice the noise are one round.
    assert epsilon(cost(2 * 3.731, 4), 1e-5) == pytest.approx(1.0, rel=5e-3)
    assert RELATION == "replace-one"


def test_without_noise_it_is_the_mean():
    probs = said(120)
    assert noisy_mean(probs, 0.0) == pytest.approx(probs.mean(axis=0))


def test_noise_has_the_size_that_is_told():
    # Three classes of equal mean: small noise leaves the simplex nowhere, so its size is kept but
    # for the shift that makes rows sum to 1, which takes one of three directions.
    probs = np.full((200, 4000, 3), 1 / 3)
    sigma = 0.05 / sensitivity(200, 4000)
    found = noisy_mean(probs, sigma, np.random.default_rng(3)) - 1 / 3
    assert found.std() == pytest.approx(0.05 * math.sqrt(2 / 3), rel=0.03)


def test_noise_is_new_every_time():
    rule = NoisyMean(1.0)
    logits = np.log(said(100))
    assert not np.array_equal(rule(logits, np.ones(100)), rule(logits, np.ones(100)))


@pytest.mark.parametrize("clients", [1, 3, MIN_CLIENTS - 1])
def test_few_clients_are_refused(clients):
    with pytest.raises(FedistillError, match=f"at least 100 clients, found {clients}"):
        noisy_mean(said(clients), 1.0)


@pytest.mark.parametrize("value", [np.nan, -0.5, 2.0])
def test_rows_that_are_no_probabilities_are_refused(value):
    probs = said(100)
    probs[3, 2, 1] = value
    with pytest.raises(FedistillError, match="sum to 1"):
        noisy_mean(probs, 1.0)


def test_a_table_of_one_client_is_refused():
    with pytest.raises(FedistillError, match=r"\[clients, rows, classes\]"):
        noisy_mean(said(1)[0], 1.0)


def test_no_rows_are_no_targets():
    assert noisy_mean(said(100, rows=0), 1.0).shape == (0, 3)


def test_as_a_rule_every_client_counts_alike():
    logits = np.log(said(100))
    found = combine(NoisyMean(0.0), logits, np.arange(100.0))
    assert found == pytest.approx(said(100).mean(axis=0))
    assert not takes(NoisyMean(1.0))


def test_a_mean_has_to_be_paid_for_each_time():
    names = [f"site-{number}" for number in range(100)]
    rule, logits = CentralNoise(names), np.log(said(100))
    assert isinstance(rule.units(rule.members)[0], bytes)
    assert len(set(rule.units(rule.members))) == 100
    with pytest.raises(FedistillError, match="charge it"):
        rule(logits, np.ones(100))
    assert rule.quote(rule.members, np.arange(6))(2.0) == cost(2.0)
    rule.allow(2.0)
    assert rule(logits, np.ones(100)).shape == (6, 3)
    with pytest.raises(FedistillError, match="charge it"):
        rule(logits, np.ones(100))


def test_few_members_are_refused_before_anything_is_asked():
    with pytest.raises(FedistillError, match="at least 100"):
        CentralNoise(["a", "b", "c"])


def test_describe_tells_the_noise():
    assert "0.053" in describe(1000, 100, 3.731)
    assert "1000 clients" in describe(1000, 100, 3.731)
    assert "learn little" in describe(100, 100, 3.731)


# --- the projection ------------------------------------------------------------------------------

TABLES = arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    elements=st.floats(-50, 50, allow_subnormal=False),
)


def test_projections_by_hand():
    rows = np.array([[0.2, 0.3, 0.5], [1.5, 0.0, 0.0], [0.6, 0.6, -1.0], [5.0, 5.0, 5.0]])
    expected = [[0.2, 0.3, 0.5], [1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]
    assert project_to_simplex(rows) == pytest.approx(np.array(expected))


@given(TABLES)
def test_the_projection_is_on_the_simplex_and_stays_there(values):
    probs = project_to_simplex(values)
    assert (probs >= 0).all()
    assert probs.sum(axis=1) == pytest.approx(1.0)
    assert project_to_simplex(probs) == pytest.approx(probs, abs=1e-9)


@given(TABLES, st.integers(0, 1000))
def test_no_other_probabilities_are_nearer(values, seed):
    near = project_to_simplex(values)
    other = np.random.default_rng(seed).dirichlet(np.ones(values.shape[1]), len(values))
    for rival in (other, 0.99 * near + 0.01 * other):
        distance = np.linalg.norm(values - rival, axis=1)
        assert (np.linalg.norm(values - near, axis=1) <= distance + 1e-9).all()


@given(TABLES, st.floats(-20, 20))
def test_a_shift_of_a_row_changes_nothing_and_order_is_kept(values, shift):
    assert project_to_simplex(values + shift) == pytest.approx(project_to_simplex(values), abs=1e-9)
    order = np.argsort(values, axis=1)
    assert (np.diff(np.take_along_axis(project_to_simplex(values), order, axis=1)) >= -1e-12).all()


def test_large_values_are_no_trouble():
    assert project_to_simplex(np.array([[1e15, 0.0]])).tolist() == [[1.0, 0.0]]
