"""From the ``[continual]`` section to a learner that remembers, whatever kind of model it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fedistill.aggregate.rules import softmax
from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.detectors import detector
from fedistill.continual.erasure import ErasureReceipt
from fedistill.continual.storage import numbers_to_texts, texts_to_numbers
from fedistill.continual.watcher import Detector, DriftState
from fedistill.distill.arriving import fingerprint
from fedistill.distill.build import build_learner
from fedistill.distill.incremental import IncrementalDistiller
from fedistill.distill.learner import Learner
from fedistill.distill.objectives import OBJECTIVES, Objective, objective
from fedistill.distill.progress import watched
from fedistill.distill.recipe import Recipe
from fedistill.distill.teachers import EmaTeacher, SelfTeacher, Teacher
from fedistill.distill.torch_student import seeded
from fedistill.errors import FedistillError, Problem, SettingsError
from fedistill.seeding import derive
from fedistill.settings import ContinualSettings
from fedistill.types import FloatArray, Logits, Probs, Rows, State

OPTIONS = {"replay_rows": "rows", "alpha": "alpha", "beta": "beta", "weight": "weight"}
"""Settings, and what objectives call them."""


def continual_learner(
    how: ContinualSettings,
    own_seed: int,
    build: Callable[[], Any],
    recipe: Recipe,
    *,
    classes: int,
    seed: int,
    device: torch.device | None = None,
    background: FloatArray | None = None,
    example: FloatArray | None = None,
) -> Learner:
    """A learner that remembers.

    Args:
        how: what it remembers, and what its steps minimise.
        own_seed: of its memory, another one for every client.
        build: factory of torch modules or scikit-learn classifiers.
        recipe: how to train.
        classes: number of classes.
        seed: of the initial weights.
        device: where to compute.
        background: proxy rows.
        example: a few rows on which a torch module is tried at once.

    Raises:
        SettingsError: the objective has no such option, or asks for a torch model.
    """
    plain = build_learner(
        build, recipe, classes=classes, seed=seed, device=device, background=None, example=example
    )
    with seeded(seed):
        is_module = isinstance(build(), nn.Module)
    if not is_module:
        if how.objective not in {None, "er"} or how.teacher != "none":
            text = f"{how.objective or how.teacher} needs a torch model, found another: use er"
            raise SettingsError([Problem("continual.objective", text)])
        if background is not None:
            plain = build_learner(
                build, recipe, classes=classes, seed=seed, background=background, example=example
            )
        return Rehearsal(plain, memory_of(how, own_seed), detector_of(how, own_seed))
    learner = IncrementalDistiller(
        build,
        objective_of(how),
        teacher=teacher_of(how),
        teacher_weight=how.teacher_weight,
        replay=memory_of(how, own_seed),
        drift=detector_of(how, own_seed),
        on_drift=how.on_drift,
        training=recipe,
        classes=classes,
        background=background,
        seed=seed,
        device=device,
    )
    learner.keeps_targets = False  # the site has them, and gives them anew in each round
    return learner


def objective_of(how: ContinualSettings) -> Objective:
    """The objective that the settings name, with what they change in it.

    Raises:
        SettingsError: it has no such option.
    """
    name = how.objective or ("er" if how.buffer else "fine-tune")
    known = {item.name for item in dataclasses.fields(OBJECTIVES[name])}  # type: ignore[arg-type]
    settings = OPTIONS | {"learns": "learns", "distils": "distils"}
    given = {k: getattr(how, k) for k in settings if getattr(how, k) is not None}
    wrong = [key for key in given if settings[key] not in known]
    if wrong:
        raise SettingsError(
            [
                Problem(f"continual.{key}", f"{name} has no such option: leave it out")
                for key in wrong
            ]
        )
    return objective(name, **{settings[key]: value for key, value in given.items()})


def teacher_of(how: ContinualSettings) -> Teacher | None:
    """The teacher that the settings name; None leaves it to the objective."""
    if how.teacher == "ema":
        return EmaTeacher(how.decay)
    return SelfTeacher() if how.teacher == "self" else None


def memory_of(how: ContinualSettings, seed: int) -> ReplayBuffer | None:
    """The buffer that the settings ask for."""
    if not how.buffer:
        return None
    return ReplayBuffer(
        how.buffer,
        how.policy,
        draw=how.draw,
        max_uses=how.max_uses or None,
        seed=derive(seed, "replay"),
    )


def detector_of(how: ContinualSettings, seed: int) -> Detector | None:
    """The detector that the settings ask for."""
    if how.drift is None:
        return None
    seeds = {"seed": derive(seed, "drift")} if how.drift == "mmd" else {}
    return detector(how.drift, on=how.on, **seeds)


class Rehearsal:
    """Any learner, fitted to the rows of the day and to those that are remembered.

    Experience replay for models that are refitted: every ``fit`` sees all rows of the memory once.
    Rows without a label are remembered, and teach nothing.

    Args:
        learner: what learns.
        replay: the memory; None: nothing is remembered.
        drift: what watches predictions on new rows; an alarm is told and changes nothing else.
    """

    def __init__(
        self, learner: Learner, replay: ReplayBuffer | None, drift: Detector | None = None
    ) -> None:
        self.learner, self.replay, self.drift = learner, replay, drift
        self.alarmed = False
        self.alarms: tuple[int, ...] = ()
        self.passed = 0
        self.rows_seen = 0
        self._mark = ""
        self._fitted = False
        self._alone = False
        self._beside: Rows | None = None

    def absorb(
        self,
        inputs: FloatArray,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> None:
        """As the learner does."""
        self.learner.absorb(inputs, soft_targets, seed=seed, weights=weights)

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Fit to these rows and the remembered ones; then remember these, if they are new."""
        mark = fingerprint(rows)
        fresh = len(rows) > 0 and mark != self._mark
        self.alarmed = fresh and self._moved(rows)
        self._beside = None
        if self.replay is not None and len(self.replay):
            old = self.replay.draw(len(self.replay), "uniform")
            self._beside = _labelled(Rows(old.inputs, old.labels, subject=old.subjects))
        together = _joined(_labelled(rows), self._beside)
        self.learner.fit(together, seed=seed)
        self.passed += len(together)
        self._fitted, self._alone = True, not len(rows)
        if not fresh:
            return
        self._mark = mark
        self.rows_seen += len(rows)
        if self.replay is not None:
            self.replay.add(rows.inputs, rows.labels, subject=rows.subject)

    def erase(self, subject: object) -> ErasureReceipt:
        """Forget a person's rows and let none in again; the next fit is without them.

        Raises:
            FedistillError: there is no memory, or no such name can be.
        """
        if self.replay is None:
            raise FedistillError("erase: this learner remembers no rows: there is nothing to erase")
        receipt = self.replay.erase(subject)
        if self._beside is not None and self._beside.subject is not None:
            self._beside = self._beside.take(np.flatnonzero(self._beside.subject != str(subject)))
        if self.drift is not None:
            self.drift.reset()
        return receipt

    def _moved(self, rows: Rows) -> bool:
        """Whether the detector says so; before the first fit there is nothing to compare with."""
        detector = self.drift if self._fitted else None
        said = softmax(self.learner.predict(rows.inputs))
        state, self.alarms = watched(detector, said, rows.labels, self.rows_seen)
        return state is DriftState.DRIFT

    def predict(self, inputs: FloatArray) -> Logits:
        """As the learner does."""
        return self.learner.predict(inputs)

    def familiarity(self, inputs: FloatArray) -> FloatArray:
        """As the learner does; 0 where it cannot tell."""
        score = getattr(self.learner, "familiarity", None)
        found: FloatArray = np.zeros(len(inputs)) if score is None else score(inputs)
        return found

    def state_dict(self) -> State:
        """That of the learner, with the memory."""
        state = {f"learner.{k}": v for k, v in self.learner.state_dict().items()}
        if self.replay is not None:
            state |= {f"replay.{k}": v for k, v in self.replay.state_dict().items()}
        if self._beside is not None:
            # A model that is restored by a refit has to see the same rows again.
            state |= {"beside.inputs": self._beside.inputs, "beside.labels": self._beside.labels}
            if self._beside.subject is not None:
                state["beside.subject"] = texts_to_numbers(self._beside.subject)
        facts = {
            "mark": self._mark,
            "fitted": self._fitted,
            "alone": self._alone,
            "rows_seen": self.rows_seen,
            "drift": None if self.drift is None else self.drift.state_dict(),
        }
        return state | {"facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8).copy()}

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore."""
        parts = {
            name: {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
            for name in ("learner", "replay", "beside")
        }
        self._beside = None
        if beside := parts["beside"]:
            names = beside.get("subject")
            owners = None if names is None else numbers_to_texts(names)
            self._beside = Rows(beside["inputs"], beside["labels"], subject=owners)
        facts = json.loads(bytes(state["facts"]))
        # The last fit may have been one without rows of the day, and is to be made again as it was.
        own = rows.take(np.empty(0, dtype=np.int64)) if facts["alone"] else _labelled(rows)
        self.learner.load_state_dict(parts["learner"], _joined(own, self._beside))
        if self.replay is not None:
            self.replay.load_state_dict(parts["replay"])
        self._mark, self._fitted = facts["mark"], facts["fitted"]
        self._alone, self.rows_seen = facts["alone"], facts["rows_seen"]
        if self.drift is not None and facts["drift"] is not None:
            self.drift.load_state_dict(facts["drift"])


def _labelled(rows: Rows) -> Rows:
    return rows if (rows.labels >= 0).all() else rows.take(np.flatnonzero(rows.labels >= 0))


def _joined(rows: Rows, beside: Rows | None) -> Rows:
    if beside is None:
        return rows
    return Rows(
        np.concatenate([rows.inputs, beside.inputs]), np.concatenate([rows.labels, beside.labels])
    )
