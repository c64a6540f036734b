"""Rules on some rows at a time: the same bytes as on all, whatever the rule and the parts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.aggregate import chunked, robust, rules
from fedistill.aggregate.chunked import Chunked, chunkwise, parts, reads, rowwise
from fedistill.errors import FedistillError
from fedistill.testing import CheckFailed, check_rule

CLIENTS, CLASSES = 5, 4
WEIGHTS = ("alike", "by client", "by row")


@st.composite
def sizes(draw):
    """Rows, and values in a part and in a window; few enough that there are several of each."""
    rows = draw(st.integers(2, 25))
    return rows, draw(st.integers(1, 400)), draw(st.integers(1, 400))


def small(patch, part=60, window=100):
    """Parts and windows of some rows only."""
    patch.setattr(chunked, "PART", part)
    patch.setattr(chunked, "WHOLE", 0)
    patch.setattr(chunked, "WINDOW", window)
    few_blocks(patch)


def few_blocks(patch):
    """Robust rules take blocks of their own, parts or not: small ones too, and few steps."""
    for name, value in (("CELLS", 40), ("FEWEST", 2), ("STEPS", 6), ("CLIENT_STEPS", 4)):
        patch.setattr(robust, name, value)


def case(rows, kind="alike", seed=0):
    """Logits, weights and all that a rule may ask for."""
    random = np.random.default_rng(seed)
    weights = np.ones(CLIENTS)
    if kind == "by client":
        weights = np.array([1.0, 0.0, 0.5, 1.0, 2.0])
    if kind == "by row":
        weights = random.integers(0, 3, (CLIENTS, rows)) / 2
        weights[:, rows // 2] = 0.0
    extras = {
        "seen": random.random((CLIENTS, CLASSES)) < 0.7,
        "familiarity": random.normal(size=(CLIENTS, rows)),
        "sizes": np.array([16.0, 64.0, 32.0, 16.0, 8.0]),
        "clients": tuple(f"c{k}" for k in range(CLIENTS)),
        "anchors": random.integers(-1, CLASSES, rows),
    }
    return 2 * random.normal(size=(CLIENTS, rows, CLASSES)), weights, extras


def in_parts(logits, seen=None):
    """Logits that are read in parts; ``seen`` collects how many rows were made at a time."""

    def make(rows):
        if seen is not None:
            seen.append(logits[:, rows].shape[1])
        return logits[:, rows].copy()

    return Chunked(logits.shape, make)


# --- rows in turn --------------------------------------------------------------------------------


@given(rows=st.integers(0, 50), width=st.integers(0, 9), cells=st.integers(1, 99))
def test_parts_are_all_rows_in_turn_and_none_is_alone(rows, width, cells):
    found = [np.arange(rows)[part] for part in parts(rows, width, cells)]
    assert np.concatenate(found).tolist() == list(range(rows))
    assert min(map(len, found)) >= min(rows, 2)
    assert max(map(len, found)) <= max(cells // max(width, 1), 2) + 1


@settings(deadline=None)
@given(data=st.data(), rows=st.integers(1, 30), window=st.integers(1, 200))
def test_what_is_read_in_parts_is_the_array(data, rows, window):
    logits = case(rows)[0]
    with pytest.MonkeyPatch.context() as patch:
        small(patch, window=window)
        read = in_parts(logits)
        assert len(read) == CLIENTS
        np.testing.assert_array_equal(read.whole(), logits)
        for _ in range(4):
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2)))
            np.testing.assert_array_equal(read[:, start:stop], logits[:, start:stop])
        places = np.array(data.draw(st.lists(st.integers(0, rows - 1))), dtype=np.int64)
        np.testing.assert_array_equal(read[:, places], logits[:, places])
        np.testing.assert_array_equal(read[:, ::2], logits[:, ::2])


def test_what_is_small_is_made_once_and_what_is_read_in_turn_too(monkeypatch):
    logits, made = case(20)[0], list[int]()
    read = in_parts(logits, made)
    for start in (4, 0, 11):
        read[:, start : start + 3]
    assert np.shares_memory(read.whole(), read[:, :])
    assert made == [20]
    small(monkeypatch, window=100)
    made.clear()
    read = in_parts(logits, made)
    for start in range(20):
        read[:, start : start + 1]
    assert made == [5, 5, 5, 5]


def test_clients_are_not_chosen_by_the_reader():
    with pytest.raises(FedistillError, match=r"expected logits\[:, rows\]"):
        in_parts(case(4)[0])[:2, :]


# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", rules.RULES)
@settings(deadline=None, max_examples=4)
@given(size=sizes(), seed=st.integers(0, 99))
def test_every_rule_makes_the_same_bytes_in_parts(name, kind, size, seed):
    rows, part, window = size
    logits, weights, extras = case(rows, kind, seed)
    with pytest.MonkeyPatch.context() as patch:
        few_blocks(patch)
        options = {n: extras[n] for n in rules.takes(rules.configure(name))}
        whole = rules.configure(name)(logits, weights, **options)
        small(patch, part, window)
        rule = rules.configure(name)
        found = rules.combine(rule, in_parts(logits), weights, **extras)
    assert found.dtype == whole.dtype
    assert found.tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", rules.RULES)
def test_no_rule_of_ours_holds_more_rows_than_a_window(name, monkeypatch):
    logits, weights, extras = case(200)
    extras["anchors"][10:] = -1
    small(monkeypatch, window=200)
    made: list[int] = []
    rules.combine(rules.configure(name), in_parts(logits, made), weights, **extras)
    assert sum(made) >= 200
    assert max(made) <= 11


def test_a_memory_moves_by_one_round_however_many_parts_there_are(monkeypatch):
    logits, weights, extras = case(40)
    one, other = rules.configure("trust"), rules.configure("trust")
    rules.combine(one, logits, weights, **extras)
    small(monkeypatch)
    rules.combine(other, in_parts(logits), weights, **extras)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("sharpen", ["era:0.1", "power:2"])
@pytest.mark.parametrize("name", ["mean", "median", "clusters"])
def test_a_sharpener_too_works_in_parts(name, sharpen, monkeypatch):
    logits, weights, extras = case(40, "by row")
    whole = rules.combine(rules.configure(name), logits, weights, sharpen=sharpen, **extras)
    small(monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(chunked, "PART", 60)
    found = rules.combine(rules.configure(name), logits, weights, sharpen=sharpen, **extras)
    assert found.tobytes() == whole.tobytes()


# --- rules of users ------------------------------------------------------------------------------


def test_a_rule_that_declares_nothing_gets_one_array_of_all(monkeypatch):
    logits, weights, _ = case(40)
    given_: list[object] = []

    def plain(logits, weights):
        given_.append(logits)
        return rules.mean(logits, weights)

    small(monkeypatch)
    found = rules.combine(plain, in_parts(logits), weights)
    assert reads(plain) == "all"
    assert type(given_[0]) is np.ndarray
    np.testing.assert_array_equal(given_[0], logits)
    assert found.tobytes() == rules.mean(logits, weights).tobytes()


def test_an_array_that_would_be_huge_is_made_with_a_warning(monkeypatch):
    logits, weights, _ = case(40)
    small(monkeypatch)
    monkeypatch.setattr(chunked, "HUGE", 799)
    monkeypatch.setattr(rules, "HUGE", 799)
    rules.combine(rules.mean, in_parts(logits), weights)
    with pytest.warns(RuntimeWarning, match=r"<lambda> reads all predictions at once.*rowwise"):
        rules.combine(lambda z, w: rules.mean(z, w), in_parts(logits), weights)


def test_a_declaration_holds_for_a_rule_with_options_and_for_the_objects_of_a_class():
    @rowwise
    def mild(logits, weights, strength=1.0):
        return rules.mean(strength * logits, weights)

    class Counted:
        reads = "chunks"

        def __call__(self, logits, weights):
            return rules.mean(logits[:, :], weights)

    assert reads(mild) == reads(partial(partial(mild, strength=2.0))) == "rows"
    assert reads(Counted()) == reads(chunkwise(lambda z, w: z[:, :].mean(axis=0))) == "chunks"
    assert reads(rules.configure("trimmed-mean", trim=0.2)) == "chunks"


def test_every_rule_of_ours_declares_how_it_reads():
    assert {reads(rule) for rule in rules.RULES.values()} == {"rows", "chunks"}


def test_a_row_wise_rule_is_given_its_rows_of_all_that_has_rows(monkeypatch):
    logits, weights, extras = case(40, "by row")
    told: list[tuple[int, ...]] = []

    @rowwise
    def curious(logits, weights, *, familiarity, anchors, sizes):
        told.append((len(anchors), familiarity.shape[1], weights.shape[1], len(sizes)))
        return rules.mean(logits, weights)

    monkeypatch.setattr(chunked, "PART", 200)
    rules.combine(curious, logits, weights, **extras)
    assert told == [(10, 10, 10, CLIENTS)] * 4


def test_a_row_wise_rule_with_other_choices_from_part_to_part_is_told_so(monkeypatch):
    @rowwise
    def fickle(logits, weights):
        choices = 1 + int(logits[0, 0, 0] > 0)
        return np.repeat(rules.mean(logits, weights)[:, None], choices, axis=1)

    monkeypatch.setattr(chunked, "PART", 60)
    logits, weights, _ = case(40)
    with pytest.raises(FedistillError, match="one shape for every row"):
        rules.combine(fickle, logits, weights)


def test_check_rule_holds_a_rule_to_what_it_declares():
    def standing(logits, weights):
        """Clients count by how sure they are over all rows."""
        sure = rules.softmax(logits).max(axis=2).mean(axis=1)
        return rules.mean(logits, (sure * np.asarray(weights).T).T)

    check_rule(standing)
    with pytest.raises(CheckFailed, match="declared row-wise, some rows alone"):
        check_rule(rowwise(standing))

    @chunkwise
    def forgetful(logits, weights):
        return rules.mean(np.asarray(logits, dtype=float), weights)

    with pytest.raises((TypeError, CheckFailed)):
        check_rule(forgetful)
