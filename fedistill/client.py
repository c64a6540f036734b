"""The client's half of a round: arrive, pay, absorb, train, predict, protect, encode, in order.

A :class:`Client` is who takes part; a :class:`Site` is that client at work, with the learner and
the soft targets it was sent. ``Site.answer`` is the whole step: message in, message out. Asked
twice for one round it returns the same stored bytes. Where what is shared is private, training is
paid for before it begins, and the answer leaves only once the ledger holds its digest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fedistill.aggregate.clusters import nearest
from fedistill.aggregate.rules import softmax, takes
from fedistill.cache import Said
from fedistill.course import Met, consolidate
from fedistill.data.erased import without_erased
from fedistill.distill.learner import Learner
from fedistill.errors import (
    BudgetExceeded,
    FedistillError,
    Rejected,
    RunError,
)
from fedistill.kept import Kept
from fedistill.members import Client as Client
from fedistill.members import Member as Member
from fedistill.newcomer import new_student as new_student
from fedistill.newcomer import observations
from fedistill.presets import Method
from fedistill.privacy.account import Account, Step
from fedistill.privacy.labels import hard_labels
from fedistill.privacy.learner import Answering, Private
from fedistill.privacy.ledger import Entry
from fedistill.seeding import derive
from fedistill.select import Answers, Selector, floats
from fedistill.types import (
    FloatArray,
    IntArray,
    Logits,
    Probs,
    ProxySet,
    State,
    fingerprint_classes,
)
from fedistill.wire import codec as codecs
from fedistill.wire.delta import delta_encode, quantise, restore
from fedistill.wire.envelope import Mask, pack_mask
from fedistill.wire.grid import Codes
from fedistill.wire.messages import Plan, Upload, bucket, seen_mask
from fedistill.wire.shelf import Shelf

LARGEST_MESSAGE = 64 << 20
"""Bytes of a plan, if nothing else was agreed."""
LARGEST_LOGIT = 1e4
"""Row-centred logits beyond this are clipped; more than 1 % of such rows is refused."""


class Site(Kept):
    """A client at work.

    Args:
        client: who.
        learner: what learns.
        proxy: the public rows.
        classes: names of the classes, in order.
        method: what is exchanged and how.
        seed: of the experiment.
    """

    def __init__(
        self,
        client: Client,
        learner: Learner,
        proxy: ProxySet,
        classes: tuple[str, ...],
        method: Method,
        seed: int,
    ) -> None:
        self.client = client
        self.learner = learner
        self.proxy = proxy
        self.classes = classes
        self.method = method
        self.seed = seed
        self.alarm = False
        self.exhausted = False
        self.saved = None
        self.touched = False
        self.path: Path | None = None
        self.runs: Path | None = None
        self.untaught: State = {}
        self.limit = LARGEST_MESSAGE
        self.device = "cpu"
        self.account = None if client.terms is None else Account(client.terms)
        if client.terms is not None and not isinstance(learner, Private):
            raise FedistillError(
                f"{client.id}: expected a learner that is paid for (quote, allow, units) where "
                f"there are terms of privacy, found {type(learner).__name__}"
            )
        self._begin()
        self.notes = list(observations(client, proxy, len(classes)))
        self.notes += [f"{client.id}: {note}" for note in getattr(learner, "notes", ())]

    def _begin(self) -> None:
        """As before the first round."""
        self.clipped = 0
        self.met: list[Met] = []
        self._turn_to(0)
        self.run = ""
        self.round = 0
        self.upload = b""
        self.refusal: Rejected | None = None
        size = len(self.proxy), len(self.classes)
        self.targets = np.zeros(size, dtype=np.float32)
        self.stamp = np.zeros(len(self.proxy), dtype=np.int64)
        # What both sides hold: soft targets that were sent here, predictions that were heard.
        self.told = Shelf(self.method.down(), *size) if self.method.cache else None
        self.said = Said(self.method.codec, *size) if self.method.cache else None

    @classmethod
    def open(
        cls,
        client: Client,
        proxy: ProxySet,
        classes: tuple[str, ...],
        method: Method,
        *,
        seed: int,
        device: str = "cpu",
        limit: int = LARGEST_MESSAGE,
    ) -> Site:
        """The site of a client, with its learner as a federation of this seed builds it.

        Args:
            client: who.
            proxy: the public rows.
            classes: names of the classes, in order.
            method: what is exchanged and how.
            seed: of the experiment.
            device: ``cpu``, ``cuda`` or ``auto``.
            limit: largest plan accepted, in bytes.
        """
        recipe = method.client_recipe(client.training)
        learner = new_student(client.build, recipe, proxy, len(classes), seed, device, client.make)
        if client.wrap is not None:
            learner = client.wrap(learner)
        site = cls(client, learner, proxy, classes, method, seed)
        site.limit, site.device = limit, device
        return site

    # --- the step ------------------------------------------------------------------------------

    def answer(self, message: bytes, measured: str = "") -> bytes:
        """Take part in one round: a plan in, an upload out.

        Args:
            message: the plan.
            measured: as in :meth:`begin`.

        Raises:
            Rejected: the plan is not for this site, or its predictions cannot be shared.
            RunError: the proxy rows changed since the start.
        """
        begun = self.begin(message, measured)
        if isinstance(begun, bytes):
            return begun
        self.absorb(begun)
        self.train(begun)
        return self.finish(begun)

    def begin(self, message: bytes, measured: str = "") -> Plan | bytes:
        """Agree to a plan, turn to the rows of the day and pay; the answer, if there is one yet.

        Args:
            message: the plan.
            measured: what the proxy rows were just measured to be, where sites share them.
        """
        plan = Plan.from_bytes(message, self.limit)
        if (plan.run, plan.round) == (self.run, self.round):
            return self._stored()
        self.agree(plan, measured)
        self._touch()
        if (released := self._released(plan)) is not None:
            return released
        self.arrive(plan)
        self.pay(plan)
        return plan

    def finish(self, plan: Plan, said: Answers | None = None) -> bytes:
        """Share, save and answer, once the training is done; ``said`` as in :meth:`share`."""
        self.upload, self.refusal = b"", None
        try:
            self.upload = self.share(plan, said).to_bytes()
        except Rejected as refusal:
            self.refusal = refusal
        self.run, self.round = plan.run, plan.round
        self.save()
        return self._stored()

    def _released(self, plan: Plan) -> bytes | None:
        """What the ledger says was released for this round: it is sent again, and not made anew."""
        return None if self.account is None else self.account.released(plan.run, plan.round)

    def _stored(self) -> bytes:
        """The answer of this round, a refusal being one too: it is not trained for again.

        What was paid for leaves only once the ledger holds its digest. It is saved before that, so
        that a process which dies in between has lost nothing, and the next one notes it.
        """
        if self.refusal is not None:
            raise self.refusal
        if self.account is not None:
            self.account.settle(self.run, self.round, self.upload)
        return self.upload

    def agree(self, plan: Plan, measured: str = "") -> None:
        """Refuse to work on other proxy rows, other classes or an old round."""
        if (measured or self.proxy.measure()) != self.proxy.fingerprint:
            raise RunError("the proxy rows changed during the run: restore the file and --resume")
        if plan.proxy != self.proxy.fingerprint:
            raise Rejected("proxy_version", "the server uses other proxy rows: fetch them again")
        if plan.classes != fingerprint_classes(self.classes):
            raise Rejected("class_map", "the server means other classes, or another order")
        told = plan.targets
        if plan.ask.total != len(self.proxy) or (
            told and (told.spec.total, told.classes) != (len(self.proxy), len(self.classes))
        ):
            raise Rejected("shape", "the server counts other proxy rows, or other classes")
        if told and told.codec != self.method.down():
            raise Rejected("codec", f"the targets come as {told.codec}, not {self.method.down()}")
        if told and told.choices > self.method.most_choices():
            raise Rejected("shape", "the server offers more targets a row than the method has")
        if plan.run == self.run and plan.round < self.round:
            raise Rejected("stale_round", f"round {plan.round} was answered, now {self.round}")
        self._agree_on_privacy(plan)

    def _agree_on_privacy(self, plan: Plan) -> None:
        """Refuse a request for less privacy than was agreed on, or for another purpose."""
        if self.account is not None:
            self.account.agree(plan.mechanism, plan.purpose, plan.receipt)
        elif plan.mechanism != ("" if self.client.mechanism == "none" else self.client.mechanism):
            asked = plan.mechanism or "none"
            raise Rejected("policy", f"agreed was {self.client.mechanism}, the server says {asked}")

    def arrive(self, plan: Plan) -> None:
        """Turn to the rows of the day; new ones test the learner before it learns them."""
        course = self.client.course
        if course is None or plan.consolidate:
            return
        now = self.met[-1].position if self.met else -1
        position = course.position(plan.round - plan.extra, now)
        if position != now:
            self._turn_to(position)
            self.met.append(Met.of(position, self.data, self.learner))

    def _turn_to(self, position: int) -> None:
        """The rows that count as own from now on."""
        course = self.client.course
        self.position = position
        self.data = self.client.data if course is None else course.rows(position)
        if self.place is not None:
            self.data = without_erased(self.data, self.place)
        own = derive(self.seed, self.client.id, "density")
        self.selector = Selector(self.method, self.data, self.proxy, own)

    def pay(self, plan: Plan) -> Entry | None:
        """Have the ledger charge the round's training before it begins; None where it is free.

        Raises:
            BudgetExceeded: it would cost more than is left: nothing is computed.
        """
        if self.account is None:
            return None
        self._read(plan)  # what cannot be learned from is refused before it costs anything
        assert isinstance(self.learner, Private)
        step = Step(plan.run, plan.round, self._left(plan), plan.rows())
        try:
            return self.account.pay(step, self.learner, self.data)
        except BudgetExceeded:
            self.exhausted = True
            raise

    def _left(self, plan: Plan) -> int:
        """Rounds in which the present rows may still be trained on, this one included."""
        assert self.account is not None
        # What the server counts as extra rounds does not make more private ones than were agreed.
        number = max(plan.round - plan.extra, self.account.rounds_before(plan.run, plan.round) + 1)
        left = 0 if plan.consolidate else max(self.account.terms.rounds - number + 1, 0)
        until = getattr(self.client.course, "left", None)
        if until is None or getattr(self.learner, "replay", None) is not None:
            return left
        return min(left, until(number) or left)  # rows that are not remembered go with their time

    def absorb(self, plan: Plan) -> None:
        """Learn from the last round's soft targets."""
        read = self._read(plan)
        if plan.targets is None or read is None:
            return
        number = plan.targets.round
        rows, codes, probs = read
        if self.told is not None:
            self.told.put(rows, codes, number)
        self.targets[rows], self.stamp[rows] = probs, number
        taught, weights = self.method.lesson(self.stamp)
        self.learner.absorb(
            self.proxy.take(taught),
            self.targets[taught],
            seed=self._seed(plan, "absorb"),
            weights=weights,
        )

    def _read(self, plan: Plan) -> tuple[IntArray, Codes, Probs] | None:
        """The soft targets that a plan brings, and what it says was heard; changes no model.

        Raises:
            Rejected: they are not finite, or changes of what is not known here.
        """
        if self.said is not None:
            self.said.learn(plan.heard)
        if plan.targets is None:
            return None
        rows, codes = plan.targets.read(self.told)
        probs = self._choose(rows, restore(self.method.down(), codes, len(self.classes)))
        if not np.isfinite(probs).all():
            raise Rejected("nonfinite", "NaN or infinity among the soft targets")
        return rows, codes, probs

    def _choose(self, rows: IntArray, probs: Probs) -> Probs:
        """Of several targets for a row, the one nearest to what the learner predicts now."""
        if len(probs) == len(rows):
            return probs
        choices = probs.reshape(len(rows), -1, len(self.classes))
        return nearest(choices, softmax(self.learner.predict(self.proxy.take(rows))))

    def train(self, plan: Plan) -> None:
        """Train on own rows; in a round of distillation, on soft targets and what is remembered.

        With an account, also in rounds after those that are paid for: soft targets are public.
        """
        seed = self._seed(plan, "train")
        before = getattr(self.learner, "passed", 0)
        if plan.consolidate or (self.account is not None and not self._left(plan)):
            consolidate(self.learner, self.data, seed)
            self.alarm = False
        else:
            self.learner.fit(self.data, seed=seed)
            self.alarm = bool(getattr(self.learner, "alarmed", False))
        if self.met:
            now = self.met[-1]
            trained = now.trained + getattr(self.learner, "passed", 0) - before
            alarms = getattr(self.learner, "alarms", ()) if self.alarm else now.alarms
            self.met[-1] = replace(now, trained=trained, alarms=tuple(alarms))

    def share(self, plan: Plan, said: Answers | None = None) -> Upload:
        """Predict, protect, encode: protection comes before the codec, which is post-processing.

        Args:
            plan: what is asked.
            said: what the learner says of the rows asked, where it was asked with others.
        """
        scores = None if said is None else said.familiarity
        answered, familiarity = self.selector.choose(plan.rows(), self.learner, scores)
        logits = self.predict(plan.rows()[answered]) if said is None else said.logits[answered]
        return self.encode(plan, answered, self.protect(logits), familiarity)

    def predict(self, rows: IntArray) -> Logits:
        """Logits on some proxy rows, ``[rows, classes]``: those that may leave."""
        shape = len(rows), len(self.classes)
        if isinstance(self.learner, Answering):
            return floats(self.learner.answer(rows), shape)
        return floats(self.learner.predict(self.proxy.take(rows)), shape)

    def protect(self, logits: Logits) -> Probs:
        """What may be shared: finite, bounded probabilities."""
        if not np.isfinite(logits).all():
            raise Rejected("nonfinite", "the model predicts NaN or infinity: lower its lr")
        # float64: the mean of finite float32 values may be beyond float32.
        centred = logits - logits.mean(axis=1, keepdims=True, dtype=np.float64)
        extreme = np.abs(centred).max(axis=1, initial=0) > LARGEST_LOGIT
        self.clipped = int(extreme.sum())
        if len(extreme) and extreme.mean() > 0.01:
            raise Rejected("extreme", f"{extreme.mean():.0%} of the rows have logits beyond 1e4")
        probs = softmax(centred.clip(-LARGEST_LOGIT, LARGEST_LOGIT))
        return hard_labels(probs) if self.client.mechanism == "hard-label" else probs

    def encode(
        self, plan: Plan, answered: Mask, probs: Probs, familiarity: FloatArray | None
    ) -> Upload:
        """The upload: coded predictions and nothing else that is private."""
        labels = self.data.labels
        codes = quantise(self.method.codec, probs, seed=self._seed(plan, "encode"))
        if self.said is not None and len(labels):
            payload = self.said.encode(plan.rows()[answered], codes, plan.round)
        else:
            payload = delta_encode(self.method.codec, codes)
        ratios = b""
        if familiarity is not None:
            ratios = codecs.pack(codecs.encode_familiarity(familiarity))
        return Upload(
            client=self.client.id,
            run=plan.run,
            round=plan.round,
            proxy=plan.proxy,
            classes=plan.classes,
            share="probs" if len(labels) else "none",
            codec=self.method.codec,
            shape=(len(probs), len(self.classes)),
            familiarity=familiarity is not None,
            seen=self._seen() if "seen" in takes(self.method.bound_rule()) else "0",
            drift=self.alarm if plan.watch else None,
            epsilon=None if self.account is None else self.account.spent(),
            ledger="" if self.account is None else self.account.head,
            size=bucket(len(labels)),
            payload=payload,
            declined=pack_mask(~answered) if len(labels) else b"",
            ratios=ratios,
        )

    def _seen(self) -> str:
        counts = np.bincount(self.data.labels, minlength=len(self.classes))
        return seen_mask(counts > 0)

    def _seed(self, plan: Plan, step: str) -> int:
        return derive(self.seed, self.client.id, plan.round, step)
