"""Aggregation rules: many teachers to one soft target a row.

A rule is a plain function ``rule(logits, weights) -> probs``:

* ``logits``: ``[clients, rows, classes]``, any real scores (log-probabilities will do);
* ``weights``: ``[clients]``, or ``[clients, rows]`` after a selector; non-negative;
* returns ``[rows, classes]``, each row non-negative with sum 1.

A rule that wants more asks for it by name and is given it: ``seen`` ``[clients, classes]`` (bool),
``familiarity`` ``[clients, rows]`` (log density ratio of a client's own rows to the proxy rows),
``sizes`` ``[clients]`` (bucketed number of own rows), ``clients`` (their ids, in order) or
``anchors`` ``[rows]`` (labels of the proxy rows that the server knows, -1 elsewhere). What has a
default is given if there is such a thing. A row on which every weight is zero gets NaN and is
dropped by the server; it is never 0/0 by accident.

A rule that declares how it reads (:mod:`fedistill.aggregate.chunked`) is given some rows at a time,
so that more may be asked than memory holds.

Two kinds of rules are more than that. One that remembers from round to round is a class: an object
of it is the rule, with ``state_dict`` and ``load_state_dict`` of plain values. One that returns
``[rows, choices, classes]`` leaves each client the choice of its target.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from fedistill.aggregate.basics import log_softmax as log_softmax
from fedistill.aggregate.basics import pool as pool
from fedistill.aggregate.basics import softmax as softmax
from fedistill.aggregate.basics import spread as spread
from fedistill.aggregate.chunked import HUGE, Chunked, by_parts, joined, of_rows, parts, reads
from fedistill.aggregate.chunked import chunkwise as chunkwise
from fedistill.aggregate.chunked import rowwise as rowwise
from fedistill.aggregate.clusters import clusters
from fedistill.aggregate.evidence import FAMILIARITY_LIMIT as FAMILIARITY_LIMIT
from fedistill.aggregate.evidence import evidence as evidence
from fedistill.aggregate.evidence import normalised_ratios as normalised_ratios
from fedistill.aggregate.methods import (
    best_teacher,
    certainty,
    confidence,
    consensus,
    entropy_weighted,
    vote,
)
from fedistill.aggregate.robust import (
    geometric_median,
    geometric_median_client,
    krum,
    median,
    trimmed_mean,
)
from fedistill.aggregate.trust import AnchoredTrust, Trust
from fedistill.errors import FedistillError
from fedistill.types import FloatArray, Logits, Probs

Rule = Callable[..., Probs]
SHARPEN = re.compile(r"(era|power):(\d+\.?\d*|\.\d+)")
WANTS = ("seen", "familiarity", "sizes", "clients", "anchors")
BY_ROW = ("familiarity", "anchors")
"""Of these, what has rows for its last axis."""

# --- rules -------------------------------------------------------------------------------------


@rowwise
def mean(logits: Logits, weights: FloatArray) -> Probs:
    """Mean of probabilities (linear pool): q = sum_k w_k p_k."""
    return pool(softmax(logits), spread(weights, logits.shape[1]))


@rowwise
def mean_logits(logits: Logits, weights: FloatArray) -> Probs:
    """Mean of logits (geometric pool): q = softmax(sum_k w_k z_k); FedMD, FedDF.

    Logits arrive as log-probabilities: they differ from the raw scores by a constant per row and
    client, which the softmax of a weighted sum removes, so the targets are the same.
    """
    share = spread(weights, logits.shape[1])
    return softmax(np.einsum("kr,krc->rc", share, log_softmax(logits)))


def era(probs: Probs, temperature: float = 0.1) -> Probs:
    """Entropy-reduction aggregation of DS-FL: softmax of *probabilities* over a temperature.

    Not free of scale: with 100 classes and more it flattens what it should sharpen; prefer
    :func:`power` there. Itahara et al., arXiv 2008.06180.
    """
    return softmax(np.asarray(probs, dtype=np.float64) / temperature)


def power(probs: Probs, exponent: float = 2.0) -> Probs:
    """Enhanced ERA of SCARLET: q_c ~ qbar_c ** exponent; 1 changes nothing, more is sharper.

    arXiv 2504.19602. Computed as softmax(exponent * log qbar).
    """
    return softmax(exponent * np.log(np.maximum(probs, 1e-30)))


@rowwise
def sharpened_mean(logits: Logits, weights: FloatArray, temperature: float = 0.1) -> Probs:
    """Mean of probabilities, then entropy-reduction (ERA, temperature 0.1); DS-FL."""
    return era(mean(logits, weights), temperature)


@rowwise
def power_mean(logits: Logits, weights: FloatArray, exponent: float = 2.0) -> Probs:
    """Mean of probabilities, then the power sharpener (exponent 2); SCARLET."""
    return power(mean(logits, weights), exponent)


@rowwise
def calibrated(logits: Logits, weights: FloatArray, *, seen: FloatArray) -> Probs:
    """Mean over the clients that have seen a class; others neither vote for it nor against it.

    For clients that train with the log of their class shares added to their logits, so that what
    they share is free of their own class mix. Each client's probabilities are renormalised over
    the classes it has met; each class takes the mean over those who have met it; a class nobody
    met gets nothing.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
        seen: ``[clients, classes]``, true where a client has met a class.
    """
    known = np.asarray(seen, dtype=bool)
    known = known | ~known.any(axis=1, keepdims=True)
    share = spread(weights, logits.shape[1])[:, :, None] * known[:, None, :]
    probs = softmax(np.where(known[:, None, :], log_softmax(logits), -np.inf))
    with np.errstate(invalid="ignore", divide="ignore"):
        score = (share * probs).sum(axis=0) / share.sum(axis=0)
    score = np.where(share.sum(axis=0) > 0, score, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        targets: Probs = score / score.sum(axis=-1, keepdims=True)
    return targets


@chunkwise
def distribution_weighted(
    logits: Logits | Chunked,
    weights: FloatArray,
    *,
    familiarity: FloatArray,
    sizes: FloatArray,
    prior_rows: float = 100.0,
) -> Probs:
    """Each row is taught by those whose own rows resemble it: w_k(x) ~ n_k r_k(x) + prior_rows.

    ``r_k`` is client k's density ratio to the proxy rows, normalised to mean 1. Without
    ``prior_rows`` this is Bayes' rule for a mixture of clients (distribution-weighted combining;
    Mansour, Mohri and Rostamizadeh 2008). The pseudo-count makes the strength adapt: ``n_k r_k``
    is about the number of own rows like ``x``, and while it is small against ``prior_rows`` the
    weights stay near the plain mean. With few labels averaging is what helps; with many, and
    clients that lack classes, the local evidence takes over.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
        familiarity: ``[clients, rows]`` log density ratio, clamped to plus and minus 8.
        sizes: ``[clients]`` number of own rows, bucketed.
        prior_rows: rows that a client's familiarity must outweigh; 0 is the pure rule.
    """
    return by_parts(mean, logits, evidence(weights, familiarity, sizes, prior_rows))


RULES: Mapping[str, Callable[..., Any]] = {
    "mean": mean,
    "mean-logits": mean_logits,
    "sharpened": sharpened_mean,
    "power": power_mean,
    "calibrated": calibrated,
    "distribution-weighted": distribution_weighted,
    "confidence": confidence,
    "entropy": entropy_weighted,
    "certainty": certainty,
    "vote": vote,
    "consensus": consensus,
    "best-teacher": best_teacher,
    "clusters": clusters,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "geometric-median": geometric_median,
    "geometric-median-client": geometric_median_client,
    "krum": krum,
    "trust": Trust,
    "trust-anchored": AnchoredTrust,
}


# --- calling a rule ----------------------------------------------------------------------------


def wants(rule: Rule) -> frozenset[str]:
    """What the rule cannot do without, of :data:`WANTS`."""
    return frozenset(n for n, p in _parameters(rule).items() if p.default is p.empty) & {*WANTS}


def takes(rule: Rule) -> frozenset[str]:
    """What the rule makes use of where there is such a thing, of :data:`WANTS`."""
    return frozenset(_parameters(rule)) & {*WANTS}


def _parameters(rule: Rule) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(rule).parameters


def combine(
    rule: Rule,
    logits: Logits | Chunked,
    weights: FloatArray,
    *,
    sharpen: str = "none",
    **extras: Any,
) -> Probs:
    """Apply a rule with what it takes, then the sharpener; the result is checked once here.

    Args:
        rule: the rule.
        logits: ``[clients, rows, classes]``; where they are read in parts, a rule that declares
            nothing still gets them all at once.
        weights: ``[clients]`` or ``[clients, rows]``.
        sharpen: ``none``, ``era:TEMPERATURE`` or ``power:EXPONENT``.
        extras: by the names of :data:`WANTS`; handed on where the rule takes them.

    Returns:
        ``[rows, classes]``, or ``[rows, choices, classes]``; rows of NaN where nobody answered.

    Raises:
        FedistillError: the rule returned something that is not a probability per row and class.
    """
    _, rows, classes = logits.shape
    if not rows:
        return np.empty((rows, classes))
    handed = {name: extras[name] for name in takes(rule) if extras.get(name) is not None}
    finish, name = sharpener(sharpen), getattr(rule, "__name__", type(rule).__name__)
    return joined(
        rows,
        (
            (part, _checked(finish(raw), raw, name))
            for part, raw in _asked(rule, logits, weights, handed, name)
        ),
    )


def _asked(
    rule: Rule,
    logits: Logits | Chunked,
    weights: FloatArray,
    handed: Mapping[str, Any],
    name: str,
) -> Iterator[tuple[slice, Probs]]:
    """What a rule says, some rows at a time; a row-wise one is asked some rows at a time too."""
    clients, rows, classes = logits.shape
    if reads(rule) == "rows":
        for part in parts(rows, clients * classes):
            some = {n: v[..., part] if n in BY_ROW else v for n, v in handed.items()}
            raw = np.asarray(rule(logits[:, part], of_rows(weights, part), **some))
            yield part, _shaped(raw, part.stop - part.start, classes, name)
        return
    if isinstance(logits, Chunked) and reads(rule) == "all":
        if clients * rows * classes > HUGE:
            warnings.warn(
                f"rule {name} reads all predictions at once, {clients * rows * classes >> 27} GB "
                "and some copies: declare it rowwise or chunkwise, or ask fewer rows",
                RuntimeWarning,
                stacklevel=2,
            )
        logits = logits.whole()
    raw = _shaped(np.asarray(rule(logits, weights, **handed)), rows, classes, name)
    for part in parts(rows, int(np.prod(raw.shape[1:]))):
        yield part, raw[part]


def _shaped(raw: Probs, rows: int, classes: int, name: str) -> Probs:
    if raw.shape not in {(rows, classes), (rows, *raw.shape[1:-1], classes)} or raw.ndim > 3:
        raise FedistillError(
            f"rule {name} must return [rows, classes] = {[rows, classes]}, returned "
            f"{list(raw.shape)}: check it with fedistill.testing.check_rule"
        )
    return raw


def _checked(probs: Probs, raw: Probs, name: str) -> Probs:
    """Targets after the sharpener, if they are probabilities wherever the rule gave any."""
    good = probs[~np.isnan(raw).any(axis=-1)]
    if good.size and not (good.min() >= 0 and np.abs(good.sum(axis=-1) - 1).max() <= 1e-6):
        raise FedistillError(
            f"rule {name} must return rows of probabilities that sum to 1: "
            "check it with fedistill.testing.check_rule"
        )
    return probs


def sharpener(spec: str) -> Callable[[Probs], Probs]:
    """The function named by ``none``, ``era:TEMPERATURE`` or ``power:EXPONENT``."""
    if spec == "none":
        return lambda probs: probs
    kind, _, value = spec.partition(":")
    if not SHARPEN.fullmatch(spec) or float(value) <= 0:
        raise FedistillError(f'sharpen: expected none, era:0.1 or power:2, found "{spec}"')
    if kind == "era":
        return partial(era, temperature=float(value))
    return partial(power, exponent=float(value))


def configure(rule: str | Rule, **options: Any) -> Rule:
    """A rule by name or as it is, with those of ``options`` bound that it knows.

    A rule that is a class is made anew: what it remembers belongs to one federation.

    Raises:
        FedistillError: no rule has that name.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise FedistillError(f'unknown rule "{rule}"; known: {", ".join(RULES)}')
        rule = RULES[rule]
    if not isinstance(rule, type) and hasattr(rule, "load_state_dict"):
        return copy.deepcopy(rule)  # what it remembers belongs to one federation
    bound = {key: value for key, value in options.items() if key in _parameters(rule)}
    if isinstance(rule, type):
        made: Rule = rule(**bound)
        return made
    return partial(rule, **bound) if bound else rule


def option_names() -> frozenset[str]:
    """Names of what can be set about any of the rules."""
    return frozenset[str]().union(*map(options_of, RULES))


def options_of(rule: str | Rule) -> frozenset[str]:
    """Names of what can be set about one rule, by name or as it is; of no rule, nothing."""
    if rule == "":
        return frozenset()
    found = RULES[rule] if isinstance(rule, str) else rule
    return frozenset(_parameters(found)) - {"logits", "weights", *WANTS}
