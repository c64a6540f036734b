"""The server's door under fire: it refuses or counts, and never below the quorum."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from builders import (
    MEAN,
    federation,
    plain,
    probabilities,
    reseal,
    sealed_text,
    server,
    tampered,
    upload,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedistill.aggregate import chunked
from fedistill.aggregate.rules import RULES
from fedistill.backends import Reply
from fedistill.errors import QuorumError, Rejected
from fedistill.presets import method
from fedistill.server import Server
from fedistill.wire import codec
from fedistill.wire.envelope import pack_mask, unpack_mask
from fedistill.wire.messages import UPLOAD_FIELDS, Failure, Plan

ROWS = 6
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.lists(st.integers(-3, 10**13), max_size=3)
    | st.sampled_from(["probs", "none", "weights", "float32", "u8", "c0", "ff", "-1", "0x1", "1e9"])
)
HEADERS = st.dictionaries(
    st.sampled_from([*UPLOAD_FIELDS]) | st.text(max_size=6), VALUES, max_size=4
)
ARRAYS = st.tuples(
    st.sampled_from([b"\0", b"\0", b"\0", b"\1abcd", b"\2abcd", b"\3abcd", b""]),
    st.sampled_from(["<f4", "<f8", "<f2", "<i4", "|u1", "|S3"]),
    st.sampled_from([(ROWS, 3), (3, ROWS), (1, 3), (ROWS, 1), (0, 3), (ROWS, 4), (2 * ROWS, 3)]),
    st.binary(min_size=1, max_size=8),
)


def payload(start: bytes, dtype: str, shape: tuple[int, int], filling: bytes) -> bytes:
    size = np.dtype(dtype).itemsize * shape[0] * shape[1]
    return start + codec.pack((filling * (size // len(filling) + 1))[:size])


@st.composite
def bad_messages(draw: st.DrawFn, plan: Plan, name: str, seed: int) -> bytes:
    """An answer with anything wrong in it, or (rarely) nothing."""
    asked = len(plan.rows())
    declined = np.arange(asked) < draw(st.sampled_from([0, 0, 1, asked]))
    probs = probabilities(asked, seed)[~declined]
    parts: dict[str, Any] = {"declined": pack_mask(declined)}
    if draw(st.booleans()):
        ratios = codec.encode_familiarity(np.linspace(-9, 9, len(probs)))
        parts |= {"familiarity": True, "ratios": codec.pack(ratios)}
    honest = upload(plan, name, probs, **parts).to_bytes()
    how = draw(st.sampled_from(["header", "array", "both", "cut", "bytes", "json"]))
    if how == "bytes":
        return draw(st.binary(max_size=200))
    if how == "cut":
        return honest[: draw(st.integers(0, len(honest)))]
    if how == "json":
        text = json.dumps(draw(VALUES | HEADERS)).encode()
        return sealed_text(text, draw(st.binary(max_size=40)))
    changes = draw(HEADERS) if how != "array" else {}
    return reseal(honest, payload(*draw(ARRAYS)) if how != "header" else None, **changes)


@given(st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_five_arbitrary_replies_of_five_never_crash_and_never_count_below_the_quorum(
    data: st.DataObject,
) -> None:
    chosen = data.draw(st.sampled_from(["ds-fl", "fedistill", "selective-fd", "scarlet"]))
    door = server(rows=ROWS, method=method(chosen, codec="float32"))
    plan = door.plan(1)
    answers, reasons, seen, before = [], [], set(), door.digest()
    for k in range(5):
        message = data.draw(bad_messages(plan, f"c{k}", k))
        try:
            answers.append(door.check(message, plan, f"c{k}", seen))
        except Rejected as refusal:
            reasons.append(refusal.reason)
    assert all(re.fullmatch("[a-z_]{1,20}", reason) for reason in reasons)
    assert len(seen) == len(answers)
    teachers = [answer for answer in answers if answer.upload.share == "probs"]
    try:
        door.combine(plan, answers)
    except QuorumError:
        assert len(teachers) < 3
        assert (door.digest(), door.targets, door.round) == (before, None, 0)
    else:
        assert len(teachers) >= 3
        known = door.table[door.stamp > 0]
        np.testing.assert_allclose(known.sum(axis=1), 1, atol=1e-5)


@given(st.lists(st.binary(max_size=64), min_size=4, max_size=4), st.text(max_size=40))
@settings(deadline=None, max_examples=25)
def test_a_whole_run_of_arbitrary_bytes_ends_with_the_quorum_and_nothing_else(
    blobs: list[bytes], name: str
) -> None:
    def noise(sender: str, data: bytes, plan: Plan) -> Any:
        number = int(sender[-1])
        return [
            Reply(sender, blobs[number]),
            Reply(name, blobs[number]),
            Failure(name, plan.round, name),
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedistill.federation.time.sleep", lambda seconds: None)
        fed = federation()
        with pytest.raises(QuorumError):
            list(fed.run(1, backend=tampered(noise)))
    assert fed.server.round == 0


@pytest.mark.parametrize("good", range(6))
def test_the_quorum_is_three_teachers_whatever_else_answers(good: int) -> None:
    door = server(rows=ROWS)
    plan = door.plan(1)
    answers = []
    for k in range(5):
        share = (
            {}
            if k < good
            else {"share": "none", "shape": (0, 3), "size": 0, "payload": plain(np.empty((0, 3)))}
        )
        message = upload(plan, f"c{k}", probabilities(ROWS, k), **share).to_bytes()
        answers.append(door.check(message, plan, f"c{k}", set()))
    if good < 3:
        with pytest.raises(QuorumError):
            door.combine(plan, answers)
        assert not door.table.any()
    else:
        door.combine(plan, answers)
        expected = np.mean([probabilities(ROWS, k) for k in range(good)], axis=0)
        np.testing.assert_allclose(door.table[plan.ask.rows()], expected, atol=1e-6)


def test_the_order_of_answers_does_not_matter() -> None:
    tables, predicted = [], [probabilities(ROWS, k) for k in range(5)]
    for order in (range(5), reversed(range(5)), (3, 0, 4, 2, 1)):
        door = server(rows=ROWS)
        plan = door.plan(1)
        answers = [
            door.check(upload(plan, f"c{k}", predicted[k]).to_bytes(), plan, f"c{k}", set())
            for k in order
        ]
        door.combine(plan, answers)
        tables.append(door.table)
    np.testing.assert_array_equal(tables[0], tables[1])
    np.testing.assert_array_equal(tables[0], tables[2])


def test_a_server_restored_from_its_state_plans_the_same_bytes() -> None:
    door = server(rows=ROWS, per_round=4)
    for number in (1, 2):
        plan = door.plan(number)
        answers = [
            door.check(
                upload(plan, f"c{k}", probabilities(4, 10 * number + k)).to_bytes(),
                plan,
                f"c{k}",
                set(),
            )
            for k in range(5)
        ]
        door.combine(plan, answers)
        door.vigilance.note("c1", answered=False)
    arrays, facts = door.state_dict()
    again = server(rows=ROWS, per_round=4)
    again.load_state_dict(arrays, json.loads(json.dumps(facts)))
    assert again.digest() == door.digest()
    assert again.plan(3).to_bytes() == door.plan(3).to_bytes()
    assert again.plan(3).clients == door.plan(3).clients
    assert again.vigilance.misses == door.vigilance.misses


def test_rows_that_nobody_answers_for_are_left_out_of_the_targets() -> None:
    def silent_on_two(logits: Any, weights: Any) -> Any:
        probs = MEAN.bound_rule()(logits, weights)
        probs[[1, 4]] = np.nan
        return probs

    door = Server(
        server(rows=ROWS).proxy,
        ("a", "b", "c"),
        None,
        dataclasses.replace(MEAN, rule=silent_on_two),
        {f"c{k}": 16 for k in range(3)},
        seed=7,
    )
    plan = door.plan(1)
    answers = [
        door.check(upload(plan, f"c{k}", probabilities(ROWS, k)).to_bytes(), plan, f"c{k}", set())
        for k in range(3)
    ]
    door.combine(plan, answers)
    told = Plan.from_bytes(door.plan(2).to_bytes()).targets
    assert told is not None
    assert unpack_mask(told.missing, ROWS).tolist() == [False, True, False, False, True, False]
    assert set(plan.ask.rows()) - set(told.rows()) == set(plan.ask.rows()[[1, 4]])
    assert (door.stamp > 0).sum() == ROWS - 2


# --- real sites: what they have is not known at the start ----------------------------------------

SIZED = dataclasses.replace(
    MEAN, rule=lambda logits, weights, sizes: MEAN.bound_rule()(logits, sizes)
)


def of_unknown_size(rows: int = ROWS, **options: Any) -> Server:
    names = dict.fromkeys(("c0", "c1", "c2"))
    return Server(server(rows=rows).proxy, ("a", "b", "c"), None, SIZED, names, seed=7, **options)


def one_round(door: Server, number: int, size: int) -> Any:
    """A round in which c2 claims so many rows; the soft targets that come of it."""
    plan = door.plan(number)
    claims = {"c0": 16, "c1": 16, "c2": size}
    answers = [
        door.check(
            upload(plan, name, probabilities(ROWS, k), size=claims[name]).to_bytes(),
            plan,
            name,
            set(),
        )
        for k, name in enumerate(claims)
    ]
    door.combine(plan, answers)
    assert door.targets is not None
    return door.table[door.targets.rows()]


def expected_of(size: int) -> Any:
    probs = [probabilities(ROWS, k) for k in range(3)]
    return np.average(probs, axis=0, weights=[16, 16, size])


def test_a_site_of_unknown_size_counts_with_what_it_says_first_and_never_with_more() -> None:
    """Fault 19, where nobody could declare anything beforehand."""
    door = of_unknown_size()
    np.testing.assert_allclose(one_round(door, 1, 32), expected_of(32), atol=1e-6)
    assert door.enrolled == {"c0": 16, "c1": 16, "c2": 32}
    np.testing.assert_allclose(one_round(door, 2, 1 << 30), expected_of(32), atol=1e-6)
    np.testing.assert_allclose(one_round(door, 3, 8), expected_of(8), atol=1e-6)
    np.testing.assert_allclose(one_round(door, 4, 64), expected_of(32), atol=1e-6)


def test_what_sites_said_first_outlives_the_server() -> None:
    door = of_unknown_size()
    one_round(door, 1, 32)
    arrays, facts = door.state_dict()
    again = of_unknown_size()
    again.load_state_dict(arrays, json.loads(json.dumps(facts)))
    np.testing.assert_allclose(one_round(again, 2, 1 << 30), expected_of(32), atol=1e-6)


def test_a_site_that_has_said_nothing_yet_is_still_unknown_after_a_resume() -> None:
    door = of_unknown_size()
    arrays, facts = door.state_dict()
    again = of_unknown_size()
    again.load_state_dict(arrays, json.loads(json.dumps(facts)))
    assert again.enrolled == dict.fromkeys(("c0", "c1", "c2"))


def test_an_upload_that_is_refused_declares_nothing() -> None:
    door = of_unknown_size()
    plan = door.plan(1)
    with pytest.raises(Rejected):
        door.check(
            upload(plan, "c2", np.full((ROWS, 3), np.nan), size=1 << 20).to_bytes(),
            plan,
            "c2",
            set(),
        )
    assert door.enrolled["c2"] is None


def test_sites_of_unknown_size_count_for_the_quorum() -> None:
    assert of_unknown_size().quorum == 3
    assert of_unknown_size(quorum=2).quorum == 2


# --- memory and order ----------------------------------------------------------------------------


def told(door: Server, order: list[int], seed: int) -> tuple[str, Any]:
    """Digest and figures of a round in which some answer some rows, in an order of arrival."""
    plan, seen, answers = door.plan(1), set[str](), []
    informed = door.method.tells_familiarity()
    for number in order:
        random = np.random.default_rng([seed, number])
        answered = random.random(plan.count()) < 0.8
        facts: dict[str, Any] = {"declined": pack_mask(~answered), "familiarity": informed}
        if informed:
            ratios = random.normal(size=plan.count())[answered]
            facts["ratios"] = codec.pack(codec.encode_familiarity(ratios))
        said = probabilities(plan.count(), 100 * seed + number)[answered]
        data = upload(plan, f"c{number}", said, **facts).to_bytes()
        answers.append(door.check(data, plan, f"c{number}", seen))
    combined = door.combine(plan, answers)
    return door.digest(), (combined, door.targets)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "clusters"])
@settings(deadline=None, max_examples=4)
@given(order=st.permutations(range(5)), seed=st.integers(0, 9), cells=st.integers(1, 120))
def test_neither_order_of_arrival_nor_memory_changes_a_byte(
    rule: str, order: list[int], seed: int, cells: int
) -> None:
    chosen = dataclasses.replace(
        method("ds-fl", rule=rule, codec="float32"), accept=0.25, familiarity="kulsif", memory=1.0
    )
    usual = told(server(rows=20, method=chosen), list(range(5)), seed)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WHOLE", 0), ("WINDOW", cells), ("PART", cells)):
            patch.setattr(chunked, name, value)
        assert told(server(rows=20, method=chosen), order, seed) == usual
