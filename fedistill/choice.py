"""A method is a choice over the seams: which rows, which rule, which codec, who learns from what.

What it leaves open (epochs, rates, sizes) comes from the clients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedistill.aggregate.rules import Rule, configure, takes, wants
from fedistill.distill.recipe import Recipe
from fedistill.types import FloatArray, IntArray
from fedistill.wire.targets import MOST_CHOICES


@dataclass(frozen=True, kw_only=True)
class Method:
    """A choice over the seams.

    Attributes:
        name: as in settings.
        summary: one line.
        paper: where it comes from.
        formula: what it computes.
        deviations: where we differ from the paper, and why.
        exchange: ``predictions``; a name of :data:`fedistill.exchange.EXCHANGES` for methods that
            share something else; for baselines ``nothing`` or ``rows`` (pooled).
        rows: ``drawn`` anew each round, or ``fixed``: those of the first round, always.
        familiarity: how a client tells which public rows are like its own: ``head`` (one more
            output of its network), a name of :data:`fedistill.distill.density.DENSITIES`, or
            empty: only if the rule wants it, by ``head``.
        accept: a client answers only the rows that are as familiar as this quantile of its own
            rows; 0: it answers all.
        rule: how predictions become soft targets: a name, or a function.
        options: of the rule, by name; those that it does not know are left out.
        student_rule: how they become what the server's student learns, where that differs.
        sharpen: after the rule: ``none``, ``era:TEMPERATURE`` or ``power:EXPONENT``.
        ambiguity: targets this far (L1) from certainty are dropped; 2: none is.
        codec: how predictions become bytes.
        codec_down: how soft targets become bytes; empty: alike.
        cache: send what changed against what the other side holds.
        cache_rounds: rounds that a soft target stays fresh; until then its row is not asked.
        teach: ``targets``: clients learn from the soft targets; ``student``: from what the server's
            student, having learned from them, predicts.
        late: what an upload counts that is one round late, and again a round later; 0: refused.
        memory: what a soft target weighs a round later, and again a round later: 0 teaches the
            last round's rows alone, 1 the latest target of every row so far.
        client: fields of :class:`Recipe` in which a client's training differs.
        student: fields of :class:`Recipe` in which the server's student differs from a client.
    """

    name: str
    summary: str
    paper: str = ""
    formula: str = ""
    deviations: str = ""
    exchange: str = "predictions"
    rows: str = "drawn"
    familiarity: str = ""
    accept: float = 0.0
    rule: str | Rule = "mean"
    options: Mapping[str, float] = field(default_factory=dict)
    student_rule: str | Rule = ""
    sharpen: str = "none"
    ambiguity: float = 2.0
    codec: str = "u8"
    codec_down: str = ""
    cache: bool = False
    cache_rounds: int = 0
    teach: str = "targets"
    late: float = 0.0
    memory: float = 0.0
    client: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)

    def bound_rule(self) -> Rule:
        """The rule, with its options; one that remembers is new."""
        return configure(self.rule, **self.options)

    def bound_student_rule(self) -> Rule | None:
        """The rule for the server's student, where it is another one."""
        return configure(self.student_rule, **self.options) if self.student_rule else None

    def down(self) -> str:
        """The codec of soft targets."""
        return self.codec_down or self.codec

    def tells_familiarity(self) -> bool:
        """Whether uploads say how familiar each row is."""
        rule = self.bound_rule()
        of_use = wants(rule) if not self.familiarity else takes(rule)
        return self.exchange == "predictions" and "familiarity" in of_use

    def most_choices(self) -> int:
        """Targets a row that a client may be told."""
        if self.rule == "clusters":
            return int(self.options.get("centroids", 2))
        return 1 if isinstance(self.rule, str) or not self.student_rule else MOST_CHOICES

    def density(self) -> str:
        """How a client estimates familiarity; empty: it does not."""
        if self.exchange != "predictions" or not (self.accept or self.tells_familiarity()):
            return ""
        return self.familiarity or "head"

    def client_recipe(self, base: Recipe) -> Recipe:
        """How a client trains under this method."""
        shares = wants(self.bound_rule()) if self.exchange == "predictions" else frozenset[str]()
        # Who asks for the classes seen combines p(x|y): clients then train free of their class mix.
        changes = {"calibrate": "seen" in shares} | dict(self.client)
        changes["familiarity"] = self.density() == "head"
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
