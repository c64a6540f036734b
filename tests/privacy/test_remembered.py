"""Rows that stay by coins of their own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fedistill import models
from fedistill.data.records import of_arrays
from fedistill.distill.recipe import Recipe
from fedistill.errors import CheckpointError, FedistillError, SettingsError
from fedistill.privacy import entropy
from fedistill.privacy.dpsgd import PrivateStudent
from fedistill.privacy.events import Sampled, Spending
from fedistill.privacy.remembered import PrivateMemory, private_memory
from fedistill.privacy.sampling import units_of
from fedistill.settings import ContinualSettings, PrivacySettings
from fedistill.types import Rows


def rows(*values, subject=None):
    inputs = np.array(values, dtype=np.float32).reshape(-1, 1)
    labels = np.zeros(len(inputs), dtype=np.int64)
    return Rows(inputs, labels, subject=None if subject is None else np.array(subject))


def held(memory):
    return [] if memory.rows is None else memory.rows.inputs[:, 0].tolist()


def filled(capacity, *batches, unit="record"):
    memory = PrivateMemory(capacity)
    for batch in batches:
        memory.add(batch, unit)
    return memory


@pytest.fixture
def keys(monkeypatch):
    """Keys that a test hands out, in order."""
    given = []

    class Handed:
        def random(self, count):
            return np.array([given.pop(0) for _ in range(count)])

    monkeypatch.setattr(entropy, "numpy_generator", Handed)
    return given


def test_a_row_stays_while_its_key_is_below_capacity_over_seen(keys):
    keys += [0.9, 0.4, 0.1, 0.6]
    memory = PrivateMemory(2)
    memory.add(rows(1, 2), "record")
    assert held(memory) == [1, 2]  # 2 of 2: all
    memory.add(rows(3, 4), "record")
    assert held(memory) == [2, 3]  # below 2 / 4
    keys += [0.7, 0.2, 0.39, 0.5]
    memory.add(rows(5, 6, 7, 8), "record")
    assert held(memory) == [3, 6]  # below 2 / 8
    assert memory.seen == 8


def test_one_record_decides_about_no_other(keys):
    """In a reservoir the place of one record is another's loss. Here a blank changes nothing."""
    drawn = np.random.default_rng(1).random(60)
    kept = []
    for blank in (False, True):
        keys[:] = drawn.tolist()
        data = np.arange(60.0)
        data[7] = -1.0 if blank else 7.0
        kept.append(set(held(filled(10, rows(*data[:20]), rows(*data[20:])))) - {7.0, -1.0})
    assert kept[0] == kept[1]


def test_as_many_are_kept_as_asked_for_in_the_mean():
    sizes = [len(filled(20, rows(*range(50)), rows(*range(50, 200)))) for _ in range(100)]
    assert np.mean(sizes) == pytest.approx(20, abs=6 * 4.3 / 10)
    assert np.std(sizes) > 2


def test_early_and_late_rows_stay_alike():
    counts = np.zeros(100)
    for _ in range(200):
        memory = filled(25, *(rows(*range(10 * n, 10 * n + 10)) for n in range(10)))
        counts[np.array(held(memory), dtype=int)] += 1
    assert counts[:50].mean() / 200 == pytest.approx(0.25, abs=0.03)
    assert counts[50:].mean() / 200 == pytest.approx(0.25, abs=0.03)


def test_two_memories_keep_different_rows():
    first, second = (held(filled(10, rows(*range(100)))) for _ in range(2))
    assert first != second


def test_a_record_lies_there_once_and_all_that_come_are_counted():
    memory = filled(10, rows(1, 2, 2), rows(2, 3))
    assert sorted(held(memory)) == [1, 2, 3]
    assert memory.seen == 5
    np.testing.assert_array_equal(memory.beside(rows(3, 4), "record").inputs[:, 0], [3, 4, 1, 2])


def test_one_users_rows_do_not_decide_about_anothers():
    memory = filled(10, rows(1, 2, subject=["a", "b"]), unit="user")
    both = memory.beside(rows(1, 2, subject=["b", "b"]), "user")
    assert list(zip(both.subject.tolist(), both.inputs[:, 0].tolist(), strict=True)) == [
        ("b", 1),
        ("b", 2),
        ("a", 1),
    ]


def test_nothing_is_replayed_without_new_rows():
    assert len(filled(10, rows(1)).beside(rows(), "record")) == 0


def test_an_erased_person_leaves_and_does_not_come_back():
    memory = filled(10, rows(1, 2, 3, subject=["a", "b", "a"]))
    receipt = memory.erase("a")
    assert receipt.rows == 2
    assert held(memory) == [2]
    memory.add(rows(4, 5, subject=["a", "c"]), "record")
    assert held(memory) == [2, 5]
    with pytest.raises(FedistillError, match="empty one"):
        memory.erase("")


def test_an_older_file_brings_nobody_back():
    """Fault 50."""
    memory = filled(10, rows(1, 2, subject=["a", "b"]))
    old = memory.state_dict()
    memory.erase("a")
    memory.load_state_dict(old)
    assert held(memory) == [2]
    again = PrivateMemory(10)
    again.load_state_dict(memory.state_dict())
    again.add(rows(7, subject=["a"]), "record")
    assert held(again) == [2]


def test_units_on_a_list_are_let_go():
    memory = filled(10, rows(1, 2, 3, subject=["a", "b", "c"]))
    gone = [units_of(rows(2), "record").names[0]]
    assert memory.drop(gone, "record") == 1
    assert held(memory) == [1, 3]
    assert memory.drop(units_of(rows(9, subject=["c"]), "user").names, "user") == 1
    assert memory.drop(gone, "record") == 0


def test_a_state_is_complete():
    memory = filled(30, rows(*range(80), subject=[f"p{n}" for n in range(80)]))
    again = PrivateMemory(30)
    again.load_state_dict(memory.state_dict())
    assert held(again) == held(memory)
    assert again.rows.subject.tolist() == memory.rows.subject.tolist()
    assert {k: v.tobytes() for k, v in again.state_dict().items()} == {
        k: v.tobytes() for k, v in memory.state_dict().items()
    }
    empty = PrivateMemory(3)
    again.load_state_dict(empty.state_dict())
    assert held(again) == []


def test_a_damaged_state_is_refused_and_changes_nothing():
    memory = filled(10, rows(1, 2))
    state = dict(memory.state_dict())
    for name in ("keys", "inputs", "subjects"):
        with pytest.raises(CheckpointError, match="damaged"):
            memory.load_state_dict(state | {name: state[name][:1]})
    with pytest.raises(CheckpointError):
        memory.load_state_dict({})
    assert held(memory) == [1, 2]


@pytest.mark.parametrize(
    ("key", "how"),
    [
        ("policy", {"policy": "herding"}),
        ("policy", {"policy": "hardest"}),
        ("policy", {"policy": "class-balanced"}),
        ("draw", {"draw": "mir"}),
        ("max_uses", {"max_uses": 3}),
        ("objective", {"objective": "der"}),
        ("teacher", {"teacher": "ema"}),
    ],
)
def test_what_competes_or_compares_is_refused(key, how):
    with pytest.raises(SettingsError, match=rf"continual\.{key}"):
        private_memory(ContinualSettings(**({"buffer": 10} | how)))


def test_what_is_allowed():
    assert private_memory(ContinualSettings()) is None
    memory = private_memory(ContinualSettings(buffer=7, objective="er"))
    assert memory is not None
    assert memory.capacity == 7
    with pytest.raises(FedistillError, match="room"):
        PrivateMemory(0)


# --- in a student -----------------------------------------------------------------------------


def student(capacity=100, **privacy):
    return PrivateStudent(
        partial(models.Linear, 1, 2),
        Recipe(epochs=1),
        classes=2,
        seed=1,
        privacy=PrivacySettings(mechanism="dpsgd", **privacy),
        replay=PrivateMemory(capacity),
    )


def fit(learner, these):
    learner.allow(1.0)
    learner.fit(these, seed=1)


def test_remembered_rows_are_among_the_units_and_in_the_training():
    learner, seen = student(sample_rate=1.0), []
    plain = learner.loss
    learner.loss = lambda net, x, y: (seen.append(sorted(x[:, 0].tolist())), plain(net, x, y))[1]
    first, second = rows(1, 2, 3), rows(3, 4)
    fit(learner, first)
    assert set(learner.units(second)) == set(units_of(rows(1, 2, 3, 4), "record").names)
    assert learner.quote(second, np.arange(1))(2.0) == Spending.of(Sampled(1.0, 2.0), 1)
    fit(learner, second)
    assert seen == [[1, 2, 3], [1, 2, 3, 4]]


def test_an_experience_is_remembered_once():
    learner = student()
    for _ in range(3):
        fit(learner, rows(1, 2, 3))
    assert learner.replay.seen == 3


def test_a_restored_student_remembers():
    learner = student()
    fit(learner, rows(1, 2, 3, subject=["a", "b", "c"]))
    again = student()
    again.load_state_dict(learner.state_dict(), rows(9))
    assert again.units(rows(9)) == learner.units(rows(9))
    fit(again, rows(1, 2, 3, subject=["a", "b", "c"]))
    assert again.replay.seen == 3


def test_a_student_forgets_persons_and_units():
    learner = student()
    fit(learner, rows(1, 2, 3, subject=["a", "b", "c"]))
    assert learner.erase("b").rows == 1
    assert learner.forget([units_of(rows(3), "record").names[0]]) == 1
    assert set(learner.units(rows(9))) == set(units_of(rows(1, 9), "record").names)
    plain = PrivateStudent(
        partial(models.Linear, 1, 2), Recipe(), classes=2, seed=1, privacy=PrivacySettings()
    )
    assert plain.forget([b"x"]) == 0
    with pytest.raises(FedistillError, match="nothing to erase"):
        plain.erase("a")


# --- records that were read ---------------------------------------------------------------------


def read(*values, scale=1.0, **changes):
    """Rows that were read as these values, and scaled since."""
    found = rows(*(scale * value for value in values), **changes)
    return replace(found, record=of_arrays(np.array(values)))


def test_a_remembered_record_is_known_again_once_it_is_scaled_otherwise():
    memory = filled(10, read(1, 2, 3))
    together = memory.beside(read(2, 4, scale=0.5), "record")
    assert sorted(together.inputs[:, 0]) == [1, 1, 2, 3]  # 2 is now 1, and is there once
    assert len(units_of(together, "record")) == 4
    memory.add(read(2, 4, scale=0.5), "record")
    assert sorted(held(memory)) == [1, 2, 2, 3]
    assert memory.drop(units_of(read(4, 9), "record").names, "record") == 1


def test_records_survive_a_restart():
    memory = filled(10, read(1, 2, 3, subject=["a", "", "b"]))
    other = PrivateMemory(10)
    other.load_state_dict(memory.state_dict())
    assert other.rows.record.tolist() == memory.rows.record.tolist()
    assert units_of(other.rows, "record").names == units_of(read(1, 2, 3), "record").names
    state = dict(memory.state_dict())
    state["records"] = state["records"][:2]
    with pytest.raises(CheckpointError, match="unequal length"):
        other.load_state_dict(state)


def test_rows_that_were_not_read_do_not_rename_those_that_were():
    memory = filled(10, read(1, 2), rows(3))
    assert set(units_of(read(1, 2), "record").names) < set(units_of(memory.rows, "record").names)
    other = PrivateMemory(10)
    other.load_state_dict(memory.state_dict())
    assert units_of(other.rows, "record").names == units_of(memory.rows, "record").names
