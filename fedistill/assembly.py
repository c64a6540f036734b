"""From settings and prepared rows to a federation: every name becomes the thing it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from fedistill import config, models
from fedistill.attacks import corrupt
from fedistill.client import Client, Member
from fedistill.config import Settings, TrainSettings
from fedistill.course import Timetable, timetable
from fedistill.data import Federated
from fedistill.distill.learner import Learner
from fedistill.distill.recipe import Recipe
from fedistill.distill.rehearsal import continual_learner
from fedistill.federation import Federation
from fedistill.newcomer import private_client
from fedistill.presets import Method, discreet
from fedistill.presets import method as preset
from fedistill.privacy.terms import PRIVATE
from fedistill.seeding import derive
from fedistill.settings import PolicySettings
from fedistill.streamed import Streamed
from fedistill.types import ProxySet

NETWORKS = ("linear", "mlp", "lenet", "cnn", "sequential")
"""Kinds of model that learn on from round to round."""
STUDENT_WIDTH = 128
"""Width of the server's student where the settings are silent: it learns from all sites."""


def method_of(settings: Settings) -> Method:
    """The preset with what the settings change in it; a private one tells nothing but predictions.

    Raises:
        SettingsError: the method tells more of private rows than predictions, and has to.
    """
    changes = {
        item.name: getattr(settings.method, item.name)
        for item in dataclasses.fields(settings.method)
        if item.name != "preset" and getattr(settings.method, item.name) is not None
    }
    chosen = preset(settings.method.preset, **changes)
    private = settings.privacy.mechanism in (*PRIVATE, "central-gauss")
    return (
        discreet(chosen, own="rule" in changes or "familiarity" in changes) if private else chosen
    )


def assemble(settings: Settings, federated: Federated, chosen: Method) -> Federation:
    """A federation from settings and prepared rows."""
    dataset = federated.dataset
    shape, classes = dataset.public.inputs.shape[1:], len(dataset.classes)
    training = training_of(settings, federated)
    ids = list(dict.fromkeys([*federated.tests, *federated.parts]))
    mechanisms = config.group_value(settings.clients, ids, "mechanism")
    student = student_factory(settings, shape, classes)
    agreed, courses = settings.deployment, courses_of(settings, federated)
    clients: list[Client | Member] = [
        Member(name, agreed.most_rows or None) for name in agreed.sites
    ]
    present = [
        privately(
            Client(
                name,
                student
                if chosen.exchange == "rows"
                else model_factory(training[name], shape, classes),
                part if (course := courses[name]) is None else course.rows(0),
                federated.tests.get(name),
                recipe(training[name]),
                course=course,
                make=maker(settings, name),
            ),
            settings,
            mechanisms.get(name),
        )
        for name, part in federated.parts.items()
    ]
    clients += _attacked(settings, chosen, present, classes)
    return Federation(
        clients,
        ProxySet(dataset.public.inputs),
        student,
        chosen,
        classes=dataset.classes,
        seed=settings.seed,
        per_round=settings.proxy.per_round,
        participation=settings.clients.participation,
        quorum=min(settings.clients.quorum, len(clients)),
        training=recipe(settings.clients),
        student_options=student_options(settings),
        device=settings.backend.device,
        limit=int(settings.backend.max_message_mb * (1 << 20)),
        anchors=dataset.public.labels,
        stream=streamed(settings, federated),
        alarm_quorum=settings.continual.quorum,
        privacy=settings.privacy,
        awake=settings.backend.awake,
        store=settings.backend.store,
    )


def every(settings: Settings) -> int:
    """Regular rounds of an experience."""
    stream = settings.stream
    return stream.every or max(settings.rounds // max(stream.experiences, 1), 1)


def courses_of(settings: Settings, federated: Federated) -> dict[str, Timetable | None]:
    """What each client meets, and when; None where its rows stay as they are."""
    if federated.stream is None:
        return dict.fromkeys(federated.parts)
    lag = settings.stream.lag
    return {
        name: timetable(met, every(settings), lag * number)
        for number, (name, met) in enumerate(federated.stream.train.items())
    }


def streamed(settings: Settings, federated: Federated) -> Streamed | None:
    """The experiences as the federation is measured by them."""
    stream = federated.stream
    if stream is None:
        return None
    count = settings.stream.experiences
    ends = [every(settings) * (number + 1) for number in range(count - 1)] + [settings.rounds]
    return Streamed(stream.names, stream.tests, tuple(ends), settings.stream.order == "same")


def maker(settings: Settings, name: str) -> Callable[..., Learner] | None:
    """What makes a client's learner, where it is more than its model."""
    if not settings.continual.active:
        return None
    return partial(continual_learner, settings.continual, derive(settings.seed, name, "memory"))


def privately(
    client: Client,
    settings: Settings,
    mechanism: str | None = None,
    policy: PolicySettings | None = None,
) -> Client:
    """A client with its terms and its private learner, where the settings ask for that.

    Args:
        client: as it would be without privacy.
        settings: what was agreed.
        mechanism: of the client alone, where it has another one.
        policy: of a real site.
    """
    how = settings.privacy
    return private_client(
        client, how, settings.rounds, mechanism, continual=settings.continual, policy=policy
    )


def _attacked(
    settings: Settings, chosen: Method, clients: list[Client], classes: int
) -> list[Client]:
    """The clients, some of them bad if the settings say so; in a baseline none is."""
    attack = settings.attack
    if attack.kind is None or chosen.exchange in {"weights", "nothing", "rows"}:
        return clients
    return corrupt(
        clients,
        attack.kind,
        attack.count,
        collude=attack.collude,
        classes=classes,
        seed=settings.seed,
    )


def model_factory(
    training: TrainSettings, shape: tuple[int, ...], classes: int
) -> Callable[[], Any]:
    """The factory of a client's model."""
    return models.factory(
        training.model, shape, classes, width=training.width, depth=training.depth
    )


def student_factory(settings: Settings, shape: tuple[int, ...], classes: int) -> Callable[[], Any]:
    """The factory of the server's student: its own kind of model, or that of the clients.

    Where the clients are no networks and nothing is set, it is an mlp: it learns on from round to
    round, which a refit cannot.
    """
    kind = settings.student.model or settings.clients.model
    if settings.student.model is None and kind not in NETWORKS:
        kind = "mlp"
    return models.factory(
        kind,
        shape,
        classes,
        width=settings.student.width or STUDENT_WIDTH,
        depth=settings.student.depth or 1,
    )


def student_options(settings: Settings) -> dict[str, Any]:
    """What [student] sets, as fields of :class:`Recipe`."""
    names = {"epochs": "distil_epochs"}
    return {
        names.get(item.name, item.name): getattr(settings.student, item.name)
        for item in dataclasses.fields(settings.student)
        if item.name not in {"model", "width", "depth"}
        and getattr(settings.student, item.name) is not None
    }


def model_names(settings: Settings, federated: Federated, chosen: Method) -> dict[str, str]:
    """The kind of model at each client; baselines that share one model put it everywhere."""
    training = training_of(settings, federated)
    if chosen.exchange in {"weights", "rows"}:
        kind = settings.student.model or settings.clients.model
        return dict.fromkeys(training, f"{kind}, as the server's")
    ids = list(dict.fromkeys([*federated.tests, *federated.parts]))
    own = config.group_value(settings.clients, ids, "mechanism")
    mechanisms = {name: own.get(name, settings.privacy.mechanism) for name in training}
    head = f"head on public features ({settings.privacy.encoder})"
    return {
        name: head if mechanisms[name] == "dp-head" else train.model
        for name, train in training.items()
    }


def recipe(training: TrainSettings) -> Recipe:
    """Settings of training as a recipe."""
    names = {item.name for item in dataclasses.fields(Recipe)}
    known = {item.name for item in dataclasses.fields(TrainSettings)} & names
    return Recipe(**{name: getattr(training, name) for name in known})


def training_of(settings: Settings, federated: Federated) -> dict[str, TrainSettings]:
    """How each client trains, its group counted in."""
    ids = list(dict.fromkeys([*federated.tests, *federated.parts]))
    resolved = config.client_settings(settings.clients, ids)
    return {name: resolved[name] for name in federated.parts}
