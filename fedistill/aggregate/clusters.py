"""Several targets a row: the centres of what clients say, and the choice among them (COMET)."""

from __future__ import annotations

from functools import partial

import numpy as np

from fedistill.aggregate.chunked import Chunked, by_parts, chunkwise
from fedistill.aggregate.voices import say, voices
from fedistill.errors import FedistillError
from fedistill.types import FloatArray, IntArray, Logits, Probs

STEPS = 100
"""Lloyd steps at most. Each lowers the cost, so it ends long before; rounding must not loop."""


@chunkwise
def clusters(logits: Logits | Chunked, weights: FloatArray, *, centroids: int = 2) -> Probs:
    """COMET: for each row the centres of a k-means over the clients' probabilities.

    Where clients differ because their data do, one mean serves none of them: each takes the
    centre that is nearest to what it says itself (:func:`nearest`). The server's own student
    learns from the plain mean, not from these. Cho et al., IEEE JSTSP 17(1), 2023.

    The start is fixed: first the client that is farthest from the mean of its row, then each time
    the one farthest from all centres so far (squared distance times weight), then Lloyd's steps
    until nobody changes sides. Clients are put in the order of what they say beforehand, so that
    their own order cannot matter, not even to the last bit. The centres of a row come by the
    weight behind them, the heaviest first, then by content, the first class first.

    Deviations: the paper draws the start at random; ours needs no generator. Where fewer clients
    answered than ``centroids``, there are as many centres as clients (of the row with the most
    answers). A row with fewer distinct predictions than centres repeats its heaviest one.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``; a centre is the mean by weight, and a
            client of weight 0 has no say.
        centroids: centres a row, at least 1; 1 is the mean of probabilities.

    Returns:
        ``[rows, c, classes]``, c = min(``centroids``, clients that answered) and at least 1; NaN
        on a row that nobody answers.

    Raises:
        FedistillError: ``centroids`` is below 1, or a shape does not fit.
    """
    if centroids < 1:
        raise FedistillError(f"centroids: expected at least 1, found {centroids}: the default is 2")
    given = say(np.shape(logits), weights)
    count = min(centroids, max(1, int((given > 0).sum(axis=0).max(initial=0))))
    return by_parts(partial(_rows, count=count), logits, given)


def _rows(logits: Logits, weights: FloatArray, *, count: int) -> Probs:
    """``count`` centres of each row, NaN where nobody answers."""
    logs, given = voices(logits, weights)
    points = np.exp(logs).transpose(1, 0, 2)
    mass = given.T
    answered = mass.any(axis=1)
    found = np.full((len(points), count, points.shape[2]), np.nan)
    if answered.any():
        ordered, mass = _sorted(points[answered], mass[answered])
        # Shares only now: the sum must not see the order in which the clients came either.
        share = mass / mass.sum(axis=1, keepdims=True)
        found[answered] = _centres(ordered, share, count)
    return found


def nearest(choices: Probs, own: Probs) -> Probs:
    """For each row the choice that is nearest, in L2, to a client's own prediction; COMET.

    Args:
        choices: ``[rows, c, classes]`` as :func:`clusters` makes them.
        own: ``[rows, classes]`` probabilities of the client's present student.

    Returns:
        ``[rows, classes]``; of equally near ones the first, that is the one with more weight
        behind it; NaN where the choices are NaN.

    Raises:
        FedistillError: the shapes do not fit.
    """
    several, one = np.asarray(choices), np.asarray(own, dtype=np.float64)
    if several.ndim != 3 or not several.shape[1] or one.shape != several[:, 0].shape:
        raise FedistillError(
            "choices must be [rows, c, classes] with at least one choice and own [rows, classes], "
            f"found {list(several.shape)} and {list(one.shape)}: predict on the rows of the choices"
        )
    pick = ((several - one[:, None]) ** 2).sum(axis=2).argmin(axis=1)
    chosen: Probs = np.take_along_axis(several, pick[:, None, None], axis=1)[:, 0]
    return chosen


# --- k-means, all rows at once -------------------------------------------------------------------


def _sorted(points: FloatArray, mass: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Clients of each row in the order of their predictions, those without weight last."""
    classes = points.shape[2]
    # The last key counts most: silence, then the first class, and so on, then weight.
    keys = [mass, *(points[:, :, c] for c in reversed(range(classes))), mass == 0]
    order = np.lexsort(keys, axis=-1)
    return (
        np.take_along_axis(points, order[:, :, None], axis=1),
        np.take_along_axis(mass, order, axis=1),
    )


def _distances(points: FloatArray, centres: FloatArray) -> FloatArray:
    """Squared distances ``[rows, clients, c]``; by differences, so that equal means exactly 0."""
    table = np.empty((*points.shape[:2], centres.shape[1]))
    for number in range(centres.shape[1]):
        gap = points - centres[:, number, None]
        table[:, :, number] = np.einsum("rkc,rkc->rk", gap, gap)
    return table


def _means(points: FloatArray, mass: FloatArray, side: IntArray, old: FloatArray) -> FloatArray:
    """The mean of each side by weight; a side that lost everybody keeps its centre."""
    inside = mass[:, :, None] * (side[:, :, None] == np.arange(old.shape[1]))
    total = inside.sum(axis=1)[:, :, None]
    sums = np.einsum("rkj,rkc->rjc", inside, points)
    means: FloatArray = np.where(total > 0, sums / np.where(total > 0, total, 1.0), old)
    return means


def _start(points: FloatArray, mass: FloatArray, count: int) -> FloatArray:
    """The client farthest from the mean, then always the farthest from all centres so far."""
    rows = np.arange(len(points))
    mean = np.einsum("rk,rkc->rc", mass, points)[:, None]
    centres = np.empty((len(points), count, points.shape[2]))
    gap = _distances(points, mean)[:, :, 0]
    for number in range(count):
        centres[:, number] = points[rows, (mass * gap).argmax(axis=1)]
        apart = _distances(points, centres[:, number, None])[:, :, 0]
        gap = apart if number == 0 else np.minimum(gap, apart)
    return centres


def _centres(points: FloatArray, mass: FloatArray, count: int) -> FloatArray:
    """Lloyd's steps from a fixed start until no client changes sides; centres by weight."""
    centres = _start(points, mass, count)
    side = _distances(points, centres).argmin(axis=2)
    moving = np.arange(len(points))
    for _ in range(STEPS):
        centres[moving] = _means(points[moving], mass[moving], side[moving], centres[moving])
        again = _distances(points[moving], centres[moving]).argmin(axis=2)
        moved = (again != side[moving]).any(axis=1)
        side[moving] = again
        moving = moving[moved]
        if not moving.size:
            break
    return _by_weight(centres, mass, side)


def _by_weight(centres: FloatArray, mass: FloatArray, side: IntArray) -> FloatArray:
    """Centres of each row, heaviest first; one without clients becomes another heaviest."""
    behind = (mass[:, :, None] * (side[:, :, None] == np.arange(centres.shape[1]))).sum(axis=1)
    heaviest = np.take_along_axis(centres, behind.argmax(axis=1)[:, None, None], axis=1)
    filled = np.where(behind[:, :, None] > 0, centres, heaviest)
    # Rounded: weights that are equal but for the order of a sum must tie. The larger comes first.
    keys = [*(-filled[:, :, c] for c in reversed(range(filled.shape[2]))), -behind.round(9)]
    return np.take_along_axis(filled, np.lexsort(keys, axis=-1)[:, :, None], axis=1)
