"""A torch module as a learner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.distill.batches import Batch, Batches, Memory, local_batches, soft_batches
from fedistill.distill.optimizer import Optimizer
from fedistill.distill.recipe import Recipe
from fedistill.losses import logit_mae, own_or_proxy, soft_cross_entropy
from fedistill.seeding import derive
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

    The features are the input of the module's last linear layer, so any classifier can carry the
    output without being rewritten; its logits, if it has none or one that does not see whole
    rows. The gradient flows into the shared trunk.
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
        seen = self._features
        self._usable = seen is not None and seen.shape[:-1] == (len(example),)
        features = seen if seen is not None and self._usable else logits
        with seeded(0):  # it starts at zero: what is drawn first must not move other draws
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
        features = logits if self._features is None or not self._usable else self._features
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
        self._memory: Memory | None = None
        self._optimizer = Optimizer(recipe, self._weights())
        self._physical = 1 << 30

    # --- the three methods of a learner --------------------------------------------------------

    def absorb(
        self,
        inputs: FloatArray,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> None:
        """Distil on soft targets at once (``phase``), or keep them for ``fit`` (``inside``)."""
        if weights is None:
            weights = np.ones(len(inputs))
        memory = Memory(self._tensor(inputs), self._tensor(soft_targets), weights)
        if self.recipe.distil == "inside":
            self._memory = memory
        elif self.recipe.distil == "phase" and len(memory):
            self._distil(memory, seed)

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Train on own rows, joined by proxy rows; without own rows, on the proxy rows alone."""
        if len(rows) == 0 or self.recipe.epochs == 0:
            if self._memory is not None and len(self._memory):
                self._distil(self._memory, seed)
            return
        labels = torch.from_numpy(rows.labels).to(self.device)
        batches = local_batches(
            self._tensor(rows.inputs),
            nn.functional.one_hot(labels, self.classes).float(),
            self._memory,
            self.background if self._scored is not None else None,
            self.recipe,
            seed,
        )
        offset = self._log_shares(rows.labels) if self.recipe.calibrate else None

        def loss(batch: Batch) -> Tensor:
            logits, score = self._forward(batch.inputs)
            if offset is not None:
                logits = torch.cat([logits[: batch.own] + offset, logits[batch.own :]])
            if batch.temperature != 1.0:
                logits = torch.cat([logits[: batch.own], logits[batch.own :] / batch.temperature])
            total = soft_cross_entropy(logits, batch.targets, batch.weight)
            return total if self._scored is None else total + own_or_proxy(score, batch.familiar)

        self._train(batches, loss, seed)

    def restart(self) -> None:
        """Forget the optimizer's state, as when the weights were replaced from outside."""
        self._optimizer.state.clear()

    def predict(self, inputs: FloatArray) -> Logits:
        """Logits ``[rows, classes]``, float32."""
        return self._evaluate(inputs)[0]

    def familiarity(self, inputs: FloatArray) -> FloatArray:
        """Log density ratio of own to proxy rows, ``[rows]``; 0 where it is not learned."""
        return self._evaluate(inputs)[1]

    def state_dict(self) -> State:
        """Weights, their moving average, the optimizer's tensors and the number of steps."""
        state = {f"net.{k}": _copied(v) for k, v in self._net.state_dict().items()}
        state |= {f"average.{i}": _copied(v) for i, v in enumerate(self._averaged)}
        for index, weight in enumerate(self._weights()):
            for key, value in self._optimizer.state.get(weight, {}).items():
                state[f"optimizer.{index}.{key}"] = _copied(value)
        return state | {"steps": np.array([self._steps], dtype=np.int64)}

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore the weights of a module of the same shape."""
        del rows
        named = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        net = {name[4:]: value for name, value in named.items() if name.startswith("net.")}
        self._net.load_state_dict(net)
        for index, tensor in enumerate(self._averaged):
            tensor.copy_(named[f"average.{index}"])
        weights = self._weights()
        self._optimizer.state.clear()
        for name, value in named.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                home = value if key == "step" else value.to(self.device)
                self._optimizer.state.setdefault(weights[int(number)], {})[key] = home
        self._steps = int(state["steps"][0])

    # --- training ------------------------------------------------------------------------------

    def _distil(self, memory: Memory, seed: int) -> None:
        """A phase on soft targets alone."""

        def loss(batch: Batch) -> Tensor:
            logits, _ = self._forward(batch.inputs)
            if self.recipe.loss == "mae":
                return logit_mae(logits, batch.targets) * batch.weight.sum()
            return soft_cross_entropy(logits, batch.targets, batch.weight, batch.temperature)

        self._train(soft_batches(memory, self.recipe, seed), loss, seed)

    def _train(self, batches: Batches, loss: Callable[[Batch], Tensor], seed: int) -> None:
        """One optimizer step for each batch."""
        recipe = self.recipe
        weights = self._weights()
        self._net.train()
        if batches.smallest == 1:
            # A single row has no variance: batch statistics would be undefined.
            for layer in self._net.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()
        with seeded(derive(seed, "dropout")):
            for step, batch in enumerate(batches):
                falling = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
                rate = recipe.lr * (falling if recipe.schedule == "cosine" else 1.0)
                self._backward(batch, loss)
                if recipe.clip:
                    nn.utils.clip_grad_norm_(weights, recipe.clip, foreach=True)
                self._optimizer.step(rate)
                self._steps += 1
                self._update_average(weights)
        self._net.eval()

    def _backward(self, batch: Batch, loss: Callable[[Batch], Tensor]) -> None:
        """Gradient of one batch; out of memory, in parts that add up to the same."""
        while True:
            self._optimizer.zero_grad()
            size = min(self._physical, len(batch))
            try:
                for start in range(0, len(batch), size):
                    part = batch if size == len(batch) else batch.cut(start, start + size)
                    loss(part).backward()  # type: ignore[no-untyped-call]
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


def _copied(tensor: Tensor) -> FloatArray:
    """The values now: on the CPU ``numpy()`` alone would share memory with the living weights."""
    return np.array(tensor.cpu().numpy())
