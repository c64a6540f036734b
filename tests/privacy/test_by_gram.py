"""Modules whose weights are used otherwise than once go by hooks; and no import of Opacus."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedistill import models
from fedistill.distill.recipe import Recipe
from fedistill.errors import FedistillError
from fedistill.privacy import by_gram, by_opacus, exact, layers
from fedistill.privacy.by_gram import measurable
from fedistill.privacy.clipping import Clipper, clipping_mode, cross_entropy
from fedistill.privacy.dpsgd import PrivateStudent
from fedistill.privacy.exact import EXACT, exact_products
from fedistill.privacy.rowwise import Unsuited, is_finite
from fedistill.settings import PrivacySettings
from fedistill.types import Rows

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3


class Net(nn.Module):
    """Two layers, used by a method that a case overrides."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(self.hidden(inputs))

    def hidden(self, inputs):
        return torch.relu(self.body(inputs))


class Twice(Net):
    def hidden(self, inputs):
        return torch.relu(self.body(torch.relu(self.body(inputs))))


class Outside(Net):
    """Its hook sees one of two uses of the weight."""

    def hidden(self, inputs):
        return F.linear(super().hidden(inputs), self.body.weight)


class OutsideAlone(Net):
    """The layer is used, and nothing comes of it."""

    def hidden(self, inputs):
        self.body(inputs)
        return F.linear(inputs, self.body.weight, self.body.bias)


class OutsideUnseen(Net):
    def hidden(self, inputs):
        with torch.no_grad():
            self.body(inputs)
        return F.linear(inputs, self.body.weight, self.body.bias)


class Unheard(Net):
    """No layer is used at all, weights alone are."""

    def forward(self, inputs):
        hidden = F.linear(inputs, self.body.weight, self.body.bias)
        return F.linear(hidden, self.head.weight, self.head.bias)


class BiasOutside(Net):
    def hidden(self, inputs):
        return super().hidden(inputs) + self.body.bias


class SameWeight(Net):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 4)
        self.second.weight = self.body.weight

    def hidden(self, inputs):
        return torch.relu(self.second(super().hidden(inputs)))


class SameLayer(Net):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.second = self.body

    def hidden(self, inputs):
        return torch.relu(self.second(super().hidden(inputs)))


class Overwritten(Net):
    """What a layer was given is not there any more when it is needed."""

    def hidden(self, inputs):
        given = inputs.clone()
        hidden = super().hidden(given)
        given.mul_(2)
        return hidden


class Recomputed(Net):
    """Its layer is used again on the way back, as gradient checkpointing does."""

    def hidden(self, inputs):
        found = super().hidden(inputs)
        found.register_hook(lambda gradient: self.again(inputs, gradient))
        return found

    def again(self, inputs, gradient):
        with torch.enable_grad():
            self.body(inputs)
        return gradient


class HalfPrecision(Net):
    def hidden(self, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().hidden(inputs).float()


class OneRow(Net):
    """Its layer sees the rows as positions of one row."""

    def hidden(self, inputs):
        return super().hidden(inputs[None])[0]


class ByName(nn.Linear):
    """Not plainly linear."""

    def forward(self, inputs):
        return super().forward(2 * inputs)


class Derived(Net):
    def __init__(self):
        super().__init__()
        self.body = ByName(4, 4)


REFUSED_WHEN_USED = [
    Twice,
    Outside,
    OutsideAlone,
    OutsideUnseen,
    Unheard,
    BiasOutside,
    SameLayer,
    Overwritten,
    Recomputed,
    HalfPrecision,
    OneRow,
]


def made(build):
    torch.manual_seed(1)
    return build().train()


def clipper(module, mode="gram", loss=cross_entropy):
    return Clipper(module, loss, clip=0.4, sigma=0.0, expected=1.0, generator=None, mode=mode)


def take(chosen):
    return X[chosen], Y[chosen], None


def mode_after_a_step(module, loss=cross_entropy):
    with clipper(module, loss=loss) as by:
        try:
            by.step(np.arange(6), take)
        except (FedistillError, RuntimeError):  # what hooks say of it is not the question here
            assert by.mode == "hooks"
        return by.mode


def test_a_plain_module_stays():
    assert mode_after_a_step(made(Net)) == "gram"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", REFUSED_WHEN_USED)
def test_layers_that_are_not_used_once_and_plainly_go_by_hooks(build):
    assert mode_after_a_step(made(build)) == "hooks"


@pytest.mark.parametrize("build", [SameWeight, Derived])
def test_weights_of_two_layers_and_layers_of_other_kinds_are_not_tried(build):
    module = made(build)
    assert not measurable(module)
    assert clipping_mode(module, "record") != "gram"


def test_a_penalty_on_weights_is_no_gradient_of_rows():
    def penalised(net, inputs, labels):
        weights = sum(weight.square().sum() for weight in net.parameters())
        return cross_entropy(net, inputs, labels) + weights

    assert mode_after_a_step(made(Net), penalised) == "hooks"


def test_a_layer_that_is_heard_from_now_on_is_not_measured():
    """By a hook that came after the module was looked at."""
    for module in (made(Net), made(lambda: models.MLP(4, 3, width=5))):
        assert clipping_mode(module, "record") == "gram"
        module.head.register_forward_hook(lambda layer, given, gave: 2 * gave)
        assert mode_after_a_step(module) == "hooks"


def test_outputs_that_are_written_over_are_known_by_their_place():
    inplace = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)))
    plain = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    found = []
    for module in (inplace, plain):
        with clipper(module) as by:
            found.append(by.clipped_sum(take(np.arange(6))))
            assert by.mode == "gram"
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_where_it_is_used_otherwise_from_some_step_on():
    """The graph of every pass is looked at, not that of the first one alone."""
    module = made(Net)
    with clipper(module) as by:
        by.step(np.arange(6), take)
        assert by.mode == "gram"
        module.hidden = lambda inputs: F.linear(torch.relu(module.body(inputs)), module.body.weight)
        by.step(np.arange(6), take)
        assert by.mode == "hooks"


@pytest.mark.parametrize("build", [Net, lambda: models.MLP(4, 3, width=5)])
def test_a_layer_that_is_heard_from_some_step_on(build):
    module = made(build)
    with clipper(module) as by:
        by.step(np.arange(6), take)
        assert by.mode == "gram"
        module.head.register_forward_hook(lambda layer, given, gave: 2 * gave)
        by.step(np.arange(6), take)
        assert by.mode == "hooks"


@pytest.mark.parametrize("mode", ["gram", "ghost", "hooks"])
@pytest.mark.parametrize("build", [Net, lambda: models.MLP(4, 3, width=5)])
def test_weights_that_are_frozen_within_a_fit_are_an_error(build, mode):
    module = made(build)
    with clipper(module, mode) as by:
        by.step(np.arange(6), take)
        module.head.bias.requires_grad_(False)
        with pytest.raises(FedistillError, match=r"4 weights that learned .* found 3 that learn"):
            by.step(np.arange(6), take)


class Waking(Net):
    """It makes a frozen weight learn while it computes."""

    def hidden(self, inputs):
        self.body.bias.requires_grad_(True)
        return super().hidden(inputs)


def test_weights_that_wake_up_within_a_step_are_an_error():
    module = made(Waking)
    module.body.bias.requires_grad_(False)
    with clipper(module) as by, pytest.raises(FedistillError, match="found 4 that learn"):
        by.step(np.arange(6), take)


class Words(nn.Module):
    """Some hand indices over in 32 bits."""

    def __init__(self, dtype):
        super().__init__()
        self.words, self.head, self.dtype = nn.Embedding(9, 4), nn.Linear(4, 3), dtype

    def forward(self, inputs):
        return self.head(self.words(inputs.abs().to(self.dtype)).mean(1))


def test_indices_of_32_bits():
    found = []
    for dtype in (torch.int32, torch.int64):
        with clipper(made(partial(Words, dtype))) as by:
            found.append(by.clipped_sum(take(np.arange(6))))
            assert by.mode == "gram"
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["gram", "ghost"])
@pytest.mark.parametrize("build", [Net, lambda: models.MLP(4, 3, width=5)])
def test_norms_are_not_measured_in_half_precision(build, mode):
    module = made(build)
    with clipper(module, mode) as by, torch.autocast("cpu", dtype=torch.bfloat16):
        by.step(np.arange(6), take)
        assert by.mode == "hooks"
    assert clipping_mode(module.to(torch.bfloat16), "record") == "hooks"


@pytest.mark.parametrize("mode", ["gram", "ghost", "hooks"])
def test_products_are_exact_whatever_a_program_has_set(mode):
    """Not 8 bits of the factors, as of a GPU or of oneDNN, by which norm and sum disagree."""
    seen = []

    def watching(net, inputs, labels):
        seen.extend(kind.fp32_precision for kind in exact.kinds())
        return cross_entropy(net, inputs, labels)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        outside = [kind.fp32_precision for kind in exact.kinds()]
        with clipper(made(Net), mode, watching) as by:
            by.step(np.arange(6), take)
            by.clipped_sum(take(np.arange(6)))
        assert [kind.fp32_precision for kind in exact.kinds()] == outside
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(seen) == 2 * len(exact.kinds())
    assert set(seen) <= set(EXACT)


def test_older_settings_do_the_same(monkeypatch):
    monkeypatch.setattr(exact, "kinds", tuple)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_users_are_no_matter_of_rows():
    owner = torch.tensor([0, 0, 0, 1, 1, 1])
    for build in (Net, lambda: models.MLP(4, 3)):
        with clipper(made(build)) as by:
            by.step(np.arange(2), lambda chosen: (X, Y, owner))
            assert by.mode == "hooks"


def test_nothing_is_held_after_a_pass():
    module = made(Net)
    with clipper(module) as by:
        by.step(np.arange(6), take)
        assert not by._engine._uses
        with pytest.raises(RuntimeError, match=r"size|shape"):
            by.step(np.arange(6), lambda chosen: (X[:, :3], Y, None))
        assert not by._engine._uses
    assert not module.body._forward_hooks


def test_whoever_asks_the_module_between_two_passes_is_not_heard():
    module = made(Net)
    with clipper(module) as by:
        for _ in range(2):
            by.step(np.arange(6), take)
            with torch.no_grad():
                module(X)
            module(X[:1])
        assert by.mode == "gram"


class Catching(Net):
    """It goes on where a hook objects."""

    def hidden(self, inputs):
        try:
            with torch.no_grad():
                self.body(inputs)
        except Unsuited:
            pass
        return F.linear(inputs, self.body.weight, self.body.bias)


def test_a_module_that_goes_on_where_a_hook_objects():
    assert mode_after_a_step(made(Catching)) == "hooks"


def test_leaves_are_counted_by_use():
    weight, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found = by_gram._leaves((weight * weight + other).sum())
    assert found == {id(weight): 2, id(other): 1}


@pytest.mark.parametrize(
    ("values", "finite"),
    [([1.0, -1.0], True), ([1.0, np.nan], False), ([np.inf, -np.inf], False), ([0.0], True)],
)
def test_what_is_finite(values, finite):
    assert is_finite([torch.ones(3), torch.tensor(values)]) is finite


def test_opacus_is_not_imported_for_known_layers(monkeypatch):
    """It takes seconds."""

    def imported():
        raise AssertionError

    monkeypatch.setattr(layers, "import_opacus", imported)
    monkeypatch.setattr(by_opacus, "import_opacus", imported)
    learner = PrivateStudent(
        partial(models.CNN, 1, 3, width=4),
        Recipe(),
        classes=3,
        seed=1,
        privacy=PrivacySettings(mechanism="dpsgd", steps=2),
    )
    rows = Rows(np.random.default_rng(0).normal(size=(9, 1, 8, 8)), np.arange(9) % 3)
    learner.quote(rows, np.arange(2))(1.0)
    learner.allow(1.0)
    learner.fit(rows, seed=1)
    assert learner._mode == "gram"
    with pytest.raises(AssertionError):
        by_opacus.ByOpacus(learner.module, cross_entropy, 1.0, ghost=False).open()
