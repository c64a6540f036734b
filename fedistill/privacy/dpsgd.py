"""A student trained by DP-SGD: whatever it predicts afterwards is private, and free."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from dataclasses import replace as replaced
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fedistill.continual.erasure import ErasureReceipt
from fedistill.distill.arriving import fingerprint as content_of
from fedistill.distill.batches import Batch, Batches, picked, soft_batches
from fedistill.distill.guide import Guide
from fedistill.distill.optimizer import falling
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import Lesson, TorchStudent
from fedistill.errors import FedistillError
from fedistill.losses import soft_cross_entropy
from fedistill.models import layers_of
from fedistill.privacy import entropy
from fedistill.privacy.clipping import Clipper, Part, RowLoss, Take, clipping_mode, cross_entropy
from fedistill.privacy.events import Sampled, Spending
from fedistill.privacy.guard import check_loss, refuse
from fedistill.privacy.layers import anatomy, fingerprint, hold_still, private_module, row_by_row
from fedistill.privacy.learner import Quote
from fedistill.privacy.remembered import PrivateMemory
from fedistill.privacy.sampling import Units, poisson, units_of
from fedistill.privacy.terms import settled
from fedistill.settings import PrivacySettings
from fedistill.types import FloatArray, IntArray, Rows, State

GUARD_ROWS = 16


@dataclass(frozen=True)
class PrivateLesson(Lesson):
    """What a private student is to do next, before it does: it was paid for, and is done once.

    The ``batches`` are those of its public steps, spread evenly between the noisy ones.

    Attributes:
        rows: that came; they are remembered when all is done.
        units: whom the noisy steps draw from: new rows, and remembered ones beside them.
        take: from numbers of units to their rows, on the device.
        rate: probability of a unit to be in a step.
        sigma: noise, in clipping norms.
        noisy: noisy steps.
    """

    rows: Rows
    units: Units
    take: Take
    rate: float
    sigma: float
    noisy: int

    @property
    def steps(self) -> int:
        """Steps of the optimizer, the noisy ones and the public ones."""
        return self.noisy + len(self.batches)

    @property
    def expected(self) -> float:
        """Expected number of units in a noisy step."""
        return self.rate * len(self.units)

    def draw(self, coins: torch.Generator) -> IntArray:
        """Numbers of the units in a noisy step."""
        return poisson(len(self.units), self.rate, coins)

    def beside(self, step: int) -> range:
        """Which public batches come after a noisy step."""
        count = len(self.batches)
        return range(step * count // self.noisy, (step + 1) * count // self.noisy)


class PrivateStudent(TorchStudent):
    """A torch module that fits rows by DP-SGD, absorbs soft targets and predicts.

    Abadi et al., Deep Learning with Differential Privacy, arXiv 1607.00133. A noisy step draws
    every unit (record or user) by a coin of its own, clips each one's gradient, adds Gaussian noise
    to the sum and divides by the expected number of units; the optimizer of the recipe takes it
    from there. For ways of clipping see :mod:`fedistill.privacy.clipping`; coins and noise come
    from the operating system (see :mod:`fedistill.privacy.entropy`).

    ``fit`` on own rows has to be paid for (see :class:`fedistill.privacy.learner.Private`). Public
    distillation is post-processing: a step of its own on public rows alone, between the noisy ones
    (recipe ``inside``; as many as give ``distil_epochs`` passes, one a noisy step at least) or
    before them (``phase``). Momentum and the moving average of weights are post-processing, too.

    What is known of the rows to everybody: how many units there are, and the shape of a row.

    Args:
        build: a factory of modules; layers that mix rows are replaced, see ``notes``.
        recipe: how to train; its ``batch_size`` is that of public steps. A passing over the own
            rows is ``1 / sample_rate`` noisy steps. Noisy gradients are not clipped again.
        classes: number of classes.
        seed: of the initial weights and of all that is public, and of nothing else.
        device: where to compute.
        background: proxy rows, on which a loss is tried out.
        privacy: unit, clipping norm, sample rate, steps and learning rate.
        loss: of own rows, in place of cross-entropy; it is tried before anything is spent.
        replay: rows of earlier fits to train on beside the new ones; None: none are kept.

    Attributes:
        notes: for the user: what had to be changed in the model.
        listener: called after each noisy gradient, before the step is taken: for an audit.
        passed: rows that its steps have seen, of own rows the expected number: how many were drawn
            is nobody's business.

    Raises:
        FedistillError: the recipe or a layer cannot be private.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        recipe: Recipe,
        *,
        classes: int,
        seed: int,
        device: torch.device | None = None,
        background: FloatArray | None = None,
        privacy: PrivacySettings,
        loss: RowLoss | None = None,
        replay: PrivateMemory | None = None,
    ) -> None:
        refuse(recipe)
        self.notes: list[str] = []
        super().__init__(
            partial(private_module, build, self.notes),
            recipe,
            classes=classes,
            seed=seed,
            device=device,
            background=background,
        )
        self.privacy = settled(privacy, "dpsgd")
        self.loss = loss or cross_entropy
        self._plain = loss is None
        self._tried: list[tuple[int, ...]] = []
        self._sigma: float | None = None
        self.listener: Callable[[nn.Module], None] | None = None
        self._mode = clipping_mode(self.module, privacy.unit)
        self._largest: int | None = None
        self.replay = replay
        self._mark = ""
        self._noted: PrivateLesson | None = None

    # --- the account ---------------------------------------------------------------------------

    def quote(self, rows: Rows, asked: IntArray) -> Quote:
        """What the next ``fit`` on these rows costs; predictions on any rows cost nothing more.

        The loss is tried out here, before anything is spent, unless it and the model are known
        to keep rows apart, or were tried as they are now.

        Raises:
            FedistillError: the loss, or a layer, breaks the clipping of single rows.
        """
        del asked
        own = self._together(rows)
        steps = self._noisy_steps(len(own))
        if steps:
            self._check_loss(own)
        return lambda sigma: Spending.of(Sampled(self.privacy.sample_rate, sigma), steps)

    def allow(self, sigma: float) -> None:
        """The next ``fit``, once, with this much noise: what it costs is on the ledger.

        Raises:
            FedistillError: no such noise can be.
        """
        if not (math.isfinite(sigma) and sigma >= 0):
            raise FedistillError(f"allow: expected a noise multiplier from 0, found {sigma}")
        self._sigma = sigma

    def units(self, rows: Rows) -> tuple[bytes, ...]:
        """Digests of the records, or of the users, that the next ``fit`` touches.

        Raises:
            FedistillError: users are asked for, and the rows do not say whose they are.
        """
        return units_of(self._together(rows), self.privacy.unit).names

    # --- what is remembered --------------------------------------------------------------------

    def erase(self, subject: object) -> ErasureReceipt:
        """Forget a person's remembered rows, and let none of them in again.

        The weights have learned from them, by as much as epsilon says, and are not changed.

        Raises:
            FedistillError: there is no memory, or no such name can be.
        """
        if self.replay is None:
            raise FedistillError("erase: this student remembers no rows: there is nothing to erase")
        return self.replay.erase(subject)

    def forget(self, units: Collection[bytes]) -> int:
        """Let the remembered rows of these units go, as :meth:`units` names them; how many."""
        return 0 if self.replay is None else self.replay.drop(units, self.privacy.unit)

    def state_dict(self) -> State:
        """As any torch student, with the remembered rows. No generator: noise is never resumed."""
        state = dict(super().state_dict())
        if self.replay is not None:
            state |= {f"replay.{k}": v for k, v in self.replay.state_dict().items()}
            state["mark"] = np.frombuffer(self._mark.encode(), dtype=np.uint8).copy()
        return state

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore. An allowance that was not used is gone."""
        kept = {k[7:]: v for k, v in state.items() if k.startswith("replay.")}
        own = {k: v for k, v in state.items() if k != "mark" and not k.startswith("replay.")}
        super().load_state_dict(own, rows)
        self._sigma = self._noted = None
        if self.replay is not None and kept:
            self.replay.load_state_dict(kept)
            self._mark = bytes(state["mark"]).decode()

    # --- side by side with others --------------------------------------------------------------

    @property
    def by_hand(self) -> bool:
        """Whether its noisy steps can be taken with others' (:mod:`fedistill.privacy.stacked`)."""
        if self._mode != "gram" or self.loss is not cross_entropy or self.listener is not None:
            return False  # an audit listens to the gradients of one student
        return layers_of(self.module) is not None and self.device.type == "cpu"

    def rates(self, step: int, steps: int) -> tuple[float, float]:
        """Learning rates of a noisy step, and of the public ones beside it."""
        share = falling(step, steps) if self.recipe.schedule == "cosine" else 1.0
        return (self.privacy.lr or self.recipe.lr) * share, self.recipe.lr * share

    def open(self, lesson: PrivateLesson) -> tuple[torch.Generator, torch.Generator]:
        """Generators of the coins and of the noise of what was paid for, once.

        Raises:
            FedistillError: it is not the last lesson given, or was begun before.
        """
        if lesson is not self._noted:
            raise FedistillError(
                "a private lesson was paid for once: expected the last one given, found one that "
                "was begun or replaced: charge another step"
            )
        self._noted = None
        return entropy.generator(), entropy.generator(self.device)

    def close(self, lesson: PrivateLesson) -> None:
        """All its steps were taken: count its own rows, as many as expected, and remember them."""
        self.passed += round(lesson.expected * lesson.noisy)
        self._remember(lesson.rows)

    # --- learning ------------------------------------------------------------------------------

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Train on own rows by noisy steps that were paid for; without own rows, on public ones.

        Args:
            rows: own rows; those without a label teach nothing.
            seed: of what is public: noise and coins are not derived from it.

        Raises:
            FedistillError: no allowance, or what :meth:`quote` raises.
            RunError: the weights are not finite any more.
        """
        super().fit(rows, seed=seed)

    def lesson(self, rows: Rows, seed: int) -> Lesson | None:
        """What ``fit`` would do; the allowance is taken for it, and is gone whatever becomes of it.

        Raises:
            FedistillError: as :meth:`fit`.
        """
        sigma, self._sigma, self._noted = self._sigma, None, None
        own = self._together(rows)
        steps = self._noisy_steps(len(own))
        if not steps:
            return super().lesson(own.take([]), seed)
        if sigma is None:
            raise FedistillError(
                "a private student has no allowance for these rows: charge the step first (quote, "
                "the ledger's reserve, allow)"
            )
        self._check_loss(own)
        units = units_of(own, self.privacy.unit)
        self._noted = PrivateLesson(
            self._public(steps, len(units), seed),
            own=True,
            offset=None,
            seed=seed,
            rows=rows,
            units=units,
            take=self._taker(own, units),
            rate=self.privacy.sample_rate,
            sigma=sigma,
            noisy=steps,
        )
        return self._noted

    def work_through(self, lesson: Lesson) -> None:
        """Train on what ``hear`` or ``lesson`` gave.

        Raises:
            FedistillError: it was paid for once, and this is the second time.
            RunError: the weights are not finite any more.
        """
        if not isinstance(lesson, PrivateLesson):
            super().work_through(lesson)
            return
        self._learn(lesson)
        self.close(lesson)

    def guide(self, guide: Guide | None) -> None:
        """Refuse: a guide compares own rows with a table in the same step.

        Raises:
            FedistillError: there is a guide.
        """
        if guide is not None:
            raise FedistillError(
                "a private student takes no guide (prototypes of own rows are not private): use a "
                "method that shares predictions only"
            )

    def _together(self, rows: Rows) -> Rows:
        """The rows that a fit sees: those with labels, and beside them the remembered ones."""
        own = _labelled(rows)
        return own if self.replay is None else self.replay.beside(own, self.privacy.unit)

    def _remember(self, rows: Rows) -> None:
        """An experience is remembered once, however many rounds it lasts."""
        mark = content_of(rows)
        if self.replay is not None and mark != self._mark:
            self._mark = mark
            self.replay.add(_labelled(rows), self.privacy.unit)

    def _noisy_steps(self, rows: int) -> int:
        """Steps of a fit; nothing of the rows counts but whether there are any."""
        if not rows or not (self.privacy.steps or self.recipe.epochs):
            return 0
        return self.privacy.steps or max(1, round(self.recipe.epochs / self.privacy.sample_rate))

    def _learn(self, lesson: PrivateLesson) -> None:
        coins, noise = self.open(lesson)
        units = lesson.units
        self._net.train()
        hold_still(self._net)
        with (
            entropy.unrepeatable(),
            Clipper(
                self.module,
                self.loss,
                clip=self.privacy.clip_norm,
                sigma=lesson.sigma,
                expected=lesson.expected,
                generator=noise,
                mode=self._mode,
                largest=self._largest,
                rows=len(units.order) / len(units),
            ) as clipper,
        ):
            for step in range(lesson.noisy):
                rate, public = self.rates(step, lesson.noisy)
                before = fingerprint(self.module)
                clipper.step(lesson.draw(coins), lesson.take)
                self._check_buffers(before)
                if self.listener is not None:
                    self.listener(self.module)
                self._move(rate)
                if beside := lesson.beside(step):
                    with clipper.aside():
                        for number in beside:
                            self._public_step(lesson.batches.make(number), public, len(units))
            self._mode, self._largest = clipper.mode, clipper.largest
        self._net.eval()

    def _taker(self, rows: Rows, units: Units) -> Take:
        """From numbers of units to their rows, on the device."""
        inputs = self._tensor(rows.inputs)
        labels = torch.from_numpy(rows.labels).to(self.device)
        users = self.privacy.unit == "user"

        def take(chosen: IntArray) -> Part:
            index, owner = units.rows_of(chosen)
            whose = torch.from_numpy(owner).to(self.device) if users else None
            return picked(inputs, index), picked(labels, index), whose

        return take

    def _public(self, steps: int, units: int, seed: int) -> Batches:
        """The public batches beside so many noisy steps, one a step and all passes at least."""
        memory = self._memory if self.recipe.distil == "inside" else None
        if memory is None or not len(memory):
            return Batches(0, 0, _no_batch)
        size = self.recipe.batch_size
        wanted = max(steps, math.ceil(self.recipe.distil_epochs * memory.effective() / size))
        each = max(1, len(memory) // size)
        epochs = math.ceil(wanted / each)
        batches = soft_batches(memory, replaced(self.recipe, distil_epochs=epochs), seed)
        return replaced(batches, count=min(wanted, len(batches)))

    def _public_step(self, batch: Batch, rate: float, units: int) -> None:
        """An ordinary step on public rows alone."""
        strength = self.recipe.soft_weight_for(units)

        def loss(part: Batch, whole: Batch) -> Tensor:
            del whole
            logits, _ = self._forward(part.inputs)
            soft = soft_cross_entropy(logits, part.targets, part.weight, part.temperature)
            return strength * soft

        self._backward(batch, loss)
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self._weights(), self.recipe.clip, foreach=True)
        self._move(rate)
        self.passed += len(batch)

    def _move(self, rate: float) -> None:
        self._optimizer.step(rate)
        self._steps += 1
        self._update_average(self._weights())

    def _check_buffers(self, before: list[tuple[str, int, int]]) -> None:
        """Nothing may learn from own rows but by noisy steps: nothing else gets noise."""
        changed = set(before) ^ set(fingerprint(self.module))
        if changed:
            raise FedistillError(
                f"the module writes to its own {min(changed)[0]} while it trains, without noise: "
                "what private rows say must not be kept; take that layer out"
            )

    def _check_loss(self, rows: Rows) -> None:
        built = anatomy(self.module)
        if built == self._tried or (self._plain and row_by_row(self.module)):
            return
        inputs = self._tensor(rows.inputs[:GUARD_ROWS])
        if self.background is not None and len(self.background) >= GUARD_ROWS:
            inputs = self.background[:GUARD_ROWS]
        labels = torch.arange(len(inputs), device=self.device) % self.classes
        name = getattr(self.loss, "__name__", type(self.loss).__name__)
        check_loss(self.module, self.loss, inputs, labels, name=name)
        self._tried = built


def _labelled(rows: Rows) -> Rows:
    known = rows.labels >= 0
    return rows if known.all() else rows.take(np.flatnonzero(known))


def _no_batch(step: int) -> Batch:
    raise IndexError(step)
