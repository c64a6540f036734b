"""From a large teacher to a small student: one class, one training step."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fedistill.distill.batches import passes
from fedistill.distill.hooks import captured
from fedistill.distill.optimizer import Optimizer
from fedistill.distill.recipe import Recipe
from fedistill.distill.schedules import Schedule, at
from fedistill.distill.teachers import Moving, Teacher, as_teacher, evaluating, module_of, predict
from fedistill.distill.torch_student import seeded
from fedistill.errors import CheckpointError, DataError, FedistillError, RunError
from fedistill.losses import hint, label_loss, logit_kl
from fedistill.metrics import accuracy
from fedistill.seeding import derive
from fedistill.types import FloatArray, Logits, Rows, State

Pair: TypeAlias = tuple[str, str]
"""Names of a student's layer and of a teacher's layer."""
Part: TypeAlias = str | Pair
"""What a phase names: ``labels``, ``soft``, or the pair of layers of a feature loss."""
Layers: TypeAlias = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""What the watched layers of the student and of the teacher said."""
Figures: TypeAlias = dict[str, Any]
"""What an epoch yields."""

USED = {"epochs", "batch_size", "lr", "optimizer", "momentum", "weight_decay", "clip", "schedule"}
"""Fields of a recipe that mean something here."""


@dataclass(frozen=True)
class Feature:
    """One layer of the student against one of the teacher.

    Attributes:
        loss: from features of both sides to one number.
        weight: a number, or a function of the epoch.
        regressor: from the shapes of one row of both to a module on the student's side, trained
            along and left behind; such as :func:`fedistill.losses.regressor`.
    """

    loss: Callable[[Tensor, Tensor], Tensor] = hint
    weight: float | Schedule = 1.0
    regressor: Callable[[Sequence[int], Sequence[int]], nn.Module] | None = None


@dataclass(frozen=True)
class _Epoch:
    """What one epoch trains with.

    Attributes:
        number: from 0.
        of: epochs in all.
        parts: names of the losses that are on.
        soft_weight: w of this epoch.
        temperature: T of this epoch.
    """

    number: int
    of: int
    parts: Collection[Part]
    soft_weight: float
    temperature: float


@dataclass(frozen=True)
class _Batch:
    """The rows of one step.

    Attributes:
        inputs: ``[rows, ...]``, the same tensor for student and teacher.
        labels: ``[rows]``, -1 for none.
        taught: the teacher's logits ``[rows, classes]``; None without a teacher.
        strength: ``[rows]`` of the soft part; None for 1.
    """

    inputs: Tensor
    labels: Tensor
    taught: Tensor | None
    strength: Tensor | None


class Distiller:
    """Trains a student on rows, taught by their labels and by a teacher.

    The loss of a batch is (1 - w) CE(labels) + w loss(student, teacher) + feature losses. Rows
    labelled -1 have no label: with a share s of labelled rows the first part weighs (1 - w) s and
    the second 1 - (1 - w) s. Without a teacher it is plain training.

    Student and teacher see the same tensor, the teacher without dropout and without a gradient. A
    teacher that stays as it is and whose layers are not watched is asked once for all rows.

    Args:
        student: a factory of modules, built under the seed; or a module, trained in place.
        teacher: a module, or anything from :mod:`fedistill.distill.teachers`; None for none.
        loss: the soft part, from logits of both sides to one number. By naming ``labels``,
            ``temperature`` or ``strength`` in its signature it gets them too.
        feature_losses: from (student layer, teacher layer), named as in ``named_modules()``, to a
            :class:`Feature`, or to a plain function for one of weight 1.
        soft_weight: w within 0 and 1, or a function of the epoch (from 0).
        temperature: T, or a function of the epoch.
        phases: what is trained first, each (epochs, losses that are on), a loss being ``labels``,
            ``soft`` or a key of ``feature_losses``; afterwards all are on. Low layers first is
            progressive distillation; ``(10, ["labels"])`` lets the labels go first.
        strength: from the teacher's logits to a factor for each row in the soft part, of mean 1,
            such as :func:`fedistill.distill.schedules.certainty`.
        balance: from named losses to their total, in place of w; if it is a module it is trained
            along, such as :class:`fedistill.distill.schedules.Uncertainty`.
        training: ``batch_size``, ``lr``, ``optimizer``, ``momentum``, ``weight_decay``, ``clip``,
            ``schedule`` and ``epochs`` count.
        seed: of the initial weights and all choices; equal seeds, equal students.
        device: where to train; the teacher's module is moved there too.

    Raises:
        FedistillError: parts that do not fit together.
    """

    def __init__(
        self,
        student: Callable[[], nn.Module] | nn.Module,
        teacher: Teacher | nn.Module | None = None,
        *,
        loss: Callable[..., Tensor] = logit_kl,
        feature_losses: Mapping[Pair, Feature | Callable[[Tensor, Tensor], Tensor]] | None = None,
        soft_weight: float | Schedule = 0.7,
        temperature: float | Schedule = 2.0,
        phases: Sequence[tuple[int, Collection[Part]]] = (),
        strength: Callable[[Tensor], Tensor] | None = None,
        balance: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        training: Recipe | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.seed, self.device = seed, device or torch.device("cpu")
        self.training = training or Recipe(epochs=20, momentum=0.9, lr=0.05, schedule="cosine")
        if isinstance(student, nn.Module):
            self.student = student.to(self.device)
        else:
            with seeded(derive(seed, "build")):
                self.student = student().to(self.device)
        self.teacher = None if teacher is None else as_teacher(teacher)
        self.loss, self.soft_weight, self.temperature = loss, soft_weight, temperature
        self.features = {
            pair: one if isinstance(one, Feature) else Feature(one)
            for pair, one in (feature_losses or {}).items()
        }
        self.phases = tuple((epochs, tuple(parts)) for epochs, parts in phases)
        self.strength, self.balance = strength, balance
        self.epochs = 0
        self._wanted = _keywords(loss)
        self._along = nn.ModuleDict()
        self._optimizer: Optimizer | None = None
        if isinstance(self.teacher, Moving):
            self.teacher.start(self.student)
        self._check()
        if self.teacher is not None and (module := module_of(self.teacher)) is not None:
            module.to(self.device)

    # --- use -----------------------------------------------------------------------------------

    def fit(
        self, rows: Rows, epochs: int | None = None, test: Rows | None = None
    ) -> Iterator[Figures]:
        """Train; yields figures after each epoch, and trains as they are taken.

        Args:
            rows: inputs and labels, -1 for a row without one.
            epochs: in all, those trained before included; None takes the recipe's.
            test: rows on which to measure accuracy after each epoch.

        Yields:
            ``epoch`` (from 1); ``loss`` and each of its parts, before weighing, mean over the
            batches in which it is on; ``soft_weight`` and ``temperature`` with a teacher;
            ``strength_max``, mean over batches, with a strength; ``accuracy`` with test rows.

        Raises:
            DataError: no rows, or a label that the student has no class for.
            RunError: the loss is no longer a number.
        """
        self._begin(rows)
        inputs = torch.from_numpy(rows.inputs).to(self.device)
        labels = torch.from_numpy(rows.labels).to(self.device)
        taught = self._ask_once(inputs)
        total = self.training.epochs if epochs is None else epochs
        while self.epochs < total:
            figures = self._epoch(self._plan(total), inputs, labels, taught)
            self.epochs += 1
            if test is not None:
                figures["accuracy"] = accuracy(self.predict(test.inputs), test.labels)
            yield figures

    def predict(self, inputs: FloatArray) -> Logits:
        """Logits ``[rows, classes]`` of the student, float32."""
        rows = torch.from_numpy(np.asarray(inputs, dtype=np.float32)).to(self.device)
        with evaluating(self.student):
            found: Logits = predict(self.student, rows).cpu().numpy()
        return found

    def state_dict(self) -> State:
        """Everything that training goes on from after an epoch, but for a teacher that stays."""
        state = {f"student.{k}": _copied(v) for k, v in self.student.state_dict().items()}
        state |= {f"along.{k}": _copied(v) for k, v in self._along.state_dict().items()}
        for number, weight in enumerate(self._weights()):
            kept = {} if self._optimizer is None else self._optimizer.state.get(weight, {})
            for name, value in kept.items():
                state[f"optimizer.{number}.{name}"] = _copied(value)
        if isinstance(self.teacher, Moving):
            state |= {f"teacher.{k}": v for k, v in self.teacher.state_dict().items()}
        return state | {"epochs": np.array([self.epochs], dtype=np.int64)}

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore; ``fit`` then goes on to the same final bytes.

        Args:
            state: of a distiller made with the same arguments.
            rows: those of ``fit``, whose shapes the regressors take.

        Raises:
            CheckpointError: the state is that of another distiller.
        """
        self._begin(rows)
        try:
            self.student.load_state_dict(_under(state, "student."))
            self._along.load_state_dict(_under(state, "along."))
        except RuntimeError as error:
            raise CheckpointError(f"this state is of another distiller: {error}") from None
        assert self._optimizer is not None
        self._optimizer.state.clear()
        weights = self._weights()
        for path, value in _under(state, "optimizer.").items():
            number, _, name = path.partition(".")
            home = value if name == "step" else value.to(self.device)
            self._optimizer.state.setdefault(weights[int(number)], {})[name] = home
        if isinstance(self.teacher, Moving):
            self.teacher.load_state_dict({k[8:]: state[k] for k in state if k[:8] == "teacher."})
        self.epochs = int(state["epochs"][0])

    # --- training ------------------------------------------------------------------------------

    def _epoch(
        self, epoch: _Epoch, inputs: Tensor, labels: Tensor, taught: Tensor | None
    ) -> Figures:
        """One shuffled pass over the rows."""
        order = derive(self.seed, "epoch", epoch.number)
        batches = list(passes(len(inputs), self.training.batch_size, 1, order, "order"))
        sums: dict[str, float] = {}
        rows: dict[str, int] = {}
        self.student.train()
        with ExitStack() as stack:
            stack.enter_context(seeded(derive(self.seed, "dropout", epoch.number)))
            layers = self._watch(stack)
            for step, index in enumerate(batches):
                rate = self._rate((epoch.number + step / len(batches)) / epoch.of)
                batch = self._ask(
                    inputs[index], labels[index], None if taught is None else taught[index]
                )
                for name, value in self._step(epoch, rate, batch, layers).items():
                    sums[name] = sums.get(name, 0.0) + value * len(index)
                    rows[name] = rows.get(name, 0) + len(index)
        self.student.eval()
        if not all(map(math.isfinite, sums.values())):
            raise RunError(
                f"the loss is no longer a number in epoch {epoch.number + 1}: lower lr or the "
                "weight of the part that grew"
            )
        shown = {"soft_weight": epoch.soft_weight, "temperature": epoch.temperature}
        means = {name: total / rows[name] for name, total in sums.items()}
        return {"epoch": epoch.number + 1, **means, **(shown if self.teacher is not None else {})}

    def _step(self, epoch: _Epoch, rate: float, batch: _Batch, layers: Layers) -> dict[str, float]:
        """One step of the optimizer; returns the losses of the batch."""
        assert self._optimizer is not None
        logits = self.student(batch.inputs)
        parts, weights = self._parts(epoch, batch, logits, layers)
        if self.balance is None:
            total = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
        else:
            total = self.balance(parts)
        self._optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        if self.training.clip:
            nn.utils.clip_grad_norm_(self._weights(), self.training.clip, foreach=True)
        self._optimizer.step(rate)
        if isinstance(self.teacher, Moving):
            self.teacher.update(self.student)
        said = {"loss": total, **parts}
        if batch.strength is not None:
            said["strength_max"] = batch.strength.max()
        return {name: float(value.detach()) for name, value in said.items()}

    def _ask(self, inputs: Tensor, labels: Tensor, taught: Tensor | None) -> _Batch:
        """A batch with what the teacher says of it, unless it was asked before."""
        if taught is None and self.teacher is not None:
            taught = self.teacher(inputs)
        strength = self.strength(taught) if self.strength and taught is not None else None
        return _Batch(inputs, labels, taught, strength)

    def _parts(
        self, epoch: _Epoch, batch: _Batch, logits: Tensor, layers: Layers
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The losses that are on, and what each weighs."""
        parts: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        known = batch.labels >= 0
        soft = "soft" in epoch.parts and batch.taught is not None
        hard = "labels" in epoch.parts and bool(known.any())
        share = float(known.float().mean()) if hard else 0.0
        weights["labels"] = share * (1 - epoch.soft_weight if soft else 1.0)
        weights["soft"] = 1 - weights["labels"]
        if hard and (weights["labels"] or self.balance):
            parts["labels"] = label_loss(logits[known], batch.labels[known])
        if soft and (weights["soft"] or self.balance):
            parts["soft"] = self._soft(epoch, batch, logits)
        for number, (pair, feature) in enumerate(self.features.items()):
            if pair in epoch.parts:
                own, its = layers[0][pair[0]], layers[1][pair[1]]
                if feature.regressor is not None:
                    own = self._along[str(number)](own)
                name = ":".join(pair)
                parts[name] = feature.loss(own, its)
                weights[name] = at(feature.weight, epoch.number)
        # A batch in which nothing is on (labels alone, and no row has one) teaches nothing.
        return parts or {"labels": logits.sum() * 0}, weights

    def _soft(self, epoch: _Epoch, batch: _Batch, logits: Tensor) -> Tensor:
        """The soft part, with what its loss asks for."""
        given: dict[str, Any] = {"temperature": epoch.temperature, "labels": batch.labels}
        given = {name: value for name, value in given.items() if name in self._wanted}
        if batch.strength is not None:
            given["strength"] = batch.strength
        return self.loss(logits, batch.taught, **given)

    # --- parts ---------------------------------------------------------------------------------

    def _plan(self, total: int) -> _Epoch:
        """What the next epoch trains with."""
        parts: Collection[Part] = ("labels", "soft", *self.features)
        end = 0
        for epochs, named in self.phases:
            end += epochs
            if self.epochs < end:
                parts = named
                break
        weight = at(self.soft_weight, self.epochs)
        if not 0 <= weight <= 1:
            raise FedistillError(f"soft_weight must lie within 0 and 1, found {weight}")
        return _Epoch(self.epochs, total, parts, weight, at(self.temperature, self.epochs))

    def _begin(self, rows: Rows) -> None:
        """What needs the shapes of rows: regressors, and with them the optimizer."""
        if len(rows) == 0:
            raise DataError("a student needs one row at least to learn from, found none")
        if self._optimizer is not None:
            return
        example = torch.from_numpy(rows.inputs[:2]).to(self.device)
        with ExitStack() as stack:
            own, its = self._watch(stack)
            with evaluating(self.student):
                logits = self.student(example)
            taught = None if self.teacher is None else self.teacher(example)
            if taught is not None and taught.shape != logits.shape:
                raise FedistillError(
                    "student and teacher must give logits of one shape [rows, classes], found "
                    f"{list(logits.shape)} and {list(taught.shape)}"
                )
            for number, ((here, there), feature) in enumerate(self.features.items()):
                if feature.regressor is not None:
                    shapes = own[here].shape[1:], its[there].shape[1:]
                    with seeded(derive(self.seed, "regressor", number)):
                        self._along[str(number)] = feature.regressor(*shapes).to(self.device)
        if rows.labels.max() >= logits.shape[-1]:
            raise DataError(
                f"the student has {logits.shape[-1]} classes, found label {rows.labels.max()}"
            )
        if "labels" in self._wanted and rows.labels.min() < 0:
            raise DataError("this loss needs a label for each row, found a row labelled -1")
        if isinstance(self.balance, nn.Module):
            self._along["balance"] = self.balance.to(self.device)
        self._along.train()
        self._optimizer = Optimizer(self.training, self._weights())

    def _watch(self, stack: ExitStack) -> Layers:
        """The watched layers of both sides, until the stack is closed."""
        module = None if self.teacher is None else module_of(self.teacher)
        own = stack.enter_context(captured(self.student, [here for here, _ in self.features]))
        if module is None:
            return own, {}
        return own, stack.enter_context(captured(module, [there for _, there in self.features]))

    def _ask_once(self, inputs: Tensor) -> Tensor | None:
        """The teacher's logits for all rows, where they stay and no layer is watched."""
        if self.teacher is None or self.features or isinstance(self.teacher, Moving):
            return None
        return predict(self.teacher, inputs)

    def _rate(self, done: float) -> float:
        """The learning rate when this share of all epochs is done."""
        falling = 0.5 * (1 + math.cos(math.pi * done))
        return self.training.lr * (falling if self.training.schedule == "cosine" else 1.0)

    def _weights(self) -> list[nn.Parameter]:
        both = (*self.student.parameters(), *self._along.parameters())
        return [weight for weight in both if weight.requires_grad]

    def _check(self) -> None:
        """What can be said before there are rows."""
        plain = Recipe()
        for field in dataclasses.fields(Recipe):
            value = getattr(self.training, field.name)
            if field.name not in USED and value != getattr(plain, field.name):
                raise FedistillError(
                    f"a Distiller does not read {field.name} from its recipe, found {value}: "
                    "soft_weight, temperature and loss are arguments of its own"
                )
        if "soft_weight" in self._wanted:
            raise FedistillError(
                "the loss of a Distiller is the soft part alone, it adds the labels itself: give "
                "logit_kl in place of kd"
            )
        if self.strength is not None and "strength" not in self._wanted:
            raise FedistillError("a strength needs a loss that takes one, such as logit_kl")
        module = None if self.teacher is None else module_of(self.teacher)
        if module is not None and module is self.student:
            raise FedistillError("the teacher is the student: give it a copy, or an EmaTeacher")
        if self.features and module is None:
            raise FedistillError(
                "feature losses need a teacher that is a module or has one, found "
                f"{'none' if self.teacher is None else 'a plain function'}"
            )
        known = {"labels", "soft", *self.features}
        for _, parts in self.phases:
            for part in parts:
                if part not in known:
                    raise FedistillError(
                        f"a phase names {part!r}, known are labels, soft and the keys of "
                        "feature_losses"
                    )


def _keywords(loss: Callable[..., Tensor]) -> set[str]:
    """Names that a loss takes, but for those that a partial has settled."""
    settled = set(loss.keywords) if isinstance(loss, functools.partial) else set()
    return set(inspect.signature(loss).parameters) - settled


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {
        name[len(prefix) :]: torch.from_numpy(np.array(value))
        for name, value in state.items()
        if name.startswith(prefix)
    }


def _copied(tensor: Tensor) -> FloatArray:
    """The values now: on the CPU ``numpy()`` alone would share memory with the living weights."""
    return np.array(tensor.detach().cpu().numpy())
