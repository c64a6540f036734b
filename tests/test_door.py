"""The door: uploads that answer some rows only, and uploads that come too late."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from builders import MEAN, plain, probabilities, server, upload
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.aggregate import chunked
from fedistill.door import Answer
from fedistill.errors import QuorumError, Rejected
from fedistill.late import MOST_LATE
from fedistill.server import Server
from fedistill.wire.delta import delta_encode, quantise, restore
from fedistill.wire.envelope import pack_mask
from fedistill.wire.folded import Folded
from fedistill.wire.messages import Plan, Upload

ROWS = 6
SELECTIVE = dataclasses.replace(MEAN, accept=0.25, familiarity="kulsif", memory=1.0)


def refused(call: Any) -> str:
    with pytest.raises(Rejected) as caught:
        call()
    return caught.value.reason


def partial(plan: Plan, name: str, probs: Any, places: Any, **changes: Any) -> Upload:
    """An answer to the rows at some places of a plan."""
    answered = np.isin(np.arange(plan.count()), places)
    said = np.asarray(probs)[answered]
    return upload(plan, name, said, **({"declined": pack_mask(~answered)} | changes))


# --- rows that are declined ----------------------------------------------------------------------


@pytest.mark.parametrize("places", [[], [0], [5], [1, 2, 4], list(range(6))])
def test_an_answer_to_some_rows_is_let_in_with_these_rows(places: list[int]) -> None:
    door = server(rows=ROWS, method=SELECTIVE)
    plan, probs = door.plan(1), probabilities(ROWS, 1)
    data = partial(plan, "c0", probs, places).to_bytes()
    answer = door.check(data, plan, "c0", set())
    np.testing.assert_array_equal(answer.rows, plan.rows()[places])
    np.testing.assert_allclose(answer.probs, probs[places], atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 4),  # as many as the mask says is 3
        ({}, 2),
        ({"declined": b""}, 3),
        ({"declined": b"\xff"}, 3),  # bits behind the last row
        ({"declined": b"\xe0\x00"}, 3),
        ({"declined": b"\xfc"}, 3),  # all are declined
        ({"shape": (6, 3)}, 3),
        ({"shape": (3, 4)}, 3),
        ({"shape": (1 << 60, 3)}, 3),
        ({"share": "none", "size": 0}, 3),
        ({"share": "none", "size": 0, "shape": (0, 3)}, 0),
        ({"payload": plain(probabilities(6, 1))}, 3),
    ],
)
def test_masks_and_counts_that_do_not_fit_are_refused(changes: dict[str, Any], count: int) -> None:
    door = server(rows=ROWS, method=SELECTIVE)
    plan, seen = door.plan(1), set[str]()
    given_ = {"declined": pack_mask(np.arange(6) < 3)} | changes
    data = upload(plan, "c0", probabilities(count, 1), **given_).to_bytes()
    assert refused(lambda: door.check(data, plan, "c0", seen)) == "shape"
    assert seen == set()


@pytest.mark.parametrize("mask", [b"\x80", b"\x00"])
def test_who_is_to_answer_everything_may_decline_nothing(mask: bytes) -> None:
    door = server(rows=ROWS)
    plan = door.plan(1)
    count = ROWS - mask.count(b"\x80")
    data = upload(plan, "c0", probabilities(count, 1), declined=mask).to_bytes()
    assert refused(lambda: door.check(data, plan, "c0", set())) == "shape"


def test_each_row_is_the_mean_of_those_who_answer_it_and_of_nobody_it_is_left_out() -> None:
    door = server(3, rows=4, method=SELECTIVE, quorum=1)
    plan = door.plan(1)
    said = [probabilities(4, k) for k in range(3)]
    places = [[0, 1], [1, 2], [1]]
    answers = [
        door.check(partial(plan, f"c{k}", said[k], places[k]).to_bytes(), plan, f"c{k}", set())
        for k in range(3)
    ]
    door.combine(plan, answers)
    door.close(plan, {"c0", "c1", "c2"})
    rows = plan.rows()
    expected = [said[0][0], (said[0][1] + said[1][1] + said[2][1]) / 3, said[1][2]]
    np.testing.assert_allclose(door.table[rows[:3]], expected, atol=1e-6)
    assert door.stamp[rows].tolist() == [1, 1, 1, 0]
    told = Plan.from_bytes(door.plan(2).to_bytes()).targets
    assert told is not None
    np.testing.assert_array_equal(told.rows(), rows[:3])
    np.testing.assert_allclose(told.probs(), expected, atol=1e-6)


def test_a_round_in_which_every_row_is_declined_leaves_the_targets_as_they_were() -> None:
    door = server(3, rows=4, method=SELECTIVE, quorum=1)
    for number, places in ((1, [0, 1, 2, 3]), (2, [])):
        plan = door.plan(number)
        answers = [
            door.check(
                partial(plan, f"c{k}", probabilities(4, k), places).to_bytes(), plan, f"c{k}", set()
            )
            for k in range(3)
        ]
        door.combine(plan, answers)
        door.close(plan, {"c0", "c1", "c2"})
    assert door.stamp.tolist() == [1, 1, 1, 1]
    told = Plan.from_bytes(door.plan(3).to_bytes()).targets
    assert told is not None
    assert len(told.rows()) == 0


# --- what is kept of an answer -------------------------------------------------------------------


def test_an_answer_keeps_codes_and_neither_floats_nor_the_payload() -> None:
    door = server(rows=ROWS, method=dataclasses.replace(MEAN, codec="u8"))
    plan, probs = door.plan(1), probabilities(ROWS, 1)
    data = upload(plan, "c0", probs, codec="u8", payload=plain(probs, "u8")).to_bytes()
    answer = door.check(data, plan, "c0", set())
    assert isinstance(answer.said, Folded)
    assert answer.said.nbytes == ROWS * 3
    assert answer.upload.payload == answer.upload.ratios == b""
    codes = quantise("u8", probs)
    np.testing.assert_array_equal(answer.codes, codes)
    np.testing.assert_array_equal(answer.probs, restore("u8", codes, 3))
    np.testing.assert_array_equal(answer.read(np.array([4, 1])), answer.probs[[4, 1]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 0.5])
@pytest.mark.parametrize("row", [0, 3, 5])
def test_a_bad_row_is_found_in_whichever_part_it_is(
    value: float, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "PART", 6)
    door = server(rows=ROWS)
    plan, probs = door.plan(1), probabilities(ROWS, 1)
    probs[row, 1] += value
    data = upload(plan, "c0", probs).to_bytes()
    reason = "not_probs" if np.isfinite(value) else "nonfinite"
    assert refused(lambda: door.check(data, plan, "c0", set())) == reason


def test_places_are_those_of_the_rows_asked_or_minus_one() -> None:
    said = Folded(quantise("float32", probabilities(3, 1)))
    plan = server(rows=ROWS).plan(1)
    answer = Answer(upload(plan, "c0", probabilities(3, 1)), np.array([5, 0, 2]), said)
    assert answer.places(np.array([2, 3, 5, 1])).tolist() == [2, -1, 0, -1]


# --- late ----------------------------------------------------------------------------------------

FIXED = dataclasses.replace(MEAN, late=0.5, rows="fixed")
SAID = {f"c{k}": probabilities(ROWS, 10 + k) for k in range(4)}


def say(plan: Plan, name: str, probs: Any = None) -> bytes:
    probs = SAID[name] if probs is None else probs
    return upload(plan, name, probs[: plan.count()]).to_bytes()


def take(door: Server, plan: Plan, messages: list[tuple[str, bytes]]) -> list[Answer]:
    seen: set[str] = set()
    answers = [door.check(data, plan, name, seen) for name, data in messages]
    door.combine(plan, answers)
    door.close(plan, seen)
    return answers


def late_server(method: Any = FIXED, **options: Any) -> Server:
    return server(4, rows=ROWS, method=method, **({"quorum": 1} | options))


@pytest.mark.parametrize("age", range(1, MOST_LATE + 1))
def test_a_late_upload_counts_less_the_older_it_is(age: int) -> None:
    door = late_server()
    first = door.plan(1)
    late = say(first, "c1")
    for number in range(1, 1 + age):
        plan = door.plan(number)
        take(door, plan, [("c0", say(plan, "c0"))])
    plan = door.plan(1 + age)
    answers = take(door, plan, [("c1", late), ("c0", say(plan, "c0"))])
    assert [answer.age for answer in answers] == [age, 0]
    weight = 0.5**age
    expected = (SAID["c0"] + weight * SAID["c1"]) / (1 + weight)
    np.testing.assert_allclose(door.table[plan.rows()], expected, atol=1e-6)


def test_an_upload_older_than_that_is_refused() -> None:
    door = late_server()
    late = say(door.plan(1), "c1")
    for number in range(1, 1 + MOST_LATE):
        plan = door.plan(number)
        take(door, plan, [("c0", say(plan, "c0"))])
    plan = door.plan(1 + MOST_LATE)
    assert door.check(late, plan, "c1", set()).age == MOST_LATE
    take(door, plan, [("c0", say(plan, "c0"))])
    plan = door.plan(2 + MOST_LATE)
    assert refused(lambda: door.check(late, plan, "c1", set())) == "stale_round"


@pytest.mark.parametrize("number", [0, -1, 3, 1 << 40])
def test_rounds_that_were_not_or_are_not_yet_are_refused(number: int) -> None:
    door = late_server()
    plan = door.plan(1)
    take(door, plan, [("c0", say(plan, "c0"))])
    plan = door.plan(2)
    data = upload(plan, "c1", SAID["c1"], round=number).to_bytes()
    assert refused(lambda: door.check(data, plan, "c1", set())) == "stale_round"


def test_without_a_use_for_late_uploads_they_are_refused() -> None:
    door = late_server(dataclasses.replace(FIXED, late=0.0))
    plan = door.plan(1)
    late = say(plan, "c1")
    take(door, plan, [("c0", say(plan, "c0"))])
    plan = door.plan(2)
    assert refused(lambda: door.check(late, plan, "c1", set())) == "stale_round"


@pytest.mark.parametrize("per_round", [0, ROWS])
def test_where_every_round_asks_every_row_a_late_upload_matches_row_by_row(per_round: int) -> None:
    door = late_server(dataclasses.replace(FIXED, rows="drawn"), per_round=per_round)
    first = door.plan(1)
    late = say(first, "c1")
    take(door, first, [("c0", say(first, "c0"))])
    plan = door.plan(2)
    assert (plan.rows() != first.rows()).any(), "another order of the same rows"
    take(door, plan, [("c1", late), ("c0", say(plan, "c0"))])
    places = [list(first.rows()).index(row) for row in plan.rows()]
    expected = (SAID["c0"] + 0.5 * SAID["c1"][places]) / 1.5
    np.testing.assert_allclose(door.table[plan.rows()], expected, atol=1e-6)


def test_a_late_upload_of_rows_that_are_not_asked_now_is_refused() -> None:
    door = late_server(dataclasses.replace(FIXED, rows="drawn"), per_round=3)
    first = door.plan(1)
    late = say(first, "c1")
    take(door, first, [("c0", say(first, "c0"))])
    plan = door.plan(2)
    assert not set(plan.rows()) & set(first.rows())
    seen: set[str] = set()
    assert refused(lambda: door.check(late, plan, "c1", seen)) == "stale_round"
    assert seen == set()


def test_of_a_late_upload_the_rows_that_are_asked_again_count() -> None:
    door = late_server(dataclasses.replace(FIXED, rows="drawn"), per_round=4)
    first = door.plan(1)
    late = say(first, "c1")
    take(door, first, [("c0", say(first, "c0"))])
    plan = door.plan(2)
    shared = [row for row in plan.rows() if row in first.rows()]
    assert 0 < len(shared) < 4
    take(door, plan, [("c1", late), ("c0", say(plan, "c0"))])
    for place, row in enumerate(plan.rows()):
        expected = SAID["c0"][place]
        if row in shared:
            expected = (expected + 0.5 * SAID["c1"][list(first.rows()).index(row)]) / 1.5
        np.testing.assert_allclose(door.table[row], expected, atol=1e-6)


@pytest.mark.parametrize("order", [("late", "fresh"), ("fresh", "late")])
def test_a_fresh_answer_stands_for_a_late_one_of_the_same_client(order: tuple[str, str]) -> None:
    door = late_server()
    first = door.plan(1)
    late = say(first, "c1", probabilities(ROWS, 99))
    take(door, first, [("c0", say(first, "c0"))])
    plan = door.plan(2)
    messages = {"late": ("c1", late), "fresh": ("c1", say(plan, "c1"))}
    take(door, plan, [*(messages[kind] for kind in order), ("c0", say(plan, "c0"))])
    expected = (SAID["c0"] + SAID["c1"]) / 2
    np.testing.assert_allclose(door.table[plan.rows()], expected, atol=1e-6)


def test_of_two_late_uploads_the_newer_one_counts() -> None:
    door = late_server()
    kept = []
    for number in (1, 2):
        plan = door.plan(number)
        kept.append(say(plan, "c1", probabilities(ROWS, number)))
        take(door, plan, [("c0", say(plan, "c0"))])
    plan = door.plan(3)
    take(door, plan, [("c1", kept[1]), ("c1", kept[0]), ("c0", say(plan, "c0"))])
    expected = (SAID["c0"] + 0.5 * probabilities(ROWS, 2)) / 1.5
    np.testing.assert_allclose(door.table[plan.rows()], expected, atol=1e-6)


def test_the_same_late_upload_twice_is_a_duplicate() -> None:
    door = late_server()
    plan = door.plan(1)
    late = say(plan, "c1")
    take(door, plan, [("c0", say(plan, "c0"))])
    plan, seen = door.plan(2), set[str]()
    door.check(late, plan, "c1", seen)
    assert refused(lambda: door.check(late, plan, "c1", seen)) == "duplicate"
    door.check(say(plan, "c1"), plan, "c1", seen)
    assert refused(lambda: door.check(say(plan, "c1"), plan, "c1", seen)) == "duplicate"


def test_a_late_upload_comes_from_whom_it_says_whether_or_not_that_client_is_asked() -> None:
    door = server(6, rows=ROWS, method=FIXED, quorum=1, participation=1 / 3)
    first = door.plan(1)
    name = first.clients[0]
    late = upload(first, name, probabilities(ROWS, 1)).to_bytes()
    take(door, first, [(first.clients[1], say(first, first.clients[1], SAID["c0"]))])
    plan = next(p for p in map(door.plan, range(2, 5)) if name not in p.clients)
    for number in range(2, plan.round):
        between = door.plan(number)
        take(door, between, [(between.clients[0], say(between, between.clients[0], SAID["c0"]))])
    plan = door.plan(plan.round)
    assert door.check(late, plan, name, set()).age == plan.round - 1
    other = next(one for one in plan.clients if one != name)
    assert refused(lambda: door.check(late, plan, other, set())) == "conflict"
    stranger = upload(first, "x9", probabilities(ROWS, 1)).to_bytes()
    assert refused(lambda: door.check(stranger, plan, "x9", set())) == "unknown_client"
    now = upload(plan, name, probabilities(ROWS, 1)).to_bytes()
    assert refused(lambda: door.check(now, plan, name, set())) == "not_sampled"


def test_a_late_upload_is_no_answer_to_this_round() -> None:
    door = late_server()
    plan = door.plan(1)
    late = say(plan, "c1")
    take(door, plan, [("c0", say(plan, "c0"))])
    assert door.vigilance.misses == {"c0": 0, "c1": 1, "c2": 1, "c3": 1}
    plan = door.plan(2)
    take(door, plan, [("c1", late), ("c0", say(plan, "c0"))])
    assert door.vigilance.misses["c1"] > 0
    assert door.vigilance.misses["c2"] == 2


def test_late_uploads_are_judged_like_all_others() -> None:
    door = late_server()
    first = door.plan(1)
    bad = {
        "nonfinite": upload(first, "c1", np.full((ROWS, 3), np.nan)),
        "not_probs": upload(first, "c1", np.full((ROWS, 3), 0.9)),
        "shape": upload(first, "c1", probabilities(ROWS - 1, 1)),
        "size": upload(first, "c1", SAID["c1"], size=3),
        "run": upload(first, "c1", SAID["c1"], run="other"),
        "proxy_version": upload(first, "c1", SAID["c1"], proxy="0" * 64),
    }
    take(door, first, [("c0", say(first, "c0"))])
    plan = door.plan(2)
    for reason, message in bad.items():
        seen: set[str] = set()
        data = message.to_bytes()
        assert refused(lambda data=data, seen=seen: door.check(data, plan, "c1", seen)) == reason
        assert seen == set()


def test_a_round_of_late_uploads_alone_may_reach_the_quorum() -> None:
    door = late_server(quorum=2)
    first = door.plan(1)
    late = [("c1", say(first, "c1")), ("c2", say(first, "c2"))]
    take(door, first, [("c0", say(first, "c0")), ("c3", say(first, "c3"))])
    plan = door.plan(2)
    with pytest.raises(QuorumError):
        door.combine(plan, [door.check(late[0][1], plan, "c1", set())])
    take(door, plan, late)
    expected = (SAID["c1"] + SAID["c2"]) / 2
    np.testing.assert_allclose(door.table[plan.rows()], expected, atol=1e-6)


def test_a_server_that_comes_back_still_takes_late_uploads() -> None:
    door = late_server()
    plan = door.plan(1)
    late = say(plan, "c1")
    take(door, plan, [("c0", say(plan, "c0"))])
    arrays, facts = door.state_dict()
    again = late_server()
    again.load_state_dict(arrays, json.loads(json.dumps(facts)))
    plan = again.plan(2)
    assert again.check(late, plan, "c1", set()).age == 1


@given(st.permutations(range(4)), st.integers(0, 15))
@settings(deadline=None, max_examples=30)
def test_the_order_in_which_late_and_fresh_answers_come_does_not_matter(
    order: list[int], present: int
) -> None:
    door = late_server()
    first = door.plan(1)
    take(door, first, [("c3", say(first, "c3"))])
    plan = door.plan(2)
    messages = [
        ("c0", say(first, "c0", probabilities(ROWS, 50))),
        ("c0", say(plan, "c0")),
        ("c1", say(first, "c1")),
        ("c2", say(plan, "c2")),
    ]
    chosen = [k for k in order if present >> k & 1 or k == 3]
    take(door, plan, [messages[k] for k in chosen])
    weighed = {3: ("c2", 1.0, SAID["c2"])}
    if 1 in chosen:
        weighed[1] = ("c0", 1.0, SAID["c0"])
    elif 0 in chosen:
        weighed[0] = ("c0", 0.5, probabilities(ROWS, 50))
    if 2 in chosen:
        weighed[2] = ("c1", 0.5, SAID["c1"])
    total = sum(weight for _, weight, _ in weighed.values())
    expected = sum(weight * probs for _, weight, probs in weighed.values()) / total
    np.testing.assert_allclose(door.table[plan.rows()], expected, atol=1e-6)


def test_a_late_change_of_what_was_heard_is_read_or_refused_and_nobody_forgets() -> None:
    """With a cache a late upload is a change of what the server held when it was made."""
    deltas = dataclasses.replace(FIXED, cache=True, codec="u8")
    door = server(3, rows=40, method=deltas, quorum=1)
    probs = probabilities(40, 1)
    first = door.plan(1)
    codes = quantise("u8", probs)
    whole = {"codec": "u8", "payload": plain(probs, "u8"), "seen": "0"}
    take(door, first, [("c1", upload(first, "c1", probs, **whole).to_bytes())])
    second = door.plan(2)
    changed = codes.copy()
    changed[3, 1] += 1
    payload = delta_encode("u8", changed, codes)
    assert len(payload) < len(whole["payload"]), "a change, and not the codes as they are"
    late = upload(second, "c1", probs, **(whole | {"payload": payload})).to_bytes()
    fresh = upload(second, "c0", probabilities(40, 2), **whole).to_bytes()
    take(door, second, [("c0", fresh)])
    third = door.plan(3)
    np.testing.assert_array_equal(door.check(late, third, "c1", set()).codes, changed)
    door.close(third, set())
    assert refused(lambda: door.check(late, door.plan(4), "c1", set())) == "duplicate"
    other = probabilities(40, 7)
    fourth = door.plan(4)
    newer = upload(fourth, "c1", other, **(whole | {"payload": plain(other, "u8")})).to_bytes()
    take(door, fourth, [("c1", newer)])
    fifth = door.plan(5)
    assert refused(lambda: door.check(late, fifth, "c1", set())) == "duplicate"
    assert Plan.from_bytes(fifth.message("c1")).heard == 4
    assert Plan.from_bytes(door.plan(5).message("c1")).heard == 4
