"""Any module side by side: ``torch.func`` maps one student's gradient over stacked weights.

For modules that have no kernels (:mod:`fedistill.backends.together`). One call then does the work
of a block of students, which saves launches and not arithmetic: on a GPU a step of a small model is
nothing but launches, on a CPU the mapped convolutions are slower than one after another. So it is
chosen by the kind of device, a fact that a repeated run shares, and not by a clock, whose verdict
may differ from run to run and would move the last bits of all results. :func:`gain` measures where
one wants to know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.altered import altered
from fedistill.backends.built import built_of
from fedistill.distill.batches import Batch
from fedistill.distill.optimizer import BETAS, EPSILON, falling
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import PREDICT_ROWS, Lesson, TorchStudent, seeded
from fedistill.losses import own_or_proxy, soft_cross_entropy
from fedistill.losses.soft_targets import SMALLEST
from fedistill.select import Answers

LARGEST_BLOCK = 100
"""Students side by side."""

TRIED_ROWS = 4
"""Rows of a trial whether a student can be mapped."""

Weights = dict[str, Tensor]


# --- who can -------------------------------------------------------------------------------------


def unmapped(student: TorchStudent, example: Tensor) -> str:
    """Why a student cannot be mapped, in words that end a sentence; empty where it can be.

    One that mixes the rows of a batch is refused even where all batches happen to have equal
    lengths: what a student computes must not depend on who trains beside it.

    Args:
        student: any.
        example: rows as it gets them, ``[rows, ...]``, as many as are tried; they are forgotten.
    """
    if type(student) is not TorchStudent:
        return f"{type(student).__name__} is no plain student"
    for layer in student.module.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            return f"{type(layer).__name__} keeps statistics of its batches"
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            return f"{type(layer).__name__} would draw otherwise than for each student alone"
    if any(True for _ in student.module.buffers()):
        return "it has buffers"
    if student.guided or not all(weight.requires_grad for weight in student._net.parameters()):
        return "it trains by a table, or not all of its weights"
    for layer in student._net.modules():
        if altered(layer, student.trunk):
            return f"{type(layer).__name__} has hooks, or a forward put on it"
    built = built_of(student.module)
    if isinstance(built, str):
        return built
    kind = built, student.scored, example.shape[1:], student.device
    if kind not in _TRIED:
        _TRIED[kind] = _tried(student, example.to(student.device))
    return _TRIED[kind]


_TRIED: dict[tuple[object, ...], str] = {}
"""What was found of a kind of module."""


def _tried(student: TorchStudent, example: Tensor) -> str:
    """Why it cannot be mapped, from a trial: two students, the second with half of the rows."""
    net, before = student._net, built_of(student.module)
    rows = example[torch.arange(TRIED_ROWS, device=example.device) % len(example)]
    counts = TRIED_ROWS, TRIED_ROWS // 2
    weights, present = [_shaken(student, seed) for seed in (1, 2)], rows.new_ones(2, len(rows))
    present[1, counts[1] :] = 0.0
    filled = torch.stack([rows, rows])
    filled[1, counts[1] :] = float(not rows.any())  # what equals the rows might go unnoticed

    def loss(weights: Weights, rows: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        said = _said(student, weights, rows)
        return (said.logsumexp(1) * present).sum(), said

    step = grad(loss, has_aux=True)
    training, enabled = net.training, torch.backends.cudnn.enabled
    try:
        # Draws here must not move others; what is compared must not be blurred by TF32.
        with seeded(0), torch.backends.cudnn.flags(enabled=enabled, allow_tf32=False):
            for mode in (True, False):
                net.train(mode)
                grads, said = vmap(step)(_stacked(weights), filled, present)
                for place, (own, count) in enumerate(zip(weights, counts, strict=True)):
                    alone = step(own, rows[:count], present[place, :count])
                    if not _alike(step(own, filled[place], present[place]), alone):
                        return "it mixes the rows of a batch, which are filled up when mapped"
                    mapped = {name: value[place] for name, value in grads.items()}, said[place]
                    if not _alike(mapped, alone):
                        return "torch.func maps it to other values than it has alone"
    except RuntimeError as refusal:
        return "torch.func cannot map it: " + str(refusal).split(".")[0].split("\n")[0]
    finally:
        net.train(training)
    return "" if built_of(student.module) == before else "it changes as it computes"


def _shaken(student: TorchStudent, seed: int) -> Weights:
    """Its weights, each moved a little: zeros would hide what they are multiplied with."""
    moved = {}
    with seeded(seed):
        for name, value in _weights(student).items():
            moved[name] = value + (0.1 * value.abs() + 0.01) * torch.randn(value.shape).to(value)
    return moved


def _alike(found: tuple[Weights, Tensor], wanted: tuple[Weights, Tensor]) -> bool:
    """Whether gradients, and what is said of the rows wanted, are the same but for rounding."""
    count = len(wanted[1])
    pairs = [(found[1][:count], wanted[1])]
    # All at once: the true gradient of a bias before a normalisation is 0, and rounding is not.
    grads = [torch.cat([value.flatten() for value in one[0].values()]) for one in (found, wanted)]
    pairs.append((grads[0], grads[1]))
    return all(bool((one - other).norm() <= 1e-3 * other.norm() + 1e-6) for one, other in pairs)


def kind_of(student: TorchStudent, lessons: Sequence[Lesson]) -> tuple[object, ...]:
    """What students must have in common to be mapped together."""
    weights = tuple((n, tuple(value.shape), value.dtype) for n, value in _weights(student).items())
    parts = tuple(
        (one.own, 0 if one.own else len(one.batches), one.offset is not None) for one in lessons
    )
    built = built_of(student.module)
    return built, student.recipe, student.classes, student.scored, student.device, weights, parts


def blocks(lessons: Sequence[Sequence[Lesson]]) -> list[list[int]]:
    """Which students of one kind to map together, by their places: longest lessons first."""
    # Lessons on soft targets alone are equally long in a kind: the sum goes by own rows.
    length = [sum(one.steps for one in turns) for turns in lessons]
    order = sorted(range(len(lessons)), key=lambda place: -length[place])
    return [order[start : start + LARGEST_BLOCK] for start in range(0, len(order), LARGEST_BLOCK)]


def gain(student: TorchStudent, rows: Tensor, count: int, times: int = 3) -> float:
    """How many times faster the gradients of so many students are when mapped, by the clock.

    Args:
        student: of the kind.
        rows: of one step, as it gets them.
        count: students side by side.
        times: how often each is measured; the fastest counts.
    """
    stacked = {name: value.expand(count, *value.shape) for name, value in _weights(student).items()}

    def loss(weights: Weights, given: Tensor) -> Tensor:
        return _said(student, weights, given).logsumexp(1).sum()

    def mapped() -> object:
        return vmap(grad(loss), in_dims=(0, None))(stacked, rows)

    def alone() -> object:
        weights = list(_named(student).values())
        with torch.enable_grad():
            for _ in range(count):
                total = _together(student._forward(rows)).logsumexp(1).sum()
                torch.autograd.grad(total, weights)
        return weights

    return _seconds(alone, student.device, times) / _seconds(mapped, student.device, times)


def _seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Of the fastest of some calls, after one that warms up."""
    took = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return min(took[1:])


# --- a block -------------------------------------------------------------------------------------


@dataclass
class MappedBench:
    """Students of one kind, those with the longest lesson first; as its namesake with kernels.

    Attributes:
        students: all of one kind.
        lessons: of each, what it is to train on, in turn.
    """

    students: Sequence[TorchStudent]
    lessons: Sequence[Sequence[Lesson]]

    def teach(self) -> None:
        """Train all of them on their lessons."""
        for turn in zip(*self.lessons, strict=True):
            for student in self.students:
                student._net.train()
            _Drill(self.students, turn).run()
            for student in self.students:
                student._net.eval()

    @torch.no_grad()
    def ask(self, rows: Tensor) -> list[Answers]:
        """What each says of rows that all are asked, ``[rows, ...]``."""
        first, classes = self.students[0], self.students[0].classes
        stacked = _stacked([_speaking(student) for student in self.students])
        said = vmap(lambda weights, part: _said(first, weights, part), in_dims=(0, None))
        parts = [
            said(stacked, part.to(first.device)).cpu().numpy()
            for part in torch.split(rows, PREDICT_ROWS)
        ]
        found = np.concatenate(parts, axis=1)
        scores = np.zeros(found.shape[:2], dtype=np.float32)
        if first.scored:
            scores = found[:, :, classes].clip(-FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)
        return [Answers(one[:, :classes], score) for one, score in zip(found, scores, strict=True)]


@dataclass
class _Drill:
    """One lesson of each student, learned together."""

    students: Sequence[TorchStudent]
    lessons: Sequence[Lesson]

    @torch.no_grad()
    def run(self) -> None:
        """Take all steps, and count them."""
        first, own = self.students[0], self.lessons[0].own
        weights = [_weights(student) for student in self.students]
        names = list(weights[0])
        # Soft targets say nothing of familiarity: its score is neither taught nor decayed then.
        taught = [name for name in names if own or not (first.scored and name.startswith("score."))]
        held = _stacked(weights)
        kept = {key: self._kept(key, taught) for key in _moments(first.recipe)}
        means = [dict(zip(names, student._averaged, strict=False)) for student in self.students]
        averaged = _stacked(means) if first._averaged else {}
        counts = [self._count(student, taught[0]) for student in self.students]
        gradient = vmap(grad(self._loss), in_dims=(0, 0))
        lengths = [len(lesson.batches) for lesson in self.lessons]
        for step in range(max(lengths, default=0)):
            active = sum(length > step for length in lengths)
            batches = [lesson.batches.make(step) for lesson in self.lessons[:active]]
            now = {name: value[:active] for name, value in held.items()}
            found = gradient(now, self._rows(batches))
            moved = _Moved(
                first.recipe,
                {name: now[name] for name in taught},
                {name: found[name] for name in taught},
                {key: {n: v[:active] for n, v in kept[key].items()} for key in kept},
            )
            rates = [self._rate(step, length) for length in lengths[:active]]
            moved.step(rates, [count + step + 1 for count in counts[:active]])
            for student, batch in zip(self.students, batches, strict=False):
                student.count(len(batch))
            if averaged:
                keep = torch.tensor([student.keeps() for student in self.students[:active]])
                for name, mean in averaged.items():
                    mean[:active].lerp_(now[name], _along(1 - keep.to(mean.device), mean))
        for place, student in enumerate(self.students):
            for name, weight in _weights(student).items():
                weight.copy_(held[name][place])
                if averaged:
                    means[place][name].copy_(averaged[name][place])
                if name in taught and lengths[place]:
                    state = student._optimizer.state.setdefault(_named(student)[name], {})
                    state |= {key: kept[key][name][place].clone() for key in kept}
                    if first.recipe.optimizer != "sgd":
                        state["step"] = torch.tensor(float(counts[place] + lengths[place]))

    def _rate(self, step: int, steps: int) -> float:
        recipe = self.students[0].recipe
        return recipe.lr * (falling(step, steps) if recipe.schedule == "cosine" else 1.0)

    def _kept(self, key: str, names: Sequence[str]) -> Weights:
        """What the optimizers keep, stacked; it begins with 0."""
        columns = []
        for student in self.students:
            named, state = _named(student), student._optimizer.state
            columns.append(
                {n: state.get(named[n], {}).get(key, torch.zeros_like(named[n])) for n in names}
            )
        return _stacked(columns)

    @staticmethod
    def _count(student: TorchStudent, name: str) -> int:
        """Steps that Adam has taken."""
        return int(student._optimizer.state.get(_named(student)[name], {}).get("step", 0))

    def _rows(self, batches: Sequence[Batch]) -> Weights:
        """The batches side by side, filled up with rows of no weight."""
        count, device = max(map(len, batches)), batches[0].inputs.device
        own = torch.tensor([batch.own for batch in batches], device=device)
        columns = ("inputs", "targets", "weight", "familiar")
        rows = {
            key: nn.utils.rnn.pad_sequence([getattr(b, key) for b in batches], batch_first=True)
            for key in columns
        }
        rows["own"] = torch.arange(count, device=device) < own[:, None]
        offsets = [lesson.offset for lesson in self.lessons[: len(batches)]]
        if offsets[0] is not None:
            rows["offset"] = torch.stack([offset for offset in offsets if offset is not None])
        return rows

    def _loss(self, weights: Weights, rows: Weights) -> Tensor:
        """Of one student's batch, as it would be alone; a row without weight adds nothing."""
        student = self.students[0]
        recipe, own, weight = student.recipe, rows["own"], rows["weight"]
        said = _said(student, weights, rows["inputs"])
        logits = said[:, : student.classes]
        if not self.lessons[0].own and recipe.loss == "mae":
            return _mae(logits, rows["targets"], weight)
        if "offset" in rows:
            logits = logits + rows["offset"] * own[:, None]
        if recipe.temperature != 1.0:
            logits = logits / torch.where(own, 1.0, recipe.temperature)[:, None]
        total = soft_cross_entropy(logits, rows["targets"], weight)
        if student.scored and self.lessons[0].own:
            total = total + own_or_proxy(said[:, -1], rows["familiar"])
        return total


def _mae(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """:func:`fedistill.losses.logit_mae` of the rows with a weight, times the sum of these."""
    wanted = targets.clamp_min(SMALLEST).log()
    wanted = wanted - wanted.mean(1, keepdim=True)
    gaps = (logits - logits.mean(1, keepdim=True) - wanted).abs().mean(1)
    counted = weight > 0
    return (gaps * counted).sum() / counted.sum().clamp_min(1) * weight.sum()


# --- steps ---------------------------------------------------------------------------------------


@dataclass
class _Moved:
    """A step of stacked weights, changed in place: ``[students, ...]`` each.

    Attributes:
        recipe: how.
        weights: those that are taught.
        grads: their gradients.
        kept: what the optimizer keeps of them, by its name.
    """

    recipe: Recipe
    weights: Weights
    grads: Weights
    kept: dict[str, Weights]

    def step(self, rates: Sequence[float], counts: Sequence[int]) -> None:
        """One step of each student, at its rate; it is its step of this number."""
        self._clip()
        for name, weight in self.weights.items():
            decay = self.recipe.weight_decay if weight.dim() > 2 else 0.0
            rate = _along(torch.tensor(rates, device=weight.device), weight)
            if self.recipe.optimizer == "sgd":
                weight.sub_(rate * self._momentum(name, self.grads[name] + decay * weight))
                continue
            found = self.grads[name]
            if self.recipe.optimizer == "adam":
                found = found + decay * weight
            else:
                weight.mul_(1 - rate * decay)
            number = _along(torch.tensor(counts, device=weight.device, dtype=torch.float64), weight)
            mean, square = self.kept["exp_avg"][name], self.kept["exp_avg_sq"][name]
            mean.lerp_(found, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(found, found, value=1 - BETAS[1])
            spread = square.sqrt() / (1 - BETAS[1] ** number).sqrt().float() + EPSILON
            weight.sub_((rate / (1 - BETAS[0] ** number)).float() * mean / spread)

    def _momentum(self, name: str, found: Tensor) -> Tensor:
        if not self.recipe.momentum:
            return found
        return self.kept["momentum_buffer"][name].mul_(self.recipe.momentum).add_(found)

    def _clip(self) -> None:
        """Scale each student's gradient to the largest norm, where it is longer."""
        if self.recipe.clip:
            norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in self.grads.values()]
            length = torch.linalg.vector_norm(torch.stack(norms), dim=0)
            scale = (self.recipe.clip / (length + 1e-6)).clamp(max=1.0)
            self.grads = {name: g * _along(scale, g) for name, g in self.grads.items()}


def _moments(recipe: Recipe) -> tuple[str, ...]:
    """What the optimizer keeps of the gradients, as torch names it."""
    if recipe.optimizer != "sgd":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if recipe.momentum else ()


# --- a student's weights -------------------------------------------------------------------------


def _named(student: TorchStudent) -> dict[str, nn.Parameter]:
    return dict(student._net.named_parameters())


def _weights(student: TorchStudent) -> Weights:
    return {name: weight.data for name, weight in _named(student).items()}


def _speaking(student: TorchStudent) -> Weights:
    """What it predicts with: the averages, if there are any and a step was taken."""
    if student._averaged and student._steps:
        return dict(zip(_named(student), student._averaged, strict=True))
    return _weights(student)


def _stacked(columns: Sequence[Weights]) -> Weights:
    return {name: torch.stack([column[name] for column in columns]) for name in columns[0]}


def _said(student: TorchStudent, weights: Weights, rows: Tensor) -> Tensor:
    """Logits, and its score beside them, with these weights: ``[rows, classes (+ 1)]``."""
    return _together(functional_call(student._net, weights, (rows,)))


def _together(said: Any) -> Tensor:
    if isinstance(said, Tensor):
        return said
    logits, score = said
    return torch.cat([logits, score[:, None]], 1)


def _along(values: Tensor, like: Tensor) -> Tensor:
    """One value for each student, shaped to multiply its tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))
