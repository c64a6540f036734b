"""The gap to an oracle, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedistill import metrics
from fedistill.errors import DataError

ORACLE = [0.80, 0.50, 1.00]
STUDENT = [0.76, 0.51, 0.90]
# (0.80 - 0.76) / 0.80, (0.50 - 0.51) / 0.50, (1.00 - 0.90) / 1.00
GAPS = [0.05, -0.02, 0.10]


def test_gaps_by_hand():
    np.testing.assert_allclose(metrics.relative_gaps(ORACLE, STUDENT), GAPS)
    assert metrics.fluctuation(GAPS) == pytest.approx(0.12)
    assert metrics.fluctuation(GAPS, one_sided=True) == pytest.approx(0.10)
    assert metrics.worst_gap(GAPS) == 0.10
    assert metrics.fluctuation([0.3]) == 0.0


def test_a_raw_curve_that_moves_with_its_oracle_does_not_fluctuate():
    student = [0.9 * value for value in ORACLE]
    assert metrics.fluctuation(metrics.relative_gaps(ORACLE, student)) == pytest.approx(0.0)


def test_the_mean_over_seeds_comes_before_the_range():
    # Each seed alone fluctuates by 0.2; what they have in common does not.
    oracle = np.full((2, 2), 1.0)
    student = [[1.0, 0.8], [0.8, 1.0]]
    gaps = metrics.relative_gaps(oracle, student)
    np.testing.assert_allclose(gaps, [0.1, 0.1])
    assert metrics.fluctuation(gaps) == pytest.approx(0.0)
    np.testing.assert_allclose(metrics.relative_gaps([1.0, 1.0], student), gaps)


def test_the_noise_floor_is_the_fluctuation_between_two_oracles():
    # Gaps 0.1 and -0.1.
    assert metrics.noise_floor([1.0, 1.0], [0.9, 1.1]) == pytest.approx(0.2)
    assert metrics.noise_floor(ORACLE, ORACLE) == 0.0


@pytest.mark.parametrize(
    ("oracle", "student", "said"),
    [
        ([0.5, 0.0], [0.5, 0.5], "oracle above 0 in each block, found 0.0 in block 1"),
        ([0.5, 0.5], [0.5], "found 2 of the oracle and 1 of the student"),
        ([0.5, np.nan], [0.5, 0.5], "for the oracle, found shape .*, 1 not finite"),
        ([0.5], [np.inf], "for the student"),
        ([], [], "for the oracle"),
    ],
)
def test_gaps_without_a_value_are_refused(oracle, student, said):
    with pytest.raises(DataError, match=said):
        metrics.relative_gaps(oracle, student)


def test_a_statistic_wants_one_gap_per_block():
    with pytest.raises(DataError, match="take the mean over seeds first"):
        metrics.fluctuation([[0.1, 0.2]])


def test_recovery_counts_from_the_switch_to_the_way_back():
    # A window still holds rows from before, so it starts high.
    curve = [0.9, 0.7, 0.5, 0.6, 0.8, 0.79, 0.9]
    assert metrics.recovery(curve, 0.8) == 5
    assert metrics.recovery(curve, 0.8, every=100) == 500
    assert metrics.recovery(curve, 0.5) == 0
    assert metrics.recovery(curve, 0.95) is None


def runs(seed, noise=0.01):
    random = np.random.default_rng(seed)
    oracle = 0.8 + noise * random.normal(size=(6, 8))
    return oracle, oracle - 0.02 + noise * random.normal(size=(6, 8))


@pytest.mark.parametrize("statistic", [metrics.fluctuation, metrics.worst_gap])
def test_bounds_are_drawn_by_the_seed_and_change_nothing(statistic):
    oracle, student = runs(1)
    before = oracle.copy()
    first, again, other = (
        metrics.bounds(oracle, student, statistic, resamples=200, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert first.low < first.high
    assert first.value == statistic(metrics.relative_gaps(oracle, student)) == other.value
    np.testing.assert_array_equal(oracle, before)


def test_without_any_noise_the_interval_is_the_value():
    oracle = np.tile(ORACLE, (5, 1))
    student = np.tile(STUDENT, (5, 1))
    found = metrics.bounds(oracle, student, blocks=False, resamples=50)
    assert (found.low, found.high) == pytest.approx((0.12, 0.12))
    over_blocks = metrics.bounds(oracle, student, resamples=400)
    assert over_blocks.value == pytest.approx(0.12)
    assert over_blocks.high <= found.high + 1e-12, "a draw of blocks never widens the range"


def test_more_noise_gives_a_wider_interval():
    narrow, wide = (
        metrics.bounds(*runs(2, noise), blocks=False, resamples=300) for noise in (0.002, 0.02)
    )
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_pairs_take_out_what_oracle_and_student_share():
    # A hard seed lowers both alike; paired, it does not widen the interval.
    hard = np.linspace(0, 0.3, 6)[:, None]
    oracle, student = np.full((6, 4), 1.0) - hard, 0.9 * (np.full((6, 4), 1.0) - hard)
    found = metrics.bounds(oracle, student, metrics.worst_gap, resamples=100)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


def test_one_seed_will_do_and_bad_options_are_refused():
    assert metrics.bounds(ORACLE, STUDENT, resamples=20).value == pytest.approx(0.12)
    with pytest.raises(DataError, match="of one shape"):
        metrics.bounds([ORACLE, ORACLE], STUDENT)
    with pytest.raises(DataError, match="at least 1 resample, found"):
        metrics.bounds(ORACLE, STUDENT, resamples=0)
