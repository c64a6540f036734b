"""The server's half of a round: plan, check, combine, distil.

The server knows the proxy rows, the clients by id and what they upload; it never sees a private
row, a label or a weight. Every upload is checked alone, so that a bad one costs its sender the
round and nobody else.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedistill.aggregate.methods import keep_clear
from fedistill.aggregate.rules import combine, softmax
from fedistill.aggregate.vigilance import Vigilance
from fedistill.cache import Heard, TargetCache, own_fields
from fedistill.distill.learner import Learner
from fedistill.distill.torch_student import TorchStudent
from fedistill.door import Answer as Answer
from fedistill.door import check_claims, check_codes, check_sender, check_shape, check_terms
from fedistill.errors import (
    BudgetExceeded,
    BudgetExhausted,
    FedistillError,
    QuorumError,
    Rejected,
    RunError,
)
from fedistill.late import Latecomers
from fedistill.metrics import entropy
from fedistill.panel import Panel
from fedistill.presets import Method
from fedistill.privacy.account import Account, Step
from fedistill.privacy.central import CentralNoise
from fedistill.privacy.ledger import Entry
from fedistill.seeding import derive, generator
from fedistill.store import same_names
from fedistill.types import (
    IntArray,
    Probs,
    ProxySet,
    Rows,
    State,
    fingerprint_classes,
)
from fedistill.wire import codec as codecs
from fedistill.wire.delta import delta_encode, quantise, restore
from fedistill.wire.envelope import Mask, count_bits, pack_mask
from fedistill.wire.folded import Folded
from fedistill.wire.messages import Plan, RowSpec, Targets, Upload

TARGET_PARTS = ("targets.missing", "targets.held", "targets.based", "targets.payload")
COARSE = 1.0
"""Nats that a codec loses on a row when it sends little more than its class."""


@dataclass(frozen=True)
class Combined:
    """What came of a round's uploads.

    Attributes:
        agreement: share of rows on which a teacher's top class is the target's, mean over teachers.
        target_entropy: mean entropy of the soft targets, in nats.
        flags: remarks on single clients.
        epsilon_max: largest privacy loss reported; None without differential privacy.
    """

    agreement: float | None = None
    target_entropy: float | None = None
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    epsilon_max: float | None = None
    alarms: Sequence[str] = ()


class Server:
    """Plans rounds, checks and combines uploads, teaches a student.

    Args:
        proxy: the public rows.
        classes: names of the classes, in order.
        student: the server's learner, or None.
        method: what is exchanged and how.
        enrolled: client ids with the bucketed number of rows each declared; None: not yet.
        seed: of the experiment.
        per_round: proxy rows asked in a round; 0 asks all.
        participation: share of the clients asked in a round.
        quorum: fewest teachers of a round; 0 stands for 3, or as many as can be asked at once.
        limit: largest message accepted, in bytes.
        anchors: ``[rows]`` labels of proxy rows that the server knows, -1 elsewhere.
        alarm_quorum: clients whose new rows set off an alarm in one round that make the next one a
            round of distillation; 0: alarms are not asked for.
        mechanism: how clients make private what they share, as all agreed.
        purpose: what the run is for, as all agreed.

    Attributes:
        receipts: by client the head of its privacy ledger, as it was last told. It is told back:
            a ledger that was rolled back since does not hold it.
        epsilons: by client the privacy loss that it last told of; None: without a bound.
        account: that of a trusted server, whose rule is noisy; None: there is none.
    """

    shares = "probs"
    """What teachers upload."""

    def __init__(
        self,
        proxy: ProxySet,
        classes: tuple[str, ...],
        student: Learner | None,
        method: Method,
        enrolled: Mapping[str, int | None],
        *,
        seed: int,
        per_round: int = 0,
        participation: float = 1.0,
        quorum: int = 0,
        limit: int = 64 << 20,
        anchors: IntArray | None = None,
        alarm_quorum: int = 0,
        mechanism: str = "none",
        purpose: str = "",
    ) -> None:
        self.proxy = proxy
        self.classes = classes
        self.student = student
        self.method = method
        self.enrolled = dict(sorted(enrolled.items()))
        self.seed = seed
        self.per_round = per_round or len(proxy)
        self.participation = participation
        self.quorum = quorum or max(1, min(3, self._most_teachers()))
        self.limit = limit
        self.anchors = anchors
        self.rule = method.bound_rule()
        self.student_rule = method.bound_student_rule()
        self.run = secrets.token_hex(8)
        self.round = 0
        self.alarm_quorum = alarm_quorum
        self.extra = 0
        self.alarmed = False
        size = len(proxy), len(classes)
        self.table = np.zeros(size, dtype=np.float32)
        self.stamp = np.zeros(len(proxy), dtype=np.int64)
        self.targets: Targets | None = None
        self.cache: TargetCache | None = None
        self.heard: Heard | None = None
        if method.cache:
            self.cache = TargetCache(method.down(), *size, method.cache_rounds)
            self.heard = Heard(method.codec, *size)
        self.latecomers = Latecomers(self._ask)
        self.vigilance = Vigilance()
        self.account: Account | None = None
        self.mechanism = mechanism
        self.purpose = purpose
        self.receipts: dict[str, str] = {}
        self.epsilons: dict[str, float | None] = {}
        self._let_in: dict[str, Answer] = {}

    def _most_teachers(self) -> int:
        """Clients with rows of their own among those that one round asks, at the least."""
        asked = max(1, round(self.participation * len(self.enrolled)))
        without = sum(size == 0 for size in self.enrolled.values())
        return asked - without

    # --- plan ----------------------------------------------------------------------------------

    def plan(self, number: int, attempt: int = 0) -> Plan:
        """Who is asked in round ``number``, for which rows, with the last round's soft targets.

        A further attempt at a round asks those of the one before again, and others besides.
        """
        if self.proxy.measure() != self.proxy.fingerprint:
            raise RunError("the proxy rows changed during the run: restore the file and --resume")
        clients, ask = self._participants(number, attempt), self._ask(number)
        fresh = self._fresh(ask, number)
        return Plan(
            run=self.run,
            round=number,
            ask=ask,
            skip=pack_mask(fresh),
            proxy=self.proxy.fingerprint,
            classes=fingerprint_classes(self.classes),
            targets=self.targets,
            clients=clients,
            quorum=self.quorum,
            own=self._own_fields(clients),
            **self._watch(),
            **self._terms(),
        )

    def _own_fields(self, clients: Sequence[str]) -> dict[str, dict[str, Any]]:
        """By client what it alone is told: what it lacks, and how its ledger stood."""
        own = own_fields(self.cache, self.heard, clients, self.targets)
        for name in clients:
            if receipt := self.receipts.get(name):
                own.setdefault(name, {})["receipt"] = receipt
        return own

    def _terms(self) -> dict[str, Any]:
        """What a plan says of privacy: nothing, where nothing is agreed."""
        mechanism = "" if self.mechanism == "none" else self.mechanism
        return {"mechanism": mechanism, "purpose": self.purpose}

    def _watch(self) -> dict[str, Any]:
        """What a plan says of drift: nothing, where it is not watched for."""
        if not self.alarm_quorum:
            return {}
        extra = self.extra + self.alarmed
        return {"extra": extra, "consolidate": self.alarmed, "watch": True}

    def _ask(self, number: int) -> RowSpec:
        """The rows of a round: drawn for it, or always those of the first."""
        count = min(self.per_round, len(self.proxy))
        drawn = 1 if self.method.rows == "fixed" else number
        return RowSpec(derive(self.seed, "proxy-rows"), drawn, count, len(self.proxy))

    def _fresh(self, ask: RowSpec, number: int) -> Mask:
        """Which of them have a target that is fresh enough not to be asked."""
        if self.cache is None:
            return np.zeros(ask.count, dtype=bool)
        return self.cache.fresh(ask.rows(), number)

    def _participants(self, number: int, attempt: int) -> tuple[str, ...]:
        """A share of all, drawn from those who still answer; the silent are asked now and then."""
        asked = [name for name in self.enrolled if self.vigilance.worth_asking(name, number)]
        share = max(1, self.quorum, round(self.participation * len(self.enrolled)))
        order = generator(self.seed, "participants", number).permutation(len(asked))
        return tuple(asked[index] for index in sorted(order[: share * (attempt + 1)]))

    # --- check ---------------------------------------------------------------------------------

    def check(self, data: bytes, plan: Plan, sender: str, seen: set[str]) -> Answer:
        """Let one upload in, or refuse it with a reason.

        Args:
            data: the message as it came.
            plan: what was asked.
            sender: who sent it, as the transport knows it.
            seen: clients of this round that were let in already; the new one is added.

        Raises:
            Rejected: with a short fixed reason code.
        """
        upload = Upload.from_bytes(data, self.limit)
        late = self.latecomers.age(upload.round, plan)
        asked = self.latecomers.asked[upload.round] if late else plan.clients
        check_sender(upload, sender, asked, self.enrolled, plan.run)
        if upload.round != plan.round and not late:
            raise Rejected("stale_round", f"round {upload.round}, expected {plan.round}")
        known = f"{sender} {upload.round}" if late else sender
        if known in seen or self._heard_before(upload, late):
            raise Rejected("duplicate", "this client has answered already; the first answer counts")
        check_terms(
            upload,
            plan,
            shares=self.shares,
            codec=self.method.codec,
            familiarity=self.method.tells_familiarity(),
        )
        answer = self._open(upload, self._asked(upload, plan, late), late)
        check_claims(upload, len(self.classes))
        if late and (answer.places(plan.rows()) < 0).all():
            raise Rejected("stale_round", "none of its rows is asked in this round")
        self._note(answer)
        seen.add(known)
        return answer

    def _heard_before(self, upload: Upload, late: int) -> bool:
        return bool(late) and self.latecomers.heard(upload.round, upload.client)

    def _asked(self, upload: Upload, plan: Plan, late: int) -> IntArray:
        """The rows that an upload answers: this round's, or those of the round it is of."""
        return self.latecomers.rows(upload.round) if late else plan.rows()

    def _note(self, answer: Answer) -> None:
        """Remember who was let in."""
        name = answer.upload.client
        if answer.age:
            self.latecomers.note(answer.upload.round, name)
            self.vigilance.note(name, answered=True)
        else:
            self._let_in[name] = answer
        if answer.upload.share != "none":
            self.epsilons[name] = answer.upload.epsilon

    def _open(self, upload: Upload, asked: IntArray, late: int) -> Answer:
        """Decode an upload, and judge its values."""
        teaches = upload.share != "none"
        count = len(asked) - count_bits(upload.declined, len(asked)) if teaches else 0
        partial = teaches and self.method.accept > 0
        check_shape(upload, (count, len(self.classes)), partial=partial)
        rows = asked[upload.answered(len(asked))] if teaches else asked[:0]
        reference = None
        if self.heard is not None:
            reference = self.heard.reference(upload.client, rows)
        try:
            codes = upload.codes(reference)
        except Rejected as refusal:
            if self.heard is not None and refusal.reason == "reference" and not late:
                self.heard.forget(upload.client)
            raise
        check_codes(upload.codec, codes, len(self.classes))
        read = replace(upload, payload=b"", ratios=b"")
        return Answer(read, rows, Folded(codes), upload.read_familiarity(), late)

    # --- combine -------------------------------------------------------------------------------

    def combine(self, plan: Plan, answers: Sequence[Answer]) -> Combined:
        """From the uploads of a round to soft targets, coded as they will travel.

        Raises:
            QuorumError: fewer teachers than the quorum; the soft targets stay as they were.
        """
        teachers = self._teachers(plan, answers)
        paid = self._pay(plan)
        panel, flags = Panel.of(teachers, plan.rows(), len(self.classes)).watched(
            self._known(plan.rows()),
            coarse=codecs.CODECS[self.method.codec].loss >= COARSE,
            quorum=self.quorum,
        )
        targets, lesson = self._ask_rules(panel, teachers, plan.rows())
        self._learn(plan, lesson)
        if paid is not None and self.account is not None:
            self.account.release(paid, np.ascontiguousarray(lesson, "<f4").tobytes())
        if self.method.teach == "targets":
            self._publish(plan, targets)
        clear = ~np.isnan(lesson).any(axis=1)
        return Combined(
            agreement=panel.agreement(lesson),
            target_entropy=entropy(lesson[clear]) if clear.any() else None,
            flags=flags,
            epsilon_max=self.epsilon_max(),
            alarms=alarmed(answers),
        )

    def _pay(self, plan: Plan) -> Entry | None:
        """Have the server's own ledger charge a noisy mean before it is drawn; None: it is exact.

        Raises:
            BudgetExhausted: it would cost more than is left.
        """
        if self.account is None or not isinstance(self.rule, CentralNoise):
            return None
        left = max(self.account.terms.rounds - plan.round + plan.extra + 1, 1)
        step = Step(plan.run, plan.round, left, plan.rows())
        try:
            return self.account.pay(step, self.rule, self.rule.members)
        except BudgetExceeded as refusal:
            raise BudgetExhausted(f"central-gauss: {refusal.detail}") from None

    def epsilon_max(self) -> float | None:
        """The largest privacy loss that is known of; None without a bound."""
        if self.account is not None:
            return self.account.spent()
        return _largest(list(self.epsilons.values()))

    def _ask_rules(
        self, panel: Panel, teachers: Sequence[Answer], asked: IntArray
    ) -> tuple[Probs, Probs]:
        """Targets for the clients, and what the student is to learn; NaN for rows without."""
        logits, voices = panel.logits(), panel.voices(self.method.late)
        sharpen = self.method.sharpen
        labels = self.anchors if self.anchors is not None else np.full(len(self.proxy), -1)
        extras = {
            "seen": np.array([a.upload.seen_classes(len(self.classes)) for a in teachers]),
            "sizes": np.array([self._rows_of(a.upload) for a in teachers], dtype=np.float64),
            "clients": panel.names,
            "familiarity": panel.familiarity,
            "anchors": labels[asked],
        }
        lesson = targets = combine(self.rule, logits, voices, sharpen=sharpen, **extras)
        if targets.ndim == 3 and self.student_rule is None:
            raise FedistillError(
                "the rule gives several targets a row, of which a student can learn none: set "
                'student_rule, for instance "mean"'
            )
        if self.student_rule is not None:
            lesson = combine(self.student_rule, logits, voices, sharpen=sharpen, **extras)
        lesson = keep_clear(lesson, self.method.ambiguity)
        dropped = np.isnan(lesson).any(axis=1).reshape(-1, *[1] * (targets.ndim - 1))
        return np.where(dropped, np.nan, targets), lesson

    def _teachers(self, plan: Plan, answers: Sequence[Answer]) -> list[Answer]:
        """Those who teach, in the order of their ids: the order of arrival must not matter."""
        newest: dict[str, Answer] = {}
        for answer in sorted(answers, key=lambda answer: answer.age, reverse=True):
            if answer.upload.share == self.shares:  # a fresh answer stands for a late one too
                newest[answer.upload.client] = answer
        if len(newest) < self.quorum:
            raise QuorumError(
                f"round {plan.round}: {len(newest)} usable uploads, the quorum is {self.quorum}"
            )
        return [newest[name] for name in sorted(newest)]

    def _known(self, asked: IntArray) -> Probs | None:
        """The targets of these rows that clients were told before; NaN where there are none."""
        if self.method.teach != "targets" or self.student_rule is not None:
            return None
        return np.where(self.stamp[asked, None] > 0, self.table[asked], np.nan)

    def _rows_of(self, upload: Upload) -> int:
        """The rows a client counts with: what it says now, and no more than it said at first."""
        declared = self.enrolled[upload.client]
        if declared is None:
            self.enrolled[upload.client] = declared = upload.size
        return min(upload.size, declared)

    def _learn(self, plan: Plan, lesson: Probs) -> None:
        """Keep what the student is to learn of the rows asked; all others of the round stay."""
        told = ~np.isnan(lesson).any(axis=1)
        asked = plan.rows()
        self.table[asked[told]] = lesson[told]
        rows = plan.ask.rows()
        fresh = ~np.isin(rows, asked)
        self.stamp[rows[fresh]], self.stamp[asked[told]] = plan.round, plan.round

    def _publish(self, plan: Plan, targets: Probs) -> None:
        """Code the targets and keep what everybody will decode, so that all learn from the same.

        Args:
            plan: of the round.
            targets: ``[rows asked, classes]`` or ``[rows asked, choices, classes]``.
        """
        codec, classes = self.method.down(), len(self.classes)
        if self.cache is not None and targets.ndim == 3:
            raise FedistillError(
                "a cache keeps one target a row, the rule gives several: set method.cache = false, "
                "or choose another rule"
            )
        missing = np.isnan(targets).any(axis=tuple(range(1, targets.ndim)))
        choices = targets.shape[1] if targets.ndim == 3 else 1
        seed = derive(self.seed, "server", plan.round, "encode")
        codes = quantise(codec, targets[~missing].reshape(-1, classes), seed=seed)
        asked, rows = plan.rows(), plan.ask.rows()
        if self.student_rule is None and self.method.teach == "targets":
            self.table[asked[~missing]] = restore(codec, codes, classes)
        if self.cache is not None:
            self.cache.put(asked[~missing], codes, plan.round)
        self.targets = Targets(
            round=plan.round,
            spec=plan.ask,
            codec=codec,
            classes=classes,
            choices=choices,
            missing=pack_mask(np.isin(rows, asked[missing])),
            payload=b"" if self.cache is not None else delta_encode(codec, codes),
        )

    def close(self, plan: Plan, answered: Collection[str], alarms: int = 0) -> None:
        """The round is done: remember it, who answered, and how many alarms there were."""
        self.round = plan.round
        self.extra = plan.extra
        self.alarmed = bool(self.alarm_quorum) and alarms >= self.alarm_quorum
        self.vigilance.note_all(plan.clients, answered)
        if self.method.late:  # else none are of use, and every round is new to it
            self.latecomers.close(plan, self._let_in)
        if self.cache is not None:
            self.cache.settle(plan.clients, answered)
        for name, answer in self._let_in.items():
            self.receipts |= {name: answer.upload.ledger} if answer.upload.ledger else {}
            if self.heard is not None and (codes := answer.codes) is not None and len(codes):
                self.heard.note(name, answer.rows, codes, plan.round)
        self._let_in.clear()

    def forget(self, client: str) -> None:
        """A client lacks what the plan relied on: begin anew with it, on both ways."""
        if self.cache is not None and self.heard is not None:
            self.cache.forget(client)
            self.heard.forget(client)

    # --- distil --------------------------------------------------------------------------------

    def distil(self, plan: Plan | None = None) -> None:
        """Teach the server's student; where it is the teacher, publish what it says of the rows."""
        if self.student is None:
            return
        rows, weights = self.method.lesson(self.stamp)
        self.student.absorb(
            self.proxy.inputs[rows],
            self.table[rows],
            seed=derive(self.seed, "server", self.round),
            weights=weights,
        )
        # A learner may keep what it absorbs for its next fit, and the server has no rows for one.
        self.student.fit(self._no_rows(), seed=derive(self.seed, "server-fit", self.round))
        if self.method.teach == "student" and plan is not None:
            asked = plan.rows()
            said = softmax(self.student.predict(self.proxy.inputs[asked]))
            known = self.stamp[asked] > 0
            self._publish(plan, np.where(known[:, None], said, np.nan))

    def _no_rows(self) -> Rows:
        return Rows(self.proxy.inputs[:0], np.empty(0, dtype=np.int64))

    # --- state ---------------------------------------------------------------------------------

    def digest(self) -> str:
        """sha256 of all soft targets and when each was made."""
        content = np.ascontiguousarray(self.table, "<f4").tobytes()
        return hashlib.sha256(content + self.stamp.astype("<i8").tobytes()).hexdigest()

    def state_dict(self) -> tuple[State, dict[str, Any]]:
        """Arrays and facts that a later :meth:`load_state_dict` goes on from."""
        arrays: dict[str, Any] = {"table": self.table, "stamp": self.stamp}
        if self.student is not None:
            arrays |= {f"student.{k}": v for k, v in self.student.state_dict().items()}
        facts: dict[str, Any] = {"run": self.run, "round": self.round}
        facts["vigilance"] = self.vigilance.state_dict()
        facts["enrolled"] = self.enrolled
        if self.receipts:
            facts["privacy"] = {"receipts": self.receipts, "epsilons": self.epsilons}
        if self.alarm_quorum:
            facts["drift"] = [self.extra, self.alarmed]
        for name, part in self._held().items():
            arrays |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
            facts[name] = part.facts()
        for name, memory in self._remembering().items():
            facts[name] = memory.state_dict()
        if self.targets is not None:
            parts = zip(TARGET_PARTS, self.targets.parts(), strict=True)
            arrays |= {name: np.frombuffer(part, dtype=np.uint8) for name, part in parts}
            facts["targets"] = self.targets.header()
        return arrays, facts

    def _held(self) -> dict[str, TargetCache | Heard]:
        if self.cache is None or self.heard is None:
            return {}
        return {"cache": self.cache, "heard": self.heard}

    def _remembering(self) -> dict[str, Any]:
        """What remembers plain values from round to round, rules among them."""
        parts = {"rule": self.rule, "student_rule": self.student_rule, "late": self.latecomers}
        return {name: part for name, part in parts.items() if hasattr(part, "load_state_dict")}

    def load_state_dict(self, arrays: State, facts: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.run, self.round = facts["run"], facts["round"]
        self.table, self.stamp = np.array(arrays["table"]), np.array(arrays["stamp"])
        self.vigilance.load_state_dict(facts["vigilance"])
        self.enrolled |= facts.get("enrolled", {})
        told = facts.get("privacy", {"receipts": {}, "epsilons": {}})
        self.receipts, self.epsilons = dict(told["receipts"]), dict(told["epsilons"])
        self.extra, self.alarmed = facts.get("drift", [0, False])
        if self.student is not None:
            saved = {k[8:]: v for k, v in arrays.items() if k.startswith("student.")}
            if saved and type(self.student) is TorchStudent:
                same_names(saved, self.student.state_dict(), "the student")
            if saved:  # after `forget --client ID --restart` there is none: as it was built
                self.student.load_state_dict(saved, self._no_rows())
        for name, part in self._held().items():
            start = len(name) + 1
            kept = {key[start:]: v for key, v in arrays.items() if key.startswith(f"{name}.")}
            part.load_state_dict(kept, facts[name])
        for name, memory in self._remembering().items():
            memory.load_state_dict(facts[name])
        if "targets" in facts:
            parts = [arrays[name].tobytes() for name in TARGET_PARTS]
            self.targets = Targets.read_header(facts["targets"], parts)


def alarmed(answers: Sequence[Answer]) -> list[str]:
    """Clients whose new rows set off an alarm, in order."""
    return sorted(a.upload.client for a in answers if a.upload.drift and not a.age)


def _largest(epsilons: Sequence[float | None]) -> float | None:
    """The largest privacy loss; one client without a bound, and there is no bound."""
    known = [epsilon for epsilon in epsilons if epsilon is not None]
    return max(known) if known and len(known) == len(epsilons) else None
