"""Many clients at once: those with students of one kind are trained and asked side by side.

The step of a client is the same as with the serial backend, and so are its messages and its state;
only the training and the predictions in the middle of it are done for a block of clients together.
Soft targets differ from those of the serial backend by rounding: 1e-5 after a round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedistill.backends import Reply, mapped
from fedistill.backends.precision import best_mode, matmul_precision
from fedistill.backends.private_bench import PrivateBench, private_benches
from fedistill.backends.together import Bench, benches, kind_of, shape_of, unfit
from fedistill.backends.tuning import Choices
from fedistill.client import Site
from fedistill.distill.torch_student import Lesson, TorchStudent
from fedistill.dormant import Dormant, by_kind
from fedistill.errors import Rejected
from fedistill.privacy.dpsgd import PrivateStudent
from fedistill.select import Answers
from fedistill.types import FloatArray, Probs, Rows
from fedistill.wire.messages import Failure, Plan

WINDOW = 100
"""Clients that are at work at once: what they said is held until the last of them is done."""


class Vectorized:
    """Asks the sites in the order of the plan, a hundred at a time, and trains them side by side.

    A site that cannot be trained so (another model than Linear or MLP of :mod:`fedistill.models`,
    or one of these that was changed, bad clients, streams, tables) is asked alone, as the serial
    backend asks it. So is a private one, unless its noisy steps can be taken by hand: its privacy
    is of records, and its own rows are learned by DP-SGD with cross-entropy. All of a hundred have
    paid before any of them trains; nothing else differs for one of them.

    Args:
        sites: all of them.
        record: a file that keeps how many were trained side by side, for a run that goes on; None:
            nothing is kept.
        tune: have that measured, and not chosen by facts.
        mapped: whether students without kernels are mapped by ``torch.func``; None: where they
            compute on a GPU.

    Attributes:
        notes: who is asked alone, and why.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        record: Path | None = None,
        tune: bool = False,
        mapped: bool | None = None,
    ) -> None:
        self.sites, self.wanted = sites, mapped
        self.choices = Choices(record, tune)
        if isinstance(sites, Dormant):
            sites.at_least(WINDOW)
        self.notes = list(remarks(sites, mapped))

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        """One reply or failure for every client asked."""
        for start in range(0, len(plan.clients), WINDOW):
            names = plan.clients[start : start + WINDOW]
            asked = {name: self.sites[name] for name in names}
            able = {n: Work(site) for n, site in asked.items() if not alone(site, self.wanted)}
            works = with_own_models(able)
            heard: dict[str, Reply | Failure] = {}
            resident = Resident()
            proxies = {id(work.site.proxy): work.site.proxy for work in works.values()}
            measured = {key: proxy.measure() for key, proxy in proxies.items()}
            for name, work in works.items():
                try:
                    work.begin(plan.message(name), measured[id(work.site.proxy)], resident)
                except Rejected as refusal:
                    heard[name] = Failure(name, plan.round, refusal.reason)
            at_work = [work for work in works.values() if work.plan is not None]
            with torch.no_grad():
                together(at_work, self.choices, resident)
            # All that were trained are done with the round before any of them is heard: whoever
            # stops listening must not find some of them trained for it and asked for it anew.
            for name, work in works.items():
                if name not in heard:
                    heard[name] = self._answer(plan, name, work.end)
            for name in names:
                if name not in heard:
                    heard[name] = self._answer(plan, name, partial(self._alone, plan, name))
                yield heard[name]

    def _alone(self, plan: Plan, name: str) -> bytes:
        """All of the step of a site."""
        return self.sites[name].answer(plan.message(name))

    def _answer(self, plan: Plan, name: str, answer: Callable[[], bytes]) -> Reply | Failure:
        """What a site answers, or why it refuses."""
        try:
            return Reply(name, answer())
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

    def begin(self, message: bytes, measured: str, resident: Resident) -> None:
        """All of the step before training: its lessons are noted and not learned yet.

        Args:
            message: the plan.
            measured: what the site's proxy rows were just measured to be.
            resident: public rows on their device.

        Raises:
            Rejected: as :meth:`fedistill.client.Site.answer`.
        """
        begun = self.site.begin(message, measured)
        if isinstance(begun, bytes):
            self.answer = begun
            return
        student = self.student
        pupil = Pupil(student, resident)
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


class Resident:
    """Public rows that were sent to a device, once for all clients that see the same."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], tuple[FloatArray, Tensor]] = {}

    def rows(self, inputs: FloatArray, device: torch.device) -> Tensor:
        """These rows there; on the CPU they are not copied."""
        place = inputs.__array_interface__["data"][0]
        key = place, inputs.shape, inputs.strides, device
        if key not in self._held:  # beside the array, which keeps its place while this lives
            sent = torch.as_tensor(np.asarray(inputs, dtype=np.float32)).to(device)
            self._held[key] = inputs, sent
        return self._held[key][1]


class Pupil:
    """Stands for a student that is trained later: notes what it would train on."""

    def __init__(self, student: TorchStudent, resident: Resident) -> None:
        self.student = student
        self.resident = resident
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
        rows = self.resident.rows(inputs, self.student.device)
        self._note(self.student.hear(rows, soft_targets, seed=seed, weights=weights))

    def fit(self, rows: Rows, *, seed: int) -> None:
        """Note the training on own rows."""
        self._note(self.student.lesson(rows, seed))

    def _note(self, lesson: Lesson | None) -> None:
        if lesson is not None:
            self.lessons.append(lesson)


def with_own_models(works: Mapping[str, Work]) -> dict[str, Work]:
    """Without sites that have one module among them: each goes on from where another left it."""
    owners = Counter(id(work.student.module) for work in works.values())
    return {name: work for name, work in works.items() if owners[id(work.student.module)] == 1}


def together(works: Sequence[Work], choices: Choices, resident: Resident) -> None:
    """Train and ask the students of sites at work, those of one kind side by side."""
    kinds: dict[Any, list[Work]] = {}
    for work in works:
        if unfit(work.student):
            kinds.setdefault(mapped.kind_of(work.student, work.lessons), []).append(work)
        else:
            kinds.setdefault(kind_of(work.student, work.lessons), []).append(work)
    for alike in kinds.values():
        if unfit(alike[0].student):
            side_by_side(alike, resident)
            continue
        plan = alike[0].plan
        assert plan is not None
        students, lessons = [work.student for work in alike], [work.lessons for work in alike]
        rows = alike[0].site.proxy.take(plan.rows())
        asked = resident.rows(rows, students[0].device).flatten(1)
        choice = choices.of(plan.run, shape_of(students[0]))
        with matmul_precision(choice.mode):
            private = isinstance(students[0], PrivateStudent)
            cut, kind = (private_benches, PrivateBench) if private else (benches, Bench)
            for places in cut(lessons, choice.block):
                taught = [students[at] for at in places]
                bench = kind(taught, [lessons[at] for at in places], choice.rows)
                bench.teach()
                for at, said in zip(places, bench.ask(asked), strict=True):
                    alike[at].said = said


def side_by_side(works: Sequence[Work], resident: Resident) -> None:
    """The same for students of one kind that have no kernels."""
    plan = works[0].plan
    assert plan is not None
    students, lessons = [work.student for work in works], [work.lessons for work in works]
    asked = resident.rows(works[0].site.proxy.take(plan.rows()), students[0].device)
    for places in mapped.blocks(lessons):
        bench = mapped.MappedBench([students[at] for at in places], [lessons[at] for at in places])
        bench.teach()
        for at, said in zip(places, bench.ask(asked), strict=True):
            works[at].said = said


def alone(site: Site, wanted: bool | None = None) -> str:
    """Why a site is asked alone, in words that end a sentence; empty where it need not be.

    Args:
        site: any.
        wanted: whether its student is mapped if there are no kernels; None: on a GPU.
    """
    if type(site) is not Site:
        return "it exchanges tables"
    if site.account is not None and type(site.learner) is not PrivateStudent:
        return "it is private, and not by noisy steps"
    if site.client.course is not None:
        return "its rows change"
    reason, student = unfit(site.learner), site.learner
    if not reason or type(student) is not TorchStudent:
        return reason
    if wanted is None and student.device.type == "cpu":
        return f"{reason}, and on a CPU mapping is slower"
    if wanted is False:
        return reason
    example = site.proxy.take(np.arange(min(mapped.TRIED_ROWS, len(site.proxy))))
    return mapped.unmapped(student, torch.from_numpy(example))


def remarks(sites: Mapping[str, Site], wanted: bool | None = None) -> Iterator[str]:
    """Who is asked alone, and why, a line for each reason; and how matrices are multiplied."""
    if best_mode() != "highest":
        yield f"matrices are multiplied by oneDNN (float32 precision {best_mode()})"
    reasons: dict[str, list[str]] = {}
    for kind, site in by_kind(sites):
        if reason := alone(site, wanted):
            reasons.setdefault(reason, []).extend(kind)
    for reason, names in reasons.items():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        yield f"trained alone, as by the serial backend: {shown} ({reason})"
