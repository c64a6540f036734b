"""2x2 max pooling on one CPU core: PyTorch's values and gradients to the bit, in less time.

``max_pool2d`` visits one element at a time: on small images it takes longer than the convolution
before it. oneDNN, which PyTorch brings along and convolves with, pools in its own layout with
vector instructions; a convolution that feeds it there saves copies of its output and gradient too.

Both send the gradient of a tied window to its first largest element in reading order (images with a
constant background are full of ties). They differ in windows of NaN or of minus infinity alone, so
what cannot be told to be finite takes PyTorch's way, as do float64, other devices, autocast,
``torch.func`` and convolutions with hooks, which expect ordinary tensors.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.altered import altered

LARGEST = 1e38
"""Below the largest float32: no sum that stays under it, in any order, becomes infinite."""


def convolve_and_pool(convolution: nn.Conv2d, inputs: Tensor) -> Tensor:
    """``max_pool2d(convolution(inputs), 2)``.

    Faster for kernels larger than 3x3.

    Args:
        convolution: with outputs of at least 2x2.
        inputs: ``[rows, channels, height, width]``.

    Returns:
        ``[rows, out channels, height // 2, width // 2]`` of the convolution's height and width.
    """
    weight, bias = convolution.weight, convolution.bias
    if _is_plain(convolution) and _is_ordinary(inputs) and _is_ordinary(weight):
        with torch.no_grad():
            # Cauchy and Schwarz: no output, nor any part of its sum, is larger.
            bound = torch.linalg.vector_norm(inputs) * torch.linalg.vector_norm(weight)
            if bias is not None:
                bound = bound + torch.linalg.vector_norm(bias)
        if bound.item() < LARGEST:
            return _pool(convolution(inputs.to_mkldnn()))
    return F.max_pool2d(convolution(inputs), 2)


class MaxPool(nn.Module):
    """``nn.MaxPool2d(2)``, inputs ``[rows, channels, height, width]``."""

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        if _is_ordinary(inputs):
            with torch.no_grad():
                finite = torch.linalg.vector_norm(inputs).isfinite().item()
            if finite:
                return _pool(inputs.to_mkldnn())
        return F.max_pool2d(inputs, 2)


def _pool(blocked: Tensor) -> Tensor:
    _keep_freed_memory()
    # The stride is spelt out: its default is empty, which the gradient of this layout refuses.
    pooled: Tensor = F.max_pool2d(blocked, 2, 2).to_dense()
    return pooled


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether PyTorch leaves it to oneDNN for any number of rows, and nobody listens in."""
    return (
        type(convolution) is nn.Conv2d
        and min(convolution.kernel_size) > 3
        and convolution.padding_mode == "zeros"
        and not altered(convolution)
    )


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether oneDNN can take it: float32 values, held by a tensor of no special kind."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
        and tensor.dim() == 4
        and tensor.numel() > 0
        and type(tensor) in (Tensor, nn.Parameter)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


@cache
def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, which asks for the same again.

    It returns freed memory to the system above twice the largest block it has seen come and go;
    faulting in the few megabytes of a step, every step, doubles its time. A block of 31 MB (32 is
    the most that counts), never touched, raises that bound to 62 MB. Elsewhere it does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
