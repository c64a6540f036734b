"""Rules that outlive some bad clients: medians, trimmed means, Krum.

All work on probabilities: among logits one scaled vector moves any mean, but in the simplex a
client moves it by no more than its share. All have the shape of a rule, ``rule(logits [clients,
rows, classes], weights [clients] or [clients, rows]) -> probs [rows, classes]``; a row without
any weight becomes NaN.

Rows are taken in blocks, which bounds the memory beside the logits, and a block lies as
``[classes, rows, clients]``: a softmax over the first axis and a sort along the last are several
times faster there than on logits as they come.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedistill.aggregate.basics import spread
from fedistill.aggregate.chunked import Chunked, chunkwise
from fedistill.errors import FedistillError
from fedistill.types import FloatArray, Logits, Probs

Mask = npt.NDArray[np.bool_]
CELLS = 1 << 18
"""Probabilities in a block: 2 MB, about what a cache holds; 262 rows of 100 clients, 10 classes."""
FEWEST = 16
"""Rows in a block at least, so that many classes do not end in a loop over rows."""
STEPS = 64
"""Weiszfeld steps at most for a row: sums of distances end within about 1e-4 of the smallest."""
CLIENT_STEPS = 256
"""Weiszfeld steps at most for all rows as one point."""
SETTLED = 1e-9
"""A geometric median has arrived when no coordinate moves further than this."""
SMOOTHING = 1e-4
"""Distance under which a point counts as hit: no division by zero (arXiv 1912.13445)."""
SLACK = 1e-12
"""Sums of weights that differ by less than this share of all are equal."""

# --- class by class ----------------------------------------------------------------------------


@chunkwise
def median(logits: Logits | Chunked, weights: FloatArray) -> Probs:
    """Weighted median of the probabilities of each class, then rows renormalised.

    The middle of all values with at most half of the weight below and at most half above: of an
    even number of equal weights the mean of the two middle values, as ``np.median``
    (``torch.median`` returns the lower). After Yin et al., arXiv 1803.01498, who take medians of
    gradients. Where no class has half of the clients behind it all medians may be 0: such a row
    gets the mean.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
    """
    return _by_order(logits, weights, 0.5)


@chunkwise
def trimmed_mean(logits: Logits | Chunked, weights: FloatArray, *, trim: float = 0.3) -> Probs:
    """Mean of the probabilities of each class without the highest and the lowest, renormalised.

    After Yin et al., arXiv 1803.01498. Deviation: they cut a whole number of clients, rounded
    down, which is nobody where ``trim`` is 0.3 and clients are 3. Here exactly ``trim`` of the
    weight goes at each side, with the last client touched cut in part; that is the same wherever
    ``trim * clients`` is whole. 0 is the mean, 0.5 the median. Where nothing is left a row gets
    the mean.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
        trim: share of the weight cut at each side, 0 to 0.5.

    Raises:
        FedistillError: ``trim`` is out of range.
    """
    if not 0 <= trim <= 0.5:
        raise FedistillError(f"trim: expected a share from 0 to 0.5, found {trim}")
    return _by_order(logits, weights, trim)


def _by_order(logits: Logits | Chunked, weights: FloatArray, trim: float) -> Probs:
    """What is left of each class's sorted probabilities when both ends are cut."""
    alike = _alike(weights)
    if alike is not None:
        weights = np.ones(int(alike.sum()))
        place = places(weights / len(weights), trim)
        left = np.flatnonzero(place)
    found = np.empty(logits.shape[1:])
    for rows, probs, shares in blocks(logits, weights, alike):
        held = shares
        if alike is not None:
            probs.sort(axis=-1)
            middle = probs[:, :, left[0] : left[-1] + 1] @ place[left[0] : left[-1] + 1]
        else:
            order = np.argsort(probs, axis=-1)
            probs = np.take_along_axis(probs, order, axis=-1)
            held = np.take_along_axis(np.broadcast_to(shares, probs.shape), order, axis=-1)
            middle = np.einsum("crk,crk->cr", probs, places(held, trim))
        lost = ~(middle.sum(axis=0) > 0)
        if lost.any():
            middle[:, lost] = (probs * held).sum(axis=-1)[:, lost]
        found[rows] = _normalised(middle)
    return found


def _alike(weights: FloatArray) -> Mask | None:
    """Which clients take part, if all that do have one weight in all rows; otherwise None."""
    table = np.asarray(weights, dtype=np.float64)
    first = table if table.ndim == 1 else table[:, 0] if table.shape[1] else table.sum(axis=1)
    there: Mask = first > 0
    if not there.any() or (table.ndim == 2 and (table != first[:, None]).any()):
        return None
    return there if bool((first[there] == first[there][0]).all()) else None


def places(shares: FloatArray, trim: float) -> FloatArray:
    """What each of the sorted values ``[..., clients]`` counts; sums to 1 over the last axis."""
    upto = np.cumsum(shares, axis=-1)
    if trim < 0.5 - SLACK:
        kept = np.minimum(upto, 1 - trim) - np.maximum(upto - shares, trim)
        kept = np.maximum(kept, 0.0)
        kept /= kept.sum(axis=-1, keepdims=True)
    else:
        place = np.arange(shares.shape[-1])
        low = np.argmax(upto >= 0.5 - SLACK, axis=-1)[..., None]
        high = np.argmax(upto > 0.5 + SLACK, axis=-1)[..., None]
        kept = ((place == low) + 1.0 * (place == high)) / 2
    # Shares of a row without weights are NaN, and so is what is made of them.
    counted: FloatArray = kept / upto[..., -1:]
    return counted


# --- geometric medians -------------------------------------------------------------------------


@chunkwise
def geometric_median(logits: Logits | Chunked, weights: FloatArray) -> Probs:
    """The point of each row with the smallest weighted sum of distances to all predictions.

    Weiszfeld's steps from the mean, smoothed as in Pillutla et al., arXiv 1912.13445, who combine
    gradients: a prediction that is hit exactly is no division by zero.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
    """
    found = np.empty(logits.shape[1:])
    for rows, probs, shares in blocks(logits, weights):
        found[rows] = _normalised(row_centres(probs, shares))
    return found


def row_centres(probs: FloatArray, shares: FloatArray) -> FloatArray:
    """Geometric medians ``[classes, rows]`` of a block and its ``shares [rows, clients]``."""
    squares = np.einsum("crk,crk->rk", probs, probs)
    centre: FloatArray = np.einsum("crk,rk->cr", probs, shares)
    for _ in range(STEPS):
        gaps = squared_gaps(probs, squares, centre)
        pull = shares / np.sqrt(gaps + SMOOTHING**2)
        pull /= pull.sum(axis=1, keepdims=True)
        moved = np.einsum("crk,rk->cr", probs, pull)
        # A row that has arrived stays, whatever rows share its block.
        far = np.abs(moved - centre).max(axis=0) > SETTLED
        if not far.any():
            break
        centre = np.where(far, moved, centre)
    return centre


def squared_gaps(probs: FloatArray, squares: FloatArray, centre: FloatArray) -> FloatArray:
    """Squared distances ``[rows, clients]`` to ``centre [classes, rows]``: z.z - 2 z.m + m.m."""
    cross = np.einsum("crk,cr->rk", probs, centre)
    gaps = squares - 2 * cross + np.einsum("cr,cr->r", centre, centre)[:, None]
    squared: FloatArray = np.maximum(gaps, 0.0)
    return squared


@chunkwise
def geometric_median_client(logits: Logits | Chunked, weights: FloatArray) -> Probs:
    """Weighted mean with one factor a client: the geometric median of all rows as one point.

    A client that is off on many rows loses weight on all of them. Distances are root mean squares
    over the rows that a client answered, weighted as they are.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
    """
    table = np.asarray(weights, dtype=np.float64)
    table = table if table.ndim == 2 else np.repeat(table[:, None], logits.shape[1], axis=1)
    mass = table.sum(axis=1)
    answered = mass > 0
    pull = np.ones(len(table))
    for _ in range(CLIENT_STEPS):
        gaps = np.zeros(len(table))
        for rows, probs, shares in blocks(logits, table * pull[:, None]):
            held = table[:, rows].T
            centre = np.einsum("crk,rk->cr", probs, shares)
            squares = np.einsum("crk,crk->rk", probs, probs)
            gaps += np.where(held > 0, held * squared_gaps(probs, squares, centre), 0).sum(axis=0)
        moved = 1 / np.sqrt(gaps / np.where(answered, mass, 1) + SMOOTHING**2)
        moved /= moved.max(initial=SETTLED, where=answered)
        settled = np.abs(moved - pull).max(initial=0, where=answered) <= SETTLED
        pull = moved
        if settled:
            break
    return weighted_mean(logits, table * pull[:, None])


# --- Krum --------------------------------------------------------------------------------------


@chunkwise
def krum(logits: Logits | Chunked, weights: FloatArray, *, byzantine: float = 0.2) -> Probs:
    """The predictions of the one client that lies closest to its nearest fellows.

    Blanchard et al. 2017 (NeurIPS): of K clients, f of them bad, that with the smallest sum of
    squared distances to its K - f - 2 nearest. Here for comparison: where clients differ, one
    client knows much less than all together, and colluders lie closest of all.

    Distances are means over common rows; a pair without any counts as an average one. A weight
    above 0 counts as present. Where the chosen client did not answer, the next best does. Ties go
    to the client that is closest to all; clients that tie there too are averaged, so that order
    means nothing.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
        byzantine: share of bad clients to assume, 0 to 0.5.

    Raises:
        FedistillError: ``byzantine`` is out of range.
    """
    if not 0 <= byzantine <= 0.5:
        raise FedistillError(f"byzantine: expected a share from 0 to 0.5, found {byzantine}")
    there = np.asarray(weights) > 0
    present = there if there.ndim == 2 else np.repeat(there[:, None], logits.shape[1], axis=1)
    voters = np.flatnonzero(present.any(axis=1))
    squared = _mean_distances(logits, weights)[np.ix_(voters, voters)]
    np.fill_diagonal(squared, np.inf)
    ranked = np.sort(squared, axis=1)[:, :-1]
    near = max(len(voters) - int(byzantine * len(voters) + SLACK) - 2, 1)
    scores = np.stack([ranked[:, :near].sum(axis=1), ranked.sum(axis=1)], axis=1)
    rank = np.full(len(present), len(present))
    rank[voters] = np.unique(scores.round(9), axis=0, return_inverse=True)[1].reshape(-1)
    by_row = np.where(present, rank[:, None], len(present))
    chosen = present & (by_row == by_row.min(axis=0, initial=len(present)))
    return weighted_mean(logits, chosen.astype(np.float64))


def _mean_distances(logits: Logits | Chunked, weights: FloatArray) -> FloatArray:
    """Squared distances ``[clients, clients]``, means over rows where both weights are above 0."""
    clients = len(logits)
    cross, lengths, common = (np.zeros((clients, clients)) for _ in range(3))
    present = (np.asarray(weights) > 0).astype(np.float64)
    present = present if present.ndim == 2 else np.repeat(present[:, None], logits.shape[1], axis=1)
    for rows, probs, _ in blocks(logits, weights):
        there = present[:, rows].T
        probs *= there
        flat = probs.reshape(-1, clients)
        cross += flat.T @ flat
        lengths += np.einsum("crk,crk->rk", probs, probs).T @ there
        common += there.T @ there
    squared = np.maximum(lengths + lengths.T - cross - cross.T, 0.0)
    np.fill_diagonal(squared, 0.0)
    met = common > 0
    squared /= np.where(met, common, 1.0)
    apart = met & ~np.eye(clients, dtype=bool)
    return np.where(met, squared, squared[apart].mean() if apart.any() else 0.0)


# --- blocks ------------------------------------------------------------------------------------


def blocks(
    logits: Logits | Chunked, weights: FloatArray, heard: Mask | None = None
) -> Iterator[tuple[slice, FloatArray, FloatArray]]:
    """Rows in turn: which, their probabilities ``[classes, rows, clients]`` and their shares.

    Probabilities belong to the caller; shares ``[rows, clients]`` sum to 1 over the clients, or
    are NaN.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``; of those who are heard.
        heard: bool ``[clients]``, whose predictions are taken; None: of all.
    """
    _, rows, classes = logits.shape
    shares = np.ascontiguousarray(spread(weights, rows).T)
    size = max(CELLS // max(shares.shape[1] * classes, 1), FEWEST)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        said = logits[:, part] if heard is None or heard.all() else logits[:, part][heard]
        probs = np.array(said.transpose(2, 1, 0), dtype=np.float64, order="C")
        probs -= probs.max(axis=0)
        np.exp(probs, out=probs)
        probs /= probs.sum(axis=0)
        yield part, probs, shares[part]


def weighted_mean(logits: Logits | Chunked, weights: FloatArray) -> Probs:
    """The linear pool, a block of rows at a time."""
    found = np.empty(logits.shape[1:])
    for rows, probs, shares in blocks(logits, weights):
        found[rows] = _normalised(np.einsum("crk,rk->cr", probs, shares))
    return found


def _normalised(columns: FloatArray) -> Probs:
    """``[classes, rows]`` as rows that sum to 1."""
    probs: Probs = (columns / columns.sum(axis=0)).T
    return probs
