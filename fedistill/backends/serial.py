"""One client after another in this process: the reference semantics of every other backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedistill.backends import Reply
from fedistill.client import Site
from fedistill.errors import Rejected
from fedistill.types import ProxySet
from fedistill.wire.messages import Failure, Plan


class Serial:
    """Asks the sites one by one, in the order of the plan.

    What a site refuses is its failure. A model that raises ends the simulation with its trace:
    that is a bug to be seen, and here the one who wrote it is looking.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        """One reply or failure for every client asked."""
        measured: dict[ProxySet, str] = {}  # rows that clients share are measured once a round
        for name in plan.clients:
            site = self.sites[name]
            if site.proxy not in measured:
                measured[site.proxy] = site.proxy.measure()
            try:
                yield Reply(name, site.answer(plan.message(name), measured[site.proxy]))
            except Rejected as refusal:
                yield Failure(name, plan.round, refusal.reason)
