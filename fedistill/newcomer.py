"""A client before its first round: an untaught learner, and what a user should know of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fedistill.data.overlap import among
from fedistill.distill.build import build_learner
from fedistill.distill.learner import Learner
from fedistill.distill.recipe import Recipe
from fedistill.members import Client
from fedistill.models import pick_device
from fedistill.privacy.make import private_learner
from fedistill.privacy.terms import PRIVATE, terms_of
from fedistill.seeding import derive
from fedistill.settings import ContinualSettings, PolicySettings, PrivacySettings
from fedistill.types import ProxySet, Rows


def new_student(
    build: Callable[[], Any],
    recipe: Recipe,
    proxy: ProxySet,
    classes: int,
    seed: int,
    device: str = "cpu",
    make: Callable[..., Learner] | None = None,
) -> Learner:
    """An untaught learner from a factory; of one architecture all start from the same weights."""
    return (make or build_learner)(
        build,
        recipe,
        classes=classes,
        seed=derive(seed, "weights"),
        example=proxy.inputs[:2],
        device=pick_device(device),
        background=proxy.inputs if recipe.familiarity or make is not None else None,
    )


def private_client(
    client: Client,
    how: PrivacySettings,
    rounds: int,
    mechanism: str | None = None,
    *,
    continual: ContinualSettings | None = None,
    policy: PolicySettings | None = None,
) -> Client:
    """The client with a private learner, and the terms that its account keeps.

    Args:
        client: as it would be without privacy.
        how: what all agreed on; of mechanisms without an account the client is only told.
        rounds: of the run.
        mechanism: of this client alone, where it has another one.
        continual: what it remembers.
        policy: of a real site.

    Raises:
        SettingsError: the terms cannot be.
    """
    own = mechanism or how.mechanism
    if own not in PRIVATE:
        return replace(client, mechanism=how.mechanism)
    return replace(
        client,
        make=partial(private_learner, how, own, continual or ContinualSettings()),
        terms=terms_of(how, rounds, units_of(client.data, how), mechanism=own, policy=policy),
        mechanism=how.mechanism,
    )


def units_of(rows: Rows, how: PrivacySettings) -> int:
    """How many records, or users; a row of nobody is a user of its own."""
    if how.unit != "user" or rows.subject is None:
        return len(rows)
    named = rows.subject[rows.subject != ""]
    return len(np.unique(named)) + len(rows) - len(named)


def observations(client: Client, proxy: ProxySet, classes: int) -> Iterator[str]:
    """What a user should know about a client's rows before training."""
    if len(client.data) == 0 and client.course is None:
        yield f"{client.id} has no rows of its own: it learns and does not teach"
        return
    met = len(np.unique(client.data.labels))
    if met == 1 < classes:
        yield f"{client.id} has rows of one class only"
    if shared := len(among(client.data.inputs, proxy.digests)):
        yield f"{client.id}: private rows that are also proxy rows: {shared}"
    if client.test is not None and (shared := len(among(client.test.inputs, proxy.digests))):
        yield f"{client.id}: test rows that are also proxy rows: {shared}"
