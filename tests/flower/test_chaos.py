"""Real SuperLink, SuperNodes and ServerApp under faults: the short forms of `chaos.py`.

Flower needs a minute to believe that a killed site is gone, so trials mostly wait. They run side
by side, three at a time, each in a process of its own; a test reads what its trial has seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from . import chaos, network

TOGETHER = 3
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def trial(name: str) -> Callable[[Any], Any]:
    """Says which trial a test reads."""

    def named(test: Any) -> Any:
        test.trial = name
        return test

    return named


@pytest.fixture(scope="session")
def trials(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Any]]]:
    """All trials that the chosen tests read, begun at once; one that fails tells its output."""
    place = tmp_path_factory.mktemp("chaos")

    def run(name: str) -> Any:
        out = place / f"{name}.json"
        command = [sys.executable, chaos.__file__, name, "--short", "--out", str(out)]
        done = subprocess.run(
            [*command, "--folder", str(place / name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-20_000:]
        return json.loads(out.read_text())

    functions = [getattr(item, "function", None) for item in request.session.items]
    names = dict.fromkeys(name for one in functions if (name := getattr(one, "trial", None)))
    with ThreadPoolExecutor(TOGETHER) as pool:
        runs = {name: pool.submit(run, name) for name in names if reason_against(name) is None}
        yield runs
        for waiting in runs.values():
            waiting.cancel()


@pytest.fixture
def seen(request: pytest.FixtureRequest, trials: dict[str, Future[Any]]) -> Any:
    """What the trial of this test has seen."""
    name = request.function.trial
    if reason := reason_against(name):
        pytest.skip(reason)
    return trials[name].result()


def reason_against(name: str) -> str | None:
    """Why a trial cannot be run here, or None."""
    if name == "hosts":
        return network.available() or (None if chaos.nginx() else "nginx is not installed")
    if name == "sick-sites":
        return None if os.geteuid() == 0 else "a disk that fills up needs root"
    return None


def test_the_journal_tells_two_answers_of_one_site_in_one_round(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    same = {"run": "r", "round": 1, "site": "a", "sha": "x"}
    chaos.note(journal, what="answered", **same)
    chaos.note(journal, what="arrived", **same)
    assert chaos.two_answers(journal) == []
    chaos.note(journal, what="arrived", **same | {"sha": "y"})
    assert chaos.two_answers(journal) == ["a round 1"]


@trial("kills")
def test_killed_site_superlink_and_coordinator_change_nothing(seen: Any) -> None:
    assert seen["rounds"] == 2
    assert seen["two_answers"] == []
    assert seen["given"] >= 6
    assert seen["dropped"] == {}
    assert seen["starts"]["superlink"] > 1
    assert seen["faults"] == ["coordinator die-combining 2"]
    assert seen["resumed"] >= 2
    # Every upload arrived in every round, so that the kills left no trace.
    assert seen["uploads"] == seen["expected"]["uploads"]
    assert seen["targets"] == seen["expected"]["targets"]
    assert seen["student"] == seen["expected"]["student"]


@trial("failing-sites")
def test_a_site_that_hangs_or_dies_answers_when_it_is_asked_again(seen: Any) -> None:
    assert seen["rounds"] == 2
    # The one whose state was erased holds nothing of what it is told as changes: it says so, and is
    # told all of it in the next round.
    assert seen["dropped"] == {"2": {"e": "reference"}}
    assert sorted(seen["faults"]) == ["a hang 2", "b die-training 2", "c die-saved 2"]
    for site in "abc":
        assert seen["asked"].count(f"{site} 2") == 2
    assert [one for one in seen["two_answers"] if not one.startswith("e")] == []
    # Of all others came what would have come anyway.
    expected = seen["expected"]["uploads"]
    assert {one for one in expected if seen["uploads"].get(one) != expected[one]} == {"e 2"}


@trial("private")
def test_no_ledger_is_charged_twice_for_a_release_and_nothing_leaves_without_a_charge(
    seen: Any,
) -> None:
    assert seen["rounds"] == 3
    assert seen["two_answers"] == []
    assert {f"{site} {kind} 2" for site, kind in chaos.DEATHS.items()} <= set(seen["faults"])
    assert "coordinator die-combining 3" in seen["faults"]
    assert seen["dropped"] == {}
    for site, book in seen["books"].items():
        assert (book["twice"], book["unpaid"], book["unknown"]) == ([], [], []), site
        assert book["released"] == 3, site
        assert book["charged"] >= 3, site
        assert book["epsilon"] == pytest.approx(book["told"]), site
        assert book["epsilon"] <= 8
        assert book["head"], site
        assert "released" in book["log"], site
    # What was computed and lost stays charged; what was saved is sent, and costs nothing again.
    assert [seen["books"][site]["charged"] for site in "abcd"] == [4, 4, 3, 3]


@trial("intruders")
def test_who_is_not_of_the_federation_gets_nothing_and_leaves_nothing(seen: Any) -> None:
    assert seen["rounds"] == 2
    assert seen["answered"] == ["a", "b"]
    assert seen["dropped"] == {"1": {"c": "conflict"}, "2": {"c": "conflict"}}
    assert set(seen["plans"].values()) == {0}
    assert "[code: 2004] Failed to activate SuperNode." in seen["said"]["unregistered"]
    assert any("ApiError:2004" in line for line in seen["superlink"])
    assert any("CERTIFICATE_VERIFY_FAILED" in line for line in seen["said"]["other-authority"])
    assert any("Connection attempt failed" in line for line in seen["said"]["plain-text"])


@trial("bad-messages")
def test_bad_uploads_cost_their_sender_the_round_and_nobody_else(seen: Any) -> None:
    assert seen["rounds"] == 3
    assert seen["dropped"] == {
        "1": {"c": "deadline", "e": "truncated"},
        "2": {"d": "stale_round", "e": "too_large"},
    }
    assert seen["late_work_done"] == 1
    assert seen["late_counted"] == 0
    assert {f"{site} 3" for site in "abcde"} <= set(seen["answered"])


@trial("sick-sites")
def test_a_wrong_clock_a_full_disk_and_nan_keep_only_their_site_out(seen: Any) -> None:
    assert seen["rounds"] == 4
    assert seen["two_answers"] == []
    assert {f"{site} {number}" for site in "ab" for number in range(1, 5)} <= set(seen["answered"])
    assert {"c 1", "c 4", "d 1", "d 3", "d 4"} <= set(seen["answered"])  # healed, they are back
    assert seen["dropped"]["2"]["d"] == "site"
    assert not any(one.startswith("e") for one in seen["answered"])


@trial("hosts")
def test_hosts_of_their_own_talk_to_the_coordinator_alone(seen: Any) -> None:
    assert seen["rounds"] == 3
    assert seen["dropped"] == {}
    assert set(map(str, seen["elsewhere"].values())) == {"{}"}
    assert seen["targets"] == seen["expected"]["targets"]
