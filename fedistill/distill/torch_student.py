"""A torch module as a learner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.distill.recipe import Recipe
from fedistill.losses import kl_divergence, logit_mae, own_or_proxy
from fedistill.seeding import derive, generator
from fedistill.types import FloatArray, IntArray, Logits, Probs, Rows, State

PREDICT_ROWS = 250
"""Rows of one forward pass when predicting: small enough to stay in cache."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own torch seed and put the global generator back afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class WithFamiliarity(nn.Module):
    """A module with one more output: how familiar a row is, from the features before the head.

    The features are the input of the module's last linear layer (its logits, if it has none), so
    any classifier can carry the output without being rewritten. The gradient flows into the
    shared trunk.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.module = module
        self._features: Tensor | None = None
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        if linear:
            linear[-1].register_forward_pre_hook(self._keep)
        was_training = module.training
        module.eval()
        with torch.no_grad():
            logits = module(example)
        module.train(was_training)
        features = logits if self._features is None else self._features
        self.score = nn.Linear(features.shape[-1], 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del layer
        self._features = inputs[0]

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[rows, classes]`` and familiarity ``[rows]``."""
        self._features = None
        logits: Tensor = self.module(inputs)
        features = logits if self._features is None else self._features
        self._features = None
        score: Tensor = self.score(features)[:, 0]
        return logits, score


class TorchStudent:
    """A torch module that fits rows, absorbs soft targets and predicts.

    Args:
        build: a factory of modules, inputs ``[batch, ...]`` to logits ``[batch, classes]``.
        recipe: how to train.
        classes: number of classes.
        seed: of the initial weights; equal seeds and factories start equal.
        device: where to compute.
        background: proxy rows; needed to learn familiarity.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        recipe: Recipe,
        *,
        classes: int,
        seed: int,
        device: torch.device | None = None,
        background: FloatArray | None = None,
    ) -> None:
        self.recipe = recipe
        self.classes = classes
        self.device = device or torch.device("cpu")
        self.background = None if background is None else self._tensor(background)
        with seeded(seed):
            module = build()
        self.module = module.to(self.device)
        self._scored: WithFamiliarity | None = None
        if recipe.familiarity and self.background is not None:
            self._scored = WithFamiliarity(self.module, self.background[:2]).to(self.device)
        self._net: nn.Module = self._scored or self.module
        self._averaged = [p.detach().clone() for p in self._weights()] if recipe.average else []
        self._steps = 0
        self._memory: tuple[Tensor, Tensor] | None = None
        self._physical = 1 << 30

    # --- the three methods of a learner --------------------------------------------------------

    def absorb(self, inputs: FloatArray, soft_targets: Probs, *, seed: int) -> None:
        """Distil on soft targets at once (``phase``), or keep them for ``fit`` (``inside``)."""
        memory = self._tensor(inputs), self._tensor(soft_targets)
        if self.recipe.distil == "inside":
            self._memory = memory
        elif self.recipe.distil == "phase" and len(inputs):
            self._distil(*memory, seed)

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Train on own rows, joined by proxy rows; without own rows, on the proxy rows alone."""
        if len(rows) == 0:
            if self.recipe.distil == "inside" and self._memory is not None:
                self._distil(*self._memory, seed)
            return
        inputs, labels = self._tensor(rows.inputs), torch.from_numpy(rows.labels).to(self.device)
        offset = self._log_shares(rows.labels) if self.recipe.calibrate else None
        own = list(_batches(len(rows), self.recipe.batch_size, self.recipe.epochs, seed, "own"))
        proxy = self._proxy_batches(len(own), seed)

        def loss(step: int, part: slice) -> Tensor:
            index = own[step][part]
            logits, score = self._forward(inputs[index])
            shown = logits if offset is None else logits + offset
            total = nn.functional.cross_entropy(shown, labels[index])
            return total + self._proxy_loss(proxy, step, part, score)

        self._train(loss, [len(batch) for batch in own], seed, batch_rows=len(rows))

    def predict(self, inputs: FloatArray) -> Logits:
        """Logits ``[rows, classes]``, float32."""
        return self._evaluate(inputs)[0]

    def familiarity(self, inputs: FloatArray) -> FloatArray:
        """Log density ratio of own to proxy rows, ``[rows]``; 0 where it is not learned."""
        return self._evaluate(inputs)[1]

    def state_dict(self) -> State:
        """Weights, their moving average and the number of steps taken."""
        state = {f"net.{k}": v.cpu().numpy() for k, v in self._net.state_dict().items()}
        state |= {f"average.{i}": v.cpu().numpy() for i, v in enumerate(self._averaged)}
        return state | {"steps": np.array([self._steps], dtype=np.int64)}

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore the weights of a module of the same shape."""
        del rows
        net = {k[4:]: torch.from_numpy(v.copy()) for k, v in state.items() if k.startswith("net.")}
        self._net.load_state_dict(net)
        for index, tensor in enumerate(self._averaged):
            tensor.copy_(torch.from_numpy(state[f"average.{index}"].copy()))
        self._steps = int(state["steps"][0])

    # --- training ------------------------------------------------------------------------------

    def _distil(self, inputs: Tensor, targets: Tensor, seed: int) -> None:
        """A phase on soft targets alone."""
        recipe = self.recipe
        batches = list(
            _batches(len(inputs), recipe.batch_size, recipe.distil_epochs, seed, "distil")
        )
        mixes = generator(seed, "mixup").beta(recipe.mixup, recipe.mixup, len(batches)) if (
            recipe.mixup
        ) else np.ones(len(batches))

        def loss(step: int, part: slice) -> Tensor:
            index = batches[step]
            x, q = inputs[index[part]], targets[index[part]]
            if recipe.mixup and len(index) > 1:
                share, other = float(mixes[step]), np.roll(index, 1)[part]
                x = share * x + (1 - share) * inputs[other]
                q = share * q + (1 - share) * targets[other]
            return self._soft_loss(self._forward(x)[0], q)

        self._train(loss, [len(batch) for batch in batches], seed, batch_rows=len(inputs))

    def _proxy_batches(self, steps: int, seed: int) -> tuple[list[IntArray], list[IntArray]]:
        """For each step: rows of the memory to distil on, and background rows to tell apart."""
        size = self.recipe.batch_size
        soft: list[IntArray] = []
        if self.recipe.distil == "inside" and self._memory is not None and len(self._memory[0]):
            soft = _stream(len(self._memory[0]), size, steps, seed, "soft")
        background: list[IntArray] = []
        if self._scored is not None and self.background is not None:
            background = _stream(len(self.background), size, steps, seed, "background")
        return soft, background

    def _proxy_loss(
        self, proxy: tuple[list[IntArray], list[IntArray]], step: int, part: slice, own: Tensor
    ) -> Tensor:
        """Soft part and familiarity part of a step."""
        soft, background = proxy
        total = own.new_zeros(())
        if soft and self._memory is not None:
            index = soft[step][part]
            logits, _ = self._forward(self._memory[0][index])
            total = total + self.recipe.soft_weight * self._soft_loss(logits, self._memory[1][index])
        if background and self.background is not None:
            _, score = self._forward(self.background[background[step][part]])
            total = total + own_or_proxy(own, score)
        return total

    def _soft_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.recipe.loss == "mae":
            return logit_mae(logits, targets)
        return kl_divergence(logits, targets, self.recipe.temperature)

    def _train(
        self, loss: Callable[[int, slice], Tensor], sizes: list[int], seed: int, *, batch_rows: int
    ) -> None:
        """Take one optimizer step for each entry of ``sizes`` (rows of that step)."""
        recipe = self.recipe
        weights = self._weights()
        optimizer = _optimizer(recipe, weights)
        self._net.train()
        if batch_rows == 1:
            # A single row has no variance: batch statistics would be undefined.
            for layer in self._net.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()
        with seeded(derive(seed, "dropout")):
            for step, rows in enumerate(sizes):
                if recipe.schedule == "cosine":
                    factor = 0.5 * (1 + np.cos(np.pi * step / len(sizes)))
                    for group in optimizer.param_groups:
                        group["lr"] = recipe.lr * factor
                self._backward(lambda part, at=step: loss(at, part), rows, optimizer)
                if recipe.clip:
                    nn.utils.clip_grad_norm_(weights, recipe.clip)
                optimizer.step()
                self._steps += 1
                self._update_average(weights)
        self._net.eval()

    def _backward(
        self, loss: Callable[[slice], Tensor], rows: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradient of one logical batch; out of memory, in halves that add up to the same."""
        while True:
            optimizer.zero_grad(set_to_none=True)
            try:
                size = min(self._physical, rows)
                for start in range(0, rows, size):
                    stop = min(start + size, rows)
                    share = (stop - start) / rows
                    (loss(slice(start, stop)) * share).backward()  # type: ignore[no-untyped-call]
                return
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self._physical = max(1, size // 2)

    def _update_average(self, weights: list[nn.Parameter]) -> None:
        if self._averaged:
            decay = min(self.recipe.average, (1 + self._steps) / (10 + self._steps))
            torch._foreach_lerp_(self._averaged, [w.detach() for w in weights], 1 - decay)

    # --- predicting ----------------------------------------------------------------------------

    def _evaluate(self, inputs: FloatArray) -> tuple[Logits, FloatArray]:
        rows = self._tensor(inputs)
        logits = np.zeros((len(rows), self.classes), dtype=np.float32)
        scores = np.zeros(len(rows), dtype=np.float32)
        self._net.eval()
        with self._predicting(), torch.inference_mode():
            for start in range(0, len(rows), PREDICT_ROWS):
                part = slice(start, start + PREDICT_ROWS)
                found, score = self._forward(rows[part])
                logits[part] = found.cpu().numpy()
                scores[part] = score.cpu().numpy()
        return logits, np.clip(scores, -FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)

    @contextmanager
    def _predicting(self) -> Iterator[None]:
        """Predict with the averaged weights, if there are any and a step was taken."""
        if not self._averaged or not self._steps:
            yield
            return
        weights = self._weights()
        last = [weight.data for weight in weights]
        for weight, averaged in zip(weights, self._averaged, strict=True):
            weight.data = averaged
        try:
            yield
        finally:
            for weight, data in zip(weights, last, strict=True):
                weight.data = data

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if self._scored is not None:
            logits, score = self._scored(inputs)
            return logits, score
        logits = self.module(inputs)
        return logits, logits.new_zeros(len(logits))

    def _weights(self) -> list[nn.Parameter]:
        return [weight for weight in self._net.parameters() if weight.requires_grad]

    def _log_shares(self, labels: IntArray) -> Tensor:
        """Log of the own class shares ``[classes]``; a class never met gets half a row."""
        counts = np.bincount(labels, minlength=self.classes).astype(np.float64)
        shares = np.maximum(counts, 0.5) / max(len(labels), 1)
        return self._tensor(np.log(shares))

    def _tensor(self, array: Any) -> Tensor:
        tensor: Tensor = torch.as_tensor(np.asarray(array, dtype=np.float32))
        return tensor.to(self.device)


def _optimizer(recipe: Recipe, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            weights, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay,
            foreach=True,
        )
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(weights, recipe.lr, weight_decay=recipe.weight_decay, foreach=True)


def _batches(rows: int, size: int, epochs: int, seed: int, name: str) -> Iterator[IntArray]:
    """Shuffled batches of each epoch; a last batch of one row joins the one before it."""
    for epoch in range(epochs):
        order = generator(seed, name, epoch).permutation(rows)
        starts = list(range(0, rows, size))
        if len(starts) > 1 and rows - starts[-1] == 1:
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], rows], strict=True):
            yield order[start:stop]


def _stream(rows: int, size: int, steps: int, seed: int, name: str) -> list[IntArray]:
    """``steps`` batches from shuffled passes without end."""
    random = generator(seed, name)
    passes = -(-steps * size // rows)
    order = np.concatenate([random.permutation(rows) for _ in range(passes)])
    return [order[step * size : (step + 1) * size] for step in range(steps)]
