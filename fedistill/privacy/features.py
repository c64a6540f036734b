"""What encoders are made of: frozen modules that learn from the public rows when they are built.

Tensors that were learnt are buffers that no state dict holds: they are made again from the rows.
Eigenvectors have their largest entry positive, so that they are the same wherever they are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.distill.public_features import PublicFeatures, squares
from fedistill.seeding import generator
from fedistill.types import FloatArray

CONSTANT = 0.1
"""The constant beside features of length 1: what a bias is for other heads."""
WIDTH = 0.35
"""Of the kernel, in median distances between public rows; .7 loses two to five points on digits."""
LANDMARKS = 500
"""Public rows whose kernels are features."""
NEIGHBOURS = 8
"""The distance to this nearest public row is the scale of distances around a row."""
NODES = 1000
"""Public rows in the graph of neighbours."""
COORDINATES = 25
"""Of a row in the graph."""
PATCH = 6
"""Side of a patch of a picture, in pixels."""
STRIDE = 2
"""Pixels between patches."""
WORDS = 100
"""Patches that others are compared with, each in both signs."""
GRID = 3
"""Cells along a side, over each of which the patches' answers are averaged."""
_PATCHES = 20000
_ITERATIONS = 8
_SOFT = 0.2
_THRESHOLD = 0.5
_NOTHING = 1e-8


class Unit(nn.Module):
    """Rows of length 1, a constant among them."""

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        rows = _unit(inputs.flatten(1))
        constant = rows.new_full((len(rows), 1), CONSTANT)
        return _unit(torch.cat([rows, constant], dim=1))


class Components(nn.Module):
    """Principal components of the public rows, each divided by the fourth root of its variance.

    Args:
        rows: ``[m, numbers]`` of the public rows.
        most: components at most.
    """

    mean: Tensor
    map: Tensor

    def __init__(self, rows: FloatArray, most: int) -> None:
        super().__init__()
        flat = rows.reshape(len(rows), -1).astype(np.float64)
        mean = flat.mean(axis=0)
        _keep(self, mean=mean, map=_components(flat - mean, most))

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return (inputs.flatten(1) - self.mean) @ self.map


class Kernel(nn.Module):
    """Points whose products are near exp(-distance^2 / 2), by the Nystroem method.

    Williams and Seeger 2001; distances are those of :class:`PublicFeatures`.

    Args:
        rows: ``[m, ...]`` public rows, in random order.
    """

    mean: Tensor
    map: Tensor
    landmarks: Tensor
    root: Tensor

    def __init__(self, rows: FloatArray) -> None:
        super().__init__()
        features = PublicFeatures.fit(rows, width=WIDTH)
        landmarks = features(rows[:LANDMARKS])
        values, vectors = np.linalg.eigh(np.exp(-squares(landmarks, landmarks) / 2))
        kept = values > values[-1] * _NOTHING
        root = _signed(vectors[:, kept]) / np.sqrt(values[kept])
        _keep(self, mean=features.mean, map=features.map, landmarks=landmarks, root=root)

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        points = (inputs.flatten(1) - self.mean) @ self.map
        return torch.exp(-_squares(points, self.landmarks) / 2) @ self.root


class Graph(nn.Module):
    """Where a row lies in the graph of nearest neighbours among the public rows.

    Diffusion maps (Coifman and Lafon 2006) with local scales (Zelnik-Manor and Perona 2004): rows
    that many short ways join have nearly the same coordinates, so that classes which are clusters
    shrink to points, and little is left for noise to confuse. A row beside the graph is the mean
    of its neighbours in it, as a step of the diffusion goes.

    Args:
        rows: ``[m, ...]`` public rows, in random order.
    """

    mean: Tensor
    map: Tensor
    nodes: Tensor
    scale: Tensor
    coordinates: Tensor

    def __init__(self, rows: FloatArray) -> None:
        super().__init__()
        features = PublicFeatures.fit(rows)
        nodes = features(rows[:NODES])
        distances = squares(nodes, nodes)
        scale = np.sqrt(np.sort(distances, axis=1)[:, min(NEIGHBOURS, len(nodes) - 1)])
        near = np.exp(-distances / np.maximum(np.outer(scale, scale), _NOTHING))
        np.fill_diagonal(near, 0)
        kept = min(2 * NEIGHBOURS, len(nodes) - 1)
        cut = -np.partition(-near, kept, axis=1)[:, kept, None]
        near = np.where(near >= cut, near, 0)
        near = np.maximum(near, near.T)
        degree = np.maximum(near.sum(axis=1), _NOTHING)
        _, vectors = np.linalg.eigh(near / np.sqrt(np.outer(degree, degree)))
        coordinates = _signed(vectors[:, ::-1][:, :COORDINATES])
        coordinates = coordinates * np.sqrt(degree.sum() / degree)[:, None]
        _keep(
            self,
            mean=features.mean,
            map=features.map,
            nodes=nodes,
            scale=scale,
            coordinates=coordinates,
        )

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        points = (inputs.flatten(1) - self.mean) @ self.map
        distances = _squares(points, self.nodes)
        nearest = min(NEIGHBOURS + 1, len(self.nodes))
        own = distances.kthvalue(nearest, dim=1).values.sqrt()
        near = torch.exp(-distances / (own[:, None] * self.scale).clamp_min(_NOTHING))
        kept, index = near.topk(min(2 * NEIGHBOURS + 1, len(self.nodes)), dim=1)
        share = kept / kept.sum(dim=1, keepdim=True).clamp_min(_NOTHING)
        return (share[:, :, None] * self.coordinates[index]).sum(dim=1)


class Patches(nn.Module):
    """How often which small patch of a picture is seen, in each cell of a grid.

    Coates, Lee and Ng 2011 (whitened patches, a dictionary by spherical k-means, soft threshold,
    both signs, averages over cells), with the square root of the averages.

    Args:
        rows: ``[m, channels, height, width]`` public pictures.
    """

    filters: Tensor
    offset: Tensor

    def __init__(self, rows: FloatArray) -> None:
        super().__init__()
        seen = torch.from_numpy(rows)
        patches = F.unfold(seen, PATCH, stride=STRIDE).transpose(1, 2)
        patches = patches.reshape(-1, patches.shape[-1])
        order = generator(0, "patches").permutation(len(patches))[:_PATCHES]
        patches = patches[torch.from_numpy(order)].double()
        soft = _SOFT * float(seen.var())
        patches = patches - patches.mean(dim=1, keepdim=True)
        power = patches.square().mean(dim=1, keepdim=True)
        patches = (patches / (power + soft).sqrt())[power[:, 0] > soft / 50]
        mean = patches.mean(dim=0)
        values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        whitening = vectors @ torch.diag((values + 0.01).rsqrt()) @ vectors.T
        filters = whitening @ _dictionary((patches - mean) @ whitening).T
        offset = mean @ filters
        # Taking the mean from a filter is taking it from the patch.
        filters = (filters - filters.mean(dim=0)).T.reshape(-1, rows.shape[1], PATCH, PATCH)
        self.soft = soft
        _keep(self, filters=filters.numpy(), offset=offset.numpy())

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        box = torch.full_like(self.filters[:1], 1 / self.filters[0].numel())
        mean = F.conv2d(inputs, box, stride=STRIDE)
        power = F.conv2d(inputs.square(), box, stride=STRIDE) - mean.square()
        seen = (
            F.conv2d(inputs, self.filters, stride=STRIDE) / (power.clamp_min(0) + self.soft).sqrt()
        )
        seen = seen - self.offset[:, None, None]
        both = torch.cat([F.relu(seen - _THRESHOLD), F.relu(-seen - _THRESHOLD)], dim=1)
        return F.adaptive_avg_pool2d(both, GRID).flatten(1).sqrt()


class Joined(nn.Module):
    """Several encoders side by side, the rows of each of length 1 times its weight."""

    def __init__(self, parts: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.weights = tuple(weights)

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        rows = [
            weight * _unit(part(inputs))
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]
        return _unit(torch.cat(rows, dim=1))


# --- arithmetic ----------------------------------------------------------------------------------


def _keep(module: nn.Module, **arrays: FloatArray) -> None:
    for name, array in arrays.items():
        value = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        module.register_buffer(name, value, persistent=False)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; one of nothing but zeros stays."""
    length = rows.square().sum(dim=1, keepdim=True).sqrt()
    return rows / length.clamp_min(_NOTHING)


def _squares(first: Tensor, second: Tensor) -> Tensor:
    """Squared distances of all pairs ``[rows of first, rows of second]``."""
    lengths = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
    return (lengths - 2 * first @ second.T).clamp_min(0)


def _signed(vectors: FloatArray) -> FloatArray:
    """Eigenvectors ``[n, k]`` have no sign of their own: the largest entry is made positive."""
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.sign(vectors[largest, np.arange(vectors.shape[1])])
    signed: FloatArray = vectors * np.where(signs == 0, 1, signs)
    return signed


def _components(centred: FloatArray, most: int) -> FloatArray:
    """``[numbers, at most most]``: principal directions over the fourth root of their variance."""
    count, numbers = centred.shape
    narrow = numbers <= count
    product = centred.T @ centred if narrow else centred @ centred.T
    values, vectors = np.linalg.eigh(product / count)
    values, vectors = values[::-1][:most], vectors[:, ::-1][:, :most]
    kept = values > _NOTHING * max(float(values[0]), _NOTHING)
    values, vectors = values[kept], vectors[:, kept]
    directions = vectors if narrow else centred.T @ vectors / np.sqrt(values * count)
    mapped: FloatArray = _signed(directions) * values**-0.25
    return mapped


def _dictionary(patches: Tensor) -> Tensor:
    """Directions ``[words, numbers]`` by spherical k-means; a patch and its negative are alike."""
    words = _unit(patches[:WORDS])
    for _ in range(_ITERATIONS):
        alike = patches @ words.T
        nearest = alike.abs().argmax(dim=1)
        weight = alike.gather(1, nearest[:, None])
        words = _unit(torch.zeros_like(words).index_add_(0, nearest, patches * weight))
    return words
