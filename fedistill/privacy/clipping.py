"""Gradients clipped unit by unit, summed and noised.

Three ways of clipping give the same sum (:class:`fedistill.privacy.rowwise.Engine`): ``gram`` by
the norms of rows where all layers are known, else Opacus's ``hooks``. Opacus's ``ghost`` is left to
trials of a loss: of a layer at many places it may measure a norm too short. Noise is added here,
whatever the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedistill.errors import FedistillError, RunError
from fedistill.privacy.by_gram import gram_engine, measurable
from fedistill.privacy.by_opacus import ByOpacus
from fedistill.privacy.exact import exact_products
from fedistill.privacy.rowwise import (
    BROKEN_WEIGHTS,
    Engine,
    Unsuited,
    is_finite,
    taught,
)
from fedistill.privacy.rowwise import Part as Part
from fedistill.privacy.rowwise import RowLoss as RowLoss
from fedistill.privacy.rowwise import cross_entropy as cross_entropy
from fedistill.types import IntArray

Found = TypeVar("Found")

Take: TypeAlias = Callable[[IntArray], Part]
"""From numbers of units to their rows."""

PASS_ROWS = 1024
"""Rows of one forward pass, at most."""

HOOKS_VALUES = 1 << 26
"""Values (a quarter of a GB) of all gradients that hooks hold at once, one for every row."""


def clipping_mode(module: nn.Module, unit: str) -> str:
    """The fastest way of clipping that is right for all layers of a module.

    ``gram`` needs a row to be a unit, and layers whose gradients it can measure; where one of them
    turns out to be used otherwise than once, the step goes by ``hooks``.
    """
    return "gram" if unit == "record" and measurable(module) else "hooks"


class Clipper:
    """Makes the gradient of a noisy step and leaves it where an optimizer looks for it.

    For a step over units U, with g_u the gradient of the loss of unit u (of the mean over its rows
    where a unit has several):

        grad = (sum over u in U of g_u min(1, C / |g_u|) + N(0, (sigma C)^2)) / expected

    ``expected`` is the expected number of units and no fact of the draw; an empty step is noise.
    A unit whose gradient is not finite adds nothing (fault 52): to skip the whole step for it, as
    is usual, would let one record decide whether the others count, and no noise covers that.
    Large steps run in parts that add up to the same, and smaller parts where memory runs out: the
    draw, and so the cost, stay (fault 61). Products are those of float32 whatever a program has
    set: norms of single rows and their sum must agree (:mod:`fedistill.privacy.exact`).

    A context: hooks are gone when it ends.

    Args:
        module: what learns; must be in training mode, for the hooks to listen.
        loss: of rows.
        clip: largest norm C of a unit's gradient.
        sigma: noise, in clipping norms.
        expected: expected number of units in a step.
        generator: of the noise, on the module's device.
        mode: ``gram``, ``ghost`` or ``hooks``.
        largest: units of one forward pass; None: by the size of the module.
        rows: of a unit, in the mean; counts where ``largest`` is None.

    Attributes:
        mode: as given, or ``hooks`` where another one turned out not to be right.
        largest: as given, or less after memory ran out.
        unusable: units that added nothing so far. A private fact: it stays where it is.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: RowLoss = cross_entropy,
        *,
        clip: float,
        sigma: float,
        expected: float,
        generator: torch.Generator | None,
        mode: str = "hooks",
        largest: int | None = None,
        rows: float = 1.0,
    ) -> None:
        self.module, self.loss, self.mode = module, loss, mode
        self.clip, self.sigma, self.expected, self.generator = clip, sigma, expected, generator
        self.unusable = 0
        self._weights = taught(module)
        self._rows = rows
        self.largest = largest or self._at_once()
        self._engine = self._made()

    def __enter__(self) -> Clipper:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def step(self, drawn: IntArray, take: Take) -> None:
        """Leave the gradient of one step over the drawn units in the ``grad`` of each weight.

        Args:
            drawn: numbers of the units.
            take: from some of these numbers to their rows.

        Raises:
            FedistillError: a weight takes no part in the loss, the loss is of a wrong shape, or
                other weights learn than at the start.
            RunError: the module's own weights are not finite.
        """
        if not all(weight.requires_grad for weight in self._weights):
            self._check_taught()
        noisy = self._robustly(self._noisy, drawn, take)
        if not is_finite(noisy):
            # Of weights everybody may know whether they are finite: noise is in them. How many rows
            # have no finite gradient is nobody's business, and a step without any is noise alone.
            if not all(bool(weight.isfinite().all()) for weight in self._weights):
                raise RunError(BROKEN_WEIGHTS)
            usable = drawn[self._robustly(self._usable, drawn, take)]
            self.unusable += len(drawn) - len(usable)
            noisy = self._robustly(self._noisy, usable, take)
        self._check_taught()
        for weight, gradient in zip(self._weights, noisy, strict=True):
            weight.grad = gradient

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run ordinary steps on the module as it is without hooks."""
        self.close()
        try:
            yield
        finally:
            self._open()

    def clipped_sum(self, part: Part) -> list[Tensor]:
        """The sum of the clipped gradients of one part without noise, an entry a weight.

        Raises:
            Unsuited: by another mode only.
        """
        sums = [torch.zeros_like(weight, requires_grad=False) for weight in self._weights]
        with exact_products():
            self._engine.add(part, sums, 1.0)
        return sums

    def close(self) -> None:
        """Take all that listens off the module."""
        self._engine.close()

    # --- inside --------------------------------------------------------------------------------

    def _made(self) -> Engine:
        if self.mode == "gram":
            return gram_engine(self.module, self.loss, self.clip)
        return ByOpacus(self.module, self.loss, self.clip, ghost=self.mode == "ghost")

    def _open(self) -> None:
        try:
            self._engine.open()
        except Unsuited:
            self._turn_to_hooks()

    def _at_once(self) -> int:
        """Units that fit into memory, as far as can be told beforehand."""
        values = sum(weight.numel() for weight in self._weights)
        held = HOOKS_VALUES // max(1, values) if self.mode == "hooks" else PASS_ROWS
        return max(1, int(min(PASS_ROWS, held) / self._rows))

    def _turn_to_hooks(self) -> None:
        self.close()
        self.mode = "hooks"
        self.largest = min(self.largest, self._at_once())
        self._engine = self._made()
        self._engine.open()

    def _check_taught(self) -> None:
        """What is frozen or made to learn within a fit would go on without noise or clipping."""
        now = taught(self.module)
        if list(map(id, now)) != list(map(id, self._weights)):
            raise FedistillError(
                f"expected the {len(self._weights)} weights that learned at the start of this fit, "
                f"found {len(now)} that learn, or others: freeze and replace weights between fits"
            )

    def _robustly(
        self, run: Callable[[IntArray, Take], Found], drawn: IntArray, take: Take
    ) -> Found:
        """The same of the same draw, whatever has to change for it to fit or to be right."""
        while True:
            try:
                with exact_products():
                    return run(drawn, take)
            except torch.OutOfMemoryError:
                if min(self.largest, len(drawn)) <= 1:
                    raise
                self.largest = min(self.largest, len(drawn)) // 2
                self.close()
                self._open()
            except Unsuited:
                self._turn_to_hooks()

    def _noisy(self, drawn: IntArray, take: Take) -> list[Tensor]:
        """Noise first, to which the parts are added."""
        gradient = [self._noise(weight) for weight in self._weights]
        for start in range(0, len(drawn), self.largest):
            part = take(drawn[start : start + self.largest])
            self._engine.add(part, gradient, 1 / self.expected)
        return gradient

    def _noise(self, weight: Tensor) -> Tensor:
        spread = self.sigma * self.clip / self.expected
        noise = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        return noise.normal_(0.0, spread, generator=self.generator) if spread else noise.zero_()

    def _usable(self, drawn: IntArray, take: Take) -> IntArray:
        """Places of the drawn units whose gradient is finite."""
        good = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(drawn), self.largest):
            finite = self._engine.usable(take(drawn[start : start + self.largest]))
            good.append(start + np.flatnonzero(finite.cpu().numpy()))
        return np.concatenate(good)
