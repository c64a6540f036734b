"""Students mapped by torch.func learn what they learn one after another."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedistill import models
from fedistill.backends.mapped import LARGEST_BLOCK, blocks, gain, kind_of, unmapped
from fedistill.backends.serial import Serial
from fedistill.backends.vectorized import Vectorized
from fedistill.client import Client
from fedistill.distill.batches import Batches
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import Lesson, TorchStudent
from fedistill.presets import method
from fedistill.types import ProxySet, Rows

SHAPE = (2, 8, 8)
EXACT = dataclasses.replace(method("ds-fl"), codec="float32")


def images(rows, seed):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(rows, *SHAPE)).astype(np.float32)
    labels = random.integers(0, 3, rows)
    inputs[np.arange(rows), 0, labels] += 1.0
    return Rows(inputs, labels)


def cnn():
    return models.CNN(2, 3, width=4)


class Wide(nn.Module):
    """A module that no kernel knows."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(128, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.first(inputs.flatten(1))))


def after(backend, build, recipe, chosen, rounds):
    """A federation after some rounds; of several factories the clients have one each in turn."""
    builds = build if isinstance(build, list) else [build]
    clients = [
        Client(f"site-{k}", made, images(0 if k == 2 else 20 - 4 * k, k), training=recipe)
        for k, made in zip(range(4), itertools.cycle(builds), strict=False)
    ]
    from fedistill.federation import Federation

    fed = Federation(
        clients,
        ProxySet(images(30, 9).inputs),
        None,
        chosen,
        classes=("a", "b", "c"),
        seed=1,
        device="cpu",
        per_round=20,
        quorum=1,
    )
    list(fed.run(rounds, backend=backend))
    return fed


def compare(build, recipe, chosen, rounds=2):
    serial = after(Serial, build, recipe, chosen, rounds)
    fast = after(partial(Vectorized, mapped=True), build, recipe, chosen, rounds)
    assert not any("trained alone" in note for note in fast.notes)
    for name, site in serial.sites.items():
        np.testing.assert_allclose(fast.sites[name].targets, site.targets, atol=1e-5)
        wanted, found = site.learner.state_dict(), fast.sites[name].learner.state_dict()
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, atol=5e-5, err_msg=f"{name} {key}")
        assert fast.sites[name].learner.passed == site.learner.passed


RECIPES = {
    "clipped": Recipe(epochs=2, batch_size=8, clip=0.5, momentum=0.9),
    "decayed": Recipe(epochs=1, batch_size=8, weight_decay=0.01, momentum=0.5, average=0.9),
    "adam": Recipe(epochs=1, batch_size=8, optimizer="adam", lr=1e-3, weight_decay=0.01),
    "adamw": Recipe(epochs=2, batch_size=8, optimizer="adamw", lr=1e-3, weight_decay=0.1),
    "falling": Recipe(epochs=2, batch_size=8, schedule="cosine", momentum=0.0),
    "mixed": Recipe(epochs=1, batch_size=8, mixup=0.5, temperature=2.0, calibrate=True),
    "phase": Recipe(epochs=1, batch_size=8, distil="phase", temperature=3.0, momentum=0.9),
    "absolute": Recipe(epochs=1, batch_size=8, distil="phase", loss="mae", momentum=0.9),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_teaches_what_it_teaches_one_after_another(recipe):
    chosen = dataclasses.replace(
        method("ds-fl"),
        codec="float32",
        client={"distil": recipe.distil, "momentum": None, "loss": recipe.loss},
    )
    compare(Wide, recipe, chosen)


@pytest.mark.parametrize("distil", ["inside", "phase"])
def test_a_convolutional_student_that_learns_familiarity(distil):
    chosen = dataclasses.replace(
        method("fedistill"),
        codec="float32",
        cache=False,
        client={"distil": distil, "average": 0.9, "momentum": 0.9},
    )
    compare(cnn, Recipe(epochs=1, batch_size=8), chosen)


class Branching(Wide):
    """One whose way depends on the values."""

    def forward(self, inputs):
        return super().forward(inputs) * (2 if inputs.sum() + self.head.weight.sum() > 0 else 1)


def drawn(layer):
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 4), layer, nn.Linear(4, 3))


class Around(Wide):
    """Does something more than ``Wide``, and its ``repr`` is silent about it."""

    def __init__(self, before=lambda made, x: x, after=lambda made, x: x, **attributes):
        super().__init__()
        type(self).before, type(self).after = before, after
        vars(self).update(attributes)

    def forward(self, inputs):
        return self.after(super().forward(self.before(inputs)))


def around(**settings):
    return type("Around", (Around,), {})(**settings)


def listening():
    made = Wide()
    made.first.register_forward_hook(lambda layer, given, gave: 2 * gave)
    return made


def patched():
    made = Wide()
    made.head.forward = torch.tanh
    return made


def count(made, inputs):
    made.calls += 1
    return inputs


def mean_removed(made, inputs):
    return inputs - inputs.mean(0, keepdim=True)


def dropped(made, inputs):
    return nn.functional.dropout(inputs, 0.5, made.training)


def otherwise_mapped(made, inputs):
    return inputs * (2 if torch._C._functorch.maybe_current_level() == 2 else 1)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Wide, ""),
        (partial(drawn, nn.Dropout(0.0)), ""),
        (partial(drawn, nn.Dropout(0.5)), "Dropout would draw"),
        (partial(drawn, nn.BatchNorm1d(4)), "BatchNorm1d keeps statistics"),
        (Branching, "torch.func cannot map it: vmap"),
        (partial(around, after=dropped), "torch.func cannot map it: vmap: called random"),
        (partial(around, before=mean_removed), "it mixes the rows of a batch"),
        (partial(around, after=mean_removed), "it mixes the rows of a batch"),
        (partial(around, before=otherwise_mapped), "torch.func maps it to other values"),
        (partial(around, after=count, calls=0), "it changes as it computes"),
        (partial(around, scale=torch.ones(1)), "Around keeps a Tensor as scale"),
        (listening, "Linear has hooks"),
        (patched, "Linear has hooks, or a forward"),
        (partial(around, scale=2.0), ""),
    ],
    ids=[
        "plain",
        "no dropout",
        "dropout",
        "batch norm",
        "branching",
        "dropout by function",
        "mixed inputs",
        "mixed logits",
        "other when mapped",
        "counting",
        "tensor",
        "hook",
        "forward of its own",
        "number",
    ],
)
def test_what_cannot_be_mapped_says_why(build, reason):
    learner = TorchStudent(build, Recipe(), classes=3, seed=1)
    learner.module.eval()  # as every student is between its lessons
    found = unmapped(learner, torch.from_numpy(images(3, 0).inputs))
    assert found.startswith(reason) if reason else not found


def test_rows_that_are_blank_hide_no_mixing():
    learner = TorchStudent(partial(around, before=mean_removed), Recipe(), classes=3, seed=1)
    assert unmapped(learner, torch.zeros(1, *SHAPE)).startswith("it mixes the rows")


def test_a_trial_leaves_no_trace():
    learner = TorchStudent(partial(around, after=dropped), Recipe(), classes=3, seed=1)
    learner.module.eval()
    before, draws = learner.state_dict(), torch.get_rng_state()
    assert unmapped(learner, torch.from_numpy(images(3, 0).inputs))
    assert not learner.module.training
    assert torch.equal(torch.get_rng_state(), draws)
    for name, value in learner.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


class Times(Wide):
    """Has a factor that its ``repr`` does not tell."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, inputs):
        return super().forward(inputs) * self.factor


def test_modules_that_differ_in_an_attribute_alone_are_mapped_apart():
    builds = [partial(Times, 1.0), partial(Times, 2.0)]
    compare(builds, Recipe(epochs=1, batch_size=8), EXACT)


def test_values_of_another_precision_are_of_another_kind():
    builds = Wide, lambda: Wide().double()
    one, two = (TorchStudent(build, Recipe(), classes=3, seed=1) for build in builds)
    assert kind_of(one, []) != kind_of(two, [])


def test_what_cannot_be_mapped_is_asked_alone():
    build = partial(drawn, nn.Dropout(0.5))
    chosen, recipe = dataclasses.replace(method("ds-fl"), codec="float32"), Recipe(batch_size=8)
    serial = after(Serial, build, recipe, chosen, 2)
    fast = after(partial(Vectorized, mapped=True), build, recipe, chosen, 2)
    assert any("trained alone" in n and "Dropout" in n for n in fast.notes)
    for name, site in serial.sites.items():
        np.testing.assert_array_equal(fast.sites[name].targets, site.targets)


def test_on_a_cpu_nothing_is_mapped_unasked():
    sites = after(Serial, Wide, Recipe(epochs=0), method("ds-fl"), 1).sites
    (note,) = [note for note in Vectorized(sites).notes if "trained alone" in note]
    assert "on a CPU mapping is slower" in note


def test_blocks_hold_the_longest_lessons_first():
    def lesson(steps):
        return [Lesson(Batches(steps, 1, lambda step: None), True, None, 0)]

    assert blocks([lesson(2), lesson(5), [], lesson(3)]) == [[1, 3, 0, 2]]
    parted = blocks([lesson(1)] * (LARGEST_BLOCK + 1))
    assert [len(block) for block in parted] == [LARGEST_BLOCK, 1]


def test_a_gain_is_measured():
    learner = TorchStudent(Wide, Recipe(), classes=3, seed=1)
    assert gain(learner, torch.from_numpy(images(4, 0).inputs), 3, times=1) > 0
