"""Norms of the gradients of single rows, and their clipped sum, from one backward pass.

A layer that multiplies a weight with what it is given has for row i the gradient
``sum over positions t of d_t a_t^T``: a is what it was given, d the gradient of the row's loss by
what it gave. With one position its norm is ``|d| |a|``, and no gradient is formed (Goodfellow,
arXiv 1510.01799). With L positions its square is ``sum over t, u of (a_t . a_u) (d_t . d_u)``, for
which two Gram matrices of L x L do (Li et al., arXiv 2110.05679); where they are larger than the
gradient itself, that is formed, layer by layer (Bu et al., arXiv 2205.10683). Rows of d times their
factors then give the clipped sum in one product: the second backward pass of ghost clipping falls
away, as in Bu et al., arXiv 2210.00038.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from fedistill.altered import altered
from fedistill.privacy.rowwise import Unsuited

_weight_gradient: Callable[..., Tensor] = conv2d_weight

Sums: TypeAlias = dict[nn.Parameter, Tensor]

CHUNK_VALUES = 1 << 20
"""Of what is formed on the way, at once: 4 MB stay in the cache."""

KEPT_VALUES = 1 << 24
"""Of the gradients of single rows that are kept for the sum, of one layer: 64 MB."""

ROUNDING = 2.0**-24
"""Of float32: a sum of n terms in any order is off by n times this, of the sum of their sizes."""

TINY = 1e-32
"""Added to a square: what float32 loses of smaller ones must not make a long gradient short.

As much as a million products that are each set to zero below 1.2e-38.
"""

LONG = 1 << 14
"""Values whose length is measured in double: added up in float32, a million lose 0.2 % of it."""

DTYPES = (torch.float32, torch.float64)
"""Of weights that can be measured: in half precision norms are off by more than a norm may be."""


@dataclass(frozen=True)
class Measured:
    """What one layer's weights have of the gradients of single rows.

    Attributes:
        squares: of their norms, ``[rows]``.
        summed: from a factor for each row to the sums over rows.
    """

    squares: Tensor
    summed: Callable[[Tensor], Sums]


def known(layer: nn.Module) -> bool:
    """Whether a layer's gradients can be measured here: a plain layer of a known kind."""
    learns = {
        name: weight.dtype
        for name, weight in layer.named_parameters(recurse=False)
        if weight.requires_grad
    }
    return (
        type(layer) in KINDS
        and learns.keys() <= {"weight", "bias"}
        and set(learns.values()) <= set(DTYPES)
        and _PLAIN.get(type(layer), lambda layer: True)(layer)
        and not altered(layer)
    )


def measure(layer: nn.Module, seen: Tensor, delta: Tensor) -> Measured:
    """Measure the gradients of single rows.

    Args:
        layer: a known one.
        seen: what it was given, ``[rows, ...]``.
        delta: gradients of the rows' losses by what it gave, ``[rows, ...]``.

    Raises:
        Unsuited: these are not rows of such a layer.
    """
    return KINDS[type(layer)](layer, seen, delta)


def squared_lengths(seen: Tensor, delta: Tensor, *, weight: bool = True, bias: bool) -> Tensor:
    """Squared norms of ``d a^T``, and of d for the bias, over the last dimension of both.

    Args:
        seen: ``[..., rows, in]``.
        delta: ``[..., rows, out]``.
        weight: whether the matrix learns.
        bias: whether there is a bias that learns.
    """
    by_weight = _square(seen) if weight else 0.0
    return (_square(delta) + TINY) * (by_weight + (1.0 if bias else TINY))


# --- layers --------------------------------------------------------------------------------------


def _linear(layer: Any, seen: Tensor, delta: Tensor) -> Measured:
    if delta.dim() < 2:
        raise Unsuited
    if delta.dim() > 2:
        return _linear_at_positions(layer, seen.flatten(1, -2), delta.flatten(1, -2))
    weight, bias = _learns(layer.weight), _learns(layer.bias)

    def summed(factors: Tensor) -> Sums:
        scaled = delta * factors[:, None]
        found: Sums = {}
        if weight:
            found[layer.weight] = scaled.t() @ seen
        if bias:
            found[layer.bias] = scaled.sum(0)
        return found

    return Measured(squared_lengths(seen, delta, weight=weight, bias=bias), summed)


def _linear_at_positions(layer: Any, seen: Tensor, delta: Tensor) -> Measured:
    parts = [_rows(layer.bias, delta.sum(1))] if _learns(layer.bias) else []
    if _learns(layer.weight):

        def product(factors: Tensor) -> Tensor:
            scaled = delta * factors[:, None, None]
            return scaled.flatten(0, 1).t() @ seen.flatten(0, 1)

        def factored(rows: slice) -> tuple[Tensor, Tensor]:
            return seen[rows], delta[rows]

        sizes = delta.shape[1], seen.shape[2], delta.shape[2]
        parts.append(_matrix(layer.weight, len(seen), 1, sizes, factored, product))
    return _joined(parts)


def _convolution(layer: Any, seen: Tensor, delta: Tensor) -> Measured:
    if delta.dim() != 4:
        raise Unsuited
    parts = [_rows(layer.bias, delta.sum((2, 3)))] if _learns(layer.bias) else []
    if _learns(layer.weight):
        groups = layer.groups
        places = delta.shape[2] * delta.shape[3]
        inputs, outputs = layer.weight[0].numel(), layer.out_channels // groups
        high, wide = layer.padding
        padded = F.pad(seen, (wide, wide, high, high)) if high or wide else seen

        def product(factors: Tensor) -> Tensor:
            scaled = delta * factors[:, None, None, None]
            how = layer.stride, layer.padding, layer.dilation, groups
            return _weight_gradient(seen, layer.weight.shape, scaled, *how)

        def factored(rows: slice) -> tuple[Tensor, Tensor]:
            windows = _windows(padded[rows], layer).reshape(-1, inputs, places)
            return windows.transpose(1, 2), delta[rows].reshape(-1, outputs, places).transpose(1, 2)

        sizes = places, inputs, outputs
        parts.append(_matrix(layer.weight, len(seen), groups, sizes, factored, product))
    return _joined(parts)


def _windows(padded: Tensor, layer: Any) -> Tensor:
    """Of each place what a kernel sees there, a view ``[rows, in, kernel, kernel, high, wide]``.

    Copied from here it takes half the time of ``F.unfold``.
    """
    (high, wide), (down, right) = layer.kernel_size, layer.stride
    below, beside = layer.dilation
    rows, channels, tall, broad = padded.shape
    first, second, third, fourth = padded.stride()
    return padded.as_strided(
        (
            rows,
            channels,
            high,
            wide,
            (tall - below * (high - 1) - 1) // down + 1,
            (broad - beside * (wide - 1) - 1) // right + 1,
        ),
        (first, second, below * third, beside * fourth, down * third, right * fourth),
    )


def _group_norm(layer: Any, seen: Tensor, delta: Tensor) -> Measured:
    even = F.group_norm(seen, layer.num_groups, eps=layer.eps)
    places = (*seen.shape[:2], -1)
    return _norm(layer, (even * delta).reshape(places), delta.reshape(places), 2)


def _layer_norm(layer: Any, seen: Tensor, delta: Tensor) -> Measured:
    shape = tuple(layer.normalized_shape)
    if delta.dim() <= len(shape):
        raise Unsuited
    even = F.layer_norm(seen, shape, eps=layer.eps)
    places = (len(seen), -1, *shape)
    return _norm(layer, (even * delta).reshape(places), delta.reshape(places), 1)


def _norm(layer: Any, weight: Tensor, bias: Tensor, places: int) -> Measured:
    """Of a scale and a shift, whose gradients at single places lie along one dimension."""
    pairs = ((layer.weight, weight), (layer.bias, bias))
    return _joined([_rows(held, found.sum(places)) for held, found in pairs if _learns(held)])


def _embedding(layer: Any, seen: Tensor, delta: Tensor) -> Measured:
    """Like a product with rows of zeros and a one."""
    if delta.dim() < 2:
        raise Unsuited
    rows, width = len(delta), delta.shape[-1]
    delta, seen = delta.reshape(rows, -1, width), seen.reshape(rows, -1)
    places = delta.shape[1]

    def square(part: slice) -> Tensor:
        same = (seen[part, :, None] == seen[part, None, :]).to(delta.dtype)
        lengths = _length(delta[part])
        return _gram(
            same, delta[part], _lost(torch.ones_like(lengths), lengths, width + 3 * places)
        )

    def summed(factors: Tensor) -> Sums:
        scaled = (delta * factors[:, None, None]).flatten(0, 1)
        return {layer.weight: torch.zeros_like(layer.weight).index_add_(0, seen.flatten(), scaled)}

    return Measured(_in_chunks(rows, places**2, square, delta), summed)


Kind: TypeAlias = Callable[[Any, Tensor, Tensor], Measured]

KINDS: Mapping[type[nn.Module], Kind] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
"""How the gradients of a kind of layer are measured."""

_PLAIN: Mapping[type[nn.Module], Callable[[Any], bool]] = {
    nn.Conv2d: lambda layer: layer.padding_mode == "zeros" and not isinstance(layer.padding, str),
    nn.Embedding: lambda layer: (
        layer.padding_idx is None
        and layer.max_norm is None
        and not layer.sparse
        and not layer.scale_grad_by_freq
    ),
}

# --- weights -------------------------------------------------------------------------------------


def _matrix(
    weight: nn.Parameter,
    rows: int,
    groups: int,
    sizes: tuple[int, int, int],
    factored: Callable[[slice], tuple[Tensor, Tensor]],
    product: Callable[[Tensor], Tensor],
) -> Measured:
    """A weight that is used at several positions.

    Args:
        weight: ``[groups * out, in]``, or a shape with as many values.
        rows: how many.
        groups: blocks of the weight, each of which sees a part of the inputs.
        sizes: positions, inputs and outputs of a group.
        factored: of some rows what the weight saw ``[rows * groups, positions, in]``, and d.
        product: from factors to the sum over rows.
    """
    places, inputs, outputs = sizes
    values = groups * inputs * outputs
    if 2 * places**2 < inputs * outputs:

        def square(part: slice) -> Tensor:
            seen, delta = factored(part)
            lost = _lost(_length(seen), _length(delta), inputs + outputs + 3 * places)
            found = _gram(torch.bmm(seen, seen.transpose(1, 2)), delta, lost)
            return found.view(-1, groups).sum(1)

        each = groups * places * (inputs + 2 * places)
        squares = _in_chunks(rows, each, square, weight)
    elif rows * values <= KEPT_VALUES:
        kept = weight.new_empty(rows * groups, outputs, inputs)
        for part in _chunks(rows, groups * places * inputs):
            seen, delta = factored(part)
            within = slice(part.start * groups, part.stop * groups)
            torch.bmm(delta.transpose(1, 2), seen, out=kept[within])
        return _rows(weight, kept.view(rows, values))
    else:

        def square(part: slice) -> Tensor:
            seen, delta = factored(part)
            found = torch.bmm(delta.transpose(1, 2), seen).square_().sum((1, 2))
            return (found + _lost(_length(seen), _length(delta), places)).view(-1, groups).sum(1)

        each = values + groups * places * inputs
        squares = _in_chunks(rows, each, square, weight)
    return Measured(squares, lambda factors: {weight: product(factors)})


def _gram(seen: Tensor, delta: Tensor, lost: Tensor) -> Tensor:
    """Squared norms from the products of all positions, ``[rows]``.

    Args:
        seen: products of what two positions saw, ``[rows, positions, positions]``.
        delta: ``[rows, positions, out]``.
        lost: what rounding may have taken away, ``[rows]``.
    """
    found: Tensor = (seen * torch.bmm(delta, delta.transpose(1, 2))).sum(2).sum(1)
    return found.clamp_min(0.0) + lost


def _lost(seen: Tensor, delta: Tensor, terms: int) -> Tensor:
    """What rounding may take from the squared norm of a sum over positions, ``[rows]``.

    Terms that cancel leave their rounding behind, and small ones are absorbed by large ones: a long
    gradient could pass for a short one. With ``S = sum over t of |d_t| |a_t|``, u = 2^-24 and L
    positions: a dot product of n terms, in any order, is off by n u times the product of the two
    lengths (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), so the products
    ``a_t . a_u`` and ``d_t . d_u`` take (in + out) u S^2 from the square, and the sum over t and
    then over u takes 2 L u S^2. The sum that is released rounds as well, by L u S: of a gradient g
    at most ``|g| + L u S`` comes of it, whose square is at most ``(1 + L u) (|g|^2 + L u S^2)``.
    With (in + out + 3 L) u S^2 added, no row adds more than (1 + L u / 2) C. Where the gradient
    itself was formed, it and the sum are off by L u S each, and L u S^2 leaves (1 + 2 L u) C.
    Where products are set to zero, ``a_t . a_u`` and ``d_t . d_u`` lose TINY each, hence the square
    TINY times what the others add up to.

    A norm grows by 1e-5 where a third is left of S with 40 terms in all; where nothing is left, a
    row is clipped as if it had some 1e-3 of S.

    Args:
        seen: lengths of a, ``[rows, positions]``.
        delta: lengths of d, ``[rows, positions]``.
        terms: in + out + 3 L, or L where the gradient itself was formed.
    """
    rounded: Tensor = (seen * delta).sum(1).square() * (ROUNDING * terms)
    least = math.sqrt(TINY)  # its square times theirs might be too large
    sizes = (seen.sum(1) * least).square() + (delta.sum(1) * least).square()
    return rounded + sizes + TINY * seen.shape[1] ** 2


def _rows(weight: nn.Parameter, found: Tensor) -> Measured:
    """A weight whose gradients for single rows are at hand."""
    flat = found.flatten(1)
    return Measured(_square(flat), lambda factors: {weight: (factors @ flat).view(weight.shape)})


def _joined(parts: list[Measured]) -> Measured:
    def summed(factors: Tensor) -> Sums:
        found: Sums = {}
        for part in parts:
            found |= part.summed(factors)
        return found

    return Measured(torch.stack([part.squares for part in parts]).sum(0), summed)


def _length(values: Tensor) -> Tensor:
    """Along the last dimension."""
    if values.shape[-1] > LONG:
        exact: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
        return exact.to(values.dtype)
    found: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return found


def _square(values: Tensor) -> Tensor:
    """Of the length along the last dimension."""
    return _length(values).square_()


def _learns(weight: nn.Parameter | None) -> bool:
    return weight is not None and weight.requires_grad


def _in_chunks(rows: int, each: int, square: Callable[[slice], Tensor], like: Tensor) -> Tensor:
    """``[rows]``, some rows at a time; ``each`` is how many values one takes on the way."""
    found = [square(part) for part in _chunks(rows, each)]
    return torch.cat(found) if found else like.new_zeros(0)


def _chunks(rows: int, each: int) -> Iterator[slice]:
    size = max(1, CHUNK_VALUES // max(1, each))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
