"""Cohorts: units that took part in the same steps; the costliest counts."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.errors import BudgetExceeded
from fedistill.privacy.accounting import epsilon, upper_bound
from fedistill.privacy.cohorts import Touch, touch, undominated
from fedistill.privacy.events import Claim, Gaussian, Sampled, Spending
from fedistill.privacy.ledger import Entry, Ledger

DELTA = 1e-5
RUN = Spending.of(Sampled(0.05, 1.0), 200)
A, B = Spending.of(Gaussian(1.0)), Spending.of(Gaussian(2.0))


def reserve(ledger: Ledger, spending: Spending, units: list[bytes], **changes: Any) -> Entry:
    asked: dict[str, Any] = {
        "run": "run",
        "round": len(ledger.entries()) + 1,
        "mechanism": "dpsgd",
        "spending": spending,
        "unit": "record",
        "relation": "add-remove",
        "units": units,
        "epsilon": 1000.0,
        "delta": DELTA,
    }
    return ledger.reserve(**{**asked, **changes})


def task(number: int, count: int = 5) -> list[bytes]:
    return [f"{number}/{row}".encode() for row in range(count)]


def test_replay_across_ten_tasks_costs_what_the_reference_says() -> None:
    """Units that stay in the buffer pay for each task, units seen once for one."""
    ledger = Ledger(None)
    buffer = [b"stays"]
    spent = {}
    for number in range(1, 11):
        reserve(ledger, RUN, buffer + task(number))
        if number in (1, 2, 5, 10):
            spent[number] = round(ledger.spent(DELTA), 2)
    assert spent == {1: 4.77, 2: 6.70, 5: 10.99, 10: 16.49}
    assert ledger.worst(buffer, DELTA) == RUN * 10
    assert ledger.spending(task(3)) == (RUN,)
    assert sorted(sum(s.counts.values()) for s in ledger.cohorts().values()) == [200] * 10 + [2000]


def test_proxy_memory_costs_nothing() -> None:
    """Public rows have no owner whose name could be charged."""
    ledger = Ledger(None)
    for number in range(1, 11):
        reserve(ledger, RUN, task(number))
    assert ledger.spending() == (RUN,)


def test_a_part_that_is_touched_inherits_what_was_charged_until_then() -> None:
    ledger = Ledger(None)
    reserve(ledger, A, [b"a", b"b", b"c"])
    second = reserve(ledger, B, [b"b", b"c"])
    reserve(ledger, A, [b"a"])
    assert second.splits == {"2-1": "1-1"}
    assert ledger.cohorts() == {"1-1": A * 2, "2-1": A + B}
    assert ledger.spending([b"c"]) == (A + B,)
    assert set(ledger.spending()) == {A * 2, A + B}


def test_a_split_stays_when_its_debit_is_taken_back() -> None:
    ledger = Ledger(None)
    reserve(ledger, A, [b"a", b"b"])
    ledger.void(reserve(ledger, B, [b"b", b"c"]))
    reserve(ledger, A, [b"c"])
    assert ledger.worst([b"b"], DELTA) == ledger.worst([b"c"], DELTA) == A


def test_touched_cohorts_are_split_from_those_that_are_not() -> None:
    members = {b"a": "1-1", b"b": "1-1", b"c": "2-1"}
    found = touch([b"a", b"c", b"d"], members, 7, sizes={"1-1": 2, "2-1": 1})
    assert found == Touch(
        ("2-1", "7-1", "7-2"),
        {"7-1": "", "7-2": "1-1"},
        {"7-1": [b"d"], "7-2": [b"a"]},
    )
    assert found.before() == {"", "1-1", "2-1"}


def test_the_costliest_is_among_those_that_no_other_contains() -> None:
    assert undominated([Spending(), A, A + B, B, A * 2]) == (A + B, A * 2)
    assert undominated([Spending()]) == (Spending(),)
    assert undominated([]) == ()


def test_names_of_units_may_come_in_any_order_and_twice() -> None:
    ledger = Ledger(None)
    reserve(ledger, A, [b"a", b"b", b"a"])
    reserve(ledger, A, [b"b", b"a"])
    assert ledger.spending() == (A * 2,)


# --- any history ---------------------------------------------------------------------------------

units = st.lists(st.sampled_from([b"a", b"b", b"c", b"d", b"e"]), min_size=1, unique=True)
costs = st.sampled_from([Claim(0.5, 0.0), Claim(0.3, 0.0), Claim(0.2, 1e-6)]).map(Spending.of)
acts = st.one_of(
    st.tuples(st.sampled_from(["reserve", "quick", "void"]), units, costs),
    st.tuples(st.just("loss"), units, st.just(Spending.of(Claim(0.1, 1e-7)))),
)


def bound_holds(spendings: tuple[Spending, ...], limit: float) -> bool:
    return all(upper_bound(spending, DELTA) <= limit for spending in spendings)


@given(st.lists(acts, max_size=10))
@settings(deadline=None, max_examples=60)
def test_nothing_is_ever_admitted_beyond_the_limit_nor_refused_within(
    history: list[tuple[str, list[bytes], Spending]],
) -> None:
    """Against an account that keeps a list for each unit on its own."""
    limit = 1.0
    ledger = Ledger(None)
    own = {unit: Spending() for unit in (b"a", b"b", b"c", b"d", b"e")}
    for act, who, cost in history:
        if act == "loss":
            ledger.acknowledge_loss(0.1, 1e-7)
            own = {unit: spent + cost for unit, spent in own.items()}
            continue

        after = {unit: own[unit] + cost for unit in who}
        true = max(epsilon(spent, DELTA) for spent in after.values())
        honest = partial(bound_holds, tuple(after.values()), limit)
        fits = honest if act == "quick" else None
        if true > limit:
            with pytest.raises(BudgetExceeded):
                reserve(ledger, cost, who, epsilon=limit, fits=fits)
            continue
        entry = reserve(ledger, cost, who, epsilon=limit, fits=fits)
        if act == "void":
            ledger.void(entry)
        else:
            own |= after
    assert {unit: ledger.spending([unit]) for unit in own} == {
        unit: (spent,) for unit, spent in own.items()
    }
    assert ledger.spent(DELTA) == max(epsilon(spent, DELTA) for spent in own.values())
    ledger.verify()


def test_thirty_thousand_units_are_no_burden() -> None:
    """Ten tasks with a buffer: rows of the chain stay short, whoever takes part."""
    random = np.random.default_rng(0)
    ledger = Ledger(None)
    buffer: list[bytes] = []
    for number in range(10):
        rows = [f"{number}/{row}".encode() for row in range(3000)]
        reserve(ledger, RUN, buffer + rows)
        pool = buffer + rows
        buffer = [pool[i] for i in random.choice(len(pool), 500, replace=False)]
    assert len(ledger._file.members()) == 30_000
    assert max(sum(s.counts.values()) for s in ledger.cohorts().values()) <= 2000
    assert len(ledger.cohorts()) <= 60
    assert ledger.spent(DELTA) <= 16.49
