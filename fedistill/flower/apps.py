"""The two Flower apps: thin shells around a site and a federation.

Without arguments they serve what ``fedistill deploy init`` and ``fedistill run`` set up. With
them they serve your own: hand :func:`client_app` a function that makes a :class:`fedistill.Site`
and :func:`server_app` one that makes a :class:`fedistill.Federation`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedistill.client import Site
from fedistill.errors import Rejected
from fedistill.federation import Federation
from fedistill.flower import convert, work
from fedistill.flower.backend import FlowerBackend
from fedistill.flower.roster import by_asking, by_key

Config = Mapping[str, Any]


def client_app(site: Callable[[Config, Config], Site] | None = None) -> ClientApp:
    """A Flower ``ClientApp`` that answers the plans of a federation.

    Args:
        site: from ``context.node_config`` and ``context.run_config`` to the site at work; it is
            called for every message, as Flower starts a process for each. Its state must be on
            disk (``site.keep_runs_in(folder)``). None: the folder with a ``site.toml`` that the
            node names as ``site``, or the part of a simulation.
    """
    app = ClientApp()

    @app.train("round")
    def answer(message: Message, context: Context) -> Message:
        return convert.response(message, _answer(site, message, context))

    @app.query("who")
    def who(message: Message, context: Context) -> Message:
        try:
            name = _who(site, message, context)
        except Exception:  # its text must not travel; the log of the plan will tell
            name = ""
        return convert.response(message, {"site": name})

    return app


def _answer(
    site: Callable[[Config, Config], Site] | None, message: Message, context: Context
) -> dict[str, bytes | str]:
    """The fields of the answer to a plan."""
    try:
        plan = convert.plan_of(message)
    except Rejected as refusal:
        return {"reason": refusal.reason}
    if site is not None:
        return work.respond(
            lambda: functools.partial(
                work.answer_from_disk, site(context.node_config, context.run_config)
            ),
            plan,
        )
    if "site" in context.node_config:
        folder = Path(str(context.node_config["site"]))
        return work.at_real_site(folder, plan, message.metadata.ttl)
    from fedistill.flower import simulated

    home = convert.text_of(message, "home")
    return work.respond(lambda: simulated.answering(home, context.node_config), plan)


def _who(site: Callable[[Config, Config], Site] | None, message: Message, context: Context) -> str:
    """The id of the site that a node serves."""
    if site is not None:
        return site(context.node_config, context.run_config).client.id
    if "site" in context.node_config:
        from fedistill.deployment import site_id

        return site_id(Path(str(context.node_config["site"])))
    from fedistill.flower import simulated

    return simulated.site_id(convert.text_of(message, "home"), context.node_config)


def server_app(
    federation: Callable[[Config], Federation] | None = None,
    *,
    rounds: int = 10,
    deadline: float = 600.0,
    keys: str | Path | None = None,
    **options: Any,
) -> ServerApp:
    """A Flower ``ServerApp`` that runs a federation over the nodes of the grid.

    Args:
        federation: from ``context.run_config`` to the federation, with a
            :class:`fedistill.Member` for every site. The student trains as its ``training`` says:
            there is no first client to take that from. None: what ``fedistill run`` started.
        rounds: number of rounds.
        deadline: seconds that a site has to answer.
        keys: folder of the sites' public keys, ``ID.pub``: for real sites with node
            authentication. None: nodes are asked who they are, and believed.
        options: further arguments of :meth:`fedistill.Federation.run`, such as ``test`` or ``out``.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if federation is None:
            from fedistill.flower import jobs, serve

            serve.serve(grid, jobs.pick_up(str(context.run_config["job"])))
            return
        ours = federation(context.run_config)
        names = tuple(member.id for member in ours.members)
        roster = by_key(Path(keys), names) if keys is not None else by_asking(names)
        backend = FlowerBackend(grid, roster, deadline=deadline)
        for _ in ours.run(rounds, backend=lambda sites: backend, **options):
            pass

    return app
