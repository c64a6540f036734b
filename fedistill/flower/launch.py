"""``fedistill run`` on Flower: submit the app, follow the run folder, say how it ended.

With real sites the SuperLink is there already, and runs on after us. Without, one is started for
this run alone, with Flower's simulation engine (on Ray) behind it, and is stopped at the end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedistill import config, store
from fedistill.config import Settings
from fedistill.errors import (
    BudgetExhausted,
    CheckpointError,
    DataError,
    FedistillError,
    MissingExtra,
    QuorumError,
    RunError,
)
from fedistill.flower import jobs, processes
from fedistill.flower.bundle import write_app
from fedistill.flower.outcome import Outcome, at_work, outcome
from fedistill.log import read_events
from fedistill.runs import EVENTS, Show, Summary, default_folder, guard, silent

CONNECTION = "superlink"
LOOK = 0.2
"""Seconds between two looks at the run folder."""
FAREWELL = 60.0
"""Seconds that the server's process has to end in; it holds the run folder until then."""
SILENCE = 90.0
"""Seconds in which a submitted run must begin, or tell why not."""


def run(
    settings: Settings,
    file: Path,
    *,
    name: str = "",
    out: str | Path | None = None,
    resume: bool = False,
    show: Show = silent,
) -> Summary:
    """As :func:`fedistill.experiment.run`, over Flower.

    Args:
        settings: of the experiment.
        file: the settings file; relative paths of a deployment start from its folder.
        name: what to call it; empty: the name of the file.
        out: the run folder; None: ``runs/NAME``, numbered if it is taken.
        resume: go on from the run folder, as a new run of Flower's.
        show: called with a title and a number of rounds, returns what shows them.

    Raises:
        MissingExtra: the simulation engine needs Ray.
        RunError: the SuperLink cannot be reached, or the run broke off.
    """
    name = name or file.stem
    folder = Path(out) if out is not None else default_folder(name, resume=resume)
    folder = folder.resolve()
    guard(folder, resume=resume)
    real = bool(settings.deployment.sites)
    base = file.resolve().parent if real else Path.cwd()
    nodes, fedavg = (len(settings.deployment.sites), None) if real else _clients(settings)
    with tempfile.TemporaryDirectory(prefix="job-", dir=_jobs(base) if real else None) as scratch:
        job = Job(settings, name, folder, base, resume, Path(scratch), nodes, fedavg)
        with reach(job) if real else engine(job) as submission:
            follow(job, submission, show)
    summary: Summary = json.loads((folder / "summary.json").read_text())
    return summary | {"folder": str(folder)}


def _jobs(base: Path) -> Path:
    """Where the SuperLink of a deployment finds its jobs: its service has a ``/tmp`` of its own.

    Raises:
        RunError: this user may not write there.
    """
    folder = base / "flower"
    store.probe(folder)
    return folder


def _clients(settings: Settings) -> tuple[int, int | None]:
    """Clients of a simulation, and what FedAvg would send each way for the same student.

    The coordinator of real sites does without: it would need torch to know.
    """
    from fedistill.assembly import assemble, method_of
    from fedistill.experiment import rows_of

    federated = rows_of(settings)
    federation = assemble(settings, federated, method_of(settings))
    talks = federation.method.exchange == "predictions"
    return len(federated.parts), federation.fedavg_bytes() if talks else None


@dataclass(frozen=True, eq=False)
class Job:
    """One run to be done on Flower.

    Attributes:
        settings: of the experiment.
        name: what to call it.
        folder: the run folder.
        base: the folder that relative paths start from.
        resume: whether to go on with what the folder holds.
        scratch: for what is needed while we wait.
        nodes: clients of a simulation.
        fedavg_bytes: what FedAvg would send each way for the same student.
    """

    settings: Settings
    name: str
    folder: Path
    base: Path
    resume: bool
    scratch: Path
    nodes: int
    fedavg_bytes: int | None

    @property
    def outcome(self) -> Path:
        """Where the server says how the run ended."""
        return self.scratch / "outcome.json"

    def lay_down(self) -> str:
        """Write down what the server app is to do; the name that Flower tells it."""
        settings = self.scratch / "settings.toml"
        settings.write_text(config.to_toml(self.settings))
        return jobs.lay_down(
            self.scratch,
            {
                "settings": str(settings),
                "folder": str(self.base),
                "out": str(self.folder),
                "name": self.name,
                "resume": self.resume,
                "outcome": str(self.outcome),
            },
        )


@dataclass(frozen=True, eq=False)
class Submission:
    """A run that the SuperLink has taken on.

    Attributes:
        number: Flower's run id.
        stop: asks the SuperLink to end it.
        alive: whether the SuperLink is there.
        log: where to look when things went wrong.
    """

    number: int
    stop: Callable[[], object]
    alive: Callable[[], bool]
    log: str


@contextlib.contextmanager
def reach(job: Job) -> Iterator[Submission]:
    """Submit to the SuperLink of a deployment."""
    agreed = job.settings.deployment
    home = job.scratch / "home"
    write_connection(home, agreed.superlink, ca=(job.base / agreed.ca).resolve())
    env = processes.environment(home)
    app = job.base / agreed.app
    if not (app / "pyproject.toml").is_file():
        app = write_app(job.scratch / "app")
    number = submit(job, app, env)
    stop = [flwr(), "stop", str(number), CONNECTION]
    yield Submission(
        number, lambda: processes.output_of(stop, env=env), lambda: True, "logs/superlink.log"
    )


@contextlib.contextmanager
def engine(job: Job) -> Iterator[Submission]:
    """Start a SuperLink with the simulation engine, and submit to it."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("ray", "ray", "Flower's simulation engine (--backend flower)")
    home, port = job.scratch / "home", processes.free_port()
    write_connection(home, f"127.0.0.1:{port}")
    # The engine starts a server process per run; everything that it starts inherits this.
    env = processes.environment(
        home,
        OMP_NUM_THREADS="1",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        **{jobs.FOLDER: str(job.scratch.parent)},
    )
    control = f"127.0.0.1:{processes.free_port()}"
    command = [str(processes.binary("flower-superlink")), "--insecure", "--simulation"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--control-api-address", control]
    command += ["--disable-runtime-dependency-installation"]
    log = job.scratch / "superlink.log"
    with processes.stopped_at_the_end() as children:
        superlink = processes.start("the SuperLink", command, log, env=env, cwd=job.scratch)
        children.append(superlink)
        processes.wait_until_healthy(superlink, f"http://127.0.0.1:{port}")
        number = submit(
            job,
            write_app(job.scratch / "app"),
            env,
            "--federation-config",
            f"num-supernodes={job.nodes} client-resources-num-cpus=1",
        )
        try:
            yield Submission(number, superlink.stop, lambda: superlink.running, str(log))
        except FedistillError:
            keep_log(log, job.folder)
            raise


def keep_log(log: Path, folder: Path) -> None:
    """Save a log from the scratch folder, where there is a run folder to save it in."""
    if log.exists() and folder.is_dir():
        shutil.copy(log, folder / "flower.log")


def flwr() -> str:
    """The command line of Flower."""
    return str(processes.binary("flwr"))


def write_connection(home: Path, address: str, *, ca: Path | None = None) -> None:
    """Flower's own settings, with one connection: the default ones call home.

    Raises:
        RunError: the certificate is absent.
    """
    if ca is not None and not ca.is_file():
        raise RunError(
            f"{ca}: expected the certificate of the authority that signed the SuperLink's, found "
            "none: set deployment.ca"
        )
    trust = f"root-certificates = {config.to_value(str(ca))}" if ca else "insecure = true"
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f"[superlink.{CONNECTION}]\naddress = {config.to_value(address)}\n{trust}\n"
    )


def submit(job: Job, app: Path, env: Mapping[str, str], *more: str) -> int:
    """Hand the app to the SuperLink; Flower's number of the run.

    Raises:
        RunError: the SuperLink is not there, or refused.
    """
    chosen = f'job="{job.lay_down()}"'
    command = [flwr(), "run", str(app), CONNECTION, "-c", chosen, "--format", "json", *more]
    code, text = processes.output_of(command, env=env, cwd=job.scratch)
    answer = _json_in(text)
    if code or not answer.get("run-id"):
        reason = str(answer.get("error-message") or text).strip().splitlines()
        raise RunError(
            f"the SuperLink did not take the run ({reason[-1] if reason else 'no answer'}): see "
            "whether it runs at the address of deployment.superlink"
        )
    return int(answer["run-id"])


def _json_in(text: str) -> dict[str, Any]:
    """The JSON object in what a program printed, warnings around it or not."""
    for start in (place for place, character in enumerate(text) if character == "{"):
        with contextlib.suppress(ValueError):
            found: dict[str, Any] = json.JSONDecoder().raw_decode(text[start:])[0]
            return found
    return {}


# --- following -----------------------------------------------------------------------------------


def follow(job: Job, submission: Submission, show: Show) -> None:
    """Show the rounds as they appear in the run folder, until the server says how it ended.

    Raises:
        RunError: the run broke off; with the exit code that the server gave.
    """
    try:
        for title, folder in _parts(job):
            _follow_one(job, submission, show, title, folder)
        _wait(job, submission)
    except BaseException:
        # Also where the run seems dead: nobody may go on with it behind our back.
        with contextlib.suppress(RunError):
            submission.stop()
        end = time.monotonic() + FAREWELL
        while at_work(job.outcome) and submission.alive() and time.monotonic() < end:
            time.sleep(LOOK)
        raise
    ended = outcome(job.outcome)
    if ended is not None and ended.code:
        raise _as_it_was(ended)


def _parts(job: Job) -> Iterator[tuple[str, Path]]:
    """The federations of an experiment: one, or one for every seed."""
    repeats, first = job.settings.evaluation.repeats, job.settings.seed
    if repeats == 1:
        yield job.name, job.folder
        return
    for seed in range(first, first + repeats):
        yield f"{job.name}, seed {seed}", job.folder / f"seed-{seed}"


def _follow_one(job: Job, submission: Submission, show: Show, title: str, folder: Path) -> None:
    shown = len(_rows(folder)) if job.resume else 0
    with show(title, job.settings.rounds) as watch:
        for _ in _looks(job, submission):
            rows = _rows(folder)
            for row in rows[shown:]:
                watch.add(row | {"fedavg_bytes_per_client_round": job.fedavg_bytes})
            shown = max(shown, len(rows))
            if shown >= job.settings.rounds:
                return
            watch.advance("clients", *_progress(folder))
        for row in _rows(folder)[shown:]:
            watch.add(row | {"fedavg_bytes_per_client_round": job.fedavg_bytes})


def _wait(job: Job, submission: Submission) -> None:
    """Wait for the end: reports and baselines follow the last round."""
    for _ in _looks(job, submission):
        pass


def _looks(job: Job, submission: Submission) -> Iterator[None]:
    """A beat, until the run has ended.

    Raises:
        RunError: nobody works on the run any more, and nobody said why.
    """
    began = last_sign = time.monotonic()
    while outcome(job.outcome) is None:
        yield
        time.sleep(LOOK)
        now = time.monotonic()
        if at_work(job.outcome):
            last_sign = now
        patience = SILENCE if last_sign == began else 10.0
        if not submission.alive() or now - last_sign > patience:
            time.sleep(LOOK)  # the last word may be on its way
            if outcome(job.outcome) is None:
                raise RunError(
                    f"the run on Flower (number {submission.number}) broke off without a word: "
                    f"see {submission.log}; the same command with --resume goes on"
                )


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rounds that are done."""
    try:
        text = (folder / "rounds.jsonl").read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines() if line]


def _progress(folder: Path) -> tuple[int, int]:
    """Clients heard in the present round, and clients asked."""
    heard = asked = 0
    for entry in read_events(folder / EVENTS, last=200):
        if entry["event"] == "round_started":
            heard, asked = 0, len(entry.get("asked", ()))
        heard += entry["event"] in {"answered", "dropped"}
    return heard, max(asked, 1)


KINDS: Mapping[str, type[FedistillError]] = {
    kind.__name__: kind for kind in (DataError, QuorumError, CheckpointError, BudgetExhausted)
}
"""Errors of the server that have a class of their own; others are a RunError."""


def _as_it_was(ended: Outcome) -> FedistillError:
    """The server's error, as this process would have raised it."""
    error = KINDS.get(ended.kind, RunError)(ended.text)
    error.exit_code = ended.code
    return error
