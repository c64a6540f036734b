"""Learners that remember, from the settings; and memory for models that are refitted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from builders import INPUTS, gaussian, probabilities

from fedistill import models
from fedistill.continual.adwin import Adwin
from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.mmd import Mmd
from fedistill.continual.page_hinkley import PageHinkley
from fedistill.course import consolidate
from fedistill.distill.incremental import IncrementalDistiller
from fedistill.distill.objectives import OBJECTIVES, Cfed, Der, Er, FineTune, Follow, Lwf
from fedistill.distill.recipe import Recipe
from fedistill.distill.rehearsal import Rehearsal, continual_learner, detector_of, memory_of
from fedistill.distill.rehearsal import objective_of as chosen
from fedistill.distill.sklearn_student import SklearnStudent
from fedistill.distill.teachers import EmaTeacher, SelfTeacher
from fedistill.errors import FedistillError, SettingsError
from fedistill.settings import ContinualSettings
from fedistill.types import Rows

MLP = partial(models.MLP, INPUTS, 3, width=8)
PARTS = [gaussian(30, k, labels=[k]) for k in range(3)]
TEST = gaussian(60, 9)
PUBLIC = gaussian(20, 50).inputs
TARGETS = probabilities(20, 3).astype(np.float32)


def plain():
    return SklearnStudent(models.logistic_regression, Recipe(), classes=3)


def rehearsal(buffer=40, drift=None, **options):
    memory = ReplayBuffer(buffer, seed=1, **options) if buffer else None
    return Rehearsal(plain(), memory, drift)


def accuracy(learner, rows=TEST):
    return (learner.predict(rows.inputs).argmax(axis=1) == rows.labels).mean()


def content(learner):
    return {name: np.asarray(v).tobytes() for name, v in learner.state_dict().items()}


def same(one, other):
    np.testing.assert_array_equal(one.predict(TEST.inputs), other.predict(TEST.inputs))
    assert content(one) == content(other)


# --- refitted models -----------------------------------------------------------------------------


def test_a_refitted_model_keeps_what_it_remembers():
    forgets, remembers = rehearsal(0), rehearsal(90)
    for part in PARTS:
        forgets.fit(part, seed=1)
        remembers.fit(part, seed=1)
    assert accuracy(remembers) > 0.8 > 0.6 > accuracy(forgets)


def test_every_fit_sees_all_remembered_rows_and_the_days_once():
    learner = rehearsal(40)
    shown = []
    fit = learner.learner.fit
    learner.learner.fit = lambda rows, seed: shown.append(rows) or fit(rows, seed=seed)
    learner.fit(PARTS[0], seed=1)
    learner.fit(PARTS[1], seed=2)
    learner.fit(PARTS[2], seed=3)
    assert [len(rows) for rows in shown] == [30, 60, 70]
    assert learner.passed == 160
    np.testing.assert_array_equal(shown[1].inputs[:30], PARTS[1].inputs)
    assert {r.tobytes() for r in shown[1].inputs[30:]} == {r.tobytes() for r in PARTS[0].inputs}


def test_rounds_of_one_experience_are_one_arrival():
    learner = rehearsal(200)
    for seed, part in enumerate([PARTS[0], PARTS[0], PARTS[1], PARTS[1]]):
        learner.fit(part, seed=seed)
    assert learner.replay.seen == 60
    assert learner.rows_seen == 60


def test_a_round_of_distillation_is_no_experience():
    learner = rehearsal(200)
    learner.absorb(PUBLIC, TARGETS, seed=1)
    learner.fit(PARTS[0], seed=1)
    consolidate(learner, PARTS[0], seed=2)
    learner.fit(PARTS[0], seed=3)
    assert learner.replay.seen == 30, "the same rows go on after it"
    assert not learner.alarmed


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("max_uses", [None, 3])
def test_a_refitted_model_goes_on_as_if_it_had_not_stopped(max_uses, extra):
    def go(learner, numbers):
        for k in numbers:
            learner.absorb(PUBLIC, TARGETS, seed=k)
            learner.fit(PARTS[k], seed=10 + k)
            if extra:
                consolidate(learner, PARTS[k], seed=20 + k)
        return learner

    def fresh():
        return rehearsal(40, Adwin(on="entropy"), max_uses=max_uses)

    whole, first, resumed = go(fresh(), range(3)), go(fresh(), range(2)), fresh()
    resumed.load_state_dict(first.state_dict(), PARTS[1])
    same(resumed, first)
    same(go(resumed, [2]), whole)


def test_nothing_of_an_erased_person_is_left():
    inputs = PARTS[0].inputs.copy()
    inputs[4] = np.float32([1.0625, 7.3333, 2.7182, 3.1415])
    names = np.array([f"p{k}" for k in range(30)])
    rows = Rows(inputs, PARTS[0].labels, subject=names)
    learner = rehearsal(100, Adwin())
    learner.fit(rows, seed=1)
    learner.fit(PARTS[1], seed=2)
    needles = [inputs[4].tobytes(), "p4".encode("utf-32-le") + bytes(4)]

    def found():
        state = b"\1".join(content(learner).values())
        return [needle in state for needle in needles]

    assert found() == [True, True]
    assert learner.erase("p4").rows == 1
    assert found() == [False, False]
    learner.fit(rows, seed=3)
    assert found() == [False, False]
    with pytest.raises(FedistillError, match="remembers no rows"):
        rehearsal(0).erase("p4")


def test_rows_without_labels_teach_a_refitted_model_nothing():
    learner, known = rehearsal(0), rehearsal(0)
    half = np.where(np.arange(60) % 2, TEST.labels, -1)
    learner.fit(Rows(TEST.inputs, half), seed=1)
    known.fit(TEST.take(np.flatnonzero(np.arange(60) % 2)), seed=1)
    np.testing.assert_array_equal(learner.predict(TEST.inputs), known.predict(TEST.inputs))
    remembering = rehearsal(100)
    remembering.fit(Rows(TEST.inputs, half), seed=1)
    remembering.fit(Rows(PARTS[0].inputs, np.full(30, -1)), seed=2)
    assert remembering.replay.seen == 90
    restored = rehearsal(100)
    restored.load_state_dict(remembering.state_dict(), Rows(PARTS[0].inputs, np.full(30, -1)))
    same(restored, remembering)


def test_an_alarm_is_told_in_rows_of_the_stream():
    learner = rehearsal(200, Adwin(on="error", clock=1))
    learner.fit(gaussian(80, 1), seed=1)
    learner.fit(Rows(gaussian(80, 2).inputs, np.full(80, -1)), seed=2)
    assert not learner.alarmed
    learner.fit(gaussian(80, 3), seed=3)
    assert not learner.alarmed
    assert learner.alarms == ()
    wrong = gaussian(80, 4)
    learner.fit(Rows(wrong.inputs, (wrong.labels + 1) % 3), seed=4)
    assert learner.alarmed
    assert all(240 <= row < 320 for row in learner.alarms)
    assert learner.alarms
    learner.fit(Rows(wrong.inputs, (wrong.labels + 1) % 3), seed=5)
    assert not learner.alarmed, "the next round brings nothing new"


def test_familiarity_is_that_of_the_learner():
    background = gaussian(30, 4).inputs + 4
    inner = SklearnStudent(
        models.logistic_regression, Recipe(familiarity=True), classes=3, background=background
    )
    learner = Rehearsal(inner, None)
    learner.fit(PARTS[0], seed=1)
    found = learner.familiarity(TEST.inputs)
    np.testing.assert_array_equal(found, inner.familiarity(TEST.inputs))
    assert found.any()

    class Mute:
        pass

    assert (Rehearsal(Mute(), None).familiarity(TEST.inputs) == 0).all()


# --- from the settings ---------------------------------------------------------------------------


def learner_of(build=MLP, background=None, **options):
    how = ContinualSettings(**options)
    return continual_learner(
        how,
        5,
        build,
        Recipe(epochs=1, batch_size=8),
        classes=3,
        seed=1,
        background=background,
        example=PUBLIC[:2],
    )


def test_settings_name_objectives_and_their_options():
    assert chosen(ContinualSettings(buffer=10)) == Er()
    assert chosen(ContinualSettings(drift="adwin")) == FineTune()
    assert chosen(ContinualSettings(objective="der", buffer=9, alpha=0.7, replay_rows=3)) == Der(
        0.7, 3
    )
    assert chosen(ContinualSettings(objective="cfed", learns=0.6, distils=0.4)) == Cfed(
        learns=0.6, distils=0.4
    )
    for name in OBJECTIVES:
        assert isinstance(chosen(ContinualSettings(objective=name, buffer=5)), OBJECTIVES[name])
    with pytest.raises(SettingsError) as caught:
        chosen(ContinualSettings(objective="er", buffer=5, alpha=0.1, learns=0.5))
    assert {problem.key for problem in caught.value.problems} == {
        "continual.alpha",
        "continual.learns",
    }


def test_settings_name_memory_teacher_and_detector():
    learner = learner_of(
        buffer=20, policy="recent", draw="balanced", max_uses=4, teacher="ema", decay=0.9
    )
    assert isinstance(learner, IncrementalDistiller)
    memory = learner.replay
    assert (memory.capacity, memory.policy.summary != "", memory.drawing) == (20, True, "balanced")
    assert memory.max_uses == 4
    assert isinstance(learner.teacher, EmaTeacher)
    assert learner.teacher.decay == 0.9
    assert isinstance(learner.objective, Follow)
    assert isinstance(learner_of(objective="lwf").teacher, SelfTeacher)
    assert isinstance(learner_of(objective="lwf").objective, Lwf)
    assert isinstance(learner_of(buffer=5, teacher="self").objective, Follow)
    assert learner_of(objective="fine-tune").replay is None
    for name, kind in {"adwin": Adwin, "page-hinkley": PageHinkley, "mmd": Mmd}.items():
        assert isinstance(detector_of(ContinualSettings(drift=name), 1), kind)
    assert detector_of(ContinualSettings(buffer=3), 1) is None


def test_every_client_has_a_memory_of_its_own_kind():
    how = ContinualSettings(buffer=10)
    one, other = memory_of(how, 1), memory_of(how, 2)
    assert one.seed != other.seed
    assert one.max_uses is None


def test_all_clients_start_from_the_same_weights():
    from fedistill.distill.build import build_learner

    alone = build_learner(MLP, Recipe(), classes=3, seed=1)
    np.testing.assert_array_equal(learner_of(buffer=5).predict(PUBLIC), alone.predict(PUBLIC))


def test_public_rows_of_a_site_are_those_of_cfed_and_no_part_of_its_state():
    learner = learner_of(objective="cfed", background=PUBLIC)
    learner.absorb(PUBLIC, TARGETS, seed=1)
    learner.fit(PARTS[0], seed=1)
    learner.fit(PARTS[1], seed=2)
    assert learner.last.terms["public"] > 0
    assert not any(name.startswith("memory.") for name in learner.state_dict())


def test_scikit_learn_models_remember_by_rehearsal_alone():
    learner = learner_of(models.logistic_regression, buffer=9, drift="adwin", on="error")
    assert isinstance(learner, Rehearsal)
    assert learner.replay.capacity == 9
    assert isinstance(learner.drift, Adwin)
    assert learner.drift.state_dict()["on"] == "error"
    for options in ({"objective": "der", "buffer": 4}, {"teacher": "ema"}):
        with pytest.raises(SettingsError, match="needs a torch model"):
            learner_of(models.logistic_regression, **options)


def test_a_model_that_does_not_fit_is_told_at_once():
    with pytest.raises(FedistillError, match="must return logits"):
        learner_of(partial(models.MLP, INPUTS, 7), buffer=3)
