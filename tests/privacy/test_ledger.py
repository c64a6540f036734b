"""The ledger: reserve, train, release, and what was spent by then."""

from __future__ import annotations

import hashlib
import stat
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedistill.errors import BudgetExceeded, LedgerError
from fedistill.privacy import accounting
from fedistill.privacy.accounting import epsilon
from fedistill.privacy.events import Claim, Gaussian, Sampled, Spending
from fedistill.privacy.ledger import Entry, Ledger

DELTA = 1e-5
RUN = Spending.of(Sampled(0.05, 1.0), 200)
SHA = hashlib.sha256(b"an upload").hexdigest()


def names(*people: str) -> list[bytes]:
    return [person.encode() for person in people]


def reserve(ledger: Ledger, round: int = 1, who: Iterable[str] = "abc", **changes: Any) -> Entry:
    asked: dict[str, Any] = {
        "run": "run",
        "round": round,
        "mechanism": "dpsgd",
        "spending": RUN,
        "unit": "record",
        "relation": "add-remove",
        "units": names(*who),
        "epsilon": 100.0,
        "delta": DELTA,
    }
    return ledger.reserve(**{**asked, **changes})


@pytest.fixture(params=["file", "memory"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite" if request.param == "file" else None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


# --- the protocol --------------------------------------------------------------------------------


def test_a_debit_is_there_before_anything_is_computed(ledger: Ledger) -> None:
    entry = reserve(ledger)
    assert (entry.seq, entry.entry_id, entry.kind) == (1, "run/1/1", "reserve")
    assert (entry.spending, entry.unit, entry.relation) == (RUN, "record", "add-remove")
    assert ledger.entries() == (entry,)
    assert ledger.spent(DELTA) == epsilon(RUN, DELTA)
    assert ledger.unreleased() == (entry,)
    assert ledger.released("run", 1) is None


def test_a_release_is_noted_and_costs_nothing_more(ledger: Ledger) -> None:
    entry = reserve(ledger)
    ledger.release(entry, SHA)
    assert ledger.released("run", 1) == SHA
    assert ledger.released("run", 2) is None
    assert ledger.unreleased() == ()
    assert ledger.spending() == (RUN,)


def test_fault_29_noting_the_same_release_again_does_nothing(ledger: Ledger) -> None:
    entry = reserve(ledger)
    ledger.release(entry, SHA)
    head = ledger.head
    ledger.release(entry, SHA)
    assert ledger.head == head
    with pytest.raises(LedgerError, match="was released with other bytes"):
        ledger.release(entry, "0" * 64)


def test_fault_29_a_retry_without_a_release_is_a_new_debit(ledger: Ledger) -> None:
    reserve(ledger)
    again = reserve(ledger)
    assert again.entry_id == "run/1/2"
    assert ledger.spending() == (RUN * 2,)


def test_fault_30_a_started_step_stays_charged(ledger: Ledger) -> None:
    entry = reserve(ledger)
    ledger.started(entry)
    with pytest.raises(LedgerError, match="run/1/1 stays charged: it was started"):
        ledger.void(entry)
    assert ledger.spending() == (RUN,)


def test_what_was_not_computed_is_taken_back(ledger: Ledger) -> None:
    ledger.void(reserve(ledger))
    assert [entry.kind for entry in ledger.entries()] == ["reserve", "void"]
    assert ledger.spent(DELTA) == 0.0
    assert ledger.unreleased() == ()


def test_only_who_reserved_can_take_back(path: Path) -> None:
    ledger = Ledger(path)
    entry = reserve(ledger)
    after_a_crash = Ledger(path)
    for other, claimed in ((after_a_crash, after_a_crash.entries()[0]), (ledger, replace(entry))):
        with pytest.raises(LedgerError, match="stays charged"):
            other.void(claimed)
    assert after_a_crash.spending() == (RUN,)


def test_a_released_or_voided_step_is_not_taken_back_again(ledger: Ledger) -> None:
    released, voided = reserve(ledger, 1), reserve(ledger, 2)
    ledger.release(released, SHA)
    ledger.void(voided)
    for entry in (released, voided):
        with pytest.raises(LedgerError, match="stays charged"):
            ledger.void(entry)
    with pytest.raises(LedgerError, match="not a reservation"):
        ledger.release(voided, SHA)


def test_nothing_is_released_that_was_not_reserved_here(ledger: Ledger) -> None:
    stranger = reserve(Ledger(None), who="x")
    with pytest.raises(LedgerError, match=r"run/1/1 is not a reservation of .* that stands"):
        ledger.release(stranger, SHA)
    with pytest.raises(ValueError, match="expected a SHA-256"):
        ledger.release(reserve(ledger), "short")


@pytest.mark.parametrize(
    "wrong",
    [{"units": []}, {"relation": "none"}, {"epsilon": 0.0}, {"delta": 0.0}, {"delta": 1.0}],
)
def test_fault_42_a_limit_that_is_none(ledger: Ledger, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected units, a relation, epsilon > 0"):
        reserve(ledger, **wrong)
    assert ledger.entries() == ()


# --- the limit -----------------------------------------------------------------------------------


def test_faults_40_and_41_a_step_beyond_the_limit_is_refused_before_it_is_taken(
    ledger: Ledger,
) -> None:
    reserve(ledger, 1, epsilon=5.0)
    head = ledger.head
    with pytest.raises(BudgetExceeded) as refused:
        reserve(ledger, 2, epsilon=5.0)
    assert refused.value.spent == pytest.approx(4.766, rel=1e-3)
    assert refused.value.asked == pytest.approx(6.70, rel=1e-3)
    assert (refused.value.limit, refused.value.reason) == (5.0, "budget_exhausted")
    assert ledger.head == head


def test_the_limit_is_that_of_the_costliest_unit(ledger: Ledger) -> None:
    reserve(ledger, 1, "a", epsilon=5.0)
    reserve(ledger, 2, "bc", epsilon=5.0)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, 3, "ad", epsilon=5.0)
    reserve(ledger, 4, "d", epsilon=5.0)


def test_replace_one_is_held_against_its_own_epsilon(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded) as refused:
        reserve(ledger, epsilon=7.0, relation="replace-one")
    assert refused.value.asked == pytest.approx(7.107, rel=1e-3)
    reserve(ledger, epsilon=7.2, relation="replace-one")


def test_a_quick_bound_saves_the_computing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "epsilon", never)
    reserve(ledger, epsilon=5.5)  # the bound is 5.37
    assert ledger.spending() == (RUN,)


def test_so_does_a_proof_that_the_whole_plan_fits(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "epsilon", never)
    reserve(ledger, epsilon=4.8, fits=lambda: True)
    assert ledger.spending() == (RUN,)


def test_where_there_is_no_such_proof_it_is_computed(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded):
        reserve(ledger, epsilon=4.7, fits=lambda: False)


def never(*_: object) -> float:
    raise AssertionError("the accountant was asked")


def test_the_unit_stays_the_same(ledger: Ledger) -> None:
    reserve(ledger)
    with pytest.raises(LedgerError, match="counts by record, this run by user"):
        reserve(ledger, unit="user")


# --- losses --------------------------------------------------------------------------------------


def test_fault_37_a_loss_is_charged_to_all_and_to_those_who_come(ledger: Ledger) -> None:
    reserve(ledger, 1, "ab")
    claim = Spending.of(Claim(2.0, 1e-7))
    ledger.acknowledge_loss(2.0, 1e-7)
    reserve(ledger, 2, "bc")
    assert ledger.worst(names("a"), DELTA) == RUN + claim
    assert ledger.worst(names("b"), DELTA) == RUN * 2 + claim
    assert ledger.worst(names("c"), DELTA) == RUN + claim
    assert ledger.worst(names("nobody"), DELTA) == claim


def test_fault_37_a_ledger_goes_on_from_its_heads_and_from_no_other(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.head == ""
    heads = [reserve(ledger, round).hash for round in (1, 2)]
    assert ledger.head == heads[-1]
    assert all(Ledger(path).holds(head) for head in ["", *heads])
    assert not Ledger(path).holds("0" * 64)


# --- what is on disk -----------------------------------------------------------------------------


def test_reading_a_ledger_that_is_not_there_makes_none(path: Path) -> None:
    ledger = Ledger(path)
    ledger.verify()
    assert ledger.entries() == ()
    assert (ledger.spent(DELTA), ledger.worst(names("a"), DELTA)) == (0.0, Spending())
    assert not ledger.erased(names("a")).any()
    assert list(path.parent.iterdir()) == []


def test_another_process_finds_all_that_was_written(path: Path) -> None:
    ledger = Ledger(path)
    entry = reserve(ledger)
    ledger.release(entry, SHA)
    other = Ledger(path)
    assert other.entries() == ledger.entries()
    assert other.released("run", 1) == SHA
    reserve(other, 2)
    assert ledger.spending() == (RUN * 2,)
    assert [e.entry_id for e in ledger.entries()] == ["run/1/1", "run/1/1", "run/2/1"]


def test_no_one_else_can_read_it_and_it_names_nobody(path: Path) -> None:
    reserve(Ledger(path), who=["Ada Lovelace", "Charles Babbage"])
    found = [file for file in path.parent.iterdir() if file.is_file()]
    assert {"ledger.sqlite", "ledger.key"} <= {file.name for file in found}
    for file in found:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        content = file.read_bytes()
        assert b"Lovelace" not in content
        assert hashlib.sha256(b"Ada Lovelace").digest() not in content


def test_the_key_is_not_in_the_ledger(path: Path) -> None:
    reserve(Ledger(path))
    key = path.with_suffix(".key").read_bytes()
    assert len(key) == 32
    assert key not in path.read_bytes()
    assert key.hex().encode() not in path.read_bytes()


def test_it_is_written_durably(path: Path) -> None:
    ledger = Ledger(path)
    reserve(ledger)
    db = ledger._file._opened()
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_copy_of_the_one_file_is_the_whole_ledger(path: Path, tmp_path: Path) -> None:
    ledger = Ledger(path)
    for round in (1, 2, 3):
        reserve(ledger, round)
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(path.read_bytes())
    assert Ledger(copy).entries() == ledger.entries()
    assert Ledger(copy).spent(DELTA) == ledger.spent(DELTA)  # without the key, too


def test_epsilons_are_known_to_the_next_process(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(path)
    reserve(ledger)
    spent = ledger.spent(DELTA)
    monkeypatch.setattr(accounting, "epsilon", never)
    assert Ledger(path).spent(DELTA) == spent


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE known SET epsilon = 0.1",
        "UPDATE known SET seal = ''",
        "UPDATE known SET seal = epsilon",
    ],
)
def test_a_known_epsilon_that_was_edited_is_computed_anew(path: Path, edit: str) -> None:
    ledger = Ledger(path)
    reserve(ledger)
    spent = ledger.spent(DELTA)
    ledger._file._opened().execute(edit)
    assert Ledger(path).spent(DELTA) == spent


def test_threads_may_share_it(path: Path) -> None:
    ledger = Ledger(path)
    cheap = Spending.of(Gaussian(100.0))

    def work(number: int) -> None:
        ledger.release(reserve(ledger, number, spending=cheap), SHA)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.verify()
    assert ledger.spending() == (cheap * 8,)


# --- erasure -------------------------------------------------------------------------------------


def test_fault_50_erased_units_are_told_and_not_used_again(
    path: Path,
) -> None:
    ledger = Ledger(path)
    reserve(ledger, 1, "abc")
    ledger.tombstone(names("b", "nobody"))
    for one in (ledger, Ledger(path)):
        assert one.erased(names("a", "b", "nobody", "c")).tolist() == [False, True, True, False]
        with pytest.raises(LedgerError, match="1 of the units were erased"):
            reserve(one, 2, "abc")
    reserve(ledger, 2, "ac")
    ledger.verify()


def test_erasure_refunds_nothing(ledger: Ledger) -> None:
    reserve(ledger, 1, "ab")
    ledger.tombstone(names("a", "b"))
    assert ledger.worst(names("a"), DELTA) == RUN
    assert ledger.spending() == (RUN,)


def test_erasing_again_is_no_new_row(ledger: Ledger) -> None:
    ledger.tombstone(names("a"))
    head = ledger.head
    ledger.tombstone(names("a"))
    assert ledger.head == head


def test_the_same_call_in_a_row_is_one_line_each(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same units as last time are not looked up one by one."""
    first = reserve(ledger, 1, "abc")
    looked: Callable[..., Any] = never
    monkeypatch.setattr(ledger._file, "members", looked)
    again = reserve(ledger, 2, "cba")
    assert (again.cohorts, again.splits) == (first.cohorts, {})
    assert again.members == first.members
