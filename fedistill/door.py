"""The door: each upload is judged alone, so that a bad one costs nobody but its sender a round.

Every check refuses with a short fixed reason code; what is let in is an :class:`Answer`. All of
its predictions are decoded and judged here, and none are kept: an answer is read again when it is
combined, some rows at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from fedistill.aggregate.chunked import parts
from fedistill.errors import Rejected
from fedistill.types import FloatArray, IntArray, Probs
from fedistill.wire.delta import restore
from fedistill.wire.folded import Folded
from fedistill.wire.grid import Codes
from fedistill.wire.messages import Plan, Upload

LARGEST_SIZE = 1 << 40
"""A claimed number of rows beyond this is absurd and refused; below, it is clamped."""


@dataclass(frozen=True)
class Answer:
    """An upload that passed the door.

    Attributes:
        upload: as it came, without what is read from it here.
        rows: ``[answered]`` proxy row numbers.
        said: codes of the predictions, ``[answered, columns]``; of another exchange, its table.
        familiarity: ``[answered]``, where it is shared.
        age: rounds that it came late.
    """

    upload: Upload
    rows: IntArray
    said: Folded | FloatArray
    familiarity: FloatArray | None = None
    age: int = 0

    @property
    def codes(self) -> Codes | None:
        """The codes as they travelled, ``[answered, columns]``; a table has none."""
        return self.said[:] if isinstance(self.said, Folded) else None

    @property
    def probs(self) -> Probs:
        """All of it decoded, ``[answered, classes]``."""
        return self.read(slice(None))

    def read(self, places: slice | IntArray) -> Probs:
        """Predictions of some of its rows, decoded; of a table, some items."""
        if not isinstance(self.said, Folded):
            return self.said[places]
        return restore(self.upload.codec, self.said[places], self.upload.shape[1])

    def places(self, asked: IntArray) -> IntArray:
        """For each row asked its place among the answered ones, or -1."""
        found = np.full(len(asked), -1)
        _, there, here = np.intersect1d(asked, self.rows, assume_unique=True, return_indices=True)
        found[there] = here
        return found


def check_sender(
    upload: Upload, sender: str, asked: Collection[str], enrolled: Collection[str], run: str
) -> None:
    """Whether it is from whom it says, and from somebody who was asked."""
    if upload.client not in enrolled:
        raise Rejected("unknown_client", "nobody of that id is enrolled")
    if upload.client != sender:
        raise Rejected("conflict", "the id belongs to another client")
    if upload.client not in asked:
        raise Rejected("not_sampled", "this client was not asked")
    if upload.run != run:
        raise Rejected("run", "an upload of another run")


def check_terms(upload: Upload, plan: Plan, *, shares: str, codec: str, familiarity: bool) -> None:
    """What both sides must mean alike before a number can be compared."""
    if upload.proxy != plan.proxy:
        raise Rejected("proxy_version", "predictions on other proxy rows")
    if upload.classes != plan.classes:
        raise Rejected("class_map", "other classes, or another order of them")
    if upload.share not in {shares, "none"}:
        raise Rejected("kind", f"this run exchanges {shares} only")
    if upload.codec != codec:
        raise Rejected("codec", f"expected {codec}")
    if upload.temperature != 1.0:
        raise Rejected("temperature", "expected predictions at temperature 1")
    if upload.familiarity != familiarity:
        raise Rejected("fields", "familiarity is expected by the rule, or is not")
    if (upload.drift is not None) != plan.watch:
        raise Rejected("fields", "an alarm bit is expected by the plan, or is not")


def check_shape(upload: Upload, expected: tuple[int, int], *, partial: bool) -> None:
    """Whether it has the rows it should have; ``partial``: it may decline some."""
    if upload.declined and not partial:
        raise Rejected("shape", "every row that is asked must be answered")
    if upload.shape != expected:
        raise Rejected("shape", f"expected {expected}, found {upload.shape}")


def check_claims(upload: Upload, classes: int) -> None:
    """Claims about the client's own rows and privacy."""
    teaches = upload.share != "none"
    if not (int(teaches) <= upload.size <= LARGEST_SIZE) or (
        upload.size & (upload.size - 1) and upload.size
    ):
        raise Rejected("size", "expected a power of two, or 0 without own rows")
    if upload.epsilon is not None and not (math.isfinite(upload.epsilon) and upload.epsilon >= 0):
        raise Rejected("epsilon", "expected a finite number of at least 0")
    if not re.fullmatch("[0-9a-f]+", upload.seen):
        raise Rejected("seen", "expected a bit mask in hexadecimal")
    if int(upload.seen, 16) >= 1 << classes:
        raise Rejected("seen", "the mask names classes that do not exist")


def check_codes(codec: str, codes: Codes, classes: int) -> None:
    """What codes stand for, some rows at a time: see :func:`check_probs`."""
    for rows in parts(len(codes), classes):
        check_probs(restore(codec, codes[rows], classes))


def check_probs(probs: Probs) -> None:
    """The predictions themselves: finite, and probabilities."""
    if not np.isfinite(probs).all():
        raise Rejected("nonfinite", "NaN or infinity among the predictions")
    if probs.size and (
        probs.min() < 0 or probs.max() > 1.01 or np.abs(probs.sum(axis=1) - 1).max() > 1e-2
    ):
        raise Rejected("not_probs", "rows must be non-negative and sum to 1")
