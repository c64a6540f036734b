"""The federation equals a round told in plain loops."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from builders import CLASSES, INPUTS, gaussian, proxy
from oracle import naive, naive_default

from fedistill.client import Client
from fedistill.distill.recipe import Recipe
from fedistill.federation import Federation
from fedistill.models import MLP
from fedistill.presets import method

RULES = {"mean": naive.mean_rule, "sharpened": naive.era_rule}
CODECS = {"float32": naive.through_float32, "u8": naive.through_u8}
STUDENT = partial(MLP, INPUTS, len(CLASSES), width=10)


def parts(seed):
    """Clients of three sizes and widths; 33 rows leave a last batch of one."""
    return {
        f"site-{k}": (partial(MLP, INPUTS, len(CLASSES), width=width), gaussian(rows, seed + k))
        for k, (rows, width) in enumerate([(20, 4), (33, 6), (47, 8)])
    }


def federation(clients, chosen, seed, recipe, per_round):
    people = [Client(name, *made, training=recipe) for name, made in clients.items()]
    return Federation(
        people,
        proxy(40),
        STUDENT,
        chosen,
        classes=CLASSES,
        seed=seed,
        per_round=per_round,
        device="cpu",
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rule", RULES)
def test_ds_fl_equals_the_naive_round(rule, codec, seed):
    clients, recipe = parts(seed), Recipe(epochs=2, batch_size=16, lr=0.2)
    chosen = method("ds-fl", rule=rule, codec=codec, distil_epochs=2)
    real = federation(clients, chosen, seed, recipe, per_round=20)
    told = naive.ds_fl(
        clients,
        real.proxy.inputs,
        STUDENT,
        RULES[rule],
        CODECS[codec],
        rounds=3,
        seed=seed,
        per_round=20,
        recipe=recipe,
        distil_epochs=2,
    )
    compared = 0
    for row, (targets, logits) in zip(real.run(3), told, strict=True):
        rows = sorted(targets)
        assert np.flatnonzero(real.server.stamp == row["round"]).tolist() == rows
        wanted = np.array([targets[k] for k in rows])
        np.testing.assert_allclose(real.server.table[rows], wanted, rtol=0, atol=1e-6)
        found = real.server.student.predict(real.proxy.inputs)
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-6)
        compared += 1
    assert compared == 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_preset_equals_the_naive_round(seed):
    clients, recipe = parts(seed), Recipe(epochs=2, batch_size=16, lr=0.1)
    chosen = method("fedistill")
    real = federation(clients, chosen, seed, recipe, per_round=20)
    told = naive_default.default_round(
        clients,
        real.proxy.inputs,
        STUDENT,
        len(CLASSES),
        rounds=3,
        seed=seed,
        per_round=20,
        recipe=chosen.client_recipe(recipe),
        server_recipe=chosen.student_recipe(recipe),
        memory=chosen.memory,
        prior_rows=100.0,
    )
    compared = 0
    for _, (table, logits) in zip(real.run(3), told, strict=True):
        np.testing.assert_allclose(real.server.table, table, rtol=0, atol=1e-5)
        found = real.server.student.predict(real.proxy.inputs)
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
        compared += 1
    assert compared == 3


def test_the_comparison_notices_another_learning_rate():
    clients, recipe = parts(0), Recipe(epochs=2, batch_size=16, lr=0.2)
    real = federation(clients, method("ds-fl"), 0, recipe, per_round=20)
    (targets, _), *_ = naive.ds_fl(
        clients,
        real.proxy.inputs,
        STUDENT,
        naive.era_rule,
        naive.through_float32,
        rounds=1,
        seed=0,
        per_round=20,
        recipe=dataclasses.replace(recipe, lr=0.201),
        distil_epochs=1,
    )
    list(real.run(1))
    rows = sorted(targets)
    gap = np.abs(real.server.table[rows] - np.array([targets[k] for k in rows])).max()
    assert gap > 1e-5
