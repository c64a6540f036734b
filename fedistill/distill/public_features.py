"""Features of inputs in which distance has a meaning, learnt from the public rows alone.

Every client that holds the same public rows computes the same features, and nothing about its own
rows goes into them. Figures: see :mod:`fedistill.distill.density`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from fedistill.errors import DataError
from fedistill.seeding import generator
from fedistill.types import FloatArray, ProxySet

COMPONENTS = 50
"""Principal components; rows of no more numbers than this are only standardised. 30
(.78) and 100 (.76) do about as well as 50 (.79)."""
WIDTH = 0.5
"""Of the kernel, in median distances between public rows. .35 gives .74, .7 gives .78."""
BASIS = 1000
"""Public rows that densities are fitted on."""
LANDMARKS = 300
"""Those of them whose kernels are the features of the logistic regression."""
_BLOCK = 1024
_PAIRS = 500
_FITTED = 2000
_NOTHING = 1e-10


@dataclass(frozen=True, eq=False)
class PublicFeatures:
    """From inputs to features in which distance has a meaning, learnt from public rows alone.

    Pixels are a poor metric, so rows of many numbers become principal components, each divided by
    the fourth root of its variance: half way (.79) between the plain distance (.75) and the
    whitened one (.77), in which noise counts as much as shape. Short rows are standardised. All is
    divided by the kernel's width, so that the kernel is exp(-distance^2 / 2).

    Attributes:
        mean: ``[numbers]``, of the public rows.
        map: ``[numbers, features]``; what does not vary among the public rows has no feature.
        basis: ``[at most BASIS, features]`` features of public rows that densities are fitted on.
    """

    mean: FloatArray
    map: FloatArray
    basis: FloatArray

    @classmethod
    def fit(
        cls,
        public: FloatArray,
        *,
        components: int = COMPONENTS,
        width: float = WIDTH,
        seed: int = 0,
    ) -> PublicFeatures:
        """Learn the features.

        Args:
            public: ``[m, ...]`` public rows.
            components: of rows with more numbers than this.
            width: of the kernel, in median distances between public rows.
            seed: which rows are looked at where there are many; the same for all clients.

        Raises:
            DataError: no rows.
        """
        if not len(public):
            raise DataError("density: expected public rows, found none: raise [proxy] rows")
        # Never in the order of the source, which may be that of the classes.
        order = generator(seed, "basis").permutation(len(public))
        seen = _flat(public[order[:_FITTED]])
        mean = seen.mean(axis=0)
        linear = _principal(seen - mean, components)
        some = (seen[:_PAIRS] - mean) @ linear
        distances = np.sqrt(squares(some, some))
        usual = _median(distances[np.triu_indices(len(distances), 1)])
        unscaled = cls(mean, linear / (usual * width), np.empty(0))
        return cls(mean, unscaled.map, unscaled(public[order[:BASIS]]))

    def __call__(self, inputs: FloatArray) -> FloatArray:
        """Features ``[rows, features]`` of inputs ``[rows, ...]``, float64."""
        shape = self.map.shape[1:]
        return blockwise(lambda part: (_flat(part) - self.mean) @ self.map, inputs, shape)

    @cached_property
    def gram(self) -> FloatArray:
        """Kernel among the basis ``[basis, basis]``."""
        return kernel(self.basis, self.basis)

    @cached_property
    def root(self) -> FloatArray:
        """Inverse square root of the kernel among the landmarks, ``[landmarks, rank]``."""
        count = min(LANDMARKS, len(self.basis))
        values, vectors = np.linalg.eigh(self.gram[:count, :count])
        kept = values > values[-1] * _NOTHING
        rooted: FloatArray = vectors[:, kept] / np.sqrt(values[kept])
        return rooted

    def embed(self, features: FloatArray) -> FloatArray:
        """Features as points of the unit ball, whose products come near the kernel, and a constant.

        Williams and Seeger, the Nystroem method, 2001. A point is no longer than sqrt(k(v, v)) = 1
        whatever the row: nothing about private rows goes into the scale.

        Args:
            features: ``[rows, features]``.

        Returns:
            ``[rows, rank + 1]``, no row longer than 1.
        """
        points = kernel(features, self.basis[: len(self.root)]) @ self.root
        joined: FloatArray = np.hstack([points, np.ones((len(points), 1))]) / np.sqrt(2)
        return joined


@lru_cache(maxsize=2)
def features_of(proxy: ProxySet) -> PublicFeatures:
    """The features of a proxy set, computed once for all clients that hold it."""
    return PublicFeatures.fit(proxy.inputs)


def kernel(first: FloatArray, second: FloatArray) -> FloatArray:
    """exp(-distance^2 / 2) of all pairs ``[rows of first, rows of second]``."""
    near: FloatArray = np.exp(-squares(first, second) / 2)
    return near


def squares(first: FloatArray, second: FloatArray) -> FloatArray:
    """Squared distances of all pairs, as |a|^2 + |b|^2 - 2ab: no ``[a, b, d]`` is ever held."""
    lengths = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1)
    apart: FloatArray = np.maximum(lengths - 2 * first @ second.T, 0)
    return apart


def blockwise(
    function: Callable[[FloatArray], FloatArray], rows: FloatArray, shape: tuple[int, ...] = ()
) -> FloatArray:
    """The function applied to some rows at a time, so that memory stays bounded.

    Args:
        function: from rows to ``[rows, *shape]``.
        rows: ``[n, ...]``.
        shape: of what comes out for a row.
    """
    parts = [function(rows[at : at + _BLOCK]) for at in range(0, len(rows), _BLOCK)]
    return np.concatenate(parts) if parts else np.empty((0, *shape))


def _flat(inputs: FloatArray) -> FloatArray:
    return np.asarray(inputs, dtype=np.float64).reshape(len(inputs), -1)


def _principal(centred: FloatArray, components: int) -> FloatArray:
    """``[numbers, features]``: columns standardised if they are few, else half-whitened components.

    The decomposition is that of the smaller of the two products, of columns or of rows; signs and
    rotations do not matter to distances.
    """
    count, numbers = centred.shape
    if numbers <= components:
        deviation = centred.std(axis=0)
        kept = deviation > _NOTHING * max(float(deviation.max(initial=0)), 1.0)
        scaled: FloatArray = np.eye(numbers)[:, kept] / deviation[kept]
        return scaled
    narrow = numbers <= count
    product = centred.T @ centred if narrow else centred @ centred.T
    values, vectors = np.linalg.eigh(product / count)
    values, vectors = values[::-1][:components], vectors[:, ::-1][:, :components]
    kept = values > _NOTHING * max(float(values[0]), 1.0)
    values, vectors = values[kept], vectors[:, kept]
    directions = vectors if narrow else centred.T @ vectors / np.sqrt(values * count)
    mapped: FloatArray = directions * values**-0.25
    return mapped


def _median(distances: FloatArray) -> float:
    """The median; of rows that are mostly alike the mean; of rows all alike 1."""
    usual = float(np.median(distances)) if len(distances) else 0.0
    return usual or (float(distances.mean()) if len(distances) else 0.0) or 1.0
