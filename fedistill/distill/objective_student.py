"""A torch student whose steps minimise an objective, beside what it remembers and who teaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.replay import Replay
from fedistill.distill.batches import Batch, Batches, local_batches
from fedistill.distill.growth import (
    grow_head,
    head_name,
    head_size,
    moved,
    shaped,
    widened,
)
from fedistill.distill.guide import guiding
from fedistill.distill.objectives import FineTune, Follow, Group, Objective, Only, Step, Terms
from fedistill.distill.progress import Progress
from fedistill.distill.recipe import Recipe
from fedistill.distill.remembering import (
    as_they_come,
    draws,
    interference,
    remember,
    remember_all,
    stored_logits,
)
from fedistill.distill.teachers import EmaTeacher, Moving, SelfTeacher, Teacher, as_teacher
from fedistill.distill.torch_student import Loss, Slopes, TorchStudent, seeded
from fedistill.errors import FedistillError, RunError
from fedistill.losses import own_or_proxy, soft_cross_entropy
from fedistill.seeding import derive, generator
from fedistill.types import FloatArray, IntArray, Probs, Rows

TEACHERS: Mapping[str, Callable[[], Any]] = {"ema": EmaTeacher, "self": SelfTeacher}
"""What an objective may ask for by name."""


class ObjectiveStudent(TorchStudent):
    """What a step sees and what is kept of it; which rows come when is not decided here.

    Arguments as of :class:`~fedistill.distill.incremental.IncrementalDistiller`.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        recipe: Recipe,
        objective: Objective,
        *,
        teacher: Teacher | nn.Module | None,
        teacher_weight: float,
        replay: ReplayBuffer | None,
        classes: int,
        seed: int,
        device: torch.device | None,
        background: FloatArray | None,
    ) -> None:
        self.build, self.seed, self.replay = build, seed, replay
        super().__init__(
            partial(shaped, build, classes),
            recipe,
            classes=classes,
            seed=seed,
            device=device,
            background=background,
        )
        self.classes = classes or head_size(self.module)
        if not self.classes:
            raise FedistillError(
                f"{type(self.module).__name__} has no linear layer to count its classes by: give "
                "the number, classes="
            )
        wanted = getattr(objective, "teacher", None)
        self.objective = objective
        self.teacher = as_teacher(teacher) if teacher is not None else None
        if teacher is None and isinstance(wanted, str):
            self.teacher = TEACHERS[wanted]()
        elif teacher is not None and wanted is None:
            self.objective = Follow(objective, teacher_weight)
        # Asked in every step, and dear to ask of a protocol.
        self._moving = self.teacher if isinstance(self.teacher, Moving) else None
        if self._moving is not None:
            self._moving.start(self.module)
        self._met = np.zeros(self.classes, dtype=bool)
        self._known = self._met.copy()

    def _study(
        self,
        rows: Rows,
        objective: Objective,
        recipe: Recipe,
        seed: int,
        *,
        remember: bool = False,
    ) -> Progress:
        """Passes over rows, joined by what is remembered and by soft targets of public rows."""
        if not recipe.epochs:
            if self._memory is not None and len(self._memory):
                self._distil(self._memory, seed)
            return Progress()
        labels = torch.from_numpy(rows.labels).to(self.device)
        batches = local_batches(
            self._tensor(rows.inputs),
            # Nothing is wanted of a row without a label, not even in a mixture.
            F.one_hot(labels.clamp_min(0), self.classes).float() * (labels >= 0)[:, None],
            self._memory,
            self.background if self._scored is not None else None,
            recipe,
            seed,
        )
        offset = self._log_shares(rows.labels[rows.labels >= 0]) if recipe.calibrate else None
        fresh = np.full(len(rows), remember and as_they_come(self.replay))
        random = generator(seed, "public")
        sums: dict[str, float] = {}
        before, weights = self.passed, self._weights()
        known = torch.from_numpy(self._known).to(self.device)

        with guiding(self._guide, recipe, self.module, seed, self.device) as guide:

            def loss(part: Batch, whole: Batch) -> Tensor:
                if len(part) < len(whole):
                    raise RunError("out of memory in a step: lower batch_size or replay rows")
                own = part.own
                drawn = self._draw(objective, part, labels[part.numbers])
                beside = [self._replayed(one, part.inputs) for one in drawn]
                public = self._public(objective, part.inputs, random)
                inputs = torch.cat([part.inputs, *beside, public])
                self.passed += len(inputs) - len(part)
                logits, score = self._forward(inputs)
                said = logits[:own] if offset is None else logits[:own] + offset
                new = self._group(part.inputs[:own], labels[part.numbers], said)
                old, start = [], len(part)
                for one, given in zip(drawn, beside, strict=True):
                    old.append(self._remembered(one, given, logits[start : start + len(one)]))
                    start += len(one)
                seen = self._group(public, labels.new_full((len(public),), -1), logits[start:])
                terms = dict(objective(Step(new, tuple(old), seen, known, weights)))
                terms |= self._public_terms(part, logits, score, drawn)
                if guide is not None and (guided := guide.on_own(logits, part, whole)) is not None:
                    terms["guide"] = guided
                self._remember(rows, part.numbers, logits[:own].detach(), fresh)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach())
                return torch.stack([*terms.values()]).sum() if terms else logits.sum() * 0

            self._train(
                batches,
                loss,
                seed,
                None if guide is None else guide.beside,
                recipe=recipe,
            )
        if remember and self.replay is not None and not as_they_come(self.replay):
            remember_all(self.replay, rows, self.features(rows.inputs), self.predict(rows.inputs))
        steps = len(batches)
        if not np.isfinite(list(sums.values())).all():
            raise RunError("the loss is no longer a number: lower lr or the objective's weights")
        terms = {name: total / max(steps, 1) for name, total in sums.items()}
        return Progress(steps=steps, rows_trained=self.passed - before, terms=terms)

    def _train(
        self,
        batches: Batches,
        loss: Loss,
        seed: int,
        beside: Callable[[int], Tensor | None] | None = None,
        after: Callable[[], None] | None = None,
        recipe: Recipe | None = None,
        slopes: Slopes | None = None,
    ) -> None:
        """One optimizer step for each batch; a teacher that moves follows each."""
        super()._train(batches, loss, seed, beside, after or self._follow, recipe, slopes)

    def _role(self, seed: int) -> Objective:
        """The objective, or what CFeD leaves of it for a client in a round."""
        learns = getattr(self.objective, "learns", 1.0)
        distils = getattr(self.objective, "distils", 1.0)
        if learns == distils == 1.0:
            return self.objective
        lots = generator(seed, "role").random(2)
        does = lots[1] < distils
        if lots[0] < learns or not does:
            return self.objective if does else FineTune()
        return Only("public", self.objective)

    def _public_terms(
        self, part: Batch, logits: Tensor, score: Tensor, drawn: list[Replay]
    ) -> Terms:
        """What soft targets and familiarity add to an objective."""
        own, whole = part.own, len(part)
        terms: Terms = {}
        if whole > own:
            soft = logits[own:whole] / part.temperature
            terms["soft"] = soft_cross_entropy(soft, part.targets[own:], part.weight[own:])
        if self._scored is not None:
            remembered = len(drawn[0]) if drawn else 0
            side = torch.zeros(len(logits), device=self.device)
            side[own:whole] = part.familiar[own:]
            side[:own] = 1.0 / (own + remembered)
            side[whole : whole + remembered] = 1.0 / (own + remembered)
            terms["familiarity"] = own_or_proxy(score, side)
        return terms

    def _follow(self) -> None:
        if self._moving is not None:
            self._moving.update(self.module)

    # --- groups of rows -------------------------------------------------------------------------

    def _draw(self, objective: Objective, part: Batch, labels: Tensor) -> list[Replay]:
        new, rate = part.inputs[: part.own], self.recipe.lr
        judge = partial(interference, self.module, rate, new, labels)
        return draws(self.replay, objective, part.own, judge)

    def _replayed(self, rows: Replay, like: Tensor) -> Tensor:
        """Inputs of remembered rows, ``[n, ...]`` even where there is none."""
        return self._tensor(rows.inputs).reshape(len(rows), *like.shape[1:])

    def _group(
        self, inputs: Tensor, labels: Tensor, logits: Tensor, stored: Tensor | None = None
    ) -> Group:
        teacher = self.teacher
        if isinstance(teacher, SelfTeacher) and not teacher.ready():
            teacher = None
        if stored is None:
            stored = logits.new_full((), torch.nan).expand(logits.shape)
        return Group(inputs, labels, logits, stored, teacher)

    def _remembered(self, rows: Replay, inputs: Tensor, logits: Tensor) -> Group:
        stored = torch.from_numpy(stored_logits(rows, self.classes)).to(self.device)
        labels = torch.from_numpy(rows.labels).to(self.device)
        return self._group(inputs, labels, logits, stored)

    def _public(self, objective: Objective, like: Tensor, random: np.random.Generator) -> Tensor:
        """Public rows ``[n, ...]`` for an objective that wants some."""
        pool, count = self.background, int(getattr(objective, "public", 0))
        if pool is None and self._memory is not None:
            pool = self._memory.inputs
        if not count or pool is None:
            return like[:0]
        return pool[torch.from_numpy(random.integers(0, len(pool), count)).to(self.device)]

    def _remember(
        self, rows: Rows, numbers: IntArray, said: Tensor, fresh: npt.NDArray[np.bool_]
    ) -> None:
        """Keep the rows of a batch that are met for the first time."""
        chosen = fresh[numbers]
        fresh[numbers] = False
        if self.replay is not None and chosen.any():
            remember(self.replay, rows, numbers[chosen], said[torch.from_numpy(chosen)])

    # --- classes ---

    def _resize(self, classes: int) -> None:
        """Outputs for so many classes; what the others say stays as it is."""
        with seeded(derive(self.seed, "grow", classes)):
            replaced = grow_head(self.module, classes)
        weights = self._weights()
        self._optimizer.state = moved(self._optimizer.state, replaced)
        self._optimizer.weights = weights
        averaged = dict(zip(weights, self._averaged, strict=False))
        self._averaged = [widened(averaged[weight], weight) for weight in averaged]
        if isinstance(self.teacher, EmaTeacher):
            self.teacher.grow(self.module)
        more = max(classes - self.classes, 0)
        self._met = np.pad(self._met, (0, more))[:classes]
        self._known = np.pad(self._known, (0, more))[:classes]
        if self._memory is not None:
            wide_targets = F.pad(self._memory.targets, (0, classes - self.classes))
            self._memory = dataclasses.replace(self._memory, targets=wide_targets)
        self.classes = classes

    def _wide(self, soft_targets: Probs) -> Probs:
        """Soft targets over all classes: 0 for those that came later."""
        given = np.asarray(soft_targets, dtype=np.float32)
        if given.shape[1] > self.classes:
            self._resize(given.shape[1])
        return np.pad(given, ((0, 0), (0, self.classes - given.shape[1])))

    def _built(self, classes: int, seed: int) -> nn.Module:
        """A module as new, with that many outputs."""
        with seeded(seed):
            return shaped(self.build, classes).to(self.device)

    # --- the teacher ----------------------------------------------------------------------------

    def _pupil(self) -> Moving | SelfTeacher | None:
        """The teacher, if it has learned from this student and so has a state."""
        return self.teacher if isinstance(self.teacher, SelfTeacher) else self._moving

    def _load_teacher(self, state: dict[str, npt.NDArray[Any]]) -> None:
        pupil = self._pupil()
        if isinstance(pupil, SelfTeacher) and state:
            head = state.get(f"{head_name(self.module)}.weight".lstrip("."))
            outputs = self.classes if head is None else len(head)
            pupil.begin(self._built(outputs, self.seed))
        if pupil is not None:
            pupil.load_state_dict(state)
