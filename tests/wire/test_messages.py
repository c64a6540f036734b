"""Messages: round trips, the whitelist, row draws, and what arbitrary bytes can do (nothing)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import builders
import numpy as np
import pytest
from builders import LIMIT, reseal, sealed_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedistill.errors import Rejected
from fedistill.wire import codec
from fedistill.wire.delta import delta_encode, quantise
from fedistill.wire.envelope import VERSION, pack_mask, unseal
from fedistill.wire.messages import (
    UPLOAD_FIELDS,
    Plan,
    RowSpec,
    Targets,
    Upload,
    bucket,
    seen_mask,
)
from fedistill.wire.shelf import Shelf, mark
from fedistill.wire.table import MOST_VALUES, Table

PROBS = builders.probabilities(6, 1)
SPEC = RowSpec(3, 2, 6, 40)
PLAN = Plan(
    run="r" * 16,
    round=3,
    ask=RowSpec(3, 3, 6, 40),
    proxy="p" * 64,
    classes="c" * 64,
    targets=Targets(
        round=2,
        spec=SPEC,
        codec="u8",
        classes=3,
        missing=pack_mask(np.array([0, 1, 0, 0, 1, 0], dtype=bool)),
        payload=builders.plain(PROBS[:4], "u8"),
    ),
    clients=("a", "b"),
)
UPLOAD = Upload(
    client="site-1",
    run="r" * 16,
    round=3,
    proxy="p" * 64,
    classes="c" * 64,
    shape=(6, 3),
    familiarity=True,
    seen="5",
    size=32,
    epsilon=0.5,
    ledger="ab",
    payload=builders.plain(PROBS, "u8"),
    ratios=codec.pack(codec.encode_familiarity(np.zeros(6))),
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


# --- round trips ---------------------------------------------------------------------------------


def test_an_upload_reads_back_equal() -> None:
    assert Upload.from_bytes(UPLOAD.to_bytes()) == UPLOAD
    probs, familiarity = UPLOAD.decode()
    assert probs.shape == (6, 3)
    assert familiarity is not None
    assert familiarity.shape == (6,)
    assert codec.kl(PROBS, probs) <= 1e-3


def test_a_plan_reads_back_equal_and_does_not_say_who_else_is_asked() -> None:
    assert Plan.from_bytes(PLAN.to_bytes()) == PLAN
    assert Plan.from_bytes(PLAN.to_bytes()).clients == ()
    assert PLAN.to_bytes() == dataclasses.replace(PLAN, clients=()).to_bytes()


def test_plans_without_targets_and_with_a_table_read_back_equal() -> None:
    bare = dataclasses.replace(PLAN, targets=None)
    assert Plan.from_bytes(bare.to_bytes()) == bare
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    values[2] = np.nan
    for plan in (bare, PLAN):
        heavy = dataclasses.replace(plan, table=Table(values))
        told = Plan.from_bytes(heavy.to_bytes())
        assert told.table is not None
        np.testing.assert_array_equal(told.table.values, values)
        assert dataclasses.replace(told, table=None) == plan
        assert told.to_bytes() == heavy.to_bytes()


def test_rows_that_are_fresh_enough_are_not_asked() -> None:
    skip = np.array([1, 0, 0, 1, 0, 0], dtype=bool)
    plan = dataclasses.replace(PLAN, skip=pack_mask(skip), heard=2)
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert plan.rows().tolist() == plan.ask.rows()[~skip].tolist()
    assert (plan.count(), PLAN.count()) == (4, 6)


def test_each_client_may_be_told_something_of_its_own() -> None:
    plan = dataclasses.replace(PLAN, own={"a": {"heard": 2, "targets": None}})
    assert Plan.from_bytes(plan.message("a")) == dataclasses.replace(PLAN, heard=2, targets=None)
    assert plan.message("b") == PLAN.to_bytes()


@given(
    client=st.text(max_size=256),
    round=st.integers(-(10**20), 10**20),
    size=st.integers(),
    epsilon=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    shape=st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)),
    payload=st.binary(max_size=99),
    declined=st.binary(max_size=9),
    ratios=st.binary(max_size=9),
)
@settings(deadline=None)
def test_any_upload_that_can_be_said_is_heard_alike(**fields: Any) -> None:
    said = dataclasses.replace(UPLOAD, **fields)
    assert Upload.from_bytes(said.to_bytes()) == said


def test_counts_are_rounded_to_powers_of_two() -> None:
    sizes = [bucket(count) for count in range(5000)]
    assert sizes[0] == 0
    assert all(size & (size - 1) == 0 for size in sizes)
    assert all(abs(np.log2(size / count)) <= 0.5 for count, size in enumerate(sizes) if count)


@given(st.lists(st.booleans(), max_size=200))
def test_the_mask_of_classes_seen_reads_back(seen: list[bool]) -> None:
    upload = dataclasses.replace(UPLOAD, seen=seen_mask(seen))
    assert upload.seen_classes(len(seen)).tolist() == seen


# --- damage --------------------------------------------------------------------------------------

MESSAGES = pytest.mark.parametrize("message", [PLAN, UPLOAD], ids=["plan", "upload"])


@MESSAGES
@pytest.mark.parametrize("eighth", range(8))
def test_a_message_cut_at_each_eighth_is_refused(message: Plan | Upload, eighth: int) -> None:
    data = message.to_bytes()
    with pytest.raises(Rejected) as caught:
        type(message).from_bytes(data[: len(data) * eighth // 8])
    assert caught.value.reason == "truncated"


@MESSAGES
def test_one_flipped_bit_anywhere_is_refused(message: Plan | Upload) -> None:
    data = message.to_bytes()
    for place in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[place] ^= 1 << bit
            with pytest.raises(Rejected):
                type(message).from_bytes(bytes(broken))


@MESSAGES
def test_something_behind_or_before_a_message_is_refused(message: Plan | Upload) -> None:
    data = message.to_bytes()
    for broken in (data + b"\0", b"\0" + data, data + data):
        with pytest.raises(Rejected):
            type(message).from_bytes(broken)


@MESSAGES
def test_a_message_above_the_limit_is_refused_unread(message: Plan | Upload) -> None:
    data = message.to_bytes()
    with pytest.raises(Rejected, match="too_large"):
        type(message).from_bytes(data, limit=len(data) - 1)
    assert type(message).from_bytes(data, limit=len(data)) == message


def test_a_plan_is_no_upload_and_an_upload_no_plan() -> None:
    for reader, data in ((Plan, UPLOAD.to_bytes()), (Upload, PLAN.to_bytes())):
        with pytest.raises(Rejected):
            reader.from_bytes(data)


def test_another_version_is_refused_by_its_name() -> None:
    body = bytearray(UPLOAD.to_bytes())
    body[4] = VERSION + 1
    with pytest.raises(Rejected, match="version"):
        Upload.from_bytes(bytes(body))


def test_a_header_longer_than_its_cap_is_refused() -> None:
    with pytest.raises(Rejected, match="format"):
        unseal(sealed_text(b'{"a":"' + b"x" * (1 << 16) + b'"}'), LIMIT)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"\x00{}",
        b'{"a": 1' + b"0" * 5000 + b"}",
    ],
    ids=range(11),
)
def test_a_header_that_is_no_table_is_refused(text: bytes) -> None:
    for reader in (Plan, Upload):
        with pytest.raises(Rejected):
            reader.from_bytes(sealed_text(text))


@given(st.binary(max_size=400))
@example(b"FDst")
@settings(deadline=None, max_examples=200)
def test_arbitrary_bytes_are_refused_and_nothing_else(data: bytes) -> None:
    for reader in (Plan, Upload):
        with pytest.raises(Rejected):
            reader.from_bytes(data)


@given(st.dictionaries(st.sampled_from([*UPLOAD_FIELDS, "label"]), JSON))
@example({"temperature": 10**400})
@example({"shape": [1e12, 10]})
@example({"shape": [True, True]})
@example({"seen": "f" * 300})
@example({"parts": [1, 2]})
@example({"parts": [-1, 1, 0]})
@example({"parts": [True, 0, 0]})
@settings(deadline=None, max_examples=300)
def test_an_upload_with_arbitrary_fields_is_read_or_refused(changes: dict[str, Any]) -> None:
    header, payload = unseal(UPLOAD.to_bytes(), LIMIT)
    header |= changes
    try:
        upload = Upload.from_bytes(sealed_text(json.dumps(header).encode(), payload))
    except Rejected:
        return
    assert set(header) == set(UPLOAD_FIELDS)
    assert all(len(value) <= 256 for value in vars(upload).values() if isinstance(value, str))


@given(
    st.dictionaries(st.sampled_from([*unseal(PLAN.to_bytes(), LIMIT)[0], "extra"]), JSON),
    st.dictionaries(st.sampled_from([*PLAN.targets.header(), "x"]), JSON),
    st.dictionaries(st.sampled_from(["seed", "round", "count", "total", "x"]), JSON),
)
@example({"targets": 1}, {}, {})
@example({"ask": {}}, {}, {})
@example({"targets": None}, {}, {})
@example({}, {"codec": "zip"}, {})
@example({}, {"classes": -1}, {})
@example({}, {"classes": 0}, {})
@example({}, {"choices": 0}, {})
@example({}, {"choices": 10**9}, {})
@example({}, {"mark": "0" * 16}, {})
@example({}, {"round": 3}, {})
@example({}, {"round": 0}, {})
@example({"parts": [0, 0, 0, 0]}, {}, {})
@example({"heard": 3}, {}, {})
@example({}, {}, {"count": 50})
@example({}, {}, {"count": -1})
@example({}, {}, {"total": 0})
@example({}, {}, {"round": 0})
@settings(deadline=None, max_examples=300)
def test_a_plan_with_arbitrary_fields_is_usable_or_refused(
    changes: dict[str, Any], told: dict[str, Any], spec: dict[str, Any]
) -> None:
    header = unseal(PLAN.to_bytes(), LIMIT)[0]
    header["targets"] = header["targets"] | told
    header["targets"]["spec"] = (
        header["targets"]["spec"] | spec if isinstance(header["targets"]["spec"], dict) else 0
    )
    text = json.dumps(header | changes).encode()
    try:
        plan = Plan.from_bytes(sealed_text(text, unseal(PLAN.to_bytes(), LIMIT)[1]))
        if plan.ask.total > 1000 or (plan.targets and plan.targets.spec.total > 1000):
            return  # the site refuses other totals than its own proxy set's
        plan.ask.rows()
        if plan.targets is not None:
            assert len(plan.targets.rows()) == len(plan.targets.probs())
    except Rejected:
        pass


@given(
    st.binary(max_size=3),
    st.binary(max_size=3),
    st.binary(max_size=3),
    st.binary(max_size=3),
    st.binary(max_size=40),
)
@example(b"", b"", b"", b"\xff", b"")
@example(b"", b"", b"\xfc", b"\xfc", b"")
@example(b"", b"\xfc", b"", b"", b"")
@example(b"", b"", b"\xf0", b"", b"")
@settings(deadline=None, max_examples=300)
def test_a_plan_with_arbitrary_masks_and_payload_is_usable_or_refused(
    skip: bytes, missing: bytes, held: bytes, based: bytes, payload: bytes
) -> None:
    assert PLAN.targets is not None
    told = {"missing": missing, "held": held, "based": based, "payload": payload}
    targets = dataclasses.replace(PLAN.targets, **told)
    message = dataclasses.replace(PLAN, skip=skip, targets=targets).to_bytes()
    for shelf in (None, Shelf("u8", 40, 3)):
        try:
            plan = Plan.from_bytes(message)
            assert plan.targets is not None
            assert len(plan.rows()) == plan.count()
            assert len(plan.targets.rows()) == len(plan.targets.probs(shelf))
        except Rejected:
            pass


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"heard": 3}, "stale_round"),
        ({"heard": -1}, "stale_round"),
        ({"round": 0}, "stale_round"),
        ({"round": 2}, "stale_round"),
        ({"parts": [1]}, "format"),
        ({"parts": None}, "format"),
        ({"ask": {"seed": 3, "round": 4, "count": 6, "total": 40}}, "stale_round"),
        ({"ask": {"seed": 3, "round": 3, "count": 41, "total": 40}}, "shape"),
        ({"table": [1, 3]}, "format"),
    ],
)
def test_a_plan_of_impossible_rounds_or_sizes_is_refused_for_that(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Rejected) as caught:
        Plan.from_bytes(reseal(PLAN.to_bytes(), **changes))
    assert caught.value.reason == reason


def test_a_mask_of_other_rows_is_refused() -> None:
    assert PLAN.targets is not None
    for mask in (b"\0\0", b"\1"):  # too long; a bit beyond the six rows
        with pytest.raises(Rejected, match="shape"):
            Plan.from_bytes(dataclasses.replace(PLAN, skip=mask).to_bytes())
        for name in ("missing", "held", "based"):
            targets = dataclasses.replace(PLAN.targets, **{name: mask})
            with pytest.raises(Rejected, match="shape"):
                Plan.from_bytes(dataclasses.replace(PLAN, targets=targets).to_bytes())


# --- what the receiver holds ---------------------------------------------------------------------


def on_shelf(codes: Any, rows: Any) -> Shelf:
    shelf = Shelf("u8", 40, 3)
    shelf.put(rows, codes, 1)
    return shelf


def test_of_six_targets_two_are_held_one_is_told_as_a_change_and_three_are_told() -> None:
    rows, codes = SPEC.rows(), quantise("u8", PROBS)
    before = codes.copy()
    before[2] = [9, 9, 9]
    shelf = on_shelf(before[:3], rows[:3])
    held, based = np.arange(6) < 2, np.arange(6) == 2
    reference = np.concatenate([before[2:3], np.zeros_like(codes[3:])])
    told = Targets(
        round=2,
        spec=SPEC,
        codec="u8",
        classes=3,
        mark=mark(rows, codes),
        held=pack_mask(held),
        based=pack_mask(based),
        payload=delta_encode("u8", codes[2:], reference),
    )
    found, read = told.read(shelf)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(read, codes)
    np.testing.assert_array_equal(shelf.codes[rows[2]], [9, 9, 9])  # read, not written
    np.testing.assert_allclose(told.probs(shelf), PROBS, atol=0.02)
    for other in (None, Shelf("u8", 40, 3), on_shelf(before[:3] + 1, rows[:3])):
        with pytest.raises(Rejected, match="reference"):
            told.read(other)


def test_a_row_that_is_held_and_told_at_once_is_refused() -> None:
    mask = pack_mask(np.ones(6, dtype=bool))
    assert PLAN.targets is not None
    both = dataclasses.replace(PLAN.targets, missing=b"", held=mask, based=mask)
    with pytest.raises(Rejected, match="shape"):
        both.read(Shelf("u8", 40, 3))


def test_several_targets_a_row_read_back_and_are_told_whole() -> None:
    several = builders.probabilities(12, 4)
    told = Targets(
        round=2, spec=SPEC, codec="float32", classes=3, choices=2, payload=builders.plain(several)
    )
    probs = told.probs()
    assert probs.shape == (6, 2, 3)
    np.testing.assert_array_equal(probs.reshape(12, 3), several.astype(np.float32))
    held = dataclasses.replace(told, held=pack_mask(np.arange(6) == 0))
    with pytest.raises(Rejected, match="shape"):
        held.read(Shelf("float32", 40, 3))


# --- tables --------------------------------------------------------------------------------------

TABLE = dataclasses.replace(PLAN, targets=None, table=Table(np.zeros((4, 3), dtype=np.float32)))


@pytest.mark.parametrize(
    "shape",
    [None, [], [4], [4, 3, 1], [4, -3], [4.0, 3], [True, 12], [4, 4], [12, 2], [5, 3], ["4", 3]],
    ids=str,
)
def test_a_table_of_another_shape_than_it_says_is_refused(shape: Any) -> None:
    with pytest.raises(Rejected) as caught:
        Plan.from_bytes(reseal(TABLE.to_bytes(), table=shape))
    assert caught.value.reason == "shape"


def test_a_table_unfolds_to_no_more_than_is_allowed() -> None:
    rows = 1 << 20
    wide = MOST_VALUES // rows + 1
    absent = np.packbits(np.ones(rows, dtype=np.uint8)).tobytes()
    with pytest.raises(Rejected, match="shape"):
        Table.read([rows, wide], [absent, b""])
    with pytest.raises(Rejected, match="shape"):
        Table.read([1 << 40, 0], [b"", b""])


def test_a_table_with_infinity_is_refused() -> None:
    for bad in (np.inf, -np.inf):
        values = np.zeros((4, 3), dtype=np.float32)
        values[1, 2] = bad
        with pytest.raises(Rejected, match="nonfinite"):
            Table.read([4, 3], Table(values).parts())
    with pytest.raises(Rejected, match="nonfinite"):
        Table.read([1, 1], [b"", np.array([np.nan], "<f4").tobytes()])


# --- the whitelist (invariant 1) -----------------------------------------------------------------


def test_the_whitelist_is_what_the_design_says() -> None:
    assert set(UPLOAD_FIELDS) == {
        "kind",
        "client",
        "run",
        "round",
        "proxy",
        "classes",
        "share",
        "codec",
        "temperature",
        "shape",
        "familiarity",
        "seen",
        "size",
        "epsilon",
        "ledger",
        "parts",
    }
    header = unseal(UPLOAD.to_bytes(), LIMIT)[0]
    assert set(header) == set(UPLOAD_FIELDS)


@given(st.text(max_size=50), JSON)
@example("labels", [0, 1, 2])
@example("loss", 0.1)
@settings(deadline=None)
def test_an_upload_with_any_field_more_is_refused(name: str, value: Any) -> None:
    if name in UPLOAD_FIELDS:
        return
    with pytest.raises(Rejected) as caught:
        Upload.from_bytes(reseal(UPLOAD.to_bytes(), **{name: value}))
    assert caught.value.reason == "fields"
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", UPLOAD_FIELDS)
def test_an_upload_with_any_field_less_is_refused(name: str) -> None:
    with pytest.raises(Rejected, match="fields"):
        Upload.from_bytes(reseal(UPLOAD.to_bytes(), **{name: ...}))


@pytest.mark.parametrize("name", ["labels", "accuracy", "clients", "__class__"])
def test_a_plan_with_a_field_more_is_refused(name: str) -> None:
    with pytest.raises(Rejected, match="fields"):
        Plan.from_bytes(reseal(PLAN.to_bytes(), **{name: 1}))


@pytest.mark.parametrize("name", ["client", "run", "proxy", "classes", "share", "codec", "ledger"])
def test_a_text_longer_than_256_characters_is_refused(name: str) -> None:
    with pytest.raises(Rejected, match="field"):
        Upload.from_bytes(reseal(UPLOAD.to_bytes(), **{name: "x" * 257}))


# --- rows in passes ------------------------------------------------------------------------------


@given(st.integers(0, 2**62), st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=150)
def test_rows_of_a_round_differ_and_every_pass_deals_out_every_row_once(
    seed: int, total: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, total))
    rounds = data.draw(st.integers(1, 30))
    dealt = []
    for number in range(1, rounds + 1):
        rows = RowSpec(seed, number, count, total).rows()
        assert len(rows) == len(set(rows.tolist())) == count
        dealt.extend(rows.tolist())
    for start in range(0, len(dealt) - total + 1, total):
        assert sorted(dealt[start : start + total]) == list(range(total))
    assert set(dealt) <= set(range(total))


def test_both_sides_draw_the_same_rows_and_other_seeds_others() -> None:
    spec = RowSpec(11, 5, 7, 40)
    told = Plan.from_bytes(dataclasses.replace(PLAN, ask=spec, round=5).to_bytes()).ask
    np.testing.assert_array_equal(told.rows(), spec.rows())
    assert spec.rows().tolist() != dataclasses.replace(spec, seed=12).rows().tolist()
    assert spec.rows().tolist() != dataclasses.replace(spec, round=6).rows().tolist()


def test_asking_for_every_row_gives_every_row_each_round() -> None:
    for number in range(1, 5):
        assert sorted(RowSpec(1, number, 9, 9).rows().tolist()) == list(range(9))


def test_asking_for_no_row_gives_none() -> None:
    assert RowSpec(1, 1, 0, 9).rows().tolist() == []


def test_a_late_round_is_drawn_at_once() -> None:
    import time

    started = time.monotonic()
    RowSpec(1, 2000, 700, 1001).rows()
    assert time.monotonic() - started < 5
