"""What a run promises about private rows, how it is known, and what it does not promise.

Pure functions from the facts of a run (its ``summary.json``) to a *disclosure*: nested tables of
texts, numbers and lists that are the same in the report's page and in ``disclosure.json``. Nothing
is made up: what the facts do not tell is None, and a mechanism without its unit, relation and
delta is no guarantee.

Templates and evidence, not legal advice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PREDICTIONS = "predictions"
"""The exchange of most methods."""
FORMAT = 1
"""Version of the form of a disclosure."""
NAME = "disclosure.json"

NOTICE = "Templates and evidence, not legal advice."
CENTRAL = "central-gauss"
"""The mechanism whose noise the server adds."""
CLIPPING = ("dpsgd", "dp-head")
"""Mechanisms that clip gradients and sample rows."""
OVER_LEDGER = "all rounds, tasks and restarts, earlier runs on a site's ledger included"
OVER_RUN = "all rounds of this run"
NO_DP = ("none", "hard-label")
"""Mechanisms that are not differentially private, and say so."""
PLAIN: Mapping[str, str] = {
    "none": "This run has no differential privacy. Nothing bounds mathematically what was shared "
    "tells about a single record.",
    "hard-label": "The sites shared labels in place of probabilities. That tells less, and is NOT "
    "differentially private: nothing bounds mathematically what it tells about a single record.",
    "dpsgd": "Each site trained its model by DP-SGD: what a single {unit} adds to a step is "
    "clipped, and noise is added to the sum. Everything that the model then predicts is covered.",
    "dp-head": "Each site trained only the last layer of its model on its own rows, by DP-SGD: "
    "what a single {unit} adds to a step is clipped, and noise is added to the sum. The layers "
    "below come from public rows.",
    "gnmax": "Each site taught sub-teachers on rows of their own and let them vote. Noise was "
    "added to the counts of the votes on a proxy row, and only these noisy counts decide its "
    "answer: clear where votes agree, flat where they are at odds.",
    "central-gauss": "The server added noise to the mean of the sites' predictions. That hides "
    "sites from one another and from the public, not from the server.",
}
"""What each mechanism does, for a reader who does not know the words."""
MEANS = (
    "The promise: whether or not a single {unit} was among a site's rows, anything that the "
    "others saw was at most e^ε = {factor} times as likely, but for a chance of δ."
)
MEANS_CENTRAL = (
    "The promise: whatever a single {unit} said, anything that the other sites and the public saw "
    "was at most e^ε = {factor} times as likely as if it had said something else, but for a chance "
    "of δ."
)

DISJOINT = (
    "ε of the federation is the largest of its sites, because a person is taken to have rows at "
    "one site only. A person at two sites pays the sum of both."
)
PUBLIC_SIZE = (
    "How many rows a site has is treated as public: noise and δ depend on the exact number, and "
    "uploads tell it rounded to a power of two."
)
PUBLIC_PROXY = "The proxy rows are public: no row of theirs is protected."
UNIT: Mapping[str, str] = {
    "record": "The unit is one record. A person with several records at a site is protected as "
    "that many records: less.",
    "user": "The unit is one user with all of its rows at a site.",
    "client": "The unit is one site with all that it said. The server sees it, and is trusted.",
}
RELATION: Mapping[str, str] = {
    "add-remove": "Neighbouring data sets differ by one {unit} added or removed. Where one is "
    "replaced by another, the same run has a larger ε: never compare across relations.",
    "replace-one": "Neighbouring data sets differ in one {unit} that is replaced by another. Where "
    "one is only added or removed, the same run has a smaller ε: never compare across relations.",
}

LABEL_MIX = (
    "A site's mix of labels, with differential privacy or without. The server can estimate it from "
    "predictions on the proxy rows{measured}."
)
LABEL_MIX_BEFORE = (
    " (total-variation error 0.26 without and 0.15 with differential privacy, a uniform guess "
    "having 0.49, in a small trial with 300 rows a site)"
)
LABEL_MIX_HERE = (
    " (in this run's audit with a total-variation error of {error:.2f}, a uniform guess having "
    "{guess:.2f})"
)
LABELS_OTHERWISE = "A site's mix of labels: what it shares depends on it."
RECORDS = "Single records: nothing bounds what was shared tells about them."
MEMBERSHIP = "That a site takes part, in which rounds, and about how many rows it has."
SERVER = "Anything that a site says, against the server. How many sites there are."
BOOKS = (
    "What the account itself tells: ε so far, that a budget is spent, how much noise is planned. "
    "Where rows come and go between steps, these depend on how often a row was there before. Who "
    "knows all other rows can tell by them whether one recurs."
)
GROUPS = (
    "What is true of many rows together: a model is meant to learn it, and it may be used to guess "
    "about a person whose row was in nobody's data."
)
OUTSIDE = (
    "What other programs release about the same rows. The ledger of a site counts what fedistill "
    "spends, and nothing else."
)
ROWS = "The rows against whoever can read the site's own disk or memory."

RANDOMNESS = (
    "Noise comes from a generator that is not made for cryptography, seeded by the operating "
    "system, in floating-point numbers: an attacker who could predict it, or exploit how numbers "
    "are rounded, is outside the promise."
)
SIMULATION = (
    "The accuracies in this report were measured without noise on test rows, which no mechanism "
    "covers."
)
BASELINES = (
    "This report also holds figures of the baselines {names}, which were trained on the same rows "
    "without differential privacy: they are outside ε. A report for others should not hold them."
)
REPEATS = (
    "The run was repeated {count} times on the same rows, each time with a budget of its own: ε is "
    "that of one repeat. Who sees several pays their sum."
)
LOWER_BOUND = (
    "An audit gives a lower bound: it can show that a claim is false, never that it is true."
)


def disclosure(
    summary: Mapping[str, Any],
    *,
    exchange: str = PREDICTIONS,
    shared: Sequence[str] = (),
    measured: bool = False,
    baselines: Sequence[str] = (),
    repeats: int = 0,
) -> dict[str, Any]:
    """The disclosure of a run.

    Args:
        summary: the run's summary.json.
        exchange: what the sites exchanged, by name; empty where that is not known.
        shared: sentences on what sites shared beside predictions.
        measured: whether the report holds accuracies of the sites.
        baselines: names of what was trained beside the run on the same rows.
        repeats: how often the run was repeated with other seeds.
    """
    found = _table(summary.get("privacy"))
    name = mechanism(summary)
    unit = _text(found.get("unit")) or "record"
    promised = guarantee(summary)
    return {
        "format": FORMAT,
        "notice": NOTICE,
        "run": _run(summary),
        "mechanism": name,
        "differentially_private": promised is not None,
        "statement": _text(found.get("statement")) or unstated(name),
        "in_plain_words": plain(summary),
        "guarantee": promised,
        "noise": _noise(found) if name not in NO_DP else None,
        "audit": audited(found, promised),
        "sites": sites(summary),
        "assumptions": _assumptions(unit, found) if promised else [],
        "not_protected": not_protected(found, promised is not None, exchange, shared),
        "known_limits": _limits(promised is not None, measured, baselines, repeats),
        "notes": _texts(found.get("notes")),
    }


def mechanism(summary: Mapping[str, Any]) -> str:
    """The mechanism by name; ``none`` where none is named."""
    return _text(_table(summary.get("privacy")).get("mechanism")) or "none"


def unstated(name: str) -> str:
    """What a mechanism promises where nothing but its name is known."""
    if name == "none":
        return "no differential privacy"
    if name == "hard-label":
        return "labels in place of probabilities, which is NOT differentially private"
    return meaningless(name)


def meaningless(name: str) -> str:
    """What an epsilon without its conditions is."""
    return f"{name}: unit, relation and δ are not stated, so ε says nothing by itself"


def guarantee(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Epsilon and all that it depends on; None where any of it is missing.

    Without unit, relation and delta an epsilon says nothing, so that is no guarantee. One site
    without an epsilon, and there is none for the federation.
    """
    found = _table(summary.get("privacy"))
    told = sites(summary)
    if mechanism(summary) in NO_DP or (mechanism(summary) != CENTRAL and unbounded(summary)):
        return None
    most = (found.get("epsilon_max"), summary.get("epsilon_max"))
    spent = _largest([*most, *(one["epsilon"] for one in told.values())])
    delta = _largest([found.get("delta"), *(one["delta"] for one in told.values())])
    unit, relation = _text(found.get("unit")), _text(found.get("relation"))
    if spent is None or delta is None or not unit or not relation:
        return None
    return {
        "unit": unit,
        "relation": relation,
        "epsilon": spent,
        "delta": delta,
        "budget": _number(found.get("budget")),
        "accountant": _text(found.get("accountant")) or None,
        "over": OVER_RUN if mechanism(summary) == CENTRAL else OVER_LEDGER,
    }


def unbounded(summary: Mapping[str, Any]) -> list[str]:
    """The sites that told no epsilon: they answered nothing yet, or are not private."""
    return [name for name, one in sites(summary).items() if one["epsilon"] is None]


def sites(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is known of each site, every fact None that is not told."""
    numbers = ("epsilon", "budget", "delta", "sigma", "rate", "steps", "releases", "rows")
    told = _table(_table(summary.get("privacy")).get("sites"))
    return {
        _text(name): {
            **{key: _number(one.get(key)) for key in numbers},
            "exhausted": one.get("exhausted") is True,
            "unit": _text(one.get("unit")) or None,
            "mechanism": _text(one.get("mechanism")) or None,
            "reservations": _number(one.get("reservations")),
            "ledger_head": _text(one.get("head"), 64) or None,
        }
        for name, one in told.items()
        if isinstance(one, Mapping)
    }


def exhausted(summary: Mapping[str, Any]) -> list[str]:
    """The sites whose budget did not last."""
    return [name for name, one in sites(summary).items() if one["exhausted"]]


def plain(summary: Mapping[str, Any]) -> list[str]:
    """Mechanism and promise in sentences for a reader who does not know the words."""
    name, promised = mechanism(summary), guarantee(summary)
    unit = _text(_table(summary.get("privacy")).get("unit")) or "record"
    said = [PLAIN[name].format(unit=unit)] if name in PLAIN else []
    if promised is not None:
        means = MEANS_CENTRAL if name == CENTRAL else MEANS
        said.append(means.format(unit=unit, factor=_factor(promised["epsilon"])))
    if name not in NO_DP and name != CENTRAL and (silent := unbounded(summary)):
        said.append(
            f"{_some(silent)} told no ε: for the federation as a whole nothing is promised."
        )
    if spent := exhausted(summary):
        said.append(
            f"The budget of {_some(spent)} did not last: there, training on own rows stopped, and "
            "the rest of the federation went on."
        )
    return said


def audited(found: Mapping[str, Any], promised: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The audit's lower bound beside its ceiling, and what it says; None where none took place.

    An audit judges the claim that it found; here the claim of this run counts as well.
    """
    told = _table(found.get("audit"))
    lower, ceiling = _number(told.get("epsilon_lower")), _number(told.get("ceiling"))
    verdict = _text(told.get("verdict"))
    if lower is None and not verdict:
        return None
    claimed = None if promised is None else promised["epsilon"]
    refuted = lower is not None and claimed is not None and lower > claimed
    blunt = ceiling is not None and claimed is not None and ceiling <= claimed
    return {
        "passed": told.get("passed") is not False and not refuted,
        "epsilon_lower": lower,
        "ceiling": ceiling,
        "informative": claimed is not None and ceiling is not None and not blunt,
        "canaries": _number(told.get("canaries")),
        "confidence": _number(told.get("confidence")),
        "label_mix_error": _number(told.get("label_mix_error")),
        "label_mix_guess": _number(told.get("label_mix_guess")),
        "verdict": _judged(lower, claimed, ceiling) if refuted or not verdict else verdict,
    }


def _judged(lower: float | None, claimed: float | None, ceiling: float | None) -> str:
    found = "nothing is known" if lower is None else f"epsilon is at least {lower:.2f}"
    if claimed is None or lower is None:
        return f"{found}; nothing is claimed"
    said = f"{found}, claimed is {claimed:.2f}"
    if lower > claimed:
        return f"FAILED: {said}"
    most = "" if ceiling is None else f" (an audit of this size can show {ceiling:.2f} at most)"
    return f"passed: {said}{most}"


def not_protected(
    found: Mapping[str, Any],
    private: bool,
    exchange: str = PREDICTIONS,
    shared: Sequence[str] = (),
) -> list[str]:
    """What remains open, with or without differential privacy."""
    said = [] if private else [RECORDS]
    said += [_label_mix(found) if exchange == PREDICTIONS else LABELS_OTHERWISE]
    central = _text(found.get("mechanism")) == CENTRAL
    said += [SERVER if central else MEMBERSHIP, GROUPS]
    said += [*(f"Beside predictions: {sentence}" for sentence in shared)]
    said += [OUTSIDE] if private else []
    said += [BOOKS] if private and not central else []
    return [*said, ROWS, *_texts(found.get("not_protected"))]


def _label_mix(found: Mapping[str, Any]) -> str:
    """That the mix of labels shows, with the error of this run's audit or of a former trial."""
    audit = _table(found.get("audit"))
    error, guess = _number(audit.get("label_mix_error")), _number(audit.get("label_mix_guess"))
    if error is None or guess is None:
        return LABEL_MIX.format(measured=LABEL_MIX_BEFORE)
    return LABEL_MIX.format(measured=LABEL_MIX_HERE.format(error=error, guess=guess))


def _assumptions(unit: str, found: Mapping[str, Any]) -> list[str]:
    relation = RELATION.get(_text(found.get("relation")), "").format(unit=unit)
    central = _text(found.get("mechanism")) == CENTRAL
    sizes = [] if central else [DISJOINT, PUBLIC_SIZE]
    return [said for said in (UNIT.get(unit, ""), relation, *sizes, PUBLIC_PROXY) if said]


def _limits(private: bool, measured: bool, baselines: Sequence[str], repeats: int) -> list[str]:
    said = [RANDOMNESS, LOWER_BOUND] if private else []
    said += [SIMULATION] if measured else []
    if private and baselines:
        said.append(BASELINES.format(names=", ".join(baselines)))
    if private and repeats > 1:
        said.append(REPEATS.format(count=repeats))
    return said


def _run(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the run was, and on what: enough to tell it from another one."""
    found = _table(summary.get("privacy"))
    names = ("name", "status", "method", "exchange", "rule", "codec", "backend")
    numbers = ("rounds", "clients", "proxy_rows", "proxy_per_round")
    return {
        "purpose": _text(found.get("purpose"), 200) or None,
        **{key: _text(summary.get(key)) or None for key in names},
        **{key: _number(summary.get(key)) for key in numbers},
        "private_rounds": _number(found.get("rounds")),
        "proxy_sha256": _text(summary.get("proxy_sha256"), 64) or None,
        "versions": {
            _text(key): _text(value) for key, value in _table(summary.get("versions")).items()
        },
    }


def _noise(found: Mapping[str, Any]) -> dict[str, Any]:
    """How noise was made, and on what it was put."""
    clipped = _text(found.get("mechanism")) in CLIPPING
    return {
        "rng": _text(found.get("rng"), 120) or None,
        "sigma": _number(found.get("sigma")),
        "clip_norm": _number(found.get("clip_norm")) if clipped else None,
        "sample_rate": _number(found.get("sample_rate")) if clipped else None,
        "steps_per_round": _number(found.get("steps")) if clipped else None,
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" and others" if len(names) > 8 else "")


def _factor(epsilon: float) -> str:
    """``20`` for an epsilon of 3: the factor by which a probability may change."""
    factor = math.exp(min(epsilon, 50.0))
    return f"{factor:.3g}" if factor < 1000 else f"{factor:,.0f}"


# --- facts that may be absent or anything --------------------------------------------------------


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: object, cap: int = 300) -> str:
    """A text on one printable line; empty for anything else."""
    if not isinstance(value, str):
        return ""
    kept = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in value[:cap])
    return kept.strip()


def _texts(value: object) -> list[str]:
    return (
        [text for one in value[:40] if (text := _text(one, 400))]
        if isinstance(value, list | tuple)
        else []
    )


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _largest(values: Iterable[object]) -> float | None:
    return max((found for value in values if (found := _number(value)) is not None), default=None)
