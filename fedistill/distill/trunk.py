"""The features of a module's rows: what its last linear layer is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Trunk:
    """Everything of a module before its last linear layer, listened to while the module runs.

    Any classifier has features this way, without being rewritten. Its logits stand for them if it
    has no linear layer, or one that does not see whole rows.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: Tensor | None = None
        head = head_of(module)
        self._hook = head.register_forward_pre_hook(self._keep) if head is not None else None

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del layer
        self._seen = inputs[0]

    def of(self, logits: Tensor) -> Tensor:
        """Features ``[rows, width]`` of the pass that gave these logits, once."""
        seen, self._seen = self._seen, None
        whole = seen is not None and seen.shape[:-1] == logits.shape[:1]
        return seen if seen is not None and whole else logits

    def close(self) -> None:
        """Listen no more."""
        if self._hook is not None:
            self._hook.remove()


def head_of(module: nn.Module) -> nn.Linear | None:
    """The last linear layer, which gives the logits of an ordinary classifier."""
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return linear[-1] if linear else None


@contextmanager
def trunk_of(module: nn.Module) -> Iterator[Trunk]:
    """Within the block, the trunk of a module; nothing is left on the module after it."""
    trunk = Trunk(module)
    try:
        yield trunk
    finally:
        trunk.close()
