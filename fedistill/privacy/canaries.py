"""Canaries: rows with random labels, each among the training rows by its own fair coin.

Nothing but having seen a canary makes its label likelier than another one: a model that prefers
the labels of those that were in gives its rows away. A claim of differential privacy is about any
row that could be, so the inputs are such that canaries are easy to tell: far from real rows and
from one another, or the very proxy rows about which predictions are shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedistill.privacy.bounds import Coins
from fedistill.seeding import generator
from fedistill.types import FloatArray, IntArray, Rows, joined_records


@dataclass(frozen=True, eq=False)
class Canaries:
    """Rows that an audit adds, or leaves out.

    Attributes:
        rows: all of them, ``[canaries, ...]``.
        included: ``[canaries]``, whose coin said "in".
        proxy: ``[canaries]`` number of the proxy row that a canary copies, -1 where it copies none.
    """

    rows: Rows
    included: Coins
    proxy: IntArray

    def __len__(self) -> int:
        return len(self.rows)


def mixed(count: int, proxy: FloatArray, classes: int, seed: int) -> Canaries:
    """Canaries for a model: half are far from everything, half copy a proxy row each.

    The first are what a model gives away most easily, the second what its predictions on proxy
    rows do. With few proxy rows more are far.

    Args:
        count: how many.
        proxy: ``[rows, ...]`` proxy rows.
        classes: how many labels there are.
        seed: of inputs, labels and coins.
    """
    near = min(count // 2, len(proxy))
    place = generator(seed, "places").permutation(len(proxy))[:near]
    inputs = np.concatenate([scattered(count - near, proxy, seed), proxy[place]])
    copies = np.concatenate([np.full(count - near, -1), place])
    return Canaries(Rows(inputs, labels(count, classes, seed)), coins(count, seed), copies)


def scattered(count: int, proxy: FloatArray, seed: int) -> FloatArray:
    """Inputs far from real rows and from one another, ``[count, ...]``.

    Every value is plus or minus a large one, by a coin: the corners of a cube, almost at right
    angles to one another, so that what one of them teaches stays its own. Large is what one value
    in a hundred exceeds: beyond, training would break down for want of a gradient.
    """
    large = float(np.quantile(np.abs(proxy), 0.99)) or float(np.abs(proxy).max()) or 1.0
    signs = generator(seed, "inputs").integers(2, size=(count, *proxy.shape[1:])) * 2 - 1
    return np.asarray(large * signs, dtype=np.float32)


def copied(count: int, proxy: FloatArray, classes: int, seed: int) -> Canaries:
    """Canaries that are proxy rows, for learners that answer about proxy rows and nothing else.

    A proxy row is copied as often as need be, each time with another label while there is one.
    """
    draw = generator(seed, "inputs")
    turns = -(-count // len(proxy))
    place = np.concatenate([draw.permutation(len(proxy)) for _ in range(turns)])[:count]
    first = draw.integers(classes, size=len(proxy))
    chosen = (first[place] + np.arange(count) // len(proxy)) % classes
    return Canaries(Rows(proxy[place], chosen), coins(count, seed), place)


def coins(count: int, seed: int) -> Coins:
    """One fair coin for each canary."""
    return generator(seed, "coins").random(count) < 0.5


def labels(count: int, classes: int, seed: int) -> IntArray:
    """One label for each canary, all equally likely."""
    return generator(seed, "labels").integers(classes, size=count)


def planted(rows: Rows, canaries: Canaries, seed: int) -> Rows:
    """The rows with those canaries whose coin said "in", in an order that tells nothing.

    Where rows say whose they are, every canary is somebody of its own.
    """
    chosen = np.flatnonzero(canaries.included)
    ids = subject = None
    if rows.ids is not None:
        ids = np.concatenate([rows.ids, rows.ids.max(initial=-1) + 1 + chosen])
    if rows.subject is not None:
        names = np.array([f"canary {number}" for number in chosen], dtype=np.str_)
        subject = np.concatenate([rows.subject, names])
    together = Rows(
        np.concatenate([rows.inputs, canaries.rows.inputs[chosen]]),
        np.concatenate([rows.labels, canaries.rows.labels[chosen]]),
        ids=ids,
        subject=subject,
        record=joined_records([rows, canaries.rows.take(chosen)]),
    )
    return together.take(generator(seed, "order").permutation(len(together)))
