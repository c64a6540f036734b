"""SGD and Adam: PyTorch's own arithmetic, without the classes around it.

``torch.optim.SGD`` imports torch's compiler when it is built, and again at every step: a second of
work and 80 MB in a process that only wants to take some steps, as a real site starts one for every
message. The functions below those classes do not. The bytes are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedistill.distill.recipe import Recipe

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def falling(step: int, steps: int) -> float:
    """Share of the learning rate in a step, where it falls to 0 as a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class Optimizer:
    """Takes steps along the gradients of some weights.

    Args:
        recipe: which kind, its momentum and its weight decay.
        weights: what is taught. Biases and norms (vectors) are not decayed, as is usual.

    Attributes:
        state: for each weight the tensors that a next step needs; empty before the first.
    """

    def __init__(self, recipe: Recipe, weights: Sequence[nn.Parameter]) -> None:
        self.recipe = recipe
        self.weights = list(weights)
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step with this learning rate, for the weights that have a gradient."""
        take = self._sgd if self.recipe.optimizer == "sgd" else self._adam
        taught = [weight for weight in self.weights if weight.grad is not None]
        decays = self.recipe.weight_decay > 0
        for decayed in (True, False) if decays else (False,):
            chosen: list[Tensor] = [w for w in taught if not decays or (w.dim() > 1) == decayed]
            grads = [weight.grad for weight in chosen if weight.grad is not None]
            if chosen:
                take(chosen, grads, rate, self.recipe.weight_decay if decayed else 0.0)

    def _sgd(self, weights: list[Tensor], grads: list[Tensor], rate: float, decay: float) -> None:
        buffers = [self.state.get(weight, {}).get("momentum_buffer") for weight in weights]
        sgd(
            weights,
            grads,
            buffers,
            has_sparse_grad=False,
            foreach=True,
            weight_decay=decay,
            momentum=self.recipe.momentum or 0.0,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if self.recipe.momentum:
            for weight, buffer in zip(weights, buffers, strict=True):
                assert buffer is not None
                self.state[weight] = {"momentum_buffer": buffer}

    def _adam(self, weights: list[Tensor], grads: list[Tensor], rate: float, decay: float) -> None:
        for weight in weights:
            if not self.state.get(weight):
                self.state[weight] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
                }
        kept = [self.state[weight] for weight in weights]
        take = adam if self.recipe.optimizer == "adam" else adamw
        take(
            weights,
            grads,
            [state["exp_avg"] for state in kept],
            [state["exp_avg_sq"] for state in kept],
            [],
            [state["step"] for state in kept],
            foreach=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=decay,
            eps=EPSILON,
            maximize=False,
        )
