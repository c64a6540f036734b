"""Features of any module, without rewriting it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedistill import models
from fedistill.distill.trunk import trunk_of


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4, 3))

    def forward(self, inputs):
        return inputs @ self.weight


class PerToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Linear(2, 3)

    def forward(self, inputs):
        return self.token(inputs.reshape(len(inputs), -1, 2)).mean(dim=1)


def features_of(module, inputs):
    with trunk_of(module) as trunk:
        return trunk.of(module(inputs))


def test_features_are_what_the_head_is_given():
    module, inputs = models.MLP(4, 3, width=8), torch.randn(5, 4)
    found = features_of(module, inputs)
    torch.testing.assert_close(found, module.trunk(inputs))
    torch.testing.assert_close(module.head(found), module(inputs))


def test_logits_stand_for_features_where_there_is_no_head_that_sees_whole_rows():
    inputs = torch.randn(5, 4)
    for module in (Bare(), PerToken()):
        torch.testing.assert_close(features_of(module, inputs), module(inputs))


def test_gradients_flow_into_the_trunk():
    module = models.MLP(4, 3, width=8)
    features_of(module, torch.randn(5, 4)).sum().backward()
    assert module.trunk[0].weight.grad.abs().sum() > 0
    assert module.head.weight.grad is None


def test_nothing_is_left_on_the_module():
    module = models.MLP(4, 3, width=8)
    try:
        with trunk_of(module):
            module(torch.randn(2, 4))
            raise KeyError
    except KeyError:
        pass
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    copy.deepcopy(module)


def test_what_was_seen_counts_once():
    module = models.MLP(4, 3, width=8)
    with trunk_of(module) as trunk:
        logits = module(torch.randn(5, 4))
        assert trunk.of(logits).shape == (5, 8)
        assert trunk.of(logits) is logits
