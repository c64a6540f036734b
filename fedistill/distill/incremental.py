"""A student that stays current: what comes is tested first, then learned beside what is remembered.

:class:`IncrementalDistiller` is a learner like any other: alone it is asked to ``learn`` one
experience after another, in a federation it fits rows and absorbs soft targets in each round. What
a step minimises is an objective (:mod:`fedistill.distill.objectives`), what is remembered is the
affair of a :class:`~fedistill.continual.buffer.ReplayBuffer`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedistill import store
from fedistill.aggregate.rules import softmax
from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.erasure import ErasureReceipt
from fedistill.continual.watcher import Detector, DriftState
from fedistill.data.stream import Experience
from fedistill.distill.arriving import batch_of, check_rows, rows_of, try_out
from fedistill.distill.arriving import fingerprint as fingerprint
from fedistill.distill.batches import Memory
from fedistill.distill.growth import check_growth, head_size
from fedistill.distill.objective_student import TEACHERS as TEACHERS
from fedistill.distill.objective_student import ObjectiveStudent
from fedistill.distill.objectives import FineTune, Objective
from fedistill.distill.objectives import objective as named
from fedistill.distill.progress import Progress as Progress
from fedistill.distill.progress import tested, watched
from fedistill.distill.recipe import Recipe
from fedistill.distill.teachers import SelfTeacher, Teacher
from fedistill.errors import CheckpointError, DataError, FedistillError
from fedistill.seeding import derive
from fedistill.types import FloatArray, IntArray, Probs, Rows, State

ON_DRIFT = ("consolidate", "forget", "nothing")
"""What may follow an alarm."""


class IncrementalDistiller(ObjectiveStudent):
    """A torch student that learns a stream without forgetting what it knew.

    Args:
        build: a factory of modules, inputs ``[batch, ...]`` to logits ``[batch, classes]``. The
            last linear layer grows when new classes come.
        objective: what a step minimises: a name, one of :mod:`fedistill.distill.objectives`, or a
            function of a :class:`~fedistill.distill.objectives.Step`.
        teacher: who teaches on remembered (or new) rows: a module, an :class:`EmaTeacher`, a
            :class:`SelfTeacher`. None: the one that the objective asks for, if it does.
        teacher_weight: of a teacher that the objective does not ask for.
        replay: the memory, empty or begun elsewhere; None: nothing is remembered.
        drift: what watches the predictions on new rows.
        on_drift: after an alarm: ``consolidate`` on what is remembered; ``forget`` it, as where
            labels mean something else now (a detector on ``error`` sees that); or ``nothing``.
        training: how to train; ``epochs`` passes over each experience.
        classes: outputs to begin with; 0: those that the module has.
        background: proxy rows, for objectives with public rows and for familiarity.
        seed: of the initial weights and all choices.
        device: where to compute.

    Raises:
        FedistillError: no factory, an unknown name, or a module whose classes cannot be counted.
    """

    keeps_targets = True
    """Whether the soft targets are part of the state; not where a site gives them anew."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        objective: str | Objective = "er",
        *,
        teacher: Teacher | nn.Module | None = None,
        teacher_weight: float = 0.1,
        replay: ReplayBuffer | None = None,
        drift: Detector | None = None,
        on_drift: str = "consolidate",
        training: Recipe | None = None,
        classes: int = 0,
        background: FloatArray | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        if isinstance(build, nn.Module) or not callable(build):
            raise FedistillError(
                "build must be a factory, such as partial(fd.models.MLP, 64, 10), so that building "
                f"is seeded too; found a ready {type(build).__name__}"
            )
        if on_drift not in ON_DRIFT:
            raise FedistillError(f'expected on_drift of {", ".join(ON_DRIFT)}, found "{on_drift}"')
        chosen = named(objective)
        average = getattr(chosen, "average", 0.0)
        super().__init__(
            build,
            training or Recipe(epochs=1, batch_size=32, lr=0.05, average=average),
            chosen,
            teacher=teacher,
            teacher_weight=teacher_weight,
            replay=replay,
            classes=classes,
            seed=seed,
            device=device,
            background=background,
        )
        self.drift, self.on_drift = drift, on_drift
        self.experiences, self.rows_seen = 0, 0
        self.alarmed = False
        self.last = Progress()
        self._mark = ""
        self._row_shape: tuple[int, ...] | None = None
        if replay is not None and len(replay):
            self._take_over(replay)

    def _take_over(self, replay: ReplayBuffer) -> None:
        """Fit a memory that was begun elsewhere: its rows, and the classes that it knows."""
        held = replay.rows()
        try_out(self.module, self._tensor(held.inputs[:1]), self.classes)
        self._row_shape = held.inputs.shape[1:]
        if (most := int(held.labels.max())) >= self.classes:
            self._resize(most + 1)

    @property
    def alarms(self) -> tuple[int, ...]:
        """Rows of the present experience, from the first of the stream, with an alarm."""
        return self.last.alarms

    # --- use ------------------------------------------------------------------------------------

    def learn(self, experience: Experience | Rows | tuple[Any, Any]) -> Progress:
        """Test the student on what came, look for drift, then learn it.

        Args:
            experience: an :class:`~fedistill.data.stream.Experience`, rows, or inputs and labels;
                -1 for a row without a label.

        Raises:
            DataError: NaN among the inputs, labels that are no classes; nothing has changed then.
        """
        rows = rows_of(experience)
        self._check(rows)
        self._mark = ""
        return self._take(rows, self.recipe, derive(self.seed, "experience", self.experiences))

    def observe(
        self,
        inputs: npt.ArrayLike,
        labels: npt.ArrayLike | None = None,
        *,
        subject: npt.ArrayLike | None = None,
    ) -> Progress:
        """One batch of an endless stream: test, look for drift, and take one step.

        What teaches is not changed by it: a :class:`SelfTeacher` begins with :meth:`learn`.

        Args:
            inputs: ``[n, ...]``.
            labels: ``[n]``; None or -1: not known.
            subject: whose rows: one name or ``[n]``.

        Raises:
            DataError: as :meth:`learn`.
        """
        rows = batch_of(inputs, labels, subject)
        self._check(rows)
        once = dataclasses.replace(
            self.recipe,
            epochs=1,
            batch_size=max(len(rows), 1),
            schedule="constant",
            distil_epochs=0,  # soft targets join the step, and ask for no more of them
        )
        self._mark = ""
        return self._take(rows, once, derive(self.seed, "step", self._steps), begins=False)

    def consolidate(
        self,
        inputs: FloatArray | None = None,
        soft_targets: Probs | None = None,
        *,
        epochs: int = 1,
        seed: int | None = None,
    ) -> None:
        """Learn from soft targets on public rows and from what is remembered; nothing new comes.

        Args:
            inputs: public rows ``[n, ...]``; None: those that were absorbed last, if any.
            soft_targets: ``[n, classes]``.
            epochs: passes over what is remembered.
            seed: of the order; None: of the steps taken so far.
        """
        order = derive(self.seed, "consolidate", self._steps) if seed is None else seed
        if inputs is not None and soft_targets is not None:
            self.absorb(inputs, soft_targets, seed=derive(order, "absorb"))
        held = self.replay.draw(len(self.replay), "uniform") if self.replay is not None else None
        if held is not None and len(held):
            recipe = dataclasses.replace(self.recipe, epochs=epochs)
            self._study(Rows(held.inputs, held.labels), FineTune(), recipe, order)
        elif self._memory is not None and len(self._memory):
            self._distil(self._memory, order)

    def erase(self, subject: object, path: str | Path | None = None) -> ErasureReceipt:
        """Forget a person's rows, with all that lies beside them, and let none in again.

        The weights have learned from them and are not changed. The detector begins anew.

        Args:
            subject: as the rows had it.
            path: the file of :meth:`save`: it and the generation before it are written anew.

        Raises:
            FedistillError: there is no memory, or no such name can be.
        """
        if self.replay is None:
            raise FedistillError("erase: this student remembers no rows: there is nothing to erase")
        receipt = self.replay.erase(subject)
        if self.drift is not None:
            self.drift.reset()
        if path is not None:
            self.save(path)
            self.save(path)
        return receipt

    # --- as a learner in a federation ------------------------------------------------------------

    def absorb(
        self,
        inputs: FloatArray,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> None:
        """As a torch student does; targets may lack classes that came later, or have new ones."""
        super().absorb(inputs, self._wide(soft_targets), seed=seed, weights=weights)

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Learn own rows. The same rows again, as in the next round, are not a new experience."""
        self.alarmed = False
        if len(rows) == 0:
            super().fit(rows, seed=seed)
            return
        self._check(rows)
        mark = fingerprint(rows)
        if mark != self._mark:
            self._take(rows, self.recipe, seed)
        else:
            self._study(rows, self._role(seed), self.recipe, seed)
        self._mark = mark

    # --- an experience ----------------------------------------------------------------------------

    def _take(self, rows: Rows, recipe: Recipe, seed: int, *, begins: bool = True) -> Progress:
        """Test, watch, settle where the world has moved, learn."""
        started = time.monotonic()
        if not len(rows):
            self.alarmed, self.last = False, Progress()
            return self.last
        before = self._test(rows)
        self.alarmed, steps = before.drift is DriftState.DRIFT, self._steps
        if self.alarmed and self.on_drift == "consolidate":
            self.consolidate(seed=derive(seed, "consolidate"))
        elif self.alarmed and self.on_drift == "forget" and self.replay is not None:
            self.replay.drop()
        consolidated = self._steps > steps
        # Before there is room for new classes: it teaches what it knew.
        if begins and isinstance(self.teacher, SelfTeacher) and self.experiences:
            self.teacher.begin(self.module)
        new = self._welcome(rows.labels, begins)
        self.experiences += begins
        self.rows_seen += len(rows)
        done = self._study(rows, self._role(seed), recipe, seed, remember=True)
        if getattr(self.objective, "afresh", False):
            done = self._begin_anew(seed)
        self.last = dataclasses.replace(
            before,
            consolidated=consolidated,
            new_classes=new,
            steps=done.steps,
            rows_trained=done.rows_trained,
            terms=done.terms,
            seconds=round(time.monotonic() - started, 6),
        )
        return self.last

    def _test(self, rows: Rows) -> Progress:
        """What the student says of rows before it learns them, and what the detector says of it.

        Before its first step a student knows nothing, and a detector would learn that as the usual.
        """
        probs = softmax(self.predict(rows.inputs))
        found = tested(probs, rows.labels)
        detector = self.drift if self._steps else None
        drift, alarms = watched(detector, probs, rows.labels, self.rows_seen)
        return dataclasses.replace(found, drift=drift, alarms=alarms)

    # --- a student from the memory alone ----------------------------------------------------------

    def _begin_anew(self, seed: int) -> Progress:
        """A new student, trained on the memory alone (GDumb)."""
        fresh = self._built(self.classes, derive(seed, "anew"))
        with torch.no_grad():
            for weight, new in zip(self.module.parameters(), fresh.parameters(), strict=True):
                weight.copy_(new)
            for kept, buffer in zip(self.module.buffers(), fresh.buffers(), strict=True):
                kept.copy_(buffer)
        self.restart()
        self._steps = 0
        self._averaged = [weight.detach().clone() for weight in self._weights() if self._averaged]
        if self.replay is None or not len(self.replay):
            return Progress()
        held = self.replay.draw(len(self.replay), "uniform")
        epochs = getattr(self.objective, "epochs", 1)
        recipe = dataclasses.replace(self.recipe, epochs=epochs, schedule="cosine")
        return self._study(
            Rows(held.inputs, held.labels), FineTune(), recipe, derive(seed, "memory")
        )

    # --- classes --------------------------------------------------------------------------------

    def _check(self, rows: Rows) -> None:
        """Refuse rows that would spoil the student, before anything changes.

        Raises:
            DataError: with the first row that is wrong, without its values.
        """
        check_rows(rows, self._row_shape)
        wanted = int(rows.labels.max(initial=-1)) + 1
        check_growth(wanted, self.classes)
        name = type(self.module).__name__
        if wanted > self.classes and head_size(self.module) != self.classes:
            raise DataError(
                f"label {wanted - 1} needs more than the {self.classes} outputs of {name}, whose "
                "last linear layer does not give them: build it with all classes"
            )
        if self._row_shape is None and len(rows):
            try_out(self.module, self._tensor(rows.inputs[:1]), self.classes)
            self._row_shape = rows.inputs.shape[1:]

    def _welcome(self, labels: IntArray, begins: bool) -> tuple[int, ...]:
        """Make room for classes that were not met before; which they are."""
        classes = np.unique(labels[labels >= 0])
        if len(classes) and classes[-1] >= self.classes:
            self._resize(int(classes[-1]) + 1)
        if begins:
            self._known = self._met.copy()
        new = classes[~self._met[classes]]
        self._met[new] = True
        return tuple(new.tolist())

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Weights, memory, teacher, detector, counters: all that a stream goes on from."""
        state = dict(super().state_dict())
        facts: dict[str, Any] = {
            "classes": self.classes,
            "experiences": self.experiences,
            "rows_seen": self.rows_seen,
            "alarmed": self.alarmed,
            "mark": self._mark,
            "shape": None if self._row_shape is None else list(self._row_shape),
            "met": np.flatnonzero(self._met).tolist(),
            "known": np.flatnonzero(self._known).tolist(),
            "drift": None if self.drift is None else self.drift.state_dict(),
        }
        state["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8).copy()
        if self.replay is not None:
            state |= {f"replay.{k}": v for k, v in self.replay.state_dict().items()}
        pupil = self._pupil()
        if pupil is not None:
            state |= {f"teacher.{k}": v for k, v in pupil.state_dict().items()}
        if self._memory is not None and self.keeps_targets:
            state["memory.inputs"] = self._memory.inputs.cpu().numpy()
            state["memory.targets"] = self._memory.targets.cpu().numpy()
            state["memory.weights"] = np.asarray(self._memory.weights)
        return state

    def load_state_dict(self, state: State, rows: Rows | None = None) -> None:
        """Go on from what :meth:`state_dict` gave, to the same bytes.

        Args:
            state: of a student with the same arguments; it may have more or fewer classes by now.
            rows: not needed.

        Raises:
            CheckpointError: it is the state of another student; nothing has changed then.
        """
        del rows
        before, memory, last = self.state_dict(), self._memory, self.last
        try:
            self._restore(state)
        except (FedistillError, LookupError, TypeError, ValueError, RuntimeError) as problem:
            self._restore(before)
            self._memory, self.last = memory, last
            reason = problem if isinstance(problem, FedistillError) else repr(problem)
            raise CheckpointError(f"this state is of another student: {reason}") from None

    def _restore(self, state: State) -> None:
        """Become what a state says, the memory last: it is taken over whole or not at all."""
        facts = json.loads(bytes(state["facts"]))
        held, taught = _part(state, "replay."), _part(state, "teacher.")
        _same_parts("a memory", self.replay is not None, bool(held))
        averaged = any(name.startswith("average.") for name in state)
        _same_parts("an average that predicts", bool(self._averaged), averaged)
        _same_parts("a detector", self.drift is not None, facts["drift"] is not None)
        if not isinstance(self.teacher, SelfTeacher):  # it has none before the second experience
            _same_parts("a teacher that moves", self._moving is not None, bool(taught))
        self.restart()
        if facts["classes"] != self.classes:
            check_growth(facts["classes"], self.classes)
            self._resize(facts["classes"])
        net = {k: v for k, v in state.items() if not k.startswith(("replay.", "teacher."))}
        super().load_state_dict(net, Rows(np.empty((0, 1)), np.empty(0, dtype=np.int64)))
        self._load_teacher(taught)
        self.experiences, self.rows_seen = facts["experiences"], facts["rows_seen"]
        self.alarmed, self._mark, self.last = facts["alarmed"], facts["mark"], Progress()
        self._row_shape = None if facts["shape"] is None else tuple(facts["shape"])
        numbers = np.arange(self.classes)
        self._met, self._known = (np.isin(numbers, facts[name]) for name in ("met", "known"))
        self._memory = None
        if "memory.inputs" in state:
            self._memory = Memory(
                self._tensor(state["memory.inputs"]),
                self._tensor(state["memory.targets"]),
                np.array(state["memory.weights"]),
            )
        if self.drift is not None:
            self.drift.load_state_dict(facts["drift"])
        if self.replay is not None:
            self.replay.load_state_dict(held)

    def save(self, path: str | Path) -> None:
        """Write the state, whole or not at all; the generation before stays beside it."""
        store.save_state(Path(path), self.state_dict(), {"kind": "incremental"})

    def load(self, path: str | Path) -> None:
        """Go on from a file of :meth:`save`."""
        self.load_state_dict(store.load_state(Path(path))[0])


def _same_parts(what: str, here: bool, there: bool) -> None:
    if here != there:
        words = ("none", what)
        raise CheckpointError(f"expected {words[here]}, found {words[there]}: build it alike")


def _part(state: State, prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
