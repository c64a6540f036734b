"""Rows that arrive at a real site as files between rounds: each file is the next experience."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedistill import store
from fedistill.data.files import find_files
from fedistill.errors import DataError
from fedistill.types import Rows


@dataclass(frozen=True, eq=False)
class Incoming:
    """What a site holds at first, and then one file after another, as they are found.

    Files are taken up in the order of their names, one a round; one that was taken up keeps its
    place, whatever comes later under whatever name. A file should be moved in whole.

    Attributes:
        first: the rows that the site has from the start.
        source: prefix and pattern, such as ``csv:incoming/*.csv``.
        folder: what the pattern starts from.
        index: where the names of files are kept that were taken up.
        read: from a source such as ``csv:incoming/7.csv`` to its rows.
    """

    first: Rows
    source: str
    folder: Path
    index: Path
    read: Callable[[str], Rows]

    def position(self, number: int, now: int) -> int:
        """The next file, if there is one; before anything was met, what the site has at first."""
        del number
        if now < 0:
            return 0
        known = self._known()
        fresh = [name for name in self._there() if name not in known]
        if now >= len(known) and fresh:
            known.append(fresh[0])
            self.index.parent.mkdir(parents=True, exist_ok=True)
            store.save_json(self.index, known)
        return min(now + 1, len(known))

    def rows(self, position: int) -> Rows:
        """The rows of an experience.

        Raises:
            DataError: its file is gone, or cannot be read.
        """
        if position == 0:
            return self.first
        known = self._known()
        if position > len(known) or known[position - 1] not in self._there():
            name = known[position - 1] if position <= len(known) else f"number {position}"
            raise DataError(
                f"{self.source}: expected {name}, which is the present experience, found it gone: "
                "put it back until the next file was taken up"
            )
        prefix, _, pattern = self.source.partition(":")
        return self.read(f"{prefix}:{Path(pattern).parent / known[position - 1]}")

    def _there(self) -> list[str]:
        """Names of the files that are there now, in order; none is no mistake."""
        pattern = self.source.partition(":")[2]
        try:
            return sorted(place.name for place in find_files(str(self.folder), pattern))
        except DataError:
            return []

    def _known(self) -> list[str]:
        """Names of the files that were taken up, in order."""
        try:
            found: list[str] = json.loads(self.index.read_text())
        except FileNotFoundError:
            return []
        return found
