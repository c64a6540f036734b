"""Sites that no column names: those of several columns together, numbers cut into bands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fedistill.errors import DataError

Texts = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Part:
    """One of the columns that make a site.

    Attributes:
        name: of the column.
        cuts: where a number falls into another band, rising; none: its values are taken as they
            are.
    """

    name: str
    cuts: tuple[float, ...] = ()


def parse(text: str) -> tuple[Part, ...]:
    """The parts of ``EDUCATION:2,3 + AGE:35``; a plain name is one part.

    >>> parse("EDUCATION:2,3 + AGE:35")[0]
    Part(name='EDUCATION', cuts=(2.0, 3.0))

    Raises:
        DataError: cuts that are no rising numbers.
    """
    parts = []
    for one in text.split("+"):
        name, colon, told = one.partition(":")
        try:
            cuts = tuple(float(cut) for cut in told.split(",")) if colon else ()
        except ValueError:
            cuts = (1.0, 0.0)
        if list(cuts) != sorted(set(cuts)):
            raise DataError(
                f'clients.column: expected rising numbers after "{name.strip()}:", such as '
                f'AGE:35,50, found "{told.strip()}"'
            )
        parts.append(Part(name.strip(), cuts))
    return tuple(parts)


def banded(part: Part, values: npt.NDArray[np.floating]) -> Texts:
    """The band of each number, by name ``[n]``: ``AGE-below-35``, ``AGE-35-50``, ``AGE-from-50``.

    Args:
        part: the column, with its cuts.
        values: ``[n]``, finite.
    """
    shown = [f"{cut:g}" for cut in part.cuts]
    between = [f"{low}-{high}" for low, high in pairwise(shown)]
    names = [f"below-{shown[0]}", *between, f"from-{shown[-1]}"]
    place = np.searchsorted(np.array(part.cuts), values, side="right")
    return np.array([f"{part.name}-{name}" for name in names], dtype=np.str_)[place]


def joined(columns: Sequence[Texts]) -> Texts:
    """The names of several columns in one, ``[n]``."""
    return np.array(["_".join(parts) for parts in zip(*columns, strict=True)], dtype=np.str_)
