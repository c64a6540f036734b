"""Gradients clipped unit by unit, summed and noised: Opacus, without its engine.

``PrivacyEngine.make_private`` is not used. It brings an accountant of its own that forgets (the
ledger is ours), a loader that draws from PyTorch's global generator (the coins have to be secret),
and it wraps the optimizer for good (public steps have to be ordinary ones). What is used is what
clips: ``GradSampleModule`` with ``DPOptimizer``, and their ghost-clipping siblings, which get by
without a gradient for every row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.errors import FedistillError, RunError
from fedistill.privacy.quiet import import_opacus
from fedistill.types import IntArray

RowLoss: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From a module, inputs ``[rows, ...]`` and labels ``[rows]`` to ``[rows]`` losses, or their sum.

The loss of a row must depend on that row alone.
"""

Part: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Inputs, labels, and for users the place of each row's user in the part; None: a row a unit."""

GHOST_ROWS = 1024
"""Rows of one forward pass, at most."""

HOOKS_VALUES = 1 << 26
"""Values (a quarter of a GB) of all gradients that hooks hold at once, one for every row."""


def cross_entropy(module: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of a student, ``[rows]``."""
    return F.cross_entropy(module(inputs), labels, reduction="none")


def clipping_mode(module: nn.Module, unit: str) -> str:
    """``ghost`` where it is right for all layers of a module, else ``hooks``.

    Ghost clipping needs a norm sampler or a grad sampler for every layer that learns, each weight
    in one layer only, and a row to be a unit.
    """
    import_opacus()
    from opacus.grad_sample import GradSampleModule
    from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN, RNNLinear

    if unit != "record":
        return "hooks"
    owners: dict[int, int] = {}
    for layer in module.modules():
        own = [weight for weight in layer.parameters(recurse=False) if weight.requires_grad]
        for weight in own:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
        known = type(layer) in GradSampleModule.GRAD_SAMPLERS
        if isinstance(layer, DPRNN | DPLSTM | DPGRU | RNNLinear) or (own and not known):
            return "hooks"
    return "ghost" if max(owners.values(), default=1) == 1 else "hooks"


class Clipper:
    """Makes the gradient of a noisy step and leaves it where an optimizer looks for it.

    For a step over units U, with g_u the gradient of the loss of unit u (of the mean over its rows
    where a unit has several):

        grad = (sum over u in U of g_u min(1, C / |g_u|) + N(0, (sigma C)^2)) / expected

    ``expected`` is the expected number of units and no fact of the draw; an empty step is noise.
    A unit whose gradient is not finite adds nothing (fault 52): to skip the whole step for it, as
    is usual, would let one record decide whether the others count, and no noise covers that.
    Large steps run in parts that add up to the same, and smaller parts where memory runs out: the
    draw, and so the cost, stay (fault 61).

    A context: hooks are gone when it ends.

    Args:
        module: what learns; must be in training mode, for the hooks to listen.
        loss: of rows.
        clip: largest norm C of a unit's gradient.
        sigma: noise, in clipping norms.
        expected: expected number of units in a step.
        generator: of the noise, on the module's device.
        mode: ``ghost`` or ``hooks``.
        largest: units of one forward pass; None: by the size of the module.
        rows: of a unit, in the mean; counts where ``largest`` is None.

    Attributes:
        mode: as given, or ``hooks`` where ghost clipping turned out not to be right.
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
        self._rows = rows
        self.largest = largest or self._at_once()
        self._wrapped: Any = None
        self._optimizer: Any = None

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

    def step(self, drawn: IntArray, take: Callable[[IntArray], Part]) -> None:
        """Leave the gradient of one step over the drawn units in the ``grad`` of each weight.

        Args:
            drawn: numbers of the units.
            take: from some of these numbers to their rows.

        Raises:
            FedistillError: a weight takes no part in the loss, or the loss is of a wrong shape.
            RunError: the module's own weights are not finite.
        """
        self._robustly(drawn, take)
        if self._is_finite():
            return
        # Of weights everybody may know whether they are finite: noise is in them. How many rows
        # have no finite gradient is nobody's business, and a step without any is noise alone.
        if not all(bool(weight.isfinite().all()) for weight in self._weights()):
            raise RunError(
                "the weights are NaN or infinite: what was spent stays spent; lower privacy.lr"
            )
        usable = drawn[self._usable(drawn, take)]
        self.unusable += len(drawn) - len(usable)
        self._robustly(usable, take)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run ordinary steps on the module as it is without Opacus."""
        self.close()
        try:
            yield
        finally:
            self._open()

    def clipped_sum(self, part: Part) -> list[Tensor]:
        """The sum of the clipped gradients of one part without noise, an entry a weight."""
        self._optimizer._is_last_step_skipped = False
        self._optimizer.zero_grad(set_to_none=True)
        self._part(part, last=False)
        return [_held(weight, "summed_grad").detach().clone() for weight in self._weights()]

    def close(self) -> None:
        """Take all of Opacus off the module."""
        if self._wrapped is None:
            return
        self._wrapped.cleanup()
        for weight in self._weights():
            for name in ("summed_grad", "grad_sample", "_norm_sample"):
                weight.__dict__.pop(name, None)
        for layer in self.module.modules():  # what an interrupted pass leaves behind
            for name in ("activations", "max_batch_len"):
                layer.__dict__.pop(name, None)
        self._wrapped = self._optimizer = None

    # --- inside --------------------------------------------------------------------------------

    def _open(self) -> None:
        import_opacus()
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

        ghost = self.mode == "ghost"
        try:
            if ghost:
                self._wrapped = GradSampleModuleFastGradientClipping(
                    self.module, loss_reduction="sum", max_grad_norm=self.clip
                )
            else:
                self._wrapped = GradSampleModule(self.module, loss_reduction="sum")
        except NotImplementedError as problem:
            raise FedistillError(
                f"a private student cannot have this layer ({problem}): use another model"
            ) from None
        self._optimizer = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(
            _Weights(self._weights()),
            noise_multiplier=self.sigma,
            max_grad_norm=self.clip,
            expected_batch_size=self.expected,
            loss_reduction="mean",
            generator=self.generator,
        )

    def _at_once(self) -> int:
        """Units that fit into memory, as far as can be told beforehand."""
        values = sum(weight.numel() for weight in self._weights())
        held = GHOST_ROWS if self.mode == "ghost" else HOOKS_VALUES // max(1, values)
        return max(1, int(min(GHOST_ROWS, held) / self._rows))

    def _reopen(self, mode: str) -> None:
        self.close()
        if mode != self.mode:
            self.mode = mode
            self.largest = min(self.largest, self._at_once())
        self._open()

    def _robustly(self, drawn: IntArray, take: Callable[[IntArray], Part]) -> None:
        """One step with the same draw, whatever has to change for it to fit or to be right."""
        while True:
            try:
                self._attempt(drawn, take)
                return
            except torch.OutOfMemoryError:
                if min(self.largest, len(drawn)) <= 1:
                    raise
                self.largest = min(self.largest, len(drawn)) // 2
                self._reopen(self.mode)
            except NotGhostly:
                self._reopen("hooks")

    def _attempt(self, drawn: IntArray, take: Callable[[IntArray], Part]) -> None:
        self._optimizer._is_last_step_skipped = False
        self._optimizer.zero_grad(set_to_none=True)
        starts = list(range(0, len(drawn), self.largest))
        for start in starts:
            self._part(take(drawn[start : start + self.largest]), last=start == starts[-1])
        if not starts:
            self._nobody()
            self._optimizer.pre_step()

    def _part(self, part: Part, last: bool) -> None:
        self._optimizer.signal_skip_step(do_skip=not last)
        try:
            if self.mode == "ghost":
                self._backward_twice(part)
            else:
                self._backward(part)
            self._optimizer.pre_step()
        except BaseException:
            self._optimizer._step_skip_queue.clear()
            raise
        if not last:
            self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, part: Part) -> None:
        """A gradient for every row, then for every unit."""
        inputs, _, owner = part
        losses = self._losses(part)
        if owner is not None:
            losses = losses / torch.bincount(owner)[owner]
        _send_back(losses.sum())
        self._check_reached("grad_sample", len(inputs))
        if owner is None:
            return
        users = int(owner.max()) + 1
        for weight in self._weights():
            rows = _held(weight, "grad_sample")
            summed = rows.new_zeros((users, *rows.shape[1:])).index_add_(0, owner, rows)
            weight.grad_sample = summed  # type: ignore[attr-defined]

    def _backward_twice(self, part: Part) -> None:
        """Norms from the first pass, the clipped sum from the second (Li et al., 2110.05679)."""
        losses = self._losses(part)
        if losses.dim() == 0:
            raise NotGhostly
        for weight in self._weights():
            weight.__dict__.pop("_norm_sample", None)
        _send_back(losses.sum(), again=True)
        self._check_reached("_norm_sample", len(losses))
        self._clear_grads()
        factors = self._wrapped.get_clipping_coef()
        self._wrapped.disable_hooks()
        _send_back((factors * losses).sum())
        self._wrapped.enable_hooks()
        # What the norm of a weight needs may reach its hooks and not the sum: then it adds zero.
        for weight in self._weights():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad

    def _losses(self, part: Part) -> Tensor:
        inputs, labels, owner = part
        try:
            losses = self.loss(self._wrapped, inputs, labels)
        except NotImplementedError:  # a layer used twice
            if self.mode == "ghost":
                raise NotGhostly from None
            raise
        scalar = losses.dim() == 0 and owner is None
        if not scalar and losses.shape != (len(inputs),):
            raise FedistillError(
                f"a private loss must give one value for each row, [{len(inputs)}], it gives "
                f"{list(losses.shape)}: reduce it to rows, not to their mean"
            )
        return losses

    def _check_reached(self, name: str, rows: int) -> None:
        """Every weight has something for every row, or it would go on without noise."""
        for weight, label in self._named():
            found = weight.__dict__.get(name)
            if found is None and self.mode == "ghost":
                raise NotGhostly
            if not isinstance(found, Tensor) or len(found) != rows:
                raise FedistillError(
                    f"a private student needs a gradient of {label} for each row, and the loss "
                    "gives none: freeze weights that it does not use (requires_grad_(False)), and "
                    "keep layers that mix rows out of the module"
                )

    def _nobody(self) -> None:
        """A step that nobody is in: a sum of nothing."""
        for weight in self._weights():
            weight.grad = torch.zeros_like(weight)
            weight.grad_sample = weight.new_zeros((0, *weight.shape))  # type: ignore[attr-defined]

    def _usable(self, drawn: IntArray, take: Callable[[IntArray], Part]) -> IntArray:
        """Places of the drawn units whose gradient is finite."""
        good = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(drawn), self.largest):
            self._optimizer.zero_grad(set_to_none=True)
            part = take(drawn[start : start + self.largest])
            if self.mode == "ghost":
                self._backward_twice(part)
                finite = self._wrapped.get_norm_sample().isfinite()
            else:
                self._backward(part)
                rows = [_held(weight, "grad_sample").flatten(1) for weight in self._weights()]
                finite = torch.stack([r.isfinite().all(1) for r in rows]).all(0)
            good.append(start + np.flatnonzero(finite.cpu().numpy()))
        return np.concatenate(good)

    def _is_finite(self) -> bool:
        found = [
            weight.grad.isfinite().all() for weight in self._weights() if weight.grad is not None
        ]
        return bool(torch.stack(found).all())

    def _clear_grads(self) -> None:
        for weight in self._weights():
            weight.grad = None

    def _weights(self) -> list[nn.Parameter]:
        return [weight for weight, _ in self._named()]

    def _named(self) -> list[tuple[nn.Parameter, str]]:
        return [(w, name) for name, w in self.module.named_parameters() if w.requires_grad]


class NotGhostly(Exception):
    """Ghost clipping would be wrong here: take hooks."""


class _Weights:
    """As much of a torch optimizer as Opacus asks for; steps are taken by ours."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": weights}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        del set_to_none
        for weight in self.param_groups[0]["params"]:
            weight.grad = None


def _held(weight: nn.Parameter, name: str) -> Tensor:
    """What Opacus has put on a weight."""
    tensor: Tensor = weight.__dict__[name]
    return tensor


def _send_back(loss: Tensor, again: bool = False) -> None:
    """Run a backward pass; that rows themselves need no gradient is no news, whoever listens."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss.backward(retain_graph=again)  # type: ignore[no-untyped-call]
