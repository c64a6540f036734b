"""Heads that grow: classes come without being announced, and what was known stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedistill.distill.trunk import head_of
from fedistill.errors import DataError, FedistillError

MOST_CLASSES = 100_000
"""A label beyond this is a mistake and no class: a head for it would fill the memory."""


def head_size(module: nn.Module) -> int:
    """Classes that the head of a module has; 0 where there is no linear layer to tell."""
    head = head_of(module)
    return 0 if head is None else head.out_features


def head_name(module: nn.Module) -> str:
    """What the head of a module is called in it; empty where it is the module, or where none is."""
    head = head_of(module)
    return next((name for name, layer in module.named_modules() if layer is head), "")


def shaped(build: Callable[[], nn.Module], classes: int) -> nn.Module:
    """A module as new, with that many outputs; 0: with as many as its factory gives it."""
    module = build()
    if classes and head_size(module) not in {0, classes}:
        grow_head(module, classes)
    return module


def check_growth(classes: int, now: int) -> None:
    """Refuse what cannot be a number of classes.

    Raises:
        DataError: it is out of range.
    """
    if classes > max(now, MOST_CLASSES):
        raise DataError(
            f"expected labels below {MOST_CLASSES}, found {classes - 1}: map classes to numbers "
            "from 0"
        )


def grow_head(module: nn.Module, classes: int) -> dict[Tensor, Tensor]:
    """Give a module outputs for more classes; those it has do not change by one bit.

    Args:
        module: a classifier whose last linear layer gives the logits; changed in place. Weights
            of new classes are drawn as torch draws those of a new layer.
        classes: how many it shall have; fewer than it has take the last ones away.

    Returns:
        From each weight that was replaced to what replaced it.

    Raises:
        FedistillError: no such layer.
    """
    head = head_of(module)
    if head is None:
        raise FedistillError(
            f"{type(module).__name__} has no linear layer that could grow to {classes} classes: "
            "build it with all classes"
        )
    fresh = nn.Linear(head.in_features, classes, bias=head.bias is not None)
    replaced: dict[Tensor, Tensor] = {}
    for name in ("weight", "bias"):
        old = getattr(head, name)
        if old is None:
            continue
        wide = getattr(fresh, name).detach().to(old)
        both = min(len(old), classes)
        wide[:both] = old.detach()[:both]
        new = nn.Parameter(wide, requires_grad=old.requires_grad)
        setattr(head, name, new)
        replaced[old] = new
    head.out_features = classes
    return replaced


def widened(average: Tensor, weight: Tensor) -> Tensor:
    """The moving average of a weight; what is new in the weight is taken over as it is."""
    if average.shape == weight.shape:
        return average
    wide, both = weight.detach().clone(), min(len(average), len(weight))
    wide[:both] = average[:both]
    return wide


def widen(tensor: Tensor, like: Tensor) -> Tensor:
    """What an optimizer keeps of a weight, with zeros for what is new in the weight."""
    if tensor.shape == like.shape or not tensor.dim():
        return tensor
    wide = torch.zeros_like(like)
    wide[: len(tensor)] = tensor
    return wide


def moved(
    state: Mapping[Tensor, dict[str, Tensor]], replaced: Mapping[Tensor, Tensor]
) -> dict[Tensor, dict[str, Tensor]]:
    """The state of an optimizer whose weights were replaced."""
    return {
        (new := replaced.get(weight, weight)): {k: widen(v, new) for k, v in kept.items()}
        for weight, kept in state.items()
    }
