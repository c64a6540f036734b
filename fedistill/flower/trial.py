"""A rehearsal of a deployment on this machine: ``fedistill deploy trial``.

The folders that the parties will get are copied, and started with the scripts that the parties
will start them with: TLS, node keys, a process tree for every site. Only addresses differ.
Everything that was started is stopped at the end, and nothing else is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedistill import config, store
from fedistill.deployment import STATE
from fedistill.errors import RunError
from fedistill.flower import launch, processes
from fedistill.flower.bundle import SIMULATION
from fedistill.flower.processes import Child
from fedistill.privacy.ledger import LEDGER, Ledger
from fedistill.privacy.terms import PRIVATE
from fedistill.runs import Show, Summary, silent

TRIAL = "trial"
STOPPING = 70.0
"""Seconds a SuperLink may take to stop while somebody reads its log."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A deployment that runs on loopback.

    Attributes:
        folder: the copy it runs in, with ``coordinator`` and ``sites/ID``.
        port: of the SuperLink.
        children: every program that was started, the SuperLink first.
    """

    folder: Path
    port: int
    children: list[Child] = field(default_factory=list)
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        """The coordinator's folder."""
        return self.folder / "coordinator"

    @property
    def sites(self) -> list[str]:
        """Ids of the sites."""
        return sorted(path.name for path in (self.folder / "sites").iterdir())

    def start_superlink(self) -> Child:
        """Start the SuperLink, and wait until it answers."""
        link = self._start("superlink", self.coordinator, "start-superlink.sh")
        processes.wait_until_healthy(
            link, f"https://127.0.0.1:{self.port}", ca=self.coordinator / "ca.crt"
        )
        return link

    def register(self) -> None:
        """Make the sites' keys known to the SuperLink."""
        code, text = processes.output_of(
            ["sh", "register-sites.sh"], env=self.environment(), cwd=self.coordinator
        )
        if code:
            last = text.strip().splitlines()[-1:] or [f"exit code {code}"]
            raise RunError(f"the sites' keys cannot be registered ({last[0]}): see {self.folder}")

    def start_site(self, site: str) -> Child:
        """Start one site."""
        self.ports[site] = self.ports.get(site) or processes.free_port()
        return self._start(
            site, self.folder / "sites" / site, "start.sh", FEDISTILL_NODE_PORT=self.ports[site]
        )

    def environment(self, **more: object) -> dict[str, str]:
        """What the scripts are told in place of the real addresses."""
        told = {
            "FEDISTILL_LISTEN": "127.0.0.1",
            "FEDISTILL_PORT": self.port,
            "FEDISTILL_SUPERLINK": f"127.0.0.1:{self.port}",
            "FEDISTILL_VENV": sys.prefix,
        }
        return os.environ | {key: str(value) for key, value in (told | more).items()}

    def _start(self, name: str, folder: Path, script: str, **more: object) -> Child:
        log = self.folder / "logs" / f"{name}.log"
        env = self.environment(**more)
        child = processes.start(name, ["sh", script], log, env=env, cwd=folder)
        self.children.append(child)
        return child

    def run(self, *, rounds: int | None = None, resume: bool = False, show: Show) -> Summary:
        """Run the federation, as the coordinator will."""
        file = self.coordinator / "federation.toml"
        settings = config.load(file)
        settings = dataclasses.replace(
            settings,
            rounds=rounds or settings.rounds,
            deployment=dataclasses.replace(settings.deployment, superlink=f"127.0.0.1:{self.port}"),
        )
        out = self.coordinator / "run"
        return launch.run(settings, file, name="trial", out=out, resume=resume, show=show)


@contextlib.contextmanager
def rehearse(folder: Path) -> Iterator[Trial]:
    """A fresh copy of a deployment's folders; whatever is started in it is stopped at the end.

    Raises:
        RunError: ``folder`` is no deployment.
    """
    if not (folder / "coordinator" / "federation.toml").is_file() or not any(
        (folder / "sites").glob("*/site.toml")
    ):
        raise RunError(
            f"{folder}: expected the folders of a deployment, found none: "
            f"fedistill deploy init {folder} --sites a,b,c writes them"
        )
    copy = folder / TRIAL
    with store.held(folder):
        if copy.exists():
            shutil.rmtree(copy)
        copy.mkdir(mode=0o700)
        for part in ("coordinator", "sites"):
            shutil.copytree(folder / part, copy / part, symlinks=True)
        trial = Trial(copy.resolve(), processes.free_port())
        try:
            yield trial
        finally:
            for child in trial.children[1:]:
                child.ask_to_stop()
            for child in reversed(trial.children):
                child.stop(STOPPING)


def trial(
    folder: Path,
    *,
    rounds: int | None = None,
    show: Show = silent,
    say: Callable[[str], None] = print,
) -> Summary:
    """Start everything on loopback, run the federation, compare it with the simulation, stop.

    Args:
        folder: what ``fedistill deploy init`` wrote.
        rounds: number of rounds; None: as many as were agreed on.
        show: shows the rounds.
        say: tells what is being done.

    Raises:
        RunError: something does not start, or the run broke off.
        BudgetExhausted: all sites have spent their privacy budget.
        LedgerError: the privacy ledger of a site does not hold.
    """
    mechanism = config.load(folder / "coordinator" / "federation.toml").privacy.mechanism
    with rehearse(folder) as ours:
        say(f"starting a SuperLink and {len(ours.sites)} sites on loopback, TLS and node keys")
        ours.start_superlink()
        ours.register()
        for site in ours.sites:
            ours.start_site(site)
        summary = ours.run(rounds=rounds, show=show)
        for line in accounts(ours.folder, ours.sites):
            say(line)
    say(f"soft targets {summary['soft_targets_sha256']}")
    if mechanism in (*PRIVATE, "central-gauss"):
        say("noise comes from the operating system: no two private runs give the same soft targets")
    elif (folder / SIMULATION).is_file():
        same = _simulated(folder, summary["rounds"]) == summary["soft_targets_sha256"]
        if not same:
            raise RunError(
                "the simulation of the same federation gives other soft targets: were rows or "
                f"settings changed since deploy init? see {folder / SIMULATION}"
            )
        say("the serial backend gives the same soft targets, to the bit")
    return summary


def accounts(folder: Path, sites: Sequence[str]) -> Iterator[str]:
    """A line for every site that keeps a privacy ledger, once that is proved.

    Args:
        folder: with ``sites/ID``.
        sites: their ids.

    Raises:
        LedgerError: a ledger does not hold.
    """
    for site in sites:
        path = folder / "sites" / site / STATE / LEDGER
        if not path.exists():
            continue
        with contextlib.closing(Ledger(path)) as ledger:
            ledger.verify()
            entries = ledger.entries()
            deltas = [entry.delta for entry in entries if entry.kind == "reserve"]
            released = sum(entry.kind == "release" for entry in entries)
            spent = max((ledger.spent(delta) for delta in set(deltas) if delta), default=0.0)
        yield (
            f"{site}: its ledger holds, {len(deltas)} steps charged, {released} released, "
            f"epsilon {spent:.2f}"
        )


def _simulated(folder: Path, rounds: int) -> str:
    """The soft targets of the same federation as a simulation."""
    from fedistill import experiment

    settings = dataclasses.replace(config.load(folder / SIMULATION), rounds=rounds)
    out = folder / TRIAL / "simulation"
    told: str = experiment.run(settings, name="simulation", out=out)["soft_targets_sha256"]
    return told
