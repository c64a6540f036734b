"""Densities rank rows as the true ratio does, solve what they say they solve, and stay bounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from fedistill.aggregate.evidence import FAMILIARITY_LIMIT
from fedistill.distill.density import (
    DENSITIES,
    divide,
    kulsif,
    kulsif_weights,
    logistic,
    logistic_weights,
    sensitivity,
)
from fedistill.distill.public_features import PublicFeatures, features_of, kernel, squares
from fedistill.errors import DataError
from fedistill.types import FloatArray, ProxySet

NAMES = sorted(DENSITIES)


def normal(seed: int, rows: int, numbers: int = 2, mean: float = 0.0) -> FloatArray:
    drawn = np.random.default_rng(seed).normal(mean, 1, (rows, numbers))
    return drawn.astype(np.float32)


PUBLIC = normal(0, 400)


# --- P11: the ratio of two known densities -------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_p11_rows_are_ranked_as_the_known_ratio_ranks_them(name: str) -> None:
    own = normal(1, 400, mean=1.0)
    rows = normal(2, 500)
    density = DENSITIES[name](own, PUBLIC, seed=7)
    truth = rows.sum(axis=1) - 1  # log N(1, I) - log N(0, I) in two dimensions
    score = density.score(rows)
    assert spearmanr(score, truth).statistic > 0.93
    assert 0.5 < np.exp(density.score(PUBLIC)).mean() < 2
    assert abs(np.mean(score - truth)) < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_long_rows_are_ranked_too(name: str) -> None:
    """More numbers than components, and more numbers than public rows."""
    spread = 1 / (1 + np.arange(600)) ** 1.5
    public, rows = (normal(seed, 300, 600) * spread for seed in (0, 2))
    own = normal(1, 300, 600) * spread
    own[:, 0] += 1
    for columns in (100, 600):
        density = DENSITIES[name](own[:, :columns], public[:, :columns], seed=7)
        assert spearmanr(density.score(rows[:, :columns]), rows[:, 0]).statistic > 0.65


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 10), st.integers(0, 99))
def test_p11_the_weights_solve_the_linear_system(
    auxiliary: int, own: int, lam: float, seed: int
) -> None:
    x, y = normal(seed, auxiliary), normal(seed + 1, own)
    gram, cross = kernel(x, x), kernel(x, y).sum(axis=1)
    alpha = kulsif_weights(gram, cross, own, lam)
    left = (gram / auxiliary + lam * np.eye(auxiliary)) @ alpha
    np.testing.assert_allclose(left, -cross / (auxiliary * own * lam), atol=1e-6)


def test_a_ratio_by_hand() -> None:
    """One own row, one public row, both alike, so a kernel of 1: (1 + lam) alpha = -1 / lam."""
    found = kulsif_weights(np.ones((1, 1)), np.ones(1), 1, 0.5)
    np.testing.assert_allclose(found, [-4 / 3])
    density = kulsif(np.zeros((1, 2)), np.zeros((1, 2)), seed=1)  # lam = 1 ** -0.9
    np.testing.assert_allclose(density.score(np.zeros((1, 2))), [np.log(-1 / 2 + 1)])


def test_the_score_is_the_formula_in_plain_loops() -> None:
    own, public, rows = normal(1, 8), normal(2, 5), normal(3, 4)
    seen = PublicFeatures.fit(public)
    density = kulsif(own, seen, seed=3, exponent=-0.5)
    y, x, v = seen(divide(own, 3)[0]), seen.basis, seen(rows)
    lam = 5**-0.5

    def k(a: FloatArray, b: FloatArray) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / 2))

    gram = np.array([[k(a, b) for b in x] for a in x])
    cross = np.array([sum(k(a, b) for b in y) for a in x])
    alpha = -np.linalg.inv(gram / 5 + lam * np.eye(5)) @ cross / (5 * len(y) * lam)
    for row, score in zip(v, density.score(rows), strict=True):
        ratio = sum(w * k(row, a) for w, a in zip(alpha, x, strict=True))
        ratio += np.mean([k(row, b) for b in y]) / lam
        assert score == pytest.approx(np.clip(np.log(max(ratio, 1e-300)), -8, 8))


def test_more_rows_need_less_regularisation() -> None:
    """The sign of lambda's exponent: with it lost, all ratios of many rows are alike."""
    own, rows = normal(1, 400, mean=1.0), normal(2, 200)
    assert np.ptp(kulsif(own, PUBLIC, seed=7).score(rows)) > 2
    with pytest.raises(DataError, match=r"an exponent below 0, found 0\.5"):
        kulsif(own, PUBLIC, seed=7, exponent=0.5)


# --- P12: how far one record can move a fit ------------------------------------------------------


def neighbours(seed: int, rows: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Public rows in the unit ball, own ones, and own ones but for one that is turned round."""
    random = np.random.default_rng(seed)
    drawn = random.normal(np.eye(4)[0], 1, (2 * rows, 4))
    drawn /= np.maximum(np.linalg.norm(drawn, axis=1, keepdims=True), 1)
    other = drawn[:rows].copy()
    other[0] = -other[0] / np.linalg.norm(other[0])
    return drawn[rows:], drawn[:rows], other


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 60), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_p12_neighbouring_fits_differ_by_no_more_than_is_stated(
    seed: int, rows: int, lam: float
) -> None:
    public, own, other = neighbours(seed, rows)
    moved = logistic_weights(own, public, lam) - logistic_weights(other, public, lam)
    assert np.linalg.norm(moved) <= sensitivity(2 * rows, lam)


def test_p12_the_bound_is_reached_up_to_a_small_factor_and_a_sum_breaks_it() -> None:
    public, own, other = neighbours(1, 500)
    lam = 1.0
    moved = logistic_weights(own, public, lam) - logistic_weights(other, public, lam)
    assert np.linalg.norm(moved) > sensitivity(1000, lam) / 8
    sides = np.repeat([1, 0], 500)
    fits = [
        LogisticRegression(C=1 / lam).fit(np.vstack([rows, public]), sides).coef_
        for rows in (own, other)
    ]
    assert np.linalg.norm(fits[0] - fits[1]) > sensitivity(1000, lam)


def test_the_mean_loss_is_minimal() -> None:
    public, own, _ = neighbours(3, 30)
    weights = logistic_weights(own, public, 0.01)

    def loss(at: FloatArray) -> float:
        mean = np.logaddexp(0, -own @ at).mean() + np.logaddexp(0, public @ at).mean()
        return float(mean / 2 + 0.005 * at @ at)

    for step in 1e-3 * np.vstack([np.eye(4), -np.eye(4)]):
        assert loss(weights + step) > loss(weights)


@given(st.integers(0, 99), st.floats(0.1, 1e6))
def test_rows_are_in_the_unit_ball_whatever_they_are(seed: int, scale: float) -> None:
    seen = PublicFeatures.fit(PUBLIC[:20])
    embedded = seen.embed(seen(normal(seed, 10) * scale))
    assert (np.linalg.norm(embedded, axis=1) <= 1 + 1e-6).all()


# --- what holds for every density ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_same_rows_and_seed_give_the_same_scores(name: str) -> None:
    own = normal(1, 40, mean=0.5)
    first, again, other = (DENSITIES[name](own, PUBLIC, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.score(PUBLIC), again.score(PUBLIC))
    assert first.threshold(0.25) == again.threshold(0.25)
    assert not np.array_equal(first.score(PUBLIC), other.score(PUBLIC))
    shared = DENSITIES[name](own, features_of(ProxySet(PUBLIC)), seed=7)
    np.testing.assert_array_equal(first.score(PUBLIC), shared.score(PUBLIC))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", [0.0, 5.0, 1e6])
def test_scores_are_finite_and_limited(name: str, distance: float) -> None:
    density = DENSITIES[name](normal(1, 50, mean=distance), PUBLIC, seed=7)
    score = density.score(np.vstack([PUBLIC, 1e6 + PUBLIC[:3]]))
    assert score.dtype == np.float64
    assert np.isfinite(score).all()
    assert np.abs(score).max() <= FAMILIARITY_LIMIT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_tiny_client_has_a_density_too(name: str, rows: int) -> None:
    density = DENSITIES[name](normal(1, rows), PUBLIC, seed=7)
    score = density.score(PUBLIC)
    assert np.isfinite(score).all()
    assert len(density.held) == 1
    assert np.isfinite(density.threshold(0.25))
    assert density.score(PUBLIC[:0]).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_one_public_row_is_enough(name: str) -> None:
    assert np.isfinite(DENSITIES[name](normal(1, 20), PUBLIC[:1], seed=7).score(PUBLIC)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numbers", [3, 60])
def test_constant_features_tell_nothing(name: str, numbers: int) -> None:
    public = np.full((30, numbers), 2.0, dtype=np.float32)
    density = DENSITIES[name](public[:10], public, seed=7)
    np.testing.assert_allclose(density.score(public), 0, atol=0.2)
    wide = np.hstack([PUBLIC, np.zeros((len(PUBLIC), numbers), dtype=np.float32)])
    own = normal(1, 50, mean=1.0)
    padded = np.hstack([own, np.ones((50, numbers), dtype=np.float32)])
    assert np.isfinite(DENSITIES[name](padded, wide, seed=7).score(wide)).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_like_the_public_ones_score_about_zero(name: str) -> None:
    score = DENSITIES[name](normal(5, 400), PUBLIC, seed=7).score(normal(6, 300))
    assert abs(np.median(score)) < 0.3
    assert DENSITIES[name](PUBLIC, PUBLIC, seed=7).score(PUBLIC) == pytest.approx(0, abs=1.5)


# --- the threshold -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_threshold_accepts_the_share_of_own_rows_that_was_asked(name: str) -> None:
    density = DENSITIES[name](normal(1, 400, mean=1.0), PUBLIC, seed=7)
    limits = [density.threshold(quantile) for quantile in (0.0, 0.25, 0.5, 1.0)]
    assert limits == sorted(limits)
    fresh = density.score(normal(9, 400, mean=1.0))
    assert 0.6 < (fresh >= limits[1]).mean() < 0.9
    with pytest.raises(DataError, match=r"a quantile from 0 to 1, found 1\.5"):
        density.threshold(1.5)


def test_rows_of_which_nothing_is_known_are_never_accepted() -> None:
    density = kulsif(np.array([[0.0, 0.0], [99.0, 99.0]]), PUBLIC, seed=7)
    far = density.score(np.full((1, 2), -1e3, dtype=np.float32))
    assert far == -FAMILIARITY_LIMIT
    assert density.threshold(0.0) > far


def test_held_out_rows_are_not_fitted_on() -> None:
    fitted, held = divide(np.arange(20)[:, None].astype(np.float32), 7)
    assert (len(fitted), len(held)) == (15, 5)
    assert not set(fitted[:, 0]) & set(held[:, 0])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: kulsif(PUBLIC[:0], PUBLIC, seed=1), "own rows, found none"),
        (lambda: logistic(PUBLIC[:0], PUBLIC, seed=1), "own rows, found none"),
        (lambda: logistic(PUBLIC, PUBLIC[:0], seed=1), r"found none: raise \[proxy\] rows"),
        (lambda: logistic(PUBLIC, PUBLIC, seed=1, strength=0), "a strength above 0, found 0"),
    ],
)
def test_what_cannot_be_is_said(made: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        made()


# --- features ------------------------------------------------------------------------------------


def test_squares_are_squared_distances() -> None:
    first, second = normal(1, 5, 3), normal(2, 4, 3)
    naive = [[((a - b) ** 2).sum() for b in second] for a in first]
    np.testing.assert_allclose(squares(first, second), naive, rtol=1e-5)
    assert (squares(first + 1e4, first + 1e4) >= 0).all()


@pytest.mark.parametrize("numbers", [4, 80])
def test_features_know_no_unit_of_measurement(numbers: int) -> None:
    """Distances, in median distances, are the same whatever the rows are multiplied with."""
    public = normal(3, 100, numbers)
    for made in (public, 1000 * public):
        apart = np.sqrt(squares(*(2 * [PublicFeatures.fit(made)(made)])))
        assert np.median(apart[np.triu_indices(100, 1)]) == pytest.approx(2, rel=1e-3)


def test_a_proxy_set_is_looked_at_once() -> None:
    proxy = ProxySet(PUBLIC)
    assert features_of(proxy) is features_of(proxy)
