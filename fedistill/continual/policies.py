"""What stays in a replay buffer: a policy gives keys to rows, the rows with the largest keys stay.

Storing, drawing, merging, shrinking and erasing are the buffer's business, and the same for every
policy. A policy of your own is a function of :class:`Candidates`::

    def sharpest(rows):
        return rows.scores

    ReplayBuffer(500, Policy(sharpest, needs="scores"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fedistill.errors import FedistillError, did_you_mean
from fedistill.types import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Candidates:
    """Rows that want to stay; all arrays have one entry a row.

    Attributes:
        uniform: ``[n]`` float64 from [0, 1), drawn when the row came and kept for life.
        numbers: ``[n]`` place of the row in the stream, from 0.
        labels: ``[n]`` class numbers; -1 where none is known.
        scores: ``[n]`` float64, what the caller said of the row (its loss, say); None without.
        features: ``[n, d]`` float64 of length 1; None without.
        means: ``[n, d]`` mean of the features of all rows so far of the row's class.
    """

    uniform: FloatArray
    numbers: IntArray
    labels: IntArray
    scores: FloatArray | None = None
    features: FloatArray | None = None
    means: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.uniform)


Keys: TypeAlias = Callable[[Candidates], FloatArray]
"""From n rows to keys ``[n]``: the larger, the longer a row stays."""


@dataclass(frozen=True)
class Policy:
    """What stays.

    Attributes:
        keys: from rows to keys.
        by_class: classes share the room: the smallest key of the largest class leaves first
            (among largest classes, that of the highest number).
        lifelong: a row's key is a matter of that row alone, asked once when it comes. Then the
            buffer remembers the largest key that ever left and refuses what is below, which makes
            merging and shrinking exact. Otherwise keys are asked again of all rows that are there.
        needs: ``"scores"`` or ``"features"`` that ``add`` must be given; empty: nothing.
    """

    keys: Keys
    by_class: bool = False
    lifelong: bool = True
    needs: str = ""

    @property
    def summary(self) -> str:
        """One line: that of its keys."""
        return (self.keys.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")

    @property
    def name(self) -> str:
        """What a saved state is recognised by."""
        return str(getattr(self.keys, "__name__", type(self.keys).__name__)).replace("_", "-")


def reservoir(rows: Candidates) -> FloatArray:
    """A uniform sample of the stream: after n rows each is there with probability M / n.

    Vitter, Random sampling with a reservoir, ACM TOMS 11, 1985. In the form of Efraimidis and
    Spirakis, Information Processing Letters 97, 2006: each row has a random key for life, the
    largest stay. That is the law of Vitter's algorithm R with other draws, but two reservoirs can
    be merged and a row can be taken out. All weights are 1.
    """
    return rows.uniform


def class_balanced(rows: Candidates) -> FloatArray:
    """As many rows of each class as there are, up to an equal share; uniform within a class.

    Chrysakis and Moens, Online continual learning from imbalanced data (CBRS), ICML 2020. We
    deviate: CBRS overwrites a random row of the largest class and needs the count of each class;
    with keys for life, the smallest key of the largest class leaves, so that each class is a
    reservoir of itself however the stream was cut, and buffers can be merged.
    """
    return rows.uniform


def recent(rows: Candidates) -> FloatArray:
    """The last rows of the stream."""
    return rows.numbers.astype(np.float64)


def hardest(rows: Candidates) -> FloatArray:
    """The rows with the largest scores when they came, usually their loss; ties are drawn.

    Not a sample of anything: wrong labels and outliers are hard, too, and stay. A score is not
    asked again when the student has learnt the row.

    Raises:
        FedistillError: rows without scores.
    """
    if rows.scores is None:
        raise FedistillError("hardest: expected scores of the rows, found none: add(..., scores=)")
    return rows.scores


def herding(rows: Candidates) -> FloatArray:
    """Rows whose features have, together, nearly the mean of their class; equal shares.

    Rebuffi et al., iCaRL, arXiv 1611.07725, eq. 4: the k-th row of a class makes the mean of the
    first k nearest to the class mean, so the first m of a list are the list of length m. We
    deviate where rows stream: the class mean is that of all rows so far, with features as they
    were when a row came, and rows are chosen among those held and those that come; iCaRL has all
    rows of a task at once and asks the present network for their features. Asked for every batch
    (time grows with M d n / classes): add large blocks.

    Returns:
        ``[n]`` minus the place of a row in the list of its class.

    Raises:
        FedistillError: rows without features.
    """
    if rows.features is None or rows.means is None:
        raise FedistillError(
            "herding: expected features of the rows, found none: add(..., features=)"
        )
    keys = np.empty(len(rows))
    for label in np.unique(rows.labels):
        of_class = np.flatnonzero(rows.labels == label)
        keys[of_class[herd(rows.features[of_class], rows.means[of_class[0]])]] = -np.arange(
            len(of_class), dtype=np.float64
        )
    return keys


def herd(features: FloatArray, mean: FloatArray) -> IntArray:
    """The order of herding: each next row brings the mean of those so far nearest to ``mean``.

    Args:
        features: ``[n, d]``.
        mean: ``[d]``.

    Returns:
        ``[n]`` row numbers; of equally near rows the first comes first.
    """
    left = np.arange(len(features))
    squares = (features**2).sum(axis=1)
    order = np.empty(len(features), dtype=np.int64)
    total = np.zeros(features.shape[1])
    for place in range(len(features)):
        # |k mean - total - x|^2 without what is the same for all x.
        gap = squares[left] - 2 * features[left] @ ((place + 1) * mean - total)
        best = int(gap.argmin())
        order[place] = left[best]
        total += features[left[best]]
        left = np.delete(left, best)
    return order


POLICIES: Mapping[str, Policy] = {
    "reservoir": Policy(reservoir),
    "class-balanced": Policy(class_balanced, by_class=True),
    "recent": Policy(recent),
    "herding": Policy(herding, by_class=True, lifelong=False, needs="features"),
    "hardest": Policy(hardest, needs="scores"),
}
"""The policies by name."""


def find_policy(policy: str | Policy | Keys) -> Policy:
    """A policy by name; a plain function of rows is one whose keys are for life.

    Raises:
        FedistillError: no policy has this name.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        return Policy(policy)
    if policy not in POLICIES:
        raise FedistillError(f'unknown buffer policy "{policy}"{did_you_mean(policy, POLICIES)}')
    return POLICIES[policy]


def stay(
    keys: FloatArray, uniform: FloatArray, labels: IntArray, capacity: int, *, by_class: bool
) -> IntArray:
    """Which rows stay when there is room for ``capacity``.

    Args:
        keys: ``[n]``.
        uniform: ``[n]``, decides between equal keys.
        labels: ``[n]``; used with ``by_class`` only.
        capacity: at most that many.
        by_class: evict the smallest key of the largest class until the rest fits.

    Returns:
        Row numbers, ascending, ``[min(n, capacity)]``.
    """
    if not by_class:
        return np.sort(np.lexsort((-uniform, -keys))[:capacity])
    # Evicting from the largest class again and again leaves the lowest (rank in class, class).
    return np.sort(np.lexsort((labels, ranks(keys, uniform, labels)))[:capacity])


def ranks(keys: FloatArray, uniform: FloatArray, labels: IntArray) -> IntArray:
    """``[n]`` how many rows of the same class have a larger key."""
    order = np.lexsort((-uniform, -keys, labels))
    ordered = labels[order]
    place = np.arange(len(order))
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(order)])
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = place - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return rank
