"""Training steps of many small networks at once: forward and backward by hand, without autograd.

Linear layers with ReLU between them, of ``c`` clients with equal shapes. Rows are either each
client's own, ``[c, rows, in]``, or shared by all, ``[rows, in]``. The layouts are those in which
products and softmax are fastest: hidden layers ``[in, out]``, so that their outputs are as wide as
a register is long; the last layer ``[out, in]``, so that its outputs are ``[c, out, rows]`` and
softmax and sums run along rows and not along the few classes. Gradients are sums over rows of a
batch; the momentum is folded into the product that makes the gradient, and all tensors of a stack
lie one after another, so that a step of all of them is one operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.adamw import adamw

from fedistill.distill.optimizer import BETAS, EPSILON
from fedistill.losses.soft_targets import SMALLEST

PerClient = float | Tensor
"""One number for all clients, or one for each, ``[c]``."""
PASSES = 40
"""Multiply-adds that take as long as to read and write a weight's gradient some times."""


@dataclass(frozen=True)
class Stack:
    """One tensor of each kind for every layer, of all clients; also their momentum, or average.

    Attributes:
        weights: of each layer, contiguous: ``[c, in, out]``, of the last ``[c, out, in]``.
        biases: ``[c, out]`` of each layer.
        flat: all of them, one after another; None where they do not lie so.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    flat: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weights[0])

    @classmethod
    def blank(cls, sizes: Sequence[int], count: int, like: Tensor) -> Stack:
        """Zeros for ``count`` networks.

        Args:
            sizes: of the inputs, of each hidden layer, of the outputs.
            count: c.
            like: a tensor of their kind, on their device.
        """
        shapes = [torch.Size((count, before, after)) for before, after in pairwise(sizes)]
        shapes[-1] = torch.Size((count, sizes[-1], sizes[-2]))
        shapes += [torch.Size((count, after)) for after in sizes[1:]]
        lengths = [shape.numel() for shape in shapes]
        flat = like.new_zeros(sum(lengths))
        pieces = torch.split(flat, lengths)
        parts = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return cls(tuple(parts[: len(sizes) - 1]), tuple(parts[len(sizes) - 1 :]), flat)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, the weights first."""
        return (*self.weights, *self.biases)

    def as_modules(self) -> tuple[Tensor, ...]:
        """The weights as ``torch.nn.Linear`` has them, ``[c, out, in]``; they share memory."""
        return (*(weight.transpose(1, 2) for weight in self.weights[:-1]), self.weights[-1])

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
        *hidden, last = self.weights
        sizes = [weight.shape[1] for weight in hidden] + [last.shape[2], last.shape[1]]
        return Stack.blank(sizes, len(self), last)


# --- forward and backward ------------------------------------------------------------------------


def forward(stack: Stack, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs ``[c, out, rows]``, and what each layer was given, ``[c, rows, in]``.

    Args:
        stack: the networks.
        rows: ``[c, rows, in]``, or ``[rows, in]`` shared by all.
    """
    given = [rows]
    outputs = rows
    for weight, bias in zip(stack.weights[:-1], stack.biases[:-1], strict=True):
        outputs = torch.baddbmm(bias[:, None], _of_each(stack, outputs), weight).relu_()
        given.append(outputs)
    weight, bias = stack.weights[-1], stack.biases[-1]
    if outputs.dim() == 3:
        return torch.baddbmm(bias[..., None], weight, outputs.transpose(1, 2)), given
    # Of shared rows one product of all clients: their layers are narrow by themselves.
    joined = torch.addmm(bias.reshape(-1, 1), weight.reshape(-1, weight.shape[2]), outputs.t())
    return joined.view(*bias.shape, -1), given


def backward(stack: Stack, given: Sequence[Tensor], delta: Tensor) -> list[Tensor]:
    """Gradients of each layer's outputs from that of the last one's, ``[c, out, rows]``.

    Those of hidden layers are ``[c, rows, out]``.
    """
    deltas = [delta]
    back = delta.transpose(1, 2)
    for place in range(len(stack.weights) - 1, 0, -1):
        weight = stack.weights[place]
        back = torch.bmm(back, weight if place == len(stack.weights) - 1 else weight.mT)
        torch.ops.aten.threshold_backward.grad_input(back, given[place], 0, grad_input=back)
        deltas.append(back)
    return deltas[::-1]


def accumulate(
    momentum: Stack, given: Sequence[Tensor], deltas: Sequence[Tensor], keep: float
) -> None:
    """Add the gradient to ``keep`` times what is there; 0 overwrites it."""
    for weight, bias, seen, delta in zip(
        momentum.weights[:-1], momentum.biases[:-1], given[:-1], deltas[:-1], strict=True
    ):
        weight.baddbmm_(_of_each(momentum, seen).transpose(1, 2), delta, beta=keep)
        ones = delta.new_ones(1, 1, delta.shape[1]).expand(len(delta), -1, -1)
        bias[:, None].baddbmm_(ones, delta, beta=keep)
    weight, bias, seen, delta = momentum.weights[-1], momentum.biases[-1], given[-1], deltas[-1]
    if seen.dim() == 3:
        weight.baddbmm_(delta, seen, beta=keep)
    else:
        weight.view(-1, weight.shape[2]).addmm_(delta.reshape(-1, delta.shape[2]), seen, beta=keep)
    bias.mul_(keep).add_(delta.sum(2))


def _of_each(stack: Stack, rows: Tensor) -> Tensor:
    """Rows of each client; shared ones are not copied."""
    return rows if rows.dim() == 3 else rows.expand(len(stack), *rows.shape)


# --- clipping ------------------------------------------------------------------------------------


def clip(gradient: Stack, largest: float) -> None:
    """Scale each client's gradient to this norm, where it is longer.

    As ``torch.nn.utils.clip_grad_norm_`` does for one model.
    """
    norms = [torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in gradient.tensors()]
    _scale(gradient.tensors(), torch.linalg.vector_norm(torch.stack(norms), dim=0), largest)


def few(stack: Stack, rows: int) -> bool:
    """Whether products of so many rows cost less than a few passes over the gradient."""
    sizes = [weight.shape[1] + weight.shape[2] for weight in stack.weights]
    entries = sum(weight[0].numel() for weight in stack.weights)
    return rows * rows * sum(sizes) < PASSES * entries


def clip_deltas(given: Sequence[Tensor], deltas: Sequence[Tensor], largest: float) -> bool:
    """The same as :func:`clip` before the gradient is there, which is then never read by itself.

    Not done, and False, where a square is too large for its kind of number.

    The gradient of a layer is a sum of products of a row's inputs and deltas, and so its squared
    norm is one of products of rows with each other: sum of (x x' + 1) (d d') over all pairs of
    rows, the 1 being that of the bias.
    """
    square: Tensor | float = 0.0
    for seen, delta in zip(given, deltas, strict=True):
        by_row = delta.mT if delta is deltas[-1] else delta
        rows = torch.matmul(seen, seen.mT) + 1
        square = square + (rows * torch.bmm(by_row, by_row.mT)).sum((1, 2))
    assert isinstance(square, Tensor)
    finite = bool(square.isfinite().all())
    if finite:
        _scale(deltas, square.clamp_min(0).sqrt(), largest)
    return finite


def _scale(tensors: Sequence[Tensor], length: Tensor, largest: float) -> None:
    """Scale tensors of each client as one vector of this length is cut to the largest."""
    scale = (largest / (length + 1e-6)).clamp(max=1.0)
    if bool((scale < 1.0).any()):
        for tensor in tensors:
            tensor.mul_(_along(scale, tensor))


# --- steps ---------------------------------------------------------------------------------------


def step(stack: Stack, momentum: Stack, rate: PerClient) -> None:
    """Move against the momentum, at one rate or at one for each client."""
    if isinstance(rate, float):
        for weight, moved in _pairs(stack, momentum):
            weight.add_(moved, alpha=-rate)
        return
    for weight, moved in zip(stack.tensors(), momentum.tensors(), strict=True):
        weight.addcmul_(moved, _along(rate, moved), value=-1)


def fold(momentum: Stack, gradient: Stack, keep: float) -> None:
    """Add a gradient that was needed by itself (to clip it, say) to the momentum."""
    for moved, found in _pairs(momentum, gradient):
        moved.mul_(keep).add_(found)


def decay(gradient: Stack, stack: Stack, rate: float) -> None:
    """Add weight decay to a gradient, for matrices alone as is usual."""
    for found, weight in zip(gradient.weights, stack.weights, strict=True):
        found.add_(weight, alpha=rate)


def adam(
    stack: Stack,
    gradient: Stack,
    moments: Sequence[Stack],
    taken: Sequence[float],
    rates: Sequence[float],
    decay: float = 0.0,
    decoupled: bool = False,
) -> None:
    """One step of Adam, by ``torch.optim``'s kernel that reads and writes everything once.

    Args:
        stack: what moves.
        gradient: along it.
        moments: means of the gradient, and of its square.
        taken: how many steps each client has taken before.
        rates: learning rate of each.
        decay: of matrices.
        decoupled: decay as AdamW does.
    """
    alike = len({*zip(taken, rates, strict=True)}) == 1
    groups = [slice(None)] if alike else [slice(k, k + 1) for k in range(len(stack))]
    for group, count, rate in zip(groups, taken, rates, strict=False):
        for kind, rotten in (("weights", decay), ("biases", 0.0)):
            moved, found, mean, square = (
                [tensor[group] for tensor in getattr(each, kind)]
                for each in (stack, gradient, *moments)
            )
            steps = [torch.tensor(count, device=moved[0].device) for _ in moved]
            take = adamw if decoupled else torch_adam
            take(
                moved,
                found,
                mean,
                square,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=rate,
                weight_decay=rotten,
                eps=EPSILON,
                maximize=False,
            )


def average(averaged: Stack, stack: Stack, keep: PerClient) -> None:
    """Move each client's average towards its weights, keeping ``keep`` of it."""
    if isinstance(keep, float):
        for mean, weight in _pairs(averaged, stack):
            mean.lerp_(weight, 1 - keep)
        return
    for mean, weight in zip(averaged.tensors(), stack.tensors(), strict=True):
        mean.lerp_(weight, _along(1 - keep, mean))


def for_each(values: Sequence[float], stack: Stack) -> PerClient:
    """The one number that all clients have, which is faster, or a tensor of theirs."""
    if all(value == values[0] for value in values):
        return values[0]
    return torch.tensor(values, dtype=stack.weights[0].dtype, device=stack.weights[0].device)


def _pairs(one: Stack, other: Stack) -> list[tuple[Tensor, Tensor]]:
    """Tensors of two stacks of one shape side by side, whole where both lie so."""
    if one.flat is not None and other.flat is not None:
        return [(one.flat, other.flat)]
    return list(zip(one.tensors(), other.tensors(), strict=True))


# --- losses --------------------------------------------------------------------------------------


def soft_delta(
    logits: Tensor, targets: Tensor, weight: Tensor, temperature: PerClient = 1.0
) -> Tensor:
    """Gradient of :func:`fedistill.losses.soft_cross_entropy` by the logits.

    Args:
        logits: ``[c, classes, rows]``.
        targets: of the same shape, or ``[classes, rows]`` for all clients.
        weight: of each row, ``[c, rows]`` or ``[rows]``.
        temperature: of all rows, or of each, ``[c, rows]``.
    """
    weight = weight.unsqueeze(-2)
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-2)
    elif temperature == 1.0:
        delta = logits.softmax(1).mul_(targets.sum(-2, keepdim=True).mul_(weight))
        return delta.addcmul_(targets, weight, value=-1)
    probs = (logits / temperature).softmax(1)
    found: Tensor = (probs * targets.sum(-2, keepdim=True) - targets) * weight
    return found / temperature


def mae_delta(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Gradient of :func:`fedistill.losses.logit_mae` times the weights' sum, by the logits.

    Args:
        logits: ``[c, classes, rows]``.
        targets: of the same shape.
        weight: ``[c, rows]``; a row without weight is none.
    """
    wanted = targets.clamp_min(SMALLEST).log()
    wanted = wanted - wanted.mean(1, keepdim=True)
    sign = (logits - logits.mean(1, keepdim=True) - wanted).sign()
    sign = sign * (weight > 0)[:, None]
    rows = (weight > 0).sum(-1).clamp_min(1)
    scale = weight.sum(-1) / (rows * logits.shape[1])
    return (sign - sign.mean(1, keepdim=True)) * scale[:, None, None]


def familiar_delta(scores: Tensor, side: Tensor) -> Tensor:
    """Gradient of :func:`fedistill.losses.own_or_proxy` by the scores, ``[c, rows]``."""
    return -side * torch.sigmoid(-scores * side.sign())


# --- predicting ----------------------------------------------------------------------------------


def predict(stack: Stack, rows: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Outputs for shared rows, some rows at a time so that they stay in cache.

    Args:
        stack: the networks.
        rows: ``[rows, in]``.
        chunk: rows at a time.

    Yields:
        Which rows, and the outputs for them, ``[c, out, rows]``.
    """
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        yield part, forward(stack, rows[part])[0]


def _along(values: Tensor, like: Tensor) -> Tensor:
    """One value for each client, shaped to multiply its tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))
