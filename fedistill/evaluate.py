"""Measuring a round in a simulation, where the test rows are at hand.

Nothing here travels: in a deployment a client's accuracy on its own rows stays with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fedistill.client import Site
from fedistill.distill.learner import Learner
from fedistill.dormant import client_of, standing
from fedistill.metrics import accuracy, auc, calibration_error
from fedistill.types import Rows

Figures = dict[str, float | None]
Measuring = Callable[[Mapping[str, Rows]], dict[str, Figures]]
"""From the rows that each client is measured on to its figures."""


def measure(learner: Learner, rows: Rows) -> Figures:
    """Accuracy, AUC for two classes, and how far confidence is from accuracy.

    Of a simulated bad client it is what its model can do that is measured, not what it says.
    """
    logits = getattr(learner, "honest", learner.predict)(rows.inputs)
    return {
        "accuracy": accuracy(logits, rows.labels),
        "auc": auc(logits, rows.labels),
        "calibration_error": calibration_error(logits, rows.labels),
    }


def measure_clients(
    sites: Mapping[str, Site],
    names: Collection[str],
    test: Rows | None,
    away: Measuring | None = None,
) -> dict[str, Any]:
    """Clients on their own test rows, or else on the common ones; not bad or never asked ones.

    Args:
        sites: the clients.
        names: those of them that are to be measured.
        test: the common test rows.
        away: measures clients on given rows where they work in other processes.
    """
    due = {}
    for name in names:
        client = client_of(sites, name)
        rows = client.test if client.test is not None else test
        if client.wrap is None and standing(sites, name).round and rows is not None and len(rows):
            due[name] = rows
    if away is not None:
        clients = away(due)
    else:
        clients = {name: measure(sites[name].learner, rows) for name, rows in due.items()}
    accuracies = [float(figures["accuracy"] or 0.0) for figures in clients.values()]
    aucs = [figures["auc"] for figures in clients.values() if figures["auc"] is not None]
    return {
        "client_accuracy_mean": float(np.mean(accuracies)) if accuracies else None,
        "client_accuracy_min": float(np.min(accuracies)) if accuracies else None,
        "client_auc_mean": float(np.mean(aucs)) if aucs else None,
        "client_accuracy": {name: figures["accuracy"] for name, figures in clients.items()},
        "client_auc": {name: figures["auc"] for name, figures in clients.items()} if aucs else None,
    }


def measure_student(learner: Learner | None, tests: Sequence[Rows]) -> dict[str, Any]:
    """The student's figures: the mean over the given sets of test rows."""
    found = [measure(learner, rows) for rows in tests if len(rows)] if learner else []
    aucs = [figures["auc"] for figures in found if figures["auc"] is not None]
    accuracies = [float(figures["accuracy"] or 0.0) for figures in found]
    return {
        "student_accuracy": float(np.mean(accuracies)) if found else None,
        "student_auc": float(np.mean(aucs)) if aucs else None,
    }
