"""Trials of a deployment under faults: real SuperLink, SuperNodes and ServerApp, the kit's scripts.

`python tests/flower/chaos.py SCENARIO --rounds 10 --seed 0` runs one by hand and prints what was
seen; `test_chaos.py` runs short forms. `World` starts the parties and keeps them running as
systemd would. Faults come from outside (signals, networks, files) or from `bin/` of a site's own
folder, where a program of this file stands in the place of `flwr-clientapp` or `flower-supernode`.

Every upload is noted twice in a journal: at its site before it leaves, and at the coordinator's
door as it arrives. So it can be proved that no site answered one round in two ways.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedistill import config
from fedistill.log import read_events

HERE = Path(__file__).resolve()
RESTART = 10.0
"""Seconds that a unit stays down: RestartSec of the kit's units."""
PATIENCE = 1500.0
"""Seconds after which a trial that does not get on is given up: no more than a stop for a hang."""
SMALL = """
seed = 7
rounds = 2
[data]
source = "digits"
test_rows = 360
[proxy]
rows = 200
[clients]
alpha = 1.0
width = 32
epochs = 3
batch_size = 20
[student]
width = 64
batch_size = 20
epochs = 8
"""
PRIVATE = """
[privacy]
mechanism = "dpsgd"
epsilon = 8
purpose = "a trial"
"""
Fact = dict[str, Any]


# --- the journal ---------------------------------------------------------------------------------


def note(journal: str | Path, **facts: Any) -> None:
    """One line at the end of the journal, on the disk before this returns."""
    line = json.dumps(facts | {"time": time.time(), "pid": os.getpid()}).encode() + b"\n"
    handle = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def noted(journal: str | Path, **wanted: Any) -> list[Fact]:
    """Lines of the journal that have these values."""
    try:
        lines = Path(journal).read_text().splitlines()
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines]
    return [one for one in found if all(one.get(key) == value for key, value in wanted.items())]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


DOOR = """\
import sys

from fedistill.flower import client_app, convert, server_app

sys.path.insert(0, {tests!r})
from chaos import fall_while_combining, note, note_upload

note({journal!r}, what="imported", by=sys.argv[0])
fall_while_combining({journal!r}, {falls!r})
heard = convert.heard


def heard_and_noted(site, number, message):
    reply = heard(site, number, message)
    if hasattr(reply, "data"):
        note_upload({journal!r}, "arrived", site, number, reply.data)
    return reply


convert.heard = heard_and_noted
client = client_app()
server = server_app()
"""
"""The Flower app of the coordinator, which notes what arrives before our own door opens it."""


def fall_while_combining(journal: str, number: int) -> None:
    """End the server with kill -9 once, when uploads are combined and the student is not taught."""
    from fedistill.server import Server

    distil = Server.distil

    def falling(server: Any, plan: Any = None) -> None:
        known = noted(journal, what="fault", kind="die-combining")
        if server.round == number and not known:
            note(journal, what="fault", kind="die-combining", site="coordinator", round=number)
            os.kill(os.getpid(), signal.SIGKILL)
        distil(server, plan)

    Server.distil = falling  # type: ignore[method-assign]


def note_upload(journal: str, what: str, site: str, number: int, data: bytes) -> None:
    """Note an upload by its hash, with the run and round that it claims."""
    from fedistill.wire.messages import Upload

    try:
        upload = Upload.from_bytes(data, 64 << 20)
        claims = {"run": upload.run, "round": upload.round, "payload": sha(upload.payload)}
    except Exception:
        claims = {"run": "?", "round": number}
    note(journal, what=what, site=site, sha=sha(data), size=len(data), during=number, **claims)


def two_answers(journal: str | Path) -> list[str]:
    """Rounds that one site answered with two different uploads, at its own side or at the door."""
    told: dict[tuple[str, int, str], set[str]] = {}
    for line in noted(journal):
        if line["what"] in {"answered", "arrived"}:
            told.setdefault((line["run"], line["round"], line["site"]), set()).add(line["sha"])
    return [f"{site} round {number}" for (_, number, site), ways in told.items() if len(ways) > 1]


# --- programs that stand in the bin/ of a site ----------------------------------------------------


def as_clientapp(faults: Sequence[str], journal: str, rest: Sequence[str]) -> None:
    """`flwr-clientapp` of a site, with faults such as `hang@2` (once, in round 2) or `nan@*`."""
    from fedistill.client import Site
    from fedistill.flower import pinned
    from fedistill.privacy.ledger import Ledger
    from fedistill.wire.messages import Plan

    def due(kind: str, number: int) -> str | None:
        """The argument of a fault that falls now; each falls once a round, `*` in every one."""
        for fault in faults:
            what, _, when = fault.partition("@")
            what, _, value = what.partition(":")
            if what != kind or when not in {"*", str(number)}:
                continue
            if when != "*" and noted(journal, what="fault", kind=kind, site=name, round=number):
                continue
            note(journal, what="fault", kind=kind, site=name, round=number)
            return value
        return None

    answer, train = Site.answer, Site.train
    name = Path.cwd().name  # the folder is the site's own, whatever id it claims

    def answering(site: Any, message: bytes) -> bytes:
        plan = Plan.from_bytes(message)
        note(journal, what="asked", site=name, run=plan.run, round=plan.round)
        upload = answer(site, message)
        if due("truncate", plan.round) is not None:
            upload = upload[:-100]
        if (size := due("big", plan.round)) is not None:
            upload += bytes(int(size))
        if due("replay", plan.round) is not None:
            upload = bytes.fromhex(noted(journal, what="kept", site=name)[0]["bytes"])
        else:
            note_upload(journal, "answered", name, plan.round, upload)
        if any(fault.startswith("replay") for fault in faults):
            note(journal, what="kept", site=name, bytes=upload.hex())
        if due("die-saved", plan.round) is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return upload

    def training(site: Any, plan: Any) -> None:
        if due("hang", plan.round) is not None:
            # As foreign code that never returns: Python is not there to notice a signal.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            ctypes.CDLL(None).sleep(1_000_000)
        if (seconds := due("slow", plan.round)) is not None:
            time.sleep(float(seconds))
        train(site, plan)
        if due("die-training", plan.round) is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    keep, note_release = Site.save, Ledger.release

    def saving(site: Any) -> None:
        if due("die-saving", site.round) is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        keep(site)

    def releasing(ledger: Any, entry: Any, digest: str) -> None:
        if due("die-noting", entry.round) is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        note_release(ledger, entry, digest)
        if due("die-noted", entry.round) is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    Site.answer = answering  # type: ignore[method-assign]
    Site.train = training  # type: ignore[method-assign]
    Site.save = saving  # type: ignore[method-assign]
    Ledger.release = releasing  # type: ignore[method-assign]
    sys.argv = ["flwr-clientapp", *rest]
    pinned.main()


def as_supernode(faults: Sequence[str], journal: str, rest: Sequence[str]) -> None:
    """`flower-supernode` of a site: `die-pushing@2` ends it in the middle of its second upload."""
    from flwr.supernode import start_client_internal as node
    from flwr.supernode.cli import flower_supernode

    push = node.push_object_contents_from_iterable
    site = Path.cwd().name

    def pushing(contents: Any, push_object_fn: Any) -> None:
        # The message is announced already; what it holds follows here, piece by piece.
        pieces = list(contents)
        note(journal, what="pushing", site=site, pieces=len(pieces))
        turn = len(noted(journal, what="pushing", site=site))
        if f"die-pushing@{turn}" in faults:
            push(iter(pieces[:-1]), push_object_fn)
            note(journal, what="fault", kind="die-pushing", site=site, round=turn)
            os.killpg(os.getpgid(0), signal.SIGKILL)
        push(iter(pieces), push_object_fn)

    node.push_object_contents_from_iterable = pushing
    sys.argv = ["flower-supernode", *rest]
    flower_supernode()


STAND_IN = """\
#!/bin/sh
exec python3 -P '{file}' as-{program} '{faults}' '{journal}' "$@"
"""


# --- processes -----------------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    """Descendants of a process that live now, the eldest first."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                text = (entry / "stat").read_text()
                parent = int(text.rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        below = parents.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def birth_of(pid: int) -> str:
    """What tells a process from a later one with its number; empty: it is gone, or a zombie."""
    with suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if words[0] == "Z" else words[19]
    return ""


# --- a federation that is kept running -----------------------------------------------------------


@dataclass
class Unit:
    """A service: started again after a pause, whatever it ended with."""

    start: Callable[[], Any]
    child: Any = None
    due: float = 0.0
    starts: int = 0
    wanted: bool = True


@dataclass
class World:
    """A rehearsed deployment whose parties are kept running, in one thread, while others fall."""

    trial: Any
    restart: float = RESTART
    watched: bool = True
    units: dict[str, Unit] = field(default_factory=dict)
    coordinator: Any = None
    seen: dict[int, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def journal(self) -> Path:
        return Path(self.trial.folder) / "journal.jsonl"

    @property
    def run_folder(self) -> Path:
        return Path(self.trial.coordinator) / "run"

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:6.1f} s  {text}"
        self.log.append(line)
        print(line, flush=True)

    # settings of the parties

    def agree(self, *, falls: int = 0, **parts: Any) -> None:
        """Change `federation.toml` of the coordinator: `rounds=3`, `deployment={...}`.

        The ServerApp dies once while it combines round `falls`.
        """
        from fedistill.flower.bundle import write_app

        file = self.trial.coordinator / "federation.toml"
        settings = config.load(file)
        where = {"superlink": f"127.0.0.1:{self.trial.port}"} | parts.pop("deployment", {})
        for name, values in (parts | {"deployment": where}).items():
            if isinstance(values, Mapping):
                parts[name] = dataclasses.replace(getattr(settings, name), **values)
        file.write_text(config.to_toml(dataclasses.replace(settings, **parts)))
        if not self.watched:
            return
        app = write_app(self.trial.coordinator / "app")
        (app / "fdapp" / "apps.py").write_text(
            DOOR.format(tests=str(HERE.parent), journal=str(self.journal), falls=falls)
        )

    def site_folder(self, site: str) -> Path:
        return Path(self.trial.folder) / "sites" / site

    def set_site(self, site: str, **parts: Any) -> None:
        """Change `site.toml`: `policy={"seconds": 20.0}`, `id="b"`."""
        file = self.site_folder(site) / "site.toml"
        settings = config.load_site(file)
        for name, values in parts.items():
            if isinstance(values, Mapping):
                parts[name] = dataclasses.replace(getattr(settings, name), **values)
        file.write_text(config.to_toml(dataclasses.replace(settings, **parts)))

    def plant(self, site: str, *faults: str, program: str = "clientapp") -> None:
        """Put a program with faults into a site's `bin/`; without any it keeps the journal."""
        name = {"clientapp": "flwr-clientapp", "supernode": "flower-supernode"}[program]
        place = self.site_folder(site) / "bin" / name
        place.write_text(
            STAND_IN.format(
                file=HERE, program=program, faults=",".join(faults), journal=self.journal
            )
        )
        place.chmod(0o755)

    def set_environment(self, site: str, **values: object) -> None:
        """Set variables for all programs of one site."""
        script = self.site_folder(site) / "start.sh"
        told = "".join(f'export {name}="{value}"\n' for name, value in values.items())
        script.write_text(script.read_text().replace("set -eu\n", f"set -eu\n{told}"))

    # starting and keeping

    def open(self, sites: Sequence[str] | None = None) -> None:
        """SuperLink, keys, sites."""
        for site in self.trial.sites:
            program = self.site_folder(site) / "bin" / "flwr-clientapp"
            if self.watched and "as-clientapp" not in program.read_text():
                self.plant(site)
        self.keep("superlink", self.trial.start_superlink)
        self.trial.register()
        for site in self.trial.sites if sites is None else sites:
            self.keep(site, lambda site=site: self.trial.start_site(site))

    def keep(self, name: str, start: Callable[[], Any]) -> None:
        """Start a unit, and again whenever it has ended."""
        self.units[name] = Unit(start, start(), starts=1)

    def supervise(self) -> None:
        """What systemd does, once."""
        for name, unit in self.units.items():
            if unit.child.running:
                for pid in (unit.child.process.pid, *children_of(unit.child.process.pid)):
                    if pid not in self.seen and (birth := birth_of(pid)):
                        self.seen[pid] = birth
            elif unit.wanted and not unit.due:
                unit.due = time.monotonic() + self.restart
                self.say(f"{name} ended ({unit.child.process.returncode})")
            elif unit.wanted and time.monotonic() >= unit.due:
                unit.due = 0.0
                unit.child = unit.start()
                unit.starts += 1

    def until(self, true: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
        """Keep everything running until something is so."""
        end = time.monotonic() + patience
        while not (found := true()):
            self.supervise()
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {patience:g} s\n{self.told()}")
            time.sleep(0.1)
        return found

    def rest(self, seconds: float) -> None:
        """Keep everything running for a while."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end, "time")

    def kill(self, name: str) -> None:
        """kill -9 of a unit and of all in its process group."""
        self.supervise()
        self.say(f"kill -9 {name}")
        self.units[name].child.kill()

    def stop(self, name: str) -> None:
        """Take a unit out for good, at once."""
        self.units[name].wanted = False
        self.units[name].child.kill()

    # the run

    def submit(self, *more: str) -> None:
        """`run.sh`, as the coordinator's administrator calls it."""
        from fedistill.flower import processes

        self.say(f"run.sh {' '.join(more)}")
        log = self.trial.folder / "logs" / "run.log"
        self.coordinator = processes.start(
            "run.sh",
            ["sh", "run.sh", *more],
            log,
            env=self.trial.environment(),
            cwd=self.trial.coordinator,
        )
        self.trial.children.append(self.coordinator)

    def finish(self) -> Fact:
        """Wait for the end of the run; its summary.

        Raises:
            AssertionError: it did not end well.
        """
        self.until(lambda: not self.coordinator.running, "the end of the run")
        code = self.coordinator.process.returncode
        assert code == 0, f"run.sh ended with {code}\n{self.told()}"
        self.say("the run is done")
        return self.summary()

    def finish_whatever_happens(self) -> Fact:
        """As `finish`, with `--resume` after each end with an error, as an administrator would."""
        while True:
            self.until(lambda: not self.coordinator.running, "the end of the run")
            if self.coordinator.process.returncode == 0:
                self.say("the run is done")
                return self.summary()
            self.say(f"run.sh ended ({self.coordinator.process.returncode})")
            self.resume()

    def resume(self) -> None:
        """`run.sh --resume`, once the old one has ended."""
        self.until(lambda: not self.coordinator.running, "the end of run.sh")
        self.submit("--resume")

    def server_process(self) -> int | None:
        """Number of the ServerApp's process, found below the SuperLink."""
        below = children_of(self.units["superlink"].child.process.pid)
        return next((pid for pid in below if "flwr-serverapp" in command_of(pid)), None)

    def kill_server(self) -> None:
        """kill -9 of the process that combines and teaches.

        Where it has just fallen by itself there is none until the run goes on.
        """
        while not (pid := self.server_process()):
            self.until(lambda: self.server_process() or not self.coordinator.running, "a ServerApp")
            if not self.coordinator.running:
                self.resume()
        self.say("kill -9 coordinator (ServerApp)")
        os.kill(pid, signal.SIGKILL)

    def summary(self) -> Fact:
        found: Fact = json.loads((self.run_folder / "summary.json").read_text())
        return found

    def rows(self) -> list[Fact]:
        with suppress(FileNotFoundError):
            text = (self.run_folder / "rounds.jsonl").read_text()
            return [json.loads(line) for line in text.splitlines()]
        return []

    def events(self, name: str, **wanted: Any) -> list[Fact]:
        """Events of the coordinator."""
        found = read_events(self.run_folder / "events.jsonl", last=10_000)
        return [
            one
            for one in found
            if one["event"] == name and all(one.get(key) == want for key, want in wanted.items())
        ]

    def site_events(self, site: str, name: str) -> list[Fact]:
        found = read_events(self.site_folder(site) / "state" / "events.jsonl", last=10_000)
        return [one for one in found if one["event"] == name]

    def wait_for_round(self, number: int) -> None:
        """Wait until sites are asked for a round, or it is done already."""
        self.until(
            lambda: (
                self.events("round_started", round=number)
                or len(self.rows()) >= number
                or not self.coordinator.running
            ),
            f"round {number}",
        )

    def text_of(self, name: str) -> str:
        """What a party has printed."""
        path = self.trial.folder / "logs" / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def told(self) -> str:
        """The ends of all logs, for a failure."""
        parts = ["\n".join(self.log[-20:])]
        for path in sorted((self.trial.folder / "logs").glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-12:]
            parts.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n".join(parts)

    def leftovers(self) -> list[str]:
        """Processes of this world that live on."""
        return [command_of(pid) for pid, birth in self.seen.items() if birth_of(pid) == birth]


@contextmanager
def world(folder: Path, **options: Any) -> Iterator[World]:
    """A rehearsal of a deployment; at its end nothing is left running."""
    from fedistill.flower.trial import rehearse

    with rehearse(folder) as trial:
        ours = World(trial, **options)
        yield ours
        ours.supervise()
    end = time.monotonic() + 30
    while ours.leftovers() and time.monotonic() < end:
        time.sleep(0.2)
    assert not ours.leftovers(), ours.leftovers()


def deploy(folder: Path, sites: Sequence[str], settings: str = SMALL, **options: Any) -> Path:
    """`fedistill deploy init`."""
    from fedistill.flower.founding import write_deployment

    write_deployment(folder, sites, config.parse(settings), **options)
    return folder


def simulate(folder: Path, rounds: int) -> Fact:
    """The same federation on the serial backend: what came out, and the hash of each upload."""
    from fedistill import experiment
    from fedistill.server import Server

    settings = dataclasses.replace(config.load(folder / "simulation.toml"), rounds=rounds)
    with tempfile.TemporaryDirectory() as scratch:
        journal = Path(scratch) / "journal.jsonl"
        check = Server.check

        def noting(server: Any, data: bytes, plan: Any, sender: str, seen: set[str]) -> Any:
            note_upload(str(journal), "arrived", sender, plan.round, data)
            return check(server, data, plan, sender, seen)

        Server.check = noting  # type: ignore[method-assign]
        try:
            told = experiment.run(settings, name="reference", out=Path(scratch) / "run")
        finally:
            Server.check = check  # type: ignore[method-assign]
        uploads = {f"{one['site']} {one['round']}": one["payload"] for one in noted(journal)}
    return {
        "targets": told["soft_targets_sha256"],
        "student": told["student_accuracy"],
        "uploads": uploads,
    }


def figures(ours: World, summary: Fact) -> Fact:
    """What every trial tells."""
    return {
        "rounds": len(ours.rows()),
        "student": summary["student_accuracy"],
        "targets": summary["soft_targets_sha256"],
        "two_answers": two_answers(ours.journal),
        "dropped": {row["round"]: row["dropped"] for row in ours.rows() if row["dropped"]},
        "seconds": {row["round"]: row["seconds"] for row in ours.rows()},
        "starts": {name: unit.starts for name, unit in ours.units.items()},
        "uploads": {
            f"{one['site']} {one['round']}": one.get("payload")
            for one in noted(ours.journal, what="arrived")
        },
        "faults": [
            f"{one['site']} {one['kind']} {one['round']}"
            for one in noted(ours.journal, what="fault")
        ],
        "given": len(noted(ours.journal, what="answered")),
        "resumed": len(ours.events("run_resumed")),
        "foreign": [
            line["by"] for line in noted(ours.journal, what="imported") if "client" in line["by"]
        ],
    }


# --- scenarios -----------------------------------------------------------------------------------


def undisturbed(folder: Path, *, rounds: int = 2, seed: int = 0) -> Fact:
    """Nothing happens: the soft targets are those of the serial backend."""
    del seed
    with world(folder) as ours:
        ours.agree(rounds=rounds)
        ours.open()
        ours.submit()
        told = figures(ours, ours.finish())
    return told | {"expected": simulate(folder, rounds)}


def kills(
    folder: Path,
    *,
    rounds: int = 2,
    seed: int = 0,
    others: int = 2,
    falls: int = 2,
    restart: float = RESTART,
    **agreed: Any,
) -> Fact:
    """kill -9 of a site in each round, of SuperLink and coordinator `others` times each.

    The coordinator falls once more, while it combines round `falls`.
    """
    dice = random.Random(seed)
    numbers = list(range(1, rounds + 1))
    middle = numbers if rounds < 4 else numbers[:-1]
    links = dice.sample(middle, min(others, len(middle)))
    servers = dice.sample(middle, min(others, len(middle)))
    with world(folder, restart=restart) as ours:
        ours.agree(rounds=rounds, falls=falls, **agreed)
        ours.open()
        ours.submit()
        for number in numbers:
            ours.wait_for_round(number)
            plan = [("site", dice.choice(ours.trial.sites))]
            plan += [("superlink", "superlink")] * (number in links)
            plan += [("server", "")] * (number in servers)
            dice.shuffle(plan)
            for kind, name in plan:
                ours.rest(dice.uniform(0, 8))
                if not ours.coordinator.running:
                    ours.resume()
                    ours.wait_for_round(number)
                if kind == "server":
                    ours.kill_server()
                    ours.resume()
                elif kind == "superlink":
                    ours.kill(name)
                    ours.until(lambda: ours.units["superlink"].child.running, "the SuperLink")
                    ours.resume()
                else:
                    ours.kill(name)
            while len(ours.rows()) < number:
                ours.until(
                    lambda number=number: (
                        len(ours.rows()) >= number or not ours.coordinator.running
                    ),
                    f"the end of round {number}",
                )
                if len(ours.rows()) < number:
                    ours.resume()
            ours.say(f"round {number} is done")
        told = figures(ours, ours.finish_whatever_happens())
        told["log"] = ours.log
    return told | {"expected": simulate(folder, rounds)}


def absent(folder: Path, *, rounds: int = 3, seed: int = 0, restart: float = RESTART) -> Fact:
    """A site is killed in each round, and nobody waits for it: two of three are a quorum."""
    return kills(
        folder,
        rounds=rounds,
        seed=seed,
        others=0,
        falls=0,
        restart=restart,
        clients={"quorum": 2},
        deployment={"deadline": 45.0},
    )


def failing_sites(
    folder: Path,
    *,
    rounds: int = 3,
    seed: int = 0,
    restart: float = RESTART,
    pushing: bool = True,
    erase: bool = False,
) -> Fact:
    """In round 2 one site hangs, one dies in training, one once it has saved, one in its upload.

    All return with their state, and answer. With `erase`, the fifth returns without. A SuperLink
    waits 180 s for the rest of an upload that broke off: without `pushing`, nobody does that.
    """
    del seed
    hangs, trains, saves, pushes, erased = "abcde"
    with world(folder, restart=restart) as ours:
        ours.agree(rounds=rounds, deployment={"grace": 60.0})
        ours.plant(hangs, "hang@2")
        ours.set_site(hangs, policy={"seconds": 40.0})
        ours.plant(trains, "die-training@2")
        ours.plant(saves, "die-saved@2")
        if pushing:
            ours.plant(pushes, "die-pushing@2", program="supernode")
        ours.open()
        ours.submit()
        if erase:
            ours.wait_for_round(2)
            ours.kill(erased)
            shutil.rmtree(ours.site_folder(erased) / "state")
            ours.say(f"{erased}: state erased")
        summary = ours.finish()
        told = figures(ours, summary) | {"log": ours.log}
        told["asked"] = [
            f"{one['site']} {one['round']}" for one in noted(ours.journal, what="asked")
        ]
    return told | {"expected": simulate(folder, rounds)}


def books(ours: World) -> Fact:
    """By site: what its ledger says of what left it, and what the coordinator was told."""
    from fedistill.privacy import audit_log
    from fedistill.privacy.ledger import LEDGER, Ledger

    told = ours.summary()["privacy"]["sites"]
    found: Fact = {}
    for site in ours.trial.sites:
        state = ours.site_folder(site) / "state"
        ledger = Ledger(state / LEDGER)
        ledger.verify()
        entries = ledger.entries()
        paid = [(one.run, one.round) for one in entries if one.kind == "reserve"]
        released = [one for one in entries if one.kind == "release"]
        rounds = [(one.run, one.round) for one in released]
        known = {(one.run, one.round, str(one.release_sha256)[:16]) for one in released}
        left = {
            (one["run"], one["round"], one["sha"])
            for one in noted(ours.journal, site=site)
            if one["what"] in {"answered", "arrived"}
        }
        found[site] = {
            "charged": len(paid),
            "released": len(released),
            "twice": sorted(number for _, number in set(rounds) if rounds.count((_, number)) > 1),
            "unpaid": sorted(number for _, number in set(rounds) - set(paid)),
            "unknown": sorted(number for _, number, _ in left - known),
            "epsilon": ledger.spent(entries[0].delta),
            "told": told[site]["epsilon"],
            "head": ledger.holds(told[site]["head"]) and told[site]["head"] != "",
            "log": [one["event"] for one in audit_log.verify(state / audit_log.NAME).entries],
        }
        ledger.close()
    return found


DEATHS = {"a": "die-training", "b": "die-saving", "c": "die-noting", "d": "die-noted"}
"""Where in a private step which site dies."""


def private(
    folder: Path, *, rounds: int = 4, seed: int = 0, falls: int = 3, restart: float = RESTART
) -> Fact:
    """Private sites that die at every point of a step, and a coordinator that falls.

    In round 2 one dies when it has trained, one as it saves its state, one before the ledger notes
    what is released, one after that; the fifth, with all of its programs, is killed from outside.
    The coordinator falls while it combines round `falls`.
    """
    dice = random.Random(seed)
    other = "e"
    with world(folder, restart=restart) as ours:
        ours.agree(rounds=rounds, falls=falls, deployment={"grace": 60.0})
        for site, death in DEATHS.items():
            ours.plant(site, f"{death}@2")
        ours.open()
        ours.submit()
        ours.wait_for_round(2)
        ours.rest(dice.uniform(0, 6))
        ours.kill(other)
        told = figures(ours, ours.finish_whatever_happens()) | {"log": ours.log}
        told["books"] = books(ours)
    return told


def intruders(folder: Path, *, rounds: int = 2, seed: int = 0) -> Fact:
    """A key that nobody registered, a wrong authority, no TLS, and a site with another's id."""
    del seed
    from fedistill.flower import processes
    from fedistill.flower.kit import keys

    with world(folder) as ours:
        ours.agree(rounds=rounds, clients={"quorum": 2})
        ours.set_site("c", id="a")
        ours.open()

        def intrude(name: str, command: Sequence[str], change: Callable[[Path], None]) -> Any:
            place = ours.trial.folder / "intruders" / name
            shutil.copytree(folder / "sites" / "b", place)
            change(place)
            env = ours.trial.environment(
                FEDISTILL_NODE_PORT=processes.free_port(), FLWR_HOME=place / "state" / "flower"
            )
            log = ours.trial.folder / "logs" / f"{name}.log"
            programs = f"{processes.binary('flwr').parent}{os.pathsep}{os.environ.get('PATH', '')}"
            env |= processes.QUIET | {"PATH": programs}
            child = processes.start(name, command, log, env=env, cwd=place)
            ours.trial.children.append(child)
            return child

        def fresh_key(place: Path) -> None:
            (place / "node.key").write_bytes(keys.node_key()[0])

        def other_authority(place: Path) -> None:
            other = keys.authority("another")[1]
            (place / "ca.crt").write_bytes(keys.certificate_pem(other))

        def plainly(port: int) -> list[str]:
            node = [str(processes.binary("flower-supernode")), "--superlink", f"127.0.0.1:{port}"]
            node += ["--insecure", "--host", "127.0.0.1", "--port", str(processes.free_port())]
            return node

        def unchanged(place: Path) -> None:
            del place

        children = {
            "unregistered": intrude("unregistered", ["sh", "start.sh"], fresh_key),
            "other-authority": intrude("other-authority", ["sh", "start.sh"], other_authority),
            "plain-text": intrude("plain-text", plainly(ours.trial.port), unchanged),
        }
        if nginx():
            door = start_nginx(ours)
            script = f"FEDISTILL_SUPERLINK=127.0.0.1:{door} exec sh start.sh"
            children |= {
                "other-authority-nginx": intrude(
                    "other-authority-nginx", ["sh", "-c", script], other_authority
                ),
                "plain-text-nginx": intrude("plain-text-nginx", plainly(door), unchanged),
            }
        ours.submit()
        told = figures(ours, ours.finish())
        told["running"] = {name: child.running for name, child in children.items()}
        told["said"] = {name: essence(ours.text_of(name)) for name in children}
        told["superlink"] = essence(ours.text_of("superlink"))
        told["nginx"] = essence(ours.text_of("nginx"))
        with suppress(FileNotFoundError):
            told["nginx"] += (
                (ours.trial.coordinator / "logs" / "nginx-refused.log").read_text().splitlines()
            )[:5]
        told["answered"] = sorted({one["site"] for one in ours.events("answered")})
        told["plans"] = {
            name: len(read_events(ours.trial.folder / f"intruders/{name}/state/events.jsonl"))
            for name in children
        }
    return told


def nginx() -> str | None:
    """Where nginx is installed; often not on the path of a user who is not root."""
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin")


def start_nginx(ours: World) -> int:
    """The kit's nginx in front of the SuperLink, on a free port."""
    from fedistill.flower import processes

    port = processes.free_port()
    file = ours.trial.coordinator / "nginx.conf"
    text = file.read_text().replace("127.0.0.1:9091", f"127.0.0.1:{ours.trial.port}")
    file.write_text(text.replace("8443", str(port)))
    log = ours.trial.folder / "logs" / "nginx.log"
    place = ours.trial.coordinator
    env = ours.trial.environment()
    child = processes.start("nginx", ["sh", "start-nginx.sh"], log, env=env, cwd=place)
    ours.trial.children.append(child)
    processes.wait_until_healthy(child, f"https://127.0.0.1:{port}", ca=place / "ca.crt")
    return port


def essence(text: str) -> list[str]:
    """Lines of a log that tell of trouble, each once."""
    words = ("error", "refus", "fail", "warn", "exit code", "code:", "tls", "ssl", "invalid", "401")
    found: dict[str, None] = {}
    for line in text.splitlines():
        if any(word in line.lower() for word in words):
            found.setdefault(line.strip()[:160])
    return list(found)[:12]


def bad_messages(
    folder: Path, *, rounds: int = 3, seed: int = 0, deadline: float = 60.0, slow: float = 62.0
) -> Fact:
    """Late, replayed, cut short and oversized uploads, beside two honest sites."""
    del seed
    late, replays, breaks = "cde"
    with world(folder) as ours:
        ours.agree(
            rounds=rounds,
            clients={"quorum": 2},
            backend={"max_message_mb": 0.5},
            deployment={"deadline": deadline},
        )
        ours.plant(late, f"slow:{slow:g}@1")
        ours.plant(replays, "replay@2")
        ours.plant(breaks, "truncate@1", "big:600000@2")
        ours.open()
        ours.submit()
        told = figures(ours, ours.finish())
        told["log"] = ours.log
        told["answered"] = {
            f"{one['site']} {one['round']}": one["seconds"] for one in ours.events("answered")
        }
        told["late_work_done"] = len(noted(ours.journal, what="answered", site=late, round=1))
        told["late_counted"] = len(noted(ours.journal, what="arrived", site=late, round=1))
    return told


def sick_sites(folder: Path, *, rounds: int = 4, seed: int = 0, restart: float = RESTART) -> Fact:
    """A clock that jumps, a disk that fills up, a model that says NaN for ever; two healthy sites.

    The clock is 3 s ahead in round 1, an hour in rounds 2 and 3, and right again. The disk is full
    in round 2. Needs root, for a small file system.
    """
    del seed
    clock, disk, nan = "cde"
    with world(folder, restart=restart) as ours, ExitStack() as stack:
        ours.agree(rounds=rounds, clients={"quorum": 2}, deployment={"grace": 30.0})
        ours.set_site(nan, training={"lr": 1e30})
        shift = ours.trial.folder / "shift"
        shift.write_text("3")
        (ours.trial.folder / "clock").mkdir()
        (ours.trial.folder / "clock" / "sitecustomize.py").write_text(
            CLOCK.format(shift=str(shift))
        )
        ours.set_environment(clock, PYTHONPATH=f"{ours.trial.folder}/clock:${{PYTHONPATH:-}}")
        state = ours.site_folder(disk) / "state"
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "none", str(state)], check=True
        )
        stack.callback(subprocess.run, ["umount", "--lazy", str(state)], check=True)
        ours.open()
        ours.submit()
        ours.until(lambda: len(ours.rows()) >= 1, "round 1")
        shift.write_text("3600")
        filler = state / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        ours.say("clock +1 h, disk full")
        ours.until(lambda: len(ours.rows()) >= 2, "round 2")
        filler.unlink()
        ours.say("disk has room")
        ours.until(lambda: len(ours.rows()) >= 3, "round 3")
        shift.write_text("0")
        ours.say("clock right again")
        summary = ours.finish()
        told = figures(ours, summary) | {"log": ours.log}
        told["flags"] = {row["round"]: row["flags"] for row in ours.rows()}
        told["failed"] = [
            f"{one.get('round')} {one.get('kind')}" for one in ours.site_events(disk, "step_failed")
        ]
        told["clock_said"] = essence(ours.text_of(clock))
        told["superlink"] = essence(ours.text_of("superlink"))
        told["answered"] = sorted(
            f"{one['site']} {one['round']}" for one in ours.events("answered")
        )
        for unit in ours.units.values():  # before the umount
            unit.wanted = False
        ours.stop(disk)
    return told


CLOCK = """\
import time
from datetime import timedelta
from pathlib import Path

from flwr.supercore import date

now, seconds = date.now, time.time


def shift():
    return float(Path({shift!r}).read_text())


date.now = lambda: now() + timedelta(seconds=shift())
time.time = lambda: seconds() + shift()
"""
"""A `sitecustomize.py`: all Python programs of a site have another time."""


def hosts(folder: Path, *, rounds: int = 3, seed: int = 0, restart: float = RESTART) -> Fact:
    """Coordinator and three sites as hosts of their own, with delay, loss and a partition.

    All by the kit's scripts with their defaults: SuperLink on the coordinator's loopback, nginx in
    front of it. Hosts have a default route that leads nowhere, so that every packet which somebody
    wanted to send anywhere is seen.
    """
    from flower.network import Hosts

    from fedistill.flower.processes import Child

    sites = ["a", "b", "c"]
    with Hosts(4, trap=True, seed=seed) as net:
        base = folder.with_name(folder.name + "-hosts")
        deploy(base, sites, host=net.addresses[0], port=8443)
        with world(base, restart=restart) as ours:
            ours.agree(rounds=rounds, deployment={"superlink": "127.0.0.1:9091", "grace": 120.0})
            for site in sites:
                ours.plant(site)
            kept = os.environ | {"FEDISTILL_VENV": sys.prefix}

            def on(host: int, name: str, folder: Path, *command: str) -> Child:
                log = ours.trial.folder / "logs" / f"{name}.log"
                log.parent.mkdir(exist_ok=True)
                with log.open("ab") as out:
                    process = net.run(
                        host,
                        ["sh", *command],
                        cwd=folder,
                        env=kept,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                child = Child(name, process, log)
                ours.trial.children.append(child)
                return child

            def site_on(number: int) -> Callable[[], Child]:
                site = sites[number - 1]
                return lambda: on(number, site, ours.site_folder(site), "start.sh")

            coordinator = ours.trial.coordinator
            for number in range(1, 4):
                net.netem(number, delay=0.05, loss=0.015)
            ours.keep("superlink", lambda: on(0, "superlink", coordinator, "start-superlink.sh"))
            ours.keep("nginx", lambda: on(0, "nginx", coordinator, "start-nginx.sh"))
            registering = on(0, "register", coordinator, "register-sites.sh")
            ours.until(lambda: not registering.running, "registration")
            assert registering.process.returncode == 0, ours.told()
            for number in range(1, 4):
                ours.keep(sites[number - 1], site_on(number))
            ours.coordinator = on(0, "run", coordinator, "run.sh")
            ours.wait_for_round(2)
            net.partition(2)
            ours.say("b is cut off")
            ours.rest(75)
            net.heal(2)
            ours.say("b is back")
            summary = ours.finish()
            told = figures(ours, summary) | {"log": ours.log}
            told["elsewhere"] = {
                ("coordinator", *sites)[number]: net.packets_elsewhere(
                    number, net.addresses[1:] if number == 0 else net.addresses[:1]
                )
                for number in range(4)
            }
            told["bytes_to_coordinator"] = {
                sites[number - 1]: net.bytes_sent(number) for number in range(1, 4)
            }
            told["said_by_b"] = essence(ours.text_of("b"))
            for unit in ours.units.values():
                unit.wanted = False
    return told | {"expected": simulate(base, rounds)}


@dataclass(frozen=True)
class Scenario:
    """A trial, the sites it needs, what makes its short form short, and what they agree on."""

    run: Callable[..., Fact]
    sites: str = "abc"
    short: Mapping[str, Any] = field(default_factory=dict)
    more: str = ""
    agreed: int = 2


SCENARIOS = {
    "undisturbed": Scenario(undisturbed),
    "kills": Scenario(kills, short={"rounds": 2, "others": 1, "restart": 2.0}),
    "absent": Scenario(absent),
    "failing-sites": Scenario(
        failing_sites,
        "abcde",
        {"rounds": 2, "restart": 2.0, "pushing": False, "erase": True},
    ),
    "private": Scenario(private, "abcde", {"rounds": 3, "restart": 2.0}, PRIVATE, agreed=4),
    "intruders": Scenario(intruders),
    "bad-messages": Scenario(bad_messages, "abcde"),
    "sick-sites": Scenario(sick_sites, "abcde", {"restart": 2.0}),
    "hosts": Scenario(hosts, short={"restart": 2.0}),
}


def main() -> None:
    """One scenario by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="as in CI")
    parser.add_argument("--folder", type=Path, help="new; kept at the end")
    parser.add_argument("--out", type=Path, help="file for what was seen, as JSON")
    parser.add_argument("--example", action="store_true", help="the settings of `deploy init`")
    asked = parser.parse_args()
    from fedistill.flower.founding import EXAMPLE

    scenario = SCENARIOS[asked.scenario]
    options = dict(scenario.short) if asked.short else {}
    options |= {"rounds": asked.rounds} if asked.rounds else {}
    with ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "new"
        settings = EXAMPLE if asked.example else SMALL
        settings = settings.replace("rounds = 2", f"rounds = {scenario.agreed}")
        deploy(folder, list(scenario.sites), settings + scenario.more)
        started = time.monotonic()
        told = scenario.run(folder, seed=asked.seed, **options)
    told["total_seconds"] = round(time.monotonic() - started, 1)
    text = json.dumps(told, indent=1, default=str)
    asked.out.write_text(text) if asked.out else print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["as-clientapp"]:
        as_clientapp([one for one in sys.argv[2].split(",") if one], sys.argv[3], sys.argv[4:])
    elif sys.argv[1:2] == ["as-supernode"]:
        as_supernode([one for one in sys.argv[2].split(",") if one], sys.argv[3], sys.argv[4:])
    else:
        sys.path.insert(0, str(HERE.parents[1]))
        main()
