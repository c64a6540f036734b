"""The checkers of codecs and learners refuse what breaks a promise."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from builders import Saying
from torch import nn

import fedistill as fd
from fedistill import models
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import TorchStudent
from fedistill.testing import CheckFailed, check_codec, check_learner
from fedistill.wire.codec import CODECS

EXACT = CODECS["float32"]


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_keeps_its_promises(name):
    check_codec(name)


def test_the_exact_codec_loses_nothing():
    check_codec("float32", loss=1e-6)


def _coarse(probs):
    return EXACT.encode(np.round(probs))


def _forgetful(data, rows, classes):
    found = EXACT.decode(data, rows, classes)
    found[:, 0] = 0
    return found


def _scribbling(probs):
    probs *= 1
    probs[:1] = 0
    return EXACT.encode(probs)


CODEC_FAULTS = {
    "longer than it says": (
        {"encode": lambda probs: EXACT.encode(probs) + b"x"},
        "bytes, as the header promises",
    ),
    "says two bytes": ({"bytes_per_value": 2}, "as the header promises"),
    "no bytes": ({"encode": lambda probs: EXACT.encode(probs).hex()}, "expected bytes, found str"),
    "coarse": ({"encode": _coarse}, "sum to 1|a loss of at most"),
    "not normalised": (
        {"decode": lambda *args: EXACT.decode(*args) * np.float32(1.5)},
        "rows that sum to 1",
    ),
    "negative": ({"decode": lambda *args: -EXACT.decode(*args)}, "finite numbers of at least 0"),
    "wrong type": ({"decode": lambda *args: EXACT.decode(*args).astype(float)}, "expected float32"),
    "transposed": (
        {"decode": lambda data, rows, classes: EXACT.decode(data, classes, rows)},
        "shape",
    ),
    "loses a class": ({"decode": _forgetful}, "sum to 1|loss"),
    "changes its input": ({"encode": _scribbling}, "input left as it is"),
    "random": (
        {"encode": lambda probs: EXACT.encode(np.random.default_rng().permuted(probs, axis=1))},
        "equal bytes for equal rows|loss",
    ),
}


@pytest.mark.parametrize("name", CODEC_FAULTS)
def test_check_codec_rejects(name):
    change, told = CODEC_FAULTS[name]
    with pytest.raises(CheckFailed, match=told) as caught:
        check_codec(replace(EXACT, **change))
    assert "expected" in str(caught.value)


# --- learners ------------------------------------------------------------------------------------


class Student(TorchStudent):
    """A good learner, for others to spoil."""

    def __init__(self):
        super().__init__(
            partial(models.MLP, 4, 3, width=6), Recipe(epochs=1, batch_size=8), classes=3, seed=1
        )


class WrongShape(Student):
    def predict(self, inputs):
        return super().predict(inputs)[:, :2]


class NotFinite(Student):
    def predict(self, inputs):
        return super().predict(inputs) * np.nan


class Moody(Student):
    calls = 0

    def predict(self, inputs):
        self.calls += 1
        return super().predict(inputs) + np.float32(self.calls) * np.eye(1, 3, dtype=np.float32)


class Deaf(Student):
    def absorb(self, *args, **kwargs):
        pass


class Unseeded(Student):
    def fit(self, rows, *, seed):
        super().fit(rows, seed=int(np.random.default_rng().integers(1 << 30)))


class Forgetful(Student):
    def load_state_dict(self, state, rows):
        pass


class HalfState(TorchStudent):
    """Saves its weights and forgets its optimizer."""

    def __init__(self):
        recipe = Recipe(epochs=1, batch_size=8, momentum=0.9, distil="phase")
        super().__init__(partial(models.MLP, 4, 3, width=6), recipe, classes=3, seed=1)

    def state_dict(self):
        state = super().state_dict()
        return {key: value for key, value in state.items() if not key.startswith("optimizer")}


class Aliased(Student):
    def state_dict(self):
        living = {f"net.{k}": v.numpy() for k, v in self._net.state_dict().items()}
        return dict(super().state_dict()) | living


class Pickled(Student):
    def state_dict(self):
        return dict(super().state_dict()) | {"secret": np.array([object()])}


class Scaling(Student):
    def fit(self, rows, *, seed):
        rows.inputs[...] /= 2
        super().fit(rows, seed=seed)


class Hungry(Student):
    def fit(self, rows, *, seed):
        if not len(rows):
            raise ZeroDivisionError
        super().fit(rows, seed=seed)


class Relative(Student):
    """Looks at the other rows of a call."""

    def predict(self, inputs):
        if not len(inputs):
            return super().predict(inputs)
        return super().predict(inputs - inputs.mean(axis=0))


LEARNER_FAULTS = {
    WrongShape: r"fresh: expected logits \[rows, classes\] = \(16, 3\), found \(16, 2\)",
    NotFinite: "expected finite logits",
    Moody: "asked twice",
    Relative: "asked row by row",
    Deaf: "soft targets: expected other predictions than without, found the same",
    Unseeded: "equal seeds",
    Forgetful: "restored",
    HalfState: "trained on after restoring",
    Aliased: "state: expected a copy",
    Pickled: "arrays without objects, found secret",
    Scaling: "equal seeds|arguments left as they are",
}


def test_the_unspoiled_learner_passes():
    check_learner(Student)


@pytest.mark.parametrize("kind", LEARNER_FAULTS)
def test_check_learner_rejects(kind):
    with pytest.raises(CheckFailed, match=LEARNER_FAULTS[kind]) as caught:
        check_learner(kind)
    assert f"learner {kind.__name__}" in str(caught.value)


def test_check_learner_lets_a_crash_on_no_rows_through():
    with pytest.raises(ZeroDivisionError):
        check_learner(Hungry)


def test_check_learner_rejects_one_that_learns_nothing():
    with pytest.raises(CheckFailed, match="found the same"):
        check_learner(lambda: Saying(lambda self, inputs: np.zeros((len(inputs), 3))))


def test_a_module_whose_prediction_depends_on_the_batch_is_found():
    class Batchwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, inputs):
            return self.head(inputs - inputs.mean(dim=0, keepdim=True))

    with pytest.raises(CheckFailed, match="asked row by row"):
        check_learner(Batchwise)


def test_checkers_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fd.testing.check_learner(partial(models.Linear, 4, 3))
    assert torch.equal(torch.get_rng_state(), before)
