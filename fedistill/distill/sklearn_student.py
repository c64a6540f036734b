"""Any scikit-learn classifier as a learner: it absorbs soft targets as weighted rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fedistill.aggregate.rules import FAMILIARITY_LIMIT
from fedistill.distill.recipe import Recipe
from fedistill.seeding import generator
from fedistill.types import FloatArray, IntArray, Logits, Probs, Rows, State

PROXY_SHARE = 2.0
"""Weight of all proxy rows against all own rows. A refit starts from nothing, where a network
keeps what earlier rounds taught it: on the hospitals twice the weight was worth 2 points of AUC."""
FLOOR = 1e-6
"""Smallest probability of a prediction: trees say 0 where they have seen nothing."""


@contextmanager
def few_threads() -> Iterator[None]:
    """Let BLAS and OpenMP have as many threads as torch: on few rows more only wait for another.

    Sums of another number of threads end in other bits, too.
    """
    with threadpool_limits(torch.get_num_threads()):
        yield


class SklearnStudent:
    """A scikit-learn classifier that learns from rows and from soft targets.

    A proxy row with soft target q becomes one row per class c, labelled c and weighted q_c: the
    weighted log-likelihood of these rows is the cross-entropy to q. The proxy rows together weigh
    in proportion to the own rows (:data:`PROXY_SHARE` times ``soft_weight``), so that twenty own
    rows are not drowned.

    The classifier is fitted afresh in every round, so its state is what it was fitted on: the
    absorbed targets, and the own rows, which are never part of the state.

    Args:
        build: a factory of classifiers or pipelines with ``fit`` and ``predict_proba``.
        recipe: how to train; of it only ``soft_weight`` and ``familiarity`` apply.
        classes: number of classes.
        background: proxy rows to tell own rows from, or None for no familiarity.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        recipe: Recipe,
        *,
        classes: int,
        background: FloatArray | None = None,
    ) -> None:
        self.build = build
        self.recipe = recipe
        self.classes = classes
        self.background = background if recipe.familiarity else None
        self._inputs: FloatArray | None = None
        self._targets: Probs | None = None
        self._weights: FloatArray = np.empty(0)
        self._model: Any = None
        self._scorer: Any = None
        self._seed = 0

    def absorb(
        self,
        inputs: FloatArray,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> None:
        """Keep the targets for the next fit."""
        del seed
        self._inputs, self._targets = inputs, soft_targets
        self._weights = np.ones(len(inputs)) if weights is None else weights

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Fit on own rows and absorbed targets together."""
        self._seed = seed
        inputs, labels, weights = self._weighted_rows(rows)
        if len(labels) == 0:
            self._model = None
        elif len(np.unique(labels)) == 1:
            self._model = _Constant(int(labels[0]))
        else:
            self._model = self.build()
            with few_threads():
                fit_weighted(self._model, inputs, labels, weights, seed)
        with few_threads():
            self._fit_scorer(rows)

    def predict(self, inputs: FloatArray) -> Logits:
        """Log-probabilities ``[rows, classes]``; uniform before the first fit."""
        probs = np.full((len(inputs), self.classes), 1.0 / self.classes)
        if self._model is not None and len(inputs):
            with few_threads():
                known = self._model.predict_proba(_flat(inputs))
            probs = np.zeros_like(probs)
            probs[:, np.asarray(self._model.classes_, dtype=np.int64)] = known
        probs = np.maximum(probs, FLOOR)
        logits: Logits = np.log(probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)
        return logits

    def familiarity(self, inputs: FloatArray) -> FloatArray:
        """Log density ratio of own to proxy rows by a logistic regression, ``[rows]``."""
        if self._scorer is None:
            return np.zeros(len(inputs), dtype=np.float32)
        with few_threads():
            score = self._scorer.decision_function(_flat(inputs))
        limited: FloatArray = np.clip(score, -FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)
        return limited.astype(np.float32)

    def state_dict(self) -> State:
        """The absorbed targets and the seed of the last fit."""
        state: dict[str, Any] = {
            "seed": np.array([self._seed], dtype=np.int64),
            "fitted": np.array([self._model is not None], dtype=np.uint8),
        }
        if self._inputs is not None and self._targets is not None:
            state |= {"inputs": self._inputs, "targets": self._targets}
            state["weights"] = self._weights
        return state

    def load_state_dict(self, state: State, rows: Rows) -> None:
        """Restore by fitting again on the same rows and targets, which gives the same model."""
        self._inputs, self._targets = state.get("inputs"), state.get("targets")
        self._weights = state.get("weights", np.empty(0))
        if bool(state["fitted"][0]):
            self.fit(rows, seed=int(state["seed"][0]))

    def _weighted_rows(self, rows: Rows) -> tuple[FloatArray, IntArray, FloatArray]:
        """Own rows with weight 1, then each proxy row once for every class that it may be."""
        inputs, labels = [_flat(rows.inputs)], [rows.labels]
        weights = [np.ones(len(rows), dtype=np.float64)]
        absorbs = self.recipe.distil != "never"
        if absorbs and self._inputs is not None and self._targets is not None and len(self._inputs):
            row, label = np.nonzero(self._targets > 1e-3)
            weight = self._targets[row, label] * self._weights[row]
            own = len(rows) / self._weights.sum()
            strength = PROXY_SHARE * self.recipe.soft_weight_for(len(rows))
            scale = strength * own if len(rows) else 1.0
            inputs.append(_flat(self._inputs)[row])
            labels.append(label)
            weights.append(weight * scale)
        return np.concatenate(inputs), np.concatenate(labels), np.concatenate(weights)

    def _fit_scorer(self, rows: Rows) -> None:
        from sklearn.linear_model import LogisticRegression

        self._scorer = None
        if self.background is None or len(rows) == 0:
            return
        inputs = np.concatenate([_flat(rows.inputs), _flat(self.background)])
        own = np.repeat([1, 0], [len(rows), len(self.background)])
        share = np.where(own == 1, 0.5 / len(rows), 0.5 / len(self.background)) * 2 * len(rows)
        self._scorer = LogisticRegression(C=0.1, max_iter=1000).fit(
            inputs, own, sample_weight=share
        )


def fit_weighted(
    model: Any, inputs: FloatArray, labels: IntArray, weights: FloatArray, seed: int
) -> None:
    """Fit a classifier or a pipeline on weighted rows, with everything random in it seeded.

    What takes no weights is fitted on rows drawn in proportion to them, as many as there are.
    """
    from sklearn.utils.validation import has_fit_parameter

    seeds = {
        name: seed % (1 << 31)
        for name in getattr(model, "get_params", dict)()
        if name.split("__")[-1] == "random_state"
    }
    if seeds:
        model.set_params(**seeds)
    steps = getattr(model, "steps", None)
    last, last_step = steps[-1] if steps else ("", model)
    if has_fit_parameter(last_step, "sample_weight"):
        name = f"{last}__sample_weight" if steps else "sample_weight"
        model.fit(inputs, labels, **{name: weights})
        return
    share = weights / weights.sum()
    drawn = generator(seed, "weighted").choice(len(labels), len(labels), p=share)
    model.fit(inputs[drawn], labels[drawn])


class _Constant:
    """What a classifier is after meeting one class only."""

    def __init__(self, label: int) -> None:
        self.classes_ = np.array([label])

    def predict_proba(self, inputs: FloatArray) -> FloatArray:
        return np.ones((len(inputs), 1))


def _flat(inputs: FloatArray) -> FloatArray:
    table = np.asarray(inputs)
    return table.reshape(len(table), math.prod(table.shape[1:]))  # -1 cannot be told of no rows
