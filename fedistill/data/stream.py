"""Streams: rows that change while a model learns them, alone or in a federation.

:func:`experiences` makes a stream for one learner, and is the way in from Python;
:func:`streams` makes one for every client of a federation, from the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from fedistill.config import out_of_range
from fedistill.data.shifts import SHIFTS, Shift
from fedistill.errors import DataError, did_you_mean
from fedistill.seeding import derive, generator
from fedistill.settings import StreamSettings
from fedistill.types import Rows, joined_records

__all__ = ["SHIFTS", "Experience", "Stream", "experiences", "gradual", "recurring", "streams"]

OURS = ("course", "overlap", "first", "degrees", "alpha", "strength")
"""The settings that :func:`experiences` takes too; the others are about several clients."""


@dataclass(frozen=True, eq=False)
class Experience:
    """One unit of a stream.

    Attributes:
        train: what is learned; label -1 is not known.
        test: what measures it, untouched by training.
        name: what it is, such as "classes 0 1".
    """

    train: Rows
    test: Rows | None = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class Stream:
    """The streams of all clients of a federation, over the same experiences.

    Attributes:
        names: of the experiences, by number.
        train: client to its rows of each experience, in the order in which it meets them; a part
            is empty where a client has no such rows.
        order: client to the number of the experience at each position.
        tests: test rows of each experience, by number; none is empty.
    """

    names: tuple[str, ...]
    train: Mapping[str, tuple[Rows, ...]]
    order: Mapping[str, tuple[int, ...]]
    tests: tuple[Rows, ...]


def experiences(
    shift: str,
    train: Rows,
    test: Rows | None = None,
    count: int = 5,
    *,
    seed: int = 0,
    **options: Any,
) -> list[Experience]:
    """A stream for one learner: the way in from Python.

    >>> rows = Rows(np.zeros((6, 1)), np.array([0, 1, 2, 0, 1, 2]))
    >>> parts = experiences("class-incremental", rows, count=3, shuffle=False)
    >>> [(part.name, len(part.train)) for part in parts]
    [('class 0', 2), ('class 1', 2), ('class 2', 2)]

    Args:
        shift: a name of :data:`SHIFTS`.
        train: the rows to learn.
        test: rows that measure, cut or changed by the same domains; of ``rotation`` and
            ``permutation`` every experience has all of them. For ``time`` they lie between the
            rows to learn, or have row numbers of their own.
        count: how many experiences.
        seed: of all draws.
        options: keys of ``[stream]`` (course, overlap, first, degrees, alpha, strength); for
            ``rotation`` and ``permutation`` also ``whole=True``, so that every experience has all
            rows to learn, as in the published benchmarks; for ``class-incremental`` also
            ``shuffle=False``.

    Raises:
        DataError: an unknown name or option, or rows that cannot be divided so.
    """
    made = _shift(shift)
    own = {name: bool(options.pop(name)) for name in made.options if name in options}
    how = _settings(shift, made, count, options)
    plan = _Plan(made, how, seed, _like([train] if test is None else [train, test]), own)
    parts = plan.course(plan.cut(train), "")
    _none_empty(plan.names, [len(part) for part in parts], "rows to learn")
    tests = [None] * count if test is None else plan.tests(test)
    return [
        Experience(part, held, name)
        for part, held, name in zip(parts, tests, plan.names, strict=True)
    ]


def streams(parts: Mapping[str, Rows], test: Rows, how: StreamSettings, seed: int) -> Stream:
    """A stream for every client, over the same experiences.

    Each row of a client goes to one experience, once.

    Args:
        parts: client to its rows.
        test: the common test rows. Of ``rotation`` and ``permutation`` every experience has all of
            them, changed; the other shifts deal them out.
        how: the ``[stream]`` section.
        seed: of all draws.

    Raises:
        DataError: rows that cannot be divided so, such as fewer classes than experiences.
    """
    if how.order == "own" and how.shift == "time":
        raise DataError(
            'stream.order: expected "same" with the shift time, which runs one way, found "own": '
            "choose another shift or order"
        )
    plan = _Plan(_shift(how.shift), how, seed, _like([*parts.values(), test]))
    train, order = {}, {}
    for client, rows in parts.items():
        cut, met = plan.cut(rows), plan.order(client)
        train[client] = tuple(plan.course([cut[number] for number in met], client))
        order[client] = tuple(
            number + again * plan.domains for again in range(plan.times) for number in met
        )
    sizes = np.zeros(how.experiences, dtype=np.int64)
    for client, numbers in order.items():
        sizes[list(numbers)] += [len(part) for part in train[client]]
    _none_empty(plan.names, sizes.tolist(), "rows of a client")
    return Stream(tuple(plan.names), train, order, tuple(plan.tests(test)))


def gradual(parts: Sequence[Rows], overlap: float, seed: int) -> list[Rows]:
    """Neighbours mix: towards the end of an experience ever more rows of the next one come.

    The last ``overlap`` of an experience and the first of the next face one another; a pair is
    swapped with a probability that grows to one half at the border. No row is lost or doubled.

    Args:
        parts: the rows of each experience, in order.
        overlap: share of the shorter neighbour that mixes, at most 0.5.
        seed: of the swaps.

    Raises:
        DataError: an overlap outside 0 to 0.5.
    """
    if not 0 <= overlap <= 0.5:
        raise DataError(
            f"gradual: expected an overlap of 0 to 0.5, found {overlap}: 0.2 is a usual value"
        )
    if not parts:
        return []
    rows = _joined(parts)
    ends = np.cumsum([len(part) for part in parts])
    order = np.arange(len(rows))
    for at, (border, one, other) in enumerate(zip(ends, parts, parts[1:], strict=False)):
        width = int(overlap * min(len(one), len(other)))
        away = np.arange(width)
        chance = 0.5 * (1 - (away + 0.5) / max(width, 1))
        away = away[generator(seed, "gradual", at).random(width) < chance]
        before, after = border - 1 - away, border + away
        order[before], order[after] = order[after], order[before]
    return [rows.take(piece) for piece in np.split(order, ends[:-1])]


def recurring(parts: Sequence[Rows], times: int = 2) -> list[Rows]:
    """What was comes back: A B becomes A B A B, each time with other rows of it.

    Args:
        parts: the rows of each experience, in order.
        times: how often each comes; its rows are cut into so many pieces, in their order.

    Raises:
        DataError: times below 1.
    """
    if times < 1:
        raise DataError(f"recurring: expected at least 1 time, found {times}: 2 is a usual value")
    pieces = [np.array_split(np.arange(len(part)), times) for part in parts]
    return [
        part.take(piece[again])
        for again in range(times)
        for part, piece in zip(parts, pieces, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Plan:
    """A shift with its settings, ready to cut the rows of any owner by the same domains."""

    shift: Shift
    how: StreamSettings
    seed: int
    like: Rows
    options: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.how.experiences % self.times:
            raise DataError(
                "recurring: expected an even number of experiences, as each comes twice, found "
                f"{self.how.experiences}: set stream.experiences = {self.how.experiences + 1}"
            )

    @property
    def times(self) -> int:
        """How often each domain comes."""
        return 2 if self.how.course == "recurring" else 1

    @property
    def domains(self) -> int:
        """Experiences that differ."""
        return int(self.how.experiences) // self.times

    @property
    def names(self) -> list[str]:
        """Of the experiences, by number."""
        first = self.shift.names(self.like, self._each, self.seed, **self._named)
        return first + [f"{name} again" for name in first] * (self.times - 1)

    def cut(self, rows: Rows) -> list[Rows]:
        """The rows of each domain."""
        return self.shift(rows, self._each, self.seed, like=self.like, **self.options)

    def tests(self, rows: Rows) -> list[Rows]:
        """The test rows of each experience, by number."""
        whole = {"whole": True} if "whole" in self.shift.options else self.options
        cut = self.shift(rows, self._each, self.seed, like=self.like, **whole)
        _none_empty(self.names, [len(part) for part in cut] * self.times, "test rows")
        return cut * self.times

    def order(self, client: str) -> list[int]:
        """The domains as a client meets them."""
        if self.how.order == "same":
            return list(range(self.domains))
        drawn: list[int] = (
            generator(self.seed, "stream", "order", client).permutation(self.domains).tolist()
        )
        return drawn

    def course(self, parts: Sequence[Rows], client: str) -> list[Rows]:
        """The parts as the stream brings them."""
        if self.how.course == "gradual":
            seed = derive(self.seed, "stream", "course", client)
            return gradual(parts, self.how.overlap, seed)
        return recurring(parts, self.times)

    @property
    def _each(self) -> StreamSettings:
        return replace(self.how, experiences=self.domains)

    @property
    def _named(self) -> Mapping[str, bool]:
        """The options that change what experiences are called."""
        return {name: value for name, value in self.options.items() if name != "whole"}


def _none_empty(names: Sequence[str], sizes: Sequence[int], what: str) -> None:
    for name, size in zip(names, sizes, strict=True):
        if not size:
            raise DataError(
                f"stream: expected {what} in each experience, found none in {name}: lower "
                "stream.experiences, or give more rows"
            )


def _shift(name: str) -> Shift:
    if name not in SHIFTS:
        raise DataError(f'unknown shift "{name}"{did_you_mean(name, SHIFTS)}')
    return SHIFTS[name]


def _settings(name: str, shift: Shift, count: int, options: Mapping[str, Any]) -> StreamSettings:
    """The section with the options of a call.

    Raises:
        DataError: an option that this shift does not take, or a value out of range.
    """
    for option in options:
        if option not in OURS:
            known = did_you_mean(option, (*OURS, *shift.options))
            raise DataError(f'{name}: unknown option "{option}"{known}')
    how = StreamSettings(experiences=count, shift=name, **options)
    for item in fields(how):
        if wrong := out_of_range(item, getattr(how, item.name)):
            raise DataError(f"{name}, {item.name}: {wrong}: mend the call")
    if count < 1:
        raise DataError(f"{name}: expected at least one experience, found {count}: raise count")
    return how


def _like(parts: Sequence[Rows]) -> Rows:
    """What rows there are, without their inputs.

    Row numbers that come twice are of two sources, and then tell no common time.
    """
    bare = [replace(part, inputs=np.zeros((len(part), 0), np.float32)) for part in parts]
    rows = _joined(bare)
    clash = rows.ids is not None and len(np.unique(rows.ids)) < len(rows)
    return replace(rows, ids=None) if clash else rows


def _joined(parts: Sequence[Rows]) -> Rows:
    """All rows below each other; of ids, sites and subjects those that all parts have."""
    held = {
        name: None
        if any(getattr(part, name) is None for part in parts)
        else np.concatenate([getattr(part, name) for part in parts])
        for name in ("ids", "site", "subject")
    }
    inputs = np.concatenate([part.inputs for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Rows(inputs, labels, **held, record=joined_records(parts))
