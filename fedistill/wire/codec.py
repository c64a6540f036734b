"""Codecs: probabilities to bytes and back.

A codec sees ``probs [rows, classes]`` and returns bytes before compression, of a number that the
header alone tells; :func:`pack` adds entropy coding. What a row lost in a codec is measured by
KL(sent || decoded) in nats. One set of probabilities carries the logits (up to a constant per
row), so a receiver may still apply any temperature: that is why the default keeps the tail, as
log-probabilities, and not the head.

Every codec refuses to encode NaN, infinity and negative numbers, and refuses to decode codes that
no probabilities could have given (faults 1, 2 and 9); both as :class:`Rejected`. Decoding takes
memory in proportion to the rows and classes of the header and to nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.types import FloatArray, Probs
from fedistill.wire.entropy import pack as pack
from fedistill.wire.entropy import unpack as unpack
from fedistill.wire.grid import Codes, Grid, measured, sound
from fedistill.wire.simplex import LABELS, SAMPLED, simplex
from fedistill.wire.topk import LOWEST as LOWEST
from fedistill.wire.topk import from_log_codes, log_codes, top_k


@dataclass(frozen=True)
class Codec:
    """A pair of functions, the bytes that they take, and one line that says what it is.

    Attributes:
        summary: one line.
        encode: ``probs [rows, classes]`` to bytes; one that draws takes a keyword ``seed`` too.
        decode: bytes, rows and classes to float32 probabilities ``[rows, classes]``.
        bytes_per_value: bytes before compression of a value, where all take the same.
        row_bytes: bytes before compression of a row, given the number of classes; None where
            :attr:`bytes_per_value` says it.
        grid: the whole numbers in between, for :mod:`fedistill.wire.delta`; None has no deltas.
        draws: whether encoding draws from a seed. Only then is one passed.
        loss: nats that a row may lose, mean over the rows of ``fedistill.testing.check_codec``.
    """

    summary: str
    encode: Callable[..., bytes]
    decode: Callable[[bytes, int, int], Probs]
    bytes_per_value: float = 0
    row_bytes: Callable[[int], int] | None = None
    grid: Grid | None = None
    draws: bool = False
    loss: float = 0.01

    def size(self, rows: int, classes: int) -> int:
        """Bytes of coded rows before compression."""
        if self.row_bytes is not None:
            return rows * self.row_bytes(classes)
        return int(self.bytes_per_value * rows * classes)


def _floats(bits: int) -> Grid:
    """Floating-point numbers as they are; the codes are their bits."""
    float_type, code_type = f"<f{bits // 8}", f"<u{bits // 8}"

    def quantise(probs: Probs) -> Codes:
        return np.ascontiguousarray(sound(probs), dtype=float_type).view(code_type)

    def restore(codes: Codes, classes: int) -> Probs:
        values: Probs = codes.view(float_type).astype(np.float32)
        if bits == 32:
            return values
        with np.errstate(invalid="ignore"):  # infinities of both signs, for the door to refuse
            sums = values.sum(axis=1, keepdims=True, dtype=np.float64)
        # What two bytes rounded away. Rows further off are for the door to refuse.
        near = np.abs(sums[:, 0] - 1) <= 1e-2
        values[near] /= sums[near]
        return values

    def load(data: bytes, rows: int, classes: int) -> Codes:
        measured(data, rows * classes * bits // 8)
        return np.frombuffer(data, dtype=code_type).reshape(rows, classes)

    return Grid(
        quantise=quantise,
        restore=restore,
        check=lambda codes, classes: None,
        dump=lambda codes: codes.tobytes(),
        load=load,
        columns=lambda classes: classes,
        row_bytes=lambda classes: classes * bits // 8,
        dtype=lambda classes: code_type,
    )


def _restore_u8(codes: Codes, classes: int) -> Probs:
    values = from_log_codes(codes)
    probs: Probs = values / values.sum(axis=1, keepdims=True)
    return probs.astype(np.float32)


def _load_u8(data: bytes, rows: int, classes: int) -> Codes:
    measured(data, rows * classes)
    return np.frombuffer(data, dtype=np.uint8).reshape(rows, classes)


U8 = Grid(
    quantise=lambda probs: log_codes(sound(probs)),
    restore=_restore_u8,
    check=lambda codes, classes: None,
    dump=lambda codes: codes.tobytes(),
    load=_load_u8,
    columns=lambda classes: classes,
    row_bytes=lambda classes: classes,
    dtype=lambda classes: np.uint8,
)


def _uniform(summary: str, grid: Grid, bytes_per_value: float, loss: float = 0.01) -> Codec:
    """A codec in which every value takes the same."""
    return Codec(summary, grid.encode, grid.decode, bytes_per_value, grid=grid, loss=loss)


def _by_row(summary: str, grid: Grid, loss: float) -> Codec:
    return Codec(summary, grid.encode, grid.decode, row_bytes=grid.row_bytes, grid=grid, loss=loss)


def _encode_sampled(probs: Probs, *, seed: int = 0) -> bytes:
    return SAMPLED.dump(SAMPLED.quantise(probs, seed))


_LOSS = {2: 2.0, 3: 0.7, 4: 0.25, 5: 0.1, 6: 0.05, 7: 0.02, 8: 0.01}
"""Nats that a simplex of so many bits may lose on the random rows of the checker."""

CODECS: Mapping[str, Codec] = {
    "float32": _uniform("four bytes a value, exact", _floats(32), 4),
    "float16": _uniform("two bytes a value; probabilities below 3e-8 become 0", _floats(16), 2),
    "u8": _uniform("one byte a value: log-probability in [-12, 0] in steps of 0.047", U8, 1),
    "simplex-1": _by_row("the top class of a row (CFD with one bit)", LABELS, 8.0),
    **{
        f"simplex-{bits}": _uniform(
            f"{(1 << bits) - 1} units a row, dealt by largest remainder (CFD with {bits} bits)",
            simplex(bits),
            1,
            loss,
        )
        for bits, loss in _LOSS.items()
    },
    "top-k": _by_row("the 8 largest classes as u8, the rest spread evenly", top_k(8), 0.01),
    "label": _by_row("the top class of a row", LABELS, 8.0),
    "sampled-label": Codec(
        "a class drawn from a row: right on average over many clients",
        _encode_sampled,
        SAMPLED.decode,
        row_bytes=SAMPLED.row_bytes,
        grid=SAMPLED,
        draws=True,
        loss=np.inf,
    ),
}


def encode(codec: str, probs: Probs, *, seed: int = 0) -> bytes:
    """Coded rows before compression, :func:`expected_size` bytes.

    Args:
        codec: its name.
        probs: ``[rows, classes]``.
        seed: of the draws of a codec that draws; derive it from who encodes, round and step.

    Raises:
        Rejected: ``nonfinite`` or ``not_probs``.
    """
    chosen = CODECS[codec]
    return chosen.encode(probs, seed=seed) if chosen.draws else chosen.encode(probs)


def encode_familiarity(ratios: FloatArray) -> bytes:
    """Log density ratios ``[rows]`` as one byte each, clamped to the limit, step 0.063."""
    limited = np.clip(ratios, -FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)
    codes = np.rint((limited + FAMILIARITY_LIMIT) * (255 / (2 * FAMILIARITY_LIMIT)))
    return bytes(codes.astype(np.uint8).tobytes())


def decode_familiarity(data: bytes) -> FloatArray:
    """The inverse of :func:`encode_familiarity`, float32 ``[rows]``."""
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.float32)
    return codes * np.float32(2 * FAMILIARITY_LIMIT / 255) - np.float32(FAMILIARITY_LIMIT)


def expected_size(codec: str, rows: int, classes: int, familiarity: bool = False) -> int:
    """Bytes of a payload before compression, known from the header alone."""
    return CODECS[codec].size(rows, classes) + (rows if familiarity else 0)


def kl(sent: Probs, received: Probs) -> float:
    """Mean over rows of KL(sent || received) in nats; what a codec lost."""
    p = np.maximum(np.asarray(sent, dtype=np.float64), 1e-30)
    q = np.maximum(np.asarray(received, dtype=np.float64), 1e-30)
    return float((p * (np.log(p) - np.log(q))).sum(axis=1).mean())
