"""Layers by hand: forward keeps what backward needs; both see the rows of the batch last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedistill.byhand.patches import Geometry, collect, gather, pool, scatter, seen, spread, unpool

Grads = list[Tensor | None]
"""A gradient for each of a layer's weights."""


class Layer(Protocol):
    """One step of a network.

    Attributes:
        weights: what it learns.
    """

    @property
    def weights(self) -> Sequence[nn.Parameter]: ...  # noqa: D102

    def shape(self, given: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of its outputs without the rows; None where it cannot take such inputs."""

    def forward(self, inputs: Tensor, keep: bool) -> tuple[Tensor, Any]:
        """Outputs, and if asked what backward needs."""

    def backward(self, kept: Any, delta: Tensor, needed: bool) -> tuple[Tensor | None, Grads]:
        """Gradient of the inputs, if it is needed, and of the weights."""


@dataclass(frozen=True)
class Dense:
    """A linear layer, and ReLU.

    Attributes:
        linear: the layer.
        relu: whether ReLU follows.
    """

    linear: nn.Linear
    relu: bool

    @cached_property
    def weights(self) -> Sequence[nn.Parameter]:  # noqa: D102
        return list(self.linear.parameters())

    def shape(self, given: tuple[int, ...]) -> tuple[int, ...] | None:  # noqa: D102
        return (self.linear.out_features,) if given == (self.linear.in_features,) else None

    def forward(self, inputs: Tensor, keep: bool) -> tuple[Tensor, Any]:  # noqa: D102
        weight, bias = self.linear.weight, self.linear.bias
        # A layer without a bias has None there, whatever its type says.
        outputs = weight @ inputs if bias is None else torch.addmm(bias[:, None], weight, inputs)
        if self.relu:
            outputs.clamp_min_(0)
        return outputs, (inputs, outputs) if keep else None

    def backward(self, kept: Any, delta: Tensor, needed: bool) -> tuple[Tensor | None, Grads]:  # noqa: D102
        inputs, outputs = kept
        if self.relu:
            delta = _through_relu(delta, outputs)
        grads: Grads = [delta @ inputs.t()]
        if self.linear.bias is not None:
            grads.append(delta.sum(1))
        return self.linear.weight.t() @ delta if needed else None, grads


@dataclass(frozen=True)
class Flat:
    """``nn.Flatten``."""

    weights: Sequence[nn.Parameter] = ()

    def shape(self, given: tuple[int, ...]) -> tuple[int, ...] | None:  # noqa: D102
        return (torch.Size(given).numel(),)

    def forward(self, inputs: Tensor, keep: bool) -> tuple[Tensor, Any]:  # noqa: D102
        return inputs.reshape(-1, inputs.shape[-1]), inputs.shape

    def backward(self, kept: Any, delta: Tensor, needed: bool) -> tuple[Tensor | None, Grads]:  # noqa: D102
        return delta.reshape(kept), []


@dataclass(frozen=True)
class Convolved:
    """A convolution, 2x2 max pooling, and ReLU.

    ReLU comes last, wherever the module has it: it and max commute. In memory the lines of an image
    come first.

    Attributes:
        convolution: of stride 1.
        relu: whether ReLU follows.
    """

    convolution: nn.Conv2d
    relu: bool

    @cached_property
    def weights(self) -> Sequence[nn.Parameter]:  # noqa: D102
        return list(self.convolution.parameters())

    def shape(self, given: tuple[int, ...]) -> tuple[int, ...] | None:  # noqa: D102
        if len(given) != 3 or given[0] != self.convolution.in_channels:
            return None
        at = self._at(*given[1:])
        return (at.after, *at.windows) if min(at.windows) > 0 else None

    def forward(self, inputs: Tensor, keep: bool) -> tuple[Tensor, Any]:  # noqa: D102
        at = self._at(inputs.shape[1], inputs.shape[2])
        stripes, matrix = gather(inputs.transpose(0, 1), at), spread(self.convolution.weight, at)
        lines = seen(stripes, at)
        places = torch.bmm(matrix.expand(len(lines), -1, -1), lines)
        largest, choice = pool(places.view(at.windows[0], 2, 2, -1), keep)
        outputs = largest.view(at.windows[0], at.after, at.windows[1], -1)
        if self.convolution.bias is not None:
            outputs.add_(self.convolution.bias[:, None, None])
        if self.relu:
            outputs.clamp_min_(0)
        kept = (at, stripes, matrix, choice, outputs) if keep else None
        return outputs.transpose(0, 1), kept

    def backward(self, kept: Any, delta: Tensor, needed: bool) -> tuple[Tensor | None, Grads]:  # noqa: D102
        at, stripes, matrix, choice, outputs = kept
        delta = delta.transpose(0, 1).contiguous()
        if self.relu:
            delta = _through_relu(delta, outputs)
        wide = unpool(delta.flatten(1), choice).view(2 * at.windows[0], 2 * at.after, -1)
        products = torch.bmm(seen(stripes, at), wide.transpose(1, 2))
        grads: Grads = [collect(products.sum(0).t(), at)]
        if self.convolution.bias is not None:
            grads.append(delta.sum((0, 2, 3)))
        if not needed:
            return None, grads
        passed = torch.zeros_like(stripes)
        for line, said in zip(seen(passed, at), wide, strict=True):
            line.addmm_(matrix.t(), said)
        return scatter(passed, at).transpose(0, 1), grads

    def _at(self, height: int, width: int) -> Geometry:
        made = self.convolution
        padding = made.padding[0]
        assert isinstance(padding, int)
        sizes = made.in_channels, made.out_channels, made.kernel_size[0], padding
        return Geometry(*sizes, height, width)


def _through_relu(delta: Tensor, outputs: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.threshold_backward(delta, outputs, 0)
    return found
