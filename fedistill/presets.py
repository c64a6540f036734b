"""Methods as data: a paper is a choice over the seams, a few lines each.

What a preset leaves open (epochs, rates, sizes) comes from the clients; what it sets can be
replaced by name: ``fd.method("ds-fl", rule=my_rule)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedistill.aggregate.rules import Rule, configure, sharpener, wants
from fedistill.distill.recipe import Recipe
from fedistill.errors import Problem, SettingsError, did_you_mean
from fedistill.types import FloatArray, IntArray
from fedistill.wire.codec import CODECS


@dataclass(frozen=True, kw_only=True)
class Method:
    """A choice over the seams.

    Attributes:
        name: as in settings.
        summary: one line.
        paper: where it comes from.
        deviations: where we differ from the paper, and why.
        exchange: ``predictions``; for baselines ``weights``, ``nothing`` or ``rows`` (pooled).
        rule: how predictions become soft targets: a name, or a function.
        sharpen: after the rule: ``none``, ``era:TEMPERATURE`` or ``power:EXPONENT``.
        codec: how predictions and targets become bytes.
        memory: what a soft target weighs a round later, and again a round later: 0 teaches the
            last round's rows alone, 1 the latest target of every row so far.
        prior_rows: of the rule ``distribution-weighted``.
        client: fields of :class:`Recipe` in which a client's training differs.
        student: fields of :class:`Recipe` in which the server's student differs from a client.
    """

    name: str
    summary: str
    paper: str = ""
    deviations: str = ""
    exchange: str = "predictions"
    rule: str | Rule = "mean"
    sharpen: str = "none"
    codec: str = "u8"
    memory: float = 0.0
    prior_rows: float = 100.0
    client: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)

    def bound_rule(self) -> Rule:
        """The rule as a function, with its options."""
        return configure(self.rule, prior_rows=self.prior_rows)

    def client_recipe(self, base: Recipe) -> Recipe:
        """How a client trains under this method."""
        shares = wants(self.bound_rule()) if self.exchange == "predictions" else frozenset[str]()
        # Who asks for the classes seen combines p(x|y): clients then train free of their class mix.
        changes = {"calibrate": "seen" in shares} | dict(self.client)
        changes["familiarity"] = "familiarity" in shares
        if base.momentum is not None:
            changes.pop("momentum", None)
        return dataclasses.replace(base, **changes)

    def lesson(self, stamp: IntArray) -> tuple[IntArray, FloatArray]:
        """Which proxy rows to teach, and what each weighs, given the round of each target.

        Args:
            stamp: ``[rows]``, the round in which a row's soft target was made; 0 for none.
        """
        age = stamp.max(initial=0) - stamp
        weights = np.where(stamp > 0, np.power(self.memory, age.astype(np.float64)), 0.0)
        rows = np.flatnonzero(weights > 0)
        return rows, weights[rows]

    def student_recipe(self, base: Recipe, **own: Any) -> Recipe:
        """How the server's student trains: the method's choice, then what the user sets."""
        shared = {key: value for key, value in self.client.items() if key in SHARED}
        changes = (
            shared
            | dict(self.student)
            | {
                "distil": "phase",
                "familiarity": False,
                "calibrate": False,
            }
        )
        return dataclasses.replace(base, **(changes | own))


SHARED = ("loss", "temperature", "distil_epochs")
"""What a student does like the clients unless the method says otherwise."""

METHODS: Mapping[str, Method] = {
    entry.name: entry
    for entry in (
        Method(
            name="fedistill",
            summary="teachers weighted row by row by how familiar a row is to them (ours)",
            paper="Mansour, Mohri and Rostamizadeh 2008 for the combining; the rest is ours",
            rule="distribution-weighted",
            memory=0.7,
            client={
                "distil": "inside",
                "average": 0.95,
                "momentum": 0.75,
                "scarce_rows": 80,
            },
            student={
                "optimizer": "adam",
                "lr": 1e-3,
                "distil_epochs": 8,
                "schedule": "cosine",
            },
        ),
        Method(
            name="fedmd",
            summary="mean of logits, clients digest it by absolute error",
            paper="Li and Wang 2019, arXiv 1910.03581",
            deviations="no labelled public set and so no pre-training on it; targets are centred "
            "log-probabilities, which differ from mean logits by a constant per row; a student at "
            "the server listens in so that runs compare, and teaches nobody",
            rule="mean-logits",
            codec="float32",
            client={"distil": "phase", "loss": "mae"},
        ),
        Method(
            name="ds-fl",
            summary="mean of probabilities, sharpened (ERA, temperature 0.1)",
            paper="Itahara et al. 2020, arXiv 2008.06180",
            rule="sharpened",
            codec="float32",
            client={"distil": "phase", "distil_epochs": 2},
        ),
        Method(
            name="feddf",
            summary="mean of logits teaches the server's student (logits only)",
            paper="Lin et al. 2020, arXiv 2006.07242",
            deviations="no weights travel: clients get the soft targets, not the student",
            rule="mean-logits",
            codec="float32",
            memory=1.0,
            client={"distil": "phase", "distil_epochs": 2},
            student={
                "optimizer": "adam",
                "lr": 1e-3,
                "schedule": "cosine",
                "distil_epochs": 5,
            },
        ),
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
}


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
    own = {item.name for item in dataclasses.fields(Method)}
    training = {item.name for item in dataclasses.fields(Recipe)}
    problems = [
        Problem(f"method.{key}", "unknown field" + did_you_mean(key, own | training))
        for key in changes
        if key not in own | training
    ]
    codec = changes.get("codec", chosen.codec)
    if codec not in CODECS:
        problems.append(
            Problem("method.codec", f'unknown codec "{codec}"' + did_you_mean(codec, CODECS))
        )
    if problems:
        raise SettingsError(problems)
    client = dict(chosen.client) | {k: v for k, v in changes.items() if k in training}
    result = dataclasses.replace(
        chosen, **({k: v for k, v in changes.items() if k in own} | {"client": client})
    )
    result.bound_rule()
    sharpener(result.sharpen)
    return result
