"""The methods of the field as data: a paper is a choice over the seams, a few lines each.

What a preset sets can be replaced by name: ``fd.method("ds-fl", rule=my_rule)``. Symbols of the
formulas: p_k(x) and z_k(x) are the probabilities and logits of client k on proxy row x, q(x) the
soft target, K the number of clients that answer; "phase" means that a client first learns from
the targets alone and then from its own rows, "inside" that every step sees both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedistill.aggregate.rules import option_names, options_of, sharpener, takes
from fedistill.choice import Method as Method
from fedistill.distill.recipe import Recipe
from fedistill.errors import Problem, SettingsError, did_you_mean
from fedistill.wire.codec import CODECS

PHASE = {"distil": "phase", "distil_epochs": 2}
"""Clients distil in a phase of two passes before their own rows, as DS-FL's protocol has it."""
LISTENER = {"optimizer": "adam", "lr": 1e-3, "schedule": "cosine", "distil_epochs": 5}
"""A student at the server of a method that has none, or says little about it."""
LISTENS = "a student at the server listens in so that runs compare, and teaches nobody"


def _named(entries: Iterable[Method]) -> Mapping[str, Method]:
    return {entry.name: entry for entry in entries}


OURS = Method(
    name="fedistill",
    summary="teachers weighted row by row by how familiar a row is to them (ours)",
    paper="Mansour, Mohri and Rostamizadeh 2008 for the combining; the rest is ours",
    formula="q(x) ~ sum_k (n_k r_k(x) + 100) p_k(x), r_k the density ratio of own to public rows, "
    "of mean 1 over the round; targets fade by 0.7 a round; inside",
    rule="distribution-weighted",
    familiarity="head",
    codec="simplex-6",
    cache=True,
    memory=0.7,
    client={"distil": "inside", "average": 0.95, "momentum": 0.75, "scarce_rows": 80},
    student={"optimizer": "adam", "lr": 1e-3, "distil_epochs": 8, "schedule": "cosine"},
)

AVERAGING = (
    Method(
        name="fedmd",
        summary="mean of logits, clients digest it by absolute error",
        paper="Li and Wang 2019, arXiv 1910.03581",
        formula="q = softmax(mean_k z_k); aggregate, digest (mean absolute error of logits), "
        "revisit (own rows)",
        deviations="no labelled public set and so no pre-training on it; targets are centred "
        "log-probabilities, which differ from mean logits by a constant per row; " + LISTENS,
        rule="mean-logits",
        codec="float32",
        client={"distil": "phase", "loss": "mae"},
    ),
    Method(
        name="ds-fl",
        summary="mean of probabilities, sharpened (ERA, temperature 0.1)",
        paper="Itahara et al. 2020, arXiv 2008.06180",
        formula="q = softmax(mean_k p_k / 0.1); phase, at the clients and at the server",
        deviations="rows are dealt in passes over the public set, not drawn anew each round: every "
        "row gets its first target early",
        rule="sharpened",
        codec="float32",
        client=PHASE,
    ),
    Method(
        name="feddf",
        summary="mean of logits teaches the server's student (logits only)",
        paper="Lin et al. 2020, arXiv 2006.07242",
        formula="q = softmax(mean_k z_k); the student learns from all targets so far",
        deviations="no weights travel: the server neither averages them nor sends its student "
        "back, and clients get the soft targets",
        rule="mean-logits",
        codec="float32",
        memory=1.0,
        client=PHASE,
        student=LISTENER,
    ),
    Method(
        name="fedema-distill",
        summary="the averaged weights of the server's student teach the clients",
        paper="FedEMA-Distill 2026, arXiv 2603.04422 (abstract)",
        formula="q = mean_k p_k teaches the student; theta_ema = a theta_ema + (1 - a) theta; "
        "clients learn from the predictions of theta_ema",
        deviations="a = 0.99 after each step, less at the start; its predictions go to the clients "
        "where the paper sends weights; of its three rules the plain mean (--set "
        "method.rule=median or trimmed-mean for the others)",
        rule="mean",
        codec="float16",
        teach="student",
        memory=1.0,
        client=PHASE,
        student=LISTENER | {"average": 0.99},
    ),
)

FRUGAL = (
    Method(
        name="cfd",
        summary="labels up, the student's predictions down, both as deltas on fixed rows",
        paper="Sattler et al. 2020, arXiv 2012.00632",
        formula="q = mean_k onehot(argmax p_k) teaches the student; clients learn from the "
        "student's predictions in 8 bits; entries that did not change are not sent",
        deviations="the subset is the first round's draw, not curated; predictions are made after "
        "training, not collected while it goes on; the coding of the changes is ours",
        rows="fixed",
        codec="simplex-1",
        codec_down="simplex-8",
        cache=True,
        teach="student",
        client=PHASE,
        student=LISTENER,
    ),
    Method(
        name="scarlet",
        summary="soft targets are kept and asked again when they expire; power sharpening",
        paper="Azuma et al. 2025, arXiv 2504.19602",
        formula="q ~ (mean_k p_k) ** beta, beta 2; a row with a target younger than D = 50 "
        "rounds is neither asked nor sent again",
        deviations="one predicate decides what is fresh, an expired target is replaced and not "
        "deleted, and a client that missed a round is told what it lacks: with the authors' code "
        "neither holds, and partial participation ends in an error",
        rule="power",
        options={"exponent": 2.0},
        codec="float32",
        cache=True,
        cache_rounds=50,
        client=PHASE,
    ),
    Method(
        name="fedmkt",
        summary="the most certain (or, with labels, the best) teacher of each row; top 8 classes",
        paper="Fan et al. 2024, arXiv 2406.02224",
        formula="q(x) = p_k(x) of the k with the smallest cross-entropy on the row's label; "
        "inside, the soft part a tenth of the loss",
        deviations="without labels of proxy rows ([proxy] labelled) the teacher with the smallest "
        "entropy; all receive one target, for which the receiver is a candidate as any other; "
        "classes and no tokens: nothing to align; " + LISTENS,
        rows="fixed",
        rule="best-teacher",
        codec="top-k",
        client={"distil": "inside", "soft_weight": 0.11},
        student=LISTENER,
    ),
)

SELECTIVE = (
    Method(
        name="selective-fd",
        summary="clients answer only rows like their own (kernel density ratio)",
        paper="Shao et al. 2024, Nature Communications; arXiv 2304.01731",
        formula="q(x) = mean of p_k over the k whose density ratio at x is at least the first "
        "quartile of that of their own held-out rows; rows nobody answers are left out",
        deviations="the ratio by KuLSIF with the inverse (the authors' code multiplies by the "
        "matrix), on principal components of the public rows, which also stand in for uniform "
        "auxiliary rows; all targets so far are taught; no filter at the server (--set "
        "method.ambiguity=1 for one); " + LISTENS,
        familiarity="kulsif",
        accept=0.25,
        rule="mean",
        codec="float32",
        memory=1.0,
        client=PHASE,
        student=LISTENER,
    ),
    Method(
        name="ssfl",
        summary="labels of familiar rows, put to the vote",
        paper="Zhao et al. 2022, IEEE Internet of Things Journal (intrusion detection)",
        formula="q(x) = onehot of the majority of argmax p_k(x), over the k to whom x is more "
        "familiar than the median of their own rows",
        deviations="familiarity is the network's own output for it, in place of a second network; "
        "all targets so far are taught; " + LISTENS,
        familiarity="head",
        accept=0.5,
        rule="vote",
        codec="label",
        memory=1.0,
        client=PHASE,
        student=LISTENER,
    ),
    Method(
        name="fedaux",
        summary="logits weighted row by row by a certainty score of each client",
        paper="Sattler et al. 2021, arXiv 2102.02514",
        formula="q = softmax(sum_k s_k z_k / sum_k s_k), s_k(x) the probability, by logistic "
        "regression, that x is a row of client k and not a public one",
        deviations="no pre-training on the public rows and no weights; the score is shared without "
        "noise, as the authors' bound for it does not hold for their loss",
        familiarity="logistic",
        rule="certainty",
        codec="float32",
        memory=1.0,
        client=PHASE,
        student=LISTENER,
    ),
)

PERSONAL = (
    Method(
        name="comet",
        summary="two targets a row; each client learns from the one nearer to its own prediction",
        paper="Cho et al. 2023, IEEE Journal of Selected Topics in Signal Processing 17(1)",
        formula="c = 2 centroids of the p_k(x) by k-means; client k takes the one nearest to its "
        "own prediction; the student learns from the plain mean",
        deviations="weight 1 for the distillation phase; centroids start from the data and not at "
        "random; " + LISTENS,
        rule="clusters",
        student_rule="mean",
        codec="float32",
        client=PHASE,
        student=LISTENER,
    ),
    Method(
        name="fed-et",
        summary="variance-weighted consensus with a term for those who disagree, at the server",
        paper="Cho et al. 2022, arXiv 2204.12703",
        formula="y = argmax sum_k w_k z_k, w_k ~ Var_c z_k; the student learns from "
        "(onehot(y) + 0.2 d) / 1.2, d the weighted mean of those who disagree with y",
        deviations="clients learn from the student's predictions on public rows, where the paper "
        "sends its representation; both losses in one target, which has the same gradient",
        rule="consensus",
        options={"diversity": 0.2},
        codec="float32",
        teach="student",
        memory=1.0,
        client=PHASE,
        student=LISTENER,
    ),
    Method(
        name="fd",
        summary="mean logits of each class, without public rows",
        paper="Jeong et al. 2018, arXiv 1811.11479",
        formula="client k: CE + KL(softmax(L_-k[y]) || p), L_-k[c] the mean of the others' mean "
        "logits on their own rows of class c",
        deviations="means are taken after training and not over its steps; a class that nobody "
        "else has is left out; no student at the server",
        exchange="class-logits",
        codec="float32",
        client={"distil": "never", "guide_weight": 1.0},
    ),
    Method(
        name="fedproto",
        summary="mean features of each class; a row belongs to the nearest",
        paper="Tan et al. 2022, arXiv 2105.00243",
        formula="client k: CE + mean (h - P[y])^2, P[c] the mean of all clients' mean features",
        deviations="plain mean, as in the authors' code (the paper weighs by class counts, which "
        "would be private); a class that nobody has is left out; no student at the server",
        exchange="prototypes",
        codec="float32",
        client={"distil": "never", "guide_weight": 1.0, "predict": "prototypes"},
    ),
    Method(
        name="fedhenn",
        summary="hidden features of common public rows are aligned by their kernel",
        paper="Makhija et al. 2022, arXiv 2202.07757 (as we read it)",
        formula="client k: CE + eta (1 - CKA(K(h), mean_j K_j)) on common public rows",
        deviations="eta is constant and not growing; the kernel is linear, and common rows are the "
        "same in all rounds; no student at the server",
        rows="fixed",
        exchange="kernel",
        codec="float32",
        client={"distil": "never", "guide_weight": 1.0},
    ),
)

BASELINES = (
    Method(
        name="local",
        summary="baseline: every client alone",
        exchange="nothing",
        client={"distil": "never"},
    ),
    Method(
        name="centralised",
        summary="baseline: all private rows pooled in one place",
        exchange="rows",
        client={"distil": "never"},
    ),
    Method(
        name="fedavg",
        summary="baseline: weights averaged by number of rows",
        paper="McMahan et al. 2017, arXiv 1602.05629",
        exchange="weights",
        codec="float32",
        client={"distil": "never"},
    ),
)

METHODS = _named((OURS, *AVERAGING, *FRUGAL, *SELECTIVE, *PERSONAL, *BASELINES))


def discreet(chosen: Method, *, own: bool = False) -> Method:
    """A method as it can be where all that leaves must have passed a private mechanism.

    How familiar rows are, which rows are answered and which classes were seen come straight from
    private rows. Our own preset does without; a method whose idea that is, is refused.

    Args:
        chosen: the method.
        own: its rule or familiarity was chosen by the user, and is not to be replaced.

    Raises:
        SettingsError: naming the setting that tells more.
    """
    if chosen.exchange not in {"predictions", "nothing"}:
        text = (
            f"{chosen.name} shares more than predictions, which no mechanism here makes private: "
            "choose a method that exchanges predictions"
        )
        raise SettingsError([Problem("method.preset", text)])
    asks = takes(chosen.bound_rule()) & {"familiarity", "seen"}
    if chosen.name == OURS.name and not own:
        told = "distilled inside the steps; teachers count alike, for familiarity is private (ours)"
        return dataclasses.replace(chosen, summary=told, rule="mean", familiarity="")
    if chosen.accept or (asks and (chosen.tells_familiarity() or "seen" in asks)):
        key = "method.accept" if chosen.accept else "method.rule"
        text = (
            f"{chosen.name} tells which proxy rows are like a client's own, or which classes it "
            "has, which no mechanism here makes private: take another rule or preset"
        )
        raise SettingsError([Problem(key, text)])
    return chosen


def method(name: str, **changes: Any) -> Method:
    """A preset by name, with what differs: ``fd.method("ds-fl", rule=my_rule)``.

    Keywords are the fields of :class:`Method`; those of :class:`Recipe` (``temperature``,
    ``soft_weight``, ``distil`` ...) change the clients' training.

    Raises:
        SettingsError: an unknown preset, field, codec or rule, with the nearest known one.
    """
    if name not in METHODS:
        text = f'unknown method "{name}"{did_you_mean(name, METHODS)}'
        raise SettingsError([Problem("method", text)])
    chosen = METHODS[name]
    own = {item.name for item in dataclasses.fields(Method)} - {"client", "options"}
    training = {item.name for item in dataclasses.fields(Recipe)} - {"familiarity"}
    # A rule may have a temperature of its own: "temperature" is that of the distillation loss.
    options = option_names() - training
    problems = [
        Problem(f"method.{key}", "unknown field" + did_you_mean(key, own | training | options))
        for key in changes
        if key not in own | training | options
    ]
    for key in ("codec", "codec_down"):
        codec = changes.get(key) or chosen.codec
        if codec not in CODECS:
            problems.append(
                Problem(f"method.{key}", f'unknown codec "{codec}"' + did_you_mean(codec, CODECS))
            )
    if problems:
        raise SettingsError(problems)
    if changes.get("familiarity") == "none":
        changes["familiarity"] = ""
    found = dataclasses.replace(
        chosen,
        **{key: value for key, value in changes.items() if key in own},
        client=dict(chosen.client) | {k: v for k, v in changes.items() if k in training},
        options=dict(chosen.options) | {k: v for k, v in changes.items() if k in options},
    )
    if found.rule == "clusters" and not found.student_rule:
        found = dataclasses.replace(found, student_rule="mean")
    if problems := list(_contradictions(found, changes)):
        raise SettingsError(problems)
    return found


def _contradictions(found: Method, changes: Mapping[str, Any]) -> Iterator[Problem]:
    """What was changed and makes no sense in this method, or with what else it has."""
    rules = [found.bound_rule()]
    student = found.bound_student_rule()
    rules += [student] if student is not None else []
    sharpener(found.sharpen)
    if found.exchange != "predictions":
        for key in ("rule", "student_rule", "sharpen", "codec", "cache", "late", "teach"):
            if key in changes:
                text = f"{found.name} exchanges {found.exchange}: it has no such choice"
                yield Problem(f"method.{key}", text)
        return
    known = frozenset[str]().union(*(options_of(rule) for rule in (found.rule, found.student_rule)))
    for key in sorted(set(found.options) & set(changes) - known):
        rule = found.rule if isinstance(found.rule, str) else "of your own"
        yield Problem(f"method.{key}", f"the rule {rule} has no such option: leave it out")
    if "cache_rounds" in changes and not found.cache:
        yield Problem("method.cache_rounds", "nothing is kept: set cache = true too")
    if found.cache and found.rule == "clusters":
        yield Problem("method.cache", "a cache keeps one target a row, clusters gives several")
