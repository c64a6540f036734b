"""Sites that sleep: woken, they are what they were, to the bit; asleep, they are little or nothing.

The oracle is the same federation with all sites awake.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    INPUTS,
    federation,
    gaussian,
    held_out,
    participants,
    read_lines,
    timeless,
    write_settings,
)
from sklearn.tree import DecisionTreeClassifier

import fedistill as fd
from fedistill import dormant, experiment, models
from fedistill.backends import Reply, vectorized
from fedistill.backends.processes import Processes
from fedistill.backends.serial import Serial
from fedistill.backends.unreliable import unreliable
from fedistill.client import Client, Site
from fedistill.course import timetable
from fedistill.distill.recipe import Recipe
from fedistill.distill.rehearsal import continual_learner
from fedistill.dormant import Dormant, by_kind, most_awake, standing
from fedistill.errors import CheckpointError, DataError, FedistillError
from fedistill.federation import Federation
from fedistill.presets import method
from fedistill.settings import ContinualSettings
from fedistill.state_store import DiskStore, MemoryStore
from fedistill.streamed import Streamed
from fedistill.types import Rows
from fedistill.wire.messages import Plan

AWAKE = 2
SHARE = 0.5


def mixed(count: int = 3) -> list[Client]:
    """Torch students with all that they may remember, scikit-learn, and one without rows."""
    adam = Recipe(epochs=1, batch_size=16, optimizer="adam")
    careful = Recipe(epochs=1, batch_size=16, momentum=0.9, average=0.9, familiarity=True)
    people = participants(count)
    people += [
        Client("adam", people[0].build, gaussian(20, 5), training=adam),
        Client("careful", people[1].build, gaussian(20, 4), training=careful),
        Client(
            "tree",
            partial(DecisionTreeClassifier, max_depth=3, random_state=0),
            gaussian(20, 9),
        ),
        Client("learns", people[0].build, gaussian(0, 7)),
    ]
    return people


def streaming(objective: str = "der++") -> tuple[list[Client], Streamed]:
    """Clients whose rows change in round 3, with a memory and a detector."""
    how = ContinualSettings(objective=objective, buffer=12, drift="page-hinkley", quorum=2)
    people = []
    for number in range(5):
        parts = gaussian(20, number, (0, 1)), gaussian(20, 10 + number, (1, 2))
        people.append(
            Client(
                f"site-{number}",
                partial(models.MLP, INPUTS, 3, width=8),
                parts[0],
                training=Recipe(epochs=1, batch_size=8),
                course=timetable(parts, 2),
                make=partial(continual_learner, how, number),
            )
        )
    tests = gaussian(15, 90, (0, 1)), gaussian(15, 91, (1, 2))
    return people, Streamed(("one", "two"), tests, (2, 5))


def remembering(objective: str, number: int, people: tuple[str, ...] = ()) -> Client:
    """A client that remembers its rows, which are those of some people."""
    how = ContinualSettings(objective=objective, buffer=40)
    rows = gaussian(12, number)
    subject = np.resize(np.array(people), len(rows)) if people else None
    return Client(
        f"site-{number}",
        partial(models.Linear, INPUTS, 3),
        Rows(rows.inputs, rows.labels, subject=subject),
        training=Recipe(epochs=1, batch_size=8),
        make=partial(continual_learner, how, number),
    )


class Broken(Exception):
    """What ends a client in the middle of its training."""


@dataclass
class BreakingOff:
    """A backend of which one client trains in one round, and then raises."""

    name: str
    round: int

    def __call__(self, sites: Mapping[str, Site]) -> BreakingOff:
        self.sites = sites
        return self

    def run(self, plan: Plan) -> Iterator[Reply]:
        for name in plan.clients:
            site = self.sites[name]
            if (name, plan.round) == (self.name, self.round):
                begun = site.begin(plan.message(name))
                assert isinstance(begun, Plan)
                site.absorb(begun)
                site.train(begun)
                raise Broken
            yield Reply(name, site.answer(plan.message(name)))


def made(awake: int, people: list[Client] | None = None, **options: Any) -> Federation:
    given: dict[str, Any] = {"participation": SHARE, "quorum": 1, "awake": awake}
    return federation(people or mixed(), **(given | options))


def same_states(one: Mapping[str, Site], other: Mapping[str, Site]) -> None:
    assert list(one) == list(other)
    for name in one:
        mine, (arrays, facts) = one[name].packed(), other[name].packed()
        assert set(mine[0]) == set(arrays)
        for key in set(arrays) - {"upload"}:  # which names the run
            np.testing.assert_array_equal(mine[0][key], arrays[key])
        for each in (mine[1], facts):
            each.get("privacy", {}).clear()
        assert mine[1] | {"run": ""} == facts | {"run": ""}


def untimed(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of figures without seconds, those of an experience among them."""
    found = timeless(rows)
    for row in found:
        if "experience" in row:
            row["experience"] = timeless([row["experience"]])
    return found


def same(one: Federation, other: Federation, rounds: int = 3, **options: Any) -> None:
    """Both do the same, and their sites are the same when they are done."""
    assert isinstance(one.sites or {}, dict)
    rows = timeless(one.run(rounds, held_out(), **options))
    assert untimed(other.run(rounds, held_out(), **options)) == untimed(rows)
    assert isinstance(other.sites, Dormant)
    assert len(other.sites._awake) <= other.sites.awake
    assert other.server.digest() == one.server.digest()
    assert other.notes == one.notes
    same_states(one.sites, other.sites)


# --- the same bytes ------------------------------------------------------------------------------

METHODS = ("fedistill", "selective-fd", "scarlet", "fedmd", "local")


@pytest.mark.parametrize(
    ("name", "store"), [("fedistill", "memory"), *((name, "disk") for name in METHODS)]
)
def test_what_sleeping_sites_do_is_what_waking_ones_do(name: str, store: str) -> None:
    same(made(0, method=name), made(AWAKE, method=name, store=store))


@pytest.mark.parametrize("name", ["fd", "fedproto", "fedavg"])
def test_clients_that_exchange_tables_may_sleep(name: str) -> None:
    people = participants(6)[::2]
    same(made(0, people, method=name), made(1, people, method=name))


@pytest.mark.parametrize("backend", [vectorized.Vectorized, Processes(2)])
def test_on_every_backend(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorized, "WINDOW", 3)
    same(made(0), made(AWAKE), backend=backend)


@pytest.mark.parametrize("backend", [Serial, vectorized.Vectorized, Processes(2)])
def test_with_a_run_folder_the_files_of_the_sites_are_what_they_sleep_in(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectorized, "WINDOW", 3)
    one, other = made(0), made(AWAKE)
    rows = timeless(one.run(3, held_out(), out=tmp_path / "one", backend=backend))
    assert timeless(other.run(3, held_out(), out=tmp_path / "two", backend=backend)) == rows
    assert other.server.digest() == one.server.digest()
    same_states(one.sites, other.sites)
    assert read_lines(tmp_path / "one" / "rounds.jsonl") == read_lines(
        tmp_path / "two" / "rounds.jsonl"
    )
    assert isinstance(other.sites, Dormant)
    if backend is Serial:  # of other processes' clients the files are newer
        assert other.sites.rest._places == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("objective", "backend"),
    [
        pytest.param("er", Serial, marks=pytest.mark.slow),
        ("der++", Serial),
        pytest.param("der++", Processes(2), marks=pytest.mark.slow),
    ],
)
def test_streams_memories_and_detectors(objective: str, backend: Any) -> None:
    people, stream = streaming(objective)
    options = {"stream": stream, "alarm_quorum": 1, "participation": 0.8}
    one, other = made(0, people, **options), made(1, people, **options)
    same(one, other, 5, backend=backend)
    assert one.summary()["stream"] == other.summary()["stream"]


def test_bad_clients_that_copy_and_collude() -> None:
    def people() -> list[Client]:
        return fd.attacks.corrupt(
            participants(6), "free-rider-copy", 3, collude=True, classes=3, seed=1
        )

    same(made(0, people()), made(1, people()))


@pytest.mark.parametrize("lateness", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_clients_that_are_lost_and_late(lateness: int) -> None:
    backend = unreliable(Serial, seed=7, dropout=0.2, stragglers=0.5, lateness=lateness)
    how = method("fedistill", late=0.5)
    one, other = made(0, method=how), made(AWAKE, method=how)
    same(one, other, 6, backend=backend)
    assert sum(row["clients_late"] for row in other.history) > 0


@pytest.mark.parametrize("kept", [False, True])
def test_private_clients_and_their_ledgers(kept: bool, tmp_path: Path) -> None:
    """Noise is not of the seed, so it is the account that is compared, and what it let happen."""
    how = fd.Privacy(mechanism="dpsgd", epsilon=3.0, sample_rate=0.5, steps=2, sigma=2.0)
    feds = [made(awake, participants(3), privacy=how) for awake in (0, 1)]
    for number, fed in enumerate(feds):
        list(fed.run(2, out=tmp_path / str(number) if kept else None))
    told = [fed.summary()["privacy"] for fed in feds]
    for name, facts in told[0]["sites"].items():
        other = told[1]["sites"][name]
        assert facts | {"head": ""} == other | {"head": ""}
        assert other["releases"] == other["reservations"]
    assert feds[0].notes == feds[1].notes
    before = {name: site.learner.state_dict() for name, site in feds[1].sites.items()}
    for name, site in feds[1].sites.items():  # each has slept since
        for key, value in site.learner.state_dict().items():
            np.testing.assert_array_equal(value, before[name][key])
        assert site.account is not None
        assert site.account.spent() <= 3.0


def test_a_spent_budget_stays_spent_in_sleep() -> None:
    how = fd.Privacy(mechanism="dpsgd", epsilon=1.0, sample_rate=0.5, steps=2, sigma=1.0)
    fed = made(1, participants(4), privacy=how, participation=1.0)
    with pytest.raises(FedistillError, match="have spent"):
        list(fed.run(30))
    told = fed.summary()["privacy"]["sites"]
    assert [site["exhausted"] for site in told.values()] == [True] * 4


def test_more_rounds_than_were_planned_are_planned_anew_for_all(tmp_path: Path) -> None:
    how = fd.Privacy(mechanism="dpsgd", epsilon=3.0, sample_rate=0.5, steps=1, sigma=9.0)
    fed = made(1, participants(3), privacy=how)
    list(fed.run(1, out=tmp_path))
    list(fed.run(6, out=tmp_path))
    for site in fed.sites.values():
        assert site.account is not None
        assert site.account.terms.rounds == 6


# --- one object, one folder, several runs --------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "backend"),
    [
        (True, True, Serial),
        (True, False, Serial),
        (False, True, Serial),
        (False, False, Serial),
        (False, True, Processes(2)),
    ],
)
def test_one_object_goes_on_in_memory_or_in_a_folder(
    first: bool, second: bool, backend: Any, tmp_path: Path
) -> None:
    one, other = made(0), made(AWAKE)
    for fed, home in ((one, tmp_path / "one"), (other, tmp_path / "two")):
        list(fed.run(1, out=home / "a" if first else None))
        list(fed.run(3, out=home / "b" if second else None, backend=backend))
    assert timeless(one.history) == timeless(other.history)
    same_states(one.sites, other.sites)


@pytest.mark.parametrize("backend", [Serial, Processes(2)])
def test_a_run_that_was_broken_off_goes_on_to_the_same_end(backend: Any, tmp_path: Path) -> None:
    whole = made(0)
    rows = timeless(whole.run(4, held_out()))
    run = made(AWAKE).run(4, held_out(), out=tmp_path, backend=backend)
    for _ in range(2):
        next(run)
    run.close()
    again = made(1)
    list(again.run(4, held_out(), out=tmp_path, resume=True, backend=backend))
    assert timeless(again.history) == rows
    assert again.server.digest() == whole.server.digest()
    same_states(whole.sites, again.sites)


def test_a_stream_that_was_broken_off_goes_on_to_the_same_end(tmp_path: Path) -> None:
    people, stream = streaming()
    options = {"stream": stream, "alarm_quorum": 1, "participation": 0.8}
    whole, killed, again = (made(awake, people, **options) for awake in (0, 1, 1))
    rows = timeless(whole.run(5, held_out()))
    run = killed.run(5, held_out(), out=tmp_path)
    for _ in range(3):
        next(run)
    run.close()
    list(again.run(5, held_out(), out=tmp_path, resume=True))
    assert untimed(again.history) == untimed(rows)
    same_states(whole.sites, again.sites)


def test_killed_in_the_middle_of_a_round_it_resumes_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(0, participants(4))
    rows = timeless(whole.run(3, held_out()))
    real = os.fsync
    for fall in range(1, 30, 7):
        out, calls = tmp_path / str(fall), iter(range(1, 1000))

        def cut(handle: int, fall: int = fall, calls: Iterator[int] = calls) -> None:
            if next(calls) == fall:
                raise KeyboardInterrupt
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", cut)
            with pytest.raises(KeyboardInterrupt):
                list(made(1, participants(4)).run(3, held_out(), out=out))
        again = made(1, participants(4))
        list(again.run(3, held_out(), out=out, resume=True))
        assert timeless(again.history) == rows
        same_states(whole.sites, again.sites)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_after_a_client_broke_off_one_object_goes_on_as_if_nobody_slept(
    kept: bool, number: int, tmp_path: Path
) -> None:
    """Half a step is in the learner, and in no file; in round 1 the files are taken away."""
    feds = [made(awake, participants(5), participation=1.0) for awake in (0, AWAKE)]
    for fed in feds:
        out = tmp_path / str(fed._awake) if kept else None
        with pytest.raises(Broken):
            list(fed.run(3, out=out, backend=BreakingOff("site-2", number)))
        list(fed.run(3, held_out(), out=out))
    assert timeless(feds[0].history) == timeless(feds[1].history)
    same_states(feds[0].sites, feds[1].sites)


@pytest.mark.parametrize("kept", [False, True])
def test_who_paid_and_broke_off_has_paid(kept: bool, tmp_path: Path) -> None:
    how = fd.Privacy(mechanism="dpsgd", epsilon=3.0, sample_rate=0.5, steps=2, sigma=2.0)
    fed = made(1, participants(3), privacy=how, participation=1.0)
    with pytest.raises(Broken):
        list(fed.run(3, out=tmp_path if kept else None, backend=BreakingOff("site-1", 1)))

    def spent() -> float:
        account = fed.sites["site-1"].account
        assert account is not None
        return account.spent()

    before = spent()
    assert before > 0
    fed.sites["site-0"]
    assert spent() == before


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("backend", [Serial, Processes(2)])
def test_who_was_erased_before_a_first_round_stays_erased(
    backend: Any, kept: bool, tmp_path: Path
) -> None:
    def remembered(awake: int) -> dict[str, int]:
        fed = made(awake, [remembering("er", n, ("p0", "p1", "p2")) for n in range(3)])
        out = tmp_path / str(awake) if kept else None
        fed.sites = fed._sites(out)
        for name in fed.sites:
            fed.sites[name].erase("p1")
        list(fed.run(2, out=out, backend=backend))
        return {name: fed.sites[name].learner.replay.stats().rows for name in fed.sites}  # type: ignore[attr-defined]

    found = remembered(1)
    assert found == remembered(0)
    assert set(found.values()) <= {0, 8}
    assert any(found.values())


def test_the_file_of_another_run_is_not_taken_for_the_own_one(tmp_path: Path) -> None:
    fed = made(1, participants(3))
    list(fed.run(2, out=tmp_path))
    list(made(0, participants(3), seed=99).run(2, out=tmp_path))
    with pytest.raises(CheckpointError, match="of another run"):
        list(fed.run(4, out=tmp_path))


def test_a_folder_of_waking_sites_is_resumed_by_sleeping_ones_and_back(tmp_path: Path) -> None:
    whole = made(0)
    rows = timeless(whole.run(3))
    for rounds, awake in ((1, 0), (2, 1), (3, 0)):
        fed = made(awake)
        list(fed.run(rounds, out=tmp_path, resume=rounds > 1))
    for one, other in zip(timeless(fed.history), rows, strict=True):
        assert one["agreement"] == other["agreement"]
    same_states(whole.sites, fed.sites)


def test_a_state_that_is_damaged_while_its_site_sleeps_ends_the_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"participation": 1.0, "method": "ds-fl"}
    fed = made(1, participants(4), **options)
    run = fed.run(3, out=tmp_path)
    next(run)
    next(run)
    path = tmp_path / "sites" / "site-0" / "state"
    good, before = path.read_bytes(), path.with_name("state.previous")
    path.write_bytes(good[:-5])
    with pytest.raises(CheckpointError, match=r"state of round 2, found.*damaged.*--resume"):
        next(run)
    fed = made(1, participants(4), **options)
    run = fed.run(3, out=tmp_path, resume=True)  # which may go back to the generation before
    assert list(run)
    assert any("damaged" in note for note in fed.notes)
    path.write_bytes(good)
    assert isinstance(fed.sites, Dormant)
    with pytest.raises(CheckpointError, match=r"found that of round 2"):
        fed.sites["site-0"]
    path.unlink()
    before.unlink()
    with pytest.raises(CheckpointError, match=r"found none"):
        fed.sites["site-0"]


# --- who sleeps, and what is known of them -------------------------------------------------------


class Opened:
    """Opens sites of a federation and notes which."""

    def __init__(self, awake: int, count: int = 5) -> None:
        self.fed = federation(participants(count))
        self.names: list[str] = []
        people = {client.id: client for client in self.fed.clients}
        self.rest = MemoryStore()
        self.sites = Dormant(people, self.open, None, awake=awake, rest=self.rest)

    def open(self, client: Client, folder: Path | None) -> Site:
        self.names.append(client.id)
        return self.fed.site(client, folder)


def test_those_asked_for_last_stay_awake() -> None:
    opened = Opened(2)
    a, b, c = (f"site-{number}" for number in range(3))
    first = opened.sites[a]
    opened.sites[b]
    assert opened.sites[a] is first
    opened.sites[c]  # b was asked for longest ago
    assert opened.sites[a] is first
    opened.sites[b]
    assert opened.names == [a, b, c, b]
    opened.sites.at_least(3)
    for name in (a, b, c, a, b, c):
        opened.sites[name]
    assert opened.names == [a, b, c, b, c]


def test_who_never_took_part_leaves_nothing_behind() -> None:
    opened = Opened(1)
    assert [site.client.id for site in opened.sites.values()] == list(opened.sites)
    assert opened.sites._asleep == {}
    assert opened.rest._states == {}


def test_how_a_site_stands_is_known_while_it_sleeps() -> None:
    opened = Opened(1)
    plan = opened.fed.server.plan(1)
    assert standing(opened.sites, "site-0").round == 0
    opened.sites["site-0"].answer(plan.message("site-0"))
    broke = opened.sites["site-1"]
    broke.exhausted = broke.touched = True
    for _ in range(2):  # awake or asleep
        assert standing(opened.sites, "site-0").round == 1
        assert standing(opened.sites, "site-0").run == plan.run
        assert standing(opened.sites, "site-0").refusal is None
        assert standing(opened.sites, "site-1").exhausted
        opened.sites["site-2"]
    assert opened.names == ["site-0", "site-1", "site-2"]
    assert opened.sites["site-1"].exhausted
    assert set(opened.rest._states) == {"site-0", "site-1"}
    with pytest.raises(KeyError):
        opened.sites["nobody"]
    assert "nobody" not in opened.sites


def test_of_a_kind_one_site_is_woken_and_of_sites_in_memory_each_is_its_own() -> None:
    opened = Opened(2)
    kinds = [(list(names), site.client.id) for names, site in by_kind(opened.sites)]
    assert kinds == [
        (["site-0", "site-2", "site-4"], "site-0"),
        (["site-1", "site-3"], "site-1"),
    ]
    assert opened.names == ["site-0", "site-1"]
    awake = opened.fed._sites(None)
    assert [list(names) for names, _ in by_kind(awake)] == [[name] for name in awake]


def test_clients_that_remember_otherwise_are_of_another_kind() -> None:
    opened = Opened(2)
    people = [remembering(("er", "der++")[number % 2], number) for number in range(4)]
    opened.sites.settle(people, None)
    assert [list(names) for names, _ in by_kind(opened.sites)] == [
        ["site-0", "site-2"],
        ["site-1", "site-3"],
    ]


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_a_copy_of_all_sites_stays_what_it_was(store: str) -> None:
    fed = made(1, participants(3), store=store, participation=1.0)
    list(fed.run(1))
    before = copy.deepcopy(fed.sites)
    list(fed.run(2))
    assert [site.round for site in before.values()] == [1, 1, 1]
    assert [site.round for site in fed.sites.values()] == [2, 2, 2]


def test_a_round_wakes_those_whom_it_asks_and_nobody_else() -> None:
    fed = made(2, participants(12), participation=0.25)
    woken: list[str] = []
    real = fed.site

    def site(client: Client, folder: Path | None = None) -> Site:
        woken.append(client.id)
        return real(client, folder)

    fed.site = site  # type: ignore[method-assign]
    run = fed.run(6, measure_every=10)
    next(run)
    for _ in range(4):
        woken.clear()
        assert next(run)["clients_ok"] == 3
        assert len(woken) <= 3


def test_small_federations_are_awake_and_large_ones_are_not() -> None:
    assert most_awake(None, dormant.MANY) == 0
    assert most_awake(None, dormant.MANY + 1) == dormant.AWAKE
    assert most_awake(0, 10**6) == 0
    assert most_awake(5, 6) == 5
    assert most_awake(5, 5) == 0
    assert isinstance(federation(3)._sites(None), dict)
    with pytest.raises(DataError, match="awake: expected 0"):
        made(-1)


def test_of_many_clients_those_are_measured_that_were_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedistill.federation.MANY", 5)
    fed = made(2, participants(6))
    for row in fed.run(4, held_out()):
        assert len(row["client_accuracy"]) == 3
    everybody = made(2, participants(5))
    *_, row = everybody.run(4, held_out())
    assert len(row["client_accuracy"]) > 3


def test_settings_say_how_many_are_awake(tmp_path: Path) -> None:
    file = write_settings(tmp_path, rounds=2)
    one = experiment.run(file, out=tmp_path / "one")
    sleepy = ["backend.awake=1", 'backend.store="memory"']
    other = experiment.run(file, overrides=sleepy, out=tmp_path / "two")
    assert one["soft_targets_sha256"] == other["soft_targets_sha256"]
    assert one["cross"] == other["cross"]
    assert read_lines(tmp_path / "one" / "rounds.jsonl") == read_lines(
        tmp_path / "two" / "rounds.jsonl"
    )


def test_stores_may_be_chosen_by_name() -> None:
    kinds: dict[str, Callable[[], Any]] = {"disk": DiskStore, "memory": MemoryStore}
    for name, kind in kinds.items():
        sites = made(1, store=name)._sites(None)
        assert isinstance(sites, Dormant)
        assert isinstance(sites.rest, kind)  # type: ignore[arg-type]
