"""Who takes part: clients with their rows at hand, and members whose rows are elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedistill.course import Course, Timetable
from fedistill.distill.learner import Learner
from fedistill.distill.recipe import Recipe
from fedistill.errors import DataError
from fedistill.privacy.terms import Terms
from fedistill.settings import CLIENT_ID, CLIENT_ID_WORDS
from fedistill.types import Rows


@dataclass(frozen=True, eq=False)
class Client:
    """One participant: its id, its model's factory, its own rows.

    Attributes:
        id: a name of letters, digits, ``.``, ``_`` and ``-``; also the name of its folder.
        build: a factory of torch modules, scikit-learn classifiers or learners.
        data: own labelled rows; may be empty, then the client learns and does not teach.
        test: own test rows; without them the run's common test rows are used.
        training: how it trains on its own rows.
        wrap: what is put around its learner, where a simulation needs a bad client.
        course: rows that change from round to round; None: they stay. ``data`` is the first
            experience then.
        make: from factory and recipe to learner, for one that is more than its model.
        terms: what may be told of its rows, where they are private; its learner is then a
            :class:`fedistill.privacy.learner.Private` one.
        mechanism: how what it shares is made private, as all agreed.
    """

    id: str
    build: Callable[[], Any]
    data: Rows
    test: Rows | None = None
    training: Recipe = field(default_factory=Recipe)
    wrap: Callable[[Learner], Learner] | None = None
    course: Course | None = None
    make: Callable[..., Learner] | None = None
    terms: Terms | None = None
    mechanism: str = "none"

    def __post_init__(self) -> None:
        check_id(self.id)

    def experiences(self) -> tuple[Rows, ...]:
        """All rows that are known beforehand."""
        return self.course.experiences if isinstance(self.course, Timetable) else (self.data,)


@dataclass(frozen=True)
class Member:
    """A participant whose rows are elsewhere: a real site, as the coordinator knows it.

    Attributes:
        id: as :attr:`Client.id`.
        rows: it counts with at most so many rows, whatever it declares; None: with what its first
            upload declares.
    """

    id: str
    rows: int | None = None

    def __post_init__(self) -> None:
        check_id(self.id)


def check_id(name: str) -> None:
    """Refuse an id that could not be the name of a folder.

    Raises:
        DataError: with what is allowed.
    """
    if not re.fullmatch(CLIENT_ID, name):
        raise DataError(f"{CLIENT_ID_WORDS}, found {name[:64]!r}: rename the client")
