"""Methods with a memory over Flower: targets that are kept, deltas both ways, sites that are away.

Every site works from its own folder, as `deploy init` wrote it, and is opened anew for each
message: what it remembers is what it has on disk. What must come of it is what the serial backend
makes of the same rows with the same participation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import timeless
from flwr.app import Message

from fedistill import config
from fedistill.assembly import assemble, method_of
from fedistill.backends import Reply
from fedistill.backends.serial import Serial
from fedistill.client import Site
from fedistill.deployment import open_site
from fedistill.experiment import rows_of
from fedistill.federation import Federation
from fedistill.flower import backend as backend_module
from fedistill.flower import client_app, convert
from fedistill.flower.bundle import SIMULATION
from fedistill.flower.founding import write_deployment
from fedistill.wire.envelope import count_bits
from fedistill.wire.messages import Failure, Plan

from . import chaos
from .grid import (
    DELIVER,
    DROP,
    FALL,
    FIRST,
    LOST,
    Clock,
    Fate,
    Fates,
    InProcessGrid,
    fates,
    over,
)

SITES = ("north", "south", "west")
MISSED = frozenset({3, 4})
"""Rounds that `west` misses; two of three are a quorum."""
ROUNDS = 8
FEWER = 6
"""Rounds of tests in which all is over by then."""
SETTINGS = """
seed = 5
rounds = 8
[data]
source = "digits"
test_rows = 20
[proxy]
rows = 60
per_round = 20
[clients]
alpha = 1.0
labelled = 40
width = 8
epochs = 1
batch_size = 20
quorum = 2
[student]
width = 8
epochs = 1
[backend]
device = "cpu"
"""
METHODS = {
    "scarlet": 'preset = "scarlet"\ncache_rounds = 3\n',
    "fedmd": 'preset = "fedmd"\n',
    "cfd": 'preset = "cfd"\n',
    "default": 'preset = "fedistill"\n',
    "default, kept": 'preset = "fedistill"\ncache_rounds = 3\n',
}
EVERY = pytest.mark.parametrize("name", ["scarlet", "fedmd", "cfd", "default"])
CACHED = pytest.mark.parametrize("name", ["scarlet", "cfd", "default"])
Found = Callable[..., Path]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A site changes its process, which elsewhere ends with the step; this one goes on."""
    monkeypatch.setattr("fedistill.federation.time.sleep", lambda seconds: None)
    monkeypatch.setattr(backend_module, "RECOVERY", 0.01)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    faulthandler.cancel_dump_traceback_later()


# --- the real thing ------------------------------------------------------------------------------


class Scale(InProcessGrid):
    """The grid; it weighs plans as they leave and uploads as they come, by round."""

    def weigh(self, seen: Callable[[int, Plan], None]) -> None:
        """Begin; ``seen`` is told of each upload: number of the node, and the plan it answers."""
        self.seen = seen
        self.down: Counter[int] = Counter()
        self.up: Counter[int] = Counter()
        self.said: dict[tuple[int, int], set[bytes]] = {}

    def _push(self, message: Message) -> str | None:
        if message.metadata.message_type == convert.ROUND:
            self.down[int(message.metadata.group_id)] += len(convert.plan_of(message))
        return super()._push(message)

    def _answer(self, message: Message) -> Message:
        answer = super()._answer(message)
        if message.metadata.message_type == convert.ROUND:
            upload = convert.fields_of(answer).get("upload")
            node, number = message.metadata.dst_node_id - FIRST, int(message.metadata.group_id)
            if isinstance(upload, bytes):
                self.up[number] += len(upload)
                self.said.setdefault((node, number), set()).add(upload)
                self.seen(node, Plan.from_bytes(convert.plan_of(message)))
        return answer


class Real:
    """A federation of real sites over the grid, each in its folder.

    Args:
        folder: what `deploy init` wrote.
        fate: what befalls messages; None: nothing does.
    """

    def __init__(self, folder: Path, fate: Fates | None = None) -> None:
        self.folder = folder
        with contextlib.chdir(folder / "coordinator"):
            self.fed = assembled(Path("federation.toml"))
        nodes = [{"site": str(folder / "sites" / name)} for name in SITES]
        self.grid = Scale(client_app(), nodes, fate=fate or fates({}))
        self.grid.weigh(self.compare)
        self.opened = {name: open_site(folder / "sites" / name).site for name in SITES}
        self.compared = 0

    def rounds(
        self, count: int = ROUNDS, away: Collection[int] = (), **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Run; `west` is offline in some rounds. After each, both sides hold what they believe."""
        self._attend(1, away)
        given = {"backend": over(self.grid, SITES, grace=20.0)} | options
        for row in self.fed.run(count, **given):
            self.agree()
            yield row
            self._attend(row["round"] + 1, away)

    def _attend(self, number: int, away: Collection[int]) -> None:
        west = FIRST + SITES.index("west")
        if number in away:
            self.grid.online.discard(west)
        else:
            self.grid.online.add(west)

    def site(self, name: str, number: int) -> Site:
        """A site as its disk has it."""
        path = self.folder / "sites" / name / "state" / "runs" / self.fed.server.run / "state"
        if not path.exists():
            return open_site(self.folder / "sites" / name).site
        site = self.opened[name]
        site.path = path
        site.restore(self.fed.server.run, number)
        return site

    def compare(self, node: int, plan: Plan) -> None:
        """A site has answered: it learned from what the server published in the round before."""
        if plan.targets is None:
            return
        server, site = self.fed.server, self.site(SITES[node], plan.round)
        assert server.targets is not None
        rows = plan.targets.rows()
        published = server.cache.latest.probs(rows) if server.cache else server.targets.probs()
        np.testing.assert_array_equal(site.targets[rows], published)
        assert (site.stamp[rows] == server.round).all()
        if server.method.teach == "targets":
            np.testing.assert_array_equal(site.targets[rows], server.table[rows])
        self.compared += len(rows)

    def agree(self) -> None:
        """A round is over: what a site is believed to hold it holds, and the other way round."""
        server = self.fed.server
        if server.cache is None or server.heard is None:
            return
        cache, heard = server.cache, server.heard
        for name, believed in cache.held.items():
            site = self.site(name, server.round)
            assert site.told is not None
            assert site.said is not None
            held = believed > 0
            assert (site.told.round[held] > 0).all()
            for shelf in (cache.latest, cache.before):
                same = held & (believed == shelf.round)
                np.testing.assert_array_equal(site.told.codes[same], shelf.codes[same])
            if name in heard.shelves:
                site.said.learn(heard.last[name])
                np.testing.assert_array_equal(site.said.shelf.codes, heard.shelves[name].codes)
                np.testing.assert_array_equal(site.said.shelf.round, heard.shelves[name].round)


def assembled(file: Path) -> Federation:
    settings = config.load(file)
    return assemble(settings, rows_of(settings), method_of(settings))


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What `deploy init` writes for some settings: once, as keys take their time."""
    place = tmp_path_factory.mktemp("deployments")
    written: dict[str, Path] = {}

    def template(text: str) -> Path:
        if text not in written:
            written[text] = place / str(len(written))
            write_deployment(written[text], SITES, config.parse(text))
        return written[text]

    return template


@pytest.fixture
def founded(tmp_path: Path, templates: Callable[[str], Path]) -> Found:
    """A deployment for a method, and for so large a quorum."""

    def found(method: str, quorum: int = 2) -> Path:
        text = SETTINGS.replace("quorum = 2", f"quorum = {quorum}")
        return shutil.copytree(templates(f"{text}[method]\n{method}"), tmp_path / "d")

    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[InProcessGrid], None]:
    """Let no real time pass while a site is waited for."""

    def wind(grid: InProcessGrid) -> None:
        monkeypatch.setattr(backend_module, "time", Clock(grid))

    return wind


# --- what must come of it ------------------------------------------------------------------------


class Absent:
    """The serial backend, without one site in some rounds.

    Args:
        sites: the clients at work.
        reason: why nothing came: `offline` (it was not asked), `no plan` (that got lost) or
            `no answer` (that got lost: the site has learned, and nobody knows).
        away: the rounds.
        name: whose.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        reason: str,
        away: Collection[int] = MISSED,
        name: str = "west",
    ) -> None:
        self.serial, self.reason, self.away, self.name = Serial(sites), reason, away, name

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        if plan.round not in self.away:
            yield from self.serial.run(plan)
            return
        if self.reason == "no answer":
            list(self.serial.run(dataclasses.replace(plan, clients=(self.name,))))
        here = tuple(name for name in plan.clients if name != self.name)
        yield from self.serial.run(dataclasses.replace(plan, clients=here))
        yield Failure(self.name, plan.round, self.reason, asked=int(self.reason != "offline"))


def alike(
    folder: Path, backend: Callable[[Mapping[str, Site]], Any] = Serial, rounds: int = ROUNDS
) -> tuple[Federation, list[dict[str, Any]]]:
    """The same federation as a simulation."""
    fed = assembled(folder / SIMULATION)
    return fed, list(fed.run(rounds, backend=backend))


def figures(rows: list[dict[str, Any]], *without: str) -> list[dict[str, Any]]:
    """Rows but for what only a simulation can measure, or what differs by nature."""
    left = ("round", "bytes_up", "bytes_down", "clients_ok", "clients_failed", "agreement", "flags")
    told = [name for name in (*left, "target_entropy", "dropped") if name not in without]
    return [{name: row[name] for name in told} for row in timeless(rows)]


@pytest.mark.parametrize("name", METHODS)
def test_real_sites_give_the_bytes_of_the_serial_backend(name: str, founded: Found) -> None:
    folder = founded(METHODS[name])
    real, (plain, expected) = Real(folder), alike(folder)
    rows = list(real.rounds())
    assert real.fed.server.digest() == plain.server.digest()
    assert figures(rows) == figures(expected)
    assert {row["clients_ok"] for row in rows} == {3}
    assert weights(rows) == (real.grid.up, real.grid.down)
    assert real.compared > 0


def weights(rows: list[dict[str, Any]]) -> tuple[dict[int, int], dict[int, int]]:
    """Bytes up and down as they were reported, by round."""
    up, down = ({row["round"]: row[way] for row in rows} for way in ("bytes_up", "bytes_down"))
    return up, down


@EVERY
@pytest.mark.parametrize("reason", ["offline", "no plan", "no answer"])
def test_a_site_that_misses_two_rounds_leaves_what_the_serial_backend_leaves(
    name: str, reason: str, founded: Found, clock: Callable[[InProcessGrid], None]
) -> None:
    """And it comes back: the rounds after are those of all three again."""
    folder = founded(METHODS[name])
    plain, expected = alike(folder, lambda sites: Absent(sites, reason))
    fate: Fate = {"offline": DELIVER, "no plan": DROP, "no answer": LOST}[reason]
    real = Real(folder, fates({(2, str(k), n): fate for k in MISSED for n in range(1, 9)}))
    clock(real.grid)
    rows = list(real.rounds(away=MISSED if reason == "offline" else ()))
    assert real.fed.server.digest() == plain.server.digest()
    assert [row["clients_ok"] for row in rows] == [2 if n in MISSED else 3 for n in range(1, 9)]
    code = {"offline": "offline", "no plan": "deadline", "no answer": "lost"}[reason]
    assert [row["dropped"] for row in rows if row["dropped"]] == [{"west": code}] * 2
    differs = ["dropped"] + ["bytes_down"] * (reason == "no answer")  # it is asked eight times
    assert figures(rows, *differs) == figures(expected, *differs)
    assert weights(rows)[1] == real.grid.down


@EVERY
def test_lost_answers_are_asked_for_again_and_come_as_they_were(name: str, founded: Found) -> None:
    """The site sends what it stored, so that deltas rest on the same bytes at both sides."""
    folder = founded(METHODS[name])
    told = {(k, "2", 1): LOST for k in range(3)} | {(1, "4", n): LOST for n in (1, 2, 3)}
    told |= {(2, "5", 1): FALL, (0, "6", 1): FALL}
    real, (plain, expected) = Real(folder, fates(told)), alike(folder, rounds=FEWER)
    rows = list(real.rounds(FEWER))
    assert real.fed.server.digest() == plain.server.digest()
    assert figures(rows, "bytes_down") == figures(expected, "bytes_down")
    assert all(len(said) == 1 for said in real.grid.said.values())
    assert weights(rows)[1] == real.grid.down
    assert rows[1]["bytes_down"] == 2 * expected[1]["bytes_down"]


# --- a site that loses its state -----------------------------------------------------------------


class Forgetful(Serial):
    """The serial backend; `west` begins anew before the first attempt at one round."""

    def __init__(self, sites: Any, fed: Federation, when: int) -> None:
        super().__init__(sites)
        self.fed, self.when, self.done = fed, when, False

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        if plan.round == self.when and not self.done:
            self.done = True
            client = next(one for one in self.fed.clients if one.id == "west")
            self.sites["west"] = self.fed.site(client)  # type: ignore[index]
        yield from super().run(plan)


@CACHED
@pytest.mark.parametrize("quorum", [2, 3])
def test_a_site_that_loses_its_state_is_told_everything_in_the_next_attempt(
    name: str, quorum: int, founded: Found
) -> None:
    """The plan relies on what is not there: `reference`. Where all are needed, it is asked again
    at once, with a plan that relies on nothing; where not, in the next round."""
    folder = founded(METHODS[name], quorum)
    fed = assembled(folder / SIMULATION)
    wanted = list(fed.run(FEWER, backend=lambda sites: Forgetful(sites, fed, 5)))
    real = Real(folder)
    rows = []
    for row in real.rounds(FEWER):
        rows.append(row)
        if row["round"] == 4:
            shutil.rmtree(folder / "sites" / "west" / "state")
    assert real.fed.server.digest() == fed.server.digest()
    assert figures(rows) == figures(wanted)
    failed = {5: {"west": "reference"}} if quorum == 2 else {}
    assert {row["round"]: row["dropped"] for row in rows if row["dropped"]} == failed
    assert weights(rows) == (real.grid.up, real.grid.down)


def test_a_site_that_relies_on_nothing_learns_anew_and_misses_no_round(founded: Found) -> None:
    """Without a cache a plan stands for itself."""
    folder = founded(METHODS["fedmd"])
    fed = assembled(folder / SIMULATION)
    list(fed.run(FEWER, backend=lambda sites: Forgetful(sites, fed, 5)))
    real = Real(folder)
    for row in real.rounds(FEWER):
        assert row["dropped"] == {}
        if row["round"] == 4:
            shutil.rmtree(folder / "sites" / "west" / "state")
    assert real.fed.server.digest() == fed.server.digest()


@CACHED
def test_a_site_set_back_by_a_copy_of_its_disk_heals_too(name: str, founded: Found) -> None:
    """What it believes to have been heard of is older than what was."""
    folder = founded(METHODS[name])
    state, copy = folder / "sites" / "west" / "state", folder / "copy"
    real = Real(folder)
    dropped: dict[int, Any] = {}
    for row in real.rounds(FEWER):
        dropped |= {row["round"]: row["dropped"]} if row["dropped"] else {}
        if row["round"] == 2:
            shutil.copytree(state, copy)
        if row["round"] == 4:
            shutil.rmtree(state)
            shutil.copytree(copy, state)
    assert dropped == {5: {"west": "reference"}}


def test_in_the_attempt_that_heals_everybody_else_sends_what_it_sent(founded: Found) -> None:
    folder = founded(METHODS["scarlet"], quorum=3)
    real = Real(folder)
    for row in real.rounds(4):
        if row["round"] == 3:
            shutil.rmtree(folder / "sites" / "west" / "state")
    asked = [node - FIRST for node, _, group in real.grid.sent if group == "4"]
    assert asked == [0, 1, 2, 0, 1, 2]
    assert {node: len(real.grid.said[node, 4]) for node in range(3)} == {0: 1, 1: 1, 2: 1}


# --- a coordinator that is killed ----------------------------------------------------------------


class Killed(BaseException):
    pass


@EVERY
def test_a_coordinator_killed_between_the_answers_of_a_round_goes_on_with_the_same_bytes(
    name: str, founded: Found, tmp_path: Path
) -> None:
    """Two sites have answered a round of which the checkpoint knows nothing."""
    folder, out = founded(METHODS[name]), tmp_path / "run"
    plain, expected = alike(folder, rounds=FEWER)
    first = Real(folder)

    class Axe:
        def run(self, plan: Plan) -> Iterator[Reply | Failure]:
            for number, reply in enumerate(over(first.grid, SITES)(None).run(plan)):
                if (plan.round, number) == (5, 2):
                    raise Killed
                yield reply

    with pytest.raises(Killed):
        list(first.rounds(FEWER, out=out, backend=lambda sites: Axe()))
    assert first.fed.server.round == 4
    again = Real(folder)
    list(again.rounds(FEWER, out=out, resume=True))
    assert again.fed.server.digest() == plain.server.digest()
    assert figures(again.fed.history) == figures(expected)
    for key in first.grid.said.keys() & again.grid.said.keys():
        assert first.grid.said[key] == again.grid.said[key], "one round, one upload"


# --- what is worth it ----------------------------------------------------------------------------


def test_rows_that_are_fresh_are_neither_asked_nor_sent_over_the_grid(
    founded: Found, clock: Callable[[InProcessGrid], None]
) -> None:
    """SCARLET's saving is there on the wire; a site that was away is told all that it lacks."""
    folder = founded(METHODS["scarlet"])
    real, told = Real(folder), {}
    clock(real.grid)
    for row in real.rounds(5, away=MISSED):
        plan = real.fed.server.plan(row["round"] + 1)
        if row["round"] == 4:
            told = {name: len(plan.message(name)) for name in SITES}
            targets = Plan.from_bytes(plan.message("west")).targets
            assert targets is not None
            assert count_bits(targets.held, len(targets.rows())) == 0
    assert told["west"] > told["north"] == told["south"]


# --- a table, where the site allows it -----------------------------------------------------------


def allowing(folder: Path, *names: str) -> Path:
    """The deployment, in which these sites allow their prototypes to be shared."""
    for name in names:
        file = folder / "sites" / name / "site.toml"
        text = file.read_text()
        assert "\nshare = []" in text
        file.write_text(text.replace("\nshare = []", '\nshare = ["prototypes"]'))
    return folder


def test_prototypes_over_flower_are_those_of_the_serial_backend(founded: Found) -> None:
    folder = allowing(founded('preset = "fedproto"\n'), *SITES)
    real, (plain, expected) = Real(folder), alike(folder, rounds=4)
    rows = list(real.rounds(4))
    assert real.fed.server.digest() == plain.server.digest()
    assert figures(rows) == figures(expected)
    assert weights(rows) == (real.grid.up, real.grid.down)


def test_a_site_whose_policy_refuses_a_table_sends_none_and_the_others_go_on(
    founded: Found,
) -> None:
    folder = allowing(founded('preset = "fedproto"\n'), "north", "south")
    real = Real(folder)
    plain, _ = alike(folder, lambda sites: Absent(sites, "policy", range(1, 9)), rounds=4)
    rows = list(real.rounds(4))
    assert real.fed.server.digest() == plain.server.digest()
    assert [row["dropped"] for row in rows] == [{"west": "policy"}] * 3 + [{}]
    assert rows[-1]["flags"]["west"] == ["inactive"]
    assert not [node for node, _ in real.grid.said if SITES[node] == "west"]
    assert not (folder / "sites" / "west" / "state" / "runs").exists()


# --- the real thing, in processes of its own -----------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_site_comes_back_to_its_cache_over_a_real_superlink(tmp_path: Path) -> None:
    """Four rounds of SCARLET over TLS; `west` is stopped for two of them, and started again."""
    folder = chaos.deploy(tmp_path / "d", SITES, f"{SETTINGS}[method]\n{METHODS['scarlet']}")
    with chaos.world(folder, restart=0.0, watched=False) as ours:
        ours.agree(rounds=4, deployment={"grace": 5.0})
        ours.open()

        def go_on(rounds: int, *more: str) -> Mapping[str, Any]:
            ours.submit("--rounds", str(rounds), *more)
            return ours.finish()

        def online() -> int:
            return ours.text_of("west").count("SuperNode ID")

        ours.until(online, "west")
        go_on(1)
        west = ours.units["west"]
        west.wanted = False
        west.child.ask_to_stop()
        ours.until(lambda: not west.child.running, "the end of west")
        go_on(3, "--resume")
        west.wanted = True
        ours.until(lambda: online() == 2, "west again")
        told, rows = go_on(4, "--resume"), ours.rows()
    plain, expected = alike(folder, lambda sites: Absent(sites, "offline", {2, 3}), rounds=4)
    assert [row["dropped"] for row in rows] == [{}, *[{"west": "offline"}] * 2, {}]
    assert told["soft_targets_sha256"] == plain.server.digest()
    assert figures(rows) == figures(expected)
