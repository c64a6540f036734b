"""The status of a run and of a site: what it says, on paper and over HTTP, and to whom."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedistill import status
from fedistill.errors import RunError, SettingsError
from fedistill.log import event, events_to
from fedistill.privacy.audit_log import AuditLog
from fedistill.status import RunStatus, Server, SiteStatus, facts, health, lines, page, read_status
from fedistill.status import folder as reading

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer's, about click
    from fedistill import cli

SITES = ["clinic-a", "clinic-b", "clinic-c"]


class Folder:
    """A run folder that is written as a run writes it."""

    def __init__(self, path: Path, sites: list[str] = SITES, rounds: int = 4, extra: str = ""):
        self.path = path
        self.sites = sites
        self.rows: list[dict] = []
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.toml").write_text(f"rounds = {rounds}\n{extra}")

    def log(self, name: str, **fields: object) -> None:
        with events_to(self.path / "events.jsonl", run="ab12"):
            event(name, **fields)

    def start(self) -> Folder:
        self.log("run_started", rounds=4, sites=self.sites, method="ds-fl", version="0.2")
        return self

    def ask(self, number: int, *, lost: dict[str, str] | None = None, asked: list | None = None):
        asked = self.sites if asked is None else asked
        self.log("round_started", round=number, attempt=0, asked=asked)
        for site in asked:
            if lost and site in lost:
                if lost[site]:
                    self.log("dropped", round=number, site=site, reason=lost[site])
            else:
                self.log("answered", round=number, site=site, bytes_up=1000, seconds=1.5)

    def close(self, number: int, seconds: float = 2.0) -> None:
        row = {
            "round": number,
            "student_accuracy": 0.5 + number / 10,
            "client_accuracy_mean": 0.4,
            "bytes_up": 3000,
            "bytes_down": 6000,
            "clients_ok": 3,
            "clients_failed": 0,
            "seconds": seconds,
            "client_accuracy": {"clinic-a": 0.123456},
        }
        self.rows.append(row)
        (self.path / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.rows))
        self.log("round_done", round=number, accuracy=row["student_accuracy"], seconds=seconds)

    def done(self, number: int, **options: object) -> Folder:
        self.ask(number, **options)
        self.close(number)
        return self

    def summary(self, **facts: object) -> None:
        (self.path / "summary.json").write_text(json.dumps(facts))

    def read(self, later: float = 0.0) -> RunStatus:
        found = read_status(self.path, now=lambda: time.time() + later)
        assert isinstance(found, RunStatus)
        return found


@pytest.fixture
def made(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "trial")


def site_of(found: RunStatus, name: str) -> status.Attendance:
    return next(site for site in found.sites if site.site == name)


# --- the state of a run --------------------------------------------------------------------------


def test_a_run_waits_until_its_first_round_begins_however_long(made):
    assert made.read().state == "waiting"
    assert made.start().read(later=1e6).state == "waiting"
    made.log("round_started", round=1, attempt=0, asked=SITES)
    found = made.read()
    assert (found.state, found.round, found.current, found.rounds) == ("running", 0, 1, 4)


def test_figures_of_a_running_run(made):
    found = made.start().done(1).done(2).read(later=30)
    assert (found.state, found.round, found.rounds, found.current) == ("running", 2, 4, None)
    assert (found.name, found.run, found.method) == ("trial", "ab12", "ds-fl")
    assert (found.accuracy, found.seconds) == (0.7, 4.0)
    assert (found.bytes_up, found.bytes_down) == (6000, 12000)
    assert found.idle == pytest.approx(30, abs=2)
    assert [row["round"] for row in found.recent] == [1, 2]
    assert not found.cut
    assert found.answering == 3


@pytest.mark.parametrize(
    ("event_name", "state"),
    [("run_done", "done"), ("run_failed", "failed"), ("run_interrupted", "interrupted")],
)
def test_how_a_run_ended_and_that_it_may_go_on(event_name, state, made):
    made.start().done(1)
    made.log(event_name, round=1, **({"reason": "quorum"} if state == "failed" else {}))
    found = made.read(later=1e6)
    assert (found.state, found.current) == (state, None)
    assert found.reason == ("quorum" if state == "failed" else "")
    made.summary(status=state)
    os.utime(made.path / "summary.json", (0, 0))
    made.log("run_resumed", rounds=4, sites=SITES, method="ds-fl")
    assert made.read().state == "running"


@pytest.mark.parametrize(
    ("told", "state", "reason"),
    [("done", "done", ""), ("failed:quorum", "failed", "quorum"), ("interrupted",) * 2 + ("",)],
)
def test_a_summary_tells_the_end_where_the_event_was_lost(told, state, reason, made):
    made.start().done(1)
    made.summary(status=told)
    assert (made.read().state, made.read().reason) == (state, reason)
    (made.path / "events.jsonl").unlink()
    assert (made.read().state, made.read().sites) == (state, ())


def test_an_older_summary_does_not_end_a_run_that_goes_on(made):
    made.summary(status="failed:quorum")
    os.utime(made.path / "summary.json", (0, 0))
    assert made.start().done(1).read().state == "running"


@pytest.mark.parametrize(
    ("extra", "slowest", "limit"),
    [
        ("", 2, 120),
        ("", 200, 400),
        ("[deployment]\ndeadline = 600.0\n", 200, 720),
        ("[deployment]\ndeadline = 600.0\n", 500, 1000),
    ],
)
def test_a_run_has_stalled_after_twice_its_slowest_round_or_the_deadline(
    extra, slowest, limit, tmp_path
):
    made = Folder(tmp_path / "run", extra=extra).start()
    made.ask(1)
    made.close(1, seconds=slowest)
    made.ask(2)
    made.close(2, seconds=1)
    assert made.read(later=limit - 5).state == "running"
    assert made.read(later=limit + 5).state == "stalled"


def test_a_clock_that_was_set_back_is_no_stall(made):
    found = made.start().done(1).read(later=-1e6)
    assert (found.state, found.idle) == ("running", 0)


def test_torn_lines_and_files_are_survived(made):
    made.start().done(1)
    for name in ("rounds.jsonl", "events.jsonl"):
        with (made.path / name).open("a") as file:
            file.write('{"round": 2, "stu')
    (made.path / "summary.json").write_text('{"status": "do')
    (made.path / "config.toml").write_text("rounds = = 4")
    found = made.read()
    assert (found.state, found.round, found.rounds) == ("running", 1, 4)


def test_figures_that_are_no_numbers_are_missing(made):
    (made.path / "rounds.jsonl").write_text(
        '{"round": 1, "student_accuracy": "high", "bytes_up": null, "seconds": NaN}\n[]\n{}\n'
    )
    found = made.read()
    assert (found.round, found.accuracy, found.bytes_up, found.seconds) == (1, None, 0, 0)
    json.dumps(facts(found), allow_nan=False)


def test_of_several_seeds_the_one_that_goes_on_is_shown(made):
    for seed in (7, 8):
        Folder(made.path / f"seed-{seed}").start().done(1)
    assert made.read().name == "seed-8"
    made.close(1)
    assert made.read().name == "trial"


# --- the sites of a run --------------------------------------------------------------------------


def test_what_each_site_did(made):
    made.start().done(1).done(2, lost={"clinic-b": "stale_round"})
    found = made.done(3, lost={"clinic-b": "", "clinic-c": "not_probs"}).read()
    a, b, c = found.sites
    assert (a.site, a.answered, a.missed, a.reason, a.bytes_up) == ("clinic-a", 3, 0, "", 3000)
    assert a.seconds == 1.5
    assert (b.answered, b.missed, b.reason) == (1, 2, "stale_round (round 2)")
    assert (c.answered, c.missed, c.reason, c.bytes_up) == (2, 1, "not_probs (round 3)", 2000)
    assert found.answering == 1


def test_a_site_that_was_not_asked_has_not_missed(made):
    made.start().done(1, lost={"clinic-c": "none"})
    found = made.done(2, asked=["clinic-a", "clinic-b"]).read()
    assert site_of(found, "clinic-c").missed == 1


def test_a_round_that_goes_on_is_missed_only_once_it_is_lost(made):
    made.start().done(1)
    made.log("round_started", round=2, attempt=0, asked=SITES)
    assert [site.missed for site in made.read().sites] == [0, 0, 0]
    made.log("dropped", round=2, site="clinic-b", reason="truncated")
    assert [site.missed for site in made.read().sites] == [0, 1, 0]
    made.log("round_started", round=2, attempt=1, asked=SITES)
    made.log("answered", round=2, site="clinic-b", bytes_up=10, seconds=1.0)
    found = site_of(made.read(), "clinic-b")
    assert (found.missed, found.answered, found.bytes_up) == (0, 2, 1010)


def test_a_second_answer_that_is_dropped_does_not_undo_the_first(made):
    made.start().done(1)
    made.log("dropped", round=1, site="clinic-a", reason="duplicate")
    found = site_of(made.read(), "clinic-a")
    assert (found.missed, found.reason) == (0, "duplicate (round 1)")


def test_a_sender_that_is_not_enrolled_gets_no_line(made):
    made.start().done(1)
    for number in range(50):
        made.log("dropped", round=1, site=f"stranger-{number}", reason="unknown_client")
    assert [site.site for site in made.read().sites] == SITES


def test_events_of_another_run_in_the_same_folder_do_not_count(made):
    made.start().done(1, lost={"clinic-a": "truncated"})
    with events_to(made.path / "events.jsonl", run="cd34"):
        event("run_started", rounds=4, sites=SITES)
        event("round_started", round=1, asked=SITES)
        event("answered", round=1, site="clinic-a", bytes_up=5, seconds=0.1)
    found = made.read()
    assert found.run == "cd34"
    assert [site.bytes_up for site in found.sites] == [5, 0, 0]


def test_a_log_without_its_beginning_says_so(made, monkeypatch):
    made.start().done(1).done(2)
    monkeypatch.setattr(reading, "LAST_EVENTS", 4)
    found = made.read()
    assert found.cut
    assert [site.bytes_up for site in found.sites] == [1000, 1000, 1000]
    assert "The oldest events are gone" in "\n".join(lines(found))
    assert "The oldest events are gone" in page(found)


# --- privacy budgets -----------------------------------------------------------------------------


def spend(made: Folder, **spent: object) -> None:
    made.rows[-1] |= {"epsilon": spent, "epsilon_max": max(spent.values(), default=None)}
    told = "".join(json.dumps(row) + "\n" for row in made.rows)
    (made.path / "rounds.jsonl").write_text(told)


def test_what_each_site_has_spent_and_whose_budget_is_gone(made):
    made.start().done(1)
    spend(made, **{"clinic-a": 1.25, "clinic-b": 1.5, "clinic-c": 1.0})
    made.done(2, lost={"clinic-b": "budget_exhausted"})
    spend(made, **{"clinic-a": 2.5, "clinic-b": 1.5, "clinic-c": 2.0})
    a, b, c = made.read().sites
    assert [site.epsilon for site in (a, b, c)] == [2.5, 1.5, 2.0]
    assert [site.exhausted for site in (a, b, c)] == [False, True, False]
    text = "\n".join(lines(made.read()))
    assert "epsilon 2.5" in text
    assert re.search(r"clinic-b .* 1\.5, budget spent +budget_exhausted \(round 2\)", text)
    assert re.search(r"round +student +clients +least +agree +epsilon", text)
    shown = page(made.read())
    assert "1.5, budget spent" in shown
    assert "of the site that spent most; the budget of 1 site is spent" in shown
    told = facts(made.read())
    assert told["sites"][1]["epsilon"] == 1.5
    assert told["sites"][1]["exhausted"] is True
    assert told["recent"][-1]["epsilon_max"] == 2.5


def test_a_site_that_answers_again_has_a_budget_again(made):
    made.start().done(1, lost={"clinic-b": "budget_exhausted"}).done(2)
    assert not site_of(made.read(), "clinic-b").exhausted


def test_without_budgets_nothing_is_said_of_them(made):
    found = made.start().done(1).read()
    assert "epsilon" not in "\n".join(lines(found)) + page(found)
    assert [site.epsilon for site in found.sites] == [None, None, None]


@pytest.mark.parametrize("junk", [1, "x", [], {"clinic-a": "x"}, {"clinic-a": None}, None])
def test_junk_in_place_of_losses_is_nothing(junk, made):
    made.start().done(1)
    made.rows[-1]["epsilon"] = junk
    (made.path / "rounds.jsonl").write_text(json.dumps(made.rows[-1]) + '\n{"epsilon": {"cli')
    assert made.read().sites[0].epsilon is None


def test_a_site_shows_its_own_budget_from_its_audit_log(site):
    at_site(site, *step(1))
    assert "epsilon" not in "\n".join(lines(site_state(site)))
    log = AuditLog(site / "state" / "audit-log.jsonl")
    log.append("run_begun", run="ab12", limit=3.0)
    log.append("charged", run="ab12", round=1, epsilon=1.25, sigma=1.0)
    log.append("released", run="ab12", round=1, sha256="00")
    found = site_state(site)
    assert (found.epsilon, found.limit, found.exhausted) == (1.25, 3.0, False)
    assert "epsilon 1.25 of 3" in "\n".join(lines(found))
    log.append("exhausted", run="ab12", round=2, epsilon=2.9, limit=3.0)
    found = site_state(site)
    assert (found.epsilon, found.exhausted) == (2.9, True)
    assert "the budget is spent" in page(found)
    json.dumps(facts(found), allow_nan=False)


def test_a_spent_budget_is_no_failure_of_the_site(site):
    refusal = ("step_refused", {"round": 2, "reason": "budget_exhausted"})
    at_site(site, *step(1), refusal, refusal, refusal)
    found = site_state(site)
    assert (found.state, found.reason) == ("running", "round 2 refused: budget_exhausted")


# --- a site --------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    home = tmp_path / "clinic-a"
    home.mkdir()
    (home / "site.toml").write_text('id = "clinic-a"\n')
    return home


def at_site(home: Path, *told: tuple[str, dict]) -> None:
    with events_to(home / "state" / "events.jsonl", run="ab12"):
        for name, fields in told:
            event(name, **fields)


def step(number: int) -> list[tuple[str, dict]]:
    return [
        ("plan_received", {"round": number, "bytes_down": 500}),
        ("measured", {"round": number, "accuracy": 0.6 + number / 100}),
        ("step_done", {"round": number, "bytes_up": 1000, "seconds": 3.0}),
    ]


def site_state(home: Path, later: float = 0.0) -> SiteStatus:
    found = read_status(home, now=lambda: time.time() + later)
    assert isinstance(found, SiteStatus)
    return found


def test_a_site_tells_what_it_answered_and_sent(site):
    assert site_state(site).state == "waiting"
    at_site(site, *step(1), *step(2), ("step_refused", {"round": 2, "reason": "stale_round"}))
    found = site_state(site)
    assert (found.name, found.run, found.state, found.round) == ("clinic-a", "ab12", "running", 2)
    assert (found.bytes_up, found.bytes_down, found.seconds) == (2000, 1000, 6)
    assert [row["accuracy"] for row in found.recent] == [0.61, 0.62]
    assert (found.accuracy, found.reason) == (0.62, "round 2 refused: stale_round")


def test_an_answer_that_is_sent_again_is_one_round_and_twice_the_bytes(site):
    at_site(site, *step(1), step(1)[0], step(1)[2])
    found = site_state(site)
    assert (len(found.recent), found.bytes_up, found.accuracy) == (1, 2000, 0.61)


def test_a_broken_step_is_a_failure_until_the_next_one_is_done(site):
    at_site(site, step(1)[0], ("step_failed", {"round": 1, "kind": "MemoryError at a.py:3"}))
    found = site_state(site)
    assert (found.state, found.reason) == ("failed", "round 1 failed: MemoryError at a.py:3")
    at_site(site, *step(2))
    assert site_state(site).state == "running"


def test_a_refusal_is_in_order_and_three_in_a_row_are_not(site):
    refusal = ("step_refused", {"round": 1, "reason": "proxy_version"})
    at_site(site, *step(1), refusal, refusal)
    assert site_state(site).state == "running"
    at_site(site, refusal)
    assert site_state(site).state == "failed"


def test_a_step_beyond_the_deadline_has_stalled_and_a_pause_between_rounds_has_not(site):
    at_site(site, *step(1))
    assert site_state(site, later=1e6).state == "running"
    at_site(site, step(2)[0])
    assert site_state(site, later=700).state == "running"
    assert site_state(site, later=730).state == "stalled"
    (site / "federation.toml").write_text("[deployment]\ndeadline = 60.0\n")
    assert site_state(site, later=190).state == "stalled"


def test_a_site_forgets_the_run_before(site):
    at_site(site, *step(1))
    with events_to(site / "state" / "events.jsonl", run="cd34"):
        event("run_begun")
    found = site_state(site)
    assert (found.run, found.round, found.state) == ("cd34", 0, "waiting")


# --- folders of other things ---------------------------------------------------------------------


def test_a_folder_that_is_neither_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for name, found in [("none", "nothing there"), ("file", "a file"), ("", "another folder")]:
        with pytest.raises(RunError) as caught:
            read_status(tmp_path / name)
        text = str(caught.value)
        assert f"site folder (site.toml), found {found}: {tmp_path / name}" in text
        assert text.endswith("name the folder of 'fedistill run --out', or a site's own")
        assert "\n" not in text


def test_a_folder_that_may_not_be_read_is_told(made, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunError, match=r"found one that cannot be read \(Permission denied\)"):
        made.read()


# --- showing -------------------------------------------------------------------------------------

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=y>', "a\x1b[2J\u202eb", "x" * 5000]


class Balanced(HTMLParser):
    """Fails on tags that do not match, and notes what a browser would run or load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen |= {tag, *(name for name, _ in attrs)}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_escapes_what_sites_call_themselves_and_loads_nothing(tmp_path):
    made = Folder(tmp_path / "<b>run", sites=HOSTILE).start()
    made.done(1, lost=dict.fromkeys(HOSTILE, "<i>"))
    made.log("run_failed", round=1, reason="<u>")
    text = page(made.read())
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert not parser.seen & {"script", "img", "link", "iframe", "src", "href", "b", "i", "u"}
    assert not re.search(r"https?://|@import|url\(|\x1b|\u202e", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert max(map(len, re.findall("x+", text))) <= 64
    assert '<meta http-equiv="refresh" content="5">' in text


def test_the_terminal_gets_no_control_characters(tmp_path):
    made = Folder(tmp_path / "run", sites=HOSTILE).start().done(1)
    shown = lines(made.read())
    assert all(line.isprintable() for line in shown)
    assert max(map(len, shown)) < 200


def test_lines_name_state_rounds_sites_and_bytes(made):
    made.start().done(1).done(2, lost={"clinic-b": "stale_round"})
    shown = lines(made.read())
    assert shown[0] == "trial: running · 2 of 4 rounds done"
    assert shown[1].startswith("sites 2/3 · accuracy 70.0% · up 6.00 kB · down 12.0 kB")
    text = "\n".join(shown)
    assert re.search(r"clinic-b +round 1 +1 +1\.00 kB +1\.5 s +stale_round \(round 2\)", text)
    assert re.search(r"\n +2 +70\.0%", text)


def test_lines_and_page_of_a_site(site):
    at_site(site, *step(1), ("step_failed", {"round": 2, "kind": "KeyError"}))
    shown = "\n".join(lines(site_state(site)))
    assert shown.startswith("clinic-a: failed (it gave up) · answered round 1\n")
    assert "last trouble: round 2 failed: KeyError" in shown
    assert re.search(r"\n +1 +61\.0% +1\.00 kB +3 s", shown)
    parser = Balanced()
    parser.feed(page(site_state(site)))
    assert not parser.open


@pytest.mark.parametrize("state", status.STATES)
def test_health_is_ok_while_nobody_needs_to_look(state):
    told = health(RunStatus(name="r", state=state, round=2, rounds=4, idle=1.234))
    assert told == {
        "status": "failing" if state in {"stalled", "failed", "interrupted"} else "ok",
        "state": state,
        "round": 2,
        "rounds": 4,
        "sites_answering": 0,
        "seconds_since_last_event": 1.2,
    }


def test_an_answer_names_no_figure_of_a_client(made):
    """A client's accuracy is its own: the status repeats what the coordinator's report has not."""
    made.start().done(1)
    assert "0.123" not in json.dumps(facts(made.read())) + page(made.read())


# --- over HTTP -----------------------------------------------------------------------------------


@contextlib.contextmanager
def served(folder, host="127.0.0.1"):
    with Server(folder, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path="/", method="GET"):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_page_health_and_status_are_served_with_fixed_headers(made):
    made.start().done(1)
    with served(made.path) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{server.server_port}/"
        for path, kind in [
            ("/", "text/html"),
            ("/?x=1", "text/html"),
            ("/health", "application/json"),
            ("/status.json", "application/json"),
        ]:
            code, headers, body = ask(server, path)
            assert code == 200
            assert headers == {
                "Cache-Control": "no-store",
                "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
                "frame-ancestors 'none'",
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(body.encode())),
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
            }
        assert "<td>round 1</td>" in ask(server, "/")[2]
        assert json.loads(ask(server, "/health")[2])["sites_answering"] == 3
        told = json.loads(ask(server, "/status.json")[2])
        assert (told["kind"], told["bytes_up"], len(told["sites"])) == ("run", 3000, 3)


def test_everything_else_is_not_found_or_not_allowed(made):
    made.start().done(1)
    with served(made.path) as server:
        for path in ("/config.toml", "/../", "/%2e%2e/", "/health/", "/<script>", "/x" * 99):
            code, headers, body = ask(server, path)
            assert (code, body) == (404, "not found\n")
            assert "Server" not in headers
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "<B>"):
            code, headers, body = ask(server, "/", method)
            assert (code, headers["Allow"], body) == (405, "GET, HEAD", "method not allowed\n")
        code, headers, body = ask(server, "/", "HEAD")
        assert (code, body) == (200, "")
        assert int(headers["Content-Length"]) > 1000


def test_a_malformed_request_gets_an_answer_without_echo(made):
    made.start()
    with (
        served(made.path) as server,
        socket.create_connection(server.server_address[:2], timeout=10) as line,
    ):
        line.sendall(b"GET / <script> HTTP/9.9\r\n\r\n")
        told = line.makefile("rb").read()
    assert told.startswith(b"HTTP/1.0 505 ")
    assert b"script" not in told
    assert b"nosniff" in told


@pytest.mark.parametrize(("end", "code"), [("run_done", 200), ("run_failed", 503)])
def test_health_has_the_status_code_that_supervisors_read(end, code, made):
    made.start().done(1)
    made.log(end, round=1)
    with served(made.path) as server:
        assert ask(server, "/health")[0] == code
        assert ask(server, "/health", "HEAD")[0] == code
        assert ask(server, "/")[0] == 200


def test_a_folder_that_goes_away_is_503_and_a_sentence(made, monkeypatch):
    monkeypatch.setattr("fedistill.status.server.FRESH", -1.0)
    with served(made.path) as server:
        assert ask(server, "/health")[0] == 200
        made.path.rename(made.path.with_name("moved"))
        code, _, body = ask(server, "/health")
    assert code == 503
    assert json.loads(body)["error"].startswith("expected a run folder")


def test_many_requests_read_the_folder_once_a_second(made, monkeypatch):
    read = []
    real = read_status
    monkeypatch.setattr(
        "fedistill.status.server.read_status", lambda folder: read.append(1) or real(folder)
    )
    with served(made.path) as server:
        for _ in range(5):
            ask(server)
    assert len(read) <= 3


def test_a_client_that_hangs_up_prints_nothing(made, capsys):
    with served(made.path) as server:
        for _ in range(5):
            with socket.create_connection(server.server_address[:2]) as line:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                line.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert ask(server)[0] == 200
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")


def test_an_address_in_use_and_a_folder_without_a_run_are_sentences(made, tmp_path):
    with served(made.path) as server, pytest.raises(RunError, match="Address already in use"):
        Server(made.path, "127.0.0.1", server.server_port)
    with pytest.raises(RunError, match="expected an address to listen on, found no-such-host"):
        Server(made.path, "no-such-host.invalid", 0)
    with pytest.raises(RunError, match="expected a run folder"):
        Server(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (":8090", ("127.0.0.1", 8090)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::]:80", ("::", 80)),
        ("coordinator.example:65535", ("coordinator.example", 65535)),
    ],
)
def test_an_address_to_listen_on(text, found):
    assert status.address(text) == found


@pytest.mark.parametrize(
    "text", ["", "8090", "a:", "a:b", ":70000", "::1:80", "[::1]", ":-1", ":²"]
)
def test_what_is_no_address_is_a_sentence(text):
    with pytest.raises(SettingsError, match=r"--serve: expected HOST:PORT"):
        status.address(text)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["status", *map(str, arguments)])
        told = capsys.readouterr()
        return leaving.value.code, told.out, told.err

    yield run
    signal.signal(signal.SIGTERM, before)


def test_the_command_prints_lines_or_json(call, made, site):
    made.start().done(1)
    code, out, err = call(made.path)
    assert (code, err) == (0, "")
    assert out.startswith("trial: running")
    code, out, _ = call(made.path, "--json")
    assert (code, json.loads(out)["health"]["state"]) == (0, "running")
    code, out, _ = call(site)
    assert (code, out.splitlines()[0]) == (
        0,
        "clinic-a: waiting · no round answered yet",
    )


def test_watching_ends_with_the_run(call, made, monkeypatch):
    made.start().done(1)
    monkeypatch.setattr(time, "sleep", lambda seconds: made.log("run_done", round=1))
    code, out, err = call(made.path, "--watch")
    assert (code, err) == (0, "")
    states = re.findall(r"^trial: (\w+)", out, flags=re.MULTILINE)
    assert states == ["running", "done"]


def test_watching_ends_with_ctrl_c_and_promises_no_resume(call, made, monkeypatch):
    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", stop)
    code, _, err = call(made.path, "--watch")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("options", "expected", "told"),
    [
        ([], 3, "expected a run folder"),
        (["--json"], 3, "expected a run folder"),
        (["--watch"], 3, "expected a run folder"),
        (["--serve", ":0"], 3, "expected a run folder"),
        (["--serve", "nowhere"], 2, "expected HOST:PORT"),
        (["--json", "--watch"], 2, "found several"),
    ],
)
def test_bad_input_is_a_sentence_and_an_exit_code(options, expected, told, call, tmp_path):
    code, out, err = call(tmp_path / "none", *options)
    assert (code, out) == (expected, "")
    assert err.startswith("fedistill: ")
    assert told in err


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_serving_in_a_process_ends_cleanly(end, made):
    made.start().done(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedistill", "status", str(made.path), "--serve", ":0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    with process:
        told = process.stdout.readline()
        port = int(re.fullmatch(r"status page: http://127\.0\.0\.1:(\d+)/\n", told)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(end)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def test_status_needs_no_torch():
    code = (
        "import sys, fedistill.status; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
