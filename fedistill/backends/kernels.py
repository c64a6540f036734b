"""Training steps of many small networks at once: forward and backward by hand, without autograd.

Linear layers with ReLU between them, of ``c`` clients with equal shapes, stacked into one tensor
``[c, out, in]`` for each layer. Rows are either each client's own, ``[c, rows, in]``, or shared by
all, ``[rows, in]``: then the first layer of all clients is one matrix product. Gradients are
sums over rows of a batch; the momentum is folded into the product that makes the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedistill.losses.soft_targets import SMALLEST


@dataclass(frozen=True)
class Stack:
    """One tensor of each kind for every layer, of all clients; also their momentum, or average.

    Attributes:
        weights: ``[c, out, in]`` of each layer, contiguous.
        biases: ``[c, out]`` of each layer.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.weights[0])

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, the weights first."""
        return (*self.weights, *self.biases)

    def first(self, count: int) -> Stack:
        """The same tensors of the first clients alone; a change in place counts."""
        if count == len(self):
            return self
        return Stack(
            tuple(weight[:count] for weight in self.weights),
            tuple(bias[:count] for bias in self.biases),
        )

    def zeros(self) -> Stack:
        """As many zeros, as a momentum begins."""
        return Stack(
            tuple(torch.zeros_like(weight) for weight in self.weights),
            tuple(torch.zeros_like(bias) for bias in self.biases),
        )


# --- forward and backward ------------------------------------------------------------------------


def forward(stack: Stack, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs ``[c, rows, out]``, and what each layer was given.

    Args:
        stack: the networks.
        rows: ``[c, rows, in]``, or ``[rows, in]`` shared by all.
    """
    given = [rows]
    outputs = _first_layer(stack, rows)
    for weight, bias in zip(stack.weights[1:], stack.biases[1:], strict=True):
        given.append(outputs.relu_())
        outputs = torch.baddbmm(bias[:, None], outputs, weight.transpose(1, 2))
    return outputs, given


def _first_layer(stack: Stack, rows: Tensor) -> Tensor:
    """Outputs of the first layer, ``[c, rows, out]``; of shared rows, a view of one product."""
    weight, bias = stack.weights[0], stack.biases[0]
    if rows.dim() == 3:
        return torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
    outputs = torch.addmm(bias.flatten(), rows, weight.flatten(0, 1).t())
    return outputs.view(len(rows), len(stack), -1).transpose(0, 1)


def backward(stack: Stack, given: Sequence[Tensor], delta: Tensor) -> list[Tensor]:
    """Gradients of each layer's outputs, ``[c, rows, out]``, from that of the last one's."""
    deltas = [delta]
    for weight, seen in zip(reversed(stack.weights[1:]), reversed(given[1:]), strict=True):
        if seen.is_contiguous():
            delta = torch.bmm(delta, weight)
        else:  # laid out as the one product of shared rows wants it
            delta = torch.empty_like(seen).copy_(torch.bmm(delta, weight))
        deltas.append(delta.mul_(seen > 0))
    return deltas[::-1]


def accumulate(
    momentum: Stack, given: Sequence[Tensor], deltas: Sequence[Tensor], keep: float
) -> None:
    """Add the gradient to ``keep`` times what is there; 0 overwrites it."""
    for weight, bias, seen, delta in zip(
        momentum.weights, momentum.biases, given, deltas, strict=True
    ):
        if seen.dim() == 3:
            weight.baddbmm_(delta.transpose(1, 2), seen, beta=keep)
        else:
            joined = delta.transpose(0, 1).reshape(len(seen), -1)
            weight.view(-1, weight.shape[2]).addmm_(joined.t(), seen, beta=keep)
        bias.mul_(keep).add_(delta.sum(1))


def clip(gradient: Stack, largest: float) -> None:
    """Scale each client's gradient to this norm, where it is longer.

    As ``torch.nn.utils.clip_grad_norm_`` does for one model.
    """
    norms = [torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in gradient.tensors()]
    length = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale = (largest / (length + 1e-6)).clamp(max=1.0)
    if bool((scale < 1.0).any()):
        for tensor in gradient.tensors():
            tensor.mul_(_along(scale, tensor))


def step(stack: Stack, momentum: Stack, rate: float | Tensor) -> None:
    """Move against the momentum, at one rate or at one for each client, ``[c]``."""
    for weight, moved in zip(stack.tensors(), momentum.tensors(), strict=True):
        if isinstance(rate, float):
            weight.add_(moved, alpha=-rate)
        else:
            weight.addcmul_(moved, _along(rate, moved), value=-1)


def fold(momentum: Stack, gradient: Stack, keep: float) -> None:
    """Add a gradient that was needed by itself (to clip it, say) to the momentum."""
    for moved, found in zip(momentum.tensors(), gradient.tensors(), strict=True):
        moved.mul_(keep).add_(found)


def decay(gradient: Stack, stack: Stack, rate: float) -> None:
    """Add weight decay to a gradient, for matrices alone as is usual."""
    for found, weight in zip(gradient.weights, stack.weights, strict=True):
        found.add_(weight, alpha=rate)


def average(averaged: Stack, stack: Stack, keep: Tensor) -> None:
    """Move each client's average towards its weights, keeping ``keep [c]`` of it."""
    for mean, weight in zip(averaged.tensors(), stack.tensors(), strict=True):
        mean.lerp_(weight, _along(1 - keep, mean))


# --- losses --------------------------------------------------------------------------------------


def soft_delta(
    logits: Tensor, targets: Tensor, weight: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """Gradient of :func:`fedistill.losses.soft_cross_entropy` by the logits.

    Args:
        logits: ``[c, rows, classes]``.
        targets: of the same shape, or ``[rows, classes]`` for all clients.
        weight: of each row, ``[c, rows]`` or ``[rows]``.
        temperature: of all rows, or of each, ``[c, rows]``.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    elif temperature == 1.0:
        probs = logits.softmax(-1)
        return probs.mul_(targets.sum(-1, keepdim=True)).sub_(targets).mul_(weight[..., None])
    probs = (logits / temperature).softmax(-1)
    found: Tensor = (probs * targets.sum(-1, keepdim=True) - targets) * weight[..., None]
    return found / temperature


def mae_delta(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Gradient of :func:`fedistill.losses.logit_mae` times the weights' sum, by the logits.

    Args:
        logits: ``[c, rows, classes]``.
        targets: of the same shape.
        weight: ``[c, rows]``; a row without weight is none.
    """
    wanted = targets.clamp_min(SMALLEST).log()
    wanted = wanted - wanted.mean(-1, keepdim=True)
    sign = (logits - logits.mean(-1, keepdim=True) - wanted).sign()
    sign = sign * (weight > 0)[..., None]
    rows = (weight > 0).sum(-1).clamp_min(1)
    scale = weight.sum(-1) / (rows * logits.shape[-1])
    return (sign - sign.mean(-1, keepdim=True)) * scale[:, None, None]


def familiar_delta(scores: Tensor, side: Tensor) -> Tensor:
    """Gradient of :func:`fedistill.losses.own_or_proxy` by the scores, ``[c, rows]``."""
    return -side * torch.sigmoid(-scores * side.sign())


# --- predicting ----------------------------------------------------------------------------------


def predict(stack: Stack, rows: Tensor, chunk: int) -> Tensor:
    """Outputs for shared rows, ``[c, rows, out]``, some rows at a time so that they stay in cache.

    Args:
        stack: the networks.
        rows: ``[rows, in]``.
        chunk: rows at a time.
    """
    found = rows.new_empty(len(stack), len(rows), stack.weights[-1].shape[1])
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        found[:, part] = forward(stack, rows[part])[0]
    return found


def _along(values: Tensor, like: Tensor) -> Tensor:
    """One value for each client, shaped to multiply its tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))
