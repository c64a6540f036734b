"""From a factory to a learner, whatever the factory makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedistill.distill.learner import Learner
from fedistill.distill.recipe import Recipe
from fedistill.distill.sklearn_student import SklearnStudent
from fedistill.distill.torch_student import TorchStudent, seeded
from fedistill.errors import FedistillError
from fedistill.types import FloatArray


def build_learner(
    build: Callable[[], Any],
    recipe: Recipe,
    *,
    classes: int,
    seed: int,
    device: torch.device | None = None,
    background: FloatArray | None = None,
) -> Learner:
    """A learner from a factory of torch modules, scikit-learn classifiers or learners.

    Raises:
        FedistillError: the factory makes something else.
    """
    with seeded(seed):
        sample = build()
    if isinstance(sample, nn.Module):
        return TorchStudent(
            build, recipe, classes=classes, seed=seed, device=device, background=background
        )
    if hasattr(sample, "predict_proba") and hasattr(sample, "fit"):
        return SklearnStudent(build, recipe, classes=classes, background=background)
    if isinstance(sample, Learner):
        return sample
    raise FedistillError(
        "a client's build must return a torch module, a scikit-learn classifier with "
        f"predict_proba, or a learner; it returned {type(sample).__name__}"
    )
