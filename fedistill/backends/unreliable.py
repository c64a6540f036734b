"""Clients that are lost or late, simulated around another backend.

Who is offline and who is late is drawn from the seed, the client and the round; who is busy, and
which upload is still on its way, follows from what the sites hold. Nothing is kept between rounds,
so a run that is killed and resumed meets the same losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from fedistill import store
from fedistill.backends import Backend, Reply
from fedistill.client import Site
from fedistill.dormant import standing
from fedistill.seeding import generator
from fedistill.wire.messages import Failure, Plan

Factory = Callable[[Mapping[str, Site]], Backend]


class Unreliable:
    """A backend whose clients may be offline in a round, or answer it some rounds later.

    * Offline (``dropout``): the client does not get the plan. Asked again in a further attempt at
      the round it may be back; whoever has answered in one attempt answers in the next.
    * Late (``stragglers``): it gets the plan, absorbs and trains, and its upload misses the
      deadline. Until that arrives it is busy with it and gets no other plan. ``lateness`` rounds
      after its own the upload comes before all answers, whether or not its client is asked then;
      the client is free from that round on.

    Args:
        inner: what runs the clients that are there.
        sites: the clients at work.
        seed: of the experiment.
        dropout: share of those asked who are offline, each on its own.
        stragglers: share of those who answer whose upload is late, each on its own.
        lateness: rounds by which it is late, at least 1.
    """

    def __init__(
        self,
        inner: Backend,
        sites: Mapping[str, Site],
        *,
        seed: int,
        dropout: float = 0.0,
        stragglers: float = 0.0,
        lateness: int = 1,
    ) -> None:
        self.inner = inner
        self.sites = sites
        self.seed = seed
        self.dropout = dropout
        self.stragglers = stragglers
        self.lateness = lateness
        self.notes = list(getattr(inner, "notes", ()))
        self._now = ("", 0)
        self._attempt = 0
        self._arriving: list[Reply] = []

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        """Late uploads of an earlier round, then one reply or failure for every client asked."""
        if self._now == (plan.run, plan.round):
            self._attempt += 1
        else:
            # Before anybody is asked: a client that answers this round forgets its last answer.
            self._arriving = list(self._late_uploads(plan))
            self._now, self._attempt = (plan.run, plan.round), 0
        yield from self._arriving
        there = []
        for name in plan.clients:
            if self._offline(name, plan.round):
                yield Failure(name, plan.round, "offline", asked=0)
            elif self._busy(name, plan):
                yield Failure(name, plan.round, "busy", asked=0)
            else:
                there.append(name)
        for reply in self.inner.run(dataclasses.replace(plan, clients=tuple(there))):
            if isinstance(reply, Reply) and self._late(reply.client, plan.round):
                yield Failure(reply.client, plan.round, "deadline", asked=reply.asked)
            else:
                yield reply

    def _offline(self, name: str, number: int) -> bool:
        """Whether a client is away, in this attempt as in all before it at the round."""
        if not self.dropout:
            return False
        draws = generator(self.seed, "dropout", name, number).random(self._attempt + 1)
        return bool((draws < self.dropout).all())

    def _late(self, name: str, number: int) -> bool:
        """Whether what a client answers in a round is late."""
        if not self.stragglers:
            return False
        return bool(generator(self.seed, "straggler", name, number).random() < self.stragglers)

    def _busy(self, name: str, plan: Plan) -> bool:
        """Whether the last answer of a client is still on its way."""
        site = standing(self.sites, name)
        since = plan.round - site.round
        return (
            site.run == plan.run
            and 0 < since < self.lateness
            and site.refusal is None
            and self._late(name, site.round)
        )

    def _late_uploads(self, plan: Plan) -> Iterator[Reply]:
        """What was answered ``lateness`` rounds ago and arrives now."""
        number = plan.round - self.lateness
        if number < 1:
            return
        for name in self.sites:
            if standing(self.sites, name).round not in {number, plan.round}:
                continue  # it was not asked then, and need not be looked at
            if self._late(name, number) and (data := _answer(self.sites[name], plan, number)):
                yield Reply(name, data, asked=0)


def unreliable(
    inner: Factory,
    *,
    seed: int,
    dropout: float = 0.0,
    stragglers: float = 0.0,
    lateness: int = 1,
) -> Factory:
    """From what runs the sites to what runs them unreliably; see :class:`Unreliable`."""

    def wrapped(sites: Mapping[str, Site]) -> Backend:
        return Unreliable(
            inner(sites),
            sites,
            seed=seed,
            dropout=dropout,
            stragglers=stragglers,
            lateness=lateness,
        )

    return wrapped


def _answer(site: Site, plan: Plan, number: int) -> bytes:
    """What a site answered in an earlier round of the run, if that was its last before this one.

    A run that was killed in the present round may find a site that has answered it already; the
    answer before is then in the generation of its state before.
    """
    if (site.run, site.round) == (plan.run, number):
        return site.upload
    if (site.run, site.round) != (plan.run, plan.round) or site.path is None:
        return b""
    before = store.previous(site.path)
    if not before.exists():
        return b""
    arrays, facts, _ = store.load_state(before)
    if (facts["run"], facts["round"]) != (plan.run, number):
        return b""
    return arrays["upload"].tobytes()
