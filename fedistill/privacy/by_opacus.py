"""Clipped sums by Opacus, without its engine.

``PrivacyEngine.make_private`` is not used. It brings an accountant of its own that forgets (the
ledger is ours), a loader that draws from PyTorch's global generator (the coins have to be secret),
and it wraps the optimizer for good (public steps have to be ordinary ones). What is used is what
clips: ``GradSampleModule`` with ``DPOptimizer``, and their ghost-clipping siblings, which get by
without a gradient for every row.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedistill.errors import FedistillError
from fedistill.privacy import gram
from fedistill.privacy.quiet import import_opacus
from fedistill.privacy.rowwise import Part, RowLoss, Unsuited, losses_of, taught


def ghostly(module: nn.Module) -> bool:
    """Whether ghost clipping is right for all layers of a module.

    It needs a norm sampler or a grad sampler for every layer that learns, each weight in one layer
    only, and more than half precision: norms are measured otherwise than the sum is made.
    """
    import_opacus()
    from opacus.grad_sample import GradSampleModule
    from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN, RNNLinear

    owners: dict[int, int] = {}
    for layer in module.modules():
        own = [weight for weight in layer.parameters(recurse=False) if weight.requires_grad]
        if not {weight.dtype for weight in own} <= set(gram.DTYPES):
            return False
        for weight in own:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
        known = type(layer) in GradSampleModule.GRAD_SAMPLERS
        if isinstance(layer, DPRNN | DPLSTM | DPGRU | RNNLinear) or (own and not known):
            return False
    return max(owners.values(), default=1) == 1


class ByOpacus:
    """An engine: a gradient for every row (hooks), or norms alone and a second pass (ghost).

    Args:
        module: what learns; must be in training mode, for the hooks to listen.
        loss: of rows.
        clip: largest norm of a unit's gradient.
        ghost: which of the two.
    """

    def __init__(self, module: nn.Module, loss: RowLoss, clip: float, *, ghost: bool) -> None:
        self.module, self.loss, self.clip, self.ghost = module, loss, clip, ghost
        self._wrapped: Any = None
        self._optimizer: Any = None

    def open(self) -> None:
        """Put Opacus's hooks on the module."""
        import_opacus()
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

        try:
            if self.ghost:
                self._wrapped = GradSampleModuleFastGradientClipping(
                    self.module, loss_reduction="sum", max_grad_norm=self.clip
                )
            else:
                self._wrapped = GradSampleModule(self.module, loss_reduction="sum")
        except NotImplementedError as problem:
            raise FedistillError(
                f"a private student cannot have this layer ({problem}): use another model"
            ) from None
        # It clips and adds up; noise and the divisor are not left to it.
        self._optimizer = (DPOptimizerFastGradientClipping if self.ghost else DPOptimizer)(
            _Weights(taught(self.module)),
            noise_multiplier=0.0,
            max_grad_norm=self.clip,
            expected_batch_size=1,
        )

    def close(self) -> None:
        """Take all of Opacus off the module."""
        if self._wrapped is None:
            return
        self._wrapped.cleanup()
        for weight in taught(self.module):
            for name in ("summed_grad", "grad_sample", "_norm_sample"):
                weight.__dict__.pop(name, None)
        for layer in self.module.modules():  # what an interrupted pass leaves behind
            for name in ("activations", "max_batch_len"):
                layer.__dict__.pop(name, None)
        self._wrapped = self._optimizer = None

    def add(self, part: Part, to: Sequence[Tensor], share: float) -> None:
        """Add the sum of the units' clipped gradients, times ``share``."""
        self._forget()
        self._optimizer.signal_skip_step(do_skip=True)  # or it would add noise
        try:
            if self.ghost:
                self._backward_twice(part)
            else:
                self._backward(part)
            self._optimizer.pre_step()
        except BaseException:
            self._optimizer._step_skip_queue.clear()
            raise
        for total, weight in zip(to, taught(self.module), strict=True):
            total.add_(_held(weight, "summed_grad").detach(), alpha=share)

    def usable(self, part: Part) -> Tensor:
        """Whether the gradient of each unit is finite, ``[units]``."""
        self._forget()
        if self.ghost:
            self._backward_twice(part)
            finite: Tensor = self._wrapped.get_norm_sample().isfinite()
            return finite
        self._backward(part)
        rows = [_held(weight, "grad_sample").flatten(1) for weight in taught(self.module)]
        return torch.stack([r.isfinite().all(1) for r in rows]).all(0)

    # --- inside --------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._optimizer._is_last_step_skipped = False
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
        for weight in taught(self.module):
            rows = _held(weight, "grad_sample")
            summed = rows.new_zeros((users, *rows.shape[1:])).index_add_(0, owner, rows)
            weight.grad_sample = summed  # type: ignore[attr-defined]

    def _backward_twice(self, part: Part) -> None:
        """Norms from the first pass, the clipped sum from the second (Li et al., 2110.05679)."""
        losses = self._losses(part)
        if losses.dim() == 0 or torch.is_autocast_enabled(losses.device.type):
            raise Unsuited
        for weight in taught(self.module):
            weight.__dict__.pop("_norm_sample", None)
        _send_back(losses.sum(), again=True)
        self._check_reached("_norm_sample", len(losses))
        for weight in taught(self.module):
            weight.grad = None
        factors = self._wrapped.get_clipping_coef()
        self._wrapped.disable_hooks()
        _send_back((factors * losses).sum())
        self._wrapped.enable_hooks()
        # What the norm of a weight needs may reach its hooks and not the sum: then it adds zero.
        for weight in taught(self.module):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad

    def _losses(self, part: Part) -> Tensor:
        try:
            return losses_of(self._wrapped, self.loss, part)
        except NotImplementedError:  # a layer used twice
            if self.ghost:
                raise Unsuited from None
            raise

    def _check_reached(self, name: str, rows: int) -> None:
        """Every weight has something for every row, or it would go on without noise."""
        for label, weight in self.module.named_parameters():
            if not weight.requires_grad:
                continue
            found = weight.__dict__.get(name)
            if found is None and self.ghost:
                raise Unsuited
            if not isinstance(found, Tensor) or len(found) != rows:
                raise FedistillError(
                    f"a private student needs a gradient of {label} for each row, and the loss "
                    "gives none: freeze weights that it does not use (requires_grad_(False)), and "
                    "keep layers that mix rows out of the module"
                )


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
