"""Methods as data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import fedistill as fd
from fedistill.aggregate.rules import RULES, option_names, softmax, wants
from fedistill.distill.density import DENSITIES
from fedistill.distill.recipe import Recipe
from fedistill.errors import SettingsError
from fedistill.exchange import EXCHANGES
from fedistill.presets import METHODS
from fedistill.wire.codec import CODECS

RECIPE = {item.name for item in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_names_what_exists(name):
    chosen = METHODS[name]
    assert chosen.name == name
    assert chosen.summary
    assert chosen.codec in CODECS
    assert chosen.codec_down in {"", *CODECS}
    assert chosen.rule in RULES
    assert chosen.student_rule in {"", *RULES}
    assert set(chosen.options) <= option_names()
    assert chosen.familiarity in {"", "head", *DENSITIES}
    assert chosen.rows in {"drawn", "fixed"}
    assert chosen.teach in {"targets", "student"}
    assert set(chosen.client) <= RECIPE
    assert set(chosen.student) <= RECIPE
    assert chosen.exchange in {"predictions", "nothing", "rows", *EXCHANGES}


@pytest.mark.parametrize("name", METHODS)
def test_a_published_method_names_its_paper_and_ours_says_so(name):
    chosen = METHODS[name]
    if chosen.exchange not in {"nothing", "rows"}:
        assert chosen.paper
    if chosen.exchange in {"predictions", *EXCHANGES} - {"weights"}:
        assert chosen.formula
    if chosen.exchange in {"predictions", *EXCHANGES} - {"weights"} and name != "fedistill":
        assert chosen.deviations
    if name == "fedistill":
        assert "ours" in chosen.summary


def test_the_default_is_ours():
    assert fd.Settings().method.preset == "fedistill"


def test_fields_and_training_are_replaced_by_name():
    found = fd.method("ds-fl", rule="mean", codec="u8", temperature=2.0, memory=0.5)
    assert (found.rule, found.codec, found.memory) == ("mean", "u8", 0.5)
    assert found.client["temperature"] == 2.0
    assert found.client["distil"] == "phase"
    assert METHODS["ds-fl"].rule == "sharpened"
    assert "temperature" not in METHODS["ds-fl"].client


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("dsfl", {}, 'unknown method "dsfl"; did you mean "ds-fl"?'),
        ("ds-fl", {"ruel": "mean"}, 'method.ruel: unknown field; did you mean "rule"?'),
        (
            "ds-fl",
            {"codec": "float3"},
            'method.codec: unknown codec "float3"; did you mean "float32"?',
        ),
    ],
)
def test_wrong_names_are_told_with_the_nearest(name, changes, told):
    with pytest.raises(SettingsError) as caught:
        fd.method(name, **changes)
    assert told in str(caught.value)


def test_an_unknown_rule_is_refused_at_once():
    with pytest.raises(fd.FedistillError, match='unknown rule "meen"'):
        fd.method("ds-fl", rule="meen")


def test_the_prior_reaches_the_rule():
    rule = fd.method("fedistill", prior_rows=3.0).bound_rule()
    assert rule.keywords["prior_rows"] == 3.0
    assert wants(rule) == {"familiarity", "sizes"}


def test_clients_learn_familiarity_only_where_the_rule_wants_it():
    assert fd.method("fedistill").client_recipe(Recipe()).familiarity
    assert not fd.method("fedistill", rule="mean").client_recipe(Recipe()).familiarity
    assert fd.method("ds-fl", rule="distribution-weighted").client_recipe(Recipe()).familiarity
    assert not fd.method("local").client_recipe(Recipe()).familiarity


def test_clients_calibrate_only_where_the_rule_asks_for_the_classes_seen():
    method = fd.method("ds-fl", rule="calibrated")
    assert method.client_recipe(Recipe()).calibrate
    assert not method.student_recipe(Recipe()).calibrate
    assert not fd.method("ds-fl").client_recipe(Recipe()).calibrate


def test_few_own_rows_make_the_soft_part_weigh_more():
    recipe = Recipe(soft_weight=0.5, scarce_rows=80)
    assert [recipe.soft_weight_for(rows) for rows in (0, 20, 80, 1000)] == [40.0, 2.0, 0.5, 0.5]
    assert Recipe(soft_weight=0.5).soft_weight_for(1) == 0.5
    assert Recipe(soft_weight=0.0, scarce_rows=80).soft_weight_for(1) == 0.0


def test_what_a_preset_leaves_open_comes_from_the_client():
    base = Recipe(lr=0.3, epochs=9, batch_size=3)
    found = fd.method("ds-fl").client_recipe(base)
    assert (found.lr, found.epochs, found.batch_size, found.distil) == (0.3, 9, 3, "phase")


def test_the_student_takes_method_then_user():
    found = fd.method("fedmd").student_recipe(Recipe(lr=0.3))
    assert (found.loss, found.lr, found.distil, found.familiarity) == ("mae", 0.3, "phase", False)
    ours = fd.method("fedistill")
    assert ours.student_recipe(Recipe()).optimizer == "adam"
    assert ours.student_recipe(Recipe(), optimizer="sgd", lr=0.2).lr == 0.2


@pytest.mark.parametrize(
    ("memory", "rows", "weights"),
    [
        (0.0, [2, 3], [1, 1]),
        (1.0, [0, 2, 3], [1, 1, 1]),
        (0.5, [0, 2, 3], [0.25, 1, 1]),
    ],
)
def test_a_lesson_fades_with_age_and_leaves_out_rows_without_a_target(memory, rows, weights):
    found = fd.method("ds-fl", memory=memory).lesson(np.array([1, 0, 3, 3]))
    assert found[0].tolist() == rows
    np.testing.assert_allclose(found[1], weights)


def test_before_the_first_round_there_is_no_lesson():
    assert len(fd.method("fedistill").lesson(np.zeros(4, dtype=int))[0]) == 0


def test_a_function_is_a_rule():
    def first(logits, weights):
        return softmax(logits[0])

    assert fd.method("ds-fl", rule=first).bound_rule() is first
