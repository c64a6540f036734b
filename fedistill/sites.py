"""The per-site table: every site's own test rows against every model that might serve it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedistill.data import Federated
from fedistill.distill.learner import Learner
from fedistill.dormant import MANY
from fedistill.evaluate import Figures, measure
from fedistill.federation import Federation
from fedistill.types import Rows

Cross = dict[str, dict[str, Figures]]
"""Model (a client id, or ``student``) to site to figures."""


COMMON = "*"
"""Stands for every site where all are measured on the same test rows."""


def test_rows(federated: Federated) -> dict[str, Rows]:
    """The rows each site is measured on: its own, or the common ones."""
    return dict(federated.tests) or {COMMON: federated.dataset.test}


def cross_figures(federation: Federation, federated: Federated, everybody: bool) -> Cross:
    """Every client's model on its own site, those that serve all on every site.

    Of more than :data:`MANY` clients, those of the last round.

    Args:
        federation: a finished run.
        federated: the rows.
        everybody: also judge every client's model on every other site.
    """
    tests = {name: rows for name, rows in test_rows(federated).items() if len(rows)}
    return {
        model: {
            name: measure(learner, rows)
            for name, rows in tests.items()
            if everybody or model == name or model not in tests
        }
        for model, learner in _learners(federation)
    }


def _learners(federation: Federation) -> Iterator[tuple[str, Learner]]:
    """The models to be judged: those that were measured last where there are many clients."""
    names: Collection[str] = federation.sites
    if len(names) > MANY:
        names = federation.history[-1]["client_accuracy"]
    for name in names:
        yield name, federation.sites[name].learner
    if federation.server.student is not None:
        yield "student", federation.server.student


def site_table(
    summary: Mapping[str, Any], baselines: Mapping[str, Any], left_out: Mapping[str, Any]
) -> dict[str, Any]:
    """For each site: its rows, its model, and the figures of every model that could serve it."""
    table: dict[str, Any] = {}
    first = summary["history"][0] if summary["history"] else {}
    for site, rows in summary["rows"].items():
        figures: dict[str, Figures] = {}
        alone = (first.get("client_accuracy") or {}).get(site)
        if alone is not None:
            figures["first round"] = {
                "accuracy": alone,
                "auc": (first.get("client_auc") or {}).get(site),
            }
        cross = summary["cross"]
        figures |= _column("client", cross, site, site) | _column("student", cross, "student", site)
        for name, baseline in baselines.items():
            owner = {"local": site, "centralised": "pooled"}.get(name, "student")
            figures |= _column(name, baseline["cross"], owner, site)
        if site in left_out:
            figures |= _column("left-out student", left_out[site]["cross"], "student", site)
            if "local" in baselines:
                figures |= _others(baselines["local"]["cross"], site)
        table[site] = {
            "rows": rows,
            "model": summary["models"].get(site, ""),
            "classes_seen": summary["classes_seen"].get(site),
            "figures": figures,
        }
    return table


def _column(name: str, cross: Cross, model: str, site: str) -> dict[str, Figures]:
    found = _judged(cross, model, site)
    return {name: found} if found else {}


def _judged(cross: Cross, model: str, site: str) -> Figures | None:
    """One model's figures on the test rows of one site."""
    found = cross.get(model, {})
    return found.get(site) or found.get(COMMON)


def _others(cross: Cross, site: str) -> dict[str, Figures]:
    """Models that other sites trained alone, on this site: the best of them, and their mean.

    No site could pick the best without labels of its own, so it is an upper bound of what
    borrowing a model can do; the mean is what borrowing blindly does.
    """
    judged = [_judged(cross, model, site) for model in cross if model != site]
    others = [figures for figures in judged if figures]
    if not others:
        return {}
    best = max(others, key=lambda f: f["auc"] if f["auc"] is not None else f["accuracy"] or 0.0)
    mean = average(others)
    return {
        "best single other": best,
        "mean single other": {"accuracy": mean["accuracy"], "auc": mean.get("auc")},
    }


def average(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of every number over equal tables, with ``KEY_sd`` beside it; other values of the first.

    A number that some tables lack (an AUC where a test part has one class) is the mean of those
    that have it, with their count as ``KEY_n``. Whole numbers that agree stay whole. Nested tables
    are averaged alike, and lists of equally many numbers place by place.
    """
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for entry in entries for key in entry):
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        if not values:
            merged[key] = None
        elif all(isinstance(value, Mapping) for value in values):
            merged[key] = average(values)
        elif all(map(_is_list, values)) and len(set(map(len, values))) == 1:
            merged[key] = np.mean(np.array(values, dtype=np.float64), axis=0).tolist()
        elif all(_is_number(value) for value in values):
            numbers = np.array(values, dtype=np.float64)
            merged[key] = values[0] if np.ptp(numbers) == 0 else float(numbers.mean())
            if np.ptp(numbers) > 0:
                merged[f"{key}_sd"] = float(numbers.std(ddof=1))
            if len(values) < len(entries):
                merged[f"{key}_n"] = len(values)
        else:
            merged[key] = values[0]
    return merged


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
