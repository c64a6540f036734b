"""Rows that change while a client takes part."""

from __future__ import annotations

import json

import numpy as np
import pytest
from builders import Saying, gaussian

from fedistill.course import WINDOW, Met, Timetable, consolidate, timetable
from fedistill.types import Rows

PARTS = tuple(gaussian(10 + k, k) for k in range(3))


@pytest.mark.parametrize(
    ("every", "lag", "met"),
    [
        (1, 0, [0, 0, 1, 2, 2, 2]),
        (2, 0, [0, 0, 0, 1, 1, 2, 2, 2]),
        (2, 1, [0, 0, 0, 0, 1, 1, 2, 2]),
        (1, 3, [0, 0, 0, 0, 0, 1, 2]),
    ],
)
def test_experiences_begin_in_their_rounds(every, lag, met):
    course = timetable(PARTS, every, lag)
    assert [course.position(number, 0) for number in range(len(met))] == met
    assert [course.position(number, 99) for number in range(len(met))] == met, "whatever was met"


def test_the_rows_of_a_position_are_the_same_whenever_asked():
    course = timetable(PARTS, 2)
    assert course.rows(1) is course.rows(1) is PARTS[1]
    assert course.starts == (1, 3, 5)
    assert Timetable(PARTS, (1, 4, 9)).position(8, 0) == 1


def test_met_counts_what_was_known_before():
    rows = gaussian(250, 1)
    guesses = np.where(np.arange(250) < 150, rows.labels, (rows.labels + 1) % 3)
    learner = Saying(np.eye(3)[guesses])
    met = Met.of(4, rows, learner)
    assert (met.position, met.rows, met.correct, met.labelled) == (4, 250, 150, 250)
    assert met.curve == (1.0, 0.5, 0.0)
    assert met.accuracy == 0.6
    assert WINDOW == 100
    assert learner.fitted == 0


def test_met_counts_rows_with_a_label_alone():
    rows = gaussian(6, 1)
    half = Rows(rows.inputs, np.where(np.arange(6) % 2, rows.labels, -1))
    met = Met.of(0, half, Saying(np.eye(3)[rows.labels]))
    assert (met.rows, met.correct, met.labelled, met.curve) == (6, 3, 3, (1.0,))
    none = Met.of(0, Rows(rows.inputs, np.full(6, -1)), Saying(np.zeros((6, 3))))
    assert (none.labelled, none.correct, none.curve, none.accuracy) == (0, 0, (), None)


def test_no_rows_are_met_without_a_prediction():
    def never(*_):
        raise AssertionError("nothing to predict")

    met = Met.of(0, gaussian(5, 1).take([]), Saying(never))
    assert (met.rows, met.accuracy, met.curve) == (0, None, ())


def test_what_was_met_survives_json():
    met = Met(2, 30, 12, 20, (0.5, 0.7), (130, 140), 99)
    assert Met.from_facts(json.loads(json.dumps(met.facts()))) == met


def test_consolidation_asks_the_learner_or_fits_no_rows():
    class Own(Saying):
        def consolidate(self, *, seed):
            self.asked = seed

    own, other, shown = Own(None), Saying(None), []
    consolidate(own, PARTS[0], 7)
    assert own.asked == 7
    assert own.fitted == 0
    other.fit = lambda rows, seed: shown.append((len(rows), rows.inputs.shape, seed))
    consolidate(other, PARTS[0], 8)
    assert shown == [(0, (0, 4), 8)]
