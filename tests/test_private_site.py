"""A real site that is private: what its ledger holds, over rounds, runs, processes and crashes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import MEAN, gaussian, proxy, reseal

from fedistill import config, deployment
from fedistill.client import Site
from fedistill.data.site import split
from fedistill.deployment import Workplace, open_site
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import (
    BudgetExceeded,
    DataError,
    FedistillError,
    LedgerError,
    Rejected,
    SettingsError,
)
from fedistill.plan import describe_site
from fedistill.privacy import audit_log
from fedistill.privacy.account import RELEASES, Account
from fedistill.privacy.accounting import epsilon
from fedistill.privacy.dpsgd import PrivateStudent
from fedistill.privacy.events import Spending
from fedistill.privacy.ledger import LEDGER, Ledger
from fedistill.server import Server
from fedistill.wire.messages import Plan, Upload

ROUNDS = 4
DELTA = 1e-5
FEDERATION = """
seed = 3
rounds = 4
[data]
path = "."
scale = "none"
[proxy]
path = "npz:proxy.npz"
rows = 40
[clients]
count = 2
quorum = 2
width = 8
epochs = 1
batch_size = 16
[student]
width = 8
epochs = 1
[backend]
name = "flower"
device = "cpu"
[deployment]
sites = ["a", "b"]
classes = ["zero", "one", "two"]
[privacy]
mechanism = "dpsgd"
epsilon = 4
sample_rate = 0.5
steps = 2
purpose = "triage"
"""


def site_folder(folder: Path, extra: str = "", first: str = "", name: str = "a") -> Path:
    """A real site's folder, as its administrator has it; ``first`` stands before all tables."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "proxy.npz", inputs=proxy().inputs)
    rows = gaussian(24, len(name) + 40)
    np.savez(folder / "rows.npz", inputs=rows.inputs, labels=rows.labels)
    (folder / "federation.toml").write_text(FEDERATION)
    (folder / "site.toml").write_text(
        f'id = "{name}"\n{first}\n[data]\nsource = "npz:rows.npz"\npath = "."\ntest_rows = 0.2\n'
        f"{extra}"
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return site_folder(tmp_path / "a")


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds of every training that any site does."""
    trained: list[int] = []
    real = Site.train

    def train(self: Site, plan: Plan) -> None:
        trained.append(plan.round)
        real(self, plan)

    monkeypatch.setattr(Site, "train", train)
    return trained


def change(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


def plans(folder: Path, count: int = ROUNDS, **options: Any) -> list[bytes]:
    """Plans of a run that fits the folder; without soft targets, so each stands alone."""
    with contextlib.chdir(folder):
        place = deployment.public_rows(config.load(folder / "federation.toml"))
    terms = {"mechanism": "dpsgd", "purpose": "triage"} | options
    members = {"a": None, "b": None}
    server = Server(place.proxy, place.classes, None, MEAN, members, seed=3, **terms)
    return [server.plan(number).to_bytes() for number in range(1, count + 1)]


def answer(folder: Path, message: bytes) -> bytes:
    """As a new process would: nothing but the folder outlives it."""
    return open_site(folder).answer(message)


def ledger_of(folder: Path) -> Ledger:
    ledger = Ledger(folder / "state" / LEDGER)
    ledger.verify()
    return ledger


def kinds(folder: Path) -> list[str]:
    """What stands on the ledger, as ``reserve 1``."""
    with contextlib.closing(ledger_of(folder)) as ledger:
        return [f"{entry.kind} {entry.round}" for entry in ledger.entries()]


def spent(folder: Path) -> float:
    with contextlib.closing(ledger_of(folder)) as ledger:
        return ledger.spent(DELTA)


def noted(folder: Path) -> list[str]:
    """Events of the site's audit log, which must hold."""
    log = folder / "state" / audit_log.NAME
    return [str(entry["event"]) for entry in audit_log.verify(log).entries]


# --- round after round ---------------------------------------------------------------------------


def test_every_round_is_charged_and_released_by_whatever_process(folder: Path) -> None:
    uploads = [Upload.from_bytes(answer(folder, message)) for message in plans(folder)]
    assert kinds(folder) == [f"{kind} {n}" for n in range(1, 5) for kind in ("reserve", "release")]
    with contextlib.closing(ledger_of(folder)) as ledger:
        entries = ledger.entries()
        heads = [entry.hash for entry in entries if entry.kind == "reserve"]
        spendings = [entry.spending for entry in entries if entry.kind == "reserve"]
        past = Spending()
        for upload, head, spending in zip(uploads, heads, spendings, strict=True):
            past += spending
            assert upload.ledger == head
            assert upload.epsilon == pytest.approx(epsilon(past, DELTA))
            digest = hashlib.sha256(upload.to_bytes()).hexdigest()
            assert ledger.released(upload.run, upload.round) == digest
    assert 3.9 < spent(folder) <= 4.0
    assert len(set(spendings)) == 1  # the noise is planned once


def test_what_a_private_site_keeps_is_for_its_owner_alone(folder: Path) -> None:
    answer(folder, plans(folder, 1)[0])
    state = folder / "state"
    names = {path.name for path in state.iterdir()}
    assert {LEDGER, "ledger.key", RELEASES, audit_log.NAME, "runs"} <= names
    own = [state / LEDGER, state / "ledger.key", *(state / RELEASES).iterdir()]
    own += (state / "runs").glob("*/state")
    assert len(own) == 4
    for path in own:
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_round_asked_again_gives_the_same_bytes_and_no_second_charge(
    folder: Path, fits: list[int]
) -> None:
    first, second, *_ = plans(folder)
    told = answer(folder, first)
    before = kinds(folder)
    assert answer(folder, first) == told
    place = open_site(folder)
    assert [place.answer(first), place.answer(first)] == [told, told]
    assert kinds(folder) == before
    assert answer(folder, second) != told
    assert fits == [1, 2]


def test_a_step_whose_state_cannot_be_saved_releases_nothing_and_is_charged_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fits: list[int]
) -> None:
    first = plans(folder, 1)[0]

    def dead(site: Site) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Site, "save", dead)
        with pytest.raises(KeyboardInterrupt):
            answer(folder, first)
    assert kinds(folder) == ["reserve 1"]
    assert not (folder / "state" / RELEASES).exists()
    answer(folder, first)
    assert kinds(folder) == ["reserve 1", "reserve 1", "release 1"]
    assert fits == [1, 1]


@pytest.mark.parametrize("death", ["_keep", "release"])
def test_a_saved_answer_whose_release_was_not_noted_is_noted_and_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fits: list[int], death: str
) -> None:
    """Dead before the bytes are kept, or before the ledger has them: the state has the rest."""
    first, second, *_ = plans(folder)

    def dead(*anything: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Account if death == "_keep" else Ledger, death, dead)
        with pytest.raises(KeyboardInterrupt):
            answer(folder, first)
    assert kinds(folder) == ["reserve 1"]
    told = answer(folder, first)
    (stored,) = (folder / "state" / RELEASES).iterdir()
    assert told == stored.read_bytes() == answer(folder, first)
    assert kinds(folder) == ["reserve 1", "release 1"]
    answer(folder, reseal(second, heard=1))  # what it said is known here
    assert kinds(folder)[2:] == ["reserve 2", "release 2"]
    assert fits == [1, 2]


def test_a_plan_that_cannot_be_learned_from_costs_nothing(folder: Path, fits: list[int]) -> None:
    message = reseal(plans(folder)[2], heard=2)
    with pytest.raises(Rejected) as caught:
        answer(folder, message)
    assert caught.value.reason == "reference"
    assert fits == []
    assert not (folder / "state" / LEDGER).exists()


def test_two_runs_share_one_budget(folder: Path) -> None:
    """The first takes half of it; the second plans its noise on top of that, and ends with it."""
    one, two = plans(folder), plans(folder)
    two = [reseal(message, run="another") for message in two]
    for message in one[:2]:
        answer(folder, message)
    half = spent(folder)
    for message in two:
        answer(folder, message)
    assert half < 3 < 3.9 < spent(folder) <= 4.0
    with contextlib.closing(ledger_of(folder)) as ledger:
        runs = {entry.run for entry in ledger.entries()}
    assert len(runs) == 2
    with pytest.raises(BudgetExceeded):
        answer(folder, one[2])
    assert "exhausted" in noted(folder)


# --- steps that do not end -----------------------------------------------------------------------


def test_a_step_that_breaks_off_stays_charged_and_the_next_try_is_a_debit_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plans(folder, 1)[0]

    def broken(*anything: Any, **named: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(PrivateStudent, "_learn", broken)
        with pytest.raises(MemoryError):
            answer(folder, first)
    assert kinds(folder) == ["reserve 1"]
    lost = spent(folder)
    assert lost > 0
    upload = Upload.from_bytes(answer(folder, first))
    assert kinds(folder) == ["reserve 1", "reserve 1", "release 1"]
    assert upload.epsilon == pytest.approx(spent(folder))
    assert lost < spent(folder) <= 4.0


def test_where_nothing_was_computed_the_debit_is_taken_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plans(folder, 1)[0]

    def refuses(*anything: Any) -> None:
        raise FedistillError("no such noise")

    with monkeypatch.context() as patch:
        patch.setattr(PrivateStudent, "allow", refuses)
        with pytest.raises(FedistillError, match="no such noise"):
            answer(folder, first)
    assert kinds(folder) == ["reserve 1", "void 1"]
    assert spent(folder) == 0.0


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from fedistill.deployment import open_site
print("ready", flush=True)
place = open_site(sys.argv[1])
for path in sys.argv[2:]:
    sys.stdout.buffer.write(place.answer(Path(path).read_bytes()))
    sys.stdout.flush()
"""


def killed(folder: Path, message: Path, after: float) -> bool:
    """A real process that answers, and is killed after so many seconds; whether it was at work."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(message)],
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


def check_books(folder: Path) -> None:
    """What must hold at any moment: of the ledger, of what was kept, of the log."""
    if not (folder / "state" / LEDGER).exists():
        assert not (folder / "state" / RELEASES).exists()
        return
    noted(folder)
    with contextlib.closing(ledger_of(folder)) as ledger:
        entries = ledger.entries()
        for kind in ("reserve", "release"):
            rounds = [entry.round for entry in entries if entry.kind == kind]
            assert kind == "reserve" or len(rounds) == len(set(rounds))
        reserved = {(entry.run, entry.round) for entry in entries if entry.kind == "reserve"}
        for path in (folder / "state" / RELEASES).glob("*.upload"):
            run, _, number = path.stem.rpartition("-")
            assert (run, int(number)) in reserved
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert ledger.released(run, int(number)) in {None, digest}
        assert ledger.spent(DELTA) <= 4.0


def kill_and_ask_again(folder: Path, kills: int, seed: int) -> int:
    """Ask by processes that are killed at random moments, then by one that is not."""
    dice, count = random.Random(seed), 0
    messages = plans(folder)
    began = time.monotonic()
    place = open_site(site_folder(folder.with_name("untouched")))
    place.answer(messages[0])
    seconds = time.monotonic() - began
    for number, message in enumerate(messages):
        path = folder / f"plan-{number}"
        path.write_bytes(message)
        for _ in range(kills // len(messages)):
            count += killed(folder, path, dice.uniform(0, 2 * seconds + 0.5))
            check_books(folder)
        try:
            told = answer(folder, message)
        except BudgetExceeded:  # steps that were lost stay charged: noise cannot make up for many
            continue
        assert answer(folder, message) == told
        check_books(folder)
    return count


@pytest.mark.timeout(300)
def test_a_killed_process_leaves_books_that_hold(folder: Path) -> None:
    assert kill_and_ask_again(folder, 4, seed=1) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_killed_processes_leave_books_that_hold(folder: Path) -> None:
    assert kill_and_ask_again(folder, 10, seed=2) > 0


# --- the budget ----------------------------------------------------------------------------------


def answered(folder: Path, message: bytes) -> bool:
    """Whether a round is answered; otherwise the budget must be the reason."""
    try:
        answer(folder, message)
    except BudgetExceeded as refusal:
        told = refusal
    else:
        return True
    assert told.reason == "budget_exhausted"
    assert told.spent <= told.limit == 4.0 < told.asked
    return False


def test_a_site_without_budget_says_so_trains_nothing_and_has_learned_what_it_had(
    folder: Path, fits: list[int]
) -> None:
    change(folder, "federation.toml", "steps = 2", "steps = 2\nsigma = 1.7")
    told = [number for number, one in enumerate(plans(folder), 1) if answered(folder, one)]
    assert told == fits
    assert 0 < len(told) < ROUNDS
    assert kinds(folder).count("reserve 1") == 1
    assert len(kinds(folder)) == 2 * len(told)
    assert spent(folder) <= 4.0
    assert noted(folder).count("exhausted") == ROUNDS - len(told)


def test_rounds_beyond_those_that_were_planned_cost_nothing(folder: Path) -> None:
    """The coordinator asks for more rounds than were agreed: no row is touched for them."""
    messages = plans(folder, ROUNDS + 1)
    for message in messages[:ROUNDS]:
        answer(folder, message)
    before = spent(folder)
    more = Upload.from_bytes(answer(folder, messages[ROUNDS]))
    assert spent(folder) == before == more.epsilon
    assert f"reserve {ROUNDS + 1}" not in kinds(folder)


# --- the books are not to be trusted -------------------------------------------------------------


@pytest.mark.parametrize("missing", ["everything", "the ledger", "the ledger and its key"])
def test_a_ledger_that_is_gone_stops_the_site_within_a_run(
    folder: Path, missing: str, fits: list[int]
) -> None:
    """The state remembers its head; where that is gone as well, the coordinator does."""
    first, second, *_ = plans(folder)
    upload = Upload.from_bytes(answer(folder, first))
    state = folder / "state"
    if missing == "everything":
        for path in sorted(state.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    else:
        for path in state.glob(f"{LEDGER}*"):
            path.unlink()
    if missing == "the ledger and its key":
        (state / "ledger.key").unlink()
    with pytest.raises(LedgerError):
        answer(folder, reseal(second, receipt=upload.ledger))
    assert fits == [1]


def test_an_older_ledger_is_refused_until_the_loss_is_acknowledged(
    folder: Path, fits: list[int]
) -> None:
    first, second, third, _ = plans(folder)
    answer(folder, first)
    ledger_of(folder).close()
    backup = (folder / "state" / LEDGER).read_bytes()
    upload = Upload.from_bytes(answer(folder, second))
    for path in (folder / "state").glob(f"{LEDGER}*"):
        path.unlink()
    (folder / "state" / LEDGER).write_bytes(backup)
    with pytest.raises(LedgerError, match="acknowledge-loss"):
        answer(folder, third)
    assert fits == [1, 2]
    with contextlib.closing(Ledger(folder / "state" / LEDGER)) as ledger:
        state = json_facts(folder)
        ledger.acknowledge_loss(1.0, DELTA / 10, [upload.ledger, state["privacy"]["head"]])
    after = Upload.from_bytes(answer(folder, reseal(third, receipt=upload.ledger)))
    assert after.epsilon is not None
    assert after.epsilon > 1.0
    assert fits == [1, 2, 3]


def json_facts(folder: Path) -> Any:
    from fedistill import store

    (path,) = (folder / "state" / "runs").glob("*/state")
    return store.load_state(path)[1]


def test_an_edited_ledger_and_an_edited_release_are_refused(folder: Path) -> None:
    import sqlite3

    first, second, *_ = plans(folder)
    answer(folder, first)
    with contextlib.closing(sqlite3.connect(folder / "state" / LEDGER)) as file, file:
        file.execute("UPDATE entry SET delta = 1e-9 WHERE seq = 1")
    with pytest.raises(LedgerError, match="edited"):
        answer(folder, second)


# --- the policy ----------------------------------------------------------------------------------

POLICY = '[policy]\nmechanisms = ["dpsgd", "dp-head"]\n'


@pytest.mark.parametrize("agreed", ["none", "hard-label", "gnmax"])
def test_a_downgrade_of_the_agreement_is_refused_before_a_row_is_read(
    agreed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[int]
) -> None:
    folder = site_folder(tmp_path / "a", POLICY)
    change(folder, "federation.toml", '"dpsgd"', f'"{agreed}"')
    message = plans(folder, 1, mechanism="" if agreed == "none" else agreed)[0]
    with pytest.raises(Rejected) as caught:
        open_site(folder).answer(message)
    assert caught.value.reason == "policy"
    monkeypatch.setattr(
        deployment, "own_rows", lambda *a, **k: pytest.fail("a row of its own was read")
    )
    with pytest.raises(Rejected, match="this site answers with dpsgd or dp-head, agreed was"):
        open_site(folder, willing=True)
    assert fits == []
    assert not (folder / "state" / "runs").exists()
    assert noted(folder) == ["policy_refused"] * 2


@pytest.mark.parametrize("asked", ["", "hard-label", "central-gauss", "gnmax"])
def test_a_request_for_another_mechanism_than_was_agreed_is_refused(
    asked: str, folder: Path, fits: list[int]
) -> None:
    message = plans(folder, 1, mechanism=asked)[0]
    with pytest.raises(Rejected) as caught:
        answer(folder, message)
    assert caught.value.reason == "policy"
    assert fits == []
    assert not (folder / "state" / LEDGER).exists()


def test_a_request_for_another_purpose_is_refused(folder: Path, fits: list[int]) -> None:
    with pytest.raises(Rejected) as caught:
        answer(folder, plans(folder, 1, purpose="marketing")[0])
    assert caught.value.reason == "policy"
    assert fits == []


FORBIDS = {
    "a purpose": '[policy]\npurposes = ["research"]\n',
    "other public rows": f'[policy]\nproxies = ["{"0" * 64}"]\n',
    "a mechanism": '[policy]\nmechanisms = ["gnmax"]\n',
}


@pytest.mark.parametrize("policy", FORBIDS.values(), ids=FORBIDS)
def test_what_the_policy_does_not_name_is_refused_and_check_says_so(
    policy: str, tmp_path: Path, fits: list[int]
) -> None:
    folder = site_folder(tmp_path / "a", policy)
    with pytest.raises(Rejected) as caught:
        answer(folder, plans(folder, 1)[0])
    assert caught.value.reason == "policy"
    assert fits == []
    told = [line for line in describe_site(folder) if line.startswith("refused")]
    assert told == [f"refused   {caught.value.detail} (policy in site.toml)"]


def test_a_mechanism_that_nobody_knows_is_no_policy(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "a", '[policy]\nmechanisms = ["dp-sgd"]\n')
    with pytest.raises(SettingsError, match=r'policy\.mechanisms: unknown .* mean "dpsgd"'):
        open_site(folder)


def test_what_the_policy_names_is_answered(tmp_path: Path) -> None:
    fingerprint = open_site(site_folder(tmp_path / "b")).public.proxy.fingerprint
    policy = f'{POLICY}purposes = ["triage"]\nproxies = ["{fingerprint}"]\n'
    folder = site_folder(tmp_path / "a", policy)
    assert answer(folder, plans(folder, 1)[0])
    assert not any(line.startswith("refused") for line in describe_site(folder))


@pytest.mark.parametrize("limit", ["epsilon = 2.0", "delta = 1e-6"])
@pytest.mark.parametrize("agreed", ["none", "hard-label", "central-gauss"])
def test_a_limit_on_epsilon_is_one_on_what_has_no_bound_too(
    limit: str, agreed: str, tmp_path: Path, fits: list[int]
) -> None:
    folder = site_folder(tmp_path / "a", f"[policy]\n{limit}\n")
    change(folder, "federation.toml", '"dpsgd"', f'"{agreed}"')
    change(folder, "federation.toml", "count = 2", "count = 100")
    with pytest.raises(Rejected, match="limits its privacy loss") as caught:
        open_site(folder).answer(plans(folder, 1, mechanism="" if agreed == "none" else agreed)[0])
    assert caught.value.reason == "policy"
    assert fits == []


def test_the_stricter_epsilon_and_delta_win(tmp_path: Path) -> None:
    strict = site_folder(tmp_path / "a", "[policy]\nepsilon = 1.5\ndelta = 1e-6\n")
    for message in plans(strict):
        answer(strict, message)
    with contextlib.closing(ledger_of(strict)) as ledger:
        assert 1.4 < ledger.spent(1e-6) <= 1.5
        assert {entry.epsilon for entry in ledger.entries() if entry.kind == "reserve"} == {1.5}
    lax = open_site(site_folder(tmp_path / "b", "[policy]\nepsilon = 90.0\ndelta = 0.5\n"))
    assert lax.site.account is not None
    assert (lax.site.account.terms.epsilon, lax.site.account.terms.delta) == (4.0, DELTA)


def test_check_says_what_will_be_spent_on_top_of_what_is(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "a", "[policy]\nepsilon = 3.0\n")
    first, second, *_ = plans(folder)
    before = "\n".join(describe_site(folder))
    assert "3.00 after rounds 1 to 4; delta 1e-05" in before
    assert not (folder / "state").exists()  # nothing is written by looking
    answer(folder, first)
    answer(folder, second)
    told = "\n".join(describe_site(folder))
    assert f"on top of {spent(folder):.2f}" in told
    for message in [reseal(one, run="rest") for one in plans(folder)]:
        answer(folder, message)
    assert "REFUSED: epsilon" in "\n".join(describe_site(folder))


# --- a mechanism of its own ----------------------------------------------------------------------


def test_a_site_may_have_another_private_mechanism(tmp_path: Path) -> None:
    folder = site_folder(
        tmp_path / "a", '[training]\nmodel = "random-forest"\n', 'mechanism = "gnmax"'
    )
    change(folder, "federation.toml", "steps = 2", "steps = 2\nteachers = 4")
    place = open_site(folder)
    assert place.site.account is not None
    assert place.site.account.terms.mechanism == "gnmax"
    assert not isinstance(place.site.learner, TorchStudent)
    told = [answer(folder, message) for message in plans(folder)]
    with contextlib.closing(ledger_of(folder)) as ledger:
        reserved = [entry for entry in ledger.entries() if entry.kind == "reserve"]
        assert {entry.mechanism for entry in reserved} == {"gnmax"}
        assert ledger.spent(DELTA) <= 4.0
    assert Upload.from_bytes(told[-1]).epsilon == pytest.approx(spent(folder))
    (line,) = [line for line in describe_site(folder) if line.startswith("privacy")]
    assert line.startswith("privacy   gnmax: noisy votes")


@pytest.mark.parametrize(
    ("own", "agreed"),
    [("none", "dpsgd"), ("hard-label", "dpsgd"), ("dpsgd", "none"), ("dpsgd", "central-gauss")],
)
def test_a_mechanism_that_does_not_fit_what_all_agreed_on_is_refused(
    own: str, agreed: str, tmp_path: Path
) -> None:
    folder = site_folder(tmp_path / "a", first=f'mechanism = "{own}"')
    change(folder, "federation.toml", '"dpsgd"', f'"{agreed}"')
    change(folder, "federation.toml", "count = 2", "count = 100")
    with pytest.raises(SettingsError, match=r"site\.toml, mechanism: a site may have another"):
        open_site(folder)


def test_a_site_may_name_the_mechanism_that_all_have(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "a", first='mechanism = "dpsgd"')
    assert answer(folder, plans(folder, 1)[0])


# --- what is written and told --------------------------------------------------------------------


def test_the_log_tells_of_every_charge_and_of_no_row(folder: Path) -> None:
    first, second, *_ = plans(folder)
    for message in (first, first, second):
        answer(folder, message)
    assert noted(folder) == ["run_begun", "charged", "released", "charged", "released"]
    entries = audit_log.verify(folder / "state" / audit_log.NAME).entries
    charged = [entry for entry in entries if entry["event"] == "charged"]
    assert charged[-1]["epsilon"] == pytest.approx(spent(folder))
    text = (folder / "state" / audit_log.NAME).read_text()
    for value in gaussian(24, 41).inputs[:, 0]:
        assert json.dumps(float(value)) not in text


def test_two_processes_cannot_work_at_once_and_the_second_says_so(folder: Path) -> None:
    from fedistill import store
    from fedistill.flower import work

    (folder / "state").mkdir()
    with store.held(folder / "state"):
        assert work.at_real_site(folder, plans(folder, 1)[0], 0.0) == {"reason": "site"}
    assert not (folder / "state" / LEDGER).exists()


def accounts(places: list[Workplace]) -> Iterator[Account]:
    for place in places:
        assert place.site.account is not None
        yield place.site.account


def test_two_open_sites_of_one_folder_see_one_anothers_charges(folder: Path) -> None:
    first, second, *_ = plans(folder)
    one, two = open_site(folder), open_site(folder)
    one.answer(first)
    two.answer(second)
    assert len({account.spent() for account in accounts([one, two])}) == 1
    assert kinds(folder) == ["reserve 1", "release 1", "reserve 2", "release 2"]


# --- what a server, or a restored backup, cannot do -----------------------------------------------


def test_a_ledger_that_was_rolled_back_is_refused_by_a_new_run_too(folder: Path) -> None:
    """A new run brings no receipt, and the server chooses when a run is new."""
    change(folder, "federation.toml", "epsilon = 4", "epsilon = 40")
    first = plans(folder)
    answer(folder, first[0])
    backup = (folder / "state" / LEDGER).read_bytes()
    answer(folder, first[1])
    (folder / "state" / LEDGER).write_bytes(backup)
    with pytest.raises(LedgerError, match="found it gone"):
        answer(folder, plans(folder)[0])
    for path in (folder / "state").glob(f"{LEDGER}*"):
        path.unlink()
    with pytest.raises(LedgerError, match="found it gone"):
        answer(folder, plans(folder)[0])


def test_the_audit_log_alone_remembers_a_ledger_that_is_gone(folder: Path) -> None:
    answer(folder, plans(folder)[0])
    for path in (folder / "state" / "runs").glob("*/state*"):
        path.unlink()
    for path in (folder / "state").glob(f"{LEDGER}*"):
        path.unlink()
    with pytest.raises(LedgerError, match="found it gone"):
        answer(folder, plans(folder)[0])


def test_extra_rounds_of_the_servers_counting_make_no_more_private_ones(
    folder: Path, fits: list[int]
) -> None:
    change(folder, "federation.toml", "steps = 2", "steps = 2\nrounds = 2")
    for number, message in enumerate(plans(folder, 8), start=1):
        shifted = Plan.from_bytes(message)
        answer(folder, dataclasses.replace(shifted, extra=number - 1).to_bytes())
    assert len(fits) == 8
    assert kinds(folder) == [f"{kind} {n}" for n in (1, 2) for kind in ("reserve", "release")]


@pytest.mark.parametrize("whose", [None, "person"])
def test_one_record_decides_about_no_other_when_test_rows_are_held_out(whose: str | None) -> None:
    rows = gaussian(120, 3)
    names = np.array([f"{whose}-{row // 3}" for row in range(120)]) if whose else None
    rows = dataclasses.replace(rows, subject=names)
    settings = config.DataSettings(test_rows=0.2)
    train, held = split(rows, settings, 3, "a", alone=True)
    assert len(train) + len(held) == 120
    assert 8 <= len(held) <= 42
    for left_out in range(0, 120, 7):
        rest = rows.take(np.delete(np.arange(120), left_out))
        again, _ = split(rest, settings, 3, "a", alone=True)
        known = {row.tobytes() for row in train.inputs}
        assert {row.tobytes() for row in again.inputs} == known - {rows.inputs[left_out].tobytes()}
    if train.subject is not None and held.subject is not None:
        assert not set(train.subject) & set(held.subject)  # a person is on one side


def test_a_number_of_test_rows_would_let_one_row_decide_about_another(folder: Path) -> None:
    change(folder, "site.toml", "test_rows = 0.2", "test_rows = 4")
    with pytest.raises(DataError, match="a share below 1 where rows are private"):
        open_site(folder)
