"""Many clients at once: those with students of one kind are trained and asked side by side.

The step of a client is the same as with the serial backend, and so are its messages and its state;
only the training and the predictions in the middle of it are done for a block of clients together.
Soft targets differ from those of the serial backend by rounding: 1e-5 after a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedistill.backends import Reply
from fedistill.backends.precision import best_mode, matmul_precision
from fedistill.backends.together import Bench, benches, kind_of, unfit
from fedistill.client import Site
from fedistill.distill.torch_student import Lesson, TorchStudent
from fedistill.dormant import Dormant, by_kind
from fedistill.errors import Rejected
from fedistill.select import Answers
from fedistill.types import FloatArray, Probs, Rows
from fedistill.wire.messages import Failure, Plan

WINDOW = 100
"""Clients that are at work at once: what they said is held until the last of them is done."""


class Vectorized:
    """Asks the sites in the order of the plan, a hundred at a time, and trains them side by side.

    A site that cannot be trained so (another model than Linear or MLP of
    :mod:`fedistill.models`, another optimizer than sgd, private or bad clients, streams, tables) is
    asked alone, as the serial backend asks it.

    Attributes:
        notes: who is asked alone, and why.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites
        if isinstance(sites, Dormant):
            sites.at_least(WINDOW)
        self.notes = list(remarks(sites))

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        """One reply or failure for every client asked."""
        for start in range(0, len(plan.clients), WINDOW):
            names = plan.clients[start : start + WINDOW]
            works = {name: Work(self.sites[name]) for name in names if not alone(self.sites[name])}
            heard: dict[str, Reply | Failure] = {}
            for name, work in works.items():
                try:
                    work.begin(plan.message(name))
                except Rejected as refusal:
                    heard[name] = Failure(name, plan.round, refusal.reason)
            with matmul_precision(best_mode()), torch.no_grad():
                together([work for work in works.values() if work.plan is not None])
            for name in names:
                yield heard[name] if name in heard else self._end(plan, name, works.get(name))

    def _end(self, plan: Plan, name: str, work: Work | None) -> Reply | Failure:
        """What a site answers; one that is asked alone does all of its work here."""
        try:
            if work is None:
                return Reply(name, self.sites[name].answer(plan.message(name)))
            return Reply(name, work.end())
        except Rejected as refusal:
            return Failure(name, plan.round, refusal.reason)


@dataclass
class Work:
    """A site in the middle of its step.

    Attributes:
        plan: what it works on; None where there was an answer already.
        lessons: what it is to train on.
        said: what it says of the rows asked.
    """

    site: Site
    plan: Plan | None = None
    answer: bytes = b""
    lessons: tuple[Lesson, ...] = ()
    said: Answers | None = field(default=None, repr=False)

    @property
    def student(self) -> TorchStudent:
        """Its learner."""
        assert isinstance(self.site.learner, TorchStudent)
        return self.site.learner

    def begin(self, message: bytes) -> None:
        """All of the step before training: its lessons are noted and not learned yet.

        Raises:
            Rejected: as :meth:`fedistill.client.Site.answer`.
        """
        begun = self.site.begin(message)
        if isinstance(begun, bytes):
            self.answer = begun
            return
        student = self.student
        pupil = Pupil(student)
        self.site.learner = pupil
        try:
            self.site.absorb(begun)
            self.site.train(begun)
        finally:
            self.site.learner = student
        self.plan, self.lessons = begun, tuple(pupil.lessons)

    def end(self) -> bytes:
        """All of the step after training."""
        return self.answer if self.plan is None else self.site.finish(self.plan, self.said)


class Pupil:
    """Stands for a student that is trained later: notes what it would train on."""

    def __init__(self, student: TorchStudent) -> None:
        self.student = student
        self.lessons: list[Lesson] = []
        self.predict = student.predict
        self.state_dict = student.state_dict
        self.load_state_dict = student.load_state_dict

    def absorb(
        self,
        inputs: FloatArray,
        soft_targets: Probs,
        *,
        seed: int,
        weights: FloatArray | None = None,
    ) -> None:
        """Note a phase on soft targets, or keep them."""
        self._note(self.student.hear(inputs, soft_targets, seed=seed, weights=weights))

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Note the training on own rows."""
        self._note(self.student.lesson(rows, seed))

    def _note(self, lesson: Lesson | None) -> None:
        if lesson is not None:
            self.lessons.append(lesson)


def together(works: Sequence[Work]) -> None:
    """Train and ask the students of sites at work, those of one kind side by side."""
    kinds: dict[Any, list[Work]] = {}
    for work in works:
        kinds.setdefault(kind_of(work.student, work.lessons), []).append(work)
    for alike in kinds.values():
        plan = alike[0].plan
        assert plan is not None
        asked = torch.from_numpy(alike[0].site.proxy.take(plan.rows())).flatten(1)
        students, lessons = [work.student for work in alike], [work.lessons for work in alike]
        for places in benches(students, lessons):
            bench = Bench([students[at] for at in places], [lessons[at] for at in places])
            bench.teach()
            for at, said in zip(places, bench.ask(asked), strict=True):
                alike[at].said = said


def alone(site: Site) -> str:
    """Why a site is asked alone, in words that end a sentence; empty where it need not be."""
    if type(site) is not Site:
        return "it exchanges tables"
    if site.account is not None:
        return "it is private"
    if site.client.course is not None:
        return "its rows change"
    return unfit(site.learner)


def remarks(sites: Mapping[str, Site]) -> Iterator[str]:
    """Who is asked alone, and why, a line for each reason; and how matrices are multiplied."""
    if best_mode() != "highest":
        yield f"matrices are multiplied by oneDNN (float32 precision {best_mode()})"
    reasons: dict[str, list[str]] = {}
    for kind, site in by_kind(sites):
        if reason := alone(site):
            reasons.setdefault(reason, []).extend(kind)
    for reason, names in reasons.items():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        yield f"trained alone, as by the serial backend: {shown} ({reason})"
