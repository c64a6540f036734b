"""Products in full float32, whatever a program has set.

``torch.set_float32_matmul_precision("high")`` and TF32 on a GPU round the factors of a product to
11 bits or 8. A norm that is measured by one product and a sum that is made by another then
disagree, and a row may add more than the clipping norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from operator import attrgetter
from typing import Any

import torch

OPERATIONS = (
    "cuda.matmul",
    "cudnn.conv",
    "cudnn.rnn",
    "mkldnn.matmul",
    "mkldnn.conv",
    "mkldnn.rnn",
)
EXACT = ("ieee", "none")
"""Full precision: as asked for, or since nothing else is set."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply and convolve float32 as such within the block."""
    if not kinds():
        with _by_older_settings():
            yield
        return
    before = [(kind, kind.fp32_precision) for kind in kinds()]
    rounded = [(kind, precision) for kind, precision in before if precision not in EXACT]
    try:
        for kind, _ in rounded:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in rounded:
            kind.fp32_precision = precision


@cache
def kinds() -> tuple[Any, ...]:
    """What has a precision of its own; nothing before PyTorch 2.9."""
    if not hasattr(torch.backends, "fp32_precision"):
        return ()
    found: tuple[Any, ...] = attrgetter(*OPERATIONS)(torch.backends)
    return found


@contextmanager
def _by_older_settings() -> Iterator[None]:
    """Two settings, and not one for each kind of operation."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with ExitStack() as after:
        after.callback(torch.set_float32_matmul_precision, products)
        after.callback(setattr, torch.backends.cudnn, "allow_tf32", convolutions)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
