"""Tables that clients exchange: described, combined, applied."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from builders import INPUTS, gaussian

from fedistill import exchange, models
from fedistill.distill.recipe import Recipe
from fedistill.distill.sklearn_student import SklearnStudent
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import FedistillError, Rejected
from fedistill.exchange import EXCHANGES, mean_by_size, means_of_others, plain_mean
from fedistill.types import Rows

MLP = partial(models.MLP, INPUTS, 3, width=8)
ROWS = gaussian(30, 1)
PUBLIC = gaussian(12, 2).inputs
NONE = [np.nan, np.nan]
# Three clients, three classes, two numbers each: all have class 0, one has class 1, nobody 2.
TABLES = np.array(
    [
        [[1.0, 2.0], NONE, NONE],
        [[3.0, 6.0], [5.0, 7.0], NONE],
        [[8.0, 1.0], NONE, NONE],
    ]
)
SIZES = np.array([1.0, 2.0, 5.0])


def student(build=MLP, seed=1, **recipe):
    return TorchStudent(build, Recipe(**({"batch_size": 8} | recipe)), classes=3, seed=seed)


def trees():
    return SklearnStudent(models.gradient_boosting, Recipe(), classes=3)


# --- combining -----------------------------------------------------------------------------------


def test_the_mean_of_those_who_answered_by_hand():
    """P20: a class held by one client works, a class that nobody holds is absent."""
    wanted = [[4.0, 3.0], [5.0, 7.0], NONE]
    np.testing.assert_array_equal(plain_mean(TABLES, SIZES), wanted)


def test_the_mean_by_size_by_hand():
    wanted = [[(1 + 6 + 40) / 8, (2 + 12 + 5) / 8], [5.0, 7.0], NONE]
    np.testing.assert_array_equal(mean_by_size(TABLES, SIZES), wanted)
    np.testing.assert_array_equal(mean_by_size(TABLES[:1], np.zeros(1)), np.full((3, 2), np.nan))


def test_each_gets_the_mean_of_the_others_by_hand():
    wanted = [
        [[5.5, 3.5], [5.0, 7.0], NONE],
        [[4.5, 1.5], NONE, NONE],  # nobody else has class 1
        [[2.0, 4.0], [5.0, 7.0], NONE],
    ]
    np.testing.assert_array_equal(means_of_others(TABLES), wanted)


def test_the_others_are_all_but_one():
    tables = np.random.default_rng(0).normal(size=(5, 4, 3))
    tables[0, 1] = tables[3, 2] = tables[:, 3] = np.nan
    found = means_of_others(tables)
    for client in range(5):
        rest = np.delete(tables, client, axis=0)
        np.testing.assert_allclose(found[client], plain_mean(rest, np.ones(4)), atol=1e-12)


def test_the_order_of_clients_does_not_matter_and_arguments_stay():
    before, order = TABLES.copy(), [2, 0, 1]
    np.testing.assert_array_equal(plain_mean(TABLES[order], SIZES), plain_mean(TABLES, SIZES))
    np.testing.assert_array_equal(means_of_others(TABLES[order]), means_of_others(TABLES)[order])
    np.testing.assert_array_equal(TABLES, before)


def test_one_client_alone():
    np.testing.assert_array_equal(plain_mean(TABLES[1:2], SIZES[1:2]), TABLES[1])
    assert np.isnan(means_of_others(TABLES[1:2])).all()


# --- describing ----------------------------------------------------------------------------------


def test_class_means_by_hand():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]], dtype=np.float32)
    found = exchange.class_means(values, np.array([2, 2, 0]), 3)
    np.testing.assert_array_equal(found, [[10.0, 20.0], NONE, [2.0, 3.0]])


def test_mean_logits_of_own_classes():
    learner, rows = student(), gaussian(20, 3, labels=[0, 2])
    table = EXCHANGES["class-logits"].describe(learner, rows, PUBLIC, 3)
    assert table.shape == (3, 3)
    assert np.isnan(table[1]).all()
    wanted = learner.predict(rows.inputs)[rows.labels == 2].mean(axis=0)
    np.testing.assert_allclose(table[2], wanted, atol=1e-6)


def test_any_learner_can_tell_its_mean_logits():
    learner = trees()
    learner.fit(ROWS, seed=1)
    assert np.isfinite(EXCHANGES["class-logits"].describe(learner, ROWS, PUBLIC, 3)).all()


def test_prototypes_are_mean_features():
    learner, rows = student(), gaussian(20, 3, labels=[0, 2])
    table = EXCHANGES["prototypes"].describe(learner, rows, PUBLIC, 3)
    assert table.shape == (3, 8)
    assert np.isnan(table[1]).all()
    wanted = learner.features(rows.inputs)[rows.labels == 0].mean(axis=0)
    np.testing.assert_allclose(table[0], wanted, atol=1e-6)


def test_a_kernel_is_centred_and_of_norm_one():
    learner = student()
    table = EXCHANGES["kernel"].describe(learner, ROWS, PUBLIC, 3)
    features = learner.features(PUBLIC).astype(np.float64)
    features -= features.mean(axis=0)
    gram = features @ features.T
    np.testing.assert_allclose(table, gram / np.linalg.norm(gram), atol=1e-9)
    assert np.linalg.norm(table) == pytest.approx(1)
    np.testing.assert_allclose(table.sum(axis=0), 0, atol=1e-9)


def test_equal_features_have_a_kernel_of_zeros():
    assert (exchange.unit_kernel(np.full((4, 3), 0.1, dtype=np.float32)) == 0).all()


@pytest.mark.parametrize(("name", "width"), [("class-logits", 3), ("prototypes", 8)])
def test_without_own_rows_there_is_nothing_to_tell(name, width):
    table = EXCHANGES[name].describe(student(), ROWS.take([]), PUBLIC, 3)
    assert table.shape == (3, width)
    assert np.isnan(table).all()


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_model_that_blew_up_is_no_absent_item(name):
    learner = student()
    exchange.set_weights(learner, np.full_like(exchange.flat_weights(learner), np.nan))
    with pytest.raises(Rejected, match="nonfinite"):
        EXCHANGES[name].describe(learner, ROWS, PUBLIC, 3)


# --- applying ------------------------------------------------------------------------------------


def test_weights_make_the_round_trip():
    first, second = student(seed=1, momentum=0.9), student(seed=2, momentum=0.9)
    first.fit(ROWS, seed=1)
    second.fit(ROWS, seed=2)
    entry = EXCHANGES["weights"]
    entry.apply(second, entry.describe(first, ROWS, PUBLIC, 3), PUBLIC)
    np.testing.assert_array_equal(second.predict(PUBLIC), first.predict(PUBLIC))
    assert not [name for name in second.state_dict() if name.startswith("optimizer.")]
    np.testing.assert_array_equal(entry.start(first)[0], exchange.flat_weights(second))


def test_weights_of_another_model_are_refused():
    other = exchange.flat_weights(student(partial(models.Linear, INPUTS, 3)))
    with pytest.raises(FedistillError, match="one architecture only"):
        EXCHANGES["weights"].apply(student(), other[None], PUBLIC)


@pytest.mark.parametrize("name", ["class-logits", "prototypes", "kernel"])
def test_a_table_guides_the_next_training(name):
    entry = EXCHANGES[name]
    assert entry.start is None
    tables = [entry.describe(student(seed=s), ROWS, PUBLIC, 3) for s in (5, 6)]
    table = entry.combine(np.array(tables), np.ones(2))
    alone, guided = student(), student()
    entry.apply(guided, table, PUBLIC)
    for learner in (alone, guided):
        learner.fit(ROWS, seed=1)
    assert (alone.predict(PUBLIC) != guided.predict(PUBLIC)).any()


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_empty_table_changes_nothing(name):
    entry, learner = EXCHANGES[name], student()
    table = entry.describe(learner, ROWS, PUBLIC, 3)
    entry.apply(learner, np.full_like(table, np.nan), PUBLIC)
    learner.fit(ROWS, seed=1)
    alone = student()
    alone.fit(ROWS, seed=1)
    np.testing.assert_array_equal(learner.predict(PUBLIC), alone.predict(PUBLIC))


# --- who can take part ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXCHANGES)
def test_what_cannot_be_guided_is_refused_with_what_to_do(name):
    entry = EXCHANGES[name]
    entry.check(student())
    with pytest.raises(FedistillError, match=f'"{name}" needs a .*found SklearnStudent: give'):
        entry.check(trees())
    with pytest.raises(FedistillError, match="found SklearnStudent"):
        entry.apply(trees(), np.zeros((12, 12)), PUBLIC)


def test_every_exchange_says_what_it_tells():
    for name, entry in EXCHANGES.items():
        assert entry.name == name
        assert entry.summary
        assert entry.tells
        table = entry.describe(student(), ROWS, PUBLIC, 3)
        items, width = entry.sides(3, len(PUBLIC))
        assert table.shape == (items, width or table.shape[1])


# --- whole methods, in a plain loop --------------------------------------------------------------


def loop(name, learners, owners, rounds, told=None):
    """Describe, combine, apply: what a federation does, on one page."""
    entry = EXCHANGES[name]
    for number in range(rounds):
        tables = []
        for k, (learner, rows) in enumerate(zip(learners, owners, strict=True)):
            if told is not None:
                entry.apply(learner, told[k], PUBLIC)
            learner.fit(rows, seed=100 * number + k)
            tables.append(entry.describe(learner, rows, PUBLIC, 3))
        stack = np.array(tables)
        common = entry.combine(stack, np.array([len(rows) for rows in owners]))
        told = means_of_others(stack) if entry.leave_out else [common] * len(learners)
    return stack


def test_fd_stays_finite_over_50_rounds():
    """P4: cross-entropy against raw logits is NaN in round 2; P20: each class has one holder."""
    owners = [gaussian(16, 1, labels=[0, 1]), gaussian(16, 2, labels=[1, 2])]
    learners = [student(lr=0.1, clip=0.0, seed=k) for k in range(2)]
    stack = loop("class-logits", learners, owners, 50)
    assert np.abs(stack[~np.isnan(stack)]).max() < 100
    for learner, rows in zip(learners, owners, strict=True):
        logits = learner.predict(rows.inputs)
        assert np.isfinite(logits).all()
        assert (logits.argmax(axis=1) == rows.labels).mean() > 0.9


def test_fedproto_draws_the_clients_features_together():
    owners = [gaussian(30, 1), gaussian(30, 2)]
    gaps = {}
    for weight in (0.0, 1.0):
        learners = [student(seed=k, guide_weight=weight, predict="prototypes") for k in range(2)]
        stack = loop("prototypes", learners, owners, 10)
        gaps[weight] = np.square(stack[0] - stack[1]).mean() / np.square(stack).mean()
        test = gaussian(100, 9)
        assert (learners[0].predict(test.inputs).argmax(axis=1) == test.labels).mean() > 0.75
    assert gaps[1.0] < 0.5 * gaps[0.0]


def test_fedhenn_makes_rows_as_like_for_all_and_widths_may_differ():
    owners = [gaussian(30, 1), gaussian(30, 2)]
    gaps = {}
    for weight in (0.0, 1.0):
        builds = [partial(models.MLP, INPUTS, 3, width=w) for w in (8, 13)]
        learners = [student(build, guide_weight=weight) for build in builds]
        stack = loop("kernel", learners, owners, 10)
        gaps[weight] = 1 - (stack[0] * stack[1]).sum()
    assert gaps[1.0] < 0.5 * gaps[0.0]


def test_fedavg_gives_all_clients_one_model():
    owners = [gaussian(30, 1), Rows(gaussian(10, 2).inputs, gaussian(10, 2).labels)]
    learners = [student(), student()]
    entry = EXCHANGES["weights"]
    start = entry.start(student(seed=3))
    stack = loop("weights", learners, owners, 2, told=[start] * 2)
    mean = entry.combine(stack, np.array([30, 10]))
    np.testing.assert_allclose(mean, (3 * stack[0] + stack[1]) / 4, atol=1e-6)
