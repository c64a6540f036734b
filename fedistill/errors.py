"""Every error a user can meet. Each text says what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class FedistillError(Exception):
    """Root of all errors of this package; ``exit_code`` is what the command line returns."""

    exit_code = 3


class DataError(FedistillError):
    """A data file, a partition or a proxy set that cannot be used."""


class RunError(FedistillError):
    """A run that cannot start or go on (read-only folder, disk full, changed proxy set)."""


class QuorumError(RunError):
    """Too few usable uploads, several times in a row."""


class BudgetExhausted(RunError):
    """Every client has spent its privacy budget: the run cannot go on."""

    exit_code = 4


class CheckpointError(RunError):
    """A saved state that cannot be used here (other model, newer format, carries code)."""


class MissingExtra(FedistillError):
    """An optional package is needed and absent."""

    exit_code = 2

    def __init__(self, package: str, extra: str, need: str) -> None:
        super().__init__(
            f"{need} needs the package '{package}', which is not installed: "
            f"pip install 'fedistill[{extra}]'"
        )


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a settings file."""

    key: str
    text: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.key}: {self.text}"


class SettingsError(FedistillError):
    """All problems of a settings file at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], source: str = "") -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"{source}, {self.problems[0]}" if source else str(self.problems[0]))
            return
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{source or 'settings'}: {len(self.problems)} problems{lines}")


class Rejected(FedistillError):
    """One message refused at the door; ``reason`` is a short fixed code, never data."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class BudgetExceeded(Rejected):
    """What a step would cost is more than is left: nothing was computed, nothing is spent.

    Attributes:
        spent: epsilon so far.
        asked: epsilon after the step.
        limit: the most it may be.
    """

    def __init__(self, spent: float, asked: float, limit: float) -> None:
        self.spent = spent
        self.asked = asked
        self.limit = limit
        super().__init__(
            "budget_exhausted",
            f"epsilon {spent:.3g} is spent, the next step would make it {asked:.3g}, the limit is "
            f"{limit:.3g}: raise the limit, or plan fewer rounds",
        )


class LedgerError(RunError):
    """A privacy ledger that cannot be trusted (edited, rolled back, gone): nothing is released."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``'; did you mean "x"?'`` for the nearest known word, else the list of all of them.

    >>> did_you_mean("epoch", ["epochs", "lr"])
    '; did you mean "epochs"?'
    """
    names = sorted(known)
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known: {', '.join(names)}" if names else ""
