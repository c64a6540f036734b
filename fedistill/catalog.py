"""What can be named in settings: for each kind, where its table of names lives.

The tables are resolved on first use, by string, so that reading a settings file or printing
``--help`` imports neither torch nor any implementation that is not asked for. A new rule needs
one line in its own table and none here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

TABLES: Mapping[str, str] = {
    "methods": "fedistill.presets:METHODS",
    "rules": "fedistill.aggregate.rules:RULES",
    "codecs": "fedistill.wire.codec:CODECS",
    "models": "fedistill.catalog:MODELS",
    "sources": "fedistill.data.sources:SOURCES",
    "partitions": "fedistill.data.partition:PARTITIONS",
    "shifts": "fedistill.data.stream:SHIFTS",
    "objectives": "fedistill.catalog:OBJECTIVES",
    "policies": "fedistill.continual.policies:POLICIES",
    "detectors": "fedistill.continual.detectors:DETECTORS",
    "attacks": "fedistill.attacks:ATTACKS",
    "backends": "fedistill.catalog:BACKENDS",
    "mechanisms": "fedistill.catalog:MECHANISMS",
    "encoders": "fedistill.catalog:ENCODERS",
}

MODELS: Mapping[str, str] = {
    "linear": "softmax regression",
    "mlp": "one hidden layer of `width` ReLU units (more with `depth`)",
    "lenet": "LeNet for 28x28 images: two convolutions, 120-84-classes, 61,706 parameters",
    "cnn": "three 3x3 convolutions with GroupNorm, global average pooling",
    "sequential": "a GRU over the last clicks of a session: item numbers in, next item out",
    "gradient-boosting": "scikit-learn's gradient-boosted trees, small ones for few rows",
    "hist-gradient-boosting": "scikit-learn's histogram gradient-boosted trees, for many rows",
    "logistic-regression": "scikit-learn's logistic regression",
    "random-forest": "scikit-learn's random forest",
}

OBJECTIVES: Mapping[str, str] = {
    "fine-tune": "new rows alone: what forgets",
    "er": "experience replay: labels of new and remembered rows in one mean",
    "er-ace": "replay in which new rows do not push old classes away, arXiv 2104.05025",
    "der": "remembered rows keep the logits that they had, arXiv 2004.07211",
    "der++": "der, and the labels of a second draw, arXiv 2004.07211",
    "lwf": "the student as it was teaches old classes on new rows, arXiv 1606.09282",
    "a-gem": "a step may not raise the loss on remembered rows, arXiv 1812.00420",
    "gdumb": "a new student from the memory alone: the floor, ECCV 2020",
    "cfed": "the student as it was teaches on public rows, IJCAI 2022",
    "steady": "ours: der++ on one draw, its labels freed of what a step shows too often",
}
"""What :mod:`fedistill.distill.objectives` makes; told here, where torch is not imported."""

BACKENDS: Mapping[str, str] = {
    "serial": "one client after another in this process: the reference semantics",
    "processes": "clients dealt to worker processes, one for each core: the figures of serial",
    "vectorized": "linear and mlp side by side in this process, the same to rounding; others alone",
    "flower": "Flower: real sites behind a SuperLink, or else its simulation engine (on Ray)",
}

MECHANISMS: Mapping[str, str] = {
    "none": "no differential privacy; the report says so",
    "dpsgd": "students trained by DP-SGD: what they predict is private, however often",
    "dp-head": "a head trained by DP-SGD on features learnt from public rows: for small shards",
    "gnmax": "noisy votes of sub-teachers, each taught on rows of its own",
    "central-gauss": "noise on the mean, at a trusted server: hides a client among hundreds",
    "hard-label": "labels in place of probabilities: tells less, and is NOT differentially private",
}

ENCODERS: Mapping[str, str] = {
    "auto": "patches for pictures, mixed for everything else",
    "none": "inputs as they are, scaled to length 1",
    "components": "principal components of the public rows, half whitened",
    "kernel": "how near a row is to some public rows (Nystroem features)",
    "graph": "where a row lies in the graph of nearest public rows: for very small budgets",
    "mixed": "plain numbers, graph and kernel together, condensed to 60 components",
    "patches": "how often which small patch of a picture is seen, in each part of it",
}
"""What :mod:`fedistill.privacy.encoders` makes for ``dp-head``, from public rows alone."""


def table(kind: str) -> Mapping[str, Any]:
    """The table of names of one kind.

    Raises:
        KeyError: an unknown kind.
    """
    module, _, name = TABLES[kind].partition(":")
    found: Mapping[str, Any] = getattr(importlib.import_module(module), name)
    return found


def known(kind: str) -> tuple[str, ...]:
    """The names of one kind, in the order of its table."""
    return tuple(table(kind))


def summary(kind: str, name: str) -> str:
    """One line that says what ``name`` is: its text, its ``summary`` or its docstring's start."""
    entry = table(kind)[name]
    if isinstance(entry, str):
        return entry
    text = getattr(entry, "summary", None) or getattr(entry, "__doc__", None) or ""
    return str(text).strip().split("\n", 1)[0].rstrip(".")


def refusal(value: str) -> str | None:
    """Why a mechanism that others have is refused here; None for other names."""
    found: str | None = importlib.import_module("fedistill.privacy.refused").why_refused(value)
    return found
