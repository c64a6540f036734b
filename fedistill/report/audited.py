"""The page of an audit: the verdict, every attack, and how often each one is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedistill.report import words
from fedistill.report.bars import Bar, bar_chart
from fedistill.report.charts import NARROW, Figure
from fedistill.report.folder import Point
from fedistill.report.page import fill, write
from fedistill.report.svg import COLOURS, Series, line_chart
from fedistill.report.words import clean

VIEWS: Mapping[str, str] = {
    "model": "the model, asked about the canaries",
    "proxy": "its predictions on proxy rows alone",
    "updates": "every noisy update of its training",
    "counts": "the noisy counts of its votes",
}
"""What an attacker sees."""
ATTACKS: Mapping[str, str] = {
    "loss": "loss",
    "reference": "against a reference model",
    "gradients": "which gradients explain it",
    "gradients, no noise": "the same, supposing no noise",
    "counts": "votes for the canary's label",
}
LEAST, MOST = 1e-3, 0.5
"""Where the axis of false alarms begins and ends: beyond, everything is caught and nothing told."""
STEPS = 60


def write_audit(path: Path, found: Mapping[str, Any]) -> Path:
    """Write the page of an audit.

    Args:
        path: the file.
        found: what stands in ``audit.json``.

    Raises:
        RunError: it cannot be written.
    """
    return write(path, fill("audited.html", view(found)))


def view(found: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows."""
    audits = found.get("audits", [])
    return {
        "safe": Markup,
        "name": clean(found.get("client", "audit")),
        "verdict": clean(found["verdict"], 400),
        "passed": bool(found["passed"]),
        "audited": bool(found["audited"]),
        "facts": facts(found) if audits else [],
        "attacks": [row(attack) for attack in strongest(audits)],
        "several": len(audits) if len(audits) > 1 else 0,
        "figures": [bounds_chart(found), curves(found)] if audits else [],
    }


def strongest(audits: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each attack the audit in which it found most."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for one in audits:
        for attack in one["attacks"]:
            key = attack["view"], attack["attack"]
            if key not in found or attack["epsilon_one_run"] > found[key]["epsilon_one_run"]:
                found[key] = attack
    return list(found.values())


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of the audit as a whole."""
    claimed, noise, sigma = (found[key] for key in ("epsilon_claimed", "noise_measured", "sigma"))
    told = [
        ("ε, lower bound", f"{found['epsilon_lower']:.2f}"),
        ("ε, claimed", "none" if claimed is None else f"{claimed:.2f}, {found['claim']}"),
        ("ceiling", f"{found['ceiling']:.2f}: no audit of this size can show more"),
        ("δ", f"{found['delta']:g}"),
        ("confidence", words.percent(found["confidence"])),
        ("mechanism", clean(found["mechanism"])),
        ("unit, relation", f"{clean(found['unit'])}, {clean(found['relation'])}"),
        ("rows, canaries", f"{found['rows']:,}, {found['canaries']:,}"),
    ]
    if noise is not None:
        told.append(
            ("noise in what was released", f"{noise:.3f} sensitivities, charged {sigma:.3f}")
        )
    mix = f"error {found['label_mix_error']:.3f}, a uniform guess {found['label_mix_guess']:.3f}"
    return [*told, ("label mix from predictions", mix)]


def row(attack: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    return [
        f"{VIEWS[attack['view']]}: {ATTACKS[attack['attack']]}",
        f"{attack['epsilon_one_run']:.2f}",
        f"{attack['right']} of {attack['guesses']}" if attack["guesses"] else words.MISSING,
        f"{attack['epsilon_rates']:.2f}",
        words.share(attack["auc"]),
        words.percent(attack["tpr_at_1_percent"]),
    ]


def bounds_chart(found: Mapping[str, Any]) -> Figure:
    """The lower bounds beside the claim and the ceiling."""
    best: dict[str, float] = {}
    for attack in strongest(found["audits"]):
        seen = attack["view"]
        best[seen] = max(best.get(seen, 0.0), attack["epsilon_one_run"])
    bars = [Bar(f"at least, from {name}", value, 0) for name, value in best.items()]
    if found["epsilon_claimed"] is not None:
        bars.append(Bar("claimed", found["epsilon_claimed"], 1))
    bars.append(Bar("ceiling of this audit", found["ceiling"], 6))
    title = "Epsilon: what was shown, what is claimed"
    drawn = [
        bar_chart(
            bars,
            ident=f"audit-bounds-{width}",
            title=title,
            value_format="{:.2f}".format,
            width=width,
        )
        for width in (900, NARROW)
    ]
    return Figure(title, "A bound above the claim refutes it. A bound of 0 has no bar.", *drawn)


def curves(found: Mapping[str, Any]) -> Figure:
    """Canaries caught by false alarms, and what the claim permits."""
    series = [
        Series(
            f"{attack['view']}, {attack['attack']}",
            [Point(max(x, LEAST), y) for x, y in attack["curve"] if x <= MOST],
            colour=number % COLOURS,
        )
        for number, attack in enumerate(strongest(found["audits"]))
    ]
    places = [LEAST * (MOST / LEAST) ** (step / STEPS) for step in range(STEPS + 1)]
    series.append(Series("a guess", [Point(x, x) for x in places], COLOURS - 1, 1, "thin"))
    claimed = found["epsilon_claimed"]
    if claimed is not None:
        most = [Point(x, permitted(x, claimed, found["delta"])) for x in places]
        series.append(Series("most that the claim permits", most, COLOURS - 1, 2))
    title = "Canaries caught, by false alarms"
    drawn = [
        line_chart(
            series,
            ident=f"audit-curves-{width}",
            title=title,
            x_label="canaries that were out and are called in",
            y_label="canaries that were in and are called in",
            x_format=lambda value: f"{100 * value:g}%",
            y_format=lambda value: f"{100 * value:.0f}%",
            width=width,
            log_x=True,
            least=0.0,
            most=1.0,
            names_at_ends=False,
        )
        for width in (900, NARROW)
    ]
    caption = "On the left, where false alarms are few, is where a person is singled out."
    return Figure(title, caption, *drawn)


def permitted(false: float, epsilon: float, delta: float) -> float:
    """The largest true positive rate at a false positive rate under (epsilon, delta)-DP."""
    return min(
        1.0,
        math.exp(epsilon) * false + delta,
        1 - math.exp(-epsilon) * max(1 - delta - false, 0.0),
    )
