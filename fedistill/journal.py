"""What a run leaves on disk so that it can be killed at any instant and go on.

The server's checkpoint is the truth: it holds the history, of which ``rounds.jsonl`` and
``stream.jsonl`` are views.
Every site keeps its own state beside it, with the answer of its last round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fedistill import store
from fedistill.client import Site
from fedistill.dormant import leave_files, with_files
from fedistill.errors import CheckpointError
from fedistill.kept import state_path
from fedistill.server import Server

Row = dict[str, Any]
STREAM = "stream.jsonl"
"""A line for each experience of a stream: a view of the history, as ``rounds.jsonl`` is."""


class Journal:
    """The checkpoint of one run folder, held by one process at a time.

    Args:
        folder: the run folder, or None to keep nothing.
        identity: what must be the same for a run to be resumed.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Journal:
        """Make the folder ready and keep other processes out of it."""
        if self.folder is None:
            return self
        store.probe(self.folder / "checkpoint")
        self._held.enter_context(store.held(self.folder / "checkpoint"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let others in."""
        self._held.close()

    def exists(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        if self.folder is None:
            return False
        return self._server().exists() or store.previous(self._server()).exists()

    def restore(self, server: Server, sites: Mapping[str, Site]) -> tuple[list[Row], list[str]]:
        """Bring server and sites to where the checkpoint is; the history, and notes.

        Raises:
            CheckpointError: the run has other settings, or nothing whole is left.
        """
        arrays, facts, note = store.load_state(self._server())
        changed = sorted(k for k, v in self.identity.items() if facts["identity"].get(k) != v)
        if changed:
            raise CheckpointError(
                f"{self.folder} holds a run with other settings ({', '.join(changed)}): "
                "resume with the same settings, or choose another folder with --out"
            )
        server.load_state_dict(arrays, facts["server"])
        history = list(facts["history"])
        notes = [note] if note else []
        for site in with_files(sites, self.folder):
            told = site.restore(server.run, server.round + 1)
            notes += [told] if told else []
        self._write_rounds(history)
        return history, notes

    def clear(self, sites: Mapping[str, Site]) -> None:
        """Take away what an earlier run left, the server's state first: it is what resumes."""
        if self.folder is None:
            return
        leave_files(sites)
        old = [self._server(), self.folder / "rounds.jsonl", self.folder / STREAM]
        old += [state_path(self.folder, name) for name in sites]
        for path in old:
            if path.parent.is_dir():
                store.remove(path)

    def save(self, server: Server, history: Sequence[Row]) -> None:
        """A round is done."""
        if self.folder is None:
            return
        arrays, facts = server.state_dict()
        meta = {"identity": self.identity, "server": facts, "history": list(history)}
        store.save_state(self._server(), arrays, meta)
        self._write_rounds(history)

    def _server(self) -> Path:
        assert self.folder is not None
        return self.folder / "checkpoint" / "server"

    def _write_rounds(self, history: Sequence[Row]) -> None:
        assert self.folder is not None
        rounds = [{k: v for k, v in row.items() if k != "experience"} for row in history]
        store.save_lines(self.folder / "rounds.jsonl", rounds)
        lines = [row["experience"] for row in history if "experience" in row]
        if lines or (self.folder / STREAM).exists():
            store.save_lines(self.folder / STREAM, lines)
