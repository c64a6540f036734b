"""A module whose rows do not meet: layers that mix rows are replaced, others are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedistill import models
from fedistill.altered import altered
from fedistill.errors import FedistillError
from fedistill.pooling import MaxPool
from fedistill.privacy import gram
from fedistill.privacy.quiet import import_opacus

GROUPS = 32
"""Most groups of a GroupNorm (Wu and He, arXiv 1803.08494)."""

CHANNELS = 4
"""Fewest channels of a group."""

MODELS = (models.Linear, models.MLP, models.LeNet, models.CNN)
"""Their own code treats each row by itself."""

APART = (nn.Linear, nn.ReLU, nn.Conv2d, nn.GroupNorm, MaxPool, nn.Sequential)
"""Layers within them: what is written there is all that they do."""

KINDS = "GRU, LSTM, RNN and MultiheadAttention"


def private_module(build: Callable[[], nn.Module], notes: list[str]) -> nn.Module:
    """What ``build`` makes, with layers that keep the rows of a batch apart.

    BatchNorm becomes GroupNorm; recurrent layers and attention become Opacus's own, with their
    weights. The work of ``ModuleValidator.fix``, but for two things: that copies the module by
    pickle, and its GroupNorm may have groups of a single channel, which on a row of features are
    always zero. BatchNorm that is frozen with its statistics stays, and has to stay in eval.

    Args:
        build: a factory of modules.
        notes: what was replaced is appended, in words for the user.

    Raises:
        FedistillError: a layer that no replacement is known for, or that writes what private rows
            say into buffers or weights.
    """
    module = build()
    replaced: dict[str, list[str]] = {}
    for name, layer in list(module.named_modules()):
        if isinstance(layer, _BatchNorm):
            if not _frozen(layer):
                module = _put(module, name, _group_norm(layer))
                replaced.setdefault("BatchNorm became GroupNorm", []).append(name)
        elif isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
            raise FedistillError(
                f"layer {name or type(layer).__name__} shortens the vectors that private rows look "
                "up, without noise: build it without max_norm"
            )
        elif isinstance(layer, _InstanceNorm) and layer.track_running_stats:
            raise FedistillError(
                f"layer {name or type(layer).__name__} keeps running statistics of private rows: "
                "build InstanceNorm with track_running_stats=False"
            )
        elif _rejected(layer):
            module = _put(module, name, _opacus_layer(name, layer))
            kind = f"{type(layer).__name__} became Opacus's layer of that kind"
            replaced.setdefault(kind, []).append(name)
    notes += [
        f"{what}, which keeps rows apart: {_listed(names)}" for what, names in replaced.items()
    ]
    return module


def hold_still(module: nn.Module) -> None:
    """Put the layers that would mix rows, all frozen ones, into eval."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()


def fingerprint(module: nn.Module) -> list[tuple[str, int, int]]:
    """Which buffers and weights a module has, and how often each was written to."""
    held = [*module.named_buffers(), *module.named_parameters()]
    return [(name, id(value), value._version) for name, value in held]


def row_by_row(module: nn.Module) -> bool:
    """Whether a module is known to keep rows apart, so that no trial is needed.

    A model of this package with the layers that it is built of, and nothing hung on any of them.
    Of all others, those of PyTorch too, only a trial can tell: ``nn.Softmax(dim=0)`` and
    ``nn.TransformerEncoderLayer`` without ``batch_first`` compare rows.
    """
    if type(module) not in MODELS:
        return False
    inside = [layer for layer in module.modules() if layer is not module]
    known = all(type(layer) in APART for layer in inside)
    return known and not any(map(altered, module.modules()))


def anatomy(module: nn.Module) -> list[tuple[int, ...]]:
    """Of what layers a module is, and what hangs on them; another one is to be tried anew."""
    return [
        (id(layer), id(type(layer)), id(vars(layer).get("forward")), *_hooks(layer))
        for layer in module.modules()
    ]


def _hooks(layer: nn.Module) -> list[int]:
    hung = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return [id(hook) for hooks in hung for hook in hooks.values()]


def _frozen(layer: _BatchNorm) -> bool:
    weights = list(layer.parameters())
    taught = any(weight.requires_grad for weight in weights)
    return bool(weights) and not taught and layer.track_running_stats


def _group_norm(layer: _BatchNorm) -> nn.GroupNorm:
    """As many groups as there can be, up to 32, of four channels and more."""
    channels = layer.num_features
    if not isinstance(channels, int) or channels < 1:
        raise FedistillError(
            "a BatchNorm that learns its size cannot be private: give num_features"
        )
    most = max(1, min(GROUPS, channels // CHANNELS))
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels, affine=layer.affine)


def _rejected(layer: nn.Module) -> bool:
    if not any(weight.requires_grad for weight in layer.parameters(recurse=False)):
        attention = isinstance(layer, nn.MultiheadAttention)
        if not (attention and any(weight.requires_grad for weight in layer.parameters())):
            return False
    if type(layer) in gram.KINDS:
        return False
    import_opacus()
    from opacus.validators import ModuleValidator

    check = ModuleValidator.VALIDATORS.get(type(layer))
    if check is None:
        return isinstance(layer, nn.RNNBase)
    return bool(check(layer))


def _opacus_layer(name: str, layer: nn.Module) -> nn.Module:
    import_opacus()
    from opacus.validators import ModuleValidator

    repair: Any = ModuleValidator.FIXERS.get(type(layer))
    text = (
        f"layer {name or type(layer).__name__} ({type(layer).__name__}) mixes rows or hides its "
        f"weights, and cannot be private: {KINDS} of PyTorch itself can be replaced, "
    )
    if repair is None:
        raise FedistillError(text + "this one cannot; use another")
    try:
        made: nn.Module = repair(layer)
    except Exception as problem:
        raise FedistillError(text + f"this one not as it is built ({problem})") from None
    return made


def _put(module: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    if not name:
        return layer
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)
    return module


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name or "the module itself" for name in names)
