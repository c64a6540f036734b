"""A client's account: charged before, released after, and never twice for one round."""

import hashlib

import numpy as np
import pytest

from fedistill.errors import BudgetExceeded, LedgerError, Rejected
from fedistill.privacy.account import LEDGER, Account, Step
from fedistill.privacy.accounting import epsilon
from fedistill.privacy.events import Sampled, Spending
from fedistill.privacy.terms import Terms
from fedistill.types import Rows

ASKED = np.arange(4)
ROWS = Rows(np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(20) % 2)
RATE, STEPS = 0.25, 8


class Trainee:
    """As a private learner speaks to the account."""

    def __init__(self):
        self.allowed = []

    def quote(self, rows, asked):
        return lambda sigma: Spending.of(Sampled(RATE, sigma), STEPS if len(rows) else 0)

    def allow(self, sigma):
        self.allowed.append(sigma)

    def units(self, rows):
        return tuple(bytes(row) for row in rows.inputs)


def terms(**changes):
    return Terms(
        **({"mechanism": "dpsgd", "agreed": "dpsgd", "epsilon": 3.0, "rounds": 5} | changes)
    )


def step(number, left=None, run="run"):
    return Step(run, number, 6 - number if left is None else left, ASKED)


def test_all_planned_rounds_spend_the_budget_and_no_more():
    account, learner = Account(terms()), Trainee()
    spent = []
    for number in range(1, 6):
        entry = account.pay(step(number), learner, ROWS)
        account.release(entry, b"upload %d" % number)
        spent.append(account.spent())
    assert len(set(learner.allowed)) == 1  # one noise for the run: equal events stay one event
    assert spent == sorted(spent)
    assert 2.9 < spent[-1] <= 3.0
    total = Spending.of(Sampled(RATE, learner.allowed[0]), 5 * STEPS)
    assert spent[-1] == pytest.approx(epsilon(total, 1e-5))


def test_a_step_is_charged_before_it_is_allowed():
    account, learner = Account(terms()), Trainee()
    learner.allow = lambda sigma: pytest.fail("not charged") if not account.head else None
    assert account.pay(step(1), learner, ROWS) is not None
    assert [entry.kind for entry in account.ledger.entries()] == ["reserve"]


def test_rounds_without_own_training_are_free():
    account, learner = Account(terms()), Trainee()
    assert account.pay(step(6, left=0), learner, ROWS) is None
    assert account.pay(step(1), learner, ROWS.take([])) is None
    assert not learner.allowed
    assert account.spent() == 0.0


def test_a_longer_run_than_planned_is_refused_before_anything_is_computed():
    account, learner = Account(terms()), Trainee()
    for number in range(1, 6):
        account.release(account.pay(step(number), learner, ROWS), b"upload")
    before = account.head
    with pytest.raises(BudgetExceeded) as refusal:
        account.pay(step(6, left=3), learner, ROWS)
    assert refusal.value.reason == "budget_exhausted"
    assert account.head == before
    assert len(learner.allowed) == 5


def test_noise_that_is_fixed_runs_into_the_limit():
    account, learner = Account(terms(sigma=2.0)), Trainee()
    taken = 0
    while epsilon(Spending.of(Sampled(RATE, 2.0), (taken + 1) * STEPS), 1e-5) <= 3.0:
        taken += 1
        account.release(account.pay(step(taken, left=1), learner, ROWS), b"upload")
    with pytest.raises(BudgetExceeded):
        account.pay(step(taken + 1, left=1), learner, ROWS)
    assert 0 < taken < 20
    assert account.spent() <= 3.0


def test_a_lost_step_is_made_up_for_by_a_little_more_noise():
    account, learner = Account(terms()), Trainee()
    account.pay(step(1), learner, ROWS)  # the process died before anything was released
    for number in range(1, 6):
        account.release(account.pay(step(number), learner, ROWS), b"upload")
    first, rest = learner.allowed[0], set(learner.allowed[1:])
    assert all(first < sigma < 1.5 * first for sigma in rest)
    assert account.spent() <= 3.0


def test_earlier_runs_count():
    account, learner = Account(terms(epsilon=6.0)), Trainee()
    for number in range(1, 6):
        account.pay(step(number, run="first"), learner, ROWS)
    with pytest.raises(BudgetExceeded):
        account.pay(step(1, run="second"), learner, ROWS)


def test_what_was_released_is_sent_again_and_not_drawn_again(tmp_path):
    account, learner = Account(terms(), tmp_path), Trainee()
    assert account.released("run", 1) is None
    account.release(account.pay(step(1), learner, ROWS), b"the answer")
    again = Account(terms(), tmp_path)
    assert again.released("run", 1) == b"the answer"
    assert again.released("run", 2) is None
    assert again.spent() == account.spent()


def test_a_release_that_was_written_and_not_noted_is_noted_now(tmp_path):
    account, learner = Account(terms(), tmp_path), Trainee()
    account.pay(step(1), learner, ROWS)
    account._keep("run", 1, b"the answer")  # killed here: the ledger does not know
    again = Account(terms(), tmp_path)
    assert again.released("run", 1) == b"the answer"
    assert again.ledger.released("run", 1) == hashlib.sha256(b"the answer").hexdigest()
    assert [entry.kind for entry in again.ledger.entries()] == ["reserve", "release"]


def test_bytes_that_were_never_paid_for_do_not_leave(tmp_path):
    account = Account(terms(), tmp_path)
    account._keep("run", 1, b"planted")
    assert account.released("run", 1) is None


def test_released_bytes_that_were_changed_are_refused(tmp_path):
    account, learner = Account(terms(), tmp_path), Trainee()
    account.release(account.pay(step(1), learner, ROWS), b"the answer")
    account._path("run", 1).write_bytes(b"another answer")
    with pytest.raises(LedgerError, match="released"):
        Account(terms(), tmp_path).released("run", 1)


def test_a_ledger_that_is_rolled_back_is_refused(tmp_path):  # fault 37
    account, learner = Account(terms(), tmp_path), Trainee()
    account.release(account.pay(step(1), learner, ROWS), b"one")
    del account
    backup = (tmp_path / LEDGER).read_bytes()
    account = Account(terms(), tmp_path)
    account.release(account.pay(step(2), learner, ROWS), b"two")
    facts, head = account.facts(), account.head
    account.ledger.close()
    for name in tmp_path.glob(f"{LEDGER}*"):
        name.unlink()
    (tmp_path / LEDGER).write_bytes(backup)
    older = Account(terms(), tmp_path)
    with pytest.raises(LedgerError, match="gone"):
        older.recall(facts)
    with pytest.raises(LedgerError, match="acknowledge-loss"):
        older.agree("dpsgd", "", head)


def test_a_request_for_less_privacy_is_refused():  # fault 58
    account = Account(terms(purpose="care"))
    account.agree("dpsgd", "care", "")
    for mechanism, purpose in (("", "care"), ("hard-label", "care"), ("dpsgd", "advertising")):
        with pytest.raises(Rejected, match="policy"):
            account.agree(mechanism, purpose, "")
