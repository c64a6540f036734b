"""The cache as a protocol: who asks what again, who is told what, and what losses do to it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    Saying,
    federation,
    gaussian,
    participants,
    plain,
    probabilities,
    proxy,
    read_lines,
    server,
    timeless,
    upload,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedistill.backends import Reply
from fedistill.backends.serial import Serial
from fedistill.cache import Heard, Said, TargetCache
from fedistill.client import Client, Site
from fedistill.errors import Rejected
from fedistill.federation import Federation
from fedistill.presets import Method, method
from fedistill.server import Server
from fedistill.tally import Tally
from fedistill.wire.delta import PLAIN, quantise
from fedistill.wire.envelope import count_bits, unpack_mask
from fedistill.wire.messages import Failure, Plan, RowSpec
from fedistill.wire.shelf import Shelf

ROWS = 24
LIFE = 4
SENT, NO_PLAN, NO_UPLOAD = "sent", "offline", "deadline"


def scarlet(**changes: Any) -> Method:
    return method("scarlet", **({"cache_rounds": LIFE} | changes))


def cfd(**changes: Any) -> Method:
    """Deltas on fixed rows, and nothing kept: as cfd, but for what clients learn from."""
    fixed = {"rows": "fixed", "cache_rounds": 0, "codec": "simplex-4"}
    return method("scarlet", **(fixed | changes))


def mumbling(number: int) -> Client:
    """A client that says something else in every round."""

    def logits(me: Saying, inputs: Any) -> Any:
        turn = np.sin(np.arange(3) + 1.7 * me.fitted + number)
        return (inputs[:, :3] + turn).astype(np.float32)

    return Client(f"c{number}", lambda: Saying(logits), gaussian(16, number))


def talking(clients: int, chosen: Method, **options: Any) -> Federation:
    given = {"proxy": proxy(ROWS), "per_round": 10, "student": None, "quorum": 1}
    return federation([mumbling(k) for k in range(clients)], method=chosen, **(given | options))


def digest(rows: Any, probs: Any) -> str:
    content = np.ascontiguousarray(rows, "<i8").tobytes()
    return hashlib.sha256(content + np.ascontiguousarray(probs, "<f4").tobytes()).hexdigest()


class Line:
    """The serial backend on a line that loses messages, and somebody who reads along.

    The reader keeps a shelf for every client, from nothing but the messages that reached it, and
    compares: what it decodes, what the client has learned from, what the server has published.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        door: Server,
        fate: Callable[[str, int], str] = lambda name, number: SENT,
    ) -> None:
        self.sites, self.door, self.fate = sites, door, fate
        self.shelves: dict[str, Shelf] = {}
        self.latest: dict[str, int] = {}
        self.refused: list[tuple[str, int, str]] = []
        self.relied = self.told = 0

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        for name in plan.clients:
            fate = self.fate(name, plan.round)
            if fate == NO_PLAN:
                yield Failure(name, plan.round, NO_PLAN, asked=0)
                continue
            message = plan.message(name)
            self.read(name, message)
            try:
                data = self.sites[name].answer(message)
            except Rejected as refusal:
                self.refused.append((name, plan.round, refusal.reason))
                yield Failure(name, plan.round, refusal.reason)
                continue
            self.compare(name, message)
            yield Failure(name, plan.round, NO_UPLOAD) if fate == NO_UPLOAD else Reply(name, data)

    def read(self, name: str, message: bytes) -> None:
        plan = Plan.from_bytes(message)
        targets = plan.targets
        if targets is None or self.latest.get(name) == plan.round:
            return  # asked again in the same round a client answers what it answered
        self.latest[name] = plan.round
        if name not in self.shelves:
            self.shelves[name] = Shelf(targets.codec, targets.spec.total, targets.classes)
        shelf, rows = self.shelves[name], targets.rows()
        for mask in (targets.held, targets.based):
            relied = rows[unpack_mask(mask, len(rows))]
            assert shelf.round[relied].all(), "a row is relied on that was never sent"
            self.relied += len(relied)
        rows, codes = targets.read(shelf)
        shelf.put(rows, codes, targets.round)
        self.told += len(rows)
        expected = digest(rows, self.door.table[rows])
        assert digest(rows, shelf.probs(rows)) == expected, "not what the server published"

    def compare(self, name: str, message: bytes) -> None:
        targets = Plan.from_bytes(message).targets
        if targets is not None:
            rows = targets.rows()
            found = digest(rows, self.sites[name].targets[rows])
            assert found == digest(rows, self.door.table[rows])


def on_a_line(fed: Federation, fate: Any, lines: list[Line]) -> Callable[..., Line]:
    def made(sites: Mapping[str, Site]) -> Line:
        lines.append(Line(sites, fed.server, fate))
        return lines[-1]

    return made


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedistill.federation.time.sleep", lambda seconds: None)


# --- P1: any participation, any losses -----------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "codec"),
    [("drawn", "float32"), ("drawn", "u8"), ("drawn", "simplex-4"), ("fixed", "simplex-4")],
)
@pytest.mark.parametrize("participation", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("losses", [0.0, 0.3])
def test_twenty_rounds_and_nobody_meets_a_held_row_that_it_does_not_hold(
    losses: float, participation: float, rows: str, codec: str
) -> None:
    random = np.random.default_rng([int(10 * participation), int(10 * losses)])

    def fate(name: str, number: int) -> str:
        lost = random.random()
        return NO_PLAN if lost < losses / 2 else NO_UPLOAD if lost < losses else SENT

    fed = talking(10, scarlet(codec=codec, rows=rows), participation=participation)
    lines: list[Line] = []
    found = list(fed.run(20, backend=on_a_line(fed, fate, lines)))
    assert len(found) == 20
    assert {reason for row in found for reason in row["dropped"].values()} <= {NO_PLAN, NO_UPLOAD}
    assert lines[0].refused == []
    assert sum(row["clients_failed"] for row in found) > 0 or not losses
    if participation == 1.0:
        assert lines[0].relied > 0.3 * lines[0].told, "what is held is not sent again"


def test_a_cache_costs_less_than_sending_everything() -> None:
    sent = {}
    for life in (0, LIFE, 50):
        fed = talking(4, scarlet(codec="u8", cache_rounds=life))
        rows = list(fed.run(20))
        sent[life] = sum(row["bytes_up"] + row["bytes_down"] for row in rows)
    assert sent[50] < sent[LIFE] < sent[0]


# --- P2: one predicate ---------------------------------------------------------------------------


def round_of(door: Server, number: int, names: Any = ("c0", "c1", "c2")) -> Plan:
    """A round in which these clients say something; the plan."""
    plan, seen, answers = door.plan(number), set(), []
    codec = door.method.codec
    for k, name in enumerate(names):
        probs = probabilities(plan.count(), 100 * number + k)
        changes = {"codec": codec, "seen": "0"}
        if codec != "float32":
            changes["payload"] = plain(probs, codec)
        data = upload(plan, name, probs, **changes).to_bytes()
        answers.append(door.check(data, plan, name, seen))
    door.combine(plan, answers)
    door.close(plan, seen)
    return plan


@pytest.mark.parametrize("life", [1, 2, 5])
@pytest.mark.parametrize("codec", ["float32", "u8"])
def test_what_is_asked_is_what_is_told_as_new_at_ages_around_the_life_time(
    life: int, codec: str
) -> None:
    for age in (life - 1, life, life + 1):
        if not age:
            continue
        door = server(3, method=scarlet(cache_rounds=life, codec=codec), rows=6, quorum=1)
        round_of(door, 1)
        before = door.table.copy()
        plan = door.plan(1 + age)
        assert plan.count() == (0 if age < life else 6)
        round_of(door, 1 + age)
        told = Plan.from_bytes(door.plan(2 + age).message("c0")).targets
        assert told is not None
        assert count_bits(told.held, 6) == 6 - plan.count(), "held is what was not asked"
        assert (door.table != before).any() == (age >= life), "an expired target is replaced"
        rows = told.rows()
        assert sorted(rows) == list(range(6)), "a fresh target is taught again, a new one at once"


def test_fresh_is_younger_than_the_life_time() -> None:
    cache = TargetCache("u8", 3, 3, lifetime=5)
    cache.put(np.array([0, 2]), quantise("u8", probabilities(2, 1)), 7)
    every = np.arange(3)
    assert cache.fresh(every, 8).tolist() == [True, False, True]
    assert cache.fresh(every, 7 + 4).tolist() == [True, False, True]
    assert cache.fresh(every, 7 + 5).tolist() == [False, False, False]
    assert cache.fresh(every, 7 + 6).tolist() == [False, False, False]
    asking = TargetCache("u8", 3, 3, lifetime=0)
    asking.put(every, quantise("u8", probabilities(3, 1)), 1)
    assert not asking.fresh(every, 2).any()


def test_a_row_that_nobody_answers_is_no_target_even_if_it_was_one() -> None:
    def silent_later(logits: Any, weights: Any) -> Any:
        probs = np.exp(logits).mean(axis=0)
        probs = probs / probs.sum(axis=1, keepdims=True)
        rounds.append(1)
        if len(rounds) > 1:
            probs[2] = np.nan
        return probs

    rounds: list[int] = []
    chosen = dataclasses.replace(scarlet(cache_rounds=1), rule=silent_later, options={})
    door = server(3, method=chosen, quorum=1)
    round_of(door, 1)
    plan = round_of(door, 2)
    gone = plan.rows()[2]
    told = door.plan(3).targets
    assert told is not None
    assert gone not in told.rows()
    assert len(told.rows()) == 5
    later = Plan.from_bytes(door.plan(3).message("c1")).targets
    assert later is not None
    assert gone not in later.rows()


# --- P3: what it is worth ------------------------------------------------------------------------


def asked_by_hand(drawn: list[Any], life: int) -> list[int]:
    """How many rows each round asks: a dictionary and a loop."""
    made: dict[int, int] = {}
    counts = []
    for number, rows in enumerate(drawn, start=1):
        asked = [row for row in rows if row not in made or number - made[row] >= life]
        made |= dict.fromkeys(asked, number)
        counts.append(len(asked))
    return counts


def expected_share(passes: int, life: int) -> float:
    """Share of the drawn rows that is asked in the long run, rows being dealt in passes.

    A pass takes ``passes`` rounds and has every row once, at a place that is drawn afresh. Asked at
    place ``u`` of pass 0, a row is asked next where it first shows up ``life`` rounds later or
    more: in the pass that this round falls into if its place there is late enough, in the one
    after it otherwise. The places at which a row is asked are a Markov chain; the share is the
    mean time between two draws by that between two requests.
    """
    chain = np.zeros((passes, passes))
    waits = np.zeros(passes)
    for place in range(passes):
        whole, least = divmod(place + life, passes)
        for next_place in range(passes):
            if whole == 0:  # still in the same pass, which has the row only once
                chain[place, next_place] += 1 / passes
                waits[place] += (passes + next_place - place) / passes
            elif next_place >= least:
                chain[place, next_place] += 1 / passes
                waits[place] += (whole * passes + next_place - place) / passes
            else:
                for late in range(passes):
                    chain[place, late] += 1 / passes**2
                    waits[place] += ((whole + 1) * passes + late - place) / passes**2
    visits = np.linalg.matrix_power(chain, 1000)[0]
    return passes / float(visits @ waits)


@pytest.mark.parametrize(("life", "per_round"), [(1, 10), (3, 10), (5, 10), (12, 10), (7, 15)])
def test_the_share_of_rows_asked_is_that_of_a_plain_loop(life: int, per_round: int) -> None:
    door = server(
        1, method=scarlet(cache_rounds=life, codec="u8"), rows=40, per_round=per_round, quorum=1
    )
    plans = [round_of(door, number, names=["c0"]) for number in range(1, 121)]
    drawn = [list(plan.ask.rows()) for plan in plans]
    assert [plan.count() for plan in plans] == asked_by_hand(drawn, life)


@pytest.mark.parametrize("life", [1, 3, 5, 9, 14])
def test_in_the_long_run_it_is_what_dealing_in_passes_leads_to(life: int) -> None:
    rounds, total, count = 1200, 40, 10
    cache = TargetCache("simplex-1", total, 3, lifetime=life)
    asked = 0
    for number in range(1, rounds + 1):
        rows = RowSpec(5, number, count, total).rows()
        stale = rows[~cache.fresh(rows, number)]
        cache.put(stale, np.zeros((len(stale), 1), dtype=np.uint8), number)
        asked += len(stale)
    assert asked / (rounds * count) == pytest.approx(expected_share(total // count, life), abs=0.02)


def test_passes_ask_about_as_much_as_rows_drawn_afresh() -> None:
    """The reference's 1 / (1 + (D - 1) m / M) is for draws afresh; passes are not far from it."""
    for life in (5, 9, 20):
        afresh = 1 / (1 + (life - 1) / 4)
        assert expected_share(4, life) == pytest.approx(afresh, abs=0.12)
    assert expected_share(4, 1) == 1


# --- losses, one by one --------------------------------------------------------------------------


class Play:
    """A federation round by round, with something done to it in between."""

    def __init__(self, chosen: Method, clients: int = 3, **options: Any) -> None:
        self.fed = talking(clients, chosen, **options)
        self.door = self.fed.server
        self.sites = {client.id: self.fed.site(client) for client in self.fed.clients}

    def round(self, number: int, fate: Mapping[str, str] | None = None) -> dict[str, str]:
        """One round; who failed, and why."""
        line = Line(self.sites, self.door, lambda name, _: (fate or {}).get(name, SENT))
        line.read = lambda name, message: None  # type: ignore[method-assign]
        plan = self.door.plan(number)
        tally = Tally(plan, travels=True)
        for reply in line.run(plan):
            tally.take(reply, self.door)
        self.door.combine(plan, tally.answers)
        self.door.close(plan, tally.seen)
        self.door.distil(plan)
        return tally.dropped

    def told(self, number: int, name: str) -> tuple[int, int, int]:
        """Of the rows in a plan: how many are held, told as a change, told whole."""
        targets = Plan.from_bytes(self.door.plan(number).message(name)).targets
        assert targets is not None
        rows = len(targets.rows())
        held, based = count_bits(targets.held, rows), count_bits(targets.based, rows)
        return held, based, rows - held - based


KINDS = pytest.mark.parametrize(
    "chosen",
    [scarlet(rows="fixed"), cfd(), cfd(codec="u8"), scarlet(), scarlet(codec="simplex-2")],
    ids=["kept", "deltas", "u8-deltas", "drawn", "drawn-simplex"],
)


@KINDS
@pytest.mark.parametrize("fate", [NO_PLAN, NO_UPLOAD])
def test_a_client_of_which_nothing_came_back_is_told_everything_again(
    chosen: Method, fate: str
) -> None:
    play = Play(chosen)
    for number in (1, 2, 3):
        assert play.round(number) == {}
    assert play.round(4, {"c1": fate}) == {"c1": fate}
    if chosen.rows == "fixed":
        assert play.told(5, "c1") == (0, 0, 10)
        assert chosen.cache_rounds == 0 or play.told(5, "c0") == (10, 0, 0)
    for number in range(5, 12):
        assert play.round(number) == {}
    assert play.told(12, "c1") == play.told(12, "c0")


@KINDS
def test_a_client_that_was_away_for_long_comes_back_without_a_hitch(chosen: Method) -> None:
    play = Play(chosen)
    for number in range(1, 9):
        fate = {"c1": NO_PLAN} if 2 < number < 8 else {}
        assert {*play.round(number, fate)} <= {*fate}
    assert play.round(9) == {}


@KINDS
def test_a_client_that_comes_into_the_middle_is_told_what_it_lacks(chosen: Method) -> None:
    play = Play(chosen)
    for number in range(1, 6):
        assert {*play.round(number, {"c2": NO_PLAN})} <= {"c2"}
    assert play.told(6, "c2")[:2] == (0, 0)
    assert play.round(6) == {}
    assert play.round(7) == {}
    assert play.told(8, "c2") == play.told(8, "c0") or chosen.rows == "drawn"


@KINDS
def test_a_client_that_lost_its_state_misses_one_round_and_no_more(chosen: Method) -> None:
    play = Play(chosen)
    for number in (1, 2, 3, 4, 5):
        assert play.round(number) == {}
    client = next(client for client in play.fed.clients if client.id == "c1")
    play.sites["c1"] = play.fed.site(client)
    assert play.round(6) == {"c1": "reference"}
    assert play.told(7, "c1") == (0, 0, 10)
    for number in range(7, 20):
        assert play.round(number) == {}


@KINDS
@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_client_rolled_back_some_rounds_misses_one_round_and_no_more(
    chosen: Method, back: int
) -> None:
    play = Play(chosen)
    states = []
    for number in range(1, 7):
        states.append(copy.deepcopy(play.sites["c1"]))
        assert play.round(number) == {}
    play.sites["c1"] = states[-back]
    failures = [play.round(number) for number in range(7, 25)]
    assert failures == [{"c1": "reference"}, *[{}] * 17]


@pytest.mark.parametrize("name", ["scarlet", "cfd"])
def test_a_quorum_that_needs_everybody_is_reached_in_spite_of_a_lost_state(name: str) -> None:
    """The plan of the next attempt relies on nothing: the run does not stop for good."""

    class Forgetful:
        def __init__(self, sites: Any) -> None:
            self.sites, self.serial, self.done = sites, Serial(sites), False

        def run(self, plan: Plan) -> Iterator[Reply | Failure]:
            if plan.round == 4 and not self.done:
                self.done = True
                for client in fed.clients:
                    self.sites[client.id] = fed.site(client)
            yield from self.serial.run(plan)

    changes = {"student": lambda: Saying(lambda me, inputs: inputs[:, :3])} if name == "cfd" else {}
    fed = talking(3, method(name), quorum=3, **changes)
    rows = list(fed.run(7, backend=Forgetful))
    assert [row["clients_ok"] for row in rows] == [3] * 7


@pytest.mark.parametrize("codec", ["u8", "simplex-4", "simplex-8"])
def test_a_mismatch_of_what_was_heard_costs_one_round(codec: str) -> None:
    """The server's copies of what a client said are others than the client believes."""
    play = Play(cfd(codec=codec), per_round=ROWS)
    for number in (1, 2, 3):
        assert play.round(number) == {}
    site = play.sites["c1"]
    assert site.said is not None
    site.said.codes = np.roll(site.said.codes, 1, axis=0)
    failures = [play.round(number) for number in range(4, 9)]
    expected: list[dict[str, str]] = [{"c1": "reference"}, {}, {}, {}, {}]
    assert failures in (expected, [{}] * 5)


# --- the server comes back -----------------------------------------------------------------------


def restored(play: Play, arrays: Any, facts: Any) -> Server:
    again = talking(len(play.sites), play.fed.method).server
    again.load_state_dict(arrays, json.loads(json.dumps(facts)))
    return again


def snapshot(door: Server) -> Any:
    return copy.deepcopy(door.state_dict())


@KINDS
def test_a_server_restored_from_its_checkpoint_goes_on_with_the_same_bytes(chosen: Method) -> None:
    whole, play = Play(chosen), Play(chosen)
    whole.door.run = play.door.run = "r" * 16
    for number in (1, 2, 3, 4):
        fate = {"c2": NO_UPLOAD} if number == 3 else {}
        assert whole.round(number, fate) == play.round(number, fate)
    play.door = restored(play, *snapshot(play.door))
    for number in range(5, 12):
        plans = [made.door.plan(number) for made in (whole, play)]
        for name in play.sites:
            assert plans[0].message(name) == plans[1].message(name)
        fate = {"c0": NO_PLAN} if number == 6 else {}
        assert whole.round(number, fate) == play.round(number, fate)
        assert whole.door.digest() == play.door.digest()


@KINDS
def test_a_server_that_lost_its_last_round_hears_and_says_the_same_again(chosen: Method) -> None:
    whole, play = Play(chosen), Play(chosen)
    whole.door.run = play.door.run = "r" * 16
    for number in range(1, 7):
        kept = snapshot(play.door)
        assert whole.round(number) == play.round(number) == {}
    play.door = restored(play, *kept)
    assert play.round(6) == {}, "what was answered is sent again"
    for number in range(7, 16):
        assert whole.round(number) == play.round(number) == {}
        assert whole.door.digest() == play.door.digest()


# --- the two ends of what was predicted ----------------------------------------------------------


def codes(rows: int, seed: int) -> Any:
    return quantise("u8", probabilities(rows, seed))


def test_what_was_said_counts_as_held_when_the_server_says_that_it_was_heard() -> None:
    rows = np.arange(30)
    said = Said("u8", 40, 3)
    said.learn(0)
    assert said.encode(rows, codes(30, 1), 1)[0] == PLAIN
    assert said.shelf.reference(rows) is None
    said.learn(1)
    np.testing.assert_array_equal(said.shelf.reference(rows), codes(30, 1))
    payload = said.encode(rows, codes(30, 1), 2)
    assert len(payload) == 5
    said.learn(1)  # the second upload was lost
    np.testing.assert_array_equal(said.shelf.reference(rows), codes(30, 1))
    said.learn(0)  # the server holds nothing any more
    assert said.shelf.reference(rows) is None
    assert said.encode(rows, codes(30, 1), 3)[0] == PLAIN


def test_said_and_heard_hold_the_same_after_any_story() -> None:
    random = np.random.default_rng(3)
    said, heard = Said("simplex-4", 20, 3), Heard("simplex-4", 20, 3)
    for number in range(1, 60):
        if random.random() < 0.1:
            heard.forget("a")
        if random.random() < 0.1:
            again = Said("simplex-4", 20, 3)
            again.load_state_dict(said.state_dict())
            said = again
        if random.random() < 0.1:
            copied = Heard("simplex-4", 20, 3)
            copied.load_state_dict(heard.state_dict(), json.loads(json.dumps(heard.facts())))
            heard = copied
        said.learn(heard.last.get("a", 0))
        rows = random.permutation(20)[: random.integers(0, 12)]
        reference, known = said.shelf.reference(rows), heard.reference("a", rows)
        assert (reference is None) == (known is None)
        if reference is not None:
            np.testing.assert_array_equal(reference, known)
        new = quantise("simplex-4", probabilities(len(rows), number))
        said.encode(rows, new, number)
        if random.random() < 0.7:
            heard.note("a", rows, new, number)


# --- any story -----------------------------------------------------------------------------------

FATES = st.sampled_from([SENT, SENT, SENT, NO_PLAN, NO_UPLOAD])
EVENTS = st.sampled_from(["", "", "", "", "rolled back", "lost state", "server restored"])
STORY = st.lists(st.tuples(FATES, FATES, EVENTS), min_size=4, max_size=12)


@given(
    story=STORY,
    codec=st.sampled_from(["float32", "u8", "simplex-4", "simplex-1"]),
    rows=st.sampled_from(["drawn", "fixed"]),
    life=st.sampled_from([0, 1, 3, 50]),
)
@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_whatever_is_lost_targets_are_equal_or_refused_and_it_heals(
    story: list[tuple[str, str, str]], codec: str, rows: str, life: int
) -> None:
    """One client is reliable; of two others messages are lost, and the last loses its memory."""
    play = Play(scarlet(codec=codec, rows=rows, cache_rounds=life))
    older = copy.deepcopy(play.sites["c2"])
    number = 0
    for first, second, event in story:
        number += 1
        if event == "rolled back":
            play.sites["c2"] = older
        elif event == "lost state":
            play.sites["c2"] = play.fed.site(play.fed.clients[2])
        elif event == "server restored":
            play.door = restored(play, *snapshot(play.door))
        older = copy.deepcopy(play.sites["c2"])
        failed = play.round(number, {"c1": first, "c2": second})
        assert failed.get("c0") is None
        assert failed.get("c1", first) == first, "the silent are asked now and then only"
        assert failed.get("c2", SENT) in {SENT, NO_PLAN, NO_UPLOAD, "reference"}
    after = [play.round(number) for number in range(number + 1, number + 16)]
    assert after[-3:] == [{}, {}, {}]


# --- killed and resumed --------------------------------------------------------------------------


def real(name: str, **options: Any) -> Federation:
    changes = {"scarlet": {"cache_rounds": 2}, "cfd": {}}[name]
    return federation(participants(3), method=method(name, **changes), **options)


@pytest.mark.parametrize("name", ["scarlet", "cfd"])
def test_a_run_cut_at_any_round_and_resumed_ends_in_the_same_bytes(
    name: str, tmp_path: Path
) -> None:
    options = {"per_round": 15} if name == "scarlet" else {}
    whole = real(name, **options)
    rows = timeless(whole.run(5, out=tmp_path / "whole"))
    plan = whole.server.plan(6)
    for cut in (1, 2, 3, 4):
        out = tmp_path / str(cut)
        running = real(name, **options).run(5, out=out)
        for _ in range(cut):
            next(running)
        running.close()
        again = real(name, **options)
        list(again.run(5, out=out, resume=True))
        assert timeless(again.history) == rows
        assert read_lines(out / "rounds.jsonl") == rows
        assert again.server.digest() == whole.server.digest()
        again.server.run = whole.server.run
        for client in plan.clients:
            found = Plan.from_bytes(again.server.plan(6).message(client))
            assert found.targets == Plan.from_bytes(plan.message(client)).targets
            assert (found.skip, found.heard) == (plan.skip, 5)


@pytest.mark.parametrize("name", ["scarlet", "cfd"])
def test_killed_between_the_answers_of_a_round_it_resumes_to_the_same_bytes(
    name: str, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    class Axe:
        """Falls when so many clients have answered in the third round."""

        def __init__(self, sites: Mapping[str, Site], after: int) -> None:
            self.serial, self.left = Serial(sites), after

        def run(self, plan: Plan) -> Iterator[Reply | Failure]:
            for reply in self.serial.run(plan):
                if plan.round == 3:
                    if not self.left:
                        raise Killed
                    self.left -= 1
                yield reply

    whole = real(name)
    rows = timeless(whole.run(4))
    for after in (0, 1, 2):
        backend = partial(Axe, after=after)
        with pytest.raises(Killed):
            list(real(name).run(4, out=tmp_path / str(after), backend=backend))
        again = real(name)
        list(again.run(4, out=tmp_path / str(after), resume=True))
        assert timeless(again.history) == rows
        assert again.server.digest() == whole.server.digest()


def test_a_message_is_what_its_length_was_counted_as() -> None:
    """Bytes reported are bytes sent, also where each client is told something else."""
    sizes: list[int] = []
    ups: list[int] = []

    class Scale:
        def __init__(self, sites: Mapping[str, Site]) -> None:
            self.sites = sites

        def run(self, plan: Plan) -> Iterator[Reply | Failure]:
            messages = {name: plan.message(name) for name in plan.clients}
            replies = {name: self.sites[name].answer(m) for name, m in messages.items()}
            sizes.append(sum(len(message) for message in messages.values()))
            ups.append(sum(len(data) for data in replies.values()))
            yield from (Reply(name, data) for name, data in replies.items())

    fed = talking(5, scarlet(codec="u8"), participation=0.6)
    rows = list(fed.run(8, backend=Scale))
    assert [row["bytes_down"] for row in rows] == sizes
    assert [row["bytes_up"] for row in rows] == ups
