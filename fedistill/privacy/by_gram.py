"""Clipped sums from one forward and one backward pass, without Opacus.

A layer tells what it was given, and autograd the gradients by what it gave: from these come norms
and sums (:mod:`fedistill.privacy.gram`). Right only where a weight takes part in the loss through
one use of its layer, which is looked for in the graph of every pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fedistill.altered import altered
from fedistill.models import layers_of
from fedistill.privacy import gram, stacked
from fedistill.privacy.gram import Measured, Sums
from fedistill.privacy.rowwise import (
    Part,
    RowLoss,
    Unsuited,
    cross_entropy,
    factors_of,
    losses_of,
    taught,
)


def measurable(module: nn.Module) -> bool:
    """Whether every weight that learns is in one layer alone, and that of a known kind.

    How layers are used shows when they are.
    """
    owned: list[int] = []
    for layer in module.modules():
        own = [id(w) for w in layer.parameters(recurse=False) if w.requires_grad]
        if own and not gram.known(layer):
            return False
        owned += own
    return bool(owned) and len(set(owned)) == len(owned)


@dataclass(frozen=True)
class Use:
    """A layer at work.

    Attributes:
        seen: what it was given.
        version: how often that had been written to.
        edge: where its output is in the graph, whatever is written over it later.
    """

    seen: Tensor
    version: int
    edge: Any


class ByGram:
    """An engine: listens to the layers of a module for one pass.

    Args:
        module: what learns.
        loss: of rows.
        clip: largest norm of a row's gradient.
    """

    def __init__(self, module: nn.Module, loss: RowLoss, clip: float) -> None:
        self.module, self.loss, self.clip = module, loss, clip
        self._weights = taught(module)
        self._handles: dict[nn.Module, RemovableHandle] = {}
        self._uses: dict[nn.Module, list[Use]] | None = None

    def open(self) -> None:
        """Listen to the layers that learn."""
        if not measurable(self.module):
            raise Unsuited
        for layer in self.module.modules():
            if any(weight.requires_grad for weight in layer.parameters(recurse=False)):
                self._handles[layer] = layer.register_forward_hook(self._hear)

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def add(self, part: Part, to: Sequence[Tensor], share: float) -> None:
        """Add the sum of the rows' clipped gradients, times ``share``."""
        layers = self._measure(part)
        factors = factors_of(_norms(layers), self.clip)
        found: Sums = {}
        for layer in layers:
            found |= layer.summed(factors)
        for total, weight in zip(to, self._weights, strict=True):
            total.add_(found[weight], alpha=share)

    def norms(self, part: Part) -> Tensor:
        """Of the gradients of the rows, ``[rows]``."""
        return _norms(self._measure(part))

    def usable(self, part: Part) -> Tensor:
        """Whether the gradient of each row is finite, ``[rows]``."""
        return self.norms(part).isfinite()

    # --- inside --------------------------------------------------------------------------------

    def _hear(self, layer: nn.Module, given: tuple[Tensor, ...], gave: Tensor) -> None:
        if self._uses is None:  # somebody asks the module between two passes
            return
        plain = len(given) == 1 and isinstance(gave, Tensor) and gave.requires_grad
        if not plain or torch.is_autocast_enabled(gave.device.type):
            raise Unsuited
        use = Use(given[0].detach(), given[0]._version, get_gradient_edge(gave))
        self._uses.setdefault(layer, []).append(use)

    def _measure(self, part: Part) -> list[Measured]:
        if part[2] is not None or any(altered(layer, self) for layer in self._handles):
            raise Unsuited
        uses: dict[nn.Module, list[Use]] = {}
        self._uses = uses
        try:
            losses = losses_of(self.module, self.loss, part)
            self._check_graph(losses, uses)
            edges = [use[0].edge for use in uses.values()]
            deltas = torch.autograd.grad(losses.sum(), edges, allow_unused=True)
            self._check_uses(uses)  # a layer may also be used on the way back
        finally:
            self._uses = None
        with torch.no_grad():
            return [
                _measured(layer, use, delta, losses)
                for (layer, (use,)), delta in zip(uses.items(), deltas, strict=True)
            ]

    def _check_graph(self, losses: Tensor, uses: Mapping[nn.Module, Sequence[Use]]) -> None:
        """Each weight is reached once, by the one use of its layer."""
        self._check_uses(uses)
        reached = _leaves(losses)
        if any(reached[id(weight)] != 1 for weight in self._weights):
            raise Unsuited

    def _check_uses(self, uses: Mapping[nn.Module, Sequence[Use]]) -> None:
        """Each layer was used once."""
        if any(len(uses.get(layer, ())) != 1 for layer in self._handles):
            raise Unsuited


def _measured(layer: nn.Module, use: Use, delta: Tensor | None, losses: Tensor) -> Measured:
    if delta is None or use.seen._version != use.version:
        raise Unsuited
    if losses.dim() == 0 or not use.seen.shape[:1] == delta.shape[:1] == losses.shape:
        raise Unsuited
    seen = use.seen
    seen = seen.to(delta.dtype) if seen.is_floating_point() else seen.long()
    return gram.measure(layer, seen, delta)


def _norms(layers: list[Measured]) -> Tensor:
    return torch.stack([layer.squares for layer in layers]).sum(0).sqrt()


def _leaves(tensor: Tensor) -> Counter[int]:
    """How often each leaf is used in the graph of this tensor, by its id."""
    found: Counter[int] = Counter()
    waiting, met = [tensor.grad_fn], {tensor.grad_fn}
    while waiting:
        node = waiting.pop()
        for before, _ in () if node is None else node.next_functions:
            leaf = getattr(before, "variable", None)
            if leaf is not None:
                found[id(leaf)] += 1
            elif before not in met:
                met.add(before)
                waiting.append(before)
    return found


class ByHand:
    """An engine for stacks of linear layers, cross-entropy and nothing else: without autograd.

    Args:
        module: one that has :func:`fedistill.models.layers_of`.
        clip: largest norm of a row's gradient.
    """

    def __init__(self, module: nn.Module, clip: float) -> None:
        self.module, self.clip = module, clip

    def open(self) -> None:
        """See that it is still such a stack."""
        self._layers()

    def close(self) -> None:
        """Nothing listens."""

    @torch.no_grad()
    def add(self, part: Part, to: Sequence[Tensor], share: float) -> None:
        """Add the sum of the rows' clipped gradients, times ``share``."""
        found = self._pass(part)
        factors = factors_of(found.norms(), self.clip) * share
        found.add_to([tensor[None] for tensor in to], factors)

    @torch.no_grad()
    def norms(self, part: Part) -> Tensor:
        """Of the gradients of the rows, ``[rows]``."""
        return self._pass(part).norms()[0]

    def usable(self, part: Part) -> Tensor:
        """Whether the gradient of each row is finite, ``[rows]``."""
        return self.norms(part).isfinite()

    def _pass(self, part: Part) -> stacked.Pass:
        inputs, labels, owner = part
        if owner is not None or torch.is_autocast_enabled(inputs.device.type):
            raise Unsuited
        layers = self._layers()
        weights = [layer.weight.detach()[None] for layer in layers]
        biases = [layer.bias.detach()[None] for layer in layers]
        return stacked.through(weights, biases, inputs.flatten(1)[None], labels[None])

    def _layers(self) -> list[nn.Linear]:
        layers = layers_of(self.module)
        if layers is None:
            raise Unsuited
        return layers


def gram_engine(module: nn.Module, loss: RowLoss, clip: float) -> ByGram | ByHand:
    """The faster one of those that are right."""
    if loss is cross_entropy and layers_of(module) is not None:
        return ByHand(module, clip)
    return ByGram(module, loss, clip)
