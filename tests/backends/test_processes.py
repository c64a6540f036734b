"""Worker processes: the bytes of the serial backend, whoever dies; nobody is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from builders import federation, held_out, participants, read_lines, timeless, write_settings
from sklearn.tree import DecisionTreeClassifier

import fedistill as fd
from fedistill import experiment, models
from fedistill.backends import Reply
from fedistill.backends.processes import Pool, Processes, deal
from fedistill.client import Client, Site
from fedistill.distill.recipe import Recipe
from fedistill.errors import FedistillError, LedgerError, RunError, SettingsError
from fedistill.log import read_events
from fedistill.wire.messages import Failure, Plan

STREAM = """
[stream]
experiences = 2
shift = "class-incremental"
[continual]
objective = "der++"
buffer = 30
drift = "page-hinkley"
quorum = 2
"""


def mixed() -> list[Client]:
    """Torch and scikit-learn, rows of all sizes, one client without any."""
    people = participants(4)
    tree = partial(DecisionTreeClassifier, max_depth=3, random_state=0)
    people.append(Client("tree", tree, builders.gaussian(20, 9)))
    people.append(Client("linear", models.logistic_regression, builders.gaussian(18, 8)))
    people.append(Client("learns", people[0].build, builders.gaussian(0, 7)))
    return people


def same_states(one: Mapping[str, Site], other: Mapping[str, Site]) -> None:
    for name, site in one.items():
        mine, (arrays, facts) = site.packed(), other[name].packed()
        assert set(mine[0]) == set(arrays)
        for key in set(arrays) - {"upload"}:
            np.testing.assert_array_equal(mine[0][key], arrays[key])
        assert mine[1] | {"run": ""} == facts | {"run": ""}


# --- the same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedistill", "ds-fl", "selective-fd"])
def test_every_figure_target_and_weight_is_that_of_the_serial_backend(method: str) -> None:
    alone, dealt = federation(mixed(), method=method), federation(mixed(), method=method)
    rows = timeless(alone.run(3, held_out()))
    assert timeless(dealt.run(3, held_out(), backend=Processes(workers=2))) == rows
    assert dealt.server.digest() == alone.server.digest()
    same_states(alone.sites, dealt.sites)


def test_one_object_goes_on_here_and_there() -> None:
    alone, dealt = federation(4), federation(4)
    assert timeless(dealt.run(2, held_out())) == timeless(alone.run(2, held_out()))
    assert timeless(dealt.run(5, held_out(), backend=Processes(3))) == timeless(
        alone.run(5, held_out())
    )
    assert timeless(dealt.run(6, held_out())) == timeless(alone.run(6, held_out()))


@pytest.mark.parametrize("method", ["centralised", "fedavg", "fedproto"])
def test_whatever_is_exchanged(method: str) -> None:
    people = [Client(f"s{k}", participants(1)[0].build, builders.gaussian(20, k)) for k in range(3)]
    options = {"method": method, "student": people[0].build}
    alone, dealt = federation(people, **options), federation(people, **options)
    rows = timeless(alone.run(2, held_out()))
    assert timeless(dealt.run(2, held_out(), backend=Processes(workers=2))) == rows
    assert dealt.server.digest() == alone.server.digest()


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ("", []),
        ("", ["clients.dropout=0.1", "clients.stragglers=0.3", "clients.quorum=1", "seed=5"]),
        (STREAM, []),
        ('[attack]\nkind = "label-flip"\ncount = 1\n', ["evaluation.baselines=['local']"]),
    ],
    ids=["plain", "losses", "stream", "attack"],
)
def test_a_settings_file_gives_the_same_run_folder(
    more: str, changes: list[str], tmp_path: Path
) -> None:
    file = write_settings(tmp_path, more=more)
    experiment.run(file, overrides=changes, out=tmp_path / "serial")
    there = [*changes, "backend.name=processes", "backend.workers=2"]
    experiment.run(file, overrides=there, out=tmp_path / "processes")
    homes = [tmp_path / "serial", tmp_path / "processes"]
    told = [json.loads((home / "summary.json").read_text()) for home in homes]
    for summary in told:
        for key in ("seconds", "backend", "stream"):
            summary.pop(key, None)
    assert told[0] == told[1]
    lines = [read_lines(home / "rounds.jsonl") for home in homes]
    assert lines[0] == lines[1]
    if more == STREAM:
        stream = [read_lines(home / "stream.jsonl") for home in homes]
        assert len(stream[0]) == 2
        assert stream[0] == stream[1]


def test_private_clients_spend_the_same_and_keep_one_ledger_each(tmp_path: Path) -> None:
    how = fd.Privacy(mechanism="dpsgd", epsilon=3.0, sample_rate=0.5, steps=2)
    alone, dealt = federation(3, privacy=how), federation(3, privacy=how)
    list(alone.run(2, out=tmp_path / "serial"))
    list(dealt.run(2, out=tmp_path / "processes", backend=Processes(2)))
    facts = []
    for fed in (alone, dealt):
        told = fed.summary()["privacy"]
        for site in told["sites"].values():
            assert site.pop("head")
        facts.append(told)
    assert facts[0]["epsilon_max"] == pytest.approx(facts[1]["epsilon_max"])
    assert facts[0]["sites"] == facts[1]["sites"]
    assert facts[1]["sites"]["site-0"]["releases"] == 2


@pytest.mark.parametrize("second", ["b", None])
def test_sites_that_sleep_in_one_folder_go_on_in_another_or_in_none(
    second: str | None, tmp_path: Path
) -> None:
    feds = [federation(participants(8), participation=0.5, awake=awake) for awake in (0, 2)]
    for number, fed in enumerate(feds):
        home = tmp_path / str(number)
        list(fed.run(2, out=home / "a"))
        list(fed.run(4, out=second and home / second, backend=Processes(workers=2)))
    assert timeless(feds[0].history) == timeless(feds[1].history)
    same_states(feds[0].sites, feds[1].sites)


def test_private_clients_without_a_folder_are_refused() -> None:
    how = fd.Privacy(mechanism="dpsgd", epsilon=3.0)
    with pytest.raises(RunError, match="run folder"):
        list(federation(3, privacy=how).run(1, backend=Processes(2)))


def test_clients_are_dealt_alike_in_kind_and_size_and_always_so() -> None:
    fed = federation(8)
    fed.sites = {client.id: fed.site(client) for client in fed.clients}
    hands = deal(fed.sites, 2)
    kinds = [sorted(int(name[-1]) % 2 for name in names) for names in hands]
    assert kinds == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert hands == deal(fed.sites, 2)
    assert [len(names) for names in deal(fed.sites, 99)] == [1] * 8


# --- what goes wrong -----------------------------------------------------------------------------


class Shot:
    """The pool, one of whose workers is killed when some reply of some round has come."""

    def __init__(self, sites: Mapping[str, Site], number: int, reply: int, victim: int) -> None:
        self.inner = Pool(sites, 2)
        self.number, self.reply, self.victim = number, reply, victim

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        if plan.round == self.number and not self.reply:
            self.shoot()
        for count, reply in enumerate(self.inner.run(plan), 1):
            if (plan.round, count) == (self.number, self.reply):
                self.shoot()
            yield reply

    def shoot(self) -> None:
        os.kill(self.inner.numbers[self.victim], signal.SIGKILL)


@pytest.mark.parametrize(("number", "reply", "victim"), [(1, 1, 0), (2, 0, 1), (3, 3, 1)])
def test_a_worker_killed_in_mid_round_is_replaced_and_the_bytes_are_the_same(
    number: int, reply: int, victim: int, tmp_path: Path
) -> None:
    alone, dealt = federation(mixed()), federation(mixed())
    rows = timeless(alone.run(3, held_out()))
    shot = partial(Shot, number=number, reply=reply, victim=victim)
    with fd.log.events_to(tmp_path / "events.jsonl"):
        found = timeless(dealt.run(3, held_out(), out=tmp_path / "run", backend=shot))
    assert found == rows
    assert dealt.server.digest() == alone.server.digest()
    same_states(alone.sites, dealt.sites)
    died = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "worker_died"]
    assert [entry["reason"] for entry in died] == ["exit:-9"]


def test_a_worker_killed_without_a_run_folder_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"exit code -9.*out=FOLDER"):
        list(federation(4).run(3, backend=partial(Shot, number=2, reply=1, victim=0)))


def test_a_model_that_raises_ends_the_run_with_its_trace(tmp_path: Path) -> None:
    people = [
        *participants(2),
        Client("bad", partial(builders.Saying, builders.sulking), held_out()),
    ]
    for out in (None, tmp_path):
        with pytest.raises(ValueError, match="no logits for 40 rows") as caught:
            list(federation(people, method="ds-fl").run(2, out=out, backend=Processes(2)))
        assert "in sulking" in caught.value.__notes__[0]


def test_an_error_of_ours_comes_back_as_itself(tmp_path: Path) -> None:
    how = fd.Privacy(mechanism="dpsgd", epsilon=3.0, sample_rate=0.5, steps=2)
    fed = federation(3, privacy=how)
    list(fed.run(1, out=tmp_path))
    (tmp_path / "sites" / "site-1" / "ledger.sqlite").write_bytes(b"nothing of the kind" * 99)
    again = federation(3, privacy=how)
    with pytest.raises(LedgerError):
        list(again.run(2, out=tmp_path, resume=True, backend=Processes(2)))


def test_what_a_site_refuses_is_its_failure_and_no_more() -> None:
    nan = np.full((40, 3), np.nan, dtype=np.float32)
    people = [*participants(3), Client("nan", partial(builders.Saying, nan), held_out())]
    alone, dealt = federation(people, method="ds-fl"), federation(people, method="ds-fl")
    rows = timeless(alone.run(2, backend=builders.Serial))
    assert timeless(dealt.run(2, backend=Processes(2))) == rows
    assert rows[0]["dropped"] == {"nan": "nonfinite"}


def test_a_factory_without_a_name_is_refused_at_the_start() -> None:
    people = [*participants(2), Client("mine", lambda: models.Linear(4, 3), held_out())]
    with pytest.raises(FedistillError, match="found by their name"):
        list(federation(people).run(1, backend=Processes(2)))


def test_workers_need_a_whole_number(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="workers"):
        experiment.run(write_settings(tmp_path), overrides=["backend.workers=-1"], out=tmp_path)


def test_an_unguarded_script_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(builders.__file__).parent)!r})\n"
        "import builders\n"
        "from fedistill.backends.processes import Processes\n"
        "list(builders.federation(3).run(1, backend=Processes(2)))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 1
    assert 'if __name__ == "__main__"' in done.stderr.splitlines()[-1]


# --- nobody is left behind -----------------------------------------------------------------------


def members_of(session: int) -> list[str]:
    """Processes of a session that are not dead yet."""
    told = subprocess.run(
        ["ps", "-s", str(session), "-o", "stat=,args="], capture_output=True, text=True, check=False
    )
    return [line for line in told.stdout.splitlines() if not line.startswith("Z")]


def until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "sent",
    [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM, signal.SIGKILL],
)
def test_whatever_ends_a_run_ends_its_workers_and_it_can_be_resumed(
    sent: signal.Signals, tmp_path: Path
) -> None:
    file, out = write_settings(tmp_path, rounds=40), tmp_path / "run"
    command = [sys.executable, "-m", "fedistill.cli", "run", str(file), "--out", str(out)]
    command += ["--backend", "processes", "--set", "backend.workers=2"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        lines = out / "rounds.jsonl"
        until(lambda: lines.exists() and lines.read_text().count("\n") >= 2)
        assert len(members_of(process.pid)) >= 4  # the run, two workers, what they are forked off
        os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
        assert process.wait(30) == (-9 if sent == signal.SIGKILL else 130)
        until(lambda: not members_of(process.pid), 20)
    finally:
        if members_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    done = len(read_lines(lines))
    assert done < 40
    goal = f"rounds={min(done + 2, 40)}"
    again = ["backend.name=processes", "backend.workers=2", goal]
    found = experiment.run(file, overrides=again, out=out, resume=True)
    expected = experiment.run(file, overrides=[goal], out=tmp_path / "serial")
    assert found["soft_targets_sha256"] == expected["soft_targets_sha256"]
    assert read_lines(lines) == read_lines(tmp_path / "serial" / "rounds.jsonl")


@pytest.mark.slow
def test_workers_killed_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    people = [
        Client(
            f"site-{k}",
            partial(models.MLP, builders.INPUTS, 3, width=16),
            builders.gaussian(60 + k, k),
            training=Recipe(epochs=20, batch_size=8),
        )
        for k in range(6)
    ]
    alone = federation(people)
    rows = timeless(alone.run(4, held_out()))
    random, died = np.random.default_rng(5), 0
    for turn in range(12):
        dealt = federation(people)
        shot = partial(
            Shot,
            number=int(random.integers(1, 5)),
            reply=int(random.integers(0, 6)),
            victim=int(random.integers(0, 2)),
        )
        with fd.log.events_to(tmp_path / f"{turn}.jsonl"):
            found = timeless(dealt.run(4, held_out(), out=tmp_path / str(turn), backend=shot))
        assert (turn, found) == (turn, rows)
        assert dealt.server.digest() == alone.server.digest()
        died += sum(e["event"] == "worker_died" for e in read_events(tmp_path / f"{turn}.jsonl"))
    assert died >= 10
