"""Targets: whole or as what a receiver lacks; what does not fit together is refused."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest
from builders import probabilities
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.errors import Rejected
from fedistill.wire.delta import PLAIN, SAME, delta_encode, quantise, restore
from fedistill.wire.envelope import pack_mask
from fedistill.wire.grid import Codes
from fedistill.wire.messages import Plan
from fedistill.wire.rows import RowSpec
from fedistill.wire.shelf import Shelf, mark
from fedistill.wire.targets import MOST_CHOICES, Targets

TOTAL = 40
SPEC = RowSpec(3, 2, 6, TOTAL)
ROWS = SPEC.rows()
CODES = quantise("u8", probabilities(6, 1))
WHOLE = Targets(round=2, spec=SPEC, codec="u8", classes=3, payload=delta_encode("u8", CODES))


def bits(*places: int, of: int = 6) -> bytes:
    return pack_mask(np.isin(np.arange(of), places))


def holding(rows: Any = ROWS, codes: Codes = CODES, number: int = 1) -> Shelf:
    shelf = Shelf("u8", TOTAL, 3)
    shelf.put(np.asarray(rows), codes, number)
    return shelf


def refused(call: Any) -> str:
    with pytest.raises(Rejected) as caught:
        call()
    return caught.value.reason


def travelled(targets: Targets) -> Targets:
    """What arrives of them in a plan."""
    sent = Plan(
        run="r",
        round=targets.round + 1,
        ask=RowSpec(3, 3, 6, TOTAL),
        proxy="p",
        classes="c",
        targets=targets,
    )
    found = Plan.from_bytes(sent.to_bytes()).targets
    assert found is not None
    return found


# --- whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "float16", "u8", "simplex-1", "simplex-4", "top-k"])
def test_whole_targets_are_read_by_anybody(codec: str) -> None:
    codes = quantise(codec, probabilities(6, 1))
    sent = dataclasses.replace(WHOLE, codec=codec, payload=delta_encode(codec, codes))
    assert travelled(sent) == sent
    rows, found = travelled(sent).read()
    np.testing.assert_array_equal(rows, ROWS)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(sent.probs(), restore(codec, codes, 3))
    np.testing.assert_array_equal(sent.probs(Shelf(codec, TOTAL, 3)), sent.probs())


def test_rows_without_a_target_are_left_out() -> None:
    payload = delta_encode("u8", CODES[[0, 2, 3, 5]])
    sent = dataclasses.replace(WHOLE, missing=bits(1, 4), payload=payload)
    rows, codes = travelled(sent).read()
    np.testing.assert_array_equal(rows, ROWS[[0, 2, 3, 5]])
    np.testing.assert_array_equal(codes, CODES[[0, 2, 3, 5]])


def test_there_may_be_no_target_at_all() -> None:
    sent = dataclasses.replace(
        WHOLE, missing=bits(*range(6)), payload=delta_encode("u8", CODES[:0])
    )
    rows, codes = travelled(sent).read()
    assert (len(rows), codes.shape) == (0, (0, 3))
    assert travelled(sent).probs().shape == (0, 3)


def test_several_targets_a_row_come_side_by_side() -> None:
    codes = quantise("u8", probabilities(12, 1))
    sent = dataclasses.replace(WHOLE, choices=2, payload=delta_encode("u8", codes))
    assert travelled(sent) == sent
    probs = sent.probs()
    assert probs.shape == (6, 2, 3)
    np.testing.assert_array_equal(probs.reshape(12, 3), restore("u8", codes, 3))


# --- what the receiver holds ---------------------------------------------------------------------


MANY = RowSpec(3, 2, 30, TOTAL)


def relying() -> tuple[Targets, Shelf, Codes]:
    """Rows 0 and 1 are held, 2 to 27 told as a change, 28 and 29 told anew."""
    rows, old = MANY.rows(), quantise("u8", probabilities(30, 1))
    shelf = holding(rows[:28], old[:28])
    codes = old.copy()
    codes[[2, 9]] += 1
    codes[28:] = 7
    reference = old[2:].copy()
    reference[26:] = 0
    payload = delta_encode("u8", codes[2:], reference)
    assert payload[0] != PLAIN
    sent = Targets(
        round=2,
        spec=MANY,
        codec="u8",
        classes=3,
        held=bits(0, 1, of=30),
        based=bits(*range(2, 28), of=30),
        mark=mark(rows, codes),
        payload=payload,
    )
    return sent, shelf, codes


def test_held_rows_come_from_the_shelf_and_changes_are_added_to_it() -> None:
    sent, shelf, codes = relying()
    before = shelf.codes.copy()
    rows, found = travelled(sent).read(shelf)
    np.testing.assert_array_equal(rows, MANY.rows())
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(shelf.codes, before, "reading leaves the shelf as it is")


def test_nothing_changed_costs_a_few_bytes() -> None:
    payload = delta_encode("u8", CODES, CODES)
    assert payload[0] == SAME
    sent = dataclasses.replace(
        WHOLE, based=bits(*range(6)), mark=mark(ROWS, CODES), payload=payload
    )
    np.testing.assert_array_equal(sent.read(holding())[1], CODES)


@pytest.mark.parametrize("row", [0, 1, 2, 3, 9, 27])
def test_another_copy_of_a_row_that_is_relied_on_is_found(row: int) -> None:
    sent, shelf, _ = relying()
    shelf.codes[MANY.rows()[row]] += 9
    assert refused(lambda: sent.read(shelf)) == "reference"


@pytest.mark.parametrize("row", [28, 29])
def test_what_is_held_of_a_row_that_is_told_anew_does_not_matter(row: int) -> None:
    sent, shelf, codes = relying()
    shelf.codes[MANY.rows()[row]] += 9
    np.testing.assert_array_equal(sent.read(shelf)[1], codes)


def test_a_mark_of_other_targets_is_refused() -> None:
    sent, shelf, _ = relying()
    other = dataclasses.replace(sent, mark="0" * 16)
    assert refused(lambda: other.read(shelf)) == "reference"


def test_who_holds_nothing_refuses_what_relies_on_it() -> None:
    sent, _, _ = relying()
    assert refused(lambda: sent.read()) == "reference"
    assert refused(lambda: sent.read(Shelf("u8", TOTAL, 3))) == "reference"
    held = dataclasses.replace(
        WHOLE,
        held=bits(*range(6)),
        mark=mark(ROWS, CODES),
        payload=delta_encode("u8", CODES[:0]),
    )
    np.testing.assert_array_equal(held.read(holding())[1], CODES)
    assert refused(lambda: held.read()) == "reference"
    assert refused(lambda: held.read(Shelf("u8", TOTAL, 3))) == "reference"
    based = dataclasses.replace(
        WHOLE,
        based=bits(*range(6)),
        mark=mark(ROWS, CODES),
        payload=delta_encode("u8", CODES, CODES),
    )
    assert refused(lambda: based.read()) == "reference"


@pytest.mark.parametrize(
    "changes",
    [
        {"held": bits(0), "based": bits(0)},
        {"held": bits(0), "choices": 2},
        {"based": bits(1), "choices": 2},
    ],
)
def test_a_row_is_held_or_told_and_alone(changes: dict[str, Any]) -> None:
    sent = dataclasses.replace(WHOLE, **changes)
    assert refused(lambda: sent.read(holding())) == "shape"


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_whatever_is_held_the_receiver_ends_with_what_was_sent(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(["float32", "u8", "simplex-4", "simplex-1"]))
    state = np.array(data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6)))
    missing, held, based = state == 3, state[state != 3] == 1, state[state != 3] == 2
    rows = ROWS[~missing]
    codes = quantise(codec, probabilities(len(rows), data.draw(st.integers(0, 50))))
    old = quantise(codec, probabilities(len(rows), data.draw(st.integers(0, 50))))
    shelf = Shelf(codec, TOTAL, 3)
    shelf.put(rows[held], codes[held], 2)
    shelf.put(rows[based], old[based], 1)
    reference = np.where(based[:, None], old, 0).astype(codes.dtype)[~held]
    payload = delta_encode(codec, codes[~held], reference if based.any() else None)
    if payload[0] == PLAIN:
        based[:] = False
    sent = Targets(
        round=2,
        spec=SPEC,
        codec=codec,
        classes=3,
        mark=mark(rows, codes) if (held | based).any() else "",
        missing=pack_mask(missing),
        held=pack_mask(held),
        based=pack_mask(based),
        payload=payload,
    )
    assert travelled(sent) == sent
    found = travelled(sent).read(shelf)
    np.testing.assert_array_equal(found[0], rows)
    np.testing.assert_array_equal(found[1], codes)


# --- headers and parts that lie ------------------------------------------------------------------


def read(parts: list[bytes] | None = None, **changes: Any) -> Targets:
    return Targets.read_header(WHOLE.header() | changes, parts or WHOLE.parts())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"codec": "zip"}, "codec"),
        ({"codec": ["u8"]}, "field"),
        ({"classes": 0}, "shape"),
        ({"classes": -3}, "shape"),
        ({"classes": 1 << 20}, "shape"),
        ({"classes": True}, "field"),
        ({"choices": 0}, "shape"),
        ({"choices": MOST_CHOICES + 1}, "shape"),
        ({"choices": None}, "field"),
        ({"mark": 3}, "field"),
        ({"round": "2"}, "field"),
        ({"spec": [3, 2, 6, 40]}, "field"),
        ({"spec": {"seed": 3, "round": 2, "count": 41, "total": 40}}, "shape"),
        ({"spec": {"seed": 3, "round": 2, "count": 6}}, "field"),
        ({"more": 1}, "fields"),
    ],
)
def test_a_header_that_cannot_be_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert read() == WHOLE
    assert refused(lambda: read(**changes)) == reason


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("mask", [b"\x80\x00", b"\x01", b"\xff"])
def test_masks_of_other_rows_are_refused(place: int, mask: bytes) -> None:
    parts = WHOLE.parts()
    parts[place] = mask
    assert refused(lambda: read(parts)) == "shape"


def test_masks_of_what_is_held_count_the_rows_with_a_target_only() -> None:
    eight = {"spec": {"seed": 3, "round": 2, "count": 9, "total": 40}}
    missing = bits(8, of=9)
    assert read([missing, b"\x80", b"", b""], **eight).held == b"\x80"
    assert refused(lambda: read([missing, bits(0, of=9), b"", b""], **eight)) == "shape"
    assert refused(lambda: read([b"", b"\x80", b"", b""], **eight)) == "shape"


def test_a_header_that_claims_a_huge_number_of_rows_takes_no_memory() -> None:
    spec = {"seed": 3, "round": 2, "count": (1 << 40) - 1, "total": (1 << 40) - 1}
    tracemalloc.start()
    try:
        read([b"", b"", b"", b"x"], spec=spec)
        assert refused(lambda: read([b"", b"\x80", b"", b"x"], spec=spec)) == "shape"
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "payload", [b"", b"\x00", b"\x07abc", b"\x00abc", b"\x01", b"\x02\x00\x00\x00\x00x"]
)
def test_a_payload_that_is_no_delta_is_refused(payload: bytes) -> None:
    sent = dataclasses.replace(WHOLE, payload=payload)
    assert refused(lambda: sent.read(holding())) in {"format", "truncated", "shape", "reference"}


def test_more_or_fewer_targets_than_rows_are_refused() -> None:
    for count in (0, 5):
        sent = dataclasses.replace(WHOLE, payload=delta_encode("u8", CODES[:count]))
        assert refused(lambda sent=sent: sent.read()) == "shape"
    sent = dataclasses.replace(WHOLE, payload=delta_encode("u8", np.tile(CODES, (2, 1))))
    assert refused(lambda: sent.read()) == "shape"


@given(
    masks=st.lists(st.binary(max_size=2), min_size=3, max_size=3),
    payload=st.binary(max_size=60),
)
@settings(deadline=None)
def test_arbitrary_parts_are_refused_or_read_and_nothing_else(
    masks: list[bytes], payload: bytes
) -> None:
    try:
        rows, codes = read([*masks, payload]).read(holding())
    except Rejected:
        return
    assert len(rows) == len(codes)
