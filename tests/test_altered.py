"""What makes a module compute something else than its class says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as every

from fedistill.altered import altered

CHANGES = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "with keywords": lambda layer: layer.register_forward_hook(lambda *_: None, with_kwargs=True),
    "before": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "before backward": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "for all": lambda layer: every.register_module_forward_hook(lambda *_: None),
    "before, for all": lambda layer: every.register_module_forward_pre_hook(lambda *_: None),
    "backward, for all": lambda layer: every.register_module_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hooks_alter_until_they_are_removed(change):
    layer = nn.Linear(2, 2)
    assert not altered(layer)
    hook = change(layer)
    try:
        assert altered(layer)
    finally:
        hook.remove()
    assert not altered(layer)


def test_a_forward_put_on_an_instance_alters():
    layer = nn.ReLU()
    layer.forward = torch.tanh
    assert altered(layer)


class Listener:
    def hear(self, *_):
        pass


def test_hooks_of_one_listener_may_not_count():
    layer, listener = nn.Linear(2, 2), Listener()
    layer.register_forward_hook(listener.hear)
    assert altered(layer)
    assert altered(layer, heard=Listener())
    assert not altered(layer, heard=listener)
