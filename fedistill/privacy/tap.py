"""The strongest view of a mechanism: all that the claim covers, not only what is sent.

**Updates** (:class:`Tap`). An accountant of DP-SGD supposes an attacker who sees the noisy gradient
of every step. This one does. It computes each row's clipped gradient at the weights of the step,
and asks which canaries explain what was released: the log-likelihood ratio of "in" to "out", added
up over all steps (white-box auditing, as in Nasr et al., "Tight auditing", USENIX Security 2023;
with the rows of one run as the hypotheses, and the interference of all others taken into account).

With ``A [n, d]`` the clipped gradients, ``V`` the variance of each row's presence, ``r`` what was
released less its expectation and ``s`` the standard deviation of the noise, ``r`` has covariance
``s^2 I + A' V A``, and the ratio of row i is row i of ``A (s^2 I + A' V A)^-1 r``, which equals
``V^-1 (s^2 V^-1 + A A')^-1 A r``: one system of ``n`` equations a step.

What of ``r`` lies outside the span of all gradients is noise and nothing else. Its size is
measured: noise that was switched off shows even where no canary can be told.

**Counts** (:class:`CountTap`). Noisy votes are released whole. A canary that copies a proxy row is
one vote for its label there, and the counts of a row add up to the number of sub-teachers and the
noise of all classes, so that the noise can be measured as well.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedistill.privacy.canaries import Canaries
from fedistill.types import FloatArray, IntArray, Rows

MOST_NUMBERS, MOST_ROWS = 40_000_000, 3000
"""Entries and rows of ``A`` up to which rows are told apart jointly; beyond, one by one."""
CHUNK = 256
"""Rows whose gradients are computed at once."""
SPARE = 100
"""Fewest dimensions outside the span from which noise is measured."""
MEASURE_EVERY = 5
"""Steps from one measurement to the next: each is of some thousand draws."""
NO_NOISE = 0.02
"""Noise, in clipping norms, of a second score where it cannot be measured: as if it were off."""


class _System(NamedTuple):
    """``A A'``, ``A r``, ``r' r`` and the length of r."""

    gram: Tensor
    seen: Tensor
    total: float
    size: int


@dataclass
class Tap:
    """Listens to the noisy updates of a student and scores canaries.

    Call it with a module whose weights hold the noisy mean gradient in ``grad`` and have not moved.

    Args:
        clean: a module of the same shape to compute gradients with; nothing else may use it.
        own: the client's own rows, which an auditor knows.
        canaries: all canaries.
        rate: probability of a row to be in a step.
        clip: largest gradient norm of a row.
        units: how many rows there are, canaries that are in counted.

    Attributes:
        sigma: noise multiplier that was charged.
        steps: how many it has heard.
        draws: independent draws behind the measured noise.
    """

    clean: nn.Module
    own: Rows
    canaries: Rows
    rate: float
    clip: float
    units: int
    sigma: float = 1.0
    steps: int = 0
    draws: int = 0
    _scores: dict[str, FloatArray] = field(default_factory=dict)
    _squares: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = next(self.clean.parameters()).device
        inputs = [torch.from_numpy(rows.inputs) for rows in (self.canaries, self.own)]
        labels = [torch.from_numpy(rows.labels) for rows in (self.canaries, self.own)]
        self._inputs, self.clean = _past_frozen(self.clean, torch.cat(inputs).to(device))
        self._labels = torch.cat(labels).to(device)
        count = len(self.canaries)
        present = torch.full((len(self._labels),), self.rate, device=device, dtype=torch.float64)
        present[:count] /= 2  # by a fair coin, and then in a step
        self._mean, self._variance = present, present * (1 - present)

    def __call__(self, module: nn.Module) -> None:
        """Hear one step."""
        weights = {n: w for n, w in module.named_parameters() if w.requires_grad}
        released = torch.cat([_gradient(w).flatten() for w in weights.values()])
        found = self._ratios(
            {n: w.detach() for n, w in weights.items()}, released * self.rate * self.units
        )
        count = len(self.canaries)
        for name, ratio in found.items():
            told = ratio[:count].cpu().numpy().astype("float64")
            self._scores[name] = self._scores[name] + told if name in self._scores else told
        self.steps += 1

    def scores(self) -> dict[str, tuple[FloatArray, IntArray]]:
        """For each attack its scores, and the numbers of the canaries that they are of."""
        everybody = np.arange(len(self.canaries))
        return {name: (scores, everybody) for name, scores in self._scores.items()}

    @property
    def noise(self) -> float | None:
        """Measured noise, in clipping norms; None where there is no room to measure it."""
        if not self._squares:
            return None
        return math.sqrt(max(sum(self._squares) / len(self._squares), 0.0)) / self.clip

    def _ratios(self, weights: dict[str, Tensor], released: Tensor) -> dict[str, Tensor]:
        """Of every canary, and maybe other rows after them, a log-likelihood ratio."""
        rows, size = len(self._labels), len(released)
        stride = math.ceil(rows * size / MOST_NUMBERS)
        due = self.steps % MEASURE_EVERY == 0 and size // stride >= rows + SPARE
        if rows > MOST_ROWS or stride > 1:
            if due and rows <= MOST_ROWS:
                self._measure(self._system(weights, released, stride))
            parts = self._gradients(weights, len(self.canaries))
            return {"gradients": torch.cat([part @ released for part in parts])}
        system = self._system(weights, released, 1)
        if due:
            self._measure(system)
        there = self.sigma if self.noise is None else self.noise
        supposed = {"gradients": max(there, NO_NOISE)}
        if self.noise is None:
            supposed["gradients, no noise"] = NO_NOISE
        return {
            name: self._solve(system, (noise * self.clip) ** 2) for name, noise in supposed.items()
        }

    def _system(self, weights: dict[str, Tensor], released: Tensor, stride: int) -> _System:
        """What every ``stride``-th weight tells."""
        parts = self._gradients(weights, len(self._labels))
        matrix = torch.cat([part[:, ::stride] for part in parts])
        left = released[::stride].double() - (self._mean.float() @ matrix).double()
        gram = (matrix @ matrix.T).double()
        return _System(gram, (matrix @ left.float()).double(), float(left @ left), len(left))

    def _solve(self, system: _System, square: float) -> Tensor:
        inverse = 1 / self._variance.clamp(min=1e-9)
        factor = torch.linalg.cholesky(system.gram + torch.diag(square * inverse))
        solved: Tensor = inverse * torch.cholesky_solve(system.seen[:, None], factor)[:, 0]
        return solved

    def _measure(self, system: _System) -> None:
        """The mean square of what no row explains."""
        gram, seen, free = system.gram, system.seen, system.size - len(system.gram)
        ridge = 1e-6 * float(gram.diagonal().mean())
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), device=gram.device))
        explained = float(seen @ torch.cholesky_solve(seen[:, None], factor)[:, 0])
        self._squares.append((system.total - explained) / free)
        self.draws += free

    def _gradients(self, weights: dict[str, Tensor], rows: int) -> Iterator[Tensor]:
        """Clipped gradients of the first rows, ``[rows, weights]`` in parts."""

        def loss(point: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(self.clean, point, (row[None],))
            return nn.functional.cross_entropy(logits, label[None])

        each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
        for start in range(0, rows, CHUNK):
            part = slice(start, min(start + CHUNK, rows))
            found = each(weights, self._inputs[part], self._labels[part])
            flat = torch.cat([found[name].flatten(1) for name in weights], dim=1)
            norms = flat.norm(dim=1, keepdim=True)
            yield flat * (self.clip / norms.clamp(min=1e-12)).clamp(max=1.0)


class CountTap:
    """Listens to the noisy counts of a committee and scores canaries that copy proxy rows.

    Args:
        canaries: all canaries.
        sigma: noise that was charged, in votes.
    """

    def __init__(self, canaries: Canaries, sigma: float = 1.0) -> None:
        self.canaries = canaries
        self.sigma = sigma
        self.draws = 0
        self._counts: dict[int, FloatArray] = {}
        self._square = 0.0

    def __call__(self, asked: IntArray, noisy: FloatArray) -> None:
        """Hear the noisy counts ``[rows, classes]`` on these proxy rows."""
        self._counts |= dict(zip(asked.tolist(), noisy, strict=True))
        if len(asked) > 1:
            totals = noisy.sum(axis=1)
            self._square += float(((totals - totals.mean()) ** 2).sum() / noisy.shape[1])
            self.draws += len(asked) - 1

    def scores(self) -> dict[str, tuple[FloatArray, IntArray]]:
        """The noisy count of each canary's label on its proxy row."""
        heard = np.flatnonzero(np.isin(self.canaries.proxy, list(self._counts)))
        if not len(heard):
            return {}
        labels, places = self.canaries.rows.labels[heard], self.canaries.proxy[heard]
        found = [self._counts[row][label] for row, label in zip(places, labels, strict=True)]
        return {"counts": (np.array(found), heard)}

    @property
    def noise(self) -> float | None:
        """Measured noise, in votes; None where fewer than two rows were counted."""
        return math.sqrt(self._square / self.draws) if self.draws else None


def _past_frozen(module: nn.Module, inputs: Tensor) -> tuple[Tensor, nn.Module]:
    """Inputs as a frozen first part makes them, once, and the rest of the module.

    Parameters keep their names.
    """
    if not isinstance(module, nn.Sequential):
        return inputs, module
    parts = list(module.named_children())
    while len(parts) > 1 and not any(w.requires_grad for w in parts[0][1].parameters()):
        with torch.no_grad():
            inputs = parts.pop(0)[1](inputs)
    return inputs, nn.Sequential(OrderedDict(parts))


def _gradient(weight: Tensor) -> Tensor:
    """A weight's gradient; zeros where there is none."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()
