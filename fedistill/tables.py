"""The round of methods that exchange tables: one site and one server for all of them.

What differs between these methods is data (:mod:`fedistill.exchange`). The loop, the messages, the
door and the backends are those of predictions: a plan carries the combined table down, an upload
carries a client's own table up, both as float32 with a bit for each absent item.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedistill.client import Site
from fedistill.door import Answer, check_shape
from fedistill.errors import Problem, QuorumError, Rejected, RunError, SettingsError
from fedistill.exchange import EXCHANGES, Exchange, means_of_others
from fedistill.seeding import derive
from fedistill.select import Answers
from fedistill.server import Combined, Server, alarmed
from fedistill.types import FloatArray, IntArray, State, fingerprint_classes
from fedistill.wire.messages import Plan, RowSpec, Upload, bucket
from fedistill.wire.table import Table

LARGEST = 1e6
"""A value beyond this is of no model that learned anything, and would drown what others say."""


class TableSite(Site):
    """A client that applies the combined table, trains, and describes what it learned."""

    @property
    def exchange(self) -> Exchange:
        """What is exchanged."""
        return EXCHANGES[self.method.exchange]

    def agree(self, plan: Plan, measured: str = "") -> None:
        """Refuse, beside what every site refuses, a table of another shape than can be."""
        super().agree(plan, measured)
        if plan.ask.count > self.exchange.public:
            raise Rejected("shape", f"a table is about {self.exchange.public} public rows at most")
        if plan.table is None:
            return
        items, width = self.exchange.sides(len(self.classes), plan.ask.count)
        told = plan.table.shape
        if (items and told[0] != items) or (width and told[1] != width):
            raise Rejected("shape", f"expected a table of {items} times {width}, found {told}")

    def absorb(self, plan: Plan) -> None:
        """Apply the table of the others, if there is one yet."""
        self.exchange.check(self.learner)
        if plan.table is not None:
            self.exchange.apply(self.learner, plan.table.values, self._public(plan))

    def share(self, plan: Plan, said: Answers | None = None) -> Upload:
        """The own table after training; a client without rows of its own sends none."""
        del said
        rows = self.data
        table = Table(np.empty((0, 0), dtype=np.float32))
        if len(rows):
            classes = len(self.classes)
            found = self.exchange.describe(self.learner, rows, self._public(plan), classes)
            table = Table(found.astype("<f4"))
        teaches = len(rows) > 0
        absent, values = table.parts()
        return Upload(
            client=self.client.id,
            run=plan.run,
            round=plan.round,
            proxy=plan.proxy,
            classes=plan.classes,
            share=self.exchange.name if teaches else "none",
            codec="float32",
            shape=table.shape,
            size=bucket(len(rows)),
            payload=values,
            declined=absent,
            drift=self.alarm if plan.watch else None,
        )

    def _public(self, plan: Plan) -> FloatArray:
        """The public rows that a table is about: the same in every round."""
        return self.proxy.inputs[plan.ask.rows()]


class TableServer(Server):
    """A server that combines tables. It trains no student: with FedAvg, its student is the average.

    Raises:
        SettingsError: weights are exchanged, and the server has no torch model to begin with.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.exchange = EXCHANGES[self.method.exchange]
        self.shares = self.exchange.name
        self.common: FloatArray | None = None
        self.own: dict[str, FloatArray] = {}
        if self.exchange.start is not None:
            if not isinstance(self.student, self.exchange.needs):
                text = "fedavg needs a torch model at the server and the same one at every client"
                raise SettingsError([Problem("student.model", text)])
            self.common = self.exchange.start(self.student)

    # --- plan ----------------------------------------------------------------------------------

    def plan(self, number: int, attempt: int = 0) -> Plan:
        """Who is asked, with the table of the last round: for a client that is left out, its own.

        Raises:
            RunError: the proxy rows changed.
        """
        if self.proxy.measure() != self.proxy.fingerprint:
            raise RunError("the proxy rows changed during the run: restore the file and --resume")
        clients = self._participants(number, attempt)
        return Plan(
            run=self.run,
            round=number,
            ask=self._ask(number),
            proxy=self.proxy.fingerprint,
            classes=fingerprint_classes(self.classes),
            table=None if self.common is None else Table(self.common),
            clients=clients,
            quorum=self.quorum,
            own={n: {"table": Table(self.own[n])} for n in clients if n in self.own},
            **self._watch(),
        )

    def _ask(self, number: int) -> RowSpec:
        """The public rows that tables are about: those of the first round, always."""
        del number
        count = min(self.exchange.public, self.per_round, len(self.proxy))
        return RowSpec(derive(self.seed, "proxy-rows"), 1, count, len(self.proxy))

    # --- check ---------------------------------------------------------------------------------

    def _open(self, upload: Upload, asked: IntArray, late: int) -> Answer:
        """The table of one client, absent items as NaN rows."""
        teaches = upload.share != "none"
        items, width = self._expected(len(asked), upload.shape[1]) if teaches else (0, 0)
        check_shape(upload, (items, width), partial=teaches)
        if 4 * items * width > self.limit:
            raise Rejected("shape", "the table is larger than a message may be")
        values = Table.read([items, width], [upload.declined, upload.payload]).values
        if teaches and np.isnan(values[:, :1]).all():
            raise Rejected("shape", "a table without anything in it")
        if np.abs(np.nan_to_num(values)).max(initial=0.0) > LARGEST:
            raise Rejected("extreme", f"values beyond {LARGEST:g}")
        return Answer(upload, np.arange(items), values, upload.read_familiarity(), age=late)

    def _expected(self, asked: int, told: int) -> tuple[int, int]:
        """Items and width of a table; the width it tells where clients may differ in it."""
        items, width = self.exchange.sides(len(self.classes), asked)
        if self.exchange.start is not None and self.common is not None:
            items, width = self.common.shape
        return items, width or told

    # --- combine -------------------------------------------------------------------------------

    def combine(self, plan: Plan, answers: Sequence[Answer]) -> Combined:
        """From the tables of a round to the one that all are sent.

        Raises:
            QuorumError: fewer usable tables than the quorum; the last ones stay.
        """
        teachers = self._teachers(plan, answers)
        usual = _usual_width([answer.probs.shape[1] for answer in teachers])
        odd = [a.upload.client for a in teachers if a.probs.shape[1] != usual]
        try:
            teachers = self._teachers(plan, [a for a in teachers if a.upload.client not in odd])
        except QuorumError as shortage:
            raise QuorumError(f"{shortage}: {len(odd)} tables are of another width") from None
        for answer in teachers:
            self._rows_of(answer.upload)  # notes what a client declares at first
        sizes = np.array([self.enrolled[a.upload.client] for a in teachers], dtype=np.float64)
        tables = np.array([answer.probs for answer in teachers], dtype=np.float64)
        self.common = self.exchange.combine(tables, sizes).astype(np.float32)
        self.own = {}
        if self.exchange.leave_out:
            others = means_of_others(tables).astype(np.float32)
            self.own = {a.upload.client: t for a, t in zip(teachers, others, strict=True)}
        if self.student is not None and self.exchange.start is not None:
            self.exchange.apply(self.student, self.common, self.proxy.inputs[plan.ask.rows()])
        return Combined(flags={name: ["width"] for name in odd}, alarms=alarmed(answers))

    def distil(self, plan: Plan | None = None) -> None:
        """Nothing: a table teaches nobody without own rows."""

    # --- state ---------------------------------------------------------------------------------

    def digest(self) -> str:
        """sha256 of the combined table."""
        common = np.empty(0) if self.common is None else np.nan_to_num(self.common)
        return hashlib.sha256(np.ascontiguousarray(common, "<f4").tobytes()).hexdigest()

    def state_dict(self) -> tuple[State, dict[str, Any]]:
        """As that of a server, with the tables."""
        arrays, facts = super().state_dict()
        tables = {f"own.{name}": table for name, table in self.own.items()}
        if self.common is not None:
            tables["common"] = self.common
        return dict(arrays) | tables, facts

    def load_state_dict(self, arrays: State, facts: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        super().load_state_dict(arrays, facts)
        self.common = np.array(arrays["common"]) if "common" in arrays else self.common
        self.own = {k[4:]: np.array(v) for k, v in arrays.items() if k.startswith("own.")}


def _usual_width(widths: Sequence[int]) -> int:
    """The width of most tables; of two that are as frequent, the smaller."""
    counts = Counter(widths)
    return min(counts, key=lambda width: (-counts[width], width))
