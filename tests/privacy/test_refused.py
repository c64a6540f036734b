"""What is refused as privacy: the figures of each refusal, and the words."""

import pytest

from fedistill.catalog import MECHANISMS
from fedistill.privacy.refused import (
    REFUSED,
    gaussian_sigma,
    local_noise,
    subsampling,
    why_refused,
)


@pytest.mark.parametrize(
    ("epsilon", "sigma"), [(0.5, 7.032), (1, 3.731), (2, 1.994), (4, 1.081), (8, 0.600)]
)
def test_noise_of_one_gaussian_release(epsilon, sigma):
    assert gaussian_sigma(epsilon, 1e-5) == pytest.approx(sigma, abs=6e-4)


def test_noise_of_a_large_epsilon_does_not_overflow():
    assert 0 < gaussian_sigma(2000.0, 1e-5) < gaussian_sigma(1000.0, 1e-5) < 0.05


@pytest.mark.parametrize(
    ("rows", "rounds", "epsilon", "expected"),
    [(100, 1, 1.0, 52.8), (100, 1, 8.0, 8.5), (1000, 10, 1.0, 528), (1000, 10, 8.0, 85)],
)
def test_honest_noise_on_the_predictions_of_a_model_without_privacy(
    rows, rounds, epsilon, expected
):
    assert local_noise(rows, rounds, epsilon) == pytest.approx(expected, rel=5e-3)


def test_logits_need_more_noise_by_their_norm():
    probs = local_noise(100, 2, 1.0)
    assert local_noise(100, 2, 1.0, clip=10.0) == pytest.approx(probs * 20 / 2**0.5)


def test_a_random_subset_is_hardly_private():
    assert subsampling(2800, 280) == pytest.approx((0.10532, 0.1), rel=1e-4)
    assert subsampling(2800, 280, replacement=True) == pytest.approx((0.09998, 0.09518), rel=1e-3)
    assert subsampling(10, 10) == pytest.approx((2.3979, 1.0), rel=1e-4)  # all rows: ln 11


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_is_one_sentence_and_names_no_mechanism_that_there_is(name):
    text = REFUSED[name]
    assert name not in MECHANISMS
    assert text[0].islower() or text.startswith(("Gaussian", "Laplace"))
    assert not text.endswith(".")
    assert ". " not in text
    assert "take" in text or "write" in text or "whatever" in text


def test_figures_stand_in_the_texts():
    assert "52.8" in REFUSED["local-gauss"]
    assert "8.5" in REFUSED["local-gauss"]
    assert "(ln((n + 1) / (n + 1 - k)), k / n)" in REFUSED["nfdp"]
    assert "0.105" in REFUSED["nfdp"]


@pytest.mark.parametrize("spelling", ["NFDP", " nfdp ", "Local_Gauss", "randomized response"])
def test_names_are_known_however_they_are_spelt(spelling):
    assert why_refused(spelling)


@pytest.mark.parametrize("name", [*MECHANISMS, "", "dp-sdg"])
def test_what_there_is_and_what_is_unknown_is_not_refused_here(name):
    assert why_refused(name) is None
