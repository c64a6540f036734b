"""How familiar a row is to a client, from inputs alone: log density ratio of own to public rows.

The network's own output for it (:class:`fedistill.distill.torch_student.WithFamiliarity`) needs a
network and its training; these estimators need neither labels nor a model, so a client can choose
which proxy rows to answer before it has learnt anything. Both stand on features that come from the
public rows alone (:mod:`fedistill.distill.public_features`).

Figures are of the setting of ``simulations/fashion10.toml`` with one class a client: the share of
answered pairs (client, proxy row) in which the client owns the row's class, where each client
answers rows that score no lower than three quarters of its held-out own rows. At random it is .10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedistill.aggregate.evidence import FAMILIARITY_LIMIT
from fedistill.distill.public_features import PublicFeatures, blockwise, kernel
from fedistill.errors import DataError
from fedistill.seeding import generator
from fedistill.types import FloatArray

MOST_OWN = 4000
"""Own rows looked at: drawn, where there are more."""
HELD = 0.25
"""Share of own rows that is held out of the fit, for the threshold."""


@dataclass(frozen=True, eq=False)
class Density:
    """A fitted estimate of log p_own / p_public. Not differentially private.

    Attributes:
        estimate: from inputs ``[rows, ...]`` to log ratios ``[rows]``, not yet clamped.
        held: ``[h]`` scores of own rows that the fit has not seen; of a single own row, its own.
    """

    estimate: Callable[[FloatArray], FloatArray]
    held: FloatArray

    def score(self, inputs: FloatArray) -> FloatArray:
        """Log density ratios ``[rows]`` of inputs ``[rows, ...]``, float64, clamped to +-8."""
        return clamp(self.estimate(inputs))

    def threshold(self, quantile: float) -> float:
        """That quantile of the scores of held-out own rows: a row at or above it is accepted.

        It is above -8 always, so that rows of which nothing is known are never accepted.

        Raises:
            DataError: a quantile that is none.
        """
        if not 0 <= quantile <= 1:
            raise DataError(f"density: expected a quantile from 0 to 1, found {quantile}")
        floor = np.nextafter(-FAMILIARITY_LIMIT, 0)
        return float(max(np.quantile(self.held, quantile), floor))


class MakeDensity(Protocol):
    """What :data:`DENSITIES` holds: from own inputs, public ones and a seed to a density."""

    def __call__(
        self, own: FloatArray, public: FloatArray | PublicFeatures, *, seed: int
    ) -> Density:
        """Fit; a caller with several clients passes the public features (:func:`features_of`)."""


def kulsif(
    own: FloatArray,
    public: FloatArray | PublicFeatures,
    *,
    seed: int,
    exponent: float = -0.9,
) -> Density:
    """Least squares between the ratio and a sum of kernels (KuLSIF), the score of Selective-FD.

    Selective-FD, arXiv 2304.01731; Kanamori, Suzuki and Sugiyama, Machine Learning 86, 2012. We
    deviate: the paper's auxiliary rows are uniform over the range of the inputs, where no image
    lies (.31), so ours are public rows (.79) and the ratio is that of own to public density; lambda
    is min(basis, own rows)^exponent where the authors' code has basis^-0.5, which blurs the ratio
    (.63); the width is relative to the distances that there are.

    Args:
        own: ``[n, ...]`` own inputs.
        public: ``[m, ...]`` public inputs, or what was learnt from them.
        seed: which own rows are held out.
        exponent: of the regularisation; below 0: more rows need less of it.

    Raises:
        DataError: no rows, or an exponent that is not below 0.
    """
    if not exponent < 0:
        raise DataError(f"density: expected an exponent below 0, found {exponent}")
    seen = public if isinstance(public, PublicFeatures) else PublicFeatures.fit(public)
    fitted, held = divide(own, seed)
    rows = seen(fitted)
    lam = float(min(len(seen.basis), len(rows)) ** exponent)
    alpha = kulsif_weights(seen.gram, kernel(seen.basis, rows).sum(axis=1), len(rows), lam)

    def estimate(inputs: FloatArray) -> FloatArray:
        def ratio(part: FloatArray) -> FloatArray:
            near: FloatArray = kernel(part, rows).mean(axis=1)
            smooth: FloatArray = kernel(part, seen.basis) @ alpha + near / lam
            return smooth

        ratios = blockwise(ratio, seen(inputs))
        return np.log(np.maximum(ratios, np.finfo(np.float64).tiny))

    return Density(estimate, clamp(estimate(held)))


def kulsif_weights(gram: FloatArray, cross: FloatArray, own: int, lam: float) -> FloatArray:
    """The weights ``[A]``: (gram / A + lam I) alpha = -cross / (A own lam), solved, not inverted.

    Args:
        gram: ``[A, A]`` kernel among the auxiliary rows.
        cross: ``[A]`` kernel to the own rows, summed over them.
        own: their number.
        lam: regularisation.
    """
    count = len(gram)
    weights: FloatArray = np.linalg.solve(
        gram / count + lam * np.eye(count), -cross / (count * own * lam)
    )
    return weights


def logistic(
    own: FloatArray,
    public: FloatArray | PublicFeatures,
    *,
    seed: int,
    strength: float = 0.1,
) -> Density:
    """L2-regularised logistic regression that tells own rows from public ones, as in FedAUX.

    FedAUX, arXiv 2102.02514. Own and public rows weigh a half each, so the log-odds are the log
    density ratio with no correction for the sizes. Its features are kernels to public rows
    (.78; the principal components themselves .74). lambda is ``strength`` / own rows.

    The authors add noise to the weights, for the sensitivity 2 / (n lambda). That is the bound of a
    *mean* loss, while scikit-learn's ``C = 1 / lambda`` makes a *sum*, whose bound is n times
    larger; they also scale by a maximum over private rows, and leave the intercept unpenalised. Our
    loss is a mean, the rows are in the unit ball whatever they are, and the intercept is one weight
    of many, so :func:`sensitivity` holds. We add no noise: the score is not differentially private.

    Args:
        own: ``[n, ...]`` own inputs.
        public: ``[m, ...]`` public inputs, or what was learnt from them.
        seed: which own rows are held out.
        strength: of the regularisation.

    Raises:
        DataError: no rows, or a strength that is not above 0.
    """
    if not strength > 0:
        raise DataError(f"density: expected a strength above 0, found {strength}")
    seen = public if isinstance(public, PublicFeatures) else PublicFeatures.fit(public)
    fitted, held = divide(own, seed)
    weights = logistic_weights(
        seen.embed(seen(fitted)), seen.embed(seen.basis), strength / len(fitted)
    )

    def estimate(inputs: FloatArray) -> FloatArray:
        return blockwise(lambda part: seen.embed(part) @ weights, seen(inputs))

    return Density(estimate, clamp(estimate(held)))


def logistic_weights(own: FloatArray, public: FloatArray, lam: float) -> FloatArray:
    """The weights ``[d]`` that minimise the mean loss of both sides plus lam / 2 |weights|^2.

    Newton's method with halved steps, to a gradient of ``1e-9 lam``, thus to within 1e-9 of the
    minimum.

    Args:
        own: ``[n, d]``, no row longer than 1.
        public: ``[m, d]``, likewise.
        lam: regularisation.
    """
    signed = np.vstack([own, -public])
    share = np.repeat([0.5 / len(own), 0.5 / len(public)], [len(own), len(public)])
    weights = np.zeros(signed.shape[1])

    def loss(at: FloatArray) -> float:
        return float(share @ np.logaddexp(0, -signed @ at) + lam / 2 * at @ at)

    for _ in range(100):
        wrong = np.exp(-np.logaddexp(0, signed @ weights))
        gradient = lam * weights - signed.T @ (share * wrong)
        if np.linalg.norm(gradient) <= 1e-9 * lam:
            break
        curvature = (signed.T * (share * wrong * (1 - wrong))) @ signed
        step = np.linalg.solve(curvature + lam * np.eye(len(weights)), gradient)
        # The slack is what rounding can do, where there is next to nothing left to gain.
        length, enough, gain = 1.0, loss(weights) + 1e-15, gradient @ step / 4
        while length > 1e-6 and loss(weights - length * step) > enough - length * gain:
            length /= 2
        weights = weights - length * step
    return weights


def sensitivity(n: int, lam: float) -> float:
    """How far apart (L2) the weights of two fits can be that differ in one of ``n`` records.

    2 / (n lam), for a *mean* of ``n`` logistic losses plus lam / 2 |weights|^2, all weights
    penalised and no row longer than 1 (Chaudhuri, Monteleoni and Sarwate, arXiv 0912.0071). In
    :func:`logistic_weights` an own row weighs 1 / (2 own), as one of n = 2 own records does.
    """
    return 2 / (n * lam)


DENSITIES: Mapping[str, MakeDensity] = {"kulsif": kulsif, "logistic": logistic}
"""The estimators by name."""


def divide(own: FloatArray, seed: int) -> tuple[FloatArray, FloatArray]:
    """Own rows to fit on, and those held out; a single row is both.

    Raises:
        DataError: no rows.
    """
    if not len(own):
        raise DataError("density: expected own rows, found none: a client without rows shares none")
    order = generator(seed, "held").permutation(len(own))[:MOST_OWN]
    count = max(1, int(HELD * len(order)))
    held, fitted = order[:count], order[count:] if len(order) > 1 else order
    return own[fitted], own[held]


def clamp(scores: FloatArray) -> FloatArray:
    """To plus and minus 8."""
    return np.clip(scores, -FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)
