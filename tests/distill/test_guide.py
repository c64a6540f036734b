"""Training by a table of other clients."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import INPUTS, gaussian
from torch import nn
from torch.nn import functional as F

from fedistill import losses, models
from fedistill.distill.guide import Guide, nearest_prototype
from fedistill.distill.learner import Guided
from fedistill.distill.recipe import Recipe
from fedistill.distill.sklearn_student import SklearnStudent
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import FedistillError

MLP = partial(models.MLP, INPUTS, 3, width=8)
ROWS = gaussian(30, 1)
PUBLIC = gaussian(12, 2).inputs
ALL = np.ones(3, dtype=bool)
RANDOM = np.random.default_rng(0)
TABLES = {
    "class-logits": RANDOM.normal(size=(3, 3)).astype(np.float32),
    "prototypes": RANDOM.normal(size=(3, 8)).astype(np.float32),
}


def kernel(rows, seed=3):
    values = np.random.default_rng(seed).normal(size=(rows, 5))
    values -= values.mean(axis=0)
    return (values @ values.T / np.linalg.norm(values @ values.T)).astype(np.float32)


def guide_of(kind, present=ALL):
    if kind == "kernel":
        held = np.full(len(PUBLIC), bool(present.any()))
        return Guide(kind, kernel(len(PUBLIC)), held, PUBLIC)
    return Guide(kind, np.where(present[:, None], TABLES[kind], np.nan), present)


KINDS = [*TABLES, "kernel"]


def student(build=MLP, seed=1, background=None, **recipe):
    return TorchStudent(
        build, Recipe(**({"batch_size": 8} | recipe)), classes=3, seed=seed, background=background
    )


def weights(learner):
    return np.concatenate([p.detach().numpy().ravel() for p in learner.module.parameters()])


def fitted(guide, rows=ROWS, seed=2, **options):
    learner = student(**options)
    learner.guide(guide)
    learner.fit(rows, seed=seed)
    return learner


def value(kind, learner):
    """The guide's part of the loss, over all rows, by the public losses."""
    labels = torch.from_numpy(ROWS.labels)
    if kind == "kernel":
        return losses.kernel_loss(
            torch.from_numpy(learner.features(PUBLIC)), torch.from_numpy(kernel(len(PUBLIC)))
        ).item()
    table = torch.from_numpy(TABLES[kind])
    if kind == "prototypes":
        features = torch.from_numpy(learner.features(ROWS.inputs))
        return losses.prototype_loss(features, labels, table, torch.from_numpy(ALL)).item()
    logits = torch.from_numpy(learner.predict(ROWS.inputs))
    return losses.logit_kl(logits, table[labels], temperature=1.0).item()


# --- the seam ------------------------------------------------------------------------------------


def test_who_can_be_guided():
    assert isinstance(student(), Guided)
    assert not isinstance(SklearnStudent(models.gradient_boosting, Recipe(), classes=3), Guided)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("logits", np.zeros((3, 3)), ALL), "a guide is one of"),
        (("prototypes", np.zeros(3), ALL), r"\[items, width\]"),
        (("prototypes", np.zeros((4, 3)), ALL), r"found \[4, 3\] and \[3\]"),
        (("prototypes", np.full((3, 3), np.inf), ALL), "must be finite"),
        (("kernel", np.zeros((3, 3)), ALL), "found .* 0 rows"),
        (("kernel", np.zeros((3, 3)), ALL, np.zeros((2, 4))), "found .* 2 rows"),
        (("kernel", np.zeros((3, 4)), ALL, np.zeros((3, 4))), r"\[rows, rows\]"),
    ],
)
def test_a_table_that_cannot_be_is_refused(arguments, told):
    with pytest.raises(FedistillError, match=told):
        Guide(*arguments)


@pytest.mark.parametrize("kind", ["class-logits", "prototypes"])
def test_a_table_of_other_classes_is_refused(kind):
    with pytest.raises(FedistillError, match="for 3 classes"):
        student().guide(Guide(kind, np.zeros((4, 4)), np.ones(4, dtype=bool)))


def test_prototypes_of_another_width_are_refused():
    guide = Guide("prototypes", np.zeros((3, 5), dtype=np.float32), ALL)
    with pytest.raises(FedistillError, match="one width"):
        fitted(guide)
    learner = student(predict="prototypes")
    learner.guide(guide)
    with pytest.raises(FedistillError, match="5 features, the model 8"):
        learner.predict(PUBLIC)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_draws_the_student_to_its_table(kind):
    """P6: a default that switches the method off would leave the student as it is."""
    options = {"epochs": 30, "batch_size": 30}
    alone, guided = fitted(None, **options), fitted(guide_of(kind), **options)
    assert (weights(alone) != weights(guided)).any()
    assert value(kind, guided) < 0.9 * value(kind, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_that_tells_or_weighs_nothing_changes_no_bit(kind):
    alone = weights(fitted(None))
    np.testing.assert_array_equal(weights(fitted(guide_of(kind, ~ALL))), alone)
    np.testing.assert_array_equal(weights(fitted(guide_of(kind), guide_weight=0.0)), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_can_be_taken_away(kind):
    learner = student()
    learner.guide(guide_of(kind))
    learner.guide(None)
    learner.fit(ROWS, seed=2)
    np.testing.assert_array_equal(weights(learner), weights(fitted(None)))


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_by_hand(kind):
    """A full batch, one epoch: the step goes down the sum of the two losses."""
    present = np.array([True, False, True])
    learner = student(epochs=1, batch_size=30, clip=0.0, guide_weight=0.7)
    module, guide = MLP(), guide_of(kind, present)
    module.load_state_dict(learner.module.state_dict())
    inputs, labels = torch.from_numpy(ROWS.inputs), torch.from_numpy(ROWS.labels)
    features = module.trunk(inputs)
    loss = F.cross_entropy(module.head(features), labels)
    if kind == "class-logits":
        told = labels != 1
        table = torch.from_numpy(TABLES[kind]).softmax(dim=1)[labels[told]]
        logs = module.head(features)[told].log_softmax(dim=1)
        extra = (table * (table.log() - logs)).sum(dim=1).mean()
    elif kind == "prototypes":
        told = labels != 1
        table = torch.from_numpy(TABLES[kind])[labels[told]]
        extra = (features[told] - table).square().mean()
    else:
        public = module.trunk(torch.from_numpy(PUBLIC))
        extra = losses.kernel_loss(public, torch.from_numpy(kernel(len(PUBLIC))))
    (loss + 0.7 * extra).backward()
    wanted = [(p - 0.1 * p.grad).detach().numpy().ravel() for p in module.parameters()]
    learner.guide(guide)
    learner.fit(ROWS, seed=2)
    np.testing.assert_allclose(weights(learner), np.concatenate(wanted), atol=1e-6)


@pytest.mark.parametrize("kind", ["class-logits", "prototypes"])
def test_an_absent_class_has_no_say(kind):
    """P20: what stands in the table of an absent class, and rows of that class, do not count."""
    present = np.array([True, False, True])
    first = fitted(guide_of(kind, present))
    loud = TABLES[kind].copy()
    loud[1] = 1e6
    second = fitted(Guide(kind, loud, present))
    np.testing.assert_array_equal(weights(first), weights(second))
    lone = gaussian(20, 5, labels=[1])
    np.testing.assert_array_equal(
        weights(fitted(guide_of(kind, present), lone)), weights(fitted(None, lone))
    )


class Greedy(nn.Module):
    """A module that runs out of memory on more than ``limit`` rows in training."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.body = MLP()

    def forward(self, inputs):
        if self.training and len(inputs) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.body(inputs)


@pytest.mark.parametrize("kind", ["class-logits", "prototypes"])
@pytest.mark.parametrize("familiarity", [False, True])
def test_out_of_memory_trains_to_the_same_weights_in_parts(kind, familiarity):
    guide = guide_of(kind, np.array([True, False, True]))
    free, tight = (
        fitted(
            guide,
            build=partial(Greedy, most),
            familiarity=familiarity,
            background=gaussian(9, 9).inputs,
        )
        for most in (10_000, 3)
    )
    np.testing.assert_allclose(weights(tight), weights(free), rtol=0, atol=1e-5)


def test_a_kernel_is_learned_on_some_rows_a_step():
    seen = []

    class Counting(models.MLP):
        def forward(self, inputs):
            if self.training:
                seen.append(inputs)
            return super().forward(inputs)

    fitted(guide_of("kernel"), build=partial(Counting, INPUTS, 3, width=8), epochs=1, batch_size=10)
    own, public = seen[0::2], seen[1::2]
    assert [len(rows) for rows in own] == [len(rows) for rows in public] == [10, 10, 10]
    known = {row.tobytes() for row in PUBLIC}
    drawn = [{row.tobytes() for row in rows.numpy()} for rows in public]
    assert all(len(rows) == 10 and rows <= known for rows in drawn)
    assert drawn[0] != drawn[1]


def test_a_kernel_of_one_row_says_nothing():
    one = Guide("kernel", np.ones((1, 1), np.float32), np.ones(1, dtype=bool), PUBLIC[:1])
    np.testing.assert_array_equal(weights(fitted(one)), weights(fitted(None)))


def test_a_kernel_trains_with_batches_of_one_row():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(INPUTS)
            self.head = nn.Linear(INPUTS, 3)

        def forward(self, inputs):
            return self.head(self.norm(inputs))

    assert np.isfinite(weights(fitted(guide_of("kernel"), build=Normed, batch_size=1))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_guides_go_with_everything_else(kind):
    background = gaussian(24, 7).inputs
    soft = np.random.default_rng(8).dirichlet(np.ones(3), 24).astype(np.float32)

    def taught():
        learner = student(
            background=background,
            familiarity=True,
            mixup=1.0,
            calibrate=True,
            average=0.9,
            temperature=2.0,
        )
        learner.absorb(background, soft, seed=4)
        learner.guide(guide_of(kind))
        learner.fit(ROWS, seed=5)
        return learner

    first, second = taught(), taught()
    np.testing.assert_array_equal(weights(first), weights(second))
    assert np.isfinite(first.predict(PUBLIC)).all()
    assert (first.familiarity(PUBLIC) != 0).any()


def test_without_own_rows_a_guide_does_nothing():
    learner = student()
    before = weights(learner)
    learner.guide(guide_of("prototypes"))
    learner.fit(ROWS.take([]), seed=1)
    np.testing.assert_array_equal(weights(learner), before)


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_student_goes_on_with_its_guide(kind):
    whole = fitted(guide_of(kind, np.array([True, False, True])))
    state = whole.state_dict()
    second = student(seed=99)
    second.load_state_dict({name: value.copy() for name, value in state.items()}, ROWS)
    for learner in (whole, second):
        learner.fit(ROWS, seed=3)
    np.testing.assert_array_equal(weights(second), weights(whole))
    assert set(second.state_dict()) == set(state)
    assert all(value.dtype.kind in "bifu" for value in state.values())


def test_a_state_without_a_guide_takes_it_away():
    learner, fresh = student(), student()
    learner.guide(guide_of("prototypes"))
    learner.load_state_dict(fresh.state_dict(), ROWS)
    assert set(learner.state_dict()) == set(fresh.state_dict())


# --- features and prediction ---------------------------------------------------------------------


def test_features_are_those_of_the_weights_that_predict():
    learner = fitted(None, average=0.9)
    features = learner.features(PUBLIC)
    assert features.shape == (len(PUBLIC), 8)
    with learner._predicting(), torch.no_grad():
        head = learner.module.head(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(head, learner.predict(PUBLIC), atol=1e-6)
    assert learner.features(PUBLIC[:0]).shape == (0, 8)
    many = np.tile(PUBLIC, (50, 1))
    np.testing.assert_allclose(learner.features(many), np.tile(features, (50, 1)), atol=1e-6)


def test_nearest_prototype_by_hand():
    values = np.array([[0.0, 0.0], [np.nan, np.nan], [3.0, 4.0]], dtype=np.float32)
    guide = Guide("prototypes", values, np.array([True, False, True]))
    found = nearest_prototype(np.array([[0.0, 1.0], [3.0, 3.0]], dtype=np.float32), guide)
    assert found[:, [0, 2]].tolist() == [[-1.0, -18.0], [-18.0, -1.0]]
    assert found.argmax(axis=1).tolist() == [0, 2]
    assert found.dtype == np.float32
    assert (found[:, 1] < -1e3).all()


@pytest.mark.parametrize("scale", [1e-3, 1e6, 1e25])
def test_absent_prototypes_are_finite_and_below_all_others_at_any_scale(scale):
    values = (scale * TABLES["prototypes"]).astype(np.float32)
    guide = Guide("prototypes", values, np.array([True, False, True]))
    found = nearest_prototype(-values, guide)
    assert np.isfinite(found).all()
    assert (found[:, 1] < found[:, [0, 2]].min(axis=1)).all()


def test_predicting_by_prototypes_falls_back_to_the_head():
    head, near = student(), student(predict="prototypes")
    np.testing.assert_array_equal(near.predict(PUBLIC), head.predict(PUBLIC))
    for guide in (guide_of("prototypes", ~ALL), guide_of("class-logits")):
        near.guide(guide)
        np.testing.assert_array_equal(near.predict(PUBLIC), head.predict(PUBLIC))
    near.guide(guide_of("prototypes"))
    wanted = nearest_prototype(near.features(PUBLIC), guide_of("prototypes"))
    np.testing.assert_array_equal(near.predict(PUBLIC), wanted)
    # A product of fewer rows may be summed in another order.
    np.testing.assert_allclose(near.predict(PUBLIC[3:5]), wanted[3:5], rtol=1e-5)
