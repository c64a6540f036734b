"""From a settings file to a run folder: what ``fedistill run`` does, callable from Python.

One experiment may be several federations: repeats over seeds, baselines on the same rows, and one
federation without each client in turn. Each is a run folder of its own, so each resumes alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedistill import config, data, models, store
from fedistill.assembly import assemble, method_of, model_names
from fedistill.config import MethodSettings, Settings
from fedistill.data import Federated
from fedistill.errors import CheckpointError, DataError, QuorumError, RunError, SettingsError
from fedistill.federation import Federation
from fedistill.presets import Method
from fedistill.presets import method as preset
from fedistill.report import write_report
from fedistill.sites import average, cross_figures, site_table

Summary = dict[str, Any]


class Watch(Protocol):
    """Something that shows a run while it goes on."""

    def add(self, row: Mapping[str, Any]) -> None:
        """A round is done."""

    def advance(self, label: str, done: int, total: int) -> None:
        """Something within a round is done."""


class _Silent:
    def add(self, row: Mapping[str, Any]) -> None:
        del row

    def advance(self, label: str, done: int, total: int) -> None:
        del label, done, total


Show = Callable[[str, int], AbstractContextManager[Watch]]


def silent(title: str, rounds: int) -> AbstractContextManager[Watch]:
    """Show nothing."""
    del title, rounds
    return contextlib.nullcontext(_Silent())


def run(
    source: str | Path | Settings,
    *,
    overrides: Sequence[str] = (),
    name: str = "",
    out: str | Path | None = None,
    resume: bool = False,
    show: Show = silent,
) -> Summary:
    """Run an experiment and write its run folder.

    Args:
        source: a settings file, or settings.
        overrides: ``key=value`` texts, as with ``--set``.
        name: what to call it; empty: the name of the file.
        out: the run folder; None: ``runs/NAME``, numbered if it is taken.
        resume: go on from what the folder holds.
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
    with store.held(folder), models.threads(settings.backend.threads):
        fresh = not (folder / "config.toml").exists()
        remember(settings, folder, resume=resume)
        try:
            several = settings.evaluation.repeats > 1
            go = run_repeats if several else run_seed
            summary = go(settings, folder, name, resume=resume, show=show)
        except (DataError, SettingsError):
            if fresh:  # nothing was run: the name stays free for the next try
                store.remove(folder / "config.toml")
            raise
        write_report(folder)
    return summary | {"folder": str(folder)}


def guard(folder: Path, *, resume: bool) -> None:
    """Refuse to write over a run, or into a folder of other things.

    Raises:
        RunError: the folder holds a run and ``resume`` is not set, or holds something else.
    """
    if not folder.is_dir():
        return
    a_run = (folder / "config.toml").exists()
    if a_run and not resume:
        raise RunError(
            f"{folder} holds a run already: add --resume to go on with it, or choose another "
            "folder with --out"
        )
    if not a_run and {entry.name for entry in folder.iterdir()} - {".lock"}:
        raise RunError(
            f"{folder} is not empty and holds no run: choose a folder of its own with --out"
        )


def default_folder(name: str, *, resume: bool) -> Path:
    """``runs/NAME``; the next free ``runs/NAME-2`` ... for a new run, the newest for a resumed."""
    base, number = Path("runs") / name, 1
    taken: Path | None = None
    while True:
        folder = base if number == 1 else base.with_name(f"{name}-{number}")
        if not (folder / "config.toml").exists():
            return taken if resume and taken else folder
        taken, number = folder, number + 1


def remember(settings: Settings, folder: Path, *, resume: bool) -> None:
    """Write ``config.toml``; a resumed run must have the same, but for the number of rounds."""
    path = folder / "config.toml"
    if resume and path.exists():
        before = config.load(path)
        if dataclasses.replace(before, rounds=settings.rounds) != settings:
            changed = [
                item.name
                for item in dataclasses.fields(Settings)
                if item.name != "rounds"
                and getattr(before, item.name) != getattr(settings, item.name)
            ]
            raise CheckpointError(
                f"{folder} holds a run with other settings ({', '.join(changed)}): resume with "
                "the same settings, or choose another folder with --out"
            )
    store.write_atomic(path, config.to_toml(settings).encode())


# --- several federations -------------------------------------------------------------------------


def run_repeats(
    settings: Settings, folder: Path, name: str, *, resume: bool, show: Show
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
        summaries.append(run_seed(once, home, f"{name}, seed {seed}", resume=resume, show=show))
        histories.append(summaries[-1].pop("history"))
    summary = average(summaries) | {
        "name": name,
        "seed": settings.seed,
        "repeats": len(summaries),
        "seeds": [entry["seed"] for entry in summaries],
    }
    store.save_lines(
        folder / "rounds.jsonl", [average(rows) for rows in zip(*histories, strict=False)]
    )
    store.save_json(folder / "summary.json", summary)
    return summary


def run_seed(settings: Settings, folder: Path, name: str, *, resume: bool, show: Show) -> Summary:
    """One seed: the federation, its baselines, and the federations without one client each."""
    federated = data.prepare(settings.data, settings.proxy, settings.clients, settings.seed)
    chosen = method_of(settings)
    summary = run_one(settings, federated, chosen, folder, name, resume=resume, show=show)
    others: dict[str, Summary] = {}
    for baseline in settings.evaluation.baselines:
        home = folder / "baselines" / baseline
        others[baseline] = run_one(
            settings,
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
        with show(name, settings.rounds) as watch:
            rows = federation.run(
                settings.rounds,
                federated.dataset.test,
                out=folder,
                resume=resume,
                measure_every=settings.evaluation.every,
                progress=watch.advance,
                threads=settings.backend.threads,
            )
            fedavg = federation.fedavg_bytes() if chosen.exchange == "predictions" else None
            for row in rows:
                watch.add(row | {"fedavg_bytes_per_client_round": fedavg})
        status = "done"
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
    for package in ("fedistill", "torch", "numpy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
