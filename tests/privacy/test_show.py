"""The ledger in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedistill.errors import LedgerError
from fedistill.privacy.accounting import ACCOUNTANT
from fedistill.privacy.events import Claim, Gaussian, Sampled, Spending
from fedistill.privacy.ledger import Entry, Ledger
from fedistill.privacy.show import acknowledge, show, verify, words

RUN = Spending.of(Sampled(0.05, 1.0), 200)


def reserve(ledger: Ledger, round: int, **changes: Any) -> Entry:
    asked: dict[str, Any] = {
        "run": "blue-fox",
        "round": round,
        "mechanism": "dpsgd",
        "spending": RUN,
        "unit": "record",
        "relation": "add-remove",
        "units": [b"a"],
        "epsilon": 8.0,
        "delta": 1e-5,
    }
    return ledger.reserve(**{**asked, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def test_a_line_for_each_debit_and_what_they_add_up_to(path: Path) -> None:
    ledger = Ledger(path)
    ledger.release(reserve(ledger, 1), "a" * 64)
    ledger.void(reserve(ledger, 2))
    reserve(ledger, 3)
    lines = list(show(path))
    assert [line.split()[-2:] for line in lines[:4]] == [
        ["state", "epsilon"],
        ["released", "4.77"],
        ["void", "4.77"],
        ["reserved", "6.7"],
    ]
    assert "200 x Poisson(0.05) Gaussian(1)  record" in lines[1]
    assert lines[5:] == [
        "epsilon 6.7 of 8 at delta 1e-05, add-remove",
        "replace-one: epsilon 10.62",
        "dpsgd, per record; 1 cohort, the costliest counts",
        f"accountant: {ACCOUNTANT}",
        "1 reserved and not released: they stay charged",
        f"head {ledger.head}",
    ]


def test_losses_and_erasures_have_their_lines(path: Path) -> None:
    ledger = Ledger(path)
    reserve(ledger, 1, spending=Spending.of(Gaussian(10.0)))
    ledger.acknowledge_loss(0.5, 1e-7)
    ledger.tombstone([b"a"])
    states = [line.split()[-2] for line in list(show(path))[1:4]]
    assert states == ["reserved", "loss", "erase"]
    assert "1 x claim of (0.5, 1e-07)" in list(show(path))[2]


def test_copies_have_no_replace_one(path: Path) -> None:
    cheap = Spending.of(Sampled(0.01, 8.0, 2), 3)
    reserve(Ledger(path), 1, spending=cheap)
    assert "replace-one: not known, as rows may lie there several times" in list(show(path))


def test_an_empty_ledger_says_so(path: Path) -> None:
    ledger = Ledger(path)
    with pytest.raises(ValueError, match="expected units"):
        reserve(ledger, 1, units=[])
    ledger._file._opened(create=True)
    assert list(show(path)) == [f"{path}: empty, nothing was spent"]
    assert verify(path) == f"{path}: 0 rows, chain and cohorts hold, head none"


def test_what_was_proved(path: Path) -> None:
    ledger = Ledger(path)
    reserve(ledger, 1)
    assert verify(path) == f"{path}: 1 row, chain and cohorts hold, head {ledger.head[:12]}"


def test_the_folder_of_a_ledger_will_do(path: Path) -> None:
    reserve(Ledger(path), 1)
    assert verify(path.parent) == verify(path)
    assert list(show(path.parent)) == list(show(path))


def test_a_loss_is_charged_and_its_heads_are_held(path: Path) -> None:
    reserve(Ledger(path), 1)
    lost = "ab" * 32
    assert not Ledger(path).holds(lost)
    told = acknowledge(path.parent, 2.0, heads=[lost[:12]])
    ledger = Ledger(path)
    assert ledger.holds(lost)
    assert not ledger.holds("cd" * 32)
    assert ledger.entries()[-1].spending == Spending.of(Claim(2.0, 1e-6))
    spent = ledger.spent(1e-5)
    assert 4.77 < spent < 6.9
    assert told == (
        f"{path}: (2, 1e-06) is charged to all; epsilon {spent:.4g} is spent at delta 1e-05, "
        f"head {ledger.head[:12]}"
    )


def test_a_ledger_that_is_gone_begins_anew_with_its_loss(path: Path) -> None:
    acknowledge(path, 3.0)
    assert Ledger(path).worst([b"anyone"], 1e-5) == Spending.of(Claim(3.0, 1e-6))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"epsilon": -1.0}, "a loss needs an epsilon from 0"),
        ({"epsilon": float("nan")}, "a loss needs an epsilon from 0"),
        ({"epsilon": 1.0, "delta": 1e-5}, "a delta below 1e-05, the budget's"),
        ({"epsilon": 1.0, "heads": ["abc"]}, "expected the first 12 digits of a head"),
    ],
)
def test_a_loss_that_cannot_be_charged_is_refused(
    path: Path, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(LedgerError, match=match):
        acknowledge(path, **given)
    assert not path.exists()


@pytest.mark.parametrize("command", [verify, lambda path: list(show(path))])
def test_an_edited_or_missing_ledger_is_an_error(path: Path, command: Any) -> None:
    with pytest.raises(LedgerError, match="must be a ledger, found no such file"):
        command(path)
    ledger = Ledger(path)
    reserve(ledger, 1)
    ledger._file._opened().execute("UPDATE entry SET epsilon = 80.0")
    with pytest.raises(LedgerError, match="was edited, row 1"):
        command(path)


@pytest.mark.parametrize(
    ("spending", "expected"),
    [
        (Spending(), "-"),
        (RUN, "200 x Poisson(0.05) Gaussian(1)"),
        (Spending.of(Sampled(0.05, 1.5, 2)), "1 x Poisson(0.05) Gaussian(1.5) of 2 copies"),
        (
            Spending.of(Gaussian(20.0), 10) + Spending.of(Claim(1.0, 1e-6)),
            "10 x Gaussian(20) + 1 x claim of (1, 1e-06)",
        ),
    ],
)
def test_events_in_words(spending: Spending, expected: str) -> None:
    assert words(spending) == expected
