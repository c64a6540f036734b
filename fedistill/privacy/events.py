"""What a mechanism does to private rows, as an accountant must know it: events, and how often.

Three events are all that is charged. An event says nothing of data, only of noise: it may be
stored, sent and compared. Noise is given as a multiple of the sensitivity (the noise multiplier).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, order=True)
class Gaussian:
    """Gaussian noise of ``sigma`` sensitivities on something that sees every record."""

    sigma: float


@dataclass(frozen=True, order=True)
class Sampled:
    """The same on a sum over records that are each drawn by their own coin: a DP-SGD step.

    Attributes:
        rate: probability that a record is drawn (Poisson sampling).
        sigma: noise, in clipping norms.
        copies: how often a record may lie among the rows, each copy drawn by its own coin.
    """

    rate: float
    sigma: float
    copies: int = 1


@dataclass(frozen=True, order=True)
class Claim:
    """An (epsilon, delta) that others vouch for, without saying how it came about."""

    epsilon: float
    delta: float


Event: TypeAlias = Gaussian | Sampled | Claim
KINDS: Mapping[str, type[Any]] = {"gaussian": Gaussian, "sampled": Sampled, "claim": Claim}


@dataclass(frozen=True)
class Spending:
    """Events and how often each took place: all that the privacy loss depends on.

    The order of events does not matter to it, so equal events are counted together. That is also
    what makes it quick to compute: ten rounds of one mechanism are one event.
    """

    counts: Mapping[Event, int] = field(default_factory=dict)

    @classmethod
    def of(cls, event: Event, times: int = 1) -> Spending:
        """One event, ``times`` times."""
        return cls({event: times} if times else {})

    def __add__(self, other: Spending) -> Spending:
        total = dict(self.counts)
        for event, times in other.counts.items():
            total[event] = total.get(event, 0) + times
        return Spending(total)

    def __mul__(self, times: int) -> Spending:
        return Spending({event: count * times for event, count in self.counts.items() if times})

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __hash__(self) -> int:
        return hash(frozenset(self.counts.items()))

    def __iter__(self) -> Iterator[tuple[Event, int]]:
        """Events with their counts, in one order whatever they were added in."""
        kinds = list(KINDS.values())
        return iter(sorted(self.counts.items(), key=lambda one: (kinds.index(type(one[0])), one)))

    def to_json(self) -> str:
        """Canonical JSON: equal spendings give equal texts."""
        names = {kind: name for name, kind in KINDS.items()}
        told = [{"event": names[type(e)], "times": n} | asdict(e) for e, n in self]
        return json.dumps(told, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Spending:
        """What :meth:`to_json` gave.

        Raises:
            ValueError: a text that it did not give.
        """
        try:
            total = cls()
            for told in json.loads(text):
                kind, times = KINDS[told.pop("event")], told.pop("times")
                if type(times) is not int or times < 1:
                    raise ValueError
                event = kind(**told)
                values = [float(value) for value in asdict(event).values()]
                if not all(math.isfinite(value) and value >= 0 for value in values):
                    raise ValueError
                total += cls.of(event, times)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError("expected events as Spending.to_json gives them") from None
        return total
