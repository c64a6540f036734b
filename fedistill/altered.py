"""Whether a module still computes what its class says: asked before anything is computed otherwise.

Whoever computes a module's function without calling the module (by hand, in stacks, from sums over
rows) knows it by its class. A hook, or a ``forward`` put on one instance, may make it another.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

REPLACED = ("forward", "_conv_forward", "_call_impl", "_slow_forward", "_compiled_call_impl")
"""What makes an instance another when it is put on it."""


def altered(layer: nn.Module, heard: object = None) -> bool:
    """Whether more happens in a layer than its class says, be it for all modules at once.

    Args:
        layer: it alone, without the layers in it.
        heard: whose hooks do not count.
    """
    replaced = not vars(layer).keys().isdisjoint(REPLACED)
    if replaced or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    hooks = (
        *layer._forward_hooks.values(),
        *layer._forward_pre_hooks.values(),
        *layer._backward_hooks.values(),
        *layer._backward_pre_hooks.values(),
    )
    return any(heard is None or getattr(hook, "__self__", None) is not heard for hook in hooks)
