"""What of a client at work outlives its process: its state on disk, and who was erased.

One file holds the learner, the soft targets and the answer of the last round, whole or not at all,
with the generation before it. Ledger and releases lie beside it, see
:mod:`fedistill.privacy.account`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedistill import store
from fedistill.cache import Said
from fedistill.continual.erasure import ErasureReceipt
from fedistill.continual.purge import heed
from fedistill.course import Met
from fedistill.data.erased import bury, without_erased
from fedistill.distill.learner import Learner
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import CheckpointError, FedistillError, Rejected
from fedistill.members import Client
from fedistill.privacy.account import Account
from fedistill.settings import CLIENT_ID
from fedistill.types import FloatArray, IntArray, Rows, State
from fedistill.wire.messages import Plan
from fedistill.wire.shelf import Shelf


def state_path(folder: Path, name: str) -> Path:
    """Where a run folder holds the state of a client."""
    return folder / "sites" / name / "state"


class Kept(ABC):
    """The part of a :class:`fedistill.client.Site` that is written to disk and read again.

    Attributes:
        path: of the state; None: it stays in memory.
        runs: folder of a real site's states, one for every run.
        untaught: the learner's state as it was built.
        account: what may be spent of the rows, and was; None where nothing keeps count.
        saved: path and facts of the newest generation on disk, if it holds all that the site is.
        touched: whether the site may be other than its client and the seed make it: a step was
            begun, a person erased, or a state unpacked, whatever came of it.
    """

    client: Client
    learner: Learner
    data: Rows
    account: Account | None
    saved: tuple[Path | None, dict[str, Any]] | None
    touched: bool
    path: Path | None
    runs: Path | None
    untaught: State
    run: str
    round: int
    upload: bytes
    refusal: Rejected | None
    targets: FloatArray
    stamp: IntArray
    clipped: int
    position: int
    met: list[Met]
    alarm: bool
    told: Shelf | None
    said: Said | None

    @abstractmethod
    def _begin(self) -> None:
        """As before the first round."""

    @abstractmethod
    def _turn_to(self, position: int) -> None:
        """The rows that count as own from now on."""

    # --- where ---------------------------------------------------------------------------------

    @property
    def place(self) -> Path | None:
        """Where what outlives runs is kept: tombstones and ledger; None: nowhere."""
        if self.runs is not None:
            return self.runs.parent
        return None if self.path is None else self.path.parent

    def _leave_out(self) -> None:
        """From now on without the rows of people who were forgotten meanwhile."""
        if self.place is not None and without_erased(self.data, self.place) is not self.data:
            self._turn_to(self.position)

    def _heeded(self, learner: State) -> State:
        """A learner's state without people who were forgotten since it was saved."""
        return learner if self.place is None else heed(learner, self.data, self.place)

    def keep_in(self, folder: Path | None) -> None:
        """Keep the state under ``folder/sites/ID`` from now on; None keeps it in memory."""
        self.path = state_path(folder, self.client.id) if folder else None
        if self.path is not None:
            store.probe(self.path.parent)
            self._account_in(self.path.parent)
            self._leave_out()

    def _account_in(self, folder: Path) -> None:
        """Keep the ledger in this folder, and what it says was released."""
        if self.client.terms is not None and (
            self.account is None or self.account.folder != folder
        ):
            self.account = Account(self.client.terms, folder)

    def keep_runs_in(self, folder: Path) -> None:
        """Keep a state for every run under ``folder/RUN``: a real site outlives a run.

        A run that the site has not met starts with the student as it was built.
        """
        self.runs, self.untaught = folder, self.learner.state_dict()
        self._account_in(folder.parent)
        self._leave_out()

    def recall(self, plan: Plan) -> str | None:
        """Go on from the state on disk, where another process may have done the last step.

        Returns:
            A note if an older generation of the state had to be used.

        Raises:
            Rejected: the name of the run cannot be that of a folder, or a later round was answered.
            CheckpointError: as :meth:`restore`.
        """
        if self.runs is not None:
            if not re.fullmatch(CLIENT_ID, plan.run):
                raise Rejected("run", "the name of the run cannot be that of a folder")
            self._expect_all()
            if self.run not in {"", plan.run}:
                self.learner.load_state_dict(self.untaught, self.data)
                self._begin()
            self.path = self.runs / plan.run / "state"
            self._never_back(plan)
        return self.restore(plan.run, plan.round)

    def _expect_all(self) -> None:
        """Refuse a ledger that is behind what any run, or the audit log, saw of it.

        A run that is new brings no receipt, and whoever names it chooses when it is new.

        Raises:
            LedgerError: it was rolled back, replaced or deleted.
        """
        if self.account is None or self.runs is None:
            return
        self.account.expect_log()
        for state in sorted(self.runs.glob("*/state")):
            told = store.load_state(state)[1].get("privacy", {})
            self.account.expect(told.get("head", ""))

    def _never_back(self, plan: Plan) -> None:
        """A real site does not train from an older state because the server says an older round.

        Two different uploads for one round would come of it, and twice the privacy loss. What was
        answered is sent again for as long as it is kept: the last round, and the one before.
        """
        assert self.path is not None
        if not self.path.exists():
            return
        newest = store.load_state(self.path)[1]["round"]
        if newest <= plan.round:
            return
        before = store.previous(self.path)
        if not before.exists() or store.load_state(before)[1]["round"] != plan.round:
            raise Rejected("stale_round", f"round {plan.round} was answered, now {newest}")

    def _touch(self) -> None:
        """From here on the site is not what its file holds, nor what its client was."""
        self.touched, self.saved = True, None

    def save(self) -> None:
        """Write learner, soft targets and the stored answer in one file, whole or not at all."""
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            store.probe(self.path.parent)
        store.save_state(self.path, *self.packed(), own=True)
        self.saved = self.path, self.facts()

    def packed(self) -> tuple[State, dict[str, Any]]:
        """What :meth:`save` writes: arrays, and facts fit for JSON."""
        arrays = {f"learner.{name}": value for name, value in self.learner.state_dict().items()}
        arrays |= {
            "targets": self.targets,
            "stamp": self.stamp,
            "upload": np.frombuffer(self.upload, dtype=np.uint8),
        }
        for name, part in self._held().items():
            arrays |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        facts = self.facts()
        if self.account is not None:
            facts["privacy"] = self.account.facts()
        return arrays, facts

    def facts(self) -> dict[str, Any]:
        """Where the site stands, fit for JSON: all of its state but arrays and account."""
        facts: dict[str, Any] = {
            "run": self.run,
            "round": self.round,
            "refusal": self.refusal and [self.refusal.reason, self.refusal.detail],
            "clipped": self.clipped,
        }
        if self.client.course is not None:
            facts |= {"position": self.position, "met": [one.facts() for one in self.met]}
            facts["alarm"] = self.alarm
        return facts

    def erase(self, subject: object) -> ErasureReceipt:
        """Forget a person's remembered rows, here and on disk, and let none of them in again.

        Both generations of the state are written anew, and a tombstone: of the rows that the client
        itself holds, the person's are left out from now on. The weights have learned from them.

        Raises:
            FedistillError: this client remembers no rows, or no such name can be.
        """
        erase = getattr(self.learner, "erase", None)
        if erase is None:
            raise FedistillError(
                f"erase: {self.client.id} remembers no rows: there is nothing to erase"
            )
        self._touch()
        receipt: ErasureReceipt = erase(subject)
        if self.place is not None:
            bury(self.place, [str(subject)])
            self._leave_out()
            self.learner.load_state_dict(self._heeded(self.learner.state_dict()), self.data)
        self.save()
        self.save()
        return receipt

    def _held(self) -> dict[str, Shelf | Said]:
        """What a method with a cache holds on both sides."""
        if self.told is None or self.said is None:
            return {}
        return {"told": self.told, "said": self.said}

    def restore(self, run: str, upcoming: int) -> str | None:
        """Go on from the saved state; a note if an older generation had to be used.

        Args:
            run: the server's run.
            upcoming: the round that the server will ask for next. A state beyond it (the server
                lost its newest generation) could not answer, so the one before is taken.

        Raises:
            CheckpointError: both generations are damaged, or of another model.
        """
        if self.path is None or not (self.path.exists() or store.previous(self.path).exists()):
            return None
        arrays, meta, note = store.load_state(self.path)
        if meta["run"] == run and meta["round"] > upcoming:
            if not store.previous(self.path).exists():
                raise CheckpointError(
                    f"the state of {self.client.id} is at round {meta['round']}, the server's at "
                    f"{upcoming - 1}: put copies of one time back, or start in a new folder"
                )
            arrays, meta, _ = store.load_state(store.previous(self.path))
            note = "state is ahead of the server's, the generation before it was used"
        self.unpack(arrays, meta)
        self.saved = None if note else (self.path, self.facts())
        return f"{self.client.id}: {note}" if note else None

    def unpack(self, arrays: State, meta: Mapping[str, Any]) -> None:
        """Go on from what :meth:`packed` gave, here or in another process.

        Raises:
            CheckpointError: it is of another model.
        """
        self._touch()
        learner = {k[8:]: v for k, v in arrays.items() if k.startswith("learner.")}
        self._leave_out()
        if "position" in meta:
            self._turn_to(meta["position"])
            self.met = [Met.from_facts(one) for one in meta["met"]]
            self.alarm = meta["alarm"]
        learner = learner or dict(self.untaught)  # after `forget --restart`: as it was built
        if learner and type(self.learner) is TorchStudent:
            store.same_names(learner, self.learner.state_dict(), self.client.id)
        try:
            if learner:
                self.learner.load_state_dict(self._heeded(learner), self.data)
        except KeyError as missing:
            raise CheckpointError(
                f"the saved state of {self.client.id} belongs to another model (missing "
                f"{missing.args[0]}): resume with the settings it was written with, or start in "
                "a new folder"
            ) from None
        if self.account is not None and "privacy" in meta:
            self.account.recall(meta["privacy"])
        self.targets, self.stamp = arrays["targets"], arrays["stamp"]
        self.upload = arrays["upload"].tobytes()
        for name, part in self._held().items():
            start = len(name) + 1
            kept = {key[start:]: v for key, v in arrays.items() if key.startswith(f"{name}.")}
            part.load_state_dict(kept)
        self.run, self.round = meta["run"], meta["round"]
        self.clipped = int(meta["clipped"])
        self.refusal = Rejected(*meta["refusal"]) if meta.get("refusal") else None
