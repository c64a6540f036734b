"""A student that stays current: it is tested first, and learns beside what it remembers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import CENTRES, INPUTS, gaussian, probabilities
from torch import nn

import fedistill as fd
from fedistill import models
from fedistill.continual.adwin import Adwin
from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.mmd import Mmd
from fedistill.continual.page_hinkley import PageHinkley
from fedistill.continual.watcher import DriftState
from fedistill.data.stream import Experience
from fedistill.distill.incremental import IncrementalDistiller
from fedistill.distill.objectives import OBJECTIVES, DerPlus, Er, Follow, Lwf, labels, objective
from fedistill.distill.recipe import Recipe
from fedistill.distill.teachers import EmaTeacher, SelfTeacher
from fedistill.errors import CheckpointError, DataError, FedistillError, RunError
from fedistill.losses import soft_cross_entropy
from fedistill.types import Rows

torch.set_num_threads(1)

MLP = partial(models.MLP, INPUTS, 3, width=8)
PARTS = [gaussian(24, 10 + k, labels=group) for k, group in enumerate([(0, 1), (1, 2), (0, 2)])]
PUBLIC = gaussian(20, 50).inputs
TEST = gaussian(60, 60)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(INPUTS), nn.Dropout(0.2)
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, inputs):
        return self.head(self.drop(self.norm(inputs)))


def recipe(**options):
    return Recipe(**({"epochs": 2, "batch_size": 8, "lr": 0.05} | options))


def student(what="er", build=MLP, *, buffer=40, policy="reservoir", seed=1, **options):
    made = objective(what, rows=6) if what in {"er", "der", "der++", "er-ace"} else what
    given = {"training": recipe(), "seed": seed} | options
    if buffer and "replay" not in given:
        given["replay"] = ReplayBuffer(buffer, policy, seed=seed)
    return IncrementalDistiller(build, made, **given)


def content(learner):
    """Everything that goes on, byte for byte."""
    state = learner.state_dict()
    return {name: (np.asarray(v).shape, np.asarray(v).tobytes()) for name, v in state.items()}


def subjects(count, name="p"):
    return np.array([f"{name}{k:03d}" for k in range(count)])


# --- test first ----------------------------------------------------------------------------------


def test_what_comes_is_tested_before_it_is_learned():
    learner = student()
    said = learner.predict(PARTS[0].inputs).argmax(axis=1)
    step = learner.learn(PARTS[0])
    assert step.rows == 24
    assert step.accuracy_before == (said == PARTS[0].labels).mean()
    np.testing.assert_array_equal(step.correct, said == PARTS[0].labels)
    again = learner.predict(PARTS[1].inputs).argmax(axis=1)
    assert learner.learn(PARTS[1]).accuracy_before == (again == PARTS[1].labels).mean()
    assert learner.last.rows == 24
    assert learner.rows_seen == 48
    assert learner.experiences == 2


def test_all_ways_to_give_an_experience_are_one():
    rows = PARTS[0]
    given = [
        Experience(rows),
        rows,
        (rows.inputs, rows.labels),
        [rows.inputs.tolist(), rows.labels],
    ]
    found = []
    for experience in given:
        learner = student()
        learner.learn(experience)
        found.append(content(learner))
    assert all(one == found[0] for one in found)


def test_progress_tells_what_was_done():
    learner = student()
    first, second = learner.learn(PARTS[0]), learner.learn(PARTS[1])
    assert (first.steps, second.steps) == (6, 6), "2 epochs of 24 rows, 8 at a time"
    assert first.rows_trained == 2 * 24 + 6 * 6 - 6, "no row is remembered in the first step"
    assert second.rows_trained == 2 * 24 + 6 * 6
    assert set(first.terms) == {"new", "old"}
    assert second.loss == pytest.approx(sum(second.terms.values()))
    assert first.new_classes == (0, 1)
    assert second.new_classes == (2,)
    assert second.seconds > 0
    assert second.drift is DriftState.OK
    assert learner.alarms == ()


def test_learning_lowers_the_loss_and_replay_keeps_what_was_known():
    parts = [gaussian(120, k, labels=[k]) for k in range(3)]
    found = {}
    for what in ("fine-tune", "er"):
        learner = student(what, buffer=60, training=recipe(epochs=5))
        for part in parts:
            learner.learn(part)
        found[what] = (learner.predict(TEST.inputs).argmax(axis=1) == TEST.labels).mean()
    assert found["er"] > found["fine-tune"] + 0.2


# --- what is remembered --------------------------------------------------------------------------


def test_stored_logits_are_those_of_the_forward_pass_before_the_step():
    learner = student(training=recipe(epochs=1, batch_size=24))
    said = learner.predict(PARTS[0].inputs)
    learner.learn(PARTS[0])
    held = learner.replay.rows()
    order = [int(np.flatnonzero((PARTS[0].inputs == row).all(axis=1))[0]) for row in held.inputs]
    assert sorted(order) == list(range(24))
    np.testing.assert_allclose(held.logits, said[order], rtol=1e-5, atol=1e-6)
    assert np.abs(learner.predict(PARTS[0].inputs) - said).max() > 1e-3
    np.testing.assert_array_equal(held.labels, PARTS[0].labels[order])


def test_stored_logits_are_raw_ones_also_where_training_is_calibrated():
    learner = student(training=recipe(epochs=1, batch_size=24, calibrate=True))
    said = learner.predict(PARTS[0].inputs)
    learner.learn(PARTS[0])
    held = learner.replay.rows()
    order = [int(np.flatnonzero((PARTS[0].inputs == row).all(axis=1))[0]) for row in held.inputs]
    np.testing.assert_allclose(held.logits, said[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["reservoir", "herding", "hardest", "recent"])
def test_each_row_enters_the_memory_once(policy):
    learner = student(buffer=200, policy=policy, training=recipe(epochs=3))
    for part in PARTS:
        learner.learn(part)
    assert learner.replay.seen == 72
    held = learner.replay.rows()
    assert len(np.unique(held.inputs, axis=0)) == 72


def test_the_rounds_of_an_experience_are_one_arrival():
    learner = student(buffer=200)
    for number, part in enumerate([PARTS[0], PARTS[0], PARTS[1], PARTS[1], PARTS[1]]):
        learner.absorb(PUBLIC, probabilities(20, 3).astype(np.float32), seed=number)
        learner.fit(part, seed=100 + number)
    assert learner.replay.seen == 48
    assert learner.experiences == 2
    assert learner.rows_seen == 48


def test_a_memory_that_was_begun_elsewhere_is_taken_over():
    memory = ReplayBuffer(50, seed=4)
    memory.add(TEST.inputs[:30], TEST.labels[:30] + 4, logits=probabilities(30, 1, classes=9))
    learner = student("der++", replay=memory, teacher=EmaTeacher())
    assert learner.classes == 7
    learner.consolidate()
    (first, *_) = steps_of(learner, PARTS[0])
    assert [len(group) for group in first.old] == [6, 6]
    assert memory.seen == 54
    with pytest.raises(DataError, match=r"expected inputs of shape \[4\] a row as before"):
        learner.learn((np.ones((2, 3)), [0, 1]))
    other = ReplayBuffer(5)
    other.add(np.ones((3, 9)), [0, 1, 2])
    with pytest.raises(DataError, match=r"MLP cannot take rows of shape \[9\]"):
        student(replay=other)


def test_the_callers_rows_stay_as_they_are():
    rows = PARTS[0]
    before = rows.inputs.copy(), rows.labels.copy()
    learner = student("der++")
    learner.learn(rows)
    np.testing.assert_array_equal(rows.inputs, before[0])
    np.testing.assert_array_equal(rows.labels, before[1])


def steps_of(learner, rows):
    """What the objective was shown in each step."""
    shown, own = [], learner.objective

    class Tapped:
        draws = own.draws

        def __call__(self, step):
            shown.append(step)
            return own(step)

    learner.objective = Tapped()
    learner.learn(rows)
    learner.objective = own
    return shown


def test_replay_begins_with_the_first_stored_row():
    learner = student("er", training=recipe(epochs=1, batch_size=2))
    sizes = [len(step.old[0]) for step in steps_of(learner, PARTS[0])]
    assert sizes[:5] == [0, 2, 4, 6, 6]


def test_two_draws_are_independent():
    learner = student("der++", buffer=60)
    learner.learn(PARTS[0])
    pairs = [
        [{row.tobytes() for row in group.inputs.numpy()} for group in step.old]
        for step in steps_of(learner, PARTS[1])
    ]
    assert all(len(first) == len(second) == 6 for first, second in pairs)
    assert sum(first == second for first, second in pairs) == 0
    assert any(first & second for first, second in pairs), "not apart from each other either"


def test_what_was_said_lies_beside_the_same_row_when_it_comes_back():
    learner = student("der", training=recipe(epochs=1, batch_size=24))
    said = learner.predict(PARTS[0].inputs)
    learner.learn(PARTS[0])
    for step in steps_of(learner, PARTS[1]):
        (old,) = step.old
        for inputs, stored in zip(old.inputs.numpy(), old.stored.numpy(), strict=True):
            place = np.flatnonzero((PARTS[0].inputs == inputs).all(axis=1))
            if len(place):
                np.testing.assert_allclose(stored, said[place[0]], rtol=1e-5, atol=1e-6)


def test_a_row_stored_before_a_class_came_has_no_logit_of_it():
    learner = student("der")
    learner.learn(PARTS[0])
    shifted = Rows(PARTS[1].inputs, PARTS[1].labels + 2)
    seen = steps_of(learner, shifted)
    old = torch.cat([step.old[0].stored for step in seen[:1]])
    assert old.shape == (6, 5)
    assert old[:, :3].isfinite().all()
    assert old[:, 3:].isnan().all()
    assert learner.predict(TEST.inputs).shape == (60, 5)


def test_mir_replays_what_the_step_would_harm_most():
    buffer = ReplayBuffer(60, draw="mir", seed=1)
    learner = student("er", replay=buffer)
    learner.learn(PARTS[0])
    learner.learn(PARTS[1])
    assert learner.last.steps == 6
    judged = []
    draw = buffer.draw

    def tapped(count, *args, score, **options):
        def noting(rows):
            judged.append((rows, score(rows)))
            return judged[-1][1]

        judged.append(draw(count, *args, score=noting, **options))
        return judged[-1]

    buffer.draw = tapped
    learner.observe(PARTS[2].inputs, PARTS[2].labels)
    (rows, scores), drawn = judged
    assert len(scores) == 48
    assert np.isfinite(scores).all()
    best = rows.numbers[np.argsort(-scores, kind="stable")[:6]]
    assert set(drawn.numbers.tolist()) == set(best.tolist())


def test_interference_is_the_growth_of_the_loss_by_hand_and_moves_nothing():
    from fedistill.distill.remembering import interference

    module = Normed().train()
    with torch.no_grad():
        module(torch.from_numpy(TEST.inputs))  # some running statistics
    before = {k: v.clone() for k, v in module.state_dict().items()}
    new, known = torch.from_numpy(PARTS[0].inputs), torch.from_numpy(PARTS[0].labels)
    held = ReplayBuffer(5)
    held.add(TEST.inputs[:5], TEST.labels[:5])
    rows = held.rows()
    found = interference(module, 0.1, new, known)(rows)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module.training
    assert module.norm.training
    twin = Normed()
    twin.load_state_dict(before)
    twin.eval()

    def losses():
        said = twin(torch.from_numpy(rows.inputs))
        wanted = torch.from_numpy(rows.labels)
        return nn.functional.cross_entropy(said, wanted, reduction="none").detach().numpy()

    here = losses()
    nn.functional.cross_entropy(twin(new), known).backward()
    with torch.no_grad():
        for weight in twin.parameters():
            weight -= 0.1 * weight.grad
    np.testing.assert_allclose(found, losses() - here, atol=1e-6)


def test_mir_with_one_remembered_row_and_batch_norm():
    buffer = ReplayBuffer(30, draw="mir", seed=1)
    learner = student("er", Normed, replay=buffer)
    learner.observe(PARTS[0].inputs[:1], PARTS[0].labels[:1])
    learner.observe(PARTS[0].inputs[1:2], PARTS[0].labels[1:2])
    assert len(buffer) == 2


def test_herding_takes_rows_once_they_are_learned_and_hardest_the_losses():
    herd = student("er", buffer=12, policy="herding")
    herd.learn(PARTS[0])
    held = herd.replay.rows()
    assert len(held) == 12
    np.testing.assert_allclose(held.logits, herd.predict(held.inputs), atol=1e-5)
    hard = student("er", buffer=6, policy="hardest", training=recipe(epochs=1, batch_size=24))
    said = torch.from_numpy(hard.predict(PARTS[0].inputs))
    known = torch.from_numpy(PARTS[0].labels)
    losses = nn.functional.cross_entropy(said, known, reduction="none").numpy()
    hard.learn(PARTS[0])
    kept = {row.tobytes() for row in hard.replay.rows().inputs}
    assert kept == {PARTS[0].inputs[k].tobytes() for k in np.argsort(-losses)[:6]}


def test_max_uses_retires_rows():
    learner = student("er", replay=ReplayBuffer(100, max_uses=3, seed=1))
    for part in PARTS:
        learner.learn(part)
    assert learner.replay.stats().retired > 0
    assert learner.replay.rows().uses.max() < 3


def test_gdumb_trains_on_the_memory_alone():
    learner = student(objective("gdumb", epochs=9), buffer=12, policy="class-balanced")
    for part in PARTS:
        step = learner.learn(part)
        held = learner.replay.rows()
        assert len(held) == 12
        assert step.steps == 9 * 2, "epochs over the memory, 8 rows at a time"
        assert step.rows_trained == 9 * 12
        right = learner.predict(held.inputs).argmax(axis=1) == held.labels
        assert right.mean() > 0.6


def test_gdumb_forgets_what_is_no_longer_remembered():
    """Not one bit of earlier weights, averages or momentum goes on."""
    found = []
    for labels_first in ((0, 1), (1, 2)):
        buffer = ReplayBuffer(0, seed=1)
        training = recipe(average=0.9, momentum=0.9)
        learner = student(objective("gdumb", epochs=2), replay=buffer, training=training)
        learner.learn(gaussian(24, 5, labels=labels_first))
        found.append(learner.predict(TEST.inputs))
    np.testing.assert_array_equal(*found)


def test_gdumb_with_a_teacher_besides_is_still_made_anew():
    learner = student(objective("gdumb", epochs=2), teacher=models.MLP(INPUTS, 3, width=4))
    assert isinstance(learner.objective, Follow)
    before = learner.predict(TEST.inputs)
    learner.learn(PARTS[0])
    assert learner.last.steps == 2 * 3, "epochs over the memory"
    assert (learner.predict(TEST.inputs) != before).any()


# --- teachers ------------------------------------------------------------------------------------


def test_the_self_teacher_is_the_student_at_the_start_of_the_experience():
    learner = student("lwf", buffer=0)
    assert isinstance(learner.teacher, SelfTeacher)
    assert not learner.teacher.ready()
    learner.learn(PARTS[0])
    assert not learner.teacher.ready(), "nothing was known before the first experience"
    assert learner.last.terms["teacher"] == 0
    for part in PARTS[1:]:
        said = torch.from_numpy(learner.predict(TEST.inputs))
        learner.learn(part)
        taught = learner.teacher(torch.from_numpy(TEST.inputs))
        torch.testing.assert_close(taught, said, rtol=0, atol=1e-6)
        assert learner.last.terms["teacher"] > 0
    learner.observe(PARTS[0].inputs, PARTS[0].labels)
    torch.testing.assert_close(learner.teacher(torch.from_numpy(TEST.inputs)), taught)


def test_the_self_teacher_knows_the_classes_it_had():
    learner = student("lwf", buffer=0)
    learner.learn(PARTS[0])
    learner.learn((PARTS[1].inputs, PARTS[1].labels + 2))
    assert learner.teacher(torch.from_numpy(TEST.inputs)).shape == (60, 3)
    assert learner.classes == 5
    assert learner.last.terms["teacher"] > 0


def test_within_the_rounds_of_an_experience_the_self_teacher_stays():
    learner = student("lwf", buffer=0)
    learner.fit(PARTS[0], seed=1)
    learner.fit(PARTS[1], seed=2)
    taught = learner.teacher(torch.from_numpy(TEST.inputs))
    learner.fit(PARTS[1], seed=3)
    assert torch.equal(learner.teacher(torch.from_numpy(TEST.inputs)), taught)
    learner.fit(PARTS[2], seed=4)
    assert not torch.equal(learner.teacher(torch.from_numpy(TEST.inputs)), taught)


def test_the_average_follows_each_step():
    learner = student(teacher=EmaTeacher(0.5), training=recipe(epochs=1, batch_size=12))
    average = [w.detach().clone() for w in learner.module.parameters()]
    trail = []
    follow = learner._follow

    def noted():
        follow()
        trail.append([w.detach().clone() for w in learner.module.parameters()])

    learner._follow = noted
    learner.learn(PARTS[0])
    assert len(trail) == 2
    for number, weights in enumerate(trail):
        decay = min(0.5, (1 + number) / (10 + number))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for found, wanted in zip(learner.teacher.module.parameters(), average, strict=True):
        torch.testing.assert_close(found.detach(), wanted)


def test_the_average_follows_a_phase_of_distillation_too():
    learner = student(teacher=EmaTeacher(0.0), training=recipe(distil="phase"))
    learner.absorb(PUBLIC, probabilities(20, 3).astype(np.float32), seed=1)
    said = learner.teacher(torch.from_numpy(TEST.inputs)).numpy()
    np.testing.assert_allclose(said, learner.predict(TEST.inputs), atol=1e-6)


def test_a_foreign_teacher_is_followed_and_an_own_one_is_the_objectives():
    foreign = models.MLP(INPUTS, 2, width=4)
    learner = student("er", teacher=foreign, teacher_weight=0.3)
    assert isinstance(learner.objective, Follow)
    assert learner.objective.weight == 0.3
    learner.learn(PARTS[0])
    assert set(learner.last.terms) == {"new", "old", "teacher"}
    assert learner.last.terms["teacher"] > 0
    assert isinstance(student("lwf", teacher=EmaTeacher()).objective, Lwf)
    assert isinstance(student("er").objective, Er)
    assert student("er").teacher is None


def test_an_objective_of_ones_own_gets_a_draw_as_large_as_the_batch():
    sizes = []

    def cautious(step):
        (old,) = step.old
        sizes.append((len(step.new), len(old)))
        return {"new": labels(step.new), "old": 2 * labels(old)}

    learner = IncrementalDistiller(
        MLP, cautious, replay=ReplayBuffer(50), training=recipe(), teacher=EmaTeacher()
    )
    learner.learn(PARTS[0])
    assert sizes[0] == (8, 0)
    assert sizes[-1] == (8, 8)
    assert set(learner.last.terms) == {"new", "old", "teacher"}


# --- rows that cannot be -------------------------------------------------------------------------

BAD = {
    "nan": (lambda x, y: (np.where(np.arange(24)[:, None] == 7, np.nan, x), y), "row 7 is not"),
    "infinity": (lambda x, y: (np.where(np.arange(24)[:, None] == 3, np.inf, x), y), "row 3"),
    "label": (lambda x, y: (x, np.where(np.arange(24) == 5, -2, y)), "row 5 has another"),
    "absurd": (lambda x, y: (x, y + 1_000_000), "expected labels below 100000"),
    "shape": (lambda x, y: (x[:, :3], y), r"expected inputs of shape \[4\] a row as before"),
    "halves": (lambda x, y: (x, y + 0.5), "labels must be whole numbers"),
    "lengths": (lambda x, y: (x, y[:-1]), "equal length"),
    "columns": (lambda x, y: (x, np.stack([y, y], 1)), "one label for each row"),
    "ragged": (lambda x, y: ([[1.0, 2.0, 3.0, 4.0], [1.0]], y[:2]), "rows of one shape"),
    "texts": (lambda x, y: ([["a"] * 4] * 24, y), "rows of one shape"),
    "names": (lambda x, y: (x, ["cat"] * 24), "labels must be whole numbers"),
    "a number": (lambda x, y: (3.0, y), "rows of one shape"),
}


@pytest.mark.parametrize("method", ["learn", "observe"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_refused_and_nothing_has_changed(kind, method):
    learner = student("der", teacher=EmaTeacher(), drift=Adwin())
    learner.learn(PARTS[0])
    before = content(learner)
    change, told = BAD[kind]
    bad = change(PARTS[1].inputs, PARTS[1].labels)
    with pytest.raises(DataError, match=told):
        learner.learn(bad) if method == "learn" else learner.observe(*bad)
    assert content(learner) == before
    learner.learn(PARTS[1])


def test_bad_rows_in_a_federation_leave_the_experience_to_come():
    learner = student(buffer=100)
    learner.fit(PARTS[0], seed=1)
    before = content(learner)
    bad = PARTS[1].inputs.copy()
    bad[2] = np.nan
    with pytest.raises(DataError, match="row 2"):
        learner.fit(Rows(bad, PARTS[1].labels), seed=2)
    assert content(learner) == before
    learner.fit(PARTS[0], seed=3)
    assert learner.replay.seen == 24


def test_rows_that_the_model_cannot_take_do_not_spoil_it():
    learner = student()
    before = content(learner)
    with pytest.raises(DataError, match=r"MLP cannot take rows of shape \[7\]"):
        learner.learn((np.ones((3, 7)), [0, 1, 2]))
    assert content(learner) == before
    learner.learn(PARTS[0])


@pytest.mark.parametrize("bad", [np.ones((24, 4)), 7, None, (1, 2, 3)])
def test_something_else_is_no_experience(bad):
    with pytest.raises(DataError, match="expected an Experience, Rows, or inputs and labels"):
        student().learn(bad)


def test_subjects_must_fit():
    with pytest.raises(DataError, match="one subject or one for each of 24 rows"):
        student().observe(PARTS[0].inputs, PARTS[0].labels, subject=["a", "b"])


def test_an_empty_experience_changes_nothing():
    learner = student("der", drift=Adwin())
    learner.learn(PARTS[0])
    before = content(learner)
    for empty in [(np.empty((0, INPUTS)), []), PARTS[0].take([]), (np.empty((0, INPUTS)), None)]:
        step = learner.learn(empty)
        assert (step.rows, step.steps, step.accuracy_before) == (0, 0, None)
    learner.observe(np.empty((0, INPUTS)))
    assert content(learner) == before
    assert student().learn((np.empty((0, INPUTS)), [])).rows == 0


@pytest.mark.parametrize("build", [MLP, Normed])
@pytest.mark.parametrize("what", ["er", "der++", "lwf", "a-gem", "steady"])
def test_a_batch_of_one_row(build, what):
    learner = student(what, build)
    for k in range(4):
        step = learner.observe(PARTS[0].inputs[k : k + 1], PARTS[0].labels[k : k + 1])
        assert step.steps == 1
    learner.learn(PARTS[1].take([0]))
    assert np.isfinite(learner.predict(TEST.inputs)).all()


@pytest.mark.parametrize("what", OBJECTIVES)
def test_rows_without_labels_are_met_too(what):
    learner = student(what)
    half = np.where(np.arange(24) % 2, PARTS[0].labels, -1)
    step = learner.learn((PARTS[0].inputs, half))
    assert np.isnan(step.correct).sum() == 12
    assert step.accuracy_before is not None
    step = learner.learn((PARTS[1].inputs, None))
    assert step.accuracy_before is None
    assert step.new_classes == ()
    assert np.isfinite(step.loss)
    assert np.isfinite(learner.predict(TEST.inputs)).all()
    assert learner.replay.seen == 48


def test_rows_without_labels_alone_move_no_weight():
    learner = student("er")
    before = learner.predict(TEST.inputs)
    learner.learn((PARTS[0].inputs, None))
    np.testing.assert_array_equal(learner.predict(TEST.inputs), before)


def test_mixtures_say_nothing_of_rows_without_labels():
    """Such a row is no row of class 0, however it is mixed."""
    learner = student("er", buffer=0, training=recipe(mixup=1.0))
    wanted = np.tile(np.float32([0, 0, 1]), (20, 1))
    learner.absorb(PUBLIC, wanted, seed=1)
    shown = []
    forward = soft_cross_entropy

    def tapped(logits, targets, weight, *args):
        shown.append(targets.clone())
        return forward(logits, targets, weight, *args)

    import fedistill.distill.objective_student as home

    home.soft_cross_entropy = tapped
    try:
        learner.learn((PARTS[0].inputs, None))
    finally:
        home.soft_cross_entropy = forward
    assert shown
    assert all((targets[:, :2] == 0).all() for targets in shown)


def test_a_loss_that_is_no_number_is_told():
    learner = student("er", buffer=0, training=recipe(lr=1e30, clip=0.0))
    with pytest.raises(RunError, match="lower lr"):
        learner.learn(PARTS[0])


# --- drift ---------------------------------------------------------------------------------------


def moved(rows, by=6.0):
    return Rows(rows.inputs + np.float32(by), rows.labels, subject=rows.subject)


def sure(count, seed):
    """Rows near their centres: nothing to be unsure of."""
    rows = gaussian(count, seed)
    return Rows(3 * CENTRES[rows.labels] + 0.1 * (rows.inputs - CENTRES[rows.labels]), rows.labels)


def garbled(rows):
    """Every row between the classes."""
    return Rows(np.full_like(rows.inputs, 0.01) * rows.inputs, rows.labels)


def test_a_shift_sets_off_an_alarm_that_leads_to_consolidation():
    learner = student("er", buffer=100, drift=Adwin(on="entropy"), training=recipe(epochs=5))
    for seed in range(3):
        step = learner.learn(sure(150, seed))
        assert step.drift is not DriftState.DRIFT
        assert not step.consolidated
        assert step.alarms == ()
    calls = []
    consolidate = learner.consolidate
    learner.consolidate = lambda **given: calls.append(given) or consolidate(**given)
    step = learner.learn(garbled(sure(150, 9)))
    assert step.drift is DriftState.DRIFT
    assert step.consolidated
    assert len(calls) == 1
    assert learner.alarmed
    assert all(450 <= row < 600 for row in step.alarms)
    assert learner.alarms == step.alarms
    assert not learner.learn(sure(20, 10)).consolidated or learner.alarmed


def test_what_a_student_learns_is_no_drift():
    """The first predictions are of random weights; that they get better is no shift."""
    learner = student("er", drift=Adwin(on="entropy"), training=recipe(epochs=20, lr=0.2))
    for seed in range(3):
        assert learner.learn(sure(150, seed)).drift is not DriftState.DRIFT


def test_without_a_memory_there_is_nothing_to_consolidate_from():
    class Always(Adwin):
        def update(self, values):
            super().update(values)
            self.alarms = (self.seen - len(values),)
            return DriftState.DRIFT

    learner = student("er", buffer=0, drift=Always())
    learner.learn(PARTS[0])
    step = learner.learn(PARTS[1])
    assert step.drift is DriftState.DRIFT
    assert step.alarms == (24,)
    assert not step.consolidated
    assert learner.alarmed
    learner.learn(PARTS[0].take([]))
    assert not learner.alarmed
    remembering = student("er", drift=Always())
    remembering.learn(PARTS[0])
    assert remembering.learn(PARTS[1]).consolidated
    remembering.fit(PARTS[2], seed=1)
    assert remembering.alarmed
    remembering.fit(PARTS[2].take([]), seed=2)
    assert not remembering.alarmed, "an alarm is told once"


@pytest.mark.parametrize("on", ["error", "loss"])
def test_detectors_of_labels_are_not_shown_rows_without_any(on):
    detector = PageHinkley(on=on)
    learner = student("er", drift=detector)
    learner.learn(PARTS[0])
    learner.learn((PARTS[1].inputs, None))
    assert detector.seen == 0
    learner.learn((PARTS[1].inputs, np.where(np.arange(24) < 5, PARTS[1].labels, -1)))
    assert detector.seen == 5


def test_alarms_are_told_in_rows_of_the_stream():
    learner = student("er", buffer=50, drift=Adwin(on="error", clock=1), training=recipe(epochs=8))
    learner.learn(sure(100, 1))
    learner.learn((sure(50, 2).inputs, None))
    learner.learn(sure(100, 3))
    wrong = sure(100, 4)
    half = np.where(np.arange(100) % 2, (wrong.labels + 1) % 3, -1)
    step = learner.learn((wrong.inputs, half))
    assert step.drift is DriftState.DRIFT
    assert step.alarms
    assert all(250 <= row < 350 for row in step.alarms)
    assert all((row - 250) % 2 for row in step.alarms), "rows with a label"


def test_mmd_goes_on_when_classes_come():
    learner = student("er", drift=Mmd(on="predictions", seed=1))
    learner.learn(PARTS[0])
    learner.learn((PARTS[1].inputs, PARTS[1].labels + 2))
    assert learner.learn((PARTS[2].inputs, PARTS[2].labels + 2)).rows == 24


def test_consolidation_learns_soft_targets_and_what_is_remembered():
    learner = student("er", training=recipe(distil_epochs=20))
    learner.learn(PARTS[0])
    wanted = np.tile(np.float32([0, 0, 1]), (20, 1))
    before = learner.predict(PUBLIC)[:, 2].mean()
    learner.consolidate(PUBLIC, wanted, epochs=2)
    assert learner.predict(PUBLIC)[:, 2].mean() > before + 0.5
    assert learner.replay.seen == 24, "nothing new came"
    assert learner.experiences == 1
    bare = student("er", buffer=0, training=recipe(distil_epochs=20))
    before = bare.predict(PUBLIC)[:, 2].mean()
    bare.consolidate(PUBLIC, wanted)
    assert bare.predict(PUBLIC)[:, 2].mean() > before + 0.5
    still = student("er", buffer=0)
    unchanged = content(still)
    still.consolidate()
    assert content(still) == unchanged


def test_soft_targets_over_fewer_or_more_classes():
    learner = student("er")
    learner.learn((PARTS[0].inputs, PARTS[0].labels + 3))
    assert learner.classes == 5
    learner.absorb(PUBLIC, probabilities(20, 1, classes=3), seed=1)
    learner.learn(PARTS[1])
    learner.consolidate(PUBLIC, probabilities(20, 1, classes=7))
    assert learner.classes == 7
    learner.learn((PARTS[0].inputs, PARTS[0].labels + 7))
    assert learner.predict(PUBLIC).shape == (20, 9)


# --- observe -------------------------------------------------------------------------------------


def test_observing_a_batch_is_learning_it_in_one_step():
    one, other = (student("er", training=recipe(epochs=1, batch_size=24)) for _ in range(2))
    one.learn(PARTS[0])
    other.observe(PARTS[0].inputs, PARTS[0].labels)
    # The order within a batch is drawn from another seed, so equal up to the order of a sum.
    np.testing.assert_allclose(one.predict(TEST.inputs), other.predict(TEST.inputs), atol=1e-5)
    assert (one.last.steps, other.last.steps) == (1, 1)
    assert one.last.accuracy_before == other.last.accuracy_before
    assert one.replay.seen == other.replay.seen == 24
    assert (one.experiences, other.experiences) == (1, 0)


def test_observing_takes_one_step_whatever_the_recipe():
    learner = student("er", training=recipe(epochs=5, batch_size=4, schedule="cosine"))
    learner.absorb(PUBLIC, probabilities(20, 3).astype(np.float32), seed=1)
    assert learner.observe(PARTS[0].inputs, PARTS[0].labels).steps == 1
    assert learner.observe(PARTS[0].inputs[:3]).steps == 1


def test_a_stream_of_batches_remembers_owners():
    learner = student("er")
    learner.observe(PARTS[0].inputs, PARTS[0].labels, subject="ann")
    learner.observe(PARTS[1].inputs, PARTS[1].labels, subject=np.arange(24))
    names = set(learner.replay.rows().subjects.tolist())
    assert "ann" in names
    assert names - {"ann"} <= {str(k) for k in range(24)}


# --- the same bytes ------------------------------------------------------------------------------

STUDENTS = {
    **{name: partial(student, name) for name in OBJECTIVES},
    "gdumb": partial(student, objective("gdumb", epochs=2)),
    "ema": partial(student, "er", teacher=EmaTeacher),
    "self": partial(student, "der", teacher=SelfTeacher),
    "herding": partial(student, "er", policy="herding", buffer=12),
    "hardest": partial(student, "er", policy="hardest", buffer=12),
    "mir": partial(student, "er", replay=lambda: ReplayBuffer(40, draw="mir", seed=1)),
    "max-uses": partial(student, "er", replay=lambda: ReplayBuffer(40, max_uses=4, seed=1)),
    "adwin": partial(student, "er", drift=partial(Adwin, on="entropy", clock=4)),
    "page-hinkley": partial(student, "er", drift=partial(PageHinkley, on="error")),
    "mmd": partial(student, "er", drift=partial(Mmd, seed=1)),
    "batch-norm": partial(student, "der++", Normed),
    "adam": partial(student, "er", training=recipe(optimizer="adam", average=0.9)),
    "momentum": partial(student, "der", training=recipe(momentum=0.9, mixup=0.5)),
    "familiar": partial(
        student, "cfed", background=PUBLIC, training=recipe(familiarity=True, average=0.9)
    ),
    "plain": partial(
        student,
        "lwf",
        lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)),
    ),
}


def made(name, **options):
    """A student with parts of its own."""
    part = STUDENTS[name]
    parts = ("teacher", "replay", "drift")
    own = {key: part.keywords[key]() for key in parts if key in part.keywords}
    return partial(part, **own)(**options)


STREAM = [
    PARTS[0],
    PARTS[1],
    Rows(PARTS[2].inputs, PARTS[2].labels + 2),
    Rows(PARTS[0].inputs + 1, PARTS[0].labels),
]


def go(learner, stream, start=0):
    for number, rows in enumerate(stream, start):
        if number % 2:
            learner.absorb(PUBLIC, probabilities(20, number).astype(np.float32), seed=number)
        learner.learn(rows)
        learner.observe(rows.inputs[:5] + 0.5, rows.labels[:5])
    return learner


@pytest.mark.parametrize("name", STUDENTS)
def test_a_stream_that_stopped_goes_on_to_the_same_bytes(name, tmp_path):
    whole = content(go(made(name), STREAM))
    first = go(made(name), STREAM[:3])
    first.save(tmp_path / "state")
    resumed = made(name)
    resumed.load(tmp_path / "state")
    assert content(resumed) == content(first)
    assert content(go(resumed, STREAM[3:], 3)) == whole
    assert content(go(made(name), STREAM)) == whole


@pytest.mark.parametrize("name", ["er", "der++", "lwf", "steady", "gdumb"])
def test_another_seed_gives_other_bytes(name):
    one, other = go(made(name), STREAM[:2]), go(made(name, seed=2), STREAM[:2])
    assert (one.predict(TEST.inputs) != other.predict(TEST.inputs)).any()


def test_saving_changes_nothing():
    quiet, noted = made("ema"), made("ema")
    targets = probabilities(20, 3).astype(np.float32)
    for learner in (quiet, noted):
        for number in range(2):
            learner.absorb(PUBLIC, targets, seed=number)
            if learner is noted:
                learner.state_dict()
        learner.learn(PARTS[0])
    assert content(quiet) == content(noted)


def test_the_state_is_a_copy():
    learner = student("er", teacher=EmaTeacher())
    learner.learn(PARTS[0])
    state = learner.state_dict()
    before = {name: np.asarray(value).tobytes() for name, value in state.items()}
    learner.learn(PARTS[1])
    assert {name: np.asarray(value).tobytes() for name, value in state.items()} == before


def test_a_state_from_before_classes_came_brings_them_back_out():
    learner = made("ema")
    learner.learn(PARTS[0])
    state, before = learner.state_dict(), content(learner)
    learner.learn((PARTS[1].inputs, PARTS[1].labels + 3))
    assert learner.classes == 6
    learner.load_state_dict(state)
    assert learner.classes == 3
    assert content(learner) == before
    twin = made("ema")
    twin.load_state_dict(state)
    learner.learn(PARTS[2])
    twin.learn(PARTS[2])
    assert content(learner) == content(twin)


def test_a_state_from_before_the_second_experience_takes_the_self_teacher_away():
    learner = student("lwf", buffer=0)
    learner.learn(PARTS[0])
    state = learner.state_dict()
    learner.learn(PARTS[1])
    learner.load_state_dict(state)
    assert not learner.teacher.ready()


FOREIGN = {
    "a wider model": lambda: student("er", partial(models.MLP, INPUTS, 3, width=9)),
    "another kind of model": lambda: student("er", Normed),
    "no memory": lambda: student("er", buffer=0),
    "another policy": lambda: student("er", policy="recent"),
    "a teacher": lambda: student("er", teacher=EmaTeacher()),
    "a detector": lambda: student("er", drift=Adwin()),
    "averaged": lambda: student("er", training=recipe(average=0.9)),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("classes", [3, 5])
def test_the_state_of_another_student_is_refused_and_changes_nothing(name, classes):
    other = FOREIGN[name]()
    other.learn((PARTS[0].inputs, PARTS[0].labels + classes - 3))
    learner = student("er")
    learner.learn(PARTS[1])
    before, width = content(learner), learner.classes
    with pytest.raises(CheckpointError, match="this state is of another student"):
        learner.load_state_dict(other.state_dict())
    assert content(learner) == before
    assert learner.classes == width
    foreign = content(other)
    with pytest.raises(CheckpointError, match="this state is of another student"):
        other.load_state_dict(learner.state_dict())
    assert content(other) == foreign


def test_a_detector_of_other_options_is_refused_and_changes_nothing():
    one, other = (student("er", drift=Adwin(delta=delta)) for delta in (0.002, 0.01))
    one.learn(PARTS[0])
    other.learn(PARTS[1])
    before = content(one)
    with pytest.raises(CheckpointError, match="expected the state of"):
        one.load_state_dict(other.state_dict())
    assert content(one) == before


def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path):
    learner = student("der", teacher=EmaTeacher(), drift=Adwin())
    go(learner, STREAM[:2])
    before = content(learner)
    for name in learner.state_dict():
        state = dict(learner.state_dict())
        if name.startswith(("optimizer", "memory", "replay.rows.", "replay.means")):
            continue
        del state[name]
        with pytest.raises(CheckpointError):
            learner.load_state_dict(state)
        assert content(learner) == before, name
    with pytest.raises(CheckpointError):
        learner.load_state_dict({"facts": np.frombuffer(b"{nonsense", dtype=np.uint8)})
    path = tmp_path / "state"
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged or not a fedistill state"):
        learner.load(path)
    assert content(learner) == before


def test_a_damaged_file_gives_way_to_the_one_before(tmp_path):
    learner = student()
    learner.learn(PARTS[0])
    learner.save(tmp_path / "state")
    before = content(learner)
    learner.learn(PARTS[1])
    learner.save(tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(whole[: len(whole) // 2])
    fresh = student()
    fresh.load(tmp_path / "state")
    assert content(fresh) == before


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_in_whatever_order_it_can_be_stopped_in_between(seed, tmp_path):
    """Actions at random, with classes that come; a twin is saved and loaded before each."""
    random = np.random.default_rng(seed)
    name = ["steady", "self", "mir", "herding", "momentum", "adwin"][seed]
    one, other = made(name), made(name)
    most = 3
    for number in range(7):
        other.save(tmp_path / "state")
        other = made(name)
        other.load(tmp_path / "state")
        assert content(one) == content(other)
        most += int(random.integers(0, 2))
        rows = gaussian(int(random.integers(1, 20)), int(random.integers(1000)))
        known = np.where(random.random(len(rows)) < 0.3, -1, random.integers(0, most, len(rows)))
        names = subjects(len(rows))
        told = Rows(rows.inputs, known, subject=names)
        targets = probabilities(20, number, classes=int(random.integers(2, most + 1)))
        action = int(random.integers(6))
        for learner in (one, other):
            match action:
                case 0 | 1:
                    learner.learn(told)
                case 2:
                    learner.observe(rows.inputs, known, subject=names)
                case 3:
                    learner.absorb(PUBLIC, targets.astype(np.float32), seed=number)
                case 4:
                    learner.consolidate(PUBLIC, targets.astype(np.float32))
                case 5:
                    learner.erase("p001")
                    learner.fit(told, seed=number)
    assert content(one) == content(other)


@pytest.mark.parametrize("what", ["der++", "steady", "cfed"])
@pytest.mark.parametrize(("policy", "draw"), [("herding", "uniform"), ("hardest", "mir")])
def test_images_with_all_that_can_be_asked_of_a_student(what, policy, draw):
    random = np.random.default_rng(1)
    images, public = (random.normal(size=(n, 1, 6, 6)).astype(np.float32) for n in (20, 12))
    known = random.integers(0, 3, 20)

    def fresh():
        return student(
            what,
            partial(models.CNN, 1, 3, width=4),
            replay=ReplayBuffer(15, policy, draw=draw, seed=1),
            training=recipe(epochs=1, batch_size=10, familiarity=True, average=0.9, mixup=0.5),
            background=public,
        )

    learner = fresh()
    learner.absorb(public, probabilities(12, 1).astype(np.float32), seed=1)
    learner.learn((images, known))
    learner.learn((images + 1, known + 1))
    learner.observe(images[:1], [4])
    learner.consolidate()
    assert learner.features(images[:2]).shape[0] == 2
    assert np.isfinite(learner.familiarity(images)).all()
    resumed = fresh()
    resumed.load_state_dict(learner.state_dict())
    learner.learn((images, known))
    resumed.learn((images, known))
    assert content(learner) == content(resumed)


# --- erasure -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced", "herding", "hardest"])
def test_nothing_of_an_erased_person_is_left(policy, tmp_path):
    canary = np.float32(1234.5678)
    rows = PARTS[0]
    inputs = rows.inputs.copy()
    names = subjects(24)
    mine = np.array([3, 11, 17])
    inputs[mine] = np.float32([1.75, 0.0625, 1.5, 0.3333])
    inputs[mine, 3] = canary / 1000 + mine.astype(np.float32) / 7
    names[mine] = "victim-9731"
    spoiled = Rows(inputs, rows.labels, subject=names)
    learner = student("der++", policy=policy, drift=Adwin(), training=recipe(epochs=1))
    path = tmp_path / "state"
    learner.learn(PARTS[1])
    learner.learn(spoiled)
    learner.save(path)
    learner.learn(spoiled)
    learner.save(path)
    held = learner.replay.rows()
    chosen = np.flatnonzero(held.subjects == "victim-9731")
    needles = {"subject": "victim-9731".encode("utf-32-le"), "name": b"victim-9731"}
    for place in chosen:
        needles[f"inputs {place}"] = held.inputs[place].tobytes()
        needles[f"logits {place}"] = held.logits[place].tobytes()

    def found():
        state = learner.state_dict()
        live = b"\0".join(np.asarray(value).tobytes() for value in state.values())
        files = [one.read_bytes() for one in (path, path.with_name("state.previous"))]
        return {name for name, text in needles.items() for one in [live, *files] if text in one}

    if len(chosen):
        assert {name for name in needles if name != "name"} <= found()
    receipt = learner.erase("victim-9731", path)
    assert receipt.rows == len(chosen)
    assert found() == set()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["state", "state.previous"]
    learner.learn(spoiled)
    assert "victim-9731" not in learner.replay.rows().subjects
    fresh = student("der++", policy=policy, drift=Adwin(), training=recipe(epochs=1))
    fresh.load(path)
    fresh.learn(spoiled)
    assert "victim-9731" not in fresh.replay.rows().subjects


def test_a_state_from_before_the_erasure_brings_nobody_back():
    learner = student()
    learner.observe(PARTS[0].inputs, PARTS[0].labels, subject=subjects(24))
    old = learner.state_dict()
    learner.erase("p003")
    learner.load_state_dict(old)
    assert "p003" not in learner.replay.rows().subjects


def test_without_a_memory_there_is_nothing_to_erase():
    with pytest.raises(FedistillError, match="remembers no rows"):
        student(buffer=0).erase("ann")


# --- as in the design ----------------------------------------------------------------------------


def test_the_example_of_the_design():
    stream = [(PARTS[0].inputs, PARTS[0].labels), Experience(PARTS[1])]
    distiller = fd.IncrementalDistiller(
        build=partial(fd.models.MLP, INPUTS, 3),
        teacher=fd.EmaTeacher(decay=0.99),
        replay=fd.ReplayBuffer(capacity=500, policy="reservoir"),
        drift=fd.Adwin(on="entropy"),
    )
    for experience in stream:
        step = distiller.learn(experience)
        assert 0 <= step.accuracy_before <= 1
        assert step.drift in DriftState
    assert distiller.predict(TEST.inputs).shape == (60, 3)


def test_a_ready_module_is_no_factory():
    with pytest.raises(FedistillError, match="build must be a factory"):
        IncrementalDistiller(models.MLP(INPUTS, 3))


def test_a_student_is_a_learner():
    from fedistill.testing import check_learner

    check_learner(lambda: student(DerPlus(rows=6), classes=3))


def test_out_of_memory_is_told():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(INPUTS, 3)

        def forward(self, inputs):
            if self.training:
                raise torch.OutOfMemoryError("out of memory")
            return self.head(inputs)

    with pytest.raises(RunError, match="lower batch_size or replay rows"):
        student("er", Greedy).learn(PARTS[0])


@pytest.mark.parametrize(("then", "kept"), [("forget", False), ("nothing", True)])
def test_after_an_alarm_a_memory_may_be_let_go(then, kept):
    """Labels that change their meaning set the detector off; old rows would teach the old one."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(1200, 2)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(np.int64)
    student = fd.IncrementalDistiller(
        partial(fd.models.MLP, 2, 2),
        replay=fd.ReplayBuffer(50),
        drift=fd.Adwin(on="error"),
        on_drift=then,
    )
    student.learn((inputs[:400], labels[:400]))
    student.learn((inputs[400:800], labels[400:800]))
    assert not student.alarmed
    before = set(student.replay.rows().numbers.tolist())
    step = student.learn((inputs[800:], 1 - labels[800:]))
    assert student.alarmed
    assert not step.consolidated
    after = set(student.replay.rows().numbers.tolist())
    assert bool(before & after) is kept


def test_what_follows_an_alarm_is_a_known_word():
    with pytest.raises(fd.FedistillError, match='found "sleep"'):
        fd.IncrementalDistiller(partial(fd.models.MLP, 2, 2), on_drift="sleep")
