"""Weights in one piece while they are taught: a step is a handful of operations, not one for each.

The arithmetic of every value is that of :class:`Optimizer`, of ``clip_grad_norm_`` and of an
average that follows, and so are the bytes; what is spared is dozens of small calls a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from fedistill.distill.optimizer import BETAS, EPSILON, Optimizer
from fedistill.distill.recipe import Recipe

COUNT = "step"
"""What Adam keeps of a weight that is one number, and the same for all that are taught together."""


class Resident:
    """Within the block, the weights that have a gradient lie side by side in one tensor.

    They are gathered at the first step and put back where they were at the end of the block, and
    before a step that has gradients for other weights than the one before.

    Args:
        optimizer: whose weights and state these are.
        averaged: moving averages of all weights, changed in place; none, if empty.
    """

    def __init__(self, optimizer: Optimizer, averaged: Sequence[Tensor]) -> None:
        self._optimizer, self._averaged = optimizer, averaged
        self._pack: _Pack | None = None

    def __enter__(self) -> Resident:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._put_back()

    @torch.no_grad()
    def step(self, rate: float, clip: float) -> None:
        """One step, the gradient scaled to this norm where it is longer; 0 leaves it alone."""
        taught = [weight for weight in self._optimizer.weights if weight.grad is not None]
        if self._pack is not None and not _same(self._pack.weights, taught):
            self._put_back()
        if self._pack is None and _alike(taught, self._optimizer):
            self._pack = _Pack(self._optimizer, taught, self._averaged)
        if self._pack is not None:
            self._pack.step(rate, clip)
            return
        if clip:
            nn.utils.clip_grad_norm_(taught, clip, foreach=True)
        self._optimizer.step(rate)

    @torch.no_grad()
    def follow(self, keep: float) -> None:
        """Move the averages towards the weights, keeping so much of them."""
        if not self._averaged:
            return
        averaged, weights = list(self._averaged), [w.data for w in self._optimizer.weights]
        if self._pack is not None:
            averaged, weights = self._pack.averaged(averaged, weights)
        torch._foreach_lerp_(averaged, weights, 1 - keep)

    def _put_back(self) -> None:
        if self._pack is not None:
            self._pack.put_back(self._averaged)
            self._pack = None


class _Pack:
    """Some weights, their gradients, what the optimizer keeps of them and their averages."""

    def __init__(
        self, optimizer: Optimizer, taught: list[nn.Parameter], averaged: Sequence[Tensor]
    ) -> None:
        self.weights, self._optimizer, self._recipe = taught, optimizer, optimizer.recipe
        # Those that are decayed come first.
        self._order = sorted(taught, key=lambda weight: weight.dim() <= 1)
        self._decayed = sum(w.numel() for w in taught if w.dim() > 1 and self._recipe.weight_decay)
        number = {weight: at for at, weight in enumerate(optimizer.weights)}
        self._places = [number[weight] for weight in self._order]
        self._homes = [weight.data for weight in self._order]
        self._values = _joined(self._homes)
        for weight, piece in zip(self._order, self._pieces(self._values), strict=True):
            weight.data = piece
        self._gradient = torch.empty_like(self._values)
        held = [optimizer.state.get(weight, {}) for weight in self._order]
        self._count = float(held[0].get(COUNT, 0.0))
        self._kept = {k: _joined([one[k] for one in held]) for k in held[0] if k != COUNT}
        self._averages = _joined([averaged[at] for at in self._places]) if averaged else None

    def step(self, rate: float, clip: float) -> None:
        """One step with the gradients that the weights have now."""
        grads = [weight.grad for weight in self._order if weight.grad is not None]
        torch.cat([grad.reshape(-1) for grad in grads], out=self._gradient)
        if clip:
            grads = [weight.grad for weight in self.weights if weight.grad is not None]
            length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            self._gradient.mul_((clip / (length + 1e-6)).clamp(max=1.0))
        if self._recipe.optimizer == "sgd":
            self._sgd(self._recipe, rate)
        else:
            self._adam(self._recipe, rate)

    def _sgd(self, recipe: Recipe, rate: float) -> None:
        self._decay(recipe)
        moved = self._gradient
        if recipe.momentum and self._kept:
            moved = self._kept["momentum_buffer"].mul_(recipe.momentum).add_(moved)
        elif recipe.momentum:
            moved = self._kept["momentum_buffer"] = moved.clone()
        self._values.add_(moved, alpha=-rate)

    def _adam(self, recipe: Recipe, rate: float) -> None:
        if not self._kept:
            self._kept = {k: torch.zeros_like(self._values) for k in ("exp_avg", "exp_avg_sq")}
        if recipe.optimizer == "adam":
            self._decay(recipe)
        elif self._decayed:
            self._values[: self._decayed].mul_(1 - rate * recipe.weight_decay)
        self._count += 1
        mean, square = self._kept["exp_avg"], self._kept["exp_avg_sq"]
        mean.lerp_(self._gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(self._gradient, self._gradient, value=1 - BETAS[1])
        spread = square.sqrt().div_((1 - BETAS[1] ** self._count) ** 0.5).add_(EPSILON)
        self._values.addcdiv_(mean, spread, value=-rate / (1 - BETAS[0] ** self._count))

    def _decay(self, recipe: Recipe) -> None:
        if self._decayed:
            part = slice(0, self._decayed)
            self._gradient[part].add_(self._values[part], alpha=recipe.weight_decay)

    def averaged(
        self, averaged: list[Tensor], weights: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and what they follow: those of all weights here in one, the others as given."""
        assert self._averages is not None
        beside = [at for at in range(len(weights)) if at not in self._places]
        return (
            [self._averages, *(averaged[at] for at in beside)],
            [self._values, *(weights[at] for at in beside)],
        )

    @torch.no_grad()
    def put_back(self, averaged: Sequence[Tensor]) -> None:
        """Everything where it was, as it is now."""
        for weight, home in zip(self._order, self._homes, strict=True):
            home.copy_(weight.data)
            weight.data = home
            if self._count:
                self._optimizer.state.setdefault(weight, {})[COUNT] = torch.tensor(self._count)
        for key, whole in self._kept.items():
            for weight, piece in zip(self._order, self._pieces(whole), strict=True):
                self._optimizer.state.setdefault(weight, {})[key] = piece.clone()
        if self._averages is not None:
            for at, piece in zip(self._places, self._pieces(self._averages), strict=True):
                averaged[at].copy_(piece)

    def _pieces(self, whole: Tensor) -> list[Tensor]:
        """Views of a joined tensor, of the shape of each weight."""
        found = torch.split(whole, [home.numel() for home in self._homes])
        return [piece.view(home.shape) for piece, home in zip(found, self._homes, strict=True)]


def _alike(taught: list[nn.Parameter], optimizer: Optimizer) -> bool:
    """Whether weights can lie in one tensor, and the optimizer treats all of them alike.

    Those in another order of memory would be summed in another order, and those that share memory
    would part.
    """
    if len({(weight.dtype, weight.device, weight.layout) for weight in taught}) != 1:
        return False
    if any(w.grad is None or w.grad.layout != torch.strided for w in taught):
        return False
    if not all(weight.is_contiguous() for weight in taught):
        return False
    if len({weight.untyped_storage().data_ptr() for weight in taught}) < len(taught):
        return False
    held = [optimizer.state.get(weight, {}) for weight in taught]
    counts = {float(one[COUNT]) for one in held if COUNT in one}
    return len({tuple(sorted(one)) for one in held}) == 1 and len(counts) <= 1


def _same(one: list[nn.Parameter], other: list[nn.Parameter]) -> bool:
    return len(one) == len(other) and all(map(lambda a, b: a is b, one, other))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
