"""What a run will cost in privacy, told before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedistill.config import Settings
from fedistill.course import Timetable
from fedistill.errors import BudgetExceeded
from fedistill.members import Client
from fedistill.newcomer import new_student
from fedistill.privacy.account import Account
from fedistill.privacy.accounting import epsilon
from fedistill.privacy.central import cost
from fedistill.privacy.central import describe as describe_central
from fedistill.privacy.events import Sampled, Spending
from fedistill.privacy.learner import Private
from fedistill.privacy.planner import Projection, noise_for, project
from fedistill.privacy.terms import PRIVATE, RELATION, SMALLEST_DELTA, STATEMENTS
from fedistill.types import ProxySet

MOST_SHOWN = 5
"""Rounds whose epsilon is shown one by one."""


def privacy(
    settings: Settings,
    clients: Sequence[Client],
    proxy: ProxySet,
    account: Account | None = None,
) -> Iterator[str]:
    """The privacy lines of a plan: noise, steps and epsilon after each round.

    Args:
        settings: what was agreed.
        clients: those whose rows are at hand.
        proxy: the public rows.
        account: of a real site, with what it spent before.
    """
    how = settings.privacy
    if how.mechanism == "central-gauss":
        yield from _central(settings)
        return
    if how.mechanism not in PRIVATE:
        yield f"privacy   {STATEMENTS[how.mechanism]} (projected epsilon: infinite)"
        return
    own = {client.terms.mechanism for client in clients if client.terms is not None}
    for name in sorted(own) or [how.mechanism]:
        yield f"privacy   {name}: {STATEMENTS[name]}"
    told: dict[str, list[str]] = {}
    for client in clients:
        for line in _client(settings, client, proxy, account):
            told.setdefault(line, []).append(client.id)
    for line, names in told.items():
        whose = "each client" if len(names) == len(clients) and len(names) > 1 else ", ".join(names)
        yield f"          {line} ({whose})"
    for name in settings.deployment.sites if not clients else ():
        yield f"          {name} plans its own noise and keeps its own ledger"
    if how.rounds and how.rounds < settings.rounds:
        yield f"          rounds after the first {how.rounds} train on no own row and cost nothing"
    yield f"          unit {how.unit}, relation {RELATION}; what it does not hide: docs/privacy.md"


def _client(
    settings: Settings, client: Client, proxy: ProxySet, account: Account | None
) -> Iterator[str]:
    """What one client will spend; equal clients say the same."""
    terms = client.terms
    if terms is None or not len(client.data):
        return
    recipe = client.training
    learner = new_student(
        client.build,
        recipe,
        proxy,
        max(int(client.data.labels.max()) + 1, 2),
        0,
        "cpu",
        client.make,
    )
    assert isinstance(learner, Private)
    asked = np.arange(min(settings.proxy.per_round or len(proxy), len(proxy)))
    quote = learner.quote(client.data, asked)
    past = Spending()
    if account is not None:
        past = account.ledger.worst(learner.units(client.data), terms.delta)
    rounds = terms.rounds
    if isinstance(client.course, Timetable) and not settings.continual.buffer:
        rounds = min(rounds, client.course.left(1) or rounds)
    own = getattr(learner, "forecast", None)
    forecast = own(client.data, asked, rounds) if own else (lambda sigma: quote(sigma) * rounds)
    if terms.sigma is not None:
        sigma = terms.sigma
    else:
        try:
            sigma = noise_for(forecast, past, terms.epsilon, terms.delta)
        except BudgetExceeded as exceeded:
            yield f"REFUSED: {exceeded.detail}"
            return
    yield _noise(quote(sigma), sigma)
    if own:
        total = epsilon(past + forecast(sigma), terms.delta)
        shown = f"epsilon {total:.2f} in all"
    else:
        shown = _course(project(quote, rounds, past, sigma, terms.delta))
    over = "" if terms.sigma is None else f", the limit is {terms.epsilon:g}"
    yield f"{shown}{over}; delta {terms.delta:g}"


def _noise(cost: Spending, sigma: float) -> str:
    steps = [(event, times) for event, times in cost if isinstance(event, Sampled)]
    if steps:
        event, times = steps[0]
        whose = "of all rows" if event.rate == 1 else f"each row in {event.rate:.0%} of them"
        steps_ = f"{times} noisy step{'s' * (times > 1)} a round"
        return f"{steps_}, {whose}, noise {sigma:g}"
    return f"noisy answers, noise {sigma:g} votes"


def _course(projection: Projection) -> str:
    """Epsilon after the rounds, the first few and the last."""
    after = projection.after
    few = [f"{value:.2f}" for value in after[:MOST_SHOWN]]
    if len(after) > MOST_SHOWN:
        few = [*few[: MOST_SHOWN - 1], "...", f"{after[-1]:.2f}"]
    before = f" on top of {projection.spent:.2f}" if projection.spent else ""
    return f"epsilon {', '.join(few)} after rounds 1 to {len(after)}{before}"


def _central(settings: Settings) -> Iterator[str]:
    """What noise at the server costs and does."""
    yield f"privacy   central-gauss: {STATEMENTS['central-gauss']}"
    clients = max(1, round(settings.clients.participation * settings.clients.count))
    asked = min(settings.proxy.per_round or settings.proxy.rows, settings.proxy.rows)
    delta = settings.privacy.delta or SMALLEST_DELTA
    sigma = settings.privacy.sigma or noise_for(
        lambda noise: cost(noise, settings.rounds), Spending(), settings.privacy.epsilon, delta
    )
    yield f"          {describe_central(clients, asked, sigma)}"
    total = epsilon(cost(sigma, settings.rounds), delta)
    yield f"          epsilon {total:.2f} after {settings.rounds} rounds; delta {delta:g}"
    yield "          unit client, relation replace-one"
