"""Products in full float32, whatever a program has set.

``torch.set_float32_matmul_precision("high")`` and TF32 on a GPU round the factors of a product to
11 bits or 8. A norm that is measured by one product and a sum that is made by another then
disagree, and a row may add more than the clipping norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter

import torch

OPERATIONS = attrgetter(
    "cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"
)


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply and convolve float32 as such within the block."""
    if not _has_kinds():
        with _by_older_settings():
            yield
        return
    before = [(kind, kind.fp32_precision) for kind in OPERATIONS(torch.backends)]
    try:
        for kind, _ in before:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in before:
            kind.fp32_precision = precision


def _has_kinds() -> bool:
    """From PyTorch 2.9 on."""
    return hasattr(torch.backends, "fp32_precision")


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
