"""Which library multiplies matrices: PyTorch's default leaves wide AMD processors half idle.

``torch.set_float32_matmul_precision("medium")`` hands float32 products to oneDNN. On AMD's
processors from family 26 (Zen 5) on that is about twice as fast as MKL, which does not use their
512-bit units; before it gains nothing and loses a digit. Where a processor has units for bfloat16
the same call may compute in that, so it is used only where a product of this machine shows the
error of float32. The choice is made by facts and not by a clock: equal machines choose alike, and
repeat their bytes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fedistill.seeding import generator

LARGEST_ERROR = 1e-5
"""Of a product, relative to its largest value: float32 stays below 1e-6."""
WIDE = 26
"""The first family of AMD processors whose units are as wide as their registers."""


@contextmanager
def matmul_precision(mode: str) -> Iterator[None]:
    """Multiply float32 matrices in a mode within the block.

    Where a program uses PyTorch's newer setting, its getter refuses: then nothing is changed.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        yield
        return
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def best_mode() -> str:
    """``medium`` where that is known to be fast and shown to be exact, else ``highest``."""
    family = re.search(r"AuthenticAMD\s+cpu family\s*:\s*(\d+)", processor())
    if family is None or int(family[1]) < WIDE:
        return "highest"
    return "medium" if error_of("medium") < LARGEST_ERROR else "highest"


@functools.cache
def error_of(mode: str) -> float:
    """Largest error of a product in this mode, relative to its largest value."""
    random = generator("precision")
    left = torch.from_numpy(random.normal(size=(64, 784)).astype("float32"))
    right = torch.from_numpy(random.normal(size=(784, 256)).astype("float32"))
    exact = left.double() @ right.double()
    with matmul_precision(mode):
        found = (left @ right).double()
        stacked = torch.bmm(left[None].expand(2, -1, -1), right[None].expand(2, -1, -1))
    worst = max((found - exact).abs().max(), (stacked[1].double() - exact).abs().max())
    return float(worst / exact.abs().max())


def processor() -> str:
    """What the system says of its processor; empty where it does not say."""
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace")[:4000] if path.exists() else ""
