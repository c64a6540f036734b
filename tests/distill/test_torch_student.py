"""A torch module as a learner."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import INPUTS, gaussian, probabilities
from torch import nn

from fedistill import models
from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.byhand import program_of
from fedistill.distill.recipe import Recipe
from fedistill.distill.resident import Resident
from fedistill.distill.torch_student import TorchStudent
from fedistill.testing import check_learner
from fedistill.types import Rows

MLP = partial(models.MLP, INPUTS, 3, width=8)
ROWS = gaussian(30, 1)
PUBLIC = gaussian(24, 2).inputs
TARGETS = probabilities(24, 3).astype(np.float32)


def student(build=MLP, seed=1, background=None, **recipe):
    return TorchStudent(
        build, Recipe(**({"batch_size": 8} | recipe)), classes=3, seed=seed, background=background
    )


def weights(learner):
    return np.concatenate([p.detach().numpy().ravel() for p in learner.module.parameters()])


def taught(learner, rounds=range(1, 2)):
    for number in rounds:
        learner.absorb(PUBLIC, TARGETS, seed=100 + number)
        learner.fit(ROWS, seed=200 + number)
    return learner


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, inputs):
        return self.head(self.drop(inputs))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(INPUTS)
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, inputs):
        return self.head(self.norm(inputs))


class Greedy(nn.Module):
    """A module that runs out of memory on more than ``limit`` rows in training."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.largest = limit, 0
        self.body = models.MLP(INPUTS, 3, width=8)

    def forward(self, inputs):
        if self.training and len(inputs) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        self.largest = max(self.largest, len(inputs) if self.training else 0)
        return self.body(inputs)


# --- protocol ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [MLP, Dropping, Normed, partial(models.Linear, INPUTS, 3)])
def test_torch_modules_keep_the_promises_of_a_learner(build):
    check_learner(build)


def test_images_keep_the_promises_of_a_learner():
    check_learner(partial(models.CNN, 1, 3, width=4), shape=(1, 6, 6))


# --- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("familiarity", [False, True])
def test_building_training_and_predicting_leave_the_global_generators_alone(familiarity):
    torch.manual_seed(11)
    np.random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    learner = student(Dropping, mixup=1.0, familiarity=familiarity, background=PUBLIC)
    taught(learner).predict(PUBLIC)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_the_global_seed_does_not_change_a_student():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(weights(taught(student(Dropping))))
    np.testing.assert_array_equal(*found)


def test_equal_seeds_equal_weights_and_other_seeds_others():
    np.testing.assert_array_equal(weights(student(seed=1)), weights(student(seed=1)))
    assert (weights(student(seed=1)) != weights(student(seed=2))).any()
    a, b = student(), student()
    a.fit(ROWS, seed=1)
    b.fit(ROWS, seed=2)
    assert (weights(a) != weights(b)).any()


def test_prediction_is_deterministic_with_dropout():
    learner = taught(student(Dropping))
    np.testing.assert_array_equal(learner.predict(PUBLIC), learner.predict(PUBLIC))


def test_dropout_is_on_while_training():
    def first_step(build):
        learner = student(build, epochs=1, batch_size=30)
        learner.fit(ROWS, seed=1)
        return weights(learner)

    class Still(Dropping):
        def __init__(self):
            super().__init__()
            self.drop = nn.Identity()

    assert (first_step(Dropping) != first_step(Still)).any()


# --- learning ------------------------------------------------------------------------------------


def accuracy(learner, rows):
    return (learner.predict(rows.inputs).argmax(1) == rows.labels).mean()


def test_fit_learns_the_labels():
    learner = student(epochs=30)
    learner.fit(gaussian(120, 4), seed=1)
    assert accuracy(learner, gaussian(200, 5)) > 0.85


@pytest.mark.parametrize(("distil", "loss"), [("inside", "kl"), ("phase", "kl"), ("phase", "mae")])
def test_soft_targets_teach_a_class_without_own_rows(distil, loss):
    learner = student(distil=distil, loss=loss, distil_epochs=20, epochs=2)
    own, public = gaussian(30, 6, labels=[0, 1]), gaussian(90, 7)
    sharp = 0.9 * np.eye(3, dtype=np.float32)[public.labels] + np.float32(0.1 / 3)
    for number in range(3):
        learner.absorb(public.inputs, sharp, seed=10 + number)
        learner.fit(own, seed=20 + number)
    if distil == "phase":
        learner.absorb(public.inputs, sharp, seed=30)
    test = gaussian(200, 8)
    third = test.take(np.flatnonzero(test.labels == 2))
    assert accuracy(learner, third) > 0.8


def test_never_means_that_targets_change_nothing():
    alone = student(distil="never")
    alone.fit(ROWS, seed=201)
    np.testing.assert_array_equal(weights(taught(student(distil="never"))), weights(alone))


def test_without_own_rows_the_targets_are_learned_alone():
    learner = student(distil="inside", distil_epochs=10)
    before = learner.predict(PUBLIC)
    learner.absorb(PUBLIC, TARGETS, seed=1)
    learner.fit(ROWS.take([]), seed=2)
    from fedistill.aggregate.rules import softmax

    def gap(logits):
        return np.abs(softmax(logits) - TARGETS).mean()

    assert gap(learner.predict(PUBLIC)) < gap(before)


@pytest.mark.parametrize("seed", [1, 2])
def test_targets_of_weight_zero_have_no_influence(seed):
    half = np.repeat([1.0, 0.0], 12)
    found = []
    for poison in (0.0, 50.0):
        learner = student()
        inputs = PUBLIC.copy()
        inputs[12:] += np.float32(poison)
        learner.absorb(inputs, TARGETS, seed=seed, weights=half)
        learner.fit(ROWS, seed=seed)
        found.append(weights(learner))
    np.testing.assert_array_equal(*found)


def test_calibration_takes_the_class_mix_out_of_the_logits():
    """On rows that say nothing a plain model learns the mix, a calibrated one does not."""
    blank = Rows(np.zeros((90, INPUTS), np.float32), np.repeat([0, 1, 2], [60, 20, 10]))
    logits = {}
    for calibrate in (False, True):
        learner = student(
            partial(models.Linear, INPUTS, 3), calibrate=calibrate, epochs=60, lr=0.5, batch_size=90
        )
        learner.fit(blank, seed=1)
        logits[calibrate] = learner.predict(blank.inputs[:1])[0]
    shares = np.log([60 / 90, 20 / 90, 10 / 90])
    plain = logits[False] - logits[False].mean()
    np.testing.assert_allclose(plain, shares - shares.mean(), atol=0.05)
    even = logits[True] - logits[True].mean()
    np.testing.assert_allclose(even, 0, atol=0.05)


def test_a_cosine_rate_falls_and_starts_anew_with_each_call(monkeypatch):
    learner = student(schedule="cosine", batch_size=10, epochs=4)
    rates = []
    step = Resident.step
    monkeypatch.setattr(
        Resident, "step", lambda self, rate, clip: (rates.append(rate), step(self, rate, clip))
    )
    for seed in (1, 2):
        learner.fit(ROWS, seed=seed)
    assert rates[:12] == rates[12:]
    assert rates[0] == pytest.approx(0.1)
    assert rates[:12] == sorted(rates[:12], reverse=True)
    assert rates[11] < 0.1 * 0.02


def test_gradients_are_clipped():
    far = Rows(1e4 * ROWS.inputs, ROWS.labels)
    learner = student(partial(models.Linear, INPUTS, 3), clip=0.5, lr=1.0, epochs=1, batch_size=30)
    before = weights(learner)
    learner.fit(far, seed=1)
    assert np.linalg.norm(weights(learner) - before) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimizer_learns(optimizer):
    learner = student(optimizer=optimizer, lr=0.05, epochs=10)
    learner.fit(gaussian(90, 4), seed=1)
    assert accuracy(learner, gaussian(100, 5)) > 0.7


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weight_decay_shrinks_matrices_and_leaves_vectors(optimizer):
    blank = Rows(np.zeros((8, INPUTS), np.float32), np.zeros(8, np.int64))
    norms = {}
    for decay in (0.0, 0.5):
        learner = student(
            partial(models.Linear, INPUTS, 3),
            optimizer=optimizer,
            epochs=5,
            weight_decay=decay,
            lr=0.01,
        )
        learner.fit(blank, seed=1)
        head = learner.module.head
        norms[decay] = float(head.weight.detach().norm()), head.bias.detach().numpy().copy()
    assert norms[0.5][0] < 0.999 * norms[0.0][0]
    np.testing.assert_array_equal(norms[0.5][1], norms[0.0][1])


# --- batch statistics ----------------------------------------------------------------------------


def test_one_row_trains_a_module_with_batch_statistics():
    learner = student(Normed)
    before = weights(learner)
    learner.fit(gaussian(1, 1), seed=1)
    assert (weights(learner) != before).any()
    assert np.isfinite(learner.predict(PUBLIC)).all()


def test_batch_statistics_are_learned_when_there_are_rows():
    learner = student(Normed)
    before = learner.module.norm.running_mean.clone()
    learner.fit(ROWS, seed=1)
    assert not torch.equal(learner.module.norm.running_mean, before)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 9])
def test_out_of_memory_trains_to_the_same_weights_in_parts(limit):
    free, tight = (
        taught(student(partial(Greedy, most), background=PUBLIC, familiarity=True, mixup=1.0))
        for most in (10_000, limit)
    )
    np.testing.assert_allclose(weights(tight), weights(free), rtol=0, atol=1e-5)
    assert tight.module.largest <= limit < free.module.largest


def test_out_of_memory_on_a_single_row_is_told():
    with pytest.raises(torch.OutOfMemoryError):
        student(partial(Greedy, 0)).fit(ROWS, seed=1)


# --- familiarity ---------------------------------------------------------------------------------


def test_familiarity_ranks_rows_by_a_known_density_ratio():
    """Own rows from N(1, 1), proxy rows from N(0, 1.5^2): the ratio is a known parabola."""
    random = np.random.default_rng(0)
    own = random.normal(1, 1, (600, 1)).astype(np.float32)
    public = random.normal(0, 1.5, (600, 1)).astype(np.float32)
    rows = Rows(own, (own[:, 0] > 1).astype(np.int64))
    learner = TorchStudent(
        partial(models.MLP, 1, 2, width=32),
        Recipe(familiarity=True, epochs=60, batch_size=60),
        classes=2,
        seed=1,
        background=public,
    )
    learner.fit(rows, seed=1)
    grid = np.linspace(-2.5, 3.5, 61, dtype=np.float32)[:, None]
    x = grid[:, 0].astype(float)
    truth = -((x - 1) ** 2) / 2 + x**2 / (2 * 1.5**2) + np.log(1.5)
    found = learner.familiarity(grid)
    ranks = [np.argsort(np.argsort(values)) for values in (truth, found)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9
    assert np.abs(found - truth)[10:50].mean() < 0.4


def test_familiarity_stays_within_its_limit():
    learner = student(background=PUBLIC + 100, familiarity=True, epochs=30)
    learner.fit(ROWS, seed=1)
    found = learner.familiarity(np.concatenate([1e4 * PUBLIC, -1e4 * PUBLIC]))
    assert np.abs(found).max() == FAMILIARITY_LIMIT


def test_without_familiarity_every_row_is_equally_familiar():
    learner = student()
    learner.fit(ROWS, seed=1)
    assert learner.familiarity(PUBLIC).tolist() == [0.0] * len(PUBLIC)


def test_familiarity_works_for_a_module_without_a_linear_layer():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(INPUTS, 3))

        def forward(self, inputs):
            return inputs @ self.weight

    learner = student(Bare, background=PUBLIC, familiarity=True)
    learner.fit(ROWS, seed=1)
    assert learner.familiarity(PUBLIC).shape == (len(PUBLIC),)
    assert learner.familiarity(PUBLIC).any()


# --- averaging and state -------------------------------------------------------------------------


def test_averaged_weights_predict_and_the_last_ones_train_on():
    plain, averaged = taught(student()), taught(student(average=0.9))
    np.testing.assert_array_equal(weights(plain), weights(averaged))
    assert (plain.predict(PUBLIC) != averaged.predict(PUBLIC)).any()


def test_the_average_follows_its_formula(monkeypatch):
    learner = student(partial(models.Linear, INPUTS, 3), average=0.5, epochs=1, batch_size=10)
    mean, trail = weights(learner).astype(float), []
    follow = Resident.follow

    def followed(self, keep):
        trail.append(weights(learner).astype(float))
        follow(self, keep)

    monkeypatch.setattr(Resident, "follow", followed)
    learner.fit(ROWS, seed=1)
    assert len(trail) == 3
    for number, now in enumerate(trail, start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        mean = decay * mean + (1 - decay) * now
    found = np.concatenate([value.numpy().ravel() for value in learner._averaged])
    np.testing.assert_allclose(found, mean, atol=1e-6)


def test_before_the_first_step_the_average_is_the_start():
    np.testing.assert_array_equal(student(average=0.9).predict(PUBLIC), student().predict(PUBLIC))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_interrupted_after_k_rounds_equals_uninterrupted(optimizer):
    options = {
        "optimizer": optimizer,
        "average": 0.9,
        "mixup": 1.0,
        "familiarity": True,
        "momentum": 0.9 if optimizer == "sgd" else 0.0,
        "background": PUBLIC,
        "lr": 0.02,
    }
    whole = taught(student(**options), range(1, 5))
    first = taught(student(**options), range(1, 3))
    state = {name: value.copy() for name, value in first.state_dict().items()}
    assert any(name.startswith("optimizer.") for name in state)
    second = student(**options, seed=99)
    second.load_state_dict(state, ROWS)
    taught(second, range(3, 5))
    np.testing.assert_array_equal(weights(second), weights(whole))
    ends = whole.state_dict(), second.state_dict()
    assert set(ends[0]) == set(ends[1])
    for name, value in ends[0].items():
        np.testing.assert_array_equal(ends[1][name], value, err_msg=name)
    np.testing.assert_array_equal(second.predict(PUBLIC), whole.predict(PUBLIC))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_restoring_forgets_what_the_learner_did_before(optimizer):
    options = {"optimizer": optimizer, "momentum": 0.9, "average": 0.9, "lr": 0.02}
    fresh, used = student(**options), taught(student(**options))
    used.load_state_dict(fresh.state_dict(), ROWS)
    np.testing.assert_array_equal(weights(taught(used)), weights(taught(fresh)))


def test_a_state_does_not_change_when_its_owner_learns_on():
    learner = taught(student(average=0.9, momentum=0.9))
    state = learner.state_dict()
    kept = {name: value.copy() for name, value in state.items()}
    taught(learner, range(2, 3))
    for name, value in kept.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


class PerToken(torch.nn.Module):
    """A linear layer that sees parts of a row, not rows."""

    def __init__(self):
        super().__init__()
        self.token = torch.nn.Linear(2, 3)

    def forward(self, inputs):
        return self.token(inputs.reshape(len(inputs), -1, 2)).mean(dim=1)


def test_familiarity_falls_back_to_logits_where_the_last_layer_sees_no_whole_rows():
    inputs = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    labels = np.arange(40) % 3
    learner = TorchStudent(
        PerToken, Recipe(familiarity=True, batch_size=8), classes=3, seed=1, background=inputs[:20]
    )
    learner.fit(Rows(inputs, labels), seed=2)
    assert learner.familiarity(inputs).shape == (40,)
    assert np.isfinite(learner.predict(inputs)).all()


def test_no_epochs_means_no_step_on_own_rows():
    inputs = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    build = partial(models.Linear, 4, 3)
    learner = TorchStudent(build, Recipe(epochs=0, distil="inside"), classes=3, seed=1)
    before = learner.predict(inputs)
    learner.fit(Rows(inputs, np.arange(30) % 3), seed=2)
    np.testing.assert_array_equal(learner.predict(inputs), before)


@pytest.mark.parametrize(("distil", "temperature"), [("inside", 1.0), ("phase", 2.0)])
@pytest.mark.parametrize("familiarity", [False, True])
def test_a_lenet_is_taught_by_hand_to_rounding(monkeypatch, familiarity, distil, temperature):
    random = np.random.default_rng(0)
    images = random.normal(size=(40, 1, 28, 28)).astype(np.float32)
    rows, public = Rows(images[:25], random.integers(0, 3, 25)), images[25:]
    asked = []

    def by_hand(module, *beside, heard=None):
        made = program_of(module, *beside, heard=heard)
        asked.append(made is not None)
        return made

    found = []
    for hand in (by_hand, lambda *_, **__: None):
        monkeypatch.setattr("fedistill.distill.torch_student.program_of", hand)
        learner = student(
            partial(models.LeNet, 3),
            familiarity=familiarity,
            distil=distil,
            temperature=temperature,
            batch_size=10,
            momentum=0.9,
            background=public,
        )
        learner.absorb(public, probabilities(15, seed=1), seed=1)
        learner.fit(rows, seed=2)
        found.append((weights(learner), learner.predict(public), learner.familiarity(public)))
    assert asked
    assert all(asked)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert bool(np.abs(found[0][2]).max() > 0) == familiarity
