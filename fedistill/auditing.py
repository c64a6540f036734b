"""What ``fedistill audit`` does: train a client of a run again, with canaries, and judge its claim.

The claim is the epsilon that stands in the run's ledgers, or what the settings would spend. The
audit is a run of its own, of one client: no model, ledger or state of the run is touched, and none
that it makes is kept. It does train on the client's rows: figures that leave the site have their
price (see ``docs/auditing.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedistill import config, experiment, models, store
from fedistill.assembly import assemble, method_of
from fedistill.client import Client, new_student
from fedistill.config import Settings
from fedistill.errors import RunError, did_you_mean
from fedistill.federation import Federation
from fedistill.privacy.audit import Audit, Subject, audit_once
from fedistill.privacy.labels import hard_labels
from fedistill.privacy.ledger import LEDGER, Ledger
from fedistill.privacy.terms import RELATION, SMALLEST_DELTA
from fedistill.report.audited import strongest, write_audit
from fedistill.seeding import derive, generator

FORMAT = 1
"""Version of the form of ``audit.json``."""
FEWEST_CANARIES = 100
MOST_OWN_ROWS = 1000
"""Of a client with more rows so many are drawn: epsilon does not depend on their number, and the
fewer other rows there are, the easier canaries are to tell."""
NOT_THIS_WAY = (
    "central-gauss protects clients from one another behind a trusted server: it claims nothing "
    "about the rows of a client, so canaries among them cannot test it"
)

Say = Callable[[str], None]


def audit(
    path: str | Path,
    *,
    canaries: int = 1000,
    seeds: int = 1,
    confidence: float = 0.95,
    client: str | None = None,
    out: str | Path | None = None,
    say: Say = lambda line: None,
) -> Mapping[str, Any]:
    """Audit one client of a run, or of a settings file.

    Args:
        path: a run folder, or a settings file.
        canaries: rows with random labels, each trained on if its coin says so.
        seeds: audits, each with canaries, coins and weights of its own.
        confidence: that all bounds of all audits hold together.
        client: whose rows; None: the client with most of them.
        out: where ``audit.json`` and ``audit.html`` go; None: the run folder, or the working
            directory for a settings file.
        say: called with lines for the user.

    Returns:
        What stands in ``audit.json``; ``passed`` says whether the claim stands.

    Raises:
        RunError: there is nothing to audit here, no such client, or too few canaries.
    """
    if canaries < FEWEST_CANARIES or seeds < 1 or not 0 < confidence < 1:
        raise RunError(
            f"audit: expected at least {FEWEST_CANARIES} canaries, 1 seed and a confidence between "
            f"0 and 1, found {canaries}, {seeds} and {confidence}"
        )
    place = Path(path)
    folder = place if place.is_dir() else None
    settings = config.load(place / "config.toml" if folder else place)
    home = Path(out) if out is not None else folder or Path()
    store.probe(home)
    if settings.privacy.mechanism == "central-gauss":
        found: dict[str, Any] = _unaudited(settings)
    else:
        with models.threads(settings.backend.threads):
            found = _audited(settings, folder, canaries, seeds, confidence, client, say)
    store.save_json(home / "audit.json", found)
    page = write_audit(home / "audit.html", found)
    for line in lines(found):
        say(line)
    say(f"figures: {home / 'audit.json'}; plot: {page}")
    return found


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """An audit as it is printed."""
    if not found["audited"]:
        yield found["verdict"]
        return
    yield (
        f"{found['client']}: {found['rows']} rows, {found['canaries']} canaries, "
        f"{len(found['audits'])} audit{'s' if len(found['audits']) > 1 else ''}, "
        f"{found['mechanism']}"
    )
    for attack in strongest(found["audits"]):
        yield (
            f"  {attack['view'] + ', ' + attack['attack']:<28} epsilon >= "
            f"{attack['epsilon_one_run']:.2f} (two rates {attack['epsilon_rates']:.2f}, ceiling "
            f"{attack['ceiling']:.2f}), AUC {attack['auc']:.3f}, TPR at 1 % FPR "
            f"{attack['tpr_at_1_percent']:.3f}"
        )
    if found["noise_measured"] is not None:
        yield (
            f"  noise in what was released: {found['noise_measured']:.3f} "
            f"{found['noise_unit']}, charged {found['sigma']:.3f}"
        )
    yield (
        f"  label mix: told from proxy predictions with error {found['label_mix_error']:.3f} "
        f"(a uniform guess: {found['label_mix_guess']:.3f})"
    )
    yield found["verdict"]


# --- one client ----------------------------------------------------------------------------------


def _audited(
    settings: Settings,
    folder: Path | None,
    canaries: int,
    seeds: int,
    confidence: float,
    wanted: str | None,
    say: Say,
) -> dict[str, Any]:
    if settings.deployment.sites:
        raise RunError(
            "audit: expected settings of a simulation, found a federation of real sites, whose "
            "rows are not here: audit a simulation on a public stand-in with the same settings"
        )
    federation = assemble(settings, experiment.rows_of(settings), method_of(settings))
    chosen = pick(federation.clients, wanted)
    delta = chosen.terms.delta if chosen.terms else settings.privacy.delta or SMALLEST_DELTA
    ledgers = [] if folder is None else sorted(folder.rglob(f"sites/*/{LEDGER}"))
    subject = subject_of(settings, federation, chosen, charged_rounds(ledgers, chosen.id))
    audits = []
    for number in range(seeds):
        say(f"audit {number + 1} of {seeds}: training {chosen.id} with canaries, and without")
        audits.append(
            audit_once(
                subject,
                canaries=canaries,
                seed=derive(settings.seed, "audit", number),
                delta=delta,
                beta=(1 - confidence) / seeds,
            )
        )
    claimed, source = claim(ledgers, delta, audits)
    mechanism = chosen.terms.mechanism if chosen.terms else settings.privacy.mechanism
    return result(audits, claimed) | {
        "format": FORMAT,
        "audited": True,
        "mechanism": mechanism,
        "unit": settings.privacy.unit,
        "relation": RELATION,
        "noise_unit": "votes" if mechanism == "gnmax" else "clipping norms",
        "client": chosen.id,
        "rows": len(subject.rows),
        "rounds": subject.rounds,
        "delta": delta,
        "confidence": confidence,
        "claim": source,
    }


def pick(clients: Sequence[Client], wanted: str | None) -> Client:
    """The client that is named, or the one with most rows.

    Raises:
        RunError: no such client, or one without rows.
    """
    known = {client.id: client for client in clients}
    if wanted is not None and wanted not in known:
        raise RunError(f'audit: no client "{wanted[:64]}"{did_you_mean(wanted, known)}')
    chosen = known[wanted] if wanted else max(clients, key=lambda one: len(one.data))
    if not len(chosen.data):
        raise RunError(f"audit: {chosen.id} has no rows of its own: name another --client")
    return chosen


def subject_of(settings: Settings, federation: Federation, client: Client, done: int) -> Subject:
    """What an audit trains: the client's learner, for the private rounds of the run.

    Args:
        settings: of the run.
        federation: as the settings make it.
        client: whose rows.
        done: rounds that its ledger charged; 0: those that are planned.
    """
    recipe = federation.method.client_recipe(client.training)

    def make() -> Any:
        return new_student(
            client.build,
            recipe,
            federation.proxy,
            len(federation.classes),
            settings.seed,
            federation.device,
            client.make,
        )

    rows = client.data
    if len(rows) > MOST_OWN_ROWS:
        drawn = generator(settings.seed, "audit", "rows").permutation(len(rows))
        rows = rows.take(drawn[:MOST_OWN_ROWS])
    planned = client.terms.rounds if client.terms else settings.rounds
    hard = client.terms is None and settings.privacy.mechanism == "hard-label"
    told = {"told": hard_labels} if hard else {}
    return Subject(
        make=make,
        rows=rows,
        proxy=federation.proxy.inputs,
        classes=len(federation.classes),
        rounds=min(done, planned) or planned,
        terms=client.terms,
        per_round=settings.proxy.per_round,
        **told,
    )


# --- the claim -----------------------------------------------------------------------------------


def charged_rounds(ledgers: Sequence[Path], client: str) -> int:
    """Rounds of one run that a client's ledger has charged; 0 without a ledger."""
    entries = [e for path in ledgers if path.parent.name == client for e in Ledger(path).entries()]
    void = {entry.entry_id for entry in entries if entry.kind == "void"}
    rounds: dict[str, set[int]] = {}
    for entry in entries:
        if entry.kind == "reserve" and entry.entry_id not in void:
            rounds.setdefault(entry.run, set()).add(entry.round)
    return max(map(len, rounds.values()), default=0)


def claim(
    ledgers: Sequence[Path], delta: float, audits: Sequence[Audit]
) -> tuple[float | None, str]:
    """The epsilon that is claimed, and by what: a run's ledgers, or the audit's own account."""
    if not math.isfinite(audits[0].spent):
        return None, "none: no differential privacy is claimed"
    if ledgers:
        return max(Ledger(path).spent(delta) for path in ledgers), "ledgers of the run"
    return max(one.spent for one in audits), "what these settings spend"


def result(audits: Sequence[Audit], claimed: float | None) -> dict[str, Any]:
    """Figures and verdict of one or more audits of one client."""
    lower = max(one.epsilon for one in audits)
    ceiling = max(one.ceiling for one in audits)
    quiet = [one for one in audits if one.quiet]
    measured = [one.noise for one in audits if one.noise is not None]
    refuted = claimed is not None and lower > claimed
    return {
        "passed": not (refuted or quiet),
        "informative": claimed is not None and ceiling > claimed,
        "verdict": _verdict(lower, ceiling, claimed, quiet),
        "epsilon_lower": lower,
        "epsilon_claimed": claimed,
        "ceiling": ceiling,
        "sigma": audits[0].sigma,
        "noise_measured": min(measured, default=None),
        "canaries": audits[0].canaries,
        "label_mix_error": min(one.mix.error for one in audits),
        "label_mix_guess": audits[0].mix.guess,
        "audits": [one.facts() for one in audits],
    }


def _verdict(lower: float, ceiling: float, claimed: float | None, quiet: Sequence[Audit]) -> str:
    if quiet:
        return (
            f"FAILED: what was released holds noise of {quiet[0].noise:.3f} where "
            f"{quiet[0].sigma:.3f} was charged; epsilon is at least {lower:.2f}, claimed is "
            f"{claimed or 0:.2f}: the account does not describe what was done"
        )
    if claimed is None:
        return (
            f"no claim: nothing here is differentially private; epsilon is at least {lower:.2f} "
            f"(an audit of this size can show {ceiling:.2f} at most)"
        )
    if lower > claimed:
        return (
            f"FAILED: epsilon is at least {lower:.2f}, claimed is {claimed:.2f}: noise, clipping "
            "or sampling is not what the account says"
        )
    said = f"passed: epsilon is at least {lower:.2f}, claimed is {claimed:.2f}"
    if ceiling <= claimed:
        return (
            f"{said}; not informative at this epsilon: an audit of this size can show "
            f"{ceiling:.2f} at most, take more canaries"
        )
    return f"{said} (an audit of this size can show {ceiling:.2f} at most)"


def _unaudited(settings: Settings) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "audited": False,
        "passed": True,
        "informative": False,
        "mechanism": settings.privacy.mechanism,
        "verdict": f"not audited: {NOT_THIS_WAY}",
    }
