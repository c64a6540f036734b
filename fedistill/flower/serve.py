"""The server's side of a run on Flower: what the ``ServerApp`` process does.

``fedistill run`` submits the app and waits; here, where the grid is, the experiment runs as it
always does, with the grid as what runs the clients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedistill import config, experiment
from fedistill.backends import Backend, Reply
from fedistill.client import Site
from fedistill.config import Settings
from fedistill.experiment import Engine
from fedistill.flower.backend import FlowerBackend
from fedistill.flower.outcome import outcome_in
from fedistill.flower.roster import by_asking, by_key
from fedistill.spent import EXHAUSTED
from fedistill.wire.messages import Failure, Plan

SIMULATED_DEADLINE = 24 * 3600.0
"""A simulation waits for its slowest client: nobody there is offline."""


def serve(grid: Grid, job: Mapping[str, Any]) -> None:
    """Run an experiment over a grid.

    Args:
        grid: Flower's.
        job: ``settings`` (path), ``folder`` (that relative paths start from), ``out``, ``name``,
            ``resume``, and ``outcome``, the file that says how it ended.
    """
    with outcome_in(Path(str(job["outcome"]))), contextlib.chdir(str(job["folder"])):
        settings = config.load(str(job["settings"]))
        engine = real_sites(grid, settings) if settings.deployment.sites else simulated(grid)
        experiment.run(
            settings,
            name=str(job["name"]),
            out=str(job["out"]),
            resume=bool(job["resume"]),
            engine=engine,
        )


def real_sites(grid: Grid, settings: Settings) -> Engine:
    """Sites known by their keys, with a deadline."""
    agreed = settings.deployment
    roster = by_key(Path(agreed.keys), agreed.sites)
    backend = FlowerBackend(grid, roster, deadline=agreed.deadline, grace=agreed.grace)
    return lambda folder: lambda sites: backend


def simulated(grid: Grid) -> Engine:
    """Nodes of the simulation engine, with the clients' states on the disk that all share."""

    def engine(folder: Path) -> Callable[[Mapping[str, Site]], Backend]:
        home = {"home": str(folder.resolve())}

        def over(sites: Mapping[str, Site]) -> Backend:
            roster = by_asking(tuple(sites), extra=home)
            asked = FlowerBackend(grid, roster, deadline=SIMULATED_DEADLINE, pause=0.02, extra=home)
            return FromDisk(asked, sites)

        return over

    return engine


class FromDisk:
    """A backend whose clients work elsewhere; what they learned is read back, to be measured.

    Args:
        asked: what runs the clients.
        sites: the same clients in this process, with their states on the same disk.
    """

    def __init__(self, asked: Backend, sites: Mapping[str, Site]) -> None:
        self.asked = asked
        self.sites = sites

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        """One reply or failure for every client asked."""
        for outcome in self.asked.run(plan):
            if isinstance(outcome, Failure) and outcome.reason == EXHAUSTED:
                self.sites[outcome.client].exhausted = True
            yield outcome
        for name in plan.clients:
            self.sites[name].restore(plan.run, plan.round + 1)
