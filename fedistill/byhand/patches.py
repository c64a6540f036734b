"""A pooled convolution as a product of matrices, of images whose rows come last.

A column of the product is one 2x2 window of one row: what it sees, ``side`` x ``side`` pixels of
each channel, goes in, and its four places come out. The weights of a place are the kernel, shifted,
among zeros: more multiplications, but fewer pixels to gather, larger matrices, and pooling compares
whole tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """Sizes of a square convolution of stride 1 before a 2x2 pool.

    Attributes:
        before: channels of its inputs.
        after: channels of its outputs.
        kernel: its side.
        padding: zeros around an image.
        height: of an image.
        width: of an image.
    """

    before: int
    after: int
    kernel: int
    padding: int
    height: int
    width: int

    @property
    def side(self) -> int:
        """Pixels that a window sees, each way."""
        return self.kernel + 1

    @property
    def windows(self) -> tuple[int, int]:
        """How many, each way; a place that fills no window is left out, as PyTorch does."""
        rest = 2 * self.padding - self.kernel + 1
        return (self.height + rest) // 2, (self.width + rest) // 2


@dataclass(frozen=True)
class Tables:
    """Which pixels the windows see.

    Attributes:
        seen: for each channel, place in a window and window, the number of the pixel; one more
            than the last for a zero beside the image.
        edged: whether there are such zeros.
        said: for each pixel the places of ``seen`` that are it, one pixel after another.
        starts: of each pixel in ``said``.
    """

    seen: Tensor
    edged: bool
    said: Tensor
    starts: Tensor


@lru_cache(maxsize=32)
def tables(at: Geometry) -> Tables:
    """The tables of a convolution."""
    channel, down, right, high, wide = np.ogrid[
        : at.before, : at.side, : at.side, : at.windows[0], : at.windows[1]
    ]
    line, column = 2 * high + down - at.padding, 2 * wide + right - at.padding
    inside = (line >= 0) & (line < at.height) & (column >= 0) & (column < at.width)
    pixels = at.before * at.height * at.width
    number = (channel * at.height + line) * at.width + column
    seen = np.where(inside, number, pixels).ravel()
    said = np.argsort(seen, kind="stable")[: int((seen < pixels).sum())]
    starts = np.searchsorted(seen[said], np.arange(pixels))
    return Tables(
        torch.from_numpy(seen),
        len(said) < len(seen),
        torch.from_numpy(said),
        torch.from_numpy(starts),
    )


def gather(inputs: Tensor, at: Geometry) -> Tensor:
    """What each window sees, a column each.

    Args:
        inputs: ``[channels, height, width, rows]``, in any order of memory.
        at: the convolution.

    Returns:
        ``[channels * side * side, windows * rows]``.
    """
    table, rows = tables(at), inputs.shape[-1]
    if table.edged:
        pixels = inputs.new_empty(inputs[..., 0].numel() + 1, rows)
        pixels[:-1].view(inputs.shape).copy_(inputs)
        pixels[-1] = 0
    else:
        pixels = inputs.reshape(-1, rows)
    return pixels.index_select(0, table.seen).view(at.before * at.side**2, -1)


def scatter(columns: Tensor, at: Geometry) -> Tensor:
    """The transpose of :func:`gather`: each pixel gets the sum of what was said of it.

    Args:
        columns: ``[channels * side * side, windows * rows]``.
        at: the convolution.

    Returns:
        ``[channels, height, width, rows]``.
    """
    table = tables(at)
    said = columns.view(len(table.seen), -1)
    sums = F.embedding_bag(table.said, said, table.starts, mode="sum")
    return sums.view(at.before, at.height, at.width, -1)


def spread(kernel: Tensor, at: Geometry) -> Tensor:
    """The kernel at each place of a window, ``[4 * after, before * side * side]``."""
    matrix = kernel.new_zeros(4 * at.after, at.before * at.side**2)
    _places(matrix, at).copy_(kernel)
    return matrix


def collect(matrix: Tensor, at: Geometry) -> Tensor:
    """The transpose of :func:`spread`, ``[after, before, kernel, kernel]``."""
    upper, lower = _places(matrix, at)
    left, right = upper + lower
    found: Tensor = left + right
    return found


def _places(matrix: Tensor, at: Geometry) -> Tensor:
    """Where the kernel lies, ``[2, 2, after, before, kernel, kernel]``."""
    area = at.side**2
    row = at.before * area
    place = at.after * row
    shape = 2, 2, at.after, at.before, at.kernel, at.kernel
    return matrix.as_strided(shape, (2 * place + at.side, place + 1, row, area, at.side, 1))


# --- pooling -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which place of each window was the largest, as zeros and ones.

    Attributes:
        left: whether in each line the left one is, ``[2, n]``.
        upper: whether the upper line has it, ``[n]``.
    """

    left: Tensor
    upper: Tensor


def pool(places: Tensor, keep: bool) -> tuple[Tensor, Choice | None]:
    """The largest of each window, and which it was: the first in reading order where several are.

    Args:
        places: ``[2, 2, n]``; overwritten where the choice is kept.
        keep: whether it is.
    """
    lines = torch.maximum(places[:, 0], places[:, 1])
    largest = torch.maximum(lines[0], lines[1])
    if not keep:
        return largest, None
    return largest, Choice(places[:, 0].ge_(places[:, 1]), lines[0].ge_(lines[1]))


def unpool(delta: Tensor, choice: Choice) -> Tensor:
    """Each value at the chosen place of its window, ``[2, 2, n]``."""
    lines, places = delta.new_empty(2, len(delta)), delta.new_empty(2, 2, len(delta))
    torch.mul(delta, choice.upper, out=lines[0])
    torch.sub(delta, lines[0], out=lines[1])
    torch.mul(lines, choice.left, out=places[:, 0])
    torch.sub(lines, places[:, 0], out=places[:, 1])
    return places
