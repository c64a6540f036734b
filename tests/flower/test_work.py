"""A site's work for one message: what leaves is an upload or a short code, whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import faulthandler
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import CLASSES, MEAN, Saying, federation, gaussian, proxy, reseal
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedistill import config, deployment, store
from fedistill.client import Client, Member, Site
from fedistill.data.site import Public
from fedistill.deployment import open_site
from fedistill.errors import (
    CheckpointError,
    DataError,
    LedgerError,
    Rejected,
    RunError,
    SettingsError,
)
from fedistill.flower import client_app, convert, work
from fedistill.log import read_events
from fedistill.server import Server
from fedistill.types import ProxySet
from fedistill.wire.messages import Plan

from .grid import FIRST, LOST, InProcessGrid, fates, over

SECRET = "patient-4711"
FEDERATION = """
seed = 3
rounds = 4
[data]
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
"""


def site_folder(folder: Path, name: str = "a", extra: str = "") -> Path:
    """A real site's folder, as its administrator has it; npz labels are numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "proxy.npz", inputs=proxy().inputs)
    rows = gaussian(24, len(name) + 40)
    np.savez(folder / "rows.npz", inputs=rows.inputs, labels=rows.labels)
    (folder / "federation.toml").write_text(FEDERATION)
    (folder / "site.toml").write_text(
        f'id = "{name}"\n[data]\nsource = "npz:rows.npz"\npath = "."\ntest_rows = 4\n{extra}'
    )
    return folder


def public(folder: Path) -> Public:
    with contextlib.chdir(folder):
        return deployment.public_rows(config.load(folder / "federation.toml"))


def plans(folder: Path, count: int = 3, **options: Any) -> list[bytes]:
    """Plans of a run that fits the folder; without soft targets, so each stands alone."""
    place = public(folder)
    server = Server(
        place.proxy, place.classes, None, MEAN, {"a": None, "b": None}, seed=3, **options
    )
    return [server.plan(number).to_bytes() for number in range(1, count + 1)]


def ask(folder: Path, message: bytes, patience: float = 0.0) -> dict[str, bytes | str]:
    return work.at_real_site(folder, message, patience)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A site changes its process, which elsewhere ends with the step; this one goes on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every training that any site does, whatever process it stands for."""
    trained: list[str] = []
    real = Site.train

    def train(self: Site, plan: Plan) -> None:
        trained.append(f"{self.client.id}:{plan.round}")
        real(self, plan)

    monkeypatch.setattr(Site, "train", train)
    return trained


# --- asked again ---------------------------------------------------------------------------------


def test_a_plan_that_comes_twice_is_answered_from_the_store_by_a_new_process_too(
    tmp_path: Path, fits: list[str]
) -> None:
    """Code 5 after the answer: the instruction is repeated, nobody trains twice."""
    folder = site_folder(tmp_path / "a")
    first, second, _ = plans(folder)
    answers = [ask(folder, first), ask(folder, first), ask(folder, second), ask(folder, second)]
    assert answers[0] == answers[1] != answers[2] == answers[3]
    assert fits == ["a:1", "a:2"]


def test_a_repeated_plan_over_the_grid_trains_nobody_twice(tmp_path: Path, fits: list[str]) -> None:
    folders = [site_folder(tmp_path / name, name) for name in ("a", "b")]
    grid = InProcessGrid(client_app(), [{"site": str(folder)} for folder in folders])
    grid.fate = fates({(0, "1", 1): LOST, (1, "2", 1): LOST, (1, "2", 2): LOST})
    fed = coordinator(folders[0])
    rows = list(fed.run(2, backend=over(grid, ("a", "b"))))
    assert [row["clients_ok"] for row in rows] == [2, 2]
    assert sorted(fits) == ["a:1", "a:2", "b:1", "b:2"]


def coordinator(folder: Path) -> Any:
    place = public(folder)
    return federation(
        [Member("a"), Member("b")],
        proxy=place.proxy,
        classes=place.classes,
        quorum=2,
        seed=3,
        student=None,
    )


def test_an_older_plan_after_the_newer_is_refused(tmp_path: Path, fits: list[str]) -> None:
    folder = site_folder(tmp_path / "a")
    first, second, third = plans(folder)
    for message in (first, second, third):
        assert "upload" in ask(folder, message)
    assert ask(folder, first) == {"reason": "stale_round"}
    assert fits == ["a:1", "a:2", "a:3"]


def test_the_round_before_is_answered_again_with_the_same_bytes(
    tmp_path: Path, fits: list[str]
) -> None:
    """The coordinator fell back a generation: so does the site."""
    folder = site_folder(tmp_path / "a")
    first, second, third = plans(folder)
    told = [ask(folder, message) for message in (first, second, third)]
    assert ask(folder, second) == told[1]
    assert ask(folder, third) == told[2]
    assert fits == ["a:1", "a:2", "a:3"]


def test_two_runs_at_one_site_keep_separate_students(tmp_path: Path, fits: list[str]) -> None:
    """A1, B1, A2 in processes of their own give what A1, A2 give."""
    folder = site_folder(tmp_path / "a")
    apart = site_folder(tmp_path / "apart")
    a1, a2, _ = plans(folder)
    b1 = reseal(a1, run="other-run")
    alone = [ask(apart, a1), ask(apart, a2)]
    assert ask(folder, a1) == alone[0]
    other = ask(folder, b1)
    assert other == {"upload": reseal(alone[0]["upload"], run="other-run")}  # type: ignore[arg-type]
    assert ask(folder, a2) == alone[1]
    assert ask(folder, a2) == alone[1]
    assert ask(folder, b1) == other
    assert fits == ["a:1", "a:2", "a:1", "a:1", "a:2"]
    assert len(list((folder / "state" / "runs").iterdir())) == 2


def test_two_runs_at_one_living_site_keep_separate_students(tmp_path: Path) -> None:
    a1, a2, _ = plans(site_folder(tmp_path / "a"))
    b1, b2 = reseal(a1, run="other"), reseal(a2, run="other")
    alone = open_site(site_folder(tmp_path / "apart"))
    expected = [alone.answer(a1), alone.answer(a2)]
    place = open_site(tmp_path / "a")
    told = [place.answer(message) for message in (a1, b1, a2, b2)]
    assert [told[0], told[2]] == expected
    assert [told[1], told[3]] == [reseal(message, run="other") for message in expected]


@pytest.mark.parametrize("name", ["..", "a/b", "", "x" * 65, "a\nb", "/etc", ".hidden"])
def test_a_run_whose_name_is_no_folder_is_refused_and_makes_none(
    tmp_path: Path, name: str, fits: list[str]
) -> None:
    folder = site_folder(tmp_path / "a")
    message = reseal(plans(folder)[0], run=name)
    before = {path for path in tmp_path.rglob("*") if "state" not in path.parts}
    assert ask(folder, message) == {"reason": "run"}
    assert fits == []
    assert not (folder / "state" / "runs").exists()
    assert {path for path in tmp_path.rglob("*") if "state" not in path.parts} == before


# --- what leaves, and what is written down -------------------------------------------------------


class Leaky(Exception):
    """An error of foreign code, with a row in its text."""

    def __str__(self) -> str:
        return f"row 17: {SECRET}, 1953-02-11"


ERRORS: dict[str, tuple[Exception, str]] = {
    "foreign": (Leaky(), "failed"),
    "a key": (KeyError(SECRET), "failed"),
    "data": (DataError(f"{SECRET} is no number"), "data"),
    "state": (CheckpointError(SECRET), "state"),
    "ledger": (LedgerError(SECRET), "ledger"),
    "disk": (RunError(SECRET), "site"),
    "settings": (SettingsError([]), "settings"),
    "refusal": (Rejected("nonfinite", SECRET), "nonfinite"),
    "recursion": (RecursionError(SECRET), "failed"),
    "memory": (MemoryError(SECRET), "failed"),
}


@pytest.mark.parametrize("where", ["open", "train", "save"])
@pytest.mark.parametrize(("error", "code"), ERRORS.values(), ids=ERRORS)
def test_an_error_leaves_the_site_as_a_code_and_its_text_nowhere_at_all(
    error: Exception,
    code: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = site_folder(tmp_path / "a")
    message = plans(folder)[0]

    def fall(*anything: Any, **named: Any) -> None:
        raise error

    place = {"open": (work, "open_site"), "train": (Site, "train"), "save": (Site, "save")}[where]
    with monkeypatch.context() as patch, caplog.at_level("DEBUG"):
        patch.setattr(*place, fall)
        grid = InProcessGrid(client_app(), [{"site": str(folder)}])
        request = convert.request(convert.ROUND, FIRST, {"plan": message}, group="1", ttl=60)
        grid.push_messages([request])
        (answer,) = grid.pull_messages([request.metadata.message_id])
        assert convert.fields_of(answer) == {"reason": code}
        again = ask(folder, message)
        assert again == {"reason": code}
    out, err = capfd.readouterr()
    events = (folder / "state" / "events.jsonl").read_text()
    for text in (out, err, caplog.text, events, repr(grid.replies)):
        assert SECRET not in text
        assert "1953" not in text
    told = read_events(folder / "state" / "events.jsonl")[-1]
    assert told["event"] in {"step_failed", "step_refused"}
    assert "upload" in ask(folder, message)  # the next message finds a consistent state


def test_the_sites_own_log_tells_the_kind_of_an_error_and_where_it_arose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site_folder(tmp_path / "a")

    def fall(*anything: Any) -> None:
        raise Leaky

    monkeypatch.setattr(Site, "train", fall)
    ask(folder, plans(folder)[0])
    kind = read_events(folder / "state" / "events.jsonl")[-1]["kind"]
    assert kind.startswith("Leaky")
    assert "test_work.py" in kind


def test_an_error_of_a_users_own_site_leaves_no_text_either(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(node: Any, run: Any) -> Site:
        raise KeyError(SECRET)

    grid = InProcessGrid(client_app(broken), [{}])
    for kind, fields, said in (
        (convert.WHO, {}, {"site": ""}),
        (convert.ROUND, {"plan": b"x"}, {"reason": "failed"}),
    ):
        request = convert.request(kind, FIRST, fields, group="1", ttl=60)
        with caplog.at_level("DEBUG"):
            grid.push_messages([request])
        (answer,) = grid.pull_messages([request.metadata.message_id])
        assert convert.fields_of(answer) == said
    out, err = capfd.readouterr()
    assert SECRET not in out + err + caplog.text


def test_what_a_site_logs_of_a_round_it_answered(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "a")
    first, second, _ = plans(folder)
    ask(folder, first)
    ask(folder, second)
    told = [(e["event"], e.get("round")) for e in read_events(folder / "state" / "events.jsonl")]
    assert [entry for entry in told if entry[0] != "run_begun"] == [
        ("plan_received", 1),
        ("measured", 1),
        ("step_done", 1),
        ("plan_received", 2),
        ("measured", 2),
        ("step_done", 2),
    ]
    assert (folder / "state" / "events.jsonl").stat().st_mode & 0o777 == 0o600


def test_relative_paths_start_from_the_sites_folder_and_the_process_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site_folder(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert "upload" in ask(folder, plans(folder)[0])
    assert Path.cwd() == tmp_path
    assert (folder / "state" / "runs").is_dir()
    assert not (tmp_path / "state").exists()


# --- a site's own policy -------------------------------------------------------------------------


def test_a_stored_answer_is_not_measured_again(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "a")
    message = plans(folder)[0]
    ask(folder, message)
    ask(folder, message)
    told = [e["event"] for e in read_events(folder / "state" / "events.jsonl")]
    assert told.count("measured") == 1


def test_a_site_may_be_named_by_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site_folder(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert "upload" in ask(Path("a"), plans(folder)[0])


@pytest.mark.parametrize("limit", ["rounds = 1", "rows = 39"])
def test_the_sites_policy_wins_over_the_coordinators_request(
    tmp_path: Path, limit: str, fits: list[str]
) -> None:
    """Fault 57."""
    folder = site_folder(tmp_path / "a", extra=f"[policy]\n{limit}\n")
    first, second, _ = plans(folder)
    if limit.startswith("rounds"):
        assert "upload" in ask(folder, first)
    assert ask(folder, second) == {"reason": "policy"}
    assert fits == (["a:1"] if limit.startswith("rounds") else [])


def test_a_policy_that_allows_what_is_asked_changes_nothing(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "a", extra="[policy]\nrounds = 1\nrows = 40\nseconds = 600\n")
    plain = site_folder(tmp_path / "plain")
    first = plans(folder)[0]
    assert ask(folder, first) == ask(plain, first)


def test_a_plan_above_the_limit_is_refused_unread(tmp_path: Path, fits: list[str]) -> None:
    folder = site_folder(tmp_path / "a")
    assert ask(folder, bytes((64 << 20) + 1)) == {"reason": "too_large"}
    assert fits == []


def test_a_plan_above_the_agreed_limit_is_refused(tmp_path: Path, fits: list[str]) -> None:
    folder = site_folder(tmp_path / "a")
    text = (folder / "federation.toml").read_text()
    smaller = text.replace('device = "cpu"', 'device = "cpu"\nmax_message_mb = 0.001')
    (folder / "federation.toml").write_text(smaller)
    message = reseal(plans(folder)[0], bytes(2000))
    assert ask(folder, message) == {"reason": "too_large"}


BAD_PLANS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "other proxy rows": (lambda plan: reseal(plan, proxy="0" * 64), "proxy_version"),
    "other classes": (lambda plan: reseal(plan, classes="0" * 64), "class_map"),
    "cut short": (lambda plan: plan[:-20], "truncated"),
    "nothing": (lambda plan: b"", "truncated"),
    "round 0": (lambda plan: reseal(plan, round=0), "stale_round"),
    "a field more": (lambda plan: reseal(plan, rows=[1]), "fields"),
    "other rows than there are": (
        lambda plan: reseal(plan, ask={"seed": 1, "round": 1, "count": 5, "total": 41}),
        "shape",
    ),
}


@pytest.mark.parametrize(("change", "reason"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_a_plan_that_is_not_for_this_site_is_refused_before_any_training(
    change: Callable[[bytes], bytes], reason: str, tmp_path: Path, fits: list[str]
) -> None:
    """Faults 12, 13, 55 and 56, seen from the site."""
    folder = site_folder(tmp_path / "a")
    message = plans(folder)[0]
    assert ask(folder, change(message)) == {"reason": reason}
    assert fits == []
    assert "upload" in ask(folder, message)


# --- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(0.05, 600.0), (600.0, 0.05), (0.05, 0.0), (0.0, 0.05)])
def test_what_takes_too_long_is_broken_off_by_the_shortest_limit(
    limits: tuple[float, float],
) -> None:
    """No handler of ordinary exceptions stops it."""

    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(100)

    with pytest.raises(work.TooSlow), work.time_limit(limits[0]), work.time_limit(limits[1]):
        stubborn()


def test_code_that_hangs_where_no_python_runs_ends_with_its_process(tmp_path: Path) -> None:
    code = """
        import ctypes
        from fedistill.flower import work
        work.LAST_RESORT = 0.2
        lock = ctypes.create_string_buffer(256)
        with work.time_limit(600), work.time_limit(0.1):
            print("begun", flush=True)
            ctypes.CDLL(None).pthread_mutex_lock(lock)
            ctypes.CDLL(None).pthread_mutex_lock(lock)
        print("ended by itself", flush=True)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "begun\n")


def test_a_step_that_hangs_costs_the_site_the_round_and_not_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site_folder(tmp_path / "a", extra="[policy]\nseconds = 0.2\n")
    first, second, _ = plans(folder)
    expected = ask(site_folder(tmp_path / "twin"), first)
    with monkeypatch.context() as patch:
        patch.setattr(Site, "train", lambda self, plan: time.sleep(1000))
        assert ask(folder, first) == {"reason": "too_slow"}
    (folder / "site.toml").write_text((folder / "site.toml").read_text().replace("0.2", "0"))
    assert ask(folder, first) == expected
    assert "upload" in ask(folder, second)


def test_a_step_ends_when_nobody_waits_for_its_answer_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The life of the message is the limit where the site has none of its own."""
    folder = site_folder(tmp_path / "a")
    monkeypatch.setattr(Site, "train", lambda self, plan: time.sleep(1000))
    assert ask(folder, plans(folder)[0], patience=0.3) == {"reason": "too_slow"}


def test_a_timer_that_is_not_ours_never_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[float] = []
    monkeypatch.setattr(
        work.faulthandler, "dump_traceback_later", lambda after, exit: armed.append(after)
    )
    monkeypatch.setattr(work.faulthandler, "cancel_dump_traceback_later", armed.clear)
    outer = signal.setitimer(signal.ITIMER_REAL, 500.0)
    try:
        with work.time_limit(100):
            assert len(armed) == 1
        assert armed == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_without_a_limit_no_timer_is_set_and_an_outer_one_runs_on() -> None:
    outer = signal.setitimer(signal.ITIMER_REAL, 500.0)
    try:
        with work.time_limit(0):
            assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        with work.time_limit(1000):
            assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        with work.time_limit(100):
            assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        with pytest.raises(ZeroDivisionError), work.time_limit(100):
            _ = 1 / 0
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_the_time_that_passed_inside_counts_for_the_outer_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outer = signal.setitimer(signal.ITIMER_REAL, 100.0)
    try:
        with work.time_limit(50):
            signal.setitimer(signal.ITIMER_REAL, 10.0)  # 40 of the 50 seconds have passed
            monkeypatch.setattr(
                work.time, "monotonic", lambda real=work.time.monotonic: real() + 40
            )
        assert signal.getitimer(signal.ITIMER_REAL)[0] <= 61
    finally:
        monkeypatch.undo()
        signal.setitimer(signal.ITIMER_REAL, *outer)


# --- the disk ------------------------------------------------------------------------------------


def test_a_full_disk_at_a_site_is_a_code_and_the_next_round_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[str]
) -> None:
    """Fault 31: nothing leaves that is not stored, and nothing half-written stays."""
    folder = site_folder(tmp_path / "a")
    first, second, third = plans(folder)
    assert "upload" in ask(folder, first)
    before = sorted(path.name for path in (folder / "state" / "runs").rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", full)
        assert ask(folder, second) == {"reason": "site"}
    assert sorted(path.name for path in (folder / "state" / "runs").rglob("*")) == before
    assert "upload" in ask(folder, third)
    assert fits == ["a:1", "a:2", "a:3"]


def full(*anything: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", range(1, 4))
def test_a_disk_that_fills_up_at_any_write_leaves_a_site_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    folder = site_folder(tmp_path / "a")
    first, second, _ = plans(folder)
    twin = site_folder(tmp_path / "twin")
    expected = [ask(twin, first), ask(twin, second)]
    assert ask(folder, first) == expected[0]
    real, calls = Path.replace, []

    def replace(path: Path, target: Any) -> Path:
        calls.append(path)
        if len(calls) == call:
            full()
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        said = ask(folder, second)
    assert said in ({"reason": "site"}, expected[1])
    assert ask(folder, second) == expected[1]


@pytest.mark.parametrize("part", range(8))
def test_a_state_cut_short_at_any_eighth_is_the_generation_before(
    tmp_path: Path, part: int
) -> None:
    """Fault 33: and from it the same answer comes again."""
    folder = site_folder(tmp_path / "a")
    first, second, third = plans(folder)
    told = [ask(folder, message) for message in (first, second)]
    (state,) = (folder / "state" / "runs").glob("*/state")
    state.write_bytes(state.read_bytes()[: state.stat().st_size * part // 8])
    assert ask(folder, second) == told[1]
    assert "upload" in ask(folder, third)


def test_two_damaged_generations_are_said_by_a_code_and_not_begun_anew(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "a")
    first, second, third = plans(folder)
    ask(folder, first)
    ask(folder, second)
    (state,) = (folder / "state" / "runs").glob("*/state")
    for path in (state, store.previous(state)):
        path.write_bytes(b"FDstate\n" + bytes(100))
    assert ask(folder, third) == {"reason": "state"}


def test_proxy_rows_that_changed_on_the_disk_are_refused(tmp_path: Path, fits: list[str]) -> None:
    """Fault 53: without a fingerprint in the settings the plan's own tells."""
    folder = site_folder(tmp_path / "a")
    first, second, _ = plans(folder)
    assert "upload" in ask(folder, first)
    changed = proxy().inputs.copy()
    changed[3, 1] += 0.5
    np.savez(folder / "proxy.npz", inputs=changed)
    assert ask(folder, second) == {"reason": "proxy_version"}
    assert fits == ["a:1"]


def test_proxy_rows_that_changed_in_a_living_process_are_an_error_of_the_site(
    tmp_path: Path,
) -> None:
    people = Client("a", lambda: Saying(np.zeros((40, 3), "f4")), gaussian(9, 1))
    rows = ProxySet(proxy().inputs.copy())
    assert rows.fingerprint == rows.measure()
    site = Site.open(people, rows, CLASSES, MEAN, seed=3)
    site.keep_runs_in(tmp_path)
    server = Server(ProxySet(rows.inputs.copy()), CLASSES, None, MEAN, {"a": 8}, seed=3)
    rows.inputs.flags.writeable = True
    rows.inputs[0, 0] += 1

    def answering() -> Callable[[bytes], bytes]:
        return lambda message: work.answer_from_disk(site, message)

    assert work.respond(answering, server.plan(1).to_bytes()) == {"reason": "site"}


def test_a_folder_that_is_no_site_is_a_code(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = plans(site_folder(tmp_path / "a"))[0]
    assert ask(tmp_path / "empty", message) == {"reason": "settings"}


@pytest.mark.parametrize("missing", ["absent", "a file"])
def test_a_site_folder_that_is_not_there_is_a_code_and_no_exception(
    tmp_path: Path, missing: str
) -> None:
    """What escapes here, Flower would send to the coordinator with its text."""
    place = tmp_path / SECRET
    if missing == "a file":
        place.write_text("")
    message = plans(site_folder(tmp_path / "a"))[0]
    grid = InProcessGrid(client_app(), [{"site": str(place)}])
    request = convert.request(convert.ROUND, FIRST, {"plan": message}, group="1", ttl=60)
    grid.push_messages([request])
    (answer,) = grid.pull_messages([request.metadata.message_id])
    assert not answer.has_error()
    assert set(convert.fields_of(answer)) == {"reason"}
    assert SECRET.encode() not in b"".join(grid.replies)


def test_the_app_of_a_deployment_says_which_site_it_serves(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "x", "north-clinic")
    app = client_app()
    assert isinstance(app, ClientApp)
    InProcessGrid(app, [])
    context = Context(1, 5, {"site": str(folder)}, RecordDict(), {})
    answer = app(Message(RecordDict({"f": convert.ConfigRecord()}), 5, convert.WHO), context)
    assert convert.fields_of(answer) == {"site": "north-clinic"}


def test_the_state_of_flower_holds_nothing_of_ours(tmp_path: Path) -> None:
    """It is lost with every restart of a node, so nothing may depend on it."""
    folder = site_folder(tmp_path / "a")
    grid = InProcessGrid(client_app(), [{"site": str(folder)}])
    request = convert.request(convert.ROUND, FIRST, {"plan": plans(folder)[0]}, group="1", ttl=60)
    grid.push_messages([request])
    assert dict(grid.contexts[FIRST].state) == {}


def test_a_private_row_is_in_no_reply(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "a")
    upload = ask(folder, plans(folder)[0])["upload"]
    assert isinstance(upload, bytes)
    rows = gaussian(24, 41)
    for row in rows.inputs:
        for values in (row.tobytes(), row.astype("<f8").tobytes()):
            assert values not in upload
    assert json.dumps(str(folder)).encode() not in upload
    assert os.uname().nodename.encode() not in upload
    assert dataclasses.is_dataclass(open_site(folder))


# --- one upload for one round, whatever the coordinator asks -------------------------------------


def test_a_site_never_answers_one_round_with_two_uploads(tmp_path: Path) -> None:
    """Asked out of order, it repeats what it keeps, and refuses the rest: it never trains back."""
    folder = site_folder(tmp_path / "a")
    plan = plans(folder, 7)
    third, seventh = ask(folder, plan[2]), ask(folder, plan[6])
    assert ask(folder, plan[2]) == third
    assert ask(folder, plan[4]) == {"reason": "stale_round"}
    assert ask(folder, plan[6]) == seventh
    assert ask(folder, plan[0]) == {"reason": "stale_round"}


@pytest.mark.parametrize("patience", [float("nan"), float("inf"), 1e300, -1.0, 0.0])
def test_whatever_patience_comes_from_outside_the_step_is_done(
    patience: float, tmp_path: Path
) -> None:
    folder = site_folder(tmp_path / "a")
    assert "upload" in ask(folder, plans(folder, 1)[0], patience)


def test_a_site_may_name_its_rows_by_an_absolute_path(tmp_path: Path) -> None:
    folder = site_folder(tmp_path / "a")
    (folder / "rows.npz").rename(tmp_path / "elsewhere.npz")
    text = (folder / "site.toml").read_text()
    (folder / "site.toml").write_text(text.replace("npz:rows.npz", f"npz:{tmp_path}/elsewhere.npz"))
    assert "upload" in ask(folder, plans(folder, 1)[0])


def test_measuring_can_fail_without_the_upload_being_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site_folder(tmp_path / "a")

    def broken(*args: Any) -> Any:
        raise ValueError("4711")

    monkeypatch.setattr(work, "measure", broken)
    assert "upload" in ask(folder, plans(folder, 1)[0])
