"""Events and spendings: what an accountant needs to know, and nothing of the data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedistill.privacy.events import Claim, Gaussian, Sampled, Spending

number = st.floats(0, 100, allow_nan=False)
events = st.one_of(
    st.builds(Gaussian, number),
    st.builds(Sampled, st.floats(0, 1), number, st.integers(1, 4)),
    st.builds(Claim, number, st.floats(0, 1)),
)
spendings = st.dictionaries(events, st.integers(1, 9), max_size=4).map(Spending)


@given(spendings, spendings)
def test_the_order_in_which_it_is_spent_does_not_matter(a: Spending, b: Spending) -> None:
    assert a + b == b + a
    assert hash(a + b) == hash(b + a)
    assert (a + b).to_json() == (b + a).to_json()


@given(spendings, st.integers(0, 5))
def test_many_times_is_added_many_times(spending: Spending, times: int) -> None:
    total = Spending()
    for _ in range(times):
        total += spending
    assert spending * times == total


@given(spendings)
def test_it_comes_back_from_json_as_it_was(spending: Spending) -> None:
    assert Spending.from_json(spending.to_json()) == spending


def test_json_is_canonical_and_says_what_was_done() -> None:
    spending = Spending.of(Sampled(0.05, 1.0), 200) + Spending.of(Gaussian(20.0), 10)
    assert spending.to_json() == (
        '[{"event":"gaussian","sigma":20.0,"times":10},'
        '{"copies":1,"event":"sampled","rate":0.05,"sigma":1.0,"times":200}]'
    )


def test_nothing_is_false_and_costs_no_event() -> None:
    assert not Spending()
    assert not Spending.of(Gaussian(1.0), 0)
    assert not Spending.of(Gaussian(1.0)) * 0
    assert list(Spending()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}x",
        "3",
        "[3]",
        '[{"event":"laplace","times":1}]',
        '[{"event":"gaussian","sigma":1.0}]',
        '[{"event":"gaussian","sigma":1.0,"times":0}]',
        '[{"event":"gaussian","sigma":1.0,"times":true}]',
        '[{"event":"gaussian","sigma":-1.0,"times":1}]',
        '[{"event":"gaussian","sigma":NaN,"times":1}]',
        '[{"event":"gaussian","sigma":"much","times":1}]',
        '[{"event":"gaussian","sigma":1.0,"rate":1.0,"times":1}]',
    ],
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected events as Spending\.to_json gives them"):
        Spending.from_json(text)
