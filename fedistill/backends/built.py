"""How a module was built: what it computes by, but for its weights."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType

import numpy as np
import torch
from torch import nn


def built_of(module: nn.Module) -> tuple[object, ...] | str:
    """What modules that compute the same with the same weights have in common.

    That is the kinds of their layers, under the same names, and the values of the layers'
    attributes. Compared are plain values and functions that have a name of their own.

    Returns:
        Something to compare; or why a module cannot be compared, in words that end a sentence.
    """
    found: list[object] = []
    for name, layer in module.named_modules(remove_duplicate=False):
        found += [name, type(layer)]
        for key, value in sorted(vars(layer).items()):
            if key in _OF_TORCH:
                continue
            plain = _plain(value)
            if plain is None:
                owner, kind = type(layer).__name__, type(value).__name__
                return f"{owner} keeps a {kind} as {key}, which cannot be compared"
            found += [key, plain]
    return tuple(found)


_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes of every module: weights and layers, which are met by name, hooks and the mode."""

_VALUES = (bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device)


def _plain(value: object) -> object:
    """Something that is equal where values are; None where there is no such thing."""
    if value is None or isinstance(value, _VALUES):
        return type(value), repr(value)
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        # A lambda, or what was made in a function, is known by no name, and may hold anything.
        return None if "<" in value.__qualname__ else (value,)
    if not isinstance(value, dict | list | tuple):
        return None
    parts = tuple(map(_plain, value.items() if isinstance(value, dict) else value))
    return None if None in parts else (type(value), parts)
