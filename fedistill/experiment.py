"""From a settings file to a run folder: what ``fedistill run`` does, callable from Python.

One experiment may be several federations: repeats over seeds, baselines on the same rows, and one
federation without each client in turn. Each is a run folder of its own, so each resumes alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fedistill import config, data, deployment, models, store
from fedistill.assembly import assemble, method_of, model_names
from fedistill.backends import Backend
from fedistill.backends.processes import Processes
from fedistill.backends.serial import Serial
from fedistill.backends.unreliable import unreliable
from fedistill.backends.vectorized import Vectorized
from fedistill.client import Site
from fedistill.config import MethodSettings, PrivacySettings, Settings
from fedistill.data import Federated
from fedistill.data.stream import streams
from fedistill.errors import (
    BudgetExhausted,
    CheckpointError,
    DataError,
    QuorumError,
    RunError,
    SettingsError,
)
from fedistill.federation import Federation
from fedistill.journal import STREAM
from fedistill.log import event, events_to
from fedistill.presets import Method
from fedistill.presets import method as preset
from fedistill.report import write_report
from fedistill.runs import EVENTS, Show, Summary, default_folder, guard, silent
from fedistill.sites import average, cross_figures, site_table

TUNING = "tuning.json"
"""What the backend `vectorized` chose for its blocks, in the run folder."""
OPENLY = "without-privacy"
"""The folder of the same run without differential privacy."""
Engine = Callable[[Path], Callable[[Mapping[str, Site]], Backend]]
"""From the run folder of a federation to what runs its clients."""


def serial(folder: Path) -> Callable[[Mapping[str, Site]], Backend]:
    """One client after another, in this process."""
    del folder
    return Serial


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Clients with students of one kind side by side, in this process.

    Attributes:
        tune: have it measured how many at once; what was chosen is kept in the run folder.
    """

    tune: bool = False

    def __call__(self, folder: Path) -> Callable[[Mapping[str, Site]], Backend]:
        """What runs the clients of a federation."""
        return partial(Vectorized, record=folder / TUNING, tune=self.tune)


@dataclasses.dataclass(frozen=True)
class InProcesses:
    """Clients dealt to worker processes.

    Attributes:
        workers: how many; 0: as many as there are cores.
    """

    workers: int = 0

    def __call__(self, folder: Path) -> Callable[[Mapping[str, Site]], Backend]:
        """What runs the clients of a federation."""
        del folder
        return Processes(self.workers)


def engine_of(settings: Settings) -> Engine:
    """What the settings name, where it runs in simulations that start here."""
    chosen = settings.backend
    if chosen.name == "processes":
        return InProcesses(chosen.workers)
    return SideBySide(chosen.tune) if chosen.name == "vectorized" else serial


def lossy(settings: Settings, chosen: Method, engine: Engine) -> Engine:
    """The engine, with the losses that the settings simulate; who shares nothing loses nothing."""
    clients = settings.clients
    shares = chosen.exchange not in {"nothing", "rows"}
    here = engine is serial or isinstance(engine, InProcesses | SideBySide)
    if not here or not shares or not (clients.dropout or clients.stragglers):
        return engine
    return lambda folder: unreliable(
        engine(folder),
        seed=settings.seed,
        dropout=clients.dropout,
        stragglers=clients.stragglers,
        lateness=clients.lateness,
    )


def run(
    source: str | Path | Settings,
    *,
    overrides: Sequence[str] = (),
    name: str = "",
    out: str | Path | None = None,
    resume: bool = False,
    show: Show = silent,
    engine: Engine | None = None,
) -> Summary:
    """Run an experiment and write its run folder.

    Args:
        source: a settings file, or settings.
        overrides: ``key=value`` texts, as with ``--set``.
        name: what to call it; empty: the name of the file.
        out: the run folder; None: ``runs/NAME``, numbered if it is taken.
        resume: go on from what the folder holds.
        engine: what runs the clients; None: the backend of the settings.
        show: called with a title and a number of rounds, returns what shows them.

    Returns:
        What stands in ``summary.json``.

    Raises:
        SettingsError: something is wrong with the settings.
        DataError: something is wrong with the data.
        RunError: the run cannot go on (quorum, disk, changed proxy rows).
    """
    if isinstance(source, Settings):
        settings = config.parse(config.to_toml(source), overrides) if overrides else source
    else:
        settings = config.load(source, overrides)
    name = name or ("experiment" if isinstance(source, Settings) else Path(source).stem)
    folder = Path(out) if out is not None else default_folder(name, resume=resume)
    guard(folder, resume=resume)
    store.probe(folder)
    engine = engine or engine_of(settings)
    with store.held(folder), models.threads(settings.backend.threads):
        fresh = not (folder / "config.toml").exists()
        remember(settings, folder, resume=resume)
        try:
            several = settings.evaluation.repeats > 1
            go = run_repeats if several else run_seed
            summary = go(settings, folder, name, resume=resume, show=show, engine=engine)
        except (DataError, SettingsError):
            if fresh:  # nothing was run: the name stays free for the next try
                store.remove(folder / "config.toml")
                store.remove(folder / EVENTS)
            raise
        except BudgetExhausted:  # what was done is done, and is reported
            write_report(folder)
            raise
        write_report(folder)
    return summary | {"folder": str(folder)}


def remember(settings: Settings, folder: Path, *, resume: bool) -> None:
    """Write ``config.toml``; a resumed run must have the same, but for what changes no result."""
    path = folder / "config.toml"
    if resume and path.exists() and (changed := differing(config.load(path), settings)):
        raise CheckpointError(
            f"{folder} holds a run with other settings ({', '.join(changed)}): resume with "
            "the same settings, or choose another folder with --out"
        )
    store.write_atomic(path, config.to_toml(settings).encode())


FREE = {"rounds", "backend.workers", "backend.awake", "backend.store"}
"""What may be another in a resumed run: how far it goes, and what changes memory and time alone."""


def differing(before: Settings, now: Settings) -> list[str]:
    """Which settings a run would not go on with."""
    found = []
    for item in dataclasses.fields(Settings):
        old, new = getattr(before, item.name), getattr(now, item.name)
        if old == new:
            continue
        if type(old) is not type(new) or not dataclasses.is_dataclass(old):
            found.append(item.name)
            continue
        found += [
            f"{item.name}.{key.name}"
            for key in dataclasses.fields(old)
            if getattr(old, key.name) != getattr(new, key.name)
        ]
    return [name for name in found if name not in FREE]


# --- several federations -------------------------------------------------------------------------


def run_repeats(
    settings: Settings, folder: Path, name: str, *, resume: bool, show: Show, engine: Engine
) -> Summary:
    """The same experiment over several seeds; figures are means, with their deviations."""
    summaries, histories = [], []
    for seed in range(settings.seed, settings.seed + settings.evaluation.repeats):
        once = dataclasses.replace(
            settings,
            seed=seed,
            evaluation=dataclasses.replace(settings.evaluation, repeats=1),
        )
        home = folder / f"seed-{seed}"
        title = f"{name}, seed {seed}"
        summaries.append(run_seed(once, home, title, resume=resume, show=show, engine=engine))
        histories.append(summaries[-1].pop("history"))
    summary = average(summaries) | {
        "name": name,
        "seed": settings.seed,
        "repeats": len(summaries),
        "seeds": [entry["seed"] for entry in summaries],
    }
    merged = [average(rows) for rows in zip(*histories, strict=False)]
    lines = [row.pop("experience") for row in merged if "experience" in row]
    store.save_lines(folder / "rounds.jsonl", merged)
    if lines:
        store.save_lines(folder / STREAM, lines)
    store.save_json(folder / "summary.json", summary)
    return summary


def run_seed(
    settings: Settings, folder: Path, name: str, *, resume: bool, show: Show, engine: Engine
) -> Summary:
    """One seed: the federation, its baselines, and the federations without one client each.

    The engine runs the federation. What it is compared with runs here, one client after another:
    that gives the same figures, and needs no folder that others can rebuild it from.
    """
    federated = rows_of(settings)
    chosen = method_of(settings)
    summary = run_one(
        settings, federated, chosen, folder, name, resume=resume, show=show, engine=engine
    )
    others: dict[str, Summary] = {}
    openly = without_privacy(settings)
    if settings.evaluation.without_privacy and settings.privacy.mechanism != "none":
        home = folder / "baselines" / OPENLY
        others["without privacy"] = run_one(
            openly,
            federated,
            method_of(openly),
            home,
            f"{name}, {OPENLY}",
            resume=resume,
            show=show,
        )
    for baseline in settings.evaluation.baselines:
        home = folder / "baselines" / baseline
        others[baseline] = run_one(
            openly,
            federated,
            preset(baseline),
            home,
            f"{name}, {baseline}",
            resume=resume,
            show=show,
        )
    left_out: dict[str, Summary] = {}
    if settings.evaluation.leave_one_out:
        for site in federated.parts:
            rest = without(site, federated, settings)
            home = folder / "leave-one-out" / site
            left_out[site] = run_one(
                settings, rest, chosen, home, f"{name}, without {site}", resume=resume, show=show
            )
    summary["sites"] = site_table(summary, others, left_out)
    public = {key: value for key, value in summary.items() if key != "history"}
    store.save_json(folder / "summary.json", public)
    return summary


def without_privacy(settings: Settings) -> Settings:
    """The same settings, without differential privacy for anybody."""
    groups = tuple(dataclasses.replace(one, mechanism=None) for one in settings.clients.group)
    clients = dataclasses.replace(settings.clients, group=groups)
    return dataclasses.replace(settings, privacy=PrivacySettings(), clients=clients)


def rows_of(settings: Settings) -> Federated:
    """Everybody's rows in a simulation; in a federation of real sites, the public ones."""
    if settings.deployment.sites:
        return deployment.coordinated(settings)
    found = data.prepare(settings.data, settings.proxy, settings.clients, settings.seed)
    if not settings.stream.experiences:
        return found
    stream = streams(found.parts, found.dataset.test, settings.stream, settings.seed)
    return dataclasses.replace(found, stream=stream)


def without(site: str, federated: Federated, settings: Settings) -> Federated:
    """The same rows without one site's: neither its private rows nor its proxy rows are used.

    Where sites come from a column the rows are scaled afresh too, by the proxy rows that are left.
    Every site stays among the tests: it is measured, and the groups keep their clients.
    """
    if federated.tests:
        return data.prepare(
            settings.data, settings.proxy, settings.clients, settings.seed, without=site
        )
    tests = dict.fromkeys(federated.parts, federated.dataset.test)
    parts = {name: part for name, part in federated.parts.items() if name != site}
    return dataclasses.replace(federated, parts=parts, tests=tests)


def run_one(
    settings: Settings,
    federated: Federated,
    chosen: Method,
    folder: Path,
    name: str,
    *,
    resume: bool,
    show: Show,
    engine: Engine = serial,
) -> Summary:
    """One federation from its first (or next) round to its last."""
    federation = assemble(settings, federated, chosen)
    store.probe(folder)
    own = settings
    if chosen.name != settings.method.preset:
        own = dataclasses.replace(settings, method=MethodSettings(preset=chosen.name))
    if not (resume and (folder / "config.toml").exists()):
        store.write_atomic(folder / "config.toml", config.to_toml(own).encode())
    status = "interrupted"
    try:
        with events_to(folder / EVENTS), telling(federation), show(name, settings.rounds) as watch:
            rows = federation.run(
                settings.rounds,
                federated.dataset.test,
                out=folder,
                resume=resume,
                measure_every=settings.evaluation.every,
                backend=lossy(settings, chosen, engine)(folder),
                progress=watch.advance,
                threads=settings.backend.threads,
            )
            shares = chosen.exchange not in {"weights", "nothing", "rows"}
            fedavg = federation.fedavg_bytes() if shares else None
            for row in rows:
                watch.add(row | {"fedavg_bytes_per_client_round": fedavg})
        status = "done"
    except BudgetExhausted:
        status = "failed:budget"
        raise
    except QuorumError:
        status = "failed:quorum"
        raise
    except RunError:
        status = "failed"
        raise
    finally:
        # A run that failed for want of disk cannot write its summary either: keep the first error.
        ignored = [RunError] if status != "done" else []
        with contextlib.suppress(*ignored):
            summary = summarise(federation, settings, federated, name, status)
            store.save_json(
                folder / "summary.json", {k: v for k, v in summary.items() if k != "history"}
            )
    return summary


@contextlib.contextmanager
def telling(federation: Federation) -> Iterator[None]:
    """Log how a run broke off, if it does."""
    try:
        yield
    except BaseException as error:
        here = {"run": federation.server.run, "round": federation.server.round}
        if isinstance(error, KeyboardInterrupt | SystemExit):  # Flower ends its apps by exit
            event("run_interrupted", **here)
        else:
            reason = "quorum" if isinstance(error, QuorumError) else type(error).__name__
            event("run_failed", **here, reason=reason)
        raise


def summarise(
    federation: Federation, settings: Settings, federated: Federated, name: str, status: str
) -> Summary:
    """What ``summary.json`` holds of one federation."""
    everybody = settings.evaluation.leave_one_out
    return federation.summary() | {
        "name": name,
        "rounds": len(federation.history),
        "source": federated.dataset.name,
        "partition": settings.clients.partition,
        "backend": settings.backend.name,
        "status": status,
        "versions": versions(),
        "cross": cross_figures(federation, federated, everybody) if status == "done" else {},
        "rows": {name: len(part) for name, part in federated.parts.items()},
        "models": model_names(settings, federated, federation.method),
        "classes_seen": {
            name: len(np.unique(part.labels)) for name, part in federated.parts.items()
        },
        "history": list(federation.history),
    }


def versions() -> dict[str, str]:
    """Versions of what computed the run."""
    found = {"python": platform.python_version()}
    for package in ("fedistill", "torch", "numpy", "scikit-learn", "opacus", "dp-accounting"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
