"""What is refused as differential privacy, and why: names a user may know from elsewhere.

The figures in the texts come from the functions here, so that nobody has to believe them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def subsampling(rows: int, drawn: int, *, replacement: bool = False) -> tuple[float, float]:
    """(epsilon, delta) of training on a random subset without any noise ("noise-free DP").

    Without replacement (ln((n + 1) / (n + 1 - k)), k / n), with replacement
    (k ln((n + 1) / n), 1 - ((n - 1) / n)^k). Sun and Lyu, arXiv 2009.05537.

    Args:
        rows: n, all records.
        drawn: k, those of the subset; at most n without replacement.
        replacement: whether a record may be drawn twice.
    """
    if replacement:
        return drawn * math.log((rows + 1) / rows), 1 - ((rows - 1) / rows) ** drawn
    return math.log((rows + 1) / (rows + 1 - drawn)), drawn / rows


def gaussian_sigma(epsilon: float, delta: float) -> float:
    """Smallest noise multiplier of one Gaussian release that is (epsilon, delta)-private.

    By bisection of delta = Phi(1/(2 s) - epsilon s) - exp(epsilon) Phi(-1/(2 s) - epsilon s)
    (Balle and Wang, arXiv 1805.06530). For the figures below; what is charged comes from
    :mod:`fedistill.privacy.accounting`.
    """
    low, high = 1e-6, 1.0
    while _delta(high, epsilon) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, epsilon) > delta else (low, middle)
    return high


def _delta(sigma: float, epsilon: float) -> float:
    half, rest = 1 / (2 * sigma), epsilon * sigma
    tail = _normal(-half - rest)
    # exp(epsilon) alone may overflow where the product is small.
    return _normal(half - rest) - (math.exp(epsilon + math.log(tail)) if tail > 0 else 0.0)


def _normal(x: float) -> float:
    """The normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def local_noise(
    rows: int, rounds: int, epsilon: float, *, delta: float = 1e-5, clip: float | None = None
) -> float:
    """Honest noise (standard deviation) on each value that a model without privacy predicts.

    One record may change the model, and with it every output: nothing smaller than the largest
    change of all values together bounds it. Probability vectors of m rows in R rounds can move by
    sqrt(2 m R), logits that are clipped to a 2-norm of c a row by 2 c sqrt(m R).

    Args:
        rows: m, proxy rows of a round.
        rounds: R.
        epsilon: of all rounds together.
        delta: of it.
        clip: c, for logits; None: probabilities.
    """
    moved = math.sqrt(2 * rows * rounds) if clip is None else 2 * clip * math.sqrt(rows * rounds)
    return moved * gaussian_sigma(epsilon, delta)


def _noise_text(what: str) -> str:
    one, eight = local_noise(100, 1, 1.0), local_noise(100, 1, 8.0)
    return (
        f"{what} on the predictions of a model without privacy is refused: one record may move all "
        "of them, so that honest noise has standard deviation sqrt(2 m R) sigma on a probability "
        "and 2 c sqrt(m R) sigma on a logit (m rows, R rounds, logits of norm c), for 100 rows and "
        f"one round {one:.1f} at epsilon 1 and {eight:.1f} at epsilon 8; take dpsgd, whose "
        "predictions need no noise"
    )


def _subset_text(rows: int = 2800, drawn: int = 280) -> str:
    epsilon, delta = subsampling(rows, drawn)
    return (
        "sampling rows without noise (NFDP) is not reported as differential privacy: for n rows of "
        "which k are drawn it is (ln((n + 1) / (n + 1 - k)), k / n), for "
        f"{drawn} of {rows} rows epsilon {epsilon:.3f} at delta {delta:.2f}, which permits "
        "publishing the rows that were drawn; take dpsgd, or none and say so"
    )


_SUBSET = _subset_text()
_GAUSS = _noise_text("Gaussian noise")
_LAPLACE = _noise_text("Laplace or Gaussian noise")
_GDP = (
    "the GDP accountant is refused: its central limit may report less than was spent; epsilon is "
    "computed from privacy loss distributions, which never do, whatever the mechanism"
)
_RESPONSE = (
    "randomised response protects each label that is released, not the rows behind it: of m labels "
    "one record may have changed all, and epsilon is m times that of one; take gnmax, whose votes "
    "one record changes by one"
)
_SELECTIVE = (
    "sharing only some predictions (consensus, entropy filters) guarantees nothing, and the choice "
    "itself tells of the rows; take dpsgd, after which any choice is free"
)
_CLIENTS = (
    "noise at the server hides clients from one another, and only among hundreds: write "
    "central-gauss if that is meant, or take dpsgd"
)

REFUSED: Mapping[str, str] = {
    "nfdp": _SUBSET,
    "noise-free": _SUBSET,
    "subsampling": _SUBSET,
    "gauss": _GAUSS,
    "gaussian": _GAUSS,
    "local-gauss": _GAUSS,
    "gauss-logits": _GAUSS,
    "laplace": _LAPLACE,
    "laplace-logits": _LAPLACE,
    "gdp": _GDP,
    "randomised-response": _RESPONSE,
    "randomized-response": _RESPONSE,
    "ldp": _RESPONSE,
    "local-dp": _RESPONSE,
    "selective": _SELECTIVE,
    "consensus": _SELECTIVE,
    "central-dp": _CLIENTS,
    "client-level": _CLIENTS,
}
"""From what a user may type as a mechanism or an accountant to one sentence: why not, what else."""


def why_refused(name: str) -> str | None:
    """The sentence on a name, however it is spelt; None for one that is not known here.

    >>> why_refused("Randomized_Response") == REFUSED["randomised-response"]
    True
    """
    return REFUSED.get(name.strip().lower().replace("_", "-").replace(" ", "-"))
