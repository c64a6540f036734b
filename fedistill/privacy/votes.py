"""Noisy votes of sub-teachers (GNMax): a proxy row is answered once, and the answer is paid for.

A client splits its rows into shards, teaches a sub-teacher on each and lets them vote on public
rows. What leaves is the votes with Gaussian noise and what follows from them, nothing else.

**What one unit can change.** Let D and D' differ by one unit (a record, or a user with all rows),
added or removed. Its shard is a keyed hash of the unit alone, so the rows of all other shards are
the same in D and D', and so are their sub-teachers, which depend on their shard, on public rows and
on seeds. On a proxy row one vote is therefore moved from a class to another, or given, or withheld.
The vector of counts changes by (-1, +1) in two places, or by 1 in one: its 2-norm changes by
sqrt(2) at most. (Replacing a unit by another may move two votes, which is twice as far: epsilon is
stated for add/remove.) Noise N(0, sigma^2) on every count is hence one Gaussian event of multiplier
sigma / sqrt(2) for each row asked, and Renyi divergence alpha / sigma^2 of order alpha, as for
GNMax (Papernot et al., arXiv 1802.08908). Only the noise and the number of rows asked count: the
smaller epsilon that depends on how much the votes agree is private itself, and is not used.

**Confidence without a second price.** Confident-GNMax first checks with noise of its own whether
enough votes agree, since what is not answered need not be paid for. Here it has to be: how many
rows pass depends on the rows, and a ledger is charged before anything is computed. So nothing
would be saved by the check, and each would cost. The noisy counts are released whole in place of
their argmax, which costs the same (the proof bounds the counts), and confidence is computed from
them: if a share s of T sub-teachers votes for the true class and the others for none, noisy counts
v have the posterior

    softmax(v s T / sigma^2),    s = privacy.threshold, uniform prior.

A row on which the votes are at odds gets a flat answer and weighs little in a mean; what is left
of the noise averages out over clients and rows. Measured on digits: two clients of 520 rows, 50
linear sub-teachers each, share 0.4, delta 1e-5; test accuracy of a student taught on the mean of
their answers, 4 seeds (without noise 0.89, without privacy 0.95):

    epsilon  proxy rows  these answers  argmax  argmax after a paid check of 0.6 T
          8         400           0.81    0.61  0.51
          8         100           0.82    0.78  0.70
          3         400           0.70    0.32  0.30
          3         100           0.72    0.49  0.40

Answers are as of classes that are equally frequent (so are the votes, see
:func:`fedistill.privacy.shards.vote`): they rank rows well and know no base rate.

**What limits it** is the number of rows for each sub-teacher (few rows, wrong votes) against the
number of sub-teachers (few votes, drowned in noise). With a few hundred rows take ``dp-head``.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedistill.aggregate.basics import softmax
from fedistill.distill.build import build_learner
from fedistill.distill.recipe import Recipe
from fedistill.errors import CheckpointError, FedistillError
from fedistill.privacy.entropy import numpy_generator
from fedistill.privacy.events import Gaussian, Spending
from fedistill.privacy.learner import Quote
from fedistill.privacy.sampling import names_of
from fedistill.privacy.shards import STEPS, count_votes, shards_of, votes_of
from fedistill.settings import PrivacySettings
from fedistill.types import FloatArray, IntArray, Logits, Probs, Rows, State

FLOOR = 1e-3
"""Smallest probability of an answer: a student should not be sure of what noise may have said."""
QUANTUM = 0.25
"""Least variance that confidence reckons with: half a vote, squared."""


def cost(sigma: float, rows: int) -> Spending:
    """What answers on so many proxy rows cost, with noise of ``sigma`` votes on every count."""
    return Spending.of(Gaussian(sigma / math.sqrt(2)), rows)


def noisy_counts(counts: IntArray, sigma: float, random: np.random.Generator) -> FloatArray:
    """Counts ``[rows, classes]`` with noise of standard deviation ``sigma`` votes on each."""
    return counts + random.normal(0.0, sigma, counts.shape)


def confidence(noisy: FloatArray, sigma: float, teachers: int, share: float) -> Logits:
    """From noisy counts to what they make of each class, as log-probabilities.

    Args:
        noisy: ``[rows, classes]``.
        sigma: standard deviation of the noise on each, in votes.
        teachers: T of the settings, which is public; how many have rows is not.
        share: of the sub-teachers that is taken to vote for the true class.

    Returns:
        ``[rows, classes]`` float32; no probability below :data:`FLOOR`, but for rounding.
    """
    posterior = softmax(noisy * (share * teachers / max(sigma**2, QUANTUM)))
    classes = noisy.shape[1]
    floor = min(FLOOR, 0.5 / classes)
    logits: Logits = np.log((1 - classes * floor) * posterior + floor)
    return logits.astype(np.float32)


class Committee:
    """Sub-teachers that vote on proxy rows with noise, and a student of what they answered.

    Everything that stays after :meth:`fit` may leave the client: answers with their noise, and a
    student that was taught on them and on soft targets. Sub-teachers do not outlive the call, and
    a row that was answered once keeps its answer, so that asking again costs nothing.

    Args:
        build: factory of torch modules or scikit-learn classifiers, for sub-teachers and student.
        recipe: how to train.
        classes: number of classes.
        seed: of initial weights and batches. Noise and the key of the shards come from the
            operating system.
        device: where to compute.
        background: proxy rows ``[m, ...]``, which are asked by number.
        privacy: unit, number of sub-teachers, and the share of them that is taken to agree.

    Attributes:
        student: what predicts.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        recipe: Recipe,
        *,
        classes: int,
        seed: int,
        device: torch.device | None = None,
        background: FloatArray,
        privacy: PrivacySettings,
    ) -> None:
        self.build = build
        self.recipe = recipe
        self.classes = classes
        self.seed = seed
        self.device = device
        self.background = background
        self.privacy = privacy
        self.student = build_learner(
            build,
            student_recipe(recipe, len(background)),
            classes=classes,
            seed=seed,
            device=device,
            example=background[:2],
        )
        self.listener: Callable[[IntArray, FloatArray], None] | None = None
        self._key = secrets.token_bytes(32)
        self._answers: Logits = np.full((len(background), classes), np.nan, dtype=np.float32)
        self._told: tuple[FloatArray, Probs, FloatArray | None] | None = None
        self._due: IntArray | None = None
        self._paid: tuple[float, IntArray] | None = None

    @property
    def passed(self) -> int:
        """Public rows that the student's steps have seen."""
        return int(getattr(self.student, "passed", 0))

    # --- the account ---------------------------------------------------------------------------

    def quote(self, rows: Rows, asked: IntArray) -> Quote:
        """What the next ``fit`` costs: an answer on each row that is asked for the first time.

        Nothing, if there are no such rows. The noise multiplier is the noise in votes.
        """
        del rows
        self._due = due = self._new(asked)
        return lambda sigma: cost(sigma, len(due))

    def forecast(self, rows: Rows, asked: IntArray, left: int) -> Quote:
        """What this round and the ones after it cost: no row is paid for twice.

        Args:
            rows: own rows.
            asked: proxy rows of this round; as many are taken to be asked in each later one.
            left: rounds, this one included.
        """
        del rows
        new = len(self._new(asked))
        unasked = int(np.isnan(self._answers[:, 0]).sum()) - new
        later = min(unasked, max(left - 1, 0) * len(np.unique(asked)))
        return lambda sigma: cost(sigma, new + later)

    def allow(self, sigma: float) -> None:
        """The next ``fit``, once, with this noise, on the rows that were quoted last.

        Raises:
            FedistillError: no such noise can be, or nothing was quoted.
        """
        if not (math.isfinite(sigma) and sigma >= 0):
            raise FedistillError(f"allow: expected a noise multiplier from 0, found {sigma}")
        if self._due is None:
            raise FedistillError("allow: expected a quote before it, found none: quote first")
        self._paid = sigma, self._due

    def units(self, rows: Rows) -> tuple[bytes, ...]:
        """Digests of the records, or of the users, that the next ``fit`` touches.

        Raises:
            FedistillError: users are asked for, and the rows do not say whose they are.
        """
        return tuple(dict.fromkeys(names_of(_labelled(rows), self.privacy.unit)))

    # --- learning ------------------------------------------------------------------------------

    def absorb(
        self,
        inputs: FloatArray,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> None:
        """Keep soft targets for the student; the own answers are among what they were made of."""
        del seed
        if len(inputs):
            self._told = inputs, soft_targets, weights

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Have the rows that were paid for voted on, then teach the student what is public.

        Args:
            rows: own rows; those without a label teach nothing.
            seed: of sub-teachers and student, and of no noise.

        Raises:
            FedistillError: no allowance, though there are rows to vote on.
        """
        paid, due = self._paid, self._due
        self._paid = self._due = None
        own = _labelled(rows)
        free = due is not None and not len(due)
        if len(own) and paid is None and not free:
            raise FedistillError(
                "a committee has no allowance for these rows: charge the step first (quote, the "
                "ledger's reserve, allow)"
            )
        if len(own) and paid is not None:
            sigma, asked = paid
            self._answers[asked] = self._vote(own, asked, sigma, seed)
        self._study(seed)

    def answer(self, asked: IntArray) -> Logits:
        """What was answered on these proxy rows, ``[rows, classes]`` log-probabilities.

        Uniform where nothing was, for want of rows or of an allowance. It costs nothing: votes are
        drawn in :meth:`fit`.
        """
        return self._known(self._answers[asked])

    def answered(self, asked: IntArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of these proxy rows have an answer, ``[rows]``. It says nothing of own rows."""
        known: np.ndarray[Any, np.dtype[np.bool_]] = ~np.isnan(self._answers[asked, 0])
        return known

    def predict(self, inputs: FloatArray) -> Logits:
        """What the student says, which was taught on released answers and soft targets alone."""
        return self.student.predict(inputs)

    def _new(self, asked: IntArray) -> IntArray:
        """Of the rows asked those without an answer, each once."""
        rows = np.unique(np.asarray(asked, dtype=np.int64))
        new: IntArray = rows[~self.answered(rows)]
        return new

    def _vote(self, own: Rows, asked: IntArray, sigma: float, seed: int) -> Logits:
        """Noisy answers on these proxy rows; the sub-teachers are gone when it returns."""
        teachers = self.privacy.teachers
        votes = votes_of(
            own,
            shards_of(names_of(own, self.privacy.unit), teachers, self._key),
            self.background[asked],
            self.build,
            self.recipe,
            teachers=teachers,
            classes=self.classes,
            seed=seed,
            device=self.device,
        )
        noisy = noisy_counts(count_votes(votes, self.classes), sigma, numpy_generator())
        if self.listener is not None:
            self.listener(asked, noisy)
        return confidence(noisy, sigma, teachers, self.privacy.threshold)

    def _study(self, seed: int) -> None:
        """Teach the student the soft targets; before there are any, the own answers."""
        told = self._told
        if told is None:
            rows = np.flatnonzero(self.answered(np.arange(len(self.background))))
            if not len(rows):
                return
            probs: Probs = softmax(self._answers[rows]).astype(np.float32)
            told = self.background[rows], probs, None
        inputs, targets, weights = told
        self.student.absorb(inputs, targets, seed=seed, weights=weights)
        self.student.fit(_none_of(self.background), seed=seed)

    def _known(self, answers: Logits) -> Logits:
        uniform = -math.log(self.classes)
        known: Logits = np.where(np.isnan(answers), uniform, answers).astype(np.float32)
        return known

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Answers, student, and the key of the shards; soft targets are the site's to give anew."""
        state = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        return state | {
            "answers": self._answers.copy(),
            "key": np.frombuffer(self._key, dtype=np.uint8).copy(),
        }

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore; own rows are not needed, no model of them is part of it.

        Raises:
            CheckpointError: the answers are on other proxy rows, or of other classes.
        """
        del rows
        answers = np.array(state["answers"], dtype=np.float32)
        if answers.shape != self._answers.shape:
            raise CheckpointError(
                f"expected saved answers of shape {list(self._answers.shape)}, found "
                f"{list(answers.shape)}: resume with the proxy rows they were made on, or start "
                "in a new folder"
            )
        saved = {name[8:]: value for name, value in state.items() if name.startswith("student.")}
        self.student.load_state_dict(saved, _none_of(self.background))
        self._answers, self._key = answers, bytes(state["key"].tobytes())
        self._told = self._due = self._paid = None


def student_recipe(recipe: Recipe, rows: int) -> Recipe:
    """How the student of so many public rows trains: on soft targets, for some steps at least.

    It learns no familiarity, which compares own rows with public ones and would not be private.
    """
    batches = max(1, -(-rows // recipe.batch_size))
    return replace(
        recipe,
        distil="inside" if recipe.distil == "never" else recipe.distil,
        distil_epochs=max(recipe.distil_epochs, recipe.epochs, -(-STEPS // batches)),
        familiarity=False,
        calibrate=False,
        predict="head",
    )


def _labelled(rows: Rows) -> Rows:
    return rows if (rows.labels >= 0).all() else rows.take(np.flatnonzero(rows.labels >= 0))


def _none_of(inputs: FloatArray) -> Rows:
    return Rows(inputs[:0], np.empty(0, dtype=np.int64))
