"""The server's half of a round: plan, check, combine, distil.

The server knows the proxy rows, the clients by id and what they upload; it never sees a private
row, a label or a weight. Every upload is checked alone, so that a bad one costs its sender the
round and nobody else.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedistill.aggregate.rules import combine, log_softmax, wants
from fedistill.aggregate.vigilance import Vigilance, flag_predictions
from fedistill.distill.learner import Learner
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import QuorumError, Rejected, RunError
from fedistill.metrics import agreement, entropy
from fedistill.presets import Method
from fedistill.seeding import derive, generator
from fedistill.store import same_names
from fedistill.types import FloatArray, Probs, ProxySet, Rows, State, fingerprint_classes
from fedistill.wire import codec as codecs
from fedistill.wire.messages import Plan, RowSpec, Targets, Upload

COARSE = 1.0
"""Nats that a codec loses on a row when it sends little more than its class."""
LARGEST_SIZE = 1 << 40
"""A claimed number of rows beyond this is absurd and refused; below, it is clamped."""


@dataclass(frozen=True)
class Answer:
    """An upload that passed the door: its predictions, decoded."""

    upload: Upload
    probs: Probs
    familiarity: FloatArray | None


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
        self.rule = method.bound_rule()
        self.run = secrets.token_hex(8)
        self.round = 0
        self.table = np.zeros((len(proxy), len(classes)), dtype=np.float32)
        self.stamp = np.zeros(len(proxy), dtype=np.int64)
        self.targets: Targets | None = None
        self.vigilance = Vigilance()

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
        return Plan(
            run=self.run,
            round=number,
            ask=self._ask(number),
            proxy=self.proxy.fingerprint,
            classes=fingerprint_classes(self.classes),
            targets=self.targets,
            clients=self._participants(number, attempt),
            quorum=self.quorum,
        )

    def _ask(self, number: int) -> RowSpec:
        count = min(self.per_round, len(self.proxy))
        return RowSpec(derive(self.seed, "proxy-rows"), number, count, len(self.proxy))

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
        self._check_sender(upload, plan, sender, seen)
        self._check_terms(upload, plan)
        self._check_claims(upload)
        answer = Answer(upload, *self._check_values(upload))
        seen.add(sender)
        return answer

    def _check_sender(self, upload: Upload, plan: Plan, sender: str, seen: set[str]) -> None:
        if upload.client not in self.enrolled:
            raise Rejected("unknown_client", "nobody of that id is enrolled")
        if upload.client != sender:
            raise Rejected("conflict", "the id belongs to another client")
        if upload.client not in plan.clients:
            raise Rejected("not_sampled", "this client was not asked")
        if upload.run != plan.run:
            raise Rejected("run", "an upload of another run")
        if upload.round != plan.round:
            raise Rejected("stale_round", f"round {upload.round}, expected {plan.round}")
        if upload.client in seen:
            raise Rejected("duplicate", "this client has answered already; the first answer counts")

    def _check_terms(self, upload: Upload, plan: Plan) -> None:
        """What both sides must mean alike before a number can be compared."""
        if upload.proxy != plan.proxy:
            raise Rejected("proxy_version", "predictions on other proxy rows")
        if upload.classes != plan.classes:
            raise Rejected("class_map", "other classes, or another order of them")
        if upload.share not in {self.shares, "none"}:
            raise Rejected("kind", f"this run exchanges {self.shares} only")
        if upload.codec != self.method.codec:
            raise Rejected("codec", f"expected {self.method.codec}")
        if upload.temperature != 1.0:
            raise Rejected("temperature", "expected predictions at temperature 1")
        if upload.familiarity != ("familiarity" in self._wanted()):
            raise Rejected("fields", "familiarity is expected by the rule, or is not")
        expected = self._expected_shape(plan, teaches=upload.share != "none")
        if upload.shape != expected:
            raise Rejected("shape", f"expected {expected}, found {upload.shape}")

    def _expected_shape(self, plan: Plan, *, teaches: bool) -> tuple[int, int]:
        return (plan.ask.count if teaches else 0, len(self.classes))

    def _check_claims(self, upload: Upload) -> None:
        """Claims about the client's own rows and privacy."""
        teaches = upload.share != "none"
        if not (int(teaches) <= upload.size <= LARGEST_SIZE) or (
            upload.size & (upload.size - 1) and upload.size
        ):
            raise Rejected("size", "expected a power of two, or 0 without own rows")
        if upload.epsilon is not None and not (
            math.isfinite(upload.epsilon) and upload.epsilon >= 0
        ):
            raise Rejected("epsilon", "expected a finite number of at least 0")
        if not re.fullmatch("[0-9a-f]+", upload.seen):
            raise Rejected("seen", "expected a bit mask in hexadecimal")
        if int(upload.seen, 16) >= 1 << len(self.classes):
            raise Rejected("seen", "the mask names classes that do not exist")

    def _check_values(self, upload: Upload) -> tuple[Probs, FloatArray | None]:
        """The predictions themselves: finite, and probabilities."""
        probs, familiarity = upload.decode()
        if not np.isfinite(probs).all():
            raise Rejected("nonfinite", "NaN or infinity among the predictions")
        if probs.size and (
            probs.min() < 0 or probs.max() > 1.01 or np.abs(probs.sum(axis=1) - 1).max() > 1e-2
        ):
            raise Rejected("not_probs", "rows must be non-negative and sum to 1")
        return probs, familiarity

    def _wanted(self) -> frozenset[str]:
        return wants(self.rule)

    # --- combine -------------------------------------------------------------------------------

    def combine(self, plan: Plan, answers: Sequence[Answer]) -> Combined:
        """From the uploads of a round to soft targets, coded as they will travel.

        Raises:
            QuorumError: fewer teachers than the quorum; the soft targets stay as they were.
        """
        teachers = self._teachers(plan, answers)
        probs, weights, flags = flag_predictions(
            {answer.upload.client: answer.probs for answer in teachers},
            {a.upload.client: a.familiarity for a in teachers if a.familiarity is not None},
            coarse=codecs.CODECS[self.method.codec].loss >= COARSE,
        )
        if (weights > 0).sum() < self.quorum:
            # Leaving the silent ones out would publish what too few clients said.
            weights = np.ones(len(teachers))
        logits = log_softmax(np.log(np.maximum(probs, 1e-12)))
        targets = combine(
            self.rule, logits, weights, sharpen=self.method.sharpen, **self._extras(teachers)
        )
        self._publish(plan, targets)
        epsilons = [answer.upload.epsilon for answer in answers]
        known = [epsilon for epsilon in epsilons if epsilon is not None]
        answered = ~np.isnan(targets).any(axis=1)
        return Combined(
            agreement=float(np.mean([agreement(p[answered], targets[answered]) for p in probs])),
            target_entropy=entropy(targets[answered]),
            flags=flags,
            # One client without a bound, and there is no bound.
            epsilon_max=max(known) if len(known) == len(epsilons) and known else None,
        )

    def _teachers(self, plan: Plan, answers: Sequence[Answer]) -> list[Answer]:
        """Those who teach, in the order of their ids: the order of arrival must not matter."""
        teachers = [answer for answer in answers if answer.upload.share == self.shares]
        if len(teachers) < self.quorum:
            raise QuorumError(
                f"round {plan.round}: {len(teachers)} usable uploads, the quorum is {self.quorum}"
            )
        return sorted(teachers, key=lambda answer: answer.upload.client)

    def _extras(self, teachers: Sequence[Answer]) -> dict[str, FloatArray]:
        """What a rule may ask for beside predictions and weights."""
        sizes = [self._rows_of(answer.upload) for answer in teachers]
        extras: dict[str, FloatArray] = {
            "seen": np.array([a.upload.seen_classes(len(self.classes)) for a in teachers]),
            "sizes": np.array(sizes, dtype=np.float64),
        }
        if "familiarity" in self._wanted():
            extras["familiarity"] = np.array([a.familiarity for a in teachers])
        return extras

    def _rows_of(self, upload: Upload) -> int:
        """The rows a client counts with: what it says now, and no more than it said at first."""
        declared = self.enrolled[upload.client]
        if declared is None:
            self.enrolled[upload.client] = declared = upload.size
        return min(upload.size, declared)

    def _publish(self, plan: Plan, targets: Probs) -> None:
        """Code the targets and keep what everybody will decode, so that all learn from the same."""
        answered = ~np.isnan(targets).any(axis=1)
        seed = derive(self.seed, "server", plan.round, "encode")
        coded = codecs.encode(self.method.codec, targets[answered], seed=seed)
        self.targets = Targets(
            spec=plan.ask,
            codec=self.method.codec,
            classes=len(self.classes),
            missing=tuple(int(row) for row in np.flatnonzero(~answered)),
            payload=codecs.pack(coded),
        )
        rows = self.targets.rows()
        self.table[rows], self.stamp[rows] = self.targets.probs(), plan.round

    def close(self, plan: Plan, answered: Collection[str]) -> None:
        """The round is done: remember it, and who answered."""
        self.round = plan.round
        self.vigilance.note_all(plan.clients, answered)

    # --- distil --------------------------------------------------------------------------------

    def distil(self) -> None:
        """Teach the server's student."""
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
        if self.targets is not None:
            told = self.targets
            arrays["targets"] = np.frombuffer(told.payload, dtype=np.uint8)
            facts["targets"] = {
                "round": told.spec.round,
                "codec": told.codec,
                "missing": list(told.missing),
            }
        return arrays, facts

    def load_state_dict(self, arrays: State, facts: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.run, self.round = facts["run"], facts["round"]
        self.table, self.stamp = np.array(arrays["table"]), np.array(arrays["stamp"])
        self.vigilance.load_state_dict(facts["vigilance"])
        self.enrolled |= facts.get("enrolled", {})
        if self.student is not None:
            saved = {k[8:]: v for k, v in arrays.items() if k.startswith("student.")}
            if isinstance(self.student, TorchStudent):
                same_names(saved, self.student.state_dict(), "the student")
            self.student.load_state_dict(saved, self._no_rows())
        if "targets" in facts:
            told = facts["targets"]
            self.targets = Targets(
                spec=self._ask(told["round"]),
                codec=told["codec"],
                classes=len(self.classes),
                missing=tuple(told["missing"]),
                payload=arrays["targets"].tobytes(),
            )
