"""The report of one run: a page that opens offline, without scripts, on paper and in the dark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedistill.report import charts, headline, participation, privacy, shared, sites, stream, words
from fedistill.report.folder import Run, read_run
from fedistill.report.page import fill, write
from fedistill.report.words import clean


def write_report(run_dir: str | Path) -> Path:
    """Write ``run_dir/report.html``, ``disclosure.json`` beside it, and return the page's path.

    Raises:
        RunError: the folder holds no run, or cannot be written to.
    """
    run = read_run(run_dir)
    privacy.write_disclosure(run, Path(run_dir))
    return write(Path(run_dir) / "report.html", fill("template.html", view(run)))


def view(run: Run) -> dict[str, Any]:
    """Everything the template shows, in its order."""
    saved = headline.savings(run)
    events, more = participation.incidents(run)
    return {
        "safe": Markup,
        "name": run.name,
        "headline": headline.sentence(run),
        "lead": headline.lead(run),
        "warnings": headline.warnings(run) + privacy.warnings(run),
        "tiles": headline.tiles(run),
        "figures": charts.figures(run),
        "stream": stream.section(run),
        "tables": sites.site_tables(run),
        "agreement": charts.agreement(run),
        "traffic": charts.traffic(run),
        "traffic_sentences": traffic_sentences(run, saved),
        "attendance": charts.attendance(run),
        "attendance_sentence": participation.sentence(run),
        "events": events,
        "more_events": more,
        "privacy": privacy.section(run),
        "shares_predictions": headline.shares_predictions(run),
        "beside": shared.beside(run),
        "tells": shared.tells(run),
        "notes": headline.notes(run),
        "settings": settings(run.config),
        "facts": facts(run),
    }


def traffic_sentences(run: Run, saved: headline.Savings) -> list[str]:
    """The bytes in words: each way against FedAvg, and the whole run."""
    if not run.total("bytes_up", "bytes_down"):
        return []
    said = []
    for way, key, ratio in (("Up", "up", saved.up), ("Down", "down", saved.down)):
        each = run.figure(f"bytes_{key}_per_client_round")
        if each is not None:
            versus = f", {words.against_fedavg(ratio)}" if ratio else ""
            said.append(f"{way}: {words.human_bytes(each)} per client and round{versus}.")
    if saved.total is not None:
        said.append(f"Both ways: {words.against_fedavg(saved.total)} {headline.for_student(run)}.")
    if total := run.total("bytes_up", "bytes_down"):
        said.append(f"The whole run sent {words.human_bytes(total)}.")
    return said


def settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """config.toml as sections of names and values; plain values come first, as ``run``."""
    top = [(clean(k), _value(v)) for k, v in config.items() if not _is_table(v)]
    sections = [("run", top)] if top else []
    for name, value in config.items():
        if isinstance(value, Mapping):
            plain = {k: v for k, v in value.items() if not _is_table(v)}
            sections.append((clean(name), [(clean(k), _value(v)) for k, v in plain.items()]))
            inner = {f"{name}.{k}": v for k, v in value.items() if _is_table(v)}
            sections.extend(settings(inner))
        elif _is_table(value):
            for place, entry in enumerate(value, start=1):
                sections.extend(settings({f"{name} {place}": entry}))
    return [(name, values) for name, values in sections if values]


def facts(run: Run) -> list[tuple[str, str]]:
    """What identifies the run and what it ran on."""
    keys = [
        "seed",
        "method",
        "rule",
        "codec",
        "backend",
        "status",
        "proxy_sha256",
        "soft_targets_sha256",
    ][1 if run.repeats else 0 :]
    if shared.exchange(run) not in {"", shared.PREDICTIONS}:
        keys.remove("rule")  # tables are averaged: no rule has a part in it
    found = [
        (key.replace("_", " "), clean(value, 80))
        for key in keys
        if (value := run.summary.get(key)) is not None
    ]
    seconds = run.total("seconds")
    found += [("time", words.duration(seconds))] if seconds else []
    if run.repeats:
        seeds = ", ".join(clean(r.summary.get("seed", r.path.name), 24) for r in run.repeats)
        found.insert(0, ("seeds", clean(seeds, 200)))
    names = run.summary.get("classes")
    if isinstance(names, list) and names:
        found.append(("classes", clean(", ".join(clean(name, 24) for name in names[:40]), 300)))
    return found + [
        (clean(name, 40), clean(version, 40))
        for name, version in list(run.table("versions").items())[:40]
    ]


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return clean(", ".join(clean(entry, 40) for entry in value) or words.MISSING, 200)
    return clean(value, 120) if value != "" else words.MISSING
