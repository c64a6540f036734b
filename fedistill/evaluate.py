"""Measuring a round in a simulation, where the test rows are at hand.

Nothing here travels: in a deployment a client's accuracy on its own rows stays with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedistill.client import Site
from fedistill.distill.learner import Learner
from fedistill.metrics import accuracy, auc
from fedistill.types import Rows

Figures = dict[str, float | None]


def measure(learner: Learner, rows: Rows) -> Figures:
    """Accuracy, and AUC for two classes."""
    logits = learner.predict(rows.inputs)
    return {"accuracy": accuracy(logits, rows.labels), "auc": auc(logits, rows.labels)}


def measure_round(
    sites: Mapping[str, Site], student: Learner | None, test: Rows | None, *, pooled: bool
) -> dict[str, Any]:
    """The student on the common test rows, every client on its own, or else on those."""
    clients = {}
    for name, site in sites.items():
        rows = site.client.test if site.client.test is not None else test
        if rows is not None and len(rows):
            clients[name] = measure(site.learner, rows)
    shown = (
        measure(student, test) if student is not None and test is not None and len(test) else None
    )
    if pooled and clients:
        shown = next(iter(clients.values()))
    accuracies = [float(figures["accuracy"] or 0.0) for figures in clients.values()]
    aucs = [figures["auc"] for figures in clients.values() if figures["auc"] is not None]
    return {
        "student_accuracy": shown["accuracy"] if shown else None,
        "client_accuracy_mean": float(np.mean(accuracies)) if accuracies else None,
        "client_accuracy_min": float(np.min(accuracies)) if accuracies else None,
        "student_auc": shown["auc"] if shown else None,
        "client_auc_mean": float(np.mean(aucs)) if aucs else None,
        "client_accuracy": {name: figures["accuracy"] for name, figures in clients.items()},
        "client_auc": {name: figures["auc"] for name, figures in clients.items()} if aucs else None,
    }
