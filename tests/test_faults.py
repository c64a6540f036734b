"""The numbered faults of the reference list, each with the behaviour that is written there.

R: one message is refused with a reason, and the round ends with the mean of the others.
A: the run stops cleanly and can be resumed. E: an error at the start, in one sentence.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from builders import (
    MEAN,
    Saying,
    federation,
    gaussian,
    held_out,
    only,
    participants,
    probabilities,
    proxy,
    reseal,
    saying,
    server,
    tampered,
    timeless,
    upload,
)

from fedistill import config, data, experiment, models, store
from fedistill.backends import Reply
from fedistill.client import Client
from fedistill.distill.recipe import Recipe
from fedistill.errors import (
    CheckpointError,
    DataError,
    FedistillError,
    QuorumError,
    Rejected,
    RunError,
    SettingsError,
)
from fedistill.presets import method as preset
from fedistill.server import Server
from fedistill.types import ProxySet, Rows
from fedistill.wire import codec
from fedistill.wire.messages import Failure, Plan

ROWS = 6
Forge = Callable[[Plan, Any], bytes]


def fault(*numbers: int) -> pytest.MarkDecorator:
    """Which numbers of the list a test answers for; the last test counts that none is missing."""
    COVERED.update(numbers)
    return pytest.mark.parametrize("fault", [pytest.param(numbers, id="-".join(map(str, numbers)))])


COVERED: set[int] = set()
ASKED = {*range(1, 29), *range(31, 37), *range(42, 48), 53, 54, 55, 60, 62, 64}


def packed(content: bytes) -> bytes:
    """Any content in the place of coded predictions, told as no change of anything."""
    return b"\0" + codec.pack(content)


def floats(values: Any) -> bytes:
    return packed(np.asarray(values, dtype="<f4").tobytes())


def honest(plan: Plan, probs: Any) -> bytes:
    return upload(plan, "c4", probs).to_bytes()


def said(**changes: Any) -> Forge:
    """The honest answer with other fields in its header."""
    return lambda plan, probs: reseal(honest(plan, probs), **changes)


def with_value(value: float) -> Forge:
    def forge(plan: Plan, probs: Any) -> bytes:
        broken = np.array(probs, dtype=np.float32)
        broken[2, 1] = value
        return upload(plan, "c4", probs, payload=floats(broken)).to_bytes()

    return forge


def with_rows(shape: tuple[int, int]) -> Forge:
    return lambda plan, probs: upload(plan, "c4", np.full(shape, 1 / shape[1])).to_bytes()


def with_payload(content: bytes | Callable[[Any], bytes]) -> Forge:
    return lambda plan, probs: reseal(
        honest(plan, probs), content(probs) if callable(content) else content
    )


def with_part(**parts: bytes) -> Forge:
    return lambda plan, probs: upload(plan, "c4", probs, **parts).to_bytes()


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def bomb() -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()


# --- R: one bad message of five ------------------------------------------------------------------

REFUSED: list[tuple[int, str, str, Forge]] = [
    (1, "NaN", "nonfinite", with_value(np.nan)),
    (2, "infinity", "nonfinite", with_value(np.inf)),
    (2, "minus infinity", "nonfinite", with_value(-np.inf)),
    (3, "beyond float16", "not_probs", with_value(7e4)),
    (3, "beyond float32 when added up", "not_probs", with_value(3e38)),
    (3, "negative", "not_probs", with_value(-0.5)),
    (4, "a row less", "shape", with_rows((ROWS - 1, 3))),
    (4, "a row more", "shape", with_rows((ROWS + 1, 3))),
    (4, "no rows", "shape", with_rows((0, 3))),
    (5, "a class more", "shape", with_rows((ROWS, 4))),
    (5, "a class less", "shape", with_rows((ROWS, 2))),
    (6, "broadcastable", "shape", with_rows((1, 3))),
    (
        6,
        "broadcastable in truth, right in the header",
        "shape",
        lambda plan, probs: upload(plan, "c4", probs, payload=floats(probs[:1])).to_bytes(),
    ),
    (6, "transposed", "shape", said(shape=[3, ROWS])),
    (4, "a row declined that must be answered", "shape", with_part(declined=b"\x80")),
    (4, "more rows declined than were asked", "shape", with_part(declined=b"\x01")),
    (4, "familiarity that nobody asked for", "shape", with_part(ratios=codec.pack(bytes(ROWS)))),
    (9, "a change of what nobody holds", "reference", with_payload(b"\1abcd")),
    (9, "parts that are not there", "format", said(parts=[10**6, 0, 0])),
    (9, "a part less", "format", said(parts=[0, 0])),
    (
        7,
        "float64 bytes",
        "shape",
        with_payload(lambda probs: packed(np.asarray(probs, "<f8").tobytes())),
    ),
    (
        7,
        "float16 bytes",
        "shape",
        with_payload(lambda probs: packed(np.asarray(probs, "<f2").tobytes())),
    ),
    (
        7,
        "integers",
        "not_probs",
        with_payload(lambda probs: packed(np.full(probs.shape, 1 << 30, "<i4").tobytes())),
    ),
    (7, "texts", "shape", with_payload(lambda probs: packed(b"0.30 0.30 0.40\n" * len(probs)))),
    (7, "another codec than agreed", "codec", said(codec="float16")),
    (
        8,
        "a pickle",
        "format",
        with_payload(lambda probs: npy(np.array([{}], dtype=object), allow_pickle=True)),
    ),
    (
        8,
        "a pickle behind the first byte",
        "truncated",
        with_payload(lambda probs: b"\0" + npy(np.array([{}], dtype=object), allow_pickle=True)),
    ),
    (
        8,
        "a packed pickle",
        "shape",
        with_payload(lambda probs: packed(npy(np.array([{}], dtype=object), allow_pickle=True))),
    ),
    (9, "cut in the middle", "truncated", lambda plan, probs: honest(plan, probs)[:-40]),
    (9, "an npy cut short", "truncated", with_payload(lambda probs: b"\0" + npy(probs)[:60])),
    (9, "no predictions", "format", with_payload(b"")),
    (9, "a zip bomb", "shape", with_payload(b"\0" + bomb())),
    (9, "a zip bomb of familiarity", "shape", with_part(ratios=bomb())),
    (9, "a header that claims 1e12 rows", "shape", said(shape=[10**12, 3])),
    (9, "a header that claims 1e300 rows", "shape", said(shape=[10**300, 10**300])),
    (
        10,
        "above the cap",
        "too_large",
        lambda plan, probs: reseal(
            honest(plan, probs), np.random.default_rng(0).bytes((1 << 20) + 1)
        ),
    ),
    (11, "a key more", "fields", said(labels=[0, 1])),
    (11, "a key less", "fields", said(seen=...)),
    (12, "other proxy rows", "proxy_version", said(proxy="0" * 64)),
    (13, "other classes", "class_map", said(classes="0" * 64)),
    (14, "another kind", "kind", said(share="logits")),
    (14, "weights instead of predictions", "kind", said(share="weights")),
    (14, "another temperature", "temperature", said(temperature=3.0)),
    (14, "a plan", "fields", lambda plan, probs: plan.to_bytes()),
    (15, "an old round", "stale_round", said(round=0)),
    (15, "a round to come", "stale_round", said(round=2)),
    (15, "another run", "run", said(run="f" * 16)),
    (17, "the name of another client", "conflict", said(client="c0")),
    (18, "a client that nobody enrolled", "unknown_client", said(client="c9")),
    (19, "a negative number of rows", "size", said(size=-20)),
    (19, "no rows and yet predictions", "size", said(size=0)),
    (19, "NaN rows", "size", said(size="nan")),
    (19, "half a row", "size", said(size=1.5)),
    (19, "true rows", "size", said(size=True)),
    (19, "absurdly many rows", "size", said(size=1 << 60)),
    (19, "more rows than numbers have digits", "size", said(size=10**300)),
    (
        26,
        "a connection lost half way",
        "truncated",
        lambda plan, probs: honest(plan, probs)[: len(honest(plan, probs)) // 2],
    ),
    (26, "nothing", "truncated", lambda plan, probs: b""),
    (
        55,
        "the classes in another order",
        "class_map",
        lambda plan, probs: upload(
            plan, "c4", probs, classes=builders.fingerprint_classes(("b", "a", "c"))
        ).to_bytes(),
    ),
    (64, "a huge text", "field", said(ledger="x" * 10_000)),
    (64, "a header of a megabyte", "format", said(ledger="x" * (1 << 20))),
    (
        64,
        "text that is not UTF-8",
        "format",
        lambda plan, probs: builders.sealed_text(b'{"client": "\xff\xfe"}'),
    ),
    (64, "epsilon as a text", "field", said(epsilon="1\n2")),
    (64, "a negative epsilon", "epsilon", said(epsilon=-0.5)),
    (64, "a mask that is no number", "seen", said(seen="zz")),
    (64, "a mask with classes that do not exist", "seen", said(seen="ff")),
]
COVERED.update(number for number, *_ in REFUSED)


def judge(door: Server, plan: Plan, messages: list[tuple[str, bytes]]) -> tuple[list[Any], dict]:
    """Let a round's messages in one by one, as the round does."""
    answers, dropped, seen = [], {}, set()
    for sender, message in messages:
        try:
            answers.append(door.check(message, plan, sender, seen))
        except Rejected as refusal:
            dropped.setdefault(sender, refusal)
    return answers, dropped


@pytest.mark.parametrize(
    ("number", "reason", "forge"),
    [pytest.param(n, r, f, id=f"{n}-{what}") for n, what, r, f in REFUSED],
)
def test_one_bad_message_of_five_is_refused_and_the_mean_is_that_of_the_other_four(
    number: int, reason: str, forge: Forge
) -> None:
    door = server(rows=ROWS, limit=1 << 20 if number == 10 else 64 << 20)
    plan = door.plan(1)
    probs = [probabilities(ROWS, k) for k in range(5)]
    good = [(f"c{k}", upload(plan, f"c{k}", probs[k]).to_bytes()) for k in range(4)]
    messages = [*good[:2], ("c4", forge(plan, probs[4])), *good[2:]]
    answers, dropped = judge(door, plan, messages)
    assert {name: refusal.reason for name, refusal in dropped.items()} == {"c4": reason}
    assert len(str(dropped["c4"])) < 1000
    door.combine(plan, answers)
    np.testing.assert_allclose(door.table[plan.ask.rows()], np.mean(probs[:4], axis=0), atol=1e-6)


@fault(16)
def test_the_second_message_of_a_client_is_refused_and_the_first_counts(fault: object) -> None:
    door = server(rows=ROWS)
    plan = door.plan(1)
    probs = [probabilities(ROWS, k) for k in range(5)]
    first = [(f"c{k}", upload(plan, f"c{k}", probs[k]).to_bytes()) for k in range(5)]
    again = ("c4", upload(plan, "c4", np.eye(3)[np.zeros(ROWS, int)]).to_bytes())
    answers, dropped = judge(door, plan, [*first, again, first[4]])
    assert dropped["c4"].reason == "duplicate"
    door.combine(plan, answers)
    np.testing.assert_allclose(door.table[plan.ask.rows()], np.mean(probs, axis=0), atol=1e-6)


@fault(17)
def test_two_clients_of_one_name_cannot_start(fault: object) -> None:
    people = participants(3)
    twin = replace(people[0], id="site-2")
    with pytest.raises(DataError, match='"site-2" stands twice'):
        federation([*people, twin])


@fault(18)
def test_a_client_that_was_not_asked_is_refused(fault: object) -> None:
    door = server(5, rows=ROWS, participation=0.6)
    plan = door.plan(1)
    uninvited = next(name for name in door.enrolled if name not in plan.clients)
    message = upload(plan, uninvited, probabilities(ROWS, 1)).to_bytes()
    with pytest.raises(Rejected) as caught:
        door.check(message, plan, uninvited, set())
    assert caught.value.reason == "not_sampled"


@fault(19)
def test_a_number_of_rows_above_the_enrolled_one_is_clamped_to_it(fault: object) -> None:
    weigh = lambda logits, weights, sizes: builders.MEAN.bound_rule()(logits, sizes)  # noqa: E731
    tables = []
    for claim in (16, 1 << 20):
        door = server(3, method=replace(MEAN, rule=weigh), rows=ROWS)
        plan = door.plan(1)
        messages = [
            (
                f"c{k}",
                upload(
                    plan, f"c{k}", probabilities(ROWS, k), size=claim if k == 2 else 16
                ).to_bytes(),
            )
            for k in range(3)
        ]
        answers, dropped = judge(door, plan, messages)
        assert not dropped
        door.combine(plan, answers)
        tables.append(door.table.copy())
    np.testing.assert_array_equal(*tables)


@fault(19)
def test_equal_weights_do_not_look_at_the_number_of_rows(fault: object) -> None:
    tables = []
    for claim in (1, 1 << 30):
        door = server(3, rows=ROWS)
        plan = door.plan(1)
        messages = [
            (f"c{k}", upload(plan, f"c{k}", probabilities(ROWS, k), size=claim).to_bytes())
            for k in range(3)
        ]
        door.combine(plan, judge(door, plan, messages)[0])
        tables.append(door.table.copy())
    np.testing.assert_array_equal(*tables)


# --- predictions that are valid and useless ------------------------------------------------------


def combined(predictions: list[Any]) -> tuple[Any, Any]:
    door = server(len(predictions), rows=ROWS)
    plan = door.plan(1)
    messages = [(f"c{k}", upload(plan, f"c{k}", p).to_bytes()) for k, p in enumerate(predictions)]
    answers, dropped = judge(door, plan, messages)
    assert not dropped
    result = door.combine(plan, answers)
    return result.flags, door.table[plan.ask.rows()]


@fault(20)
def test_equal_predictions_of_two_clients_are_flagged_and_count_half(fault: object) -> None:
    a, b, c = (probabilities(ROWS, k) for k in range(3))
    flags, table = combined([a, b, c, c])
    assert flags == {"c2": ["identical"], "c3": ["identical"]}
    np.testing.assert_allclose(table, (a + b + c) / 3, atol=1e-6)


@fault(21)
def test_one_prediction_for_all_rows_is_flagged_and_does_not_count(fault: object) -> None:
    a, b, c = (probabilities(ROWS, k) for k in range(3))
    flags, table = combined([a, b, c, np.full((ROWS, 3), [0.2, 0.5, 0.3])])
    assert flags == {"c3": ["constant"]}
    np.testing.assert_allclose(table, (a + b + c) / 3, atol=1e-6)


@fault(21)
def test_constants_alone_still_make_a_target(fault: object) -> None:
    says = [np.full((ROWS, 3), row) for row in ([0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8])]
    flags, table = combined(says)
    assert set(flags) == {"c0", "c1", "c2"}
    np.testing.assert_allclose(table, np.mean(says, axis=0), atol=1e-6)


@fault(22)
def test_certainty_on_every_row_is_flagged_and_gets_a_floor(fault: object) -> None:
    a, b = (probabilities(ROWS, k) for k in range(2))
    sure = np.eye(3)[np.arange(ROWS) % 3]
    flags, table = combined([a, b, sure])
    assert flags == {"c2": ["overconfident"]}
    np.testing.assert_allclose(table, (a + b + 0.99 * sure + 0.01 / 3) / 3, atol=1e-6)


# --- a model that predicts nonsense: refused at its own site, before anything is sent ----------


def broken_model(logits: Any) -> tuple[Any, dict[str, Any]]:
    """A round of four sites of which the last one's model says ``logits``."""
    people = [*participants(3), saying("site-9", logits)]
    fed = federation(people, method=replace(MEAN, name="mean"))
    row = next(iter(fed.run(1)))
    return fed, row


def logits_with(value: float, rows: int = 1) -> Any:
    def say(learner: Saying, inputs: Any) -> Any:
        z = np.random.default_rng(0).normal(size=(len(inputs), 3)).astype(np.float32)
        z[:rows, 0] = value
        return z

    return say


WRONG = [
    (1, "NaN", "nonfinite", logits_with(np.nan)),
    (2, "infinity", "nonfinite", logits_with(np.inf)),
    (2, "minus infinity", "nonfinite", logits_with(-np.inf)),
    (3, "two of forty rows beyond 1e4", "extreme", logits_with(5e4, 2)),
    (
        3,
        "beyond float32 when added up",
        "extreme",
        lambda s, x: np.full((len(x), 3), 3e38, "f4") * np.array([1, 1, -1], "f4"),
    ),
    (4, "a row less", "shape", lambda s, x: np.zeros((len(x) - 1, 3), "f4")),
    (5, "a class more", "shape", lambda s, x: np.zeros((len(x), 4), "f4")),
    (6, "broadcastable", "shape", lambda s, x: np.zeros((1, 3), "f4")),
    (7, "integers", "dtype", lambda s, x: np.zeros((len(x), 3), "i8")),
    (7, "texts", "dtype", lambda s, x: np.full((len(x), 3), "0.3")),
    (7, "objects", "dtype", lambda s, x: np.full((len(x), 3), None)),
    (8, "pickled objects", "dtype", lambda s, x: np.array([[{}] * 3] * len(x))),
]


@pytest.mark.parametrize(
    ("number", "reason", "logits"),
    [pytest.param(n, r, f, id=f"{n}-{what}") for n, what, r, f in WRONG],
)
def test_a_model_that_predicts_nonsense_costs_its_site_the_round_and_nobody_else(
    number: int, reason: str, logits: Any
) -> None:
    fed, row = broken_model(logits)
    assert row["dropped"] == {"site-9": reason}
    assert (row["clients_ok"], row["clients_failed"]) == (3, 1)
    alone = federation(participants(3), method=replace(MEAN, name="mean"))
    next(iter(alone.run(1)))
    np.testing.assert_array_equal(fed.server.table, alone.server.table)


@fault(3)
def test_a_single_logit_beyond_1e4_is_clipped_and_stays_a_probability(fault: object) -> None:
    people = [*participants(3), saying("site-9", logits_with(6e4))]
    fed = federation(people, method=replace(MEAN, name="mean"), proxy=proxy(200))
    row = next(iter(fed.run(1)))
    assert row["dropped"] == {}
    assert np.isfinite(fed.server.table).all()


@fault(7)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_floats_of_any_width_are_cast_after_the_check(fault: object, dtype: str) -> None:
    logits = np.random.default_rng(0).normal(size=(40, 3)).astype("f2")
    fed, row = broken_model(lambda s, x: logits.astype(dtype))
    assert row["dropped"] == {}
    reference, _ = broken_model(lambda s, x: logits.astype("f8"))
    np.testing.assert_array_equal(fed.server.table, reference.server.table)


@fault(1)
def test_familiarity_that_is_no_number_is_refused_too(fault: object) -> None:
    class Unsure(Saying):
        def familiarity(self, inputs: Any) -> Any:
            return np.full(len(inputs), np.nan)

    logits = np.random.default_rng(0).normal(size=(40, 3))
    people = [*participants(3), Client("site-9", lambda: Unsure(logits), gaussian(9, 9))]
    assert next(iter(federation(people).run(1)))["dropped"] == {"site-9": "nonfinite"}


# --- the stock-strategy table, with our server ---------------------------------------------------

SHARE = np.array([0.1, 0.2, 0.4, 0.5])
"""What four honest sites say about class 0, for 1, 2, 4 and 5 of the table; their mean is 0.3."""


def about(first: float) -> Any:
    rows = np.tile([first, 0.9 - first, 0.1], (ROWS, 1))
    rows[0] = rows[0, [1, 0, 2]]  # not one prediction for all rows
    return rows


STOCK: list[tuple[str, Forge, str | None]] = [
    ("NaN array", with_payload(lambda x: floats(np.full_like(x, np.nan))), "nonfinite"),
    ("Inf", with_payload(lambda x: floats(np.full_like(x, np.inf))), "nonfinite"),
    ("a row more", with_rows((ROWS + 1, 3)), "shape"),
    ("broadcastable", with_rows((1, 3)), "shape"),
    ("float64 that says so", lambda p, x: upload(p, "c4", x, codec="float64").to_bytes(), "codec"),
    ("string", with_payload(packed(b"three" * 10)), "shape"),
    ("wrong key", lambda p, x: reseal(honest(p, x), arrays=[1], seen=...), "fields"),
    ("num-examples 1e12", said(size=1 << 39), None),
    ("num-examples negative", said(size=-20), "size"),
    ("num-examples 0", said(size=0), "size"),
]


@pytest.mark.parametrize(("forge", "reason"), [pytest.param(f, r, id=name) for name, f, r in STOCK])
def test_where_stock_strategies_break_the_target_is_the_mean_of_the_good(
    forge: Forge, reason: str | None
) -> None:
    door = server(rows=ROWS)
    plan = door.plan(1)
    good = [(f"c{k}", upload(plan, f"c{k}", about(x)).to_bytes()) for k, x in enumerate(SHARE)]
    answers, dropped = judge(door, plan, [*good, ("c4", forge(plan, about(0.3)))])
    assert [refusal.reason for refusal in dropped.values()] == ([reason] if reason else [])
    door.combine(plan, answers)
    np.testing.assert_allclose(door.table[plan.ask.rows()], about(0.3), atol=1e-6)


@pytest.mark.parametrize("kind", ["nonfinite", "size"])
def test_five_bad_of_five_is_a_shortage_and_not_a_crash(kind: str) -> None:
    door = server(rows=ROWS)
    plan = door.plan(1)
    bad = {"nonfinite": {"payload": floats(np.full((ROWS, 3), np.nan))}, "size": {"size": 0}}[kind]
    messages = [
        (f"c{k}", upload(plan, f"c{k}", probabilities(ROWS, k), **bad).to_bytes()) for k in range(5)
    ]
    answers, dropped = judge(door, plan, messages)
    assert {refusal.reason for refusal in dropped.values()} == {kind}
    with pytest.raises(QuorumError, match="0 usable uploads, the quorum is 3"):
        door.combine(plan, answers)
    assert (door.round, door.targets, door.table.any()) == (0, None, False)


# --- participation -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The pause before a round is tried again is not what is tested."""
    if "real_time" not in request.keywords:
        monkeypatch.setattr("fedistill.federation.time.sleep", lambda seconds: None)


@fault(23)
def test_a_client_that_is_late_three_times_is_only_probed_and_comes_back(fault: object) -> None:
    awake = [False]

    def late(data: bytes, plan: Plan) -> bytes | Failure:
        return data if awake[0] else Failure("site-1", plan.round, "late")

    line: list[Any] = []

    def backend(sites: Any) -> Any:
        line.append(tampered(only("site-1", late))(sites))
        return line[0]

    rows = []
    for row in federation(5).run(12, held_out(), backend=backend):
        rows.append(row)
        awake[0] = row["round"] >= 7
    assert [row["dropped"].get("site-1") for row in rows] == [
        "late",
        "late",
        "late",
        None,
        None,
        "late",
        None,
        None,
        None,
        None,
        None,
        None,
    ]
    assert [row["flags"].get("site-1") == ["inactive"] for row in rows] == (
        [False] * 2 + [True] * 6 + [False] * 4
    )
    asked = [number for number, names in enumerate(line[0].asked, start=1) if "site-1" in names]
    assert asked == [1, 2, 3, 6, 9, 10, 11, 12]
    assert [row["clients_ok"] for row in rows] == [4] * 8 + [5] * 4


@fault(24)
def test_when_nobody_answers_the_run_gives_up_after_three_tries_and_changes_nothing(
    fault: object, tmp_path: Path
) -> None:
    fed = federation()
    assert len(list(fed.run(2, held_out(), out=tmp_path))) == 2
    before = fed.server.digest(), fed.server.targets
    tries: list[Any] = []

    def mute(sites: Any) -> Any:
        line = tampered(lambda name, data, plan: Failure(name, plan.round, "timeout"))(sites)
        tries.append(line)
        return line

    again = federation()
    with pytest.raises(QuorumError) as caught:
        list(again.run(3, held_out(), out=tmp_path, resume=True, backend=mute))
    assert caught.value.exit_code == 3
    assert "the quorum is 3 (site-0: timeout, " in str(caught.value)
    assert len(tries[0].asked) == 3
    assert again.server.digest() == before[0]
    assert again.server.targets == before[1]
    assert len(again.history) == 2


@fault(25)
@pytest.mark.parametrize("honest", [0, 1, 2])
def test_fewer_than_three_are_never_added_up_and_the_run_resumes_to_the_same_end(
    fault: object, tmp_path: Path, honest: int
) -> None:
    whole = federation()
    expected = list(whole.run(3, held_out(), out=tmp_path / "whole"))

    def shortage(name: str, data: bytes, plan: Plan) -> Any:
        keep = plan.round < 2 or int(name[-1]) < honest
        return Reply(name, data) if keep else Failure(name, plan.round, "late")

    broken = federation()
    with pytest.raises(QuorumError, match=f"round 2: {honest} usable uploads"):
        list(broken.run(3, held_out(), out=tmp_path / "broken", backend=tampered(shortage)))
    assert broken.server.round == 1
    again = federation()
    assert [
        row["round"] for row in again.run(3, held_out(), out=tmp_path / "broken", resume=True)
    ] == [2, 3]
    assert again.server.digest() == whole.server.digest()
    assert timeless(again.history) == timeless(expected)


@fault(24, 25)
def test_a_shortage_that_passes_is_tried_again_after_a_growing_pause(
    fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("fedistill.federation.time.sleep", pauses.append)
    calls = [0]

    def shaky(name: str, data: bytes, plan: Plan) -> Any:
        calls[0] += 1
        return Reply(name, data) if calls[0] > 8 else Failure(name, plan.round, "late")

    whole, fed = federation(), federation()
    list(whole.run(1, held_out()))
    assert len(list(fed.run(1, held_out(), backend=tampered(shaky)))) == 1
    assert pauses == sorted(pauses)
    assert len(pauses) == 2
    assert fed.server.digest() == whole.server.digest()


@fault(24, 25)
def test_the_command_ends_with_3_and_says_quorum_and_goes_on_later(
    fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = builders.write_settings(tmp_path, rounds=2)
    whole = experiment.run(settings, out=tmp_path / "whole")
    from fedistill.backends.serial import Serial

    with monkeypatch.context() as patch:
        patch.setattr(
            Serial,
            "run",
            lambda self, plan: iter(Failure(name, plan.round, "late") for name in plan.clients),
        )
        with pytest.raises(QuorumError) as caught:
            experiment.run(settings, out=tmp_path / "run")
    assert caught.value.exit_code == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed:quorum"
    assert (
        experiment.run(settings, out=tmp_path / "run", resume=True)["soft_targets_sha256"]
        == (whole["soft_targets_sha256"])
    )


@fault(26)
def test_a_client_that_dies_half_way_through_its_upload_is_dropped(fault: object) -> None:
    fed = federation()
    cut = tampered(only("site-2", lambda data, plan: data[: len(data) // 3]))
    rows = list(fed.run(2, held_out(), backend=cut))
    assert [row["dropped"] for row in rows] == [{"site-2": "truncated"}] * 2
    assert [row["clients_ok"] for row in rows] == [3, 3]


# --- crashes, disk, state (the systematic kills are in test_kill.py) -----------------------------


class Killed(BaseException):
    """Stands for kill -9."""


def kill_in(monkeypatch: pytest.MonkeyPatch, name: str, when: int, after: bool) -> None:
    """Die in the n-th call of a function of the store."""
    real, calls = getattr(store, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == when and not after:
            raise Killed
        result = real(*args, **kwargs)
        if calls[0] == when:
            raise Killed
        return result

    monkeypatch.setattr(store, name, call)


@fault(27, 28)
@pytest.mark.parametrize(
    ("name", "when", "after"),
    [
        ("save_state", 9, False),
        ("save_state", 9, True),
        ("save_state", 10, False),
        ("save_state", 10, True),
        ("save_lines", 2, False),
        ("save_lines", 2, True),
        ("save_lines", 3, False),
    ],
    ids=[
        "clients saved but one",
        "clients saved",
        "before the server's save",
        "after the server's save",
        "before the log",
        "after the log",
        "the last log",
    ],
)
def test_a_kill_between_two_saves_resumes_to_the_same_bytes(
    fault: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    when: int,
    after: bool,
) -> None:
    """Four sites and the server save in each round: 9 is the last site of round 2."""
    whole = federation()
    expected = list(whole.run(3, held_out(), out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_in(patch, name, when, after)
        with pytest.raises(Killed):
            list(federation().run(3, held_out(), out=tmp_path / "run"))
    again = federation()
    list(again.run(3, held_out(), out=tmp_path / "run", resume=True))
    assert again.server.digest() == whole.server.digest()
    assert timeless(again.history) == timeless(expected)
    assert builders.read_lines(tmp_path / "run" / "rounds.jsonl") == timeless(expected)


@fault(28)
def test_a_fresh_start_in_a_used_folder_never_resumes_what_was_there_before(
    fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(federation(seed=1).run(3, held_out(), out=tmp_path / "run"))
    whole = federation(seed=1)
    list(whole.run(4, held_out(), out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_in(patch, "save_state", 2, after=True)
        with pytest.raises(Killed):
            list(federation(seed=1).run(4, held_out(), out=tmp_path / "run"))
    again = federation(seed=1)
    assert len(list(again.run(4, held_out(), out=tmp_path / "run", resume=True))) == 4
    assert again.server.digest() == whole.server.digest()


@fault(28)
def test_a_site_that_was_refused_in_a_round_resumes_as_if_nothing_had_happened(
    fault: object, tmp_path: Path
) -> None:
    """The model trained in the round it was refused in; that too must survive a restart."""

    def people() -> list[Client]:
        def say(learner: Saying, inputs: Any) -> Any:
            z = np.full((len(inputs), 3), float(learner.fitted), "f4")
            z[:, 0] = np.arange(len(inputs)) % 7
            return z * (np.nan if learner.fitted == 2 else 1)

        return [*participants(3), saying("site-9", say)]

    whole = federation(people())
    rows = list(whole.run(3, out=tmp_path / "whole"))
    assert [row["dropped"] for row in rows] == [{}, {"site-9": "nonfinite"}, {}]
    list(federation(people()).run(2, out=tmp_path / "run"))
    again = federation(people())
    list(again.run(3, out=tmp_path / "run", resume=True))
    assert timeless(again.history) == timeless(rows)
    assert again.server.digest() == whole.server.digest()


@fault(31)
@pytest.mark.parametrize("when", [1, 3, 5, 8, 10])
def test_a_full_disk_stops_the_run_with_a_sentence_and_it_resumes_to_the_same_end(
    fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    whole = federation()
    list(whole.run(2, held_out(), out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_state", _fail_at(store.save_state, when))
        with pytest.raises(RunError, match=r"disk full while writing .*: free") as caught:
            list(federation().run(2, held_out(), out=tmp_path / "run"))
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "run").rglob("*.tmp"))
    again = federation()
    list(again.run(2, held_out(), out=tmp_path / "run", resume=True))
    assert again.server.digest() == whole.server.digest()


def _fail_at(real: Any, when: int) -> Any:
    """The n-th saved state meets a full disk at its sync."""
    calls = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != when:
            return real(*args, **kwargs)
        with pytest.MonkeyPatch.context() as patch:

            def full(handle: int) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "fsync", full)
            return real(*args, **kwargs)

    return call


@fault(32)
def test_a_folder_that_cannot_be_written_stops_the_run_before_it_computes(
    fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = builders.write_settings(tmp_path)
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(data, "prepare", lambda *a: pytest.fail("something was computed"))
    with pytest.raises(RunError, match="choose another folder with --out") as caught:
        experiment.run(settings, out=tmp_path / "taken")
    assert caught.value.exit_code == 3
    monkeypatch.setattr(Path, "write_bytes", _read_only)
    with pytest.raises(RunError, match="Read-only file system"):
        experiment.run(settings, out=tmp_path / "run")


def _read_only(path: Path, content: bytes) -> int:
    raise OSError(errno.EROFS, "Read-only file system")


def persistent(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name in {"state", "server"})


@fault(33)
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("eighth", range(8))
def test_every_file_cut_at_an_eighth_falls_back_and_says_so(
    fault: object, tmp_path: Path, eighth: int, cache: bool
) -> None:
    """With the server's file the lost round is asked again and ends in the same bytes.

    With a cache a site that fell back no longer holds what the server relies on: it says so, and
    is told all of it a round later.
    """
    method = preset("fedistill", cache=cache)
    whole = federation(method=method)
    list(whole.run(4, out=tmp_path / "whole"))
    list(federation(method=method).run(2, out=tmp_path / "run"))
    files = persistent(tmp_path / "run")
    assert len(files) == 5
    place = files[eighth % 5]
    content = place.read_bytes()
    place.write_bytes(content[: len(content) * eighth // 8])
    again = federation(method=method)
    rows = list(again.run(4, out=tmp_path / "run", resume=True))
    notes = [note for note in again.notes if "damaged, the generation before it was used" in note]
    assert len(notes) == 1
    behind = cache and place.name == "state"
    lost = {place.parent.name: "reference"} if behind else {}
    assert [row["dropped"] for row in rows[-2:]] == [lost, {}]
    assert [row["clients_ok"] for row in rows[-2:]] == [4 - len(lost), 4]
    assert len(again.history) == 4
    if place.name == "server":
        assert again.server.digest() == whole.server.digest()


@fault(33)
def test_a_server_that_fell_back_two_rounds_behind_its_sites_still_ends_in_the_same_bytes(
    fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = federation()
    list(whole.run(4, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_in(patch, "save_state", 14, after=True)  # three sites have answered round 3
        with pytest.raises(Killed):
            list(federation().run(4, out=tmp_path / "run"))
    (tmp_path / "run" / "checkpoint" / "server").write_bytes(b"")
    again = federation()
    list(again.run(4, out=tmp_path / "run", resume=True))
    assert sum("ahead of the server" in note for note in again.notes) == 3
    assert again.server.digest() == whole.server.digest()


@fault(33)
def test_when_both_generations_are_damaged_the_run_does_not_start_afresh(
    fault: object, tmp_path: Path
) -> None:
    list(federation().run(2, out=tmp_path))
    for place in persistent(tmp_path):
        kept = {p: p.read_bytes() for p in (place, store.previous(place))}
        for p in kept:
            p.write_bytes(b"FDstate\n")
        with pytest.raises(CheckpointError, match="damaged") as caught:
            list(federation().run(3, out=tmp_path, resume=True))
        assert caught.value.exit_code == 3
        for p, content in kept.items():
            p.write_bytes(content)
    assert len(list(federation().run(3, out=tmp_path, resume=True))) == 1


@fault(34)
def test_a_checkpoint_that_carries_code_is_refused(fault: object, tmp_path: Path) -> None:
    list(federation().run(1, out=tmp_path))
    for place in persistent(tmp_path):
        content = place.read_bytes()
        torch.save({"w": torch.zeros(1)}, place)
        with pytest.raises(CheckpointError, match="can carry code"):
            list(federation().run(2, out=tmp_path, resume=True))
        place.write_bytes(content)


def other_model(change: Callable[[list[Client]], dict[str, Any]]) -> Any:
    people = participants()
    options = change(people)
    return federation(people, **options)


def _wider(people: list[Client]) -> dict[str, Any]:
    people[0] = replace(people[0], build=partial(models.MLP, 4, 3, width=9))
    return {}


def _tree(people: list[Client]) -> dict[str, Any]:
    people[0] = replace(people[0], build=models.logistic_regression)
    return {}


@fault(35)
@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (_wider, ["site-0", "other shape", "[9, 4]"]),
        (_tree, ["site-0", "another model", "missing"]),
        (lambda people: {"student": partial(models.MLP, 4, 3, width=5)}, ["student", "missing"]),
        (lambda people: {"seed": 8}, ["other settings", "seed"]),
        (lambda people: {"proxy": proxy(41)}, ["other settings", "proxy"]),
        (lambda people: {"per_round": 10}, ["other settings", "proxy rows in a round"]),
        (lambda people: {"method": "ds-fl"}, ["other settings", "method"]),
    ],
    ids=["wider", "a tree", "student", "seed", "proxy", "per round", "method"],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    fault: object, tmp_path: Path, change: Any, texts: list[str]
) -> None:
    list(federation().run(1, out=tmp_path))
    with pytest.raises(CheckpointError) as caught:
        list(other_model(change).run(2, out=tmp_path, resume=True))
    assert caught.value.exit_code == 3
    for text in [*texts, "resume with the"]:
        assert text in str(caught.value)


@fault(36)
def test_a_checkpoint_of_a_newer_format_says_what_it_needs(
    fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "SCHEMA", 9)
        list(federation().run(1, out=tmp_path))
    with pytest.raises(CheckpointError, match="format 9 and needs a newer fedistill"):
        list(federation().run(2, out=tmp_path, resume=True))


# --- settings, clock -----------------------------------------------------------------------------


@fault(42)
@pytest.mark.parametrize(
    "text",
    [
        "rounds = 0",
        "seed = -1",
        "[clients]\nlr = 0",
        "[clients]\nlr = nan",
        "[clients]\ncount = 0",
        "[clients]\nparticipation = 0",
        "[clients]\nparticipation = 1.5",
        "[clients]\nalpha = -1",
        "[clients]\ncount = 3\nquorum = 4",
        "[proxy]\nrows = 5\nper_round = 6",
        "[proxy]\nrows = 0",
        "[method]\ntemperature = 0",
        '[method]\nsharpen = "era:-1"',
        '[privacy]\nmechanism = "magic"',
        "[backend]\nmax_message_mb = 0",
    ],
)
def test_impossible_settings_are_an_error_before_anything_is_read(fault: object, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        config.parse(text)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 1
    assert "expected" in str(caught.value) or "unknown" in str(caught.value)


DATED = {"log.py", "status", "keys.py", "clock.py", "receipts.py", "audit_log.py", "ledger.py"}


@fault(43)
def test_no_wall_clock_in_the_logic(fault: object, tmp_path: Path) -> None:
    """The clock jumps by a day and back between any two calls; nothing notices."""
    source = Path(experiment.__file__).parent
    for place in source.rglob("*.py"):
        if DATED & set(place.relative_to(source).parts):
            continue  # dates for people and certificates, and the check of a site's clock
        text = place.read_text()
        assert not re.search(r"\btime\.time(_ns)?\(|datetime\.now|utcnow|localtime", text), place
    with pytest.MonkeyPatch.context() as patch:
        ticks = iter(range(10**9))
        patch.setattr(time, "time", lambda: 1e9 + (next(ticks) % 2) * 86_400)
        rows = list(federation().run(2, held_out(), out=tmp_path))
    assert timeless(rows) == timeless(federation().run(2, held_out()))
    assert all(0 <= row["seconds"] < 60 for row in rows)


# --- data ----------------------------------------------------------------------------------------


def empty() -> Rows:
    return Rows(np.empty((0, 4), np.float32), np.empty(0, np.int64))


@fault(44)
@pytest.mark.parametrize("preset", ["fedistill", "fedmd", "ds-fl", "feddf"])
def test_a_client_without_rows_learns_and_does_not_teach(fault: object, preset: str) -> None:
    people = participants(4)
    people[1] = replace(people[1], data=empty())
    fed = federation(people, method=preset)
    rows = list(fed.run(3, held_out()))
    assert [row["clients_ok"] for row in rows] == [4, 4, 4]
    assert "site-1 has no rows of its own: it learns and does not teach" in fed.notes
    rest = federation([people[0], people[2], people[3]], method=preset)
    list(rest.run(3, held_out()))
    np.testing.assert_array_equal(fed.server.table, rest.server.table)
    before = rows[0]["client_accuracy"]["site-1"]
    assert rows[-1]["client_accuracy"]["site-1"] != before or before > 0.8


@fault(44)
def test_a_client_without_rows_does_not_count_for_the_quorum(fault: object) -> None:
    people = participants(4)
    people[0], people[1] = replace(people[0], data=empty()), replace(people[1], data=empty())
    assert federation(people).server.quorum == 2
    assert len(list(federation(people).run(1, held_out()))) == 1
    with pytest.raises(QuorumError, match="2 usable uploads, the quorum is 3"):
        list(federation(people, quorum=3).run(1, held_out()))


@fault(45)
def test_a_client_with_one_class_takes_part_and_it_is_said(fault: object) -> None:
    people = participants(4)
    people[1] = replace(people[1], data=gaussian(12, 1, labels=[2]))
    fed = federation(people)
    rows = list(fed.run(2, held_out()))
    assert "site-1 has rows of one class only" in fed.notes
    assert [row["dropped"] for row in rows] == [{}, {}]
    plan = fed.server.plan(3)
    message = fed.sites["site-1"].answer(plan.message("site-1"))
    answer = fed.server.check(message, plan, "site-1", set())
    assert answer.upload.seen == "0", "which classes it has stays with it where no rule asks"


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, inputs: Any) -> Any:
        return self.head(self.norm(inputs))


@fault(46)
@pytest.mark.parametrize("rows", [1, 2, 5, 9])
@pytest.mark.parametrize("preset", ["fedistill", "ds-fl"])
def test_one_row_or_a_last_batch_of_one_trains_with_batch_norm(
    fault: object, rows: int, preset: str, tmp_path: Path
) -> None:
    people = participants(4)
    people[1] = replace(
        people[1], build=Normed, data=gaussian(rows, 1), training=Recipe(epochs=1, batch_size=4)
    )
    fed = federation(people, method=preset)
    result = list(fed.run(2, held_out(), out=tmp_path))
    assert [row["dropped"] for row in result] == [{}, {}]
    again = federation(people, method=preset)
    list(again.run(3, held_out(), out=tmp_path, resume=True))
    assert again.history[-1]["dropped"] == {}


SECRET = "31415926"


@fault(47)
@pytest.mark.parametrize(
    ("name", "write", "where"),
    [
        ("ragged", lambda p: p.write_text(f"a,b,label\n1,2,x\n{SECRET},y\n3,4,x\n"), "line 3"),
        ("no label", lambda p: p.write_text(f"a,b,label\n1,2,x\n{SECRET},4,\n3,4,y\n"), "line 3"),
        ("infinite", lambda p: p.write_text(f"a,b,label\n1,2,x\n{SECRET},inf,y\n"), "line 3"),
    ],
)
def test_bad_text_rows_are_named_by_their_line_and_never_shown(
    fault: object, tmp_path: Path, name: str, write: Any, where: str
) -> None:
    write(tmp_path / "t.csv")
    with pytest.raises(DataError) as caught:
        data.read("csv:t.csv", config.DataSettings(path=str(tmp_path)))
    assert where in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.exit_code == 3


@fault(47)
@pytest.mark.parametrize("label", [-1, 10_000, 31415926, 0.5, np.nan])
def test_bad_labels_of_arrays_are_named_by_their_row_and_never_shown(
    fault: object, tmp_path: Path, label: float
) -> None:
    labels = np.array([0, 1, label, 1])
    np.savez(tmp_path / "t.npz", x=np.zeros((4, 2)), y=labels)
    with pytest.raises(DataError, match="row 2") as caught:
        data.read("npz:t.npz", config.DataSettings(path=str(tmp_path)))
    assert SECRET not in str(caught.value)


@fault(47)
def test_bad_rows_from_python_are_named_by_client_and_row(fault: object) -> None:
    for label in (-1, 3, 31415926):
        people = participants(3)
        people[1].data.labels[5] = label
        with pytest.raises(DataError, match=r"site-1.*row 5") as caught:
            federation(people)
        assert SECRET not in str(caught.value)
    people = participants(3)
    people[2].data.inputs[7, 1] = np.nan
    with pytest.raises(DataError, match=r"site-2.*row 7"):
        federation(people)
    with pytest.raises(DataError, match="equal length"):
        Rows(np.zeros((3, 2), np.float32), np.zeros(2, np.int64))
    with pytest.raises(DataError, match="row 1 is not"):
        ProxySet(np.array([[1.0], [np.inf]]))


@fault(53)
@pytest.mark.parametrize("where", ["server", "site"])
def test_proxy_rows_that_change_during_the_run_stop_it_and_it_resumes(
    fault: object, tmp_path: Path, where: str
) -> None:
    whole = federation()
    list(whole.run(3, out=tmp_path / "whole"))
    shared = proxy()
    fed = federation(proxy=shared)
    run = fed.run(3, out=tmp_path / "run")
    next(run)
    if where == "server":
        shared.inputs[3, 1] += 1
    else:
        fed.sites["site-2"].proxy = ProxySet(shared.inputs.copy())
        assert fed.sites["site-2"].proxy.fingerprint == shared.fingerprint
        fed.sites["site-2"].proxy.inputs[3, 1] += 1
    with pytest.raises(RunError, match="proxy rows changed during the run") as caught:
        list(run)
    assert caught.value.exit_code == 3
    again = federation()
    list(again.run(3, out=tmp_path / "run", resume=True))
    assert again.server.digest() == whole.server.digest()


@fault(54)
def test_private_rows_among_the_proxy_rows_are_counted_at_the_client(fault: object) -> None:
    people = participants(3)
    shared = proxy()
    inputs = people[1].data.inputs
    inputs[[2, 5]] = shared.inputs[[7, 9]]
    fed = federation(people, proxy=shared)
    list(fed.run(1))
    assert [note for note in fed.notes if "proxy rows" in note] == [
        "site-1: private rows that are also proxy rows: 2"
    ]
    assert data.overlap(inputs, shared.inputs).tolist() == [2, 5]


@fault(55, 12)
@pytest.mark.parametrize(
    ("change", "reason"),
    [({"classes": ("b", "a", "c")}, "class_map"), ({"proxy": proxy(41)}, "proxy_version")],
)
def test_a_site_refuses_to_work_for_a_server_that_means_something_else(
    fault: object, change: dict[str, Any], reason: str
) -> None:
    fed, other = federation(), federation(**change)
    run = fed.run(1)
    next(run)
    site = fed.sites["site-0"]
    before = {k: v.copy() for k, v in site.learner.state_dict().items()}
    with pytest.raises(Rejected) as caught:
        site.answer(other.server.plan(1).to_bytes())
    assert caught.value.reason == reason
    for name, value in site.learner.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


# --- process -------------------------------------------------------------------------------------


def command(settings: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fedistill", "run", str(settings), "--out", str(out), *more]


@fault(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_real_run_with_130_and_resume_ends_in_the_same_bytes(
    fault: object, tmp_path: Path, number: signal.Signals
) -> None:
    settings = builders.write_settings(tmp_path, rounds=40)
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(settings, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 100
        while not (out / "rounds.jsonl").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, told = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130, told
    assert "Traceback" not in told
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    done = len((out / "rounds.jsonl").read_text().splitlines())
    assert done < 40
    assert not list(out.rglob("*.tmp"))
    short = [f"rounds={done + 2}"]
    resumed = experiment.run(settings, overrides=short, out=out, resume=True)
    whole = experiment.run(settings, overrides=short, out=tmp_path / "whole")
    assert resumed["status"] == "done"
    assert resumed["soft_targets_sha256"] == whole["soft_targets_sha256"]
    lines = [builders.read_lines(p / "rounds.jsonl") for p in (out, tmp_path / "whole")]
    assert lines[0] == lines[1]


@fault(62)
@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[clients]\nepoch = 2", 'did you mean "epochs"?'),
        ("[client]\ncount = 2", '"clients"'),
        ('[method]\npreset = "ds_fl"', 'did you mean "ds-fl"?'),
        ("rounds = 2.5", "expected a whole number"),
        ('[clients]\nlr = "fast"', "expected a number"),
        ('seed = "7"', "expected a whole number"),
        ("[clients]\ncount = true", "a whole number"),
        ('[method]\nrule = "maen"', '"mean"'),
        ("[data]\ndrop = 3", "expected a list"),
        ("data = 3", "expected a table"),
        ("rounds = \nseed = 1", "TOML"),
    ],
)
def test_unknown_keys_and_wrong_types_come_with_the_line_and_the_nearest_key(
    fault: object, text: str, hint: str, tmp_path: Path
) -> None:
    place = tmp_path / "s.toml"
    place.write_text(text)
    with pytest.raises(SettingsError) as caught:
        config.load(place)
    assert caught.value.exit_code == 2
    assert hint in str(caught.value)
    assert caught.value.problems[0].line in (1, 2)


@fault(62)
def test_all_problems_of_a_file_are_told_at_once(fault: object) -> None:
    with pytest.raises(SettingsError) as caught:
        config.parse('rounds = 0\nsed = 1\n[clients]\nlr = -1\nmodel = "mpl"\n')
    assert len(caught.value.problems) == 4


@fault(64)
@pytest.mark.parametrize(
    "name",
    ["x\n2026-01-01 ERROR all is lost", "x" * 100_000, "\ud800\x1b[2J", "\r\n\r\n", ""],
    ids=["a log line", "long", "no text", "line ends", "empty"],
)
def test_names_and_reasons_from_outside_cannot_write_into_the_log(
    fault: object, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(sender: str, message: bytes, plan: Plan) -> Any:
        honest = Reply(sender, message)
        if sender != "site-3":
            return honest
        failures = [Failure(known, plan.round, name) for known in (sender, name)]
        return [*failures, Reply(name, message)]

    with caplog.at_level(logging.DEBUG):
        row = next(iter(federation().run(1, held_out(), out=tmp_path, backend=tampered(change))))
    text = (tmp_path / "rounds.jsonl").read_text()
    assert len(text.splitlines()) == 1
    assert len(text) < 4000
    assert row["clients_ok"] == 3
    for key, reason in row["dropped"].items():
        assert re.fullmatch(r"[A-Za-z0-9_:.-]{0,64}", key)
        assert re.fullmatch(r"[A-Za-z0-9_:-]{0,40}", reason)
    for record in caplog.records:  # one line each, whatever a client calls itself
        assert len(record.getMessage().splitlines()) == 1
        assert len(record.getMessage()) < 300
        assert record.getMessage().isascii()


def test_every_fault_that_was_asked_for_has_a_test() -> None:
    covered = COVERED | {number for number, *_ in WRONG}
    assert ASKED - covered == set()


def test_all_errors_belong_to_one_family_with_an_exit_code() -> None:
    for kind in (CheckpointError, DataError, QuorumError, Rejected, RunError, SettingsError):
        assert issubclass(kind, FedistillError)
        assert kind.exit_code in {2, 3}


@pytest.mark.parametrize("claim", [1, 1 << 5, 1 << 39])
@pytest.mark.parametrize("number", [19])
def test_the_fedavg_baseline_weighs_by_enrolled_rows_whatever_is_claimed_later(
    number: int, claim: int
) -> None:
    people = [replace(client, build=partial(models.Linear, 4, 3)) for client in participants(4)]

    def run(size: int) -> Any:
        fed = federation(people, method="fedavg")
        lie = only("site-3", lambda message, plan: reseal(message, size=size))
        list(fed.run(1, backend=tampered(lie)))
        return fed.server.student.state_dict()

    for honest, swayed in zip(run(16).values(), run(claim).values(), strict=True):
        np.testing.assert_array_equal(swayed, honest)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": -20}, "size"),
        ({"size": 0}, "size"),
        ({"size": 1 << 60}, "size"),
        ({"proxy": "0" * 64}, "proxy_version"),
        ({"classes": "0" * 64}, "class_map"),
        ({"codec": "zz"}, "codec"),
        ({"epsilon": -3.0}, "epsilon"),
        ({"shape": [1, 2]}, "shape"),
        ({"share": "probs"}, "kind"),
    ],
)
@pytest.mark.parametrize("number", [19])
def test_the_fedavg_baseline_has_the_same_door(
    number: int, change: dict[str, Any], reason: str
) -> None:
    people = [replace(client, build=partial(models.Linear, 4, 3)) for client in participants(4)]
    fed = federation(people, method="fedavg")
    lie = only("site-3", lambda message, plan: reseal(message, **change))
    (row,) = fed.run(1, backend=tampered(lie))
    assert row["dropped"] == {"site-3": reason}


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # typer on click 8.4
@pytest.mark.parametrize("number", [60])
def test_an_interrupted_command_says_how_to_go_on(
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from fedistill import cli

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupt)
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", str(builders.write_settings(tmp_path))])
    assert caught.value.code == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
