"""Small committees, and rows that a blink teaches."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedistill.distill.recipe import Recipe
from fedistill.privacy.votes import Committee
from fedistill.settings import PrivacySettings
from fedistill.types import Rows

CLASSES = 3
TEACHERS = 8
RECIPE = Recipe(epochs=1, batch_size=16, momentum=0.9)
CENTRES = np.array([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]], dtype=np.float32)


def sample(count: int, *, seed: int = 0, users: int = 0) -> Rows:
    """Rows around one centre per class, of so many users."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    inputs = CENTRES[labels] + 0.7 * random.normal(size=(count, 4)).astype(np.float32)
    owners = None
    if users:
        owners = np.array([f"user-{number}" for number in random.integers(0, users, count)])
    return Rows(inputs, labels, subject=owners)


class Centroids:
    """The nearest class mean: a classifier like scikit-learn's that fits in microseconds."""

    def fit(self, inputs: Any, labels: Any, sample_weight: Any = None) -> Centroids:
        weight = np.ones(len(labels)) if sample_weight is None else sample_weight
        self.classes_ = np.unique(labels)
        self.means = np.stack(
            [
                np.average(inputs[labels == one], axis=0, weights=weight[labels == one])
                for one in self.classes_
            ]
        )
        return self

    def predict_proba(self, inputs: Any) -> Any:
        near = np.exp(-((inputs[:, None] - self.means) ** 2).sum(axis=2)) + 1e-12
        return near / near.sum(axis=1, keepdims=True)


class Poisoned(Centroids):
    def fit(self, inputs: Any, labels: Any, sample_weight: Any = None) -> Centroids:
        if np.isnan(inputs).any():
            raise ValueError("Input X contains NaN")
        return super().fit(inputs, labels, sample_weight)

    def predict_proba(self, inputs: Any) -> Any:
        return super().predict_proba(inputs)


def poisoned() -> Centroids:
    """Like scikit-learn, it refuses rows that are not numbers."""
    return Poisoned()


def committee(proxy: int = 30, build: Any = Centroids, **how: Any) -> Committee:
    privacy = PrivacySettings(mechanism="gnmax", **({"teachers": TEACHERS} | how))
    background = sample(proxy, seed=9).inputs
    return Committee(build, RECIPE, classes=CLASSES, seed=5, background=background, privacy=privacy)


def paid(one: Committee, rows: Rows, asked: Any, sigma: float = 1.0) -> Committee:
    """One round that was paid for."""
    one.quote(rows, np.asarray(asked))
    one.allow(sigma)
    one.fit(rows, seed=3)
    return one
