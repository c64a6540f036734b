"""From the ``[privacy]`` section to a private learner, whatever kind of model the client has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fedistill.distill.learner import Learner
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import seeded
from fedistill.errors import FedistillError, Problem, SettingsError
from fedistill.privacy.terms import settled
from fedistill.settings import ContinualSettings, PrivacySettings
from fedistill.types import FloatArray


def private_learner(
    how: PrivacySettings,
    mechanism: str,
    continual: ContinualSettings,
    build: Callable[[], Any],
    recipe: Recipe,
    *,
    classes: int,
    seed: int,
    device: torch.device | None = None,
    background: FloatArray | None = None,
    example: FloatArray | None = None,
) -> Learner:
    """A learner whose releases are private.

    Args:
        how: the section.
        mechanism: ``dpsgd``, ``dp-head`` or ``gnmax``.
        continual: what it remembers.
        build: factory of torch modules; for ``gnmax`` also of scikit-learn classifiers.
        recipe: how to train.
        classes: number of classes.
        seed: of the initial weights. Noise and samples come from the operating system.
        device: where to compute.
        background: proxy rows ``[m, ...]``.
        example: unused; a private module is tried when it is wrapped.

    Raises:
        SettingsError: the mechanism needs a torch model, or a memory that it cannot keep.
    """
    del example
    # Opacus takes a second to import, which runs without privacy need not wait for.
    from fedistill.privacy.dpsgd import PrivateStudent
    from fedistill.privacy.remembered import private_memory
    from fedistill.privacy.votes import Committee

    how = settled(how, mechanism)
    if mechanism == "gnmax":
        if continual.buffer:
            text = "gnmax remembers no rows: take dpsgd or dp-head, or set buffer = 0"
            raise SettingsError([Problem("continual.buffer", text)])
        assert background is not None
        return Committee(
            build,
            recipe,
            classes=classes,
            seed=seed,
            device=device,
            background=background,
            privacy=how,
        )
    if mechanism == "dp-head":
        if background is None:
            raise FedistillError("dp-head: expected proxy rows to learn features from, found none")
        from fedistill.privacy.encoders import head_recipe

        build = partial(_head_on, how.encoder, background, classes)
        recipe = head_recipe(recipe, how.lr)
    else:
        with seeded(seed):
            sample = build()
        if not isinstance(sample, nn.Module):
            text = f"dpsgd trains torch models, found {type(sample).__name__}: take gnmax for it"
            raise SettingsError([Problem("privacy.mechanism", text)])
    return PrivateStudent(
        build,
        recipe,
        classes=classes,
        seed=seed,
        device=device,
        background=background,
        privacy=how,
        replay=private_memory(continual),
    )


def _head_on(name: str, public: FloatArray, classes: int) -> nn.Module:
    from fedistill.privacy.encoders import encoder, with_head

    return with_head(encoder(name, public), classes)
