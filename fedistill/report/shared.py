"""What the sites shared beside predictions, in the words of whoever defines it.

A page must not say that only predictions left a site where something else did. What a run
exchanged is read from its summary, or follows from its method; of a method that is not known here
nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedistill.choice import Method
from fedistill.errors import FedistillError
from fedistill.presets import METHODS, discreet, method
from fedistill.privacy.terms import PRIVATE
from fedistill.report.folder import Run

PREDICTIONS = "predictions"
TABLES = {"class-logits", "prototypes", "kernel", "weights"}
"""Exchanges of something else, which :data:`fedistill.exchange.EXCHANGES` describes."""


def exchange(run: Run) -> str:
    """What the sites exchanged, by name; empty where that is not known."""
    if told := run.text("exchange"):
        return told
    chosen = method_of(run)
    return chosen.exchange if chosen is not None else ""


def method_of(run: Run) -> Method | None:
    """The run's method with what its settings change; None for one of the user's own.

    In a private run it is the method without what comes straight from private rows.
    """
    if run.method not in METHODS:
        return None
    table = run.setting("method")
    changes = dict(table) if isinstance(table, Mapping) else {}
    changes.pop("preset", None)
    try:
        chosen = method(run.method, **changes)
        return discreet(chosen) if run.mechanism in PRIVATE else chosen
    except (FedistillError, TypeError, ValueError):  # a file from elsewhere, or of another version
        return METHODS[run.method]


def what(run: Run) -> str:
    """What the tables hold that were exchanged in place of predictions; else empty."""
    return _described(run)[0]


def tells(run: Run) -> str:
    """What such a table tells beyond predictions; else empty."""
    return run.text("tells", 400) or _described(run)[1]


def beside(run: Run) -> list[str]:
    """What uploads of predictions tell beside them, in sentences."""
    chosen = method_of(run)
    if chosen is None or exchange(run) != PREDICTIONS:
        return []
    said = []
    if chosen.tells_familiarity():
        said.append(
            "With each prediction went how familiar the row is to the site: that shows where in "
            "the proxy rows its own rows lie."
        )
    if chosen.accept:
        said.append(
            "Sites answered only rows like their own: which ones shows, more coarsely, where their "
            "own rows lie."
        )
    if chosen.rule == "calibrated":
        said.append("Each site told which classes it has met.")
    return said


def _described(run: Run) -> tuple[str, str]:
    name = exchange(run)
    if name not in TABLES:
        return "", ""
    from fedistill.exchange import EXCHANGES  # brings torch, which no other report needs

    return EXCHANGES[name].summary, EXCHANGES[name].tells
