"""A round over a grid that drops, delays, repeats and makes up answers; who is bad pays alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    CLASSES,
    MEAN,
    Saying,
    federation,
    gaussian,
    probabilities,
    proxy,
    timeless,
    upload,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from test_faults import REFUSED, Forge

from fedistill.client import Client, Member, Site
from fedistill.errors import QuorumError, RunError
from fedistill.federation import Federation
from fedistill.flower import backend as backend_module
from fedistill.flower import client_app, convert, outcome, roster, server_app
from fedistill.log import events_to, read_events
from fedistill.server import Server
from fedistill.wire.messages import Failure, Plan

from .grid import (
    DROP,
    FALL,
    FIRST,
    LOST,
    STALL,
    STRANGER,
    TWICE,
    Clock,
    Fate,
    InProcessGrid,
    copied,
    fates,
    over,
)

NAMES = tuple(f"c{k}" for k in range(5))
ROWS = 6
QUIET: dict[str, Any] = {"student": None, "method": MEAN, "proxy": proxy(ROWS), "quorum": 3}


def coordinator(**options: Any) -> Federation:
    """Five real sites, as the coordinator knows them."""
    return federation([Member(name, 16) for name in NAMES], **(QUIET | options))


class Says:
    """Stands for a site: an honest upload of fixed predictions, counted."""

    def __init__(self, number: int, forge: Forge | None = None) -> None:
        self.client = Member(f"c{number}")
        self.probs = probabilities(ROWS, number)
        self.forge = forge
        self.answered = 0

    def recall(self, plan: Plan) -> None:
        pass

    def answer(self, message: bytes) -> bytes:
        self.answered += 1
        plan = Plan.from_bytes(message)
        if self.forge is not None:
            return self.forge(plan, self.probs)
        return upload(plan, self.client.id, self.probs).to_bytes()


def five(forge: Forge | None = None, **options: Any) -> tuple[InProcessGrid, Mapping[int, Says]]:
    """A grid with five sites, of which the last one may lie."""
    sites = {k: Says(k, forge if k == 4 else None) for k in range(5)}
    app = client_app(lambda node, run: sites[node["k"]])  # type: ignore[arg-type,return-value]
    return InProcessGrid(app, [{"k": k} for k in sites], **options), sites


def expected(*numbers: int) -> Any:
    return np.mean([probabilities(ROWS, k) for k in numbers], axis=0)


def combined(fed: Federation) -> Any:
    """The last round's soft targets, in the order in which rows were asked."""
    assert fed.server.targets is not None
    return fed.server.table[fed.server.targets.rows()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[InProcessGrid], Clock]:
    """Let time pass as the test's clock says, in the backend alone."""

    def wind(grid: InProcessGrid) -> Clock:
        made = Clock(grid)
        monkeypatch.setattr(backend_module, "time", made)
        return made

    return wind


def sends(grid: InProcessGrid, group: str = "1") -> list[int]:
    """Numbers of the nodes that were asked in a round, in order."""
    return [node - FIRST for node, _, of in grid.sent if of == group]


# --- faults 1 to 22, 26, 55, 64: one bad upload of five ------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason", "forge"),
    [pytest.param(n, r, f, id=f"{n}-{what}") for n, what, r, f in REFUSED],
)
def test_one_bad_upload_of_five_over_flower_is_dropped_and_the_run_goes_on(
    number: int, reason: str, forge: Forge
) -> None:
    grid, _ = five(forge)
    fed = coordinator(limit=1 << 20 if number == 10 else 64 << 20)
    rows = fed.run(2, backend=over(grid, NAMES))
    first = next(rows)
    assert (first["clients_ok"], first["dropped"]) == (4, {"c4": reason})
    np.testing.assert_allclose(combined(fed), expected(0, 1, 2, 3), atol=1e-6)
    assert next(rows)["clients_ok"] >= 4


@pytest.mark.parametrize("kind", ["identical", "constant", "overconfident"])
def test_predictions_that_are_valid_and_useless_are_flagged_over_flower(kind: str) -> None:
    """Faults 20, 21 and 22."""
    useless = {
        "identical": probabilities(ROWS, 3),
        "constant": np.full((ROWS, 3), [0.2, 0.5, 0.3]),
        "overconfident": np.eye(3)[np.arange(ROWS) % 3],
    }[kind]
    grid, _ = five(lambda plan, probs: upload(plan, "c4", useless).to_bytes())
    row = next(iter(coordinator().run(1, backend=over(grid, NAMES))))
    assert row["dropped"] == {}
    assert row["flags"]["c4"] == [kind]


class Odd:
    """A client app that answers a plan with anything."""

    def __init__(self, honest: ClientApp, content: Callable[[], RecordDict]) -> None:
        self.honest = honest
        self.content = content

    def __call__(self, message: Message, context: Context) -> Message:
        if context.node_config["k"] == 4 and message.metadata.message_type == convert.ROUND:
            return Message(self.content(), reply_to=message)
        return self.honest(message, context)


def lying(shape: tuple[int, ...], data: bytes, dtype: str = "float32") -> RecordDict:
    array = Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)
    return RecordDict({"f": ArrayRecord({"upload": array})})


ODD: dict[str, Callable[[], RecordDict]] = {
    "nothing": RecordDict,
    "an empty record": lambda: RecordDict({"f": ConfigRecord()}),
    "a text for an upload": lambda: RecordDict({"f": ConfigRecord({"upload": "bytes"})}),
    "a list for an upload": lambda: RecordDict({"f": ConfigRecord({"upload": [b"a", b"b"]})}),
    "a number for a reason": lambda: RecordDict({"f": ConfigRecord({"reason": 5})}),
    "a record more": lambda: RecordDict(
        {"f": ConfigRecord({"upload": b"x"}), "labels": ConfigRecord({"y": [1, 2]})}
    ),
    "metrics": lambda: RecordDict({"f": MetricRecord({"upload": 1.0})}),
    "another name": lambda: RecordDict({"upload": ConfigRecord({"upload": b"x"})}),
    "an array that lies about its shape": lambda: lying((1000, 10), b"\x93NUMPY short"),
    "an array of objects": lambda: lying((1,), b"\x80\x04N.", "object"),
    "NaN as an array": lambda: RecordDict(
        {"f": ArrayRecord({"upload": Array(np.full((ROWS, 3), np.nan, np.float32))})}
    ),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_an_answer_that_is_none_of_ours_is_a_format_fault_of_its_sender(
    content: Callable[[], RecordDict],
) -> None:
    """Flower checks nothing, so nothing of its kinds of record is opened."""
    grid, _ = five()
    grid.app = Odd(grid.app, content)  # type: ignore[assignment]
    fed = coordinator()
    row = next(iter(fed.run(1, backend=over(grid, NAMES))))
    assert row["dropped"] == {"c4": "format"}
    np.testing.assert_allclose(combined(fed), expected(0, 1, 2, 3), atol=1e-6)


def test_a_reason_from_outside_is_cut_and_made_safe_for_the_log(tmp_path: Path) -> None:
    """Fault 64."""
    grid, _ = five()
    said = "x\n2026-01-01 ERROR forged line \u202e" + "y" * 5000
    grid.app = Odd(grid.app, lambda: RecordDict({"f": ConfigRecord({"reason": said})}))  # type: ignore[assignment]
    with events_to(tmp_path / "events.jsonl"):
        row = next(iter(coordinator().run(1, backend=over(grid, NAMES))))
    (reason,) = row["dropped"].values()
    assert len(reason) <= 40
    assert reason.isascii()
    assert "\n" not in reason
    text = (tmp_path / "events.jsonl").read_text()
    assert "forged line" not in text
    assert all(json.loads(line) for line in text.splitlines())


def test_an_app_that_raises_costs_its_site_the_round_and_its_text_stays_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Code 2 carries the text of the exception; of what arrives here nothing is written down."""

    def fall(message: Message, context: Context) -> Message:
        if context.node_config["k"] == 4 and message.metadata.message_type == convert.ROUND:
            raise KeyError("patient 4711")
        return honest(message, context)

    grid, _ = five()
    honest, grid.app = grid.app, fall  # type: ignore[assignment]
    with events_to(tmp_path / "events.jsonl"):
        row = next(iter(coordinator().run(1, backend=over(grid, NAMES))))
    assert row["dropped"] == {"c4": "app"}
    assert "4711" not in json.dumps(row) + (tmp_path / "events.jsonl").read_text() + caplog.text
    assert sends(grid).count(4) == 1


# --- messages that get lost, come late, come twice -----------------------------------------------

HARMLESS: dict[str, dict[tuple[int, str, int], Fate]] = {
    "nothing": {},
    "answers in another order": {(k, "1", 1): 9 - 2 * k for k in range(5)},
    "an answer twice": {(2, "1", 1): TWICE, (3, "2", 1): TWICE},
    "answers that nobody asked for": {(k, "1", 1): STRANGER for k in range(5)},
    "an answer lost, code 5": {(2, "1", 1): LOST},
    "an answer lost four times": {(2, "2", n): LOST for n in range(1, 5)},
    "every first answer lost": {(k, "1", 1): LOST for k in range(5)},
    "an interrupted download": {(k, "1", 1): FALL for k in range(5)},
}


@pytest.mark.parametrize("told", HARMLESS.values(), ids=HARMLESS)
def test_what_the_way_does_to_messages_leaves_no_trace_in_the_result(
    told: Mapping[tuple[int, str, int], Fate],
) -> None:
    grid, _ = five(fate=fates(told))
    fed = coordinator()
    rows = list(fed.run(2, backend=over(grid, NAMES)))
    calm = coordinator()
    plain = list(calm.run(2, backend=over(five()[0], NAMES)))
    for again, once in zip(rows, plain, strict=True):  # what was sent twice is counted twice
        assert again.pop("bytes_down") >= once.pop("bytes_down")
    assert timeless(rows) == timeless(plain)
    assert fed.server.digest() == calm.server.digest()


def test_an_error_that_the_superlink_made_up_reaches_the_right_sites_account() -> None:
    """It comes from node 1: only the id of the message tells whom it is about."""
    grid, sites = five(fate=fates({(3, "1", 1): LOST}))
    row = next(iter(coordinator().run(1, backend=over(grid, NAMES))))
    assert row["clients_ok"] == 5
    assert sends(grid) == [0, 1, 2, 3, 4, 3]
    assert [site.answered for site in sites.values()] == [1, 1, 1, 2, 1]


@pytest.mark.parametrize("kind", ["refuse_pushes", "empty_pushes"])
def test_a_push_that_is_refused_is_tried_again(kind: str) -> None:
    """Flower puts None for a refused message, and an empty list for all (HTTP 413)."""
    grid, _ = five()
    names = over(grid, NAMES)
    list(coordinator().run(1, backend=names))  # nobody is a stranger any more
    setattr(grid, kind, 2)
    fed = coordinator()
    row = next(iter(fed.run(1, backend=names)))
    assert (row["clients_ok"], row["dropped"]) == (5, {})
    np.testing.assert_allclose(combined(fed), expected(*range(5)), atol=1e-6)


def test_a_site_whose_answers_always_get_lost_is_asked_five_times_and_no_more(
    clock: Callable[[InProcessGrid], Clock],
) -> None:
    grid, _ = five(fate=lambda node, group, n: LOST if node == FIRST + 2 and group == "1" else 0)
    clock(grid)
    row = next(iter(coordinator().run(1, backend=over(grid, NAMES, grace=20.0))))
    assert row["dropped"] == {"c2": "lost"}
    assert sends(grid).count(2) == backend_module.TRIES


def test_a_superlink_that_is_away_for_a_moment_costs_nothing() -> None:
    grid, _ = five()
    names = over(grid, NAMES)
    list(coordinator().run(1, backend=names))
    grid.fetches_fail = 4
    row = next(iter(coordinator().run(1, backend=names)))
    assert row["clients_ok"] == 5
    assert grid.fetches_fail == 0


def test_a_superlink_that_stays_away_ends_the_run_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_module, "MOST_FAILURES", 4)
    grid, _ = five()
    names = over(grid, NAMES)
    list(coordinator().run(1, backend=names))

    def away() -> Any:
        raise ConnectionError("refused")

    monkeypatch.setattr(backend_module, "RECOVERY", 0.01)
    monkeypatch.setattr(grid, "get_node_ids", away)
    with pytest.raises(RunError, match=r"ConnectionError.*see whether it runs, then --resume"):
        list(coordinator().run(1, backend=names))


def test_answers_that_can_never_be_fetched_are_lost_and_the_quorum_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_module, "RECOVERY", 0.01)
    grid, _ = five()
    names = over(grid, NAMES)
    list(coordinator().run(1, backend=names))
    grid.fetches_fail = 1 << 30
    with pytest.raises(QuorumError, match="c0: lost"):
        list(coordinator().run(1, backend=names))


@pytest.mark.parametrize(
    "array",
    [
        Array(
            dtype="uint8", shape=(4 * 10**14,), stype="numpy.ndarray", data=b"\x93NUMPY" + b"(" * 99
        ),
        Array(dtype="uint8", shape=(3,), stype="other", data=b"abc"),
        Array(np.zeros((1, 10), np.float32)),
    ],
    ids=["a header that asks for all memory", "another kind", "an array of floats"],
)
def test_an_array_that_is_none_of_ours_is_not_even_opened(array: Array) -> None:
    grid, _ = five()
    list(coordinator().run(1, backend=over(grid, NAMES)))  # builds messages: flwr needs a run
    asked = convert.request(convert.ROUND, 1, {"plan": b"x"}, group="1", ttl=9.0)
    content = RecordDict({"f": ConfigRecord({}), "b": ArrayRecord({"upload": array})})
    found = convert.heard("a", 1, Message(content, reply_to=asked))
    assert found == Failure("a", 1, "format")


@pytest.mark.parametrize("step", ["push_messages", "get_nodes"])
def test_a_push_or_a_look_that_fails_once_is_done_again(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, _ = five()
    names = over(grid, NAMES)
    list(coordinator().run(1, backend=names))
    step = "get_node_ids" if step == "get_nodes" else step  # what a roster by asking looks at
    real, failed = getattr(grid, step), []

    def once(*args: Any) -> Any:
        if not failed:
            failed.append(step)
            raise ConnectionError("502 Bad Gateway")
        return real(*args)

    monkeypatch.setattr(grid, step, once)
    assert next(iter(coordinator().run(1, backend=names)))["clients_ok"] == 5


# --- deadline and quorum -------------------------------------------------------------------------


def silent(*numbers: int) -> Callable[[int, str, int], Fate]:
    """These nodes get no plan any more; who they are they said."""
    return lambda node, group, n: DROP if node - FIRST in numbers and group.isdigit() else 0


def test_a_round_ends_at_its_deadline_with_who_has_answered(
    clock: Callable[[InProcessGrid], Clock],
) -> None:
    """Faults 23 and 26: a silent site costs the others the deadline, and nothing more."""
    grid, _ = five(fate=silent(4))
    time = clock(grid)
    fed = coordinator()
    row = next(iter(fed.run(1, backend=over(grid, NAMES, deadline=40.0))))
    assert row["dropped"] == {"c4": "deadline"}
    assert 40 <= time.now < 60
    np.testing.assert_allclose(combined(fed), expected(0, 1, 2, 3), atol=1e-6)


def test_below_the_quorum_there_is_an_error_that_says_who_was_missing(
    clock: Callable[[InProcessGrid], Clock], tmp_path: Path
) -> None:
    """Faults 24 and 25."""
    grid, _ = five(fate=silent(2, 3, 4))
    clock(grid)
    fed = coordinator()
    with pytest.raises(QuorumError) as caught:
        list(fed.run(1, backend=over(grid, NAMES, deadline=30.0), out=tmp_path))
    assert caught.value.exit_code == 3
    assert "2 usable uploads, the quorum is 3" in str(caught.value)
    assert "c2: deadline, c3: deadline, c4: deadline" in str(caught.value)
    assert not fed.server.stamp.any()


def test_below_the_quorum_the_run_ends_with_code_3_and_can_be_resumed(
    clock: Callable[[InProcessGrid], Clock], tmp_path: Path
) -> None:
    grid, _ = five(fate=silent(2, 3, 4))
    clock(grid)
    told = tmp_path / "outcome.json"
    people: dict[str, Any] = {"rounds": 2, "deadline": 2.0, "out": tmp_path / "run"}
    with outcome.outcome_in(told):
        server_app(lambda run: coordinator(), **people)(grid, Context(1, 1, {}, RecordDict(), {}))
    ended = outcome.outcome(told)
    assert ended is not None
    assert (ended.code, ended.kind) == (3, "QuorumError")
    assert "the quorum is 3" in ended.text
    grid.fate = lambda node, group, n: 0
    with outcome.outcome_in(told):
        app = server_app(lambda run: coordinator(), **people, resume=True)
        app(grid, Context(1, 1, {}, RecordDict(), {}))
    assert outcome.outcome(told) == outcome.Outcome()


def test_a_site_that_is_offline_is_waited_for_and_then_left_out(
    clock: Callable[[InProcessGrid], Clock],
) -> None:
    grid, sites = five()
    names = over(grid, NAMES, deadline=500.0, grace=20.0)
    list(coordinator().run(1, backend=names))
    grid.online.discard(FIRST + 1)
    time = clock(grid)
    row = next(iter(coordinator().run(1, backend=names)))
    assert row["dropped"] == {"c1": "offline"}
    assert 20 <= time.now < 60  # the grace, and not the deadline
    assert sites[1].answered == 1


def test_without_a_quorum_offline_sites_are_waited_for_until_the_deadline(
    clock: Callable[[InProcessGrid], Clock],
) -> None:
    grid, _ = five()
    names = over(grid, NAMES, deadline=50.0, grace=5.0)
    list(coordinator().run(1, backend=names))
    grid.online -= {FIRST, FIRST + 1, FIRST + 2}
    time = clock(grid)
    with pytest.raises(QuorumError, match=r"c0: offline, c1: offline, c2: offline"):
        list(coordinator().run(1, backend=names))
    assert time.now >= 150  # three attempts


def test_a_site_that_comes_back_during_the_round_is_asked_then(
    clock: Callable[[InProcessGrid], Clock],
) -> None:
    grid, _ = five()
    names = over(grid, NAMES, deadline=500.0, grace=100.0)
    list(coordinator().run(1, backend=names))
    grid.online.discard(FIRST + 1)
    time = clock(grid)
    real = time.monotonic

    def later() -> float:
        if real() > 30:
            grid.online.add(FIRST + 1)
        return time.now

    time.monotonic = later  # type: ignore[method-assign]
    fed = coordinator()
    row = next(iter(fed.run(1, backend=names)))
    assert (row["clients_ok"], row["dropped"]) == (5, {})
    np.testing.assert_allclose(combined(fed), expected(*range(5)), atol=1e-6)


def test_a_site_that_answers_and_leaves_before_the_answer_is_fetched_is_asked_again(
    clock: Callable[[InProcessGrid], Clock],
) -> None:
    """The SuperLink throws away what it holds of a node that went offline: code 5."""
    grid, sites = five()
    names = over(grid, NAMES, deadline=500.0, grace=100.0)
    list(coordinator().run(1, backend=names))
    time = clock(grid)
    real, gone = grid._push, []

    def leaving(message: Message) -> str | None:
        name = real(message)
        if message.metadata.dst_node_id == FIRST + 1 and not gone:
            gone.append(name)
            grid.online.discard(FIRST + 1)
        return name

    grid._push = leaving  # type: ignore[method-assign]
    real_time = time.monotonic

    def later() -> float:
        if real_time() > 30:
            grid.online.add(FIRST + 1)
        return time.now

    time.monotonic = later  # type: ignore[method-assign]
    row = next(iter(coordinator().run(1, backend=names)))
    assert (row["clients_ok"], row["dropped"]) == (5, {})
    assert (
        sites[1].answered == 3
    )  # once for the run before, twice now: its store answers the second


@pytest.mark.parametrize("stuck", [1, 4])
def test_answers_that_block_in_the_fetch_hold_up_nobody_else(
    clock: Callable[[InProcessGrid], Clock], stuck: int
) -> None:
    """Flower fetches an answer for up to two hours, whatever our deadline."""
    victims = set(range(5 - stuck, 5))
    grid, _ = five(
        fate=lambda node, group, n: STALL if node - FIRST in victims and group.isdigit() else 0
    )
    clock(grid)
    fed = coordinator(quorum=1)
    try:
        row = next(iter(fed.run(1, backend=over(grid, NAMES, deadline=60.0))))
    finally:
        grid.close()
    assert row["dropped"] == {f"c{k}": "deadline" for k in sorted(victims)}
    assert row["clients_ok"] == 5 - stuck


def test_more_blocking_answers_than_fetchers_end_with_the_deadline_and_not_never(
    clock: Callable[[InProcessGrid], Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "PULLERS", 2)
    grid, _ = five(
        fate=lambda node, group, n: STALL if node in {FIRST, FIRST + 1} and group.isdigit() else 0
    )
    monkeypatch.setattr(backend_module, "time", time := Clock(grid))
    grid.on_its_way = lambda: False  # type: ignore[method-assign]
    try:
        with pytest.raises(QuorumError):
            list(coordinator().run(1, backend=over(grid, NAMES, deadline=20.0)))
    finally:
        grid.close()
    assert time.now < 200


def test_the_threads_that_fetch_end_with_the_round() -> None:
    before = set(threading.enumerate())
    for _ in range(10):
        grid, _sites = five()
        list(coordinator().run(3, backend=over(grid, NAMES)))
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=1)
        assert not thread.is_alive()


def test_a_late_upload_of_an_earlier_round_is_not_mixed_into_a_later_one(
    clock: Callable[[InProcessGrid], Clock],
) -> None:
    """What site 4 says to round 1 arrives in round 2, in place of and beside its answer."""
    grid, sites = five(fate=silent(4))
    clock(grid)
    fed = coordinator()
    late: list[Message] = []
    real = grid._push

    def keep(message: Message) -> str | None:
        name = real(message)
        if message.metadata.group_id == "1" and message.metadata.dst_node_id == FIRST + 4:
            late.append(grid._answer(copied(message)))
        elif message.metadata.group_id == "2" and late:
            grid.strangers += late
        return name

    grid._push = keep  # type: ignore[method-assign]
    rounds = fed.run(2, backend=over(grid, NAMES, deadline=40.0))
    assert next(rounds)["dropped"] == {"c4": "deadline"}
    grid.fate = lambda node, group, n: 0
    row = next(rounds)
    assert (row["clients_ok"], row["dropped"]) == (5, {})
    assert sites[4].answered == 2


def test_an_old_upload_sent_in_answer_to_a_new_plan_is_refused() -> None:
    """Fault 15: a replay by the site itself."""
    kept: list[bytes] = []

    def replay(plan: Plan, probs: Any) -> bytes:
        kept.append(upload(plan, "c4", probs).to_bytes())
        return kept[0]

    grid, _ = five(replay)
    rows = list(coordinator().run(3, backend=over(grid, NAMES)))
    assert [row["dropped"] for row in rows] == [{}, {"c4": "stale_round"}, {"c4": "stale_round"}]


def test_a_site_that_answers_nonsense_for_ever_is_inactive_after_three_rounds() -> None:
    grid, sites = five(lambda plan, probs: b"nonsense")
    rows = list(coordinator().run(7, backend=over(grid, NAMES)))
    asked = [4 in sends(grid, str(number)) for number in range(1, 8)]
    assert asked == [True, True, True, False, False, True, False]
    assert [row["clients_ok"] for row in rows] == [4] * 7
    assert rows[3]["flags"]["c4"] == ["inactive"]
    assert sites[4].answered == 4


def test_a_site_that_predicts_nan_for_ever_is_refused_at_home_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    """It trains in each round that asks it, sends a reason, and never a number."""
    people = {
        name: Client(name, lambda k=k: Saying(logits(k)), gaussian(20, k))
        for k, name in enumerate(NAMES)
    }

    def site(node: Mapping[str, Any], run: Mapping[str, Any]) -> Site:
        made = Site.open(people[node["id"]], proxy(ROWS), CLASSES, MEAN, seed=7)
        made.keep_runs_in(tmp_path / node["id"])
        return made

    grid = InProcessGrid(client_app(site), [{"id": name} for name in NAMES])
    rows = list(coordinator().run(5, backend=over(grid, NAMES)))
    assert [row["dropped"] for row in rows] == [{"c4": "nonfinite"}] * 3 + [{}, {}]
    assert rows[-1]["flags"]["c4"] == ["inactive"]
    assert b"nan" not in b"".join(grid.replies).lower()


def logits(number: int) -> Callable[[Saying, Any], Any]:
    def say(learner: Saying, inputs: Any) -> Any:
        told = np.random.default_rng(number).normal(size=(len(inputs), 3)).astype(np.float32)
        return np.full_like(told, np.nan) if number == 4 else told

    return say


def test_the_log_of_the_coordinator_tells_who_answered_and_who_did_not(tmp_path: Path) -> None:
    grid, _ = five(lambda plan, probs: b"nonsense")
    with events_to(tmp_path / "events.jsonl"):
        list(coordinator().run(1, backend=over(grid, NAMES)))
    told = [
        (e["event"], e.get("site"), e.get("reason"))
        for e in read_events(tmp_path / "events.jsonl")
        if e["event"] in {"answered", "dropped"}
    ]
    assert sorted(told) == [("answered", f"c{k}", None) for k in range(4)] + [
        ("dropped", "c4", "truncated")
    ]


# --- plans that are too large, messages that are none of ours ------------------------------------


def test_a_plan_that_is_none_is_answered_with_a_reason() -> None:
    grid, sites = five()
    context = grid.contexts[FIRST]
    for content in (RecordDict(), RecordDict({"f": ConfigRecord({"plan": "text"})})):
        answer = grid.app(Message(content, FIRST, convert.ROUND), context)
        assert convert.fields_of(answer) == {"reason": "format"}
    assert sites[0].answered == 0
    answer = grid.app(
        convert.request(convert.ROUND, FIRST, {"plan": b"x"}, group="1", ttl=9), context
    )
    assert convert.fields_of(answer) == {"reason": "truncated"}


def test_a_message_of_another_type_is_no_request_of_ours() -> None:
    grid, _ = five()
    for kind in ("train", "evaluate.round", "query.logits"):
        with pytest.raises(ValueError, match=r"No|not"):
            grid.app(Message(RecordDict(), FIRST, kind), grid.contexts[FIRST])


def test_of_two_nodes_with_one_id_the_first_one_counts() -> None:
    """Fault 17: the second is not even asked."""
    sites = [Says(0), Says(1), Says(2), Says(2, lambda plan, probs: b"a forgery")]
    app = client_app(lambda node, run: sites[node["k"]])  # type: ignore[arg-type,return-value]
    grid = InProcessGrid(app, [{"k": k} for k in range(4)])
    fed = federation([Member(name, 16) for name in NAMES[:3]], **QUIET)
    row = next(iter(fed.run(1, backend=over(grid, NAMES[:3]))))
    assert (row["clients_ok"], row["dropped"]) == (3, {})
    assert sites[3].answered == 0
    np.testing.assert_allclose(combined(fed), expected(0, 1, 2), atol=1e-6)


def test_a_node_that_nobody_enrolled_is_not_asked() -> None:
    """Fault 18."""
    grid, sites = five()
    fed = federation([Member(name, 16) for name in NAMES[:3]], **QUIET)
    row = next(iter(fed.run(1, backend=over(grid, NAMES[:3]))))
    assert row["clients_ok"] == 3
    assert [site.answered for site in sites.values()] == [1, 1, 1, 0, 0]


def test_the_door_counts_an_oversized_upload_at_the_agreed_limit() -> None:
    """Fault 10: the limit is that of the settings, wherever the message came through."""
    grid, _ = five(lambda plan, probs: bytes(5000))
    door = coordinator(limit=4096)
    assert isinstance(door.server, Server)
    assert next(iter(door.run(1, backend=over(grid, NAMES))))["dropped"] == {"c4": "too_large"}


def test_a_roster_that_knows_nobody_ends_at_the_deadline_without_a_message(
    clock: Callable[[InProcessGrid], Clock],
) -> None:
    grid, _ = five()
    clock(grid)
    asked = backend_module.FlowerBackend(grid, lambda grid: {}, deadline=9.0, pause=0.002)
    with pytest.raises(QuorumError, match="offline"):
        list(coordinator().run(1, backend=lambda sites: asked))
    assert grid.sent == []
    assert roster.by_asking(())(grid) == {}
