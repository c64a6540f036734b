"""A scikit-learn classifier as a learner."""

from __future__ import annotations

import numpy as np
import pytest
from builders import INPUTS, gaussian, probabilities
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from fedistill import models
from fedistill.aggregate.rules import softmax
from fedistill.distill.recipe import Recipe
from fedistill.distill.sklearn_student import PROXY_SHARE, SklearnStudent
from fedistill.testing import check_learner

KINDS = [models.logistic_regression, models.gradient_boosting, models.random_forest]
ROWS, PUBLIC = gaussian(40, 1), gaussian(30, 2)
TARGETS = probabilities(30, 3).astype(np.float32)


def student(build=models.logistic_regression, background=None, **recipe):
    return SklearnStudent(build, Recipe(**recipe), classes=3, background=background)


@pytest.mark.parametrize("build", KINDS)
def test_scikit_learn_keeps_the_promises_of_a_learner(build):
    check_learner(build)


def test_images_are_flattened():
    check_learner(models.logistic_regression, shape=(1, 3, 3))


class Spy:
    """A classifier that keeps what it is fitted on."""

    def fit(self, inputs, labels, sample_weight):
        self.inputs, self.labels, self.weights = inputs, labels, sample_weight
        self.classes_ = np.unique(labels)
        return self

    def predict_proba(self, inputs):
        return np.full((len(inputs), len(self.classes_)), 1 / len(self.classes_))


def test_weighted_rows_are_the_cross_entropy_to_the_soft_targets():
    learner = student(Spy)
    learner.absorb(PUBLIC.inputs, TARGETS, seed=1)
    learner.fit(ROWS, seed=2)
    spy = learner._model
    random = np.random.default_rng(0)
    coefficients = random.normal(size=(INPUTS, 3))
    logs = np.log(softmax(spy.inputs @ coefficients))
    found = -(spy.weights * logs[np.arange(len(spy.labels)), spy.labels]).sum()
    own = -np.log(softmax(ROWS.inputs @ coefficients))[np.arange(40), ROWS.labels].sum()
    soft = -(TARGETS * np.log(softmax(PUBLIC.inputs @ coefficients))).sum()
    assert found == pytest.approx(own + PROXY_SHARE * soft * 40 / 30, rel=2e-3)


@pytest.mark.parametrize("soft_weight", [0.5, 2.0])
def test_public_rows_weigh_soft_weight_times_the_own_rows(soft_weight):
    learner = student(Spy, soft_weight=soft_weight)
    learner.absorb(PUBLIC.inputs, TARGETS, seed=1)
    learner.fit(ROWS, seed=2)
    spy = learner._model
    assert (spy.weights[:40] == 1).all()
    assert spy.weights[40:].sum() == pytest.approx(PROXY_SHARE * soft_weight * 40, rel=5e-3)


def test_older_targets_weigh_less():
    learner = student(Spy)
    fade = np.repeat([1.0, 0.5], 15)
    learner.absorb(PUBLIC.inputs, np.full((30, 3), 1 / 3, np.float32), seed=1, weights=fade)
    learner.fit(ROWS, seed=2)
    soft = learner._model.weights[40:].reshape(30, 3).sum(axis=1)
    np.testing.assert_allclose(soft[:15], 2 * soft[15:])


@pytest.mark.parametrize("build", KINDS)
def test_a_class_without_own_rows_is_learned_from_soft_targets(build):
    own = gaussian(60, 4, labels=[0, 1])
    public = gaussian(150, 5)
    targets = 0.9 * np.eye(3, dtype=np.float32)[public.labels] + np.float32(0.1 / 3)
    learner = student(build)
    learner.absorb(public.inputs, targets, seed=1)
    learner.fit(own, seed=2)
    test = gaussian(200, 6, labels=[2])
    assert (learner.predict(test.inputs).argmax(axis=1) == 2).mean() > 0.75
    alone = student(build)
    alone.fit(own, seed=2)
    assert (alone.predict(test.inputs).argmax(axis=1) == 2).mean() == 0


def test_a_fresh_student_knows_nothing():
    probs = softmax(student().predict(PUBLIC.inputs))
    np.testing.assert_allclose(probs, 1 / 3, atol=1e-6)


def test_predictions_of_trees_have_no_zeros():
    learner = student(models.random_forest)
    learner.fit(gaussian(40, 1, labels=[0, 1]), seed=1)
    logits = learner.predict(PUBLIC.inputs)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(softmax(logits)[:, 2], 1e-6, rtol=0.01)


@pytest.mark.parametrize("build", KINDS)
def test_rows_of_a_single_class_are_learned(build):
    learner = student(build)
    learner.fit(gaussian(12, 1, labels=[1]), seed=1)
    probs = softmax(learner.predict(PUBLIC.inputs))
    assert (probs[:, 1] > 0.999).all()
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)


def test_without_own_rows_the_targets_alone_are_learned():
    learner = student()
    sharp = 0.98 * np.eye(3, dtype=np.float32)[PUBLIC.labels] + np.float32(0.02 / 3)
    learner.absorb(PUBLIC.inputs, sharp, seed=1)
    learner.fit(ROWS.take([]), seed=2)
    assert (learner.predict(PUBLIC.inputs).argmax(axis=1) == PUBLIC.labels).mean() > 0.8


def test_never_ignores_the_targets():
    told, alone = student(distil="never"), student(distil="never")
    told.absorb(PUBLIC.inputs, TARGETS, seed=1)
    for learner in (told, alone):
        learner.fit(ROWS, seed=2)
    np.testing.assert_array_equal(told.predict(PUBLIC.inputs), alone.predict(PUBLIC.inputs))


def test_familiarity_ranks_rows_by_a_known_density_ratio():
    random = np.random.default_rng(0)
    own = gaussian(200, 1)
    own.inputs[:, 3] = random.normal(1, 1, 200)
    public = own.inputs.copy()
    public[:, 3] = random.normal(-1, 1, 200)
    learner = student(background=public, familiarity=True)
    learner.fit(own, seed=1)
    grid = np.zeros((21, INPUTS), np.float32)
    grid[:, 3] = np.linspace(-2, 2, 21)
    found = learner.familiarity(grid)
    assert (np.diff(found) > 0).all()
    assert abs(found[10]) < 0.5, "both sides weigh alike, so the middle is even"


def test_familiarity_is_zero_when_it_is_not_asked_for_or_nothing_is_owned():
    plain = student(background=PUBLIC.inputs)
    plain.fit(ROWS, seed=1)
    assert not plain.familiarity(PUBLIC.inputs).any()
    empty = student(background=PUBLIC.inputs, familiarity=True)
    empty.fit(ROWS.take([]), seed=1)
    assert not empty.familiarity(PUBLIC.inputs).any()


def test_the_state_holds_no_own_row():
    learner = student(background=PUBLIC.inputs, familiarity=True)
    learner.absorb(PUBLIC.inputs, TARGETS, seed=1)
    learner.fit(ROWS, seed=2)
    private = {row.tobytes() for row in ROWS.inputs}
    for name, value in learner.state_dict().items():
        rows = value if value.ndim == 2 else value[:, None]
        assert not private & {np.asarray(row).tobytes() for row in rows}, name


def test_a_pipeline_gets_weights_at_its_last_step_and_its_randomness_is_seeded():
    def build():
        return make_pipeline(StandardScaler(), RandomForestClassifier(5))

    first, second = student(build), student(build)
    for learner in (first, second):
        learner.absorb(PUBLIC.inputs, TARGETS, seed=1)
        learner.fit(ROWS, seed=2)
    np.testing.assert_array_equal(first.predict(ROWS.inputs), second.predict(ROWS.inputs))
    other = student(build)
    other.absorb(PUBLIC.inputs, TARGETS[:, ::-1].copy(), seed=1)
    other.fit(ROWS, seed=2)
    assert np.abs(other.predict(PUBLIC.inputs) - first.predict(PUBLIC.inputs)).max() > 1e-3


def test_a_classifier_without_weights_learns_from_rows_drawn_by_weight():
    learner = student(lambda: KNeighborsClassifier(3))
    learner.absorb(PUBLIC.inputs, TARGETS, seed=1)
    learner.fit(ROWS, seed=2)
    again = student(lambda: KNeighborsClassifier(3))
    again.absorb(PUBLIC.inputs, TARGETS, seed=1)
    again.fit(ROWS, seed=2)
    np.testing.assert_array_equal(learner.predict(ROWS.inputs), again.predict(ROWS.inputs))
    assert (learner.predict(ROWS.inputs).argmax(1) == ROWS.labels).mean() > 0.5


class Counting:
    """Notes how many threads its libraries may use."""

    classes_ = np.arange(3)
    seen: list = []

    def fit(self, inputs, labels, sample_weight):
        self.seen.append({pool["num_threads"] for pool in threadpool_info()})
        return self

    def predict_proba(self, inputs):
        self.seen.append({pool["num_threads"] for pool in threadpool_info()})
        return np.full((len(inputs), 3), 1 / 3)


def test_it_takes_as_many_threads_as_torch_and_gives_them_back():
    Counting.seen = []
    with threadpool_limits(2), models.threads(1):
        outside = [pool["num_threads"] for pool in threadpool_info()]
        learner = student(Counting)
        learner.fit(ROWS, seed=1)
        learner.predict(PUBLIC.inputs)
        assert [pool["num_threads"] for pool in threadpool_info()] == outside
    assert Counting.seen == [{1}, {1}]
