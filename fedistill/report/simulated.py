"""What a simulation did to its clients on purpose: made some bad, lost some, let some be late."""

from __future__ import annotations

from collections.abc import Mapping

from fedistill.report.folder import Run
from fedistill.report.words import clean, number


def attack(run: Run) -> str:
    """Who was made bad, in a few words as ``2 × fdla, colluding``; empty if nobody was."""
    kind, count = run.setting("attack", "kind"), number(run.setting("attack", "count"))
    if not isinstance(kind, str) or not count or run.method in {"local", "centralised", "fedavg"}:
        return ""
    together = ", colluding" if run.setting("attack", "collude") is True else ""
    return f"{count:.0f} × {clean(kind, 40)}{together}"


def losses(run: Run) -> str:
    """Who was lost or late, as ``30% offline, 10% late by 1``; empty if nobody was."""
    offline, late = (number(run.setting("clients", key)) for key in ("dropout", "stragglers"))
    said = [f"{offline:.0%} offline"] if offline else []
    if late:
        said.append(f"{late:.0%} late by {number(run.setting('clients', 'lateness')) or 1:.0f}")
    return ", ".join(said)


def bad(run: Run) -> tuple[str, ...]:
    """The sites that were made bad, where the run shows which.

    The summary may name them (``bad``). Else they are those with rows of their own whose model was
    never measured, if these are exactly as many as were made bad: only honest ones are.
    """
    named = run.summary.get("bad")
    if isinstance(named, list):
        return tuple(str(name) for name in named)
    if not attack(run):
        return ()
    measured = {
        str(name)
        for row in run.rounds
        if isinstance(row.get("client_accuracy"), Mapping)
        for name in row["client_accuracy"]
    }
    hidden = tuple(
        str(name)
        for name, site in run.table("sites").items()
        if isinstance(site, Mapping) and number(site.get("rows")) and str(name) not in measured
    )
    return hidden if len(hidden) == number(run.setting("attack", "count")) else ()


def sentences(run: Run) -> list[str]:
    """What a reader must know of it before the numbers."""
    said = []
    if how := attack(run):
        names = ", ".join(clean(name, 40) for name in bad(run)[:12])
        said.append(
            f"Some sites were made bad on purpose: {how}{f' ({names})' if names else ''}. "
            "The clients' mean and least are those of the honest ones."
        )
    if how := losses(run):
        said.append(f"Sites were lost and late on purpose, in each round: {how}.")
    return said
