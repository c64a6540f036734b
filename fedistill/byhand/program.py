"""From a module to its layers by hand, where there are such for all of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedistill.altered import altered
from fedistill.byhand.layers import Convolved, Dense, Flat, Layer
from fedistill.pooling import MaxPool


@dataclass(frozen=True)
class Program:
    """A network by hand.

    Attributes:
        layers: all but the last, in order.
        heads: linear layers that are all given what the last layer puts out.
    """

    layers: Sequence[Layer]
    heads: Sequence[Dense]
    _known: dict[torch.Size, bool] = field(default_factory=dict, repr=False)

    def takes(self, inputs: Tensor) -> bool:
        """Whether it can be given these rows: finite float32 images of a size that fits."""
        if inputs.dtype != torch.float32 or inputs.requires_grad or inputs.device.type != "cpu":
            return False
        if torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
            return False
        image = inputs.shape[1:]
        if image not in self._known:
            self._known[image] = self._fits(tuple(image))
        if not (self._known[image] and len(inputs)):
            return False
        # Zero times infinity is no zero: the shifted kernels may only meet numbers.
        return math.isfinite(torch.linalg.vector_norm(inputs.detach()))

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs of each head, ``[rows, out]``, with their gradient where that is wanted."""
        if not torch.is_grad_enabled():
            return self.forward(inputs, False)[0]
        found: tuple[Tensor, ...] = _Node.apply(self, inputs, *self.weights)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def teach(self, inputs: Tensor, slopes: Callable[..., Sequence[Tensor | None]]) -> None:
        """Add a loss's gradient to that of the weights, without any graph.

        Args:
            inputs: ``[rows, ...]``.
            slopes: from the outputs of each head to the gradient of the loss by them; None where
                it does not depend on them.
        """
        outputs, kept = self.forward(inputs, True)
        grads = self.backward(kept, slopes(*outputs))
        for weight, grad in zip(self.weights, grads, strict=True):
            if grad is not None and weight.requires_grad:
                weight.grad = grad if weight.grad is None else weight.grad + grad

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """Of all layers, in order."""
        return [weight for layer in (*self.layers, *self.heads) for weight in layer.weights]

    def forward(self, inputs: Tensor, keep: bool) -> tuple[tuple[Tensor, ...], list[Any]]:
        """Outputs ``[rows, out]``, and if asked what the layers keep for the way back."""
        hidden, kept = inputs.movedim(0, -1), []
        for layer in self.layers:
            hidden, held = layer.forward(hidden, keep)
            kept.append(held)
        ends = [head.forward(hidden, keep) for head in self.heads]
        return tuple(end.t().contiguous() for end, _ in ends), kept + [held for _, held in ends]

    def backward(self, kept: list[Any], deltas: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the weights, from those of the outputs; a head that has none learns none."""
        delta: Tensor | None = None
        ends: list[Tensor | None] = []
        for head, held, incoming in zip(self.heads, kept[len(self.layers) :], deltas, strict=True):
            if incoming is None:
                ends += [None] * len(head.weights)
                continue
            passed, grads = head.backward(held, incoming.t(), True)
            delta = passed if delta is None or passed is None else delta + passed
            ends += grads
        found: list[Tensor | None] = []
        for number in reversed(range(len(self.layers))):
            layer = self.layers[number]
            if delta is None:
                found = [*[None] * len(layer.weights), *found]
                continue
            delta, grads = layer.backward(kept[number], delta, number > 0)
            found = [*grads, *found]
        return found + ends

    def _fits(self, image: tuple[int, ...]) -> bool:
        shape: tuple[int, ...] | None = image
        for layer in (*self.layers, self.heads[0]):
            shape = None if shape is None else layer.shape(shape)
        return shape is not None


class _Node(torch.autograd.Function):
    """A network as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, program: Program, inputs: Tensor, *weights: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.program, ctx.count = program, len(weights)
        outputs, ctx.kept = program.forward(inputs, True)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *deltas: Tensor | None) -> Any:
        return (None, None, *ctx.program.backward(ctx.kept, deltas))


# --- reading a module ----------------------------------------------------------------------------


def program_of(module: nn.Module, *beside: nn.Linear, heard: object = None) -> Program | None:
    """A module by hand; None unless it is a small convolutional network of layers known here.

    Known are ``nn.Sequential`` and modules of a class that tells its layers by a method
    ``in_order``, as :class:`fedistill.models.LeNet` does: convolutions of stride 1 that are pooled,
    ReLU, flattening and linear layers, the last of which gives the logits. Kernels are larger than
    3x3: the smaller the kernel, the more zeros are multiplied, and below that PyTorch's own are
    faster. Left to PyTorch is what is altered, and a module with buffers, which no layer here has.

    Args:
        module: a classifier of images.
        beside: linear layers that are given the same features as the last one.
        heard: whose hooks do not count.
    """
    layers = list(_in_order(module))
    if not any(type(layer) is nn.Conv2d for layer in layers):
        return None
    if any(altered(layer, heard) for layer in (*module.modules(), *beside)):
        return None
    if next(module.buffers(), None) is not None:
        return None
    held = [*module.parameters(), *(weight for layer in beside for weight in layer.parameters())]
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in held):
        return None
    made: list[Layer] = []
    while layers:
        layer = _read(layers)
        if layer is None:
            return None
        made.append(layer)
    if not made or not isinstance(made[-1], Dense) or made[-1].relu:
        return None
    program = Program(made[:-1], [made[-1], *(Dense(layer, False) for layer in beside)])
    told = {id(weight) for weight in program.weights}
    return program if told == {id(weight) for weight in held} else None


def _in_order(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a module, one after another; the module itself where it does not tell."""
    told = list(module) if type(module) is nn.Sequential else _told(module)
    if told is None:
        yield module
    for layer in told or ():
        yield from _in_order(layer)


def _told(module: nn.Module) -> Sequence[nn.Module] | None:
    """What a module says ``in_order`` that it does; None where nothing, or where it may be untrue.

    One class must have written both ``in_order`` and ``forward``: whoever writes but the latter
    anew, in a class made from another, need not know that there is something to tell.
    """
    owner, author = (
        next((kind for kind in type(module).__mro__ if name in vars(kind)), None)
        for name in ("in_order", "forward")
    )
    tell = None if owner is None or owner is not author else vars(owner)["in_order"]
    # A method that has to be given something has but the name in common.
    if not inspect.isfunction(tell) or len(inspect.signature(tell).parameters) != 1:
        return None
    told = tell(module)
    return told if isinstance(told, list | tuple) else None


def _read(layers: list[nn.Module]) -> Layer | None:
    """The next layer by hand, its modules taken from the list; None where there is none."""
    first = layers.pop(0)
    if type(first) is nn.Linear:
        return Dense(first, _next(layers, _is_relu) is not None)
    if type(first) is nn.Flatten:
        return Flat() if (first.start_dim, first.end_dim) == (1, -1) else None
    if type(first) is not nn.Conv2d or not _is_plain(first):
        return None
    relu = _next(layers, _is_relu)
    if _next(layers, _is_pool) is None:
        return None
    return Convolved(first, (relu or _next(layers, _is_relu)) is not None)


def _next(layers: list[nn.Module], wanted: Any) -> nn.Module | None:
    return layers.pop(0) if layers and wanted(layers[0]) else None


def _is_relu(layer: nn.Module) -> bool:
    return type(layer) is nn.ReLU


def _is_pool(layer: nn.Module) -> bool:
    if type(layer) is MaxPool:
        return True
    if type(layer) is not nn.MaxPool2d or layer.return_indices or layer.ceil_mode:
        return False
    settings = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return all(
        found in (wanted, (wanted, wanted))
        for found, wanted in zip(settings, (2, 2, 0, 1), strict=True)
    )


def _is_plain(convolution: nn.Conv2d) -> bool:
    high, wide = convolution.kernel_size
    padding = convolution.padding
    return (
        high == wide
        and convolution.stride == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and not isinstance(padding, str)
        and padding[0] == padding[1] < high
        and high > 3
    )
