"""Sub-teachers: one unit more or less reaches one of them, and no other."""

from functools import partial

import numpy as np
import pytest

from fedistill import models
from fedistill.distill.recipe import Recipe
from fedistill.privacy.sampling import names_of
from fedistill.privacy.shards import (
    ABSTAINS,
    STEPS,
    count_votes,
    shards_of,
    teacher_recipe,
    vote,
    votes_of,
)
from fedistill.types import Rows

from .committees import CLASSES, RECIPE, TEACHERS, Centroids, poisoned, sample

KEY = bytes(range(32))


def test_a_shard_is_known_from_the_unit_alone():
    rows = sample(60)
    names = names_of(rows, "record")
    whole = shards_of(names, TEACHERS, KEY)
    for gone in range(len(rows)):
        rest = [number for number in range(len(rows)) if number != gone]
        assert (shards_of([names[number] for number in rest], TEACHERS, KEY) == whole[rest]).all()


def test_shards_are_about_even_and_depend_on_the_key():
    names = [number.to_bytes(4, "little") for number in range(4000)]
    counts = np.bincount(shards_of(names, 8, KEY), minlength=8)
    assert counts.min() > 400
    assert counts.max() < 600
    assert (shards_of(names, 8, KEY) != shards_of(names, 8, bytes(32))).mean() > 0.8


def test_all_rows_of_a_user_are_in_one_shard():
    rows = sample(60, users=7)
    shards = shards_of(names_of(rows, "user"), TEACHERS, KEY)
    for user in set(rows.subject):
        assert len(set(shards[rows.subject == user])) == 1


def test_no_names_no_shards():
    assert shards_of([], TEACHERS, KEY).shape == (0,)


def test_votes_are_counted_and_abstentions_are_not():
    votes = np.array([[0, 2], [0, ABSTAINS], [1, ABSTAINS]])
    assert count_votes(votes, 3).tolist() == [[2, 1, 0], [0, 0, 1]]


def test_a_vote_is_for_what_is_likelier_than_usual():
    # Three rows of class 0, one of class 1, none of class 2: shares 3.5, 1.5 and 0.5 of 5.5.
    probs = np.array([[0.75, 0.2, 0.05], [0.65, 0.3, 0.05], [0.6, 0.2, 0.2], [0.9, 0.05, 0.05]])
    assert vote(np.log(probs), np.array([0, 0, 0, 1])).tolist() == [0, 1, 2, 0]


def votes(rows: Rows, unit: str = "record", build=Centroids) -> np.ndarray:
    shards = shards_of(names_of(rows, unit), TEACHERS, KEY)
    asked = sample(25, seed=9).inputs
    return votes_of(rows, shards, asked, build, RECIPE, teachers=TEACHERS, classes=CLASSES, seed=1)


def moves(before: np.ndarray, after: np.ndarray) -> None:
    """What the proof says, checked on all rows asked."""
    assert (before != after).any(axis=1).sum() <= 1  # of the sub-teachers
    change = count_votes(after, CLASSES) - count_votes(before, CLASSES)
    assert np.abs(change).max(initial=0) <= 1
    assert np.abs(change).sum(axis=1).max(initial=0) <= 2
    assert np.linalg.norm(change, axis=1).max(initial=0) <= 2**0.5 + 1e-9


def test_no_record_moves_more_than_one_vote():
    rows = sample(40)
    whole = votes(rows)
    for gone in range(len(rows)):
        moves(whole, votes(rows.take(np.delete(np.arange(len(rows)), gone))))


def test_no_user_moves_more_than_one_vote():
    rows = sample(60, users=9)
    whole = votes(rows, "user")
    for user in set(rows.subject):
        moves(whole, votes(rows.take(np.flatnonzero(rows.subject != user)), "user"))


@pytest.mark.parametrize("label", range(CLASSES))
def test_a_record_that_is_added_anywhere_moves_one_vote(label):
    rows, new = sample(40), np.full((1, 4), 50.0, dtype=np.float32)
    for place in (0, 20, 40):
        inputs = np.insert(rows.inputs, place, new, axis=0)
        moves(votes(rows), votes(Rows(inputs, np.insert(rows.labels, place, label))))


def test_torch_teachers_keep_to_themselves_too():
    build = partial(models.MLP, 4, CLASSES, width=4)
    rows = sample(12)
    whole = votes(rows, build=build)
    for gone in (0, 11):
        moves(whole, votes(rows.take(np.delete(np.arange(12), gone)), build=build))


def test_a_record_that_breaks_its_teacher_costs_one_vote():
    rows = sample(40)
    inputs = np.concatenate([rows.inputs, np.full((1, 4), np.nan)])
    bad = Rows(inputs, np.append(rows.labels, 0))
    whole, broken = votes(rows), votes(bad, build=poisoned)
    moves(whole, broken)
    assert (broken == ABSTAINS).all(axis=1).sum() >= 1


def test_a_model_that_none_can_be_taught_with_abstains_everywhere():
    """An error would tell that no shard is whole, and one record more might mend one."""
    rows = sample(200)  # no shard has a single class, which needs no model
    bad = Rows(np.full_like(rows.inputs, np.nan), rows.labels)
    bad.inputs[:, 0] = np.arange(200)  # records of their own
    assert (votes(bad, build=poisoned) == ABSTAINS).all()


def test_fewer_rows_than_teachers_leave_some_silent():
    found = votes(sample(3))
    assert (found == ABSTAINS).all(axis=1).sum() >= TEACHERS - 3
    assert count_votes(found, CLASSES).sum(axis=1).max() <= 3


def test_a_handful_of_rows_gets_steps_enough_and_nothing_public():
    recipe = Recipe(epochs=2, batch_size=10, familiarity=True, calibrate=True, distil="inside")
    few = teacher_recipe(recipe, 7)
    assert (few.epochs, few.distil, few.familiarity, few.calibrate) == (
        STEPS,
        "never",
        False,
        False,
    )
    assert teacher_recipe(recipe, 1000).epochs == 2
