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
    example: FloatArray | None = None,
) -> Learner:
    """A learner from a factory of torch modules, scikit-learn classifiers or learners.

    Args:
        build: the factory, called without arguments.
        recipe: how to train.
        classes: number of classes.
        seed: of the initial weights.
        device: where to compute.
        background: proxy rows, where familiarity is learned.
        example: a few rows on which a torch module is tried at once.

    Raises:
        FedistillError: it is no factory, makes something else, or a module that does not turn
            rows into logits.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise FedistillError(
            "build must be a factory, such as partial(fd.models.MLP, 64, 10), so that building is "
            f"seeded too; found a ready {type(build).__name__}"
        )
    with seeded(seed):
        try:
            sample = build()
        except TypeError as error:
            raise FedistillError(f"build must be callable without arguments ({error})") from None
    if isinstance(sample, nn.Module):
        if example is not None and len(example):
            _try_out(sample, example, classes)
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


def _try_out(module: nn.Module, example: FloatArray, classes: int) -> None:
    """Show a module two rows before it is trained on thousands."""
    wanted = f"logits [rows, classes] = [{len(example)}, {classes}]"
    name = type(module).__name__
    module.eval()
    try:
        with torch.no_grad():
            found = module(torch.from_numpy(example))
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise FedistillError(
            f"{name} cannot take rows of shape {list(example.shape[1:])}: {reason}"
        ) from None
    if not isinstance(found, torch.Tensor):
        raise FedistillError(f"{name} must return {wanted}, it returns a {type(found).__name__}")
    if tuple(found.shape) != (len(example), classes):
        raise FedistillError(f"{name} must return {wanted}, it returns {list(found.shape)}")
