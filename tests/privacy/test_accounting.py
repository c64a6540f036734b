"""Epsilon: golden numbers, two other accountants, and how much noise a budget asks for."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest

from fedistill.errors import BudgetExceeded
from fedistill.privacy.accounting import (
    ACCOUNTANT,
    calibrate,
    epsilon,
    quick_epsilon,
    upper_bound,
)
from fedistill.privacy.events import Claim, Gaussian, Sampled, Spending

DELTA = 1e-5
of = Spending.of
RUN = of(Sampled(0.05, 1.0), 200)
EVERY_ROUND = of(Sampled(0.032, 1.0), 32)
VOTES = of(Gaussian(40 / math.sqrt(2)), 100)


@pytest.mark.parametrize(
    ("spending", "relation", "expected"),
    [
        (RUN, "add-remove", 4.766),
        (RUN, "replace-one", 7.107),
        (RUN + of(Gaussian(20.0), 10), "add-remove", 4.816),
        (RUN + of(Gaussian(20.0), 10), "replace-one", 7.282),
        (RUN * 2, "add-remove", 6.70),
        (RUN * 5, "add-remove", 10.99),
        (RUN * 10, "add-remove", 16.489),
        (RUN * 10, "replace-one", 29.67),
        (EVERY_ROUND, "add-remove", 1.54),
        (EVERY_ROUND * 5, "add-remove", 2.72),
        (EVERY_ROUND * 10, "add-remove", 3.71),
        (EVERY_ROUND * 50, "add-remove", 8.52),
        (of(Gaussian(3.731)), "add-remove", 1.0),
        (of(Gaussian(0.600)), "add-remove", 8.0),
        (VOTES, "add-remove", 1.36),
        (VOTES * 3, "add-remove", 2.50),
        (VOTES * 10, "add-remove", 4.98),
    ],
)
def test_golden_numbers(spending: Spending, relation: str, expected: float) -> None:
    assert epsilon(spending, DELTA, relation) == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("copies", "expected"), [(1, 4.766), (2, 10.71), (3, 17.55)])
def test_golden_numbers_of_rows_that_lie_there_several_times(copies: int, expected: float) -> None:
    spending = of(Sampled(0.05, 1.0, copies), 200)
    assert epsilon(spending, DELTA) == pytest.approx(expected, rel=5e-3)


def test_copies_cost_more_and_the_crude_bound_is_far_off() -> None:
    twice = quick_epsilon(of(Sampled(0.05, 1.0, 2), 200), DELTA)
    assert 10.6 < twice < 10.8
    assert upper_bound(of(Sampled(0.05, 1.0, 2), 200), DELTA) == math.inf


def test_fifty_rounds_are_what_dp_accounting_says_of_the_same_events() -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    step = dp_accounting.PoissonSampledDpEvent(0.032, dp_accounting.GaussianDpEvent(1.0))
    accountant = PLDAccountant()
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, 32 * 50))
    assert epsilon(EVERY_ROUND * 50, DELTA) == pytest.approx(
        accountant.get_epsilon(DELTA), rel=1e-6
    )


@pytest.mark.parametrize(
    "spending", [RUN, pytest.param(RUN * 10 + of(Gaussian(20.0), 10), marks=pytest.mark.slow)]
)
def test_accountants_of_opacus_agree(spending: Spending) -> None:
    """PRV within 1 %, RDP never below and within 20 %."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant, RDPAccountant

        history = [
            (event.sigma, getattr(event, "rate", 1.0), times)
            for event, times in spending
            if not isinstance(event, Claim)
        ]
        prv, rdp = PRVAccountant(), RDPAccountant()
        prv.history, rdp.history = list(history), list(history)
        ours = epsilon(spending, DELTA)
        assert ours == pytest.approx(prv.get_epsilon(delta=DELTA), rel=0.01)
        assert ours <= rdp.get_epsilon(delta=DELTA) <= ours * 1.2


@pytest.mark.parametrize(
    ("spending", "delta"),
    [
        (RUN, 1e-5),
        (RUN, 1e-3),
        (RUN * 10, 1e-5),
        (EVERY_ROUND, 1e-6),
        (VOTES, 1e-5),
        (of(Gaussian(100.0)), 1e-3),
        (of(Sampled(0.001, 0.8), 1000), 1e-3),
        (of(Sampled(1.0, 2.0), 3) + of(Claim(0.5, 1e-6)), 1e-5),
    ],
)
def test_quick_answers_are_never_below_the_precise_one(spending: Spending, delta: float) -> None:
    precise = epsilon(spending, delta)
    assert upper_bound(spending, delta) >= precise
    assert precise <= quick_epsilon(spending, delta) * (1 + 1e-9) <= precise * 1.03


@pytest.mark.parametrize(("rate", "sigma", "times"), [(0.05, 1.0, 200), (0.3, 3.0, 50)])
def test_the_quick_bound_is_the_one_of_dp_accounting(rate: float, sigma: float, times: int) -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    accountant = RdpAccountant()
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, times))
    expected = accountant.get_epsilon(DELTA)  # fractional orders as well: a little lower
    assert (
        expected * 0.9999 <= upper_bound(of(Sampled(rate, sigma), times), DELTA) <= expected * 1.03
    )


def test_nothing_costs_nothing_and_no_noise_costs_all() -> None:
    assert epsilon(Spending(), DELTA) == upper_bound(Spending(), DELTA) == 0.0
    assert epsilon(of(Sampled(0.0, 1.0), 9), DELTA) == 0.0
    assert epsilon(of(Gaussian(0.0)), DELTA) == math.inf
    assert epsilon(RUN + of(Sampled(0.1, 0.0)), DELTA) == math.inf
    assert upper_bound(of(Gaussian(0.0)), DELTA) == math.inf


def test_so_little_noise_that_it_is_none_is_quickly_said() -> None:
    assert epsilon(of(Gaussian(0.001)), DELTA) > 1e5
    assert epsilon(of(Gaussian(0.001)), DELTA, "replace-one") == math.inf
    assert epsilon(of(Sampled(0.1, 0.01, 3), 10), DELTA) == math.inf


def test_all_rows_in_each_step_is_no_sampling() -> None:
    assert epsilon(of(Sampled(1.0, 4.0), 9), DELTA) == epsilon(of(Gaussian(4.0), 9), DELTA)


def test_gaussians_are_one_gaussian() -> None:
    """Precisions add up: 1/4 + 3/36 = 1/3."""
    merged = of(Gaussian(2.0)) + of(Gaussian(6.0), 3)
    assert epsilon(merged, DELTA) == pytest.approx(epsilon(of(Gaussian(3**0.5)), DELTA), rel=1e-9)


def test_claims_are_composed_and_use_delta_up() -> None:
    assert epsilon(of(Claim(1.0, 0.0), 3), DELTA) == pytest.approx(3.0, abs=1e-3)
    assert epsilon(of(Claim(1.0, 1e-6), 3), DELTA) == pytest.approx(3.0, abs=1e-3)
    assert epsilon(of(Claim(1.0, 1e-5), 3), DELTA) == math.inf
    assert epsilon(of(Claim(2000.0, 0.0)), DELTA) == math.inf
    assert epsilon(RUN + of(Claim(2.0, 1e-6)), DELTA) < epsilon(RUN, DELTA) + 2.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_fault_42_a_delta_that_is_none(delta: float) -> None:
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        epsilon(RUN, delta)


def test_relations_that_are_unknown_or_cannot_be_computed() -> None:
    with pytest.raises(ValueError, match="relation must be one of add-remove, replace-one"):
        epsilon(RUN, DELTA, "zero-out")
    with pytest.raises(ValueError, match="replace-one is not known for rows that lie there"):
        epsilon(of(Sampled(0.05, 1.0, 2)), DELTA, "replace-one")


def test_every_epsilon_can_name_its_accountant() -> None:
    assert ACCOUNTANT.startswith("dp-accounting ")
    assert ACCOUNTANT.endswith(" PLD")


def test_the_accountant_is_not_loaded_before_it_is_needed() -> None:
    """It takes a second, and torch several: a site opens its ledger for each message."""
    code = (
        "import sys; import fedistill.privacy.ledger as ledger\n"
        "ledger.Ledger(None).head\n"
        "print([m for m in ('dp_accounting', 'torch', 'opacus', 'scipy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- how much noise ------------------------------------------------------------------------------


def gaussian(sigma: float) -> Spending:
    return of(Gaussian(sigma))


def steps(sigma: float) -> Spending:
    return of(Sampled(0.05, sigma), 200)


@pytest.mark.parametrize(("budget", "sigma"), [(1.0, 3.731), (8.0, 0.6)])
def test_noise_of_one_gaussian_rounded_up(budget: float, sigma: float) -> None:
    assert calibrate(gaussian, Spending(), budget, DELTA) == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize(
    ("past", "budget", "expected"),
    [(RUN, 8.0, 0.864), pytest.param(Spending(), 4.766, 1.0, marks=pytest.mark.slow)],
)
def test_noise_on_top_of_what_is_spent(past: Spending, budget: float, expected: float) -> None:
    sigma = calibrate(steps, past, budget, DELTA)
    assert sigma == pytest.approx(expected, rel=5e-3)
    assert sigma == float(f"{sigma:.3g}")
    assert epsilon(past + steps(sigma), DELTA) <= budget
    assert epsilon(past + steps(sigma - 10 ** (math.floor(math.log10(sigma)) - 2)), DELTA) > budget
    assert calibrate(steps, past, budget, DELTA) == sigma


def test_noise_for_replace_one_is_twice_that_for_add_remove() -> None:
    """Of a Gaussian: whoever is replaced moves the sum by two clipping norms."""
    assert calibrate(gaussian, Spending(), 2.0, DELTA, "replace-one") == pytest.approx(
        2 * 1.994, rel=0.01
    )


def test_a_budget_that_is_spent_buys_no_noise() -> None:
    with pytest.raises(BudgetExceeded) as refused:
        calibrate(steps, RUN, 4.0, DELTA)
    assert refused.value.spent == pytest.approx(4.766, rel=1e-3)
    assert refused.value.limit == 4.0
    assert refused.value.reason == "budget_exhausted"


def test_a_cost_that_noise_does_not_lower_is_refused() -> None:
    with pytest.raises(BudgetExceeded):
        calibrate(lambda _: RUN, Spending(), 4.0, DELTA)


def test_noise_is_the_least_of_three_digits_even_at_the_ends() -> None:
    assert calibrate(lambda _: Spending(), Spending(), 1.0, DELTA) == 0.01
    assert (
        calibrate(lambda s: of(Claim(0.9, 0.0)) if s > 12.3 else RUN, Spending(), 1.0, DELTA)
        == 12.4
    )
