"""Top k: the most likely classes of a row as log-probabilities, and one bucket for the rest.

FedMKT (COLING 2025) sends the 128 largest logits of a vocabulary, renormalises over them and
gives every other class exactly 0, so that the mass of the tail is lost. Deviation: the mass of
all other classes travels as one more value and is spread evenly over them.
"""

from __future__ import annotations

import numpy as np

from fedistill.errors import Rejected
from fedistill.types import FloatArray, Probs
from fedistill.wire.grid import Codes, Grid, label_type, measured, shares, width

LOWEST = 12.0
"""Log-probabilities below minus this are sent as minus this (a probability of 6e-6)."""

DECODED = np.exp(np.arange(256) * (-LOWEST / 255.0))
"""What each code stands for."""


def log_codes(probs: FloatArray) -> Codes:
    """Probabilities as one byte each: minus the logarithm in steps of 12/255."""
    logs = np.log(np.maximum(probs, np.exp(-LOWEST)))
    return np.rint(logs * (-255.0 / LOWEST)).clip(0, 255).astype(np.uint8)


def from_log_codes(codes: Codes) -> FloatArray:
    """The inverse of :func:`log_codes`, not normalised."""
    values: FloatArray = DECODED[codes]
    return values


def top_k(k: int = 8) -> Grid:
    """The ``k`` largest classes of a row, of equals the lower ones, and the rest.

    Codes of a row are the kept class numbers, the largest first, their log-probabilities and
    that of the rest. Where there are no more than ``k`` classes all are sent, without numbers.

    Args:
        k: classes kept, at least 1.
    """

    def columns(classes: int) -> int:
        return 2 * k + 1 if classes > k else classes

    def row_bytes(classes: int) -> int:
        return k * width(classes) + k + 1 if classes > k else classes

    def dtype(classes: int) -> np.typing.DTypeLike:
        return label_type(classes) if classes > k else np.uint8

    def quantise(probs: Probs) -> Codes:
        values, classes = shares(probs), probs.shape[1]
        if classes <= k:
            return log_codes(values)
        kept = _largest(values, k)
        top = np.take_along_axis(values, kept, axis=1)
        rest = np.maximum(1 - top.sum(axis=1, keepdims=True), 0)
        logs = log_codes(np.concatenate([top, rest], axis=1))
        return np.concatenate([kept, logs], axis=1).astype(dtype(classes))

    def restore(codes: Codes, classes: int) -> Probs:
        if classes <= k:
            values = from_log_codes(codes)
        else:
            kept = codes[:, :k].astype(np.int64)
            logs = from_log_codes(codes[:, k:])
            values = np.repeat(logs[:, k:] / (classes - k), classes, axis=1)
            np.put_along_axis(values, kept, logs[:, :k], axis=1)
        probs: Probs = (values / values.sum(axis=1, keepdims=True)).astype(np.float32)
        return probs

    def check(codes: Codes, classes: int) -> None:
        if classes <= k or not len(codes):
            return
        kept = np.sort(codes[:, :k], axis=1)
        if int(kept[:, -1].max()) >= classes or (kept[:, 1:] == kept[:, :-1]).any():
            raise Rejected("not_probs", "class numbers of a row that do not exist, or twice")
        if int(codes[:, k:].max()) > 255:
            raise Rejected("not_probs", "a log-probability of more than one byte")

    def dump(codes: Codes) -> bytes:
        # Columns of one kind stand together: numbers of the top class, of the second, ...
        if codes.shape[1] != 2 * k + 1:
            return codes.tobytes()
        return codes[:, :k].T.tobytes() + codes[:, k:].T.astype(np.uint8).tobytes()

    def load(data: bytes, rows: int, classes: int) -> Codes:
        measured(data, rows * row_bytes(classes))
        if classes <= k:
            return np.frombuffer(data, dtype=np.uint8).reshape(rows, classes)
        numbers = rows * k * width(classes)
        kept = np.frombuffer(data[:numbers], dtype=dtype(classes)).reshape(k, rows).T
        logs = np.frombuffer(data[numbers:], dtype=np.uint8).reshape(k + 1, rows).T
        codes = np.concatenate([kept, logs.astype(dtype(classes))], axis=1)
        check(codes, classes)
        return codes

    return Grid(quantise, restore, check, dump, load, columns, row_bytes, dtype)


def _largest(values: FloatArray, k: int) -> Codes:
    """Class numbers of the ``k`` largest values of each row, the largest first; ``[rows, k]``."""
    classes = values.shape[1]
    # One key orders a row: the value, then the lower class. No two are equal.
    keys = np.rint(values * (1 << 40)).astype(np.int64) * classes
    keys += np.arange(classes - 1, -1, -1)
    kept = np.argpartition(keys, classes - k, axis=1)[:, classes - k :]
    order = np.argsort(-np.take_along_axis(keys, kept, axis=1), axis=1)
    return np.take_along_axis(kept, order, axis=1)
