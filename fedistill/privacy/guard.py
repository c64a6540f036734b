"""Losses that break the clipping of single rows, found before the first private step.

What is clipped is what is taken for the gradient of a row. Where the loss of a row depends on other
rows of the batch, that gradient is not the row's own, its norm bounds nothing, and no error tells:
the noise is too small for what one record can do. Four tests look for it on a few rows. A pass
proves nothing; what they may miss is refused by name (:func:`refuse`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import seeded
from fedistill.errors import FedistillError
from fedistill.privacy.by_gram import measurable
from fedistill.privacy.by_opacus import ghostly
from fedistill.privacy.clipping import Clipper, RowLoss
from fedistill.privacy.layers import hold_still
from fedistill.privacy.rowwise import Unsuited
from fedistill.seeding import generator
from fedistill.types import IntArray

SAMPLES = 16
"""Rows of a test: with more, a loss that compares rows moves the sum less (1.18 C against 1.05)."""

FEW = 6
"""Rows of a second, smaller test."""

SLACK = 1e-3
"""What rounding may add to a sum of clipped gradients, in C, or to a loss, in its own size."""

STEEP = 100.0
"""The loss is tested so much steeper that every gradient is clipped: only then does it show."""

WHY = (
    "each row's loss must depend on that row alone, so leave out mixup, contrastive and relational "
    "terms and statistics of the batch, and distil public rows in a step of their own (absorb)"
)

REFUSED: Mapping[str, str] = {
    "calibrate": "it adds the class shares of own rows to the logits, and they get no noise: set "
    "calibrate = false",
    "familiarity": "it compares own rows with proxy rows in one step: use a rule that does not ask "
    "for it (uniform, entropy) in place of distribution-weighted",
    "mixup": "a mixture of private rows has no gradient of one row: mix public rows only",
    "cutmix": "a mixture of private rows has no gradient of one row: mix public rows only",
    "contrastive": "it compares the rows of a batch: contrast public rows only",
    "relational": "it compares the rows of a batch: relate public rows only",
    "batch-normalised-logits": "statistics of the batch are statistics of other rows: leave it out",
    "batch-normalised-weights": "statistics of the batch are statistics of other rows, and a test "
    "of a few rows may miss it: weigh a row by itself or by public facts",
    "two-forwards": "gradients of a private and a public row would be clipped as one: distil "
    "public rows in a step of their own",
    "outside-projector": "what lies outside the module gets no noise: put it into the module, or "
    "train it on public rows",
    "batch-norm": "it mixes the rows of a batch: use GroupNorm",
    "secure-mode": "its package (torchcsprng) is dead: noise is from an OS-seeded generator",
}
"""What differential privacy rules out, by name, and what to do."""


def refuse(what: Recipe | Iterable[str]) -> None:
    """Refuse what cannot be private, whatever a test on a few rows would say.

    Args:
        what: a recipe, or names of :data:`REFUSED`; other names pass.

    Raises:
        FedistillError: with the name, the reason, and what to do.
    """
    if isinstance(what, Recipe):
        what = [name for name in ("calibrate", "familiarity") if getattr(what, name)]
    for name in what:
        if name in REFUSED:
            raise FedistillError(f"{name} cannot be private: {REFUSED[name]}")


def check_loss(
    build_or_module: nn.Module | Callable[[], nn.Module],
    loss: RowLoss,
    inputs: Tensor,
    labels: Tensor,
    *,
    name: str = "loss",
    clip: float = 1.0,
) -> None:
    """Refuse a loss that lets one row move the sum of clipped gradients by more than ``clip``.

    On two draws of rows: the sum of clipped gradients with and without each row (hooks, no noise,
    fixed weights, dropout off), gradients of each row's loss by the numbers of the others, and the
    loss of each row alone against its loss among the others.

    Args:
        build_or_module: what learns; its weights and gradients stay as they are.
        loss: see :data:`fedistill.privacy.clipping.RowLoss`.
        inputs: ``[rows, ...]``, best 16 and more, public ones or own; one row at least.
        labels: ``[rows]``.
        name: of the loss, for the message.
        clip: largest norm C of a row's gradient.

    Raises:
        FedistillError: the loss, the module, or weights outside the module.
    """
    module = build_or_module if isinstance(build_or_module, nn.Module) else build_or_module()
    _refuse_batch_norm(module)
    inputs, labels = _enough(inputs, labels)
    wary = _naming_rows(loss, name)
    with _as_in_training(module):
        _refuse_outsiders(module, wary, inputs[:FEW], labels[:FEW], name)
        for count in (SAMPLES, FEW):
            chosen = generator("guard", count).permutation(len(inputs))[:count]
            rows = torch.from_numpy(chosen).to(inputs.device)
            _refuse_sensitive(module, wary, inputs[rows], labels[rows], name, clip)
            _refuse_mixing(module, wary, inputs[rows], labels[rows], name)
            _refuse_dependent(module, wary, inputs[rows], labels[rows], name)


def sensitivity(
    module: nn.Module, loss: RowLoss, inputs: Tensor, labels: Tensor, clip: float = 1.0
) -> float:
    """How far one row moves the sum of clipped gradients, at most, in units of ``clip``.

    At most 1 for a loss that treats each row by itself, clipped as training would clip it. Ghost
    clipping measures gradients layer by layer; a weight that is used outside its layer (a penalty
    on weights, a tied weight in a function) moves the sum and not that measure.

    Args:
        module: in training mode.
        loss: of rows; taken :data:`STEEP` times, so that every gradient is clipped.
        inputs: ``[rows, ...]``; each row is left out once.
        labels: ``[rows]``.
        clip: largest norm of a row's gradient.
    """
    worst = _moved(module, loss, inputs, labels, clip, "hooks")
    for mode, possible in (("gram", measurable), ("ghost", ghostly)):
        if possible(module):
            with contextlib.suppress(Unsuited):  # training takes hooks then, too
                worst = max(worst, _moved(module, loss, inputs, labels, clip, mode))
    return worst


def _moved(
    module: nn.Module, loss: RowLoss, inputs: Tensor, labels: Tensor, clip: float, mode: str
) -> float:
    """As :func:`sensitivity`, in one mode of clipping."""

    def steep(net: nn.Module, some: Tensor, wanted: Tensor) -> Tensor:
        with seeded(0):
            return STEEP * loss(net, some, wanted)

    with Clipper(
        module, steep, clip=clip, sigma=0.0, expected=1.0, generator=None, mode=mode
    ) as clipper:

        def clipped(rows: IntArray) -> Tensor:
            index = torch.from_numpy(rows).to(inputs.device)
            summed = clipper.clipped_sum((inputs[index], labels[index], None))
            return torch.cat([gradient.flatten().double() for gradient in summed])

        everybody = np.arange(len(inputs))
        total = clipped(everybody)
        moved = [float((total - clipped(np.delete(everybody, row))).norm()) for row in everybody]
    return max(moved) / clip


def _naming_rows(loss: RowLoss, name: str) -> RowLoss:
    """The loss, with a word on how many rows it could not take: a step may have any number."""

    def wary(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        try:
            return loss(net, inputs, labels)
        except (NotImplementedError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError) as problem:
            reason = str(problem).split("\n")[0]
            raise FedistillError(
                f"{name} cannot be private: it fails for {len(inputs)} rows ({reason})"
            ) from None

    return wary


def _refuse_sensitive(
    module: nn.Module, loss: RowLoss, inputs: Tensor, labels: Tensor, name: str, clip: float
) -> None:
    found = sensitivity(module, loss, inputs, labels, clip)
    if not found <= 1 + SLACK:
        raise FedistillError(
            f"{name} cannot be private: one row of {len(inputs)} moves the sum of clipped "
            f"gradients by {found:.4g} clipping norms, at most 1 is allowed; {WHY}"
        )


def _refuse_mixing(
    module: nn.Module, loss: RowLoss, inputs: Tensor, labels: Tensor, name: str
) -> None:
    """The gradient of a row's loss by other rows is 0: not small, but 0, where rows do not meet.

    This finds what is weak at first and grows as weights learn. Numbers only: words have none.
    """
    if not inputs.is_floating_point():
        return
    given = inputs.clone().requires_grad_()
    with seeded(0):
        losses = loss(module, given.clone(), labels)
    if losses.dim() == 0 or not losses.requires_grad:
        return
    for row, own in enumerate(losses):
        (found,) = torch.autograd.grad(own, given, retain_graph=True, allow_unused=True)
        if found is None:
            return
        found[row] = 0.0
        if bool(found.any()):
            raise FedistillError(
                f"{name} cannot be private: the loss of a row changes with another one of "
                f"{len(inputs)}; {WHY}"
            )


def _refuse_dependent(
    module: nn.Module, loss: RowLoss, inputs: Tensor, labels: Tensor, name: str
) -> None:
    """A row's loss alone must be what it is among the others.

    This finds what the gradients of a few rows may hide: weights that are normalised over a batch.
    """
    with torch.no_grad(), seeded(0):
        together = loss(module, inputs, labels)
        alone = torch.stack(
            [loss(module, inputs[r : r + 1], labels[r : r + 1]).sum() for r in range(len(inputs))]
        )
    wanted = alone.sum() if together.dim() == 0 else alone
    apart = (together - wanted).abs() / (1 + wanted.abs())
    if not bool((apart <= SLACK).all()):
        raise FedistillError(
            f"{name} cannot be private: the loss of a row is another one alone than among "
            f"{len(inputs)} rows; {WHY}"
        )


def _refuse_outsiders(
    module: nn.Module, loss: RowLoss, inputs: Tensor, labels: Tensor, name: str
) -> None:
    """Weights that the loss trains and the module does not have would learn without noise."""
    own = {id(weight) for weight in module.parameters()}
    with seeded(0):
        reached = list(_leaves(loss(module, inputs, labels)))
    strangers = [leaf for leaf in reached if id(leaf) not in own]
    if strangers:
        raise FedistillError(
            f"{name} cannot be private: it trains weights of shape {list(strangers[0].shape)} "
            f"outside the module; {REFUSED['outside-projector']}"
        )


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """What a backward pass from here would leave gradients on."""
    waiting, met = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        waiting += [before for before, _ in node.next_functions]


def _refuse_batch_norm(module: nn.Module) -> None:
    for path, layer in module.named_modules():
        learns = any(weight.requires_grad for weight in layer.parameters())
        if isinstance(layer, _BatchNorm) and (learns or not layer.track_running_stats):
            raise FedistillError(
                f"layer {path or type(layer).__name__} (BatchNorm) cannot be private: "
                f"{REFUSED['batch-norm']}"
            )


@contextmanager
def _as_in_training(module: nn.Module) -> Iterator[None]:
    """Training mode without what is random in it; afterwards all is as it was."""
    before = [(layer, layer.training) for layer in module.modules()]
    gradients = [(weight, weight.grad) for weight in module.parameters()]
    module.train()
    hold_still(module)
    for layer in module.modules():
        if isinstance(layer, _DropoutNd):
            layer.eval()
    try:
        yield
    finally:
        for layer, training in before:
            layer.training = training
        for weight, gradient in gradients:
            weight.grad = gradient


def _enough(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """At least 16 rows; where there are fewer, these with some noise on numbers."""
    if not len(inputs):
        raise FedistillError("a loss is tried out on rows, found none: give public rows")
    times = -(-SAMPLES // len(inputs))
    if times == 1:
        return inputs, labels
    more = inputs.repeat(times, *[1] * (inputs.dim() - 1))
    if more.is_floating_point():
        noise = generator("guard", "noise").standard_normal(tuple(more.shape)).astype(np.float32)
        scale = 0.1 * float(inputs.std(unbiased=False)) + 1e-3
        more = more + scale * torch.from_numpy(noise).to(inputs.device)
    return more, labels.repeat(times)
