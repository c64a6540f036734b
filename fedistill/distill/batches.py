"""What one optimizer step sees: own rows, proxy rows and mixtures of both, each with its target.

Everything a step minimises is a weighted sum over rows, so a batch can be cut anywhere (when
memory runs out) without changing the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedistill.distill.recipe import Recipe
from fedistill.losses import soften
from fedistill.seeding import generator
from fedistill.types import FloatArray, IntArray


@dataclass(frozen=True)
class Memory:
    """Soft targets on public rows: ``[n, ...]``, ``[n, classes]`` and a weight each."""

    inputs: Tensor
    targets: Tensor
    weights: FloatArray

    def __len__(self) -> int:
        return len(self.inputs)

    def effective(self) -> float:
        """Number of rows, the faded ones counted by their weight."""
        return float(self.weights.sum())


@dataclass(frozen=True)
class Batch:
    """The rows of one step.

    Attributes:
        inputs: ``[rows, ...]``.
        targets: ``[rows, classes]``, one-hot for own rows.
        weight: ``[rows]`` of the cross-entropy.
        familiar: ``[rows]``: positive for own rows, negative for proxy rows, 0 for neither.
        own: the first rows, this many, are own rows.
        temperature: of the rows that are not own.
        numbers: ``[own]`` which of the own rows these are.
    """

    inputs: Tensor
    targets: Tensor
    weight: Tensor
    familiar: Tensor
    own: int
    temperature: float = 1.0
    numbers: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.inputs)

    def cut(self, start: int, stop: int) -> Batch:
        """The rows from ``start`` to ``stop``."""
        part = slice(start, stop)
        own = max(0, min(self.own, stop) - start)
        return Batch(
            self.inputs[part],
            self.targets[part],
            self.weight[part],
            self.familiar[part],
            own,
            self.temperature,
            self.numbers[start:stop],
        )


@dataclass(frozen=True)
class Part:
    """Rows of one kind in the batches of a call, by their numbers: nothing is fetched yet.

    Attributes:
        inputs: ``[n, ...]`` rows to choose from.
        targets: ``[n, classes]`` of these, at temperature 1.
        index: for each step, which of them.
        weight: what the weights of these rows in a batch add up to.
        familiar: the same of what they count for familiarity.
        own: whether they are own rows; others are softened.
    """

    inputs: Tensor
    targets: Tensor
    index: Sequence[IntArray] | IntArray
    weight: float
    familiar: float
    own: bool


@dataclass(frozen=True)
class Batches:
    """The batches of a call, each made when its step comes: never all of them in memory.

    Attributes:
        count: number of steps.
        smallest: rows of the smallest batch; 0 without steps.
        make: from a step to its batch, the same whenever it is asked.
        parts: what each batch is made of, one after another; None where rows are mixed.
    """

    count: int
    smallest: int
    make: Callable[[int], Batch]
    parts: tuple[Part, ...] | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return (self.make(step) for step in range(self.count))


def local_batches(
    inputs: Tensor,
    targets: Tensor,
    memory: Memory | None,
    background: Tensor | None,
    recipe: Recipe,
    seed: int,
) -> Batches:
    """Own rows in shuffled passes, each batch joined by as many proxy rows (and mixtures).

    Args:
        inputs: own rows.
        targets: own labels, one-hot.
        memory: soft targets to distil on, or None.
        background: proxy rows to tell own rows from, or None.
        recipe: sizes and weights.
        seed: of all choices.
    """
    size = recipe.batch_size
    own = list(passes(len(inputs), size, recipe.epochs, seed, "own"))
    if memory is not None and len(memory):
        wanted = -(-recipe.distil_epochs * memory.effective() // size)
        own = _at_least(own, int(wanted), inputs, size, seed)
    steps, strength = len(own), recipe.soft_weight_for(len(inputs))
    soft = _draws(memory, size, steps, seed) if memory is not None and len(memory) else None
    contrast = None
    if background is not None:
        contrast = generator(seed, "background").integers(0, len(background), (steps, size))

    def make(step: int) -> Batch:
        taught = seen = None
        if soft is not None and memory is not None:
            taught = picked(memory.inputs, soft[step]), picked(memory.targets, soft[step])
        if contrast is not None and background is not None:
            seen = picked(background, contrast[step])
        index = own[step]
        random = partial(generator, seed, "mix", step)
        return _assemble(index, inputs, targets, taught, seen, recipe, strength, random)

    joined = size if soft is not None or contrast is not None else 0
    scored = float(background is not None)
    parts = [Part(inputs, targets, own, 1.0, scored, True)]
    if soft is not None and memory is not None:
        weight = strength * recipe.temperature**2
        parts.append(Part(memory.inputs, memory.targets, soft, weight, -scored, False))
    elif contrast is not None and background is not None:
        unknown = targets.new_zeros(1, targets.shape[1]).expand(len(background), -1)
        parts.append(Part(background, unknown, contrast, 0.0, -1.0, False))
    mixed = soft is not None and recipe.mixup > 0
    smallest = min(map(len, own), default=0) + joined
    return Batches(steps, smallest, make, None if mixed else tuple(parts))


def _at_least(
    own: list[IntArray], steps: int, inputs: Tensor, size: int, seed: int
) -> list[IntArray]:
    """More passes over few own rows, so that the soft targets get their passes too."""
    epoch = 0
    while len(own) < steps:
        own += list(passes(len(inputs), size, 1, seed, f"more-{epoch}"))
        epoch += 1
    return own


def _draws(memory: Memory, size: int, steps: int, seed: int) -> IntArray:
    """Rows of the memory for each step ``[steps, size]``, drawn by weight."""
    share = memory.weights / memory.weights.sum()
    return generator(seed, "soft").choice(len(memory), (steps, size), p=share)


def _assemble(
    index: IntArray,
    inputs: Tensor,
    targets: Tensor,
    soft: tuple[Tensor, Tensor] | None,
    background: Tensor | None,
    recipe: Recipe,
    strength: float,
    random: Callable[[], np.random.Generator],
) -> Batch:
    """One batch: own, then soft (or, before there are any, background alone), then mixed."""
    inputs, targets = picked(inputs, index), picked(targets, index)
    own, device = len(inputs), inputs.device
    if soft is None and background is None:
        weight, none = torch.full((own,), 1.0 / own), torch.zeros(own)
        alone = weight.to(device), none.to(device)
        return Batch(inputs, targets, *alone, own, recipe.temperature, index)
    parts = [inputs]
    wanted = [targets]
    weights = [np.full(own, 1.0 / own)]
    familiar = [np.full(own, 1.0 / own if background is not None else 0.0)]
    if soft is not None:
        rows, answers = soft
        count, temperature = len(rows), recipe.temperature
        parts.append(rows)
        wanted.append(soften(answers, temperature))
        weights.append(np.full(count, strength * temperature**2 / count))
        familiar.append(np.full(count, -1.0 / count if background is not None else 0.0))
        if recipe.mixup:
            mixed, answers = mix(
                torch.cat(parts),
                torch.cat([targets, answers]),
                recipe.batch_size,
                recipe.mixup,
                random(),
            )
            parts.append(mixed)
            wanted.append(soften(answers, temperature))
            weights.append(np.full(len(mixed), strength * temperature**2 / len(mixed)))
            familiar.append(np.zeros(len(mixed)))
    elif background is not None:
        parts.append(background)
        wanted.append(torch.zeros(len(background), targets.shape[1], device=device))
        weights.append(np.zeros(len(background)))
        familiar.append(np.full(len(background), -1.0 / len(background)))
    return Batch(
        torch.cat(parts),
        torch.cat(wanted),
        _tensor(weights, device),
        _tensor(familiar, device),
        own,
        recipe.temperature,
        index,
    )


def soft_batches(memory: Memory, recipe: Recipe, seed: int) -> Batches:
    """A phase on soft targets alone: passes over them, or as many draws by weight."""
    size, device = recipe.batch_size, memory.inputs.device
    even = bool((memory.weights == memory.weights[0]).all()) if len(memory) else True
    if even:
        chosen = list(passes(len(memory), size, recipe.distil_epochs, seed, "distil"))
    else:
        # A pass over faded rows is as long as a pass over all: it visits the fresh ones more often.
        steps = -(-len(memory) // size) * recipe.distil_epochs
        chosen = list(_draws(memory, size, steps, seed))

    def make(step: int) -> Batch:
        index = chosen[step]
        inputs, targets = picked(memory.inputs, index), picked(memory.targets, index)
        if recipe.mixup:
            inputs, targets = mix(
                inputs, targets, len(index), recipe.mixup, generator(seed, "mix", step)
            )
        count, temperature = len(index), recipe.temperature
        weights = np.full(count, temperature**2 / count)
        return Batch(
            inputs,
            soften(targets, temperature),
            _tensor([weights], device),
            _tensor([np.zeros(count)], device),
            0,
            temperature,
        )

    part = Part(memory.inputs, memory.targets, chosen, recipe.temperature**2, 0.0, False)
    smallest = min(map(len, chosen), default=0)
    return Batches(len(chosen), smallest, make, None if recipe.mixup else (part,))


def mix(
    inputs: Tensor, targets: Tensor, count: int, concentration: float, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mixtures of pairs of rows, and the same mixtures of their targets.

    Zhang et al., mixup, arXiv 1710.09412. The larger share goes to the first row of the pair.

    Args:
        inputs: ``[n, ...]``.
        targets: ``[n, classes]``.
        count: number of mixtures.
        concentration: of the Beta law of the shares; 1 is uniform.
        random: draws pairs and shares.
    """
    first, second = random.integers(0, len(inputs), (2, count))
    share = random.beta(concentration, concentration, count)
    column = torch.from_numpy(np.maximum(share, 1 - share).astype(np.float32)).to(inputs.device)
    wide = column.reshape(-1, *[1] * (inputs.dim() - 1))
    mixed = torch.lerp(inputs[second], inputs[first], wide)
    return mixed, torch.lerp(targets[second], targets[first], column[:, None])


def passes(rows: int, size: int, epochs: int, seed: int, name: str) -> Iterator[IntArray]:
    """Shuffled batches of each epoch; a last batch of one row joins the one before it."""
    for epoch in range(epochs):
        order = generator(seed, name, epoch).permutation(rows)
        starts = list(range(0, rows, size))
        if len(starts) > 1 and rows - starts[-1] == 1:
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], rows], strict=False):
            yield order[start:stop]


def picked(rows: Tensor, index: IntArray) -> Tensor:
    """Some rows, which PyTorch copies four times as fast so as by ``rows[index]``."""
    return rows.index_select(0, torch.from_numpy(index).to(rows.device))


def _tensor(parts: list[FloatArray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(device)
