"""What a table from others adds to a student's training, beside or instead of soft targets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedistill.distill.batches import Batch
from fedistill.distill.recipe import Recipe
from fedistill.distill.trunk import Trunk, trunk_of
from fedistill.errors import FedistillError
from fedistill.losses import kernel_loss, logit_kl, prototype_loss
from fedistill.seeding import generator
from fedistill.types import FloatArray, Logits, State

KINDS = ("class-logits", "prototypes", "kernel")
FAR = 1e4
"""At the least, how far a class without a prototype is below all others."""


@dataclass(frozen=True, eq=False)
class Guide:
    """A table that a student trains by.

    Attributes:
        kind: ``class-logits`` (mean logits of each class, ``[classes, classes]``; FD, Jeong et
            al., arXiv 1811.11479), ``prototypes`` (mean features of each class, ``[classes,
            width]``; FedProto, arXiv 2105.00243) or ``kernel`` (how like to one another common
            public rows are, ``[rows, rows]``; FedHeNN, arXiv 2202.07757).
        values: ``[items, width]``; rows of absent items may hold anything.
        present: bool ``[items]``.
        inputs: of a kernel, the public rows that it is about, ``[items, ...]``.

    Raises:
        FedistillError: an unknown kind, parts that do not fit together, or values that are not
            finite where they are present.
    """

    kind: str
    values: FloatArray
    present: npt.NDArray[np.bool_]
    inputs: FloatArray | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FedistillError(f"a guide is one of {', '.join(KINDS)}, found {self.kind!r}")
        if self.values.ndim != 2 or self.present.shape != self.values.shape[:1]:
            raise FedistillError(
                "a guide needs values [items, width] and a bool for each item, found "
                f"{list(self.values.shape)} and {list(self.present.shape)}"
            )
        if not np.isfinite(self.values[self.present]).all():
            raise FedistillError("a guide must be finite where it is present: leave the item out")
        square = self.values.shape[0] == self.values.shape[1]
        public = -1 if self.inputs is None else len(self.inputs)
        if self.kind == "kernel" and not (square and public == len(self.values)):
            raise FedistillError(
                "a kernel guide needs values [rows, rows] and the inputs of as many rows, found "
                f"{list(self.values.shape)} and {max(public, 0)} rows"
            )

    def check_classes(self, classes: int) -> None:
        """Refuse a table by class that is about other classes.

        Raises:
            FedistillError: with what was expected.
        """
        if self.kind == "kernel":
            return
        width = classes if self.kind == "class-logits" else self.values.shape[1]
        if self.values.shape != (classes, width):
            raise FedistillError(
                f"a guide of kind {self.kind} must be [{classes}, {width}] for {classes} "
                f"classes, found {list(self.values.shape)}: compare the lists of classes"
            )

    def state_dict(self) -> State:
        """Arrays that :meth:`from_state` makes the same guide of."""
        state = {"kind": np.frombuffer(self.kind.encode(), dtype=np.uint8).copy()}
        state |= {"values": np.array(self.values), "present": np.array(self.present)}
        return state if self.inputs is None else state | {"inputs": np.array(self.inputs)}

    @classmethod
    def from_state(cls, state: State) -> Guide | None:
        """The guide of a state; None if the state has none."""
        if "kind" not in state:
            return None
        return cls(
            kind=state["kind"].tobytes().decode(),
            values=np.array(state["values"]),
            present=np.array(state["present"], dtype=np.bool_),
            inputs=np.array(state["inputs"]) if "inputs" in state else None,
        )


class Guiding:
    """The guide's part of the loss, in one call of ``fit``.

    Args:
        guide: the table.
        recipe: the weight of its part of the loss, and the rows of a step.
        module: the student.
        trunk: of the module; gives the features.
        seed: of the rows of a kernel in each step.
        device: where the module is.
    """

    def __init__(
        self,
        guide: Guide,
        recipe: Recipe,
        module: nn.Module,
        trunk: Trunk,
        seed: int,
        device: torch.device,
    ) -> None:
        self.kind = guide.kind
        self.weight = recipe.guide_weight
        self.module = module
        self.trunk = trunk
        self.size = max(recipe.batch_size, 2)  # one row alone has no likeness
        self.seed = seed
        # Zeros, where nothing is told: NaN times no gradient would be NaN.
        values = np.where(guide.present[:, None], guide.values, 0).astype(np.float32)
        self.values = torch.from_numpy(values).to(device)
        self.present = torch.from_numpy(guide.present).to(device)
        self.rows: Tensor | None = None
        self.held = np.flatnonzero(guide.present)
        if guide.inputs is not None:
            self.rows = torch.from_numpy(guide.inputs.astype(np.float32)).to(device)

    def on_own(self, logits: Tensor, part: Batch, whole: Batch) -> Tensor | None:
        """What a table by class adds on the own rows of a batch; None if nothing.

        Args:
            logits: of all rows of the part, of the pass that was just made.
            part: the batch, or a part of it: the terms of the parts add up to that of the whole.
            whole: the batch. The term is a mean over its own rows whose class is in the table.
        """
        if self.kind == "kernel":
            return None
        labels = part.targets[: part.own].argmax(dim=1)
        told = self.present[labels]
        counted = self.present[whole.targets[: whole.own].argmax(dim=1)].sum().clamp_min(1)
        if self.kind == "prototypes":
            features = self.trunk.of(logits)[: part.own]
            mean = prototype_loss(features, labels, self.values, self.present)
        else:
            mean = logit_kl(logits[: part.own][told], self.values[labels[told]], temperature=1.0)
        return self.weight * told.sum() / counted * mean

    def beside(self, step: int) -> Tensor | None:
        """What a kernel adds to a step, on some of its public rows; None if nothing."""
        if self.kind != "kernel" or self.rows is None or len(self.held) < 2:
            return None
        random = generator(self.seed, "kernel", step)
        drawn = self.held[random.permutation(len(self.held))[: self.size]]
        chosen = torch.from_numpy(np.sort(drawn)).to(self.values.device)
        features = self.trunk.of(self.module(self.rows[chosen]))
        return self.weight * kernel_loss(features, self.values[chosen][:, chosen])


@contextmanager
def guiding(
    guide: Guide | None, recipe: Recipe, module: nn.Module, seed: int, device: torch.device
) -> Iterator[Guiding | None]:
    """Within the block, the guide at work; None if there is none that tells or weighs anything."""
    if guide is None or not recipe.guide_weight or not guide.present.any():
        yield None
        return
    with trunk_of(module) as trunk:
        yield Guiding(guide, recipe, module, trunk, seed, device)


def nearest_prototype(features: FloatArray, guide: Guide) -> Logits:
    """Logits ``[rows, classes]``, float32: minus the squared distance to each prototype.

    The class of the largest is that of the nearest prototype, as in FedProto. A class without a
    prototype is finite and below all others.

    Args:
        features: ``[rows, width]``.
        guide: prototypes ``[classes, width]``, one present at least.

    Raises:
        FedistillError: another width than the prototypes'.
    """
    held = guide.values[guide.present].astype(np.float64)
    if features.shape[1] != held.shape[1]:
        raise FedistillError(
            f"the prototypes have {held.shape[1]} features, the model {features.shape[1]}: every "
            "client must have features of one width"
        )
    rows = features.astype(np.float64)
    squares = np.stack([np.square(rows - one).sum(axis=1) for one in held], axis=1)
    known = np.maximum(-squares, np.finfo(np.float32).min / 8)
    logits = np.tile(2 * known.min(axis=1, keepdims=True) - FAR, len(guide.present))
    logits[:, guide.present] = known
    return logits.astype(np.float32)
