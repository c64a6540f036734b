"""A pooled convolution as products of matrices, of images whose rows come last.

An image is cut into stripes: for each of its lines, the ``side`` pixels of every channel that a
pair of neighbouring places sees. Lines below each other lie below each other in memory, so what a
line of outputs sees is a piece of the stripes as it is, and nothing is copied for the height of the
kernel. The weights of the two places of a pair are the kernel, shifted, among zeros: a few more
multiplications, but half the pixels to gather and larger matrices, and pooling compares whole
tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        """Pixels of a line that a pair of places sees."""
        return self.kernel + 1

    @property
    def windows(self) -> tuple[int, int]:
        """How many, each way; a place that fills no window is left out, as PyTorch does."""
        rest = 2 * self.padding - self.kernel + 1
        return (self.height + rest) // 2, (self.width + rest) // 2


def gather(inputs: Tensor, at: Geometry) -> Tensor:
    """What the pairs of places see of each line of the padded image.

    Args:
        inputs: ``[height, channels, width, rows]``, in any order of memory.
        at: the convolution.

    Returns:
        Stripes ``[padded height, channels, side, windows in a line, rows]``.
    """
    if at.padding:
        around = at.padding, at.padding
        inputs = F.pad(inputs, (0, 0, *around, 0, 0, *around))
    return inputs.unfold(2, at.side, 2).permute(0, 1, 4, 2, 3).contiguous()


def scatter(stripes: Tensor, at: Geometry) -> Tensor:
    """The transpose of :func:`gather`: each pixel gets the sum of what was said of it.

    Args:
        stripes: as :func:`gather` returns them.
        at: the convolution.

    Returns:
        ``[height, channels, width, rows]``.
    """
    lines, channels, _, across, rows = stripes.shape
    pad = at.padding
    sums = stripes.new_zeros(lines, channels, at.width + 2 * pad, rows)
    for right in range(at.side):
        sums[:, :, right : right + 2 * across : 2].add_(stripes[:, :, right])
    return sums[pad : pad + at.height, :, pad : pad + at.width]


def seen(stripes: Tensor, at: Geometry) -> Tensor:
    """What each line of outputs sees, a column for each pair of places and row.

    Args:
        stripes: of :func:`gather`, in their order of memory.
        at: the convolution.

    Returns:
        ``[lines, kernel * channels * side, windows in a line * rows]``; lines overlap in memory.
    """
    columns = stripes.shape[3] * stripes.shape[4]
    line = at.before * at.side
    shape = 2 * at.windows[0], at.kernel * line, columns
    return stripes.as_strided(shape, (line * columns, columns, 1))


def spread(kernel: Tensor, at: Geometry) -> Tensor:
    """The kernel at each place of a pair, ``[2 * after, kernel * before * side]``."""
    matrix = kernel.new_zeros(2, at.after, at.kernel, at.before, at.side)
    for place in range(2):
        matrix[place, ..., place : place + at.kernel] = kernel.transpose(1, 2)
    return matrix.view(2 * at.after, -1)


def collect(matrix: Tensor, at: Geometry) -> Tensor:
    """The transpose of :func:`spread`, ``[after, before, kernel, kernel]``."""
    left, right = matrix.reshape(2, at.after, at.kernel, at.before, at.side)
    found: Tensor = left[..., :-1] + right[..., 1:]
    return found.transpose(1, 2)


# --- pooling -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which place of each window was the largest, as zeros and ones.

    Attributes:
        left: whether in each line the left one is, ``[windows, 2, n]``.
        upper: whether the upper line has it, ``[windows, n]``.
    """

    left: Tensor
    upper: Tensor


def pool(places: Tensor, keep: bool) -> tuple[Tensor, Choice | None]:
    """The largest of each window, and which it was: the first in reading order where several are.

    Args:
        places: ``[windows, 2, 2, n]``: below each other, its lines, its places in a line;
            overwritten where the choice is kept.
        keep: whether it is.
    """
    left, right = places.unbind(2)
    lines = torch.maximum(left, right)
    upper, lower = lines.unbind(1)
    largest = torch.maximum(upper, lower)
    if not keep:
        return largest, None
    return largest, Choice(left.ge_(right), upper.ge_(lower))


def unpool(delta: Tensor, choice: Choice) -> Tensor:
    """Each value ``[windows, n]`` at the chosen place of its window, ``[windows, 2, 2, n]``."""
    windows, count = delta.shape
    lines, places = delta.new_empty(windows, 2, count), delta.new_empty(windows, 2, 2, count)
    torch.mul(delta, choice.upper, out=lines[:, 0])
    torch.sub(delta, lines[:, 0], out=lines[:, 1])
    torch.mul(lines, choice.left, out=places[:, :, 0])
    torch.sub(lines, places[:, :, 0], out=places[:, :, 1])
    return places
