"""Layers that mix rows, and what takes their place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedistill import models
from fedistill.errors import FedistillError
from fedistill.privacy.layers import anatomy, hold_still, private_module, row_by_row


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.attention(inputs, inputs, inputs)[0].mean(1))


@pytest.mark.parametrize(
    ("channels", "groups"), [(3, 1), (8, 2), (12, 3), (32, 8), (48, 12), (130, 26), (256, 32)]
)
def test_batch_norm_becomes_group_norm(channels, groups):
    notes = []
    module = private_module(
        lambda: nn.Sequential(nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels)), notes
    )
    assert isinstance(module[1], nn.GroupNorm)
    assert module[1].num_groups == groups
    assert len(notes) == 1
    assert "BatchNorm became GroupNorm" in notes[0]
    assert notes[0].endswith(": 1")


def test_a_row_of_features_is_still_told_apart():
    """Groups of one channel, as Opacus makes of 32, would turn every row into zeros."""
    module = private_module(lambda: nn.Sequential(nn.BatchNorm1d(32)), [])
    assert module(torch.randn(4, 32)).std() > 0.5


def test_a_module_that_is_such_a_layer_itself():
    assert isinstance(private_module(lambda: nn.BatchNorm1d(8), []), nn.GroupNorm)


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_keep_their_weights(layer):
    torch.manual_seed(0)
    plain = layer(3, 5, batch_first=True)
    notes = []
    if layer is nn.RNN:
        with pytest.raises(FedistillError, match=r"layer 0 \(RNN\)"):
            private_module(lambda: nn.Sequential(plain), notes)
        return
    private = private_module(lambda: nn.Sequential(plain), notes)[0]
    assert type(private).__name__ == f"DP{layer.__name__}"
    rows = torch.randn(2, 4, 3)
    torch.testing.assert_close(private(rows)[0], plain(rows)[0])
    assert layer.__name__ in notes[0]


def test_attention_is_replaced():
    notes = []
    module = private_module(Attentive, notes)
    assert type(module.attention).__name__ == "DPMultiheadAttention"
    assert module(torch.randn(2, 5, 8)).shape == (2, 3)


def test_statistics_of_rows_are_refused():
    with pytest.raises(FedistillError, match="track_running_stats=False"):
        private_module(lambda: nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)), [])
    private_module(lambda: nn.Sequential(nn.InstanceNorm2d(3)), [])


def test_frozen_batch_norm_stays_and_stands_still():
    frozen = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    frozen[0].requires_grad_(False)
    notes = []
    module = private_module(lambda: frozen, notes).train()
    hold_still(module)
    assert isinstance(module[0], nn.BatchNorm1d)
    assert not module[0].training
    assert module[1].training
    assert not notes


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4, track_running_stats=False).requires_grad_(False),
    ],
)
def test_batch_norm_without_weights_is_not_overlooked(layer):
    """It has no gradient that would give it away, and mixes rows all the same."""
    module = private_module(lambda: nn.Sequential(layer, nn.Linear(4, 2)), [])
    assert isinstance(module[0], nn.GroupNorm)


def test_equal_seeds_build_equal_modules():
    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GRU(8, 3))

    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(private_module(build, []).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --- what needs no trial --------------------------------------------------------------------------


def mlp():
    return models.MLP(4, 3, width=8)


@pytest.mark.parametrize(
    "build", [mlp, models.LeNet, lambda: models.CNN(1, 3), lambda: models.Linear(4, 3)]
)
def test_models_of_this_package_keep_rows_apart(build):
    assert row_by_row(build())


def patched():
    module = mlp()
    module.trunk.forward = lambda inputs: inputs - inputs.mean(0)
    return module


def hooked():
    module = mlp()
    module.trunk.register_forward_hook(lambda layer, given, gave: gave - gave.mean(0))
    return module


def parametrized():
    module = mlp()
    nn.utils.parametrizations.weight_norm(module.head)
    return module


def convolving():
    module = models.LeNet()
    module.conv1._conv_forward = lambda inputs, weight, bias: inputs.mean(0, keepdim=True)
    return module


def other_activation():
    module = mlp()
    module.trunk[1] = nn.Softmax(dim=0)
    return module


class Child(models.MLP):
    """Not plainly an MLP."""


UNKNOWN = [
    Attentive,
    patched,
    hooked,
    parametrized,
    convolving,
    other_activation,
    lambda: Child(4, 3),
    lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
    lambda: nn.TransformerEncoderLayer(4, 1),
    lambda: torch.fx.symbolic_trace(mlp()),
]


@pytest.mark.parametrize("build", UNKNOWN)
def test_others_are_not_taken_on_trust(build):
    """Neither those of PyTorch: some of its layers compare rows."""
    assert not row_by_row(build())


def test_hooks_on_all_modules_are_seen():
    handle = nn.modules.module.register_module_forward_hook(lambda layer, given, gave: None)
    try:
        assert not row_by_row(mlp())
    finally:
        handle.remove()
    assert row_by_row(mlp())


def test_a_module_that_was_changed_is_another_one():
    module = mlp()
    before = anatomy(module)
    assert anatomy(module) == before
    handle = module.trunk[1].register_forward_hook(lambda layer, given, gave: None)
    assert anatomy(module) != before
    handle.remove()
    assert anatomy(module) == before
    module.trunk.forward = module.trunk.forward
    assert anatomy(module) != before


@pytest.mark.parametrize("layer", [nn.Embedding(9, 4, max_norm=1.0), nn.EmbeddingBag(9, 4, 1.0)])
def test_an_embedding_that_shortens_what_is_looked_up_is_refused(layer):
    for module in (layer, layer.requires_grad_(False)):
        with pytest.raises(FedistillError, match=r"layer 0 shortens .* without max_norm"):
            private_module(lambda module=module: nn.Sequential(module), [])
