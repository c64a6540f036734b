"""What named layers of a module say while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedistill.errors import FedistillError, did_you_mean


class Captured(Mapping[str, Tensor]):
    """The outputs of layers in the last forward pass, by name.

    Reading one that a later layer has changed in place is refused: it is no longer what its layer
    said. A layer that runs several times in one pass leaves its last output.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, int]] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._found:
            raise FedistillError(f'layer "{name}" did not run in the forward pass')
        output, version = self._found[name]
        if output._version != version:
            raise FedistillError(
                f'the output of layer "{name}" was changed in place by a later layer (such as '
                "ReLU(inplace=True)): name that layer, or make it inplace=False"
            )
        return output

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def keep(self, name: str, output: Any) -> None:
        """Hold what a layer said until it speaks again."""
        if not isinstance(output, Tensor):
            raise FedistillError(
                f'layer "{name}" must return a tensor, it returns a {type(output).__name__}: '
                "name a layer inside it"
            )
        self._found[name] = output, output._version


@contextmanager
def captured(module: nn.Module, names: Collection[str]) -> Iterator[Captured]:
    """Within the block, the outputs of named layers; the hooks are gone after it, whatever happens.

    Args:
        module: whose layers; names are those of ``module.named_modules()``, such as ``trunk.0``.
        names: of the layers.

    Raises:
        FedistillError: a name that is no layer.
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    for name in names:
        if name not in layers:
            known = did_you_mean(name, [one for one in layers if one])
            raise FedistillError(f'{type(module).__name__} has no layer "{name}"{known}')
    found = Captured()
    handles = []
    try:
        for name in dict.fromkeys(names):

            def keep(layer: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                del layer, inputs
                found.keep(name, output)

            handles.append(layers[name].register_forward_hook(keep))
        yield found
    finally:
        for handle in handles:
            handle.remove()
