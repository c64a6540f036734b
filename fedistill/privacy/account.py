"""A client's privacy account: every private step is charged before it runs, and once.

The account stands between the step of a client and its ledger. It plans the noise, has the ledger
charge the step, allows the learner to take it, and keeps what was released, so that whoever asks
again for a round gets the same bytes and no second draw of the noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedistill import store
from fedistill.errors import BudgetExceeded, LedgerError, Rejected
from fedistill.privacy import audit_log
from fedistill.privacy.audit_log import AuditLog
from fedistill.privacy.events import Spending
from fedistill.privacy.learner import Private, Quote
from fedistill.privacy.ledger import LEDGER, Entry, Ledger
from fedistill.privacy.planner import noise_for
from fedistill.privacy.terms import Terms
from fedistill.types import IntArray, Rows

RELEASES = "releases"


@dataclass(frozen=True)
class Step:
    """The step that is asked of a client.

    Attributes:
        run: which run.
        round: which round, those of distillation counted.
        left: rounds in which these rows may still be trained on, this one included; 0: none.
        asked: proxy rows that are asked.
    """

    run: str
    round: int
    left: int
    asked: IntArray


class Account:
    """What a client may spend, what it has spent, and what it bought.

    Args:
        terms: what was agreed.
        folder: where ledger and releases are kept; None: in memory.

    Attributes:
        sigma: noise multiplier of this run; None before its first step.
    """

    def __init__(self, terms: Terms, folder: Path | None = None) -> None:
        self.terms = terms
        self.folder = folder
        self.ledger = Ledger(None if folder is None else folder / LEDGER)
        self.log = None if folder is None else AuditLog(folder / audit_log.NAME)
        self.sigma: float | None = None
        self.run = ""
        self._releases: dict[tuple[str, int], bytes] = {}

    def agree(self, mechanism: str, purpose: str, receipt: str) -> None:
        """Refuse a request on other terms, and a ledger that is behind what others saw of it.

        Args:
            mechanism: that the coordinator asks for.
            purpose: that it asks for.
            receipt: head of this client's ledger as it was last told to the coordinator.

        Raises:
            Rejected: ``policy``.
            LedgerError: the ledger lacks entries that were there.
        """
        if mechanism != self.terms.agreed:
            asked = mechanism or "none"
            self._note("policy_refused", reason="mechanism")
            raise Rejected("policy", f"agreed was {self.terms.agreed}, found a request for {asked}")
        if purpose != self.terms.purpose:
            self._note("policy_refused", reason="purpose")
            raise Rejected("policy", "the run is for another purpose than was agreed")
        self.expect(receipt)

    def expect(self, head: str) -> None:
        """Refuse a ledger that does not hold a row which it had once.

        Raises:
            LedgerError: it was rolled back, replaced or deleted.
        """
        if not self.ledger.holds(head):
            self._note("refused", reason="ledger", ledger=head)
            raise LedgerError(
                f"{self.ledger.path or 'the ledger'}: expected the entry {head[:12]}, which it had "
                "before, found it gone: put the newest copy back, or state what may be missing "
                "with `fedistill ledger acknowledge-loss`"
            )

    def expect_log(self) -> None:
        """Refuse a ledger that does not hold the last row that the audit log tells of.

        Raises:
            LedgerError: as :meth:`expect`.
        """
        if self.log is not None:
            heads = [str(entry["ledger"]) for entry in self.log_entries() if "ledger" in entry]
            self.expect(heads[-1] if heads else "")

    def log_entries(self) -> tuple[audit_log.Entry, ...]:
        """The last entries of the audit log."""
        return () if self.log is None else audit_log.entries(self.log.path)

    # --- a step --------------------------------------------------------------------------------

    def pay(self, step: Step, learner: Private, rows: Rows) -> Entry | None:
        """Charge a step and allow the learner to take it; None where it costs nothing.

        Raises:
            BudgetExceeded: it would cost more than is left.
            LedgerError: the ledger cannot be trusted, or cannot be written.
        """
        if not step.left or not len(rows):
            return None
        quote = learner.quote(rows, step.asked)
        if not quote(1.0):
            return None
        units = learner.units(rows)
        if not units:
            return None
        if self.run != step.run:
            self._note(
                "run_begun",
                run=step.run,
                units=len(units),
                purpose=self.terms.purpose,
                limit=self.terms.epsilon,
            )
        try:
            entry = self._reserve(step, learner, rows, quote, units)
        except BudgetExceeded as refusal:
            self._note(
                "exhausted",
                run=step.run,
                round=step.round,
                epsilon=refusal.spent,
                limit=refusal.limit,
            )
            raise
        self._note(
            "charged",
            run=step.run,
            round=step.round,
            entry=entry.seq,
            mechanism=self.terms.mechanism,
            unit=self.terms.unit,
            sigma=self.sigma,
            epsilon=self.spent(),
            delta=self.terms.delta,
            ledger=self.head,
        )
        return entry

    def _reserve(
        self, step: Step, learner: Private, rows: Rows, quote: Quote, units: tuple[bytes, ...]
    ) -> Entry:
        """Plan the noise, charge the step, allow it."""
        past = self.ledger.worst(units, self.terms.delta)
        forecast = self._forecast(quote, step, learner, rows)
        sigma = self._noise(step, forecast, past)

        def fits() -> bool:
            """Whether all that is planned stays within the limit, whoever wrote in between."""
            planned = forecast(sigma)
            return all(
                self.ledger.epsilon(charged + planned, self.terms.delta, self.terms.relation)
                <= self.terms.epsilon
                for charged in self.ledger.spending(units)
            )

        entry = self.ledger.reserve(
            run=step.run,
            round=step.round,
            mechanism=self.terms.mechanism,
            spending=quote(sigma),
            unit=self.terms.unit,
            relation=self.terms.relation,
            units=units,
            epsilon=self.terms.epsilon,
            delta=self.terms.delta,
            fits=None if self.terms.sigma is not None else fits,
        )
        try:
            learner.allow(sigma)
        except Exception:
            self.ledger.void(entry)  # nothing was computed
            self._note("voided", run=step.run, round=step.round, entry=entry.seq)
            raise
        self.ledger.started(entry)
        self.sigma, self.run = sigma, step.run
        return entry

    def _forecast(self, quote: Quote, step: Step, learner: Private, rows: Rows) -> Quote:
        """The cost of all that is planned for these rows, this step included."""
        own = getattr(learner, "forecast", None)
        if own is not None:
            found: Quote = own(rows, step.asked, step.left)
            return found
        return lambda sigma: quote(sigma) * step.left

    def _noise(self, step: Step, forecast: Quote, past: Spending) -> float:
        if self.terms.sigma is not None:
            return self.terms.sigma
        before = self.sigma if self.run == step.run else None
        terms = self.terms
        return noise_for(forecast, past, terms.epsilon, terms.delta, terms.relation, before=before)

    def release(self, entry: Entry, upload: bytes) -> None:
        """Keep the bytes that a step bought, then note that they may leave.

        Raises:
            RunError: they cannot be written; nothing leaves.
        """
        digest = hashlib.sha256(upload).hexdigest()
        self._keep(entry.run, entry.round, upload)
        self.ledger.release(entry, digest)
        self._note("released", run=entry.run, round=entry.round, sha256=digest, bytes=len(upload))

    def settle(self, run: str, number: int, upload: bytes) -> None:
        """Release the answer of a round, where it was paid for and that was not done yet.

        Raises:
            LedgerError: it cannot be noted; nothing leaves.
        """
        entry = self._unreleased(run, number)
        if entry is not None and self.ledger.released(run, number) is None:
            self.release(entry, upload)

    def released(self, run: str, number: int) -> bytes | None:
        """What was released for a round before, to be sent again; None if nothing was.

        A reservation whose complete file is there, but whose release was not noted before the
        process died, is noted now.

        Raises:
            LedgerError: the stored bytes are not those that were released.
        """
        upload = self._kept(run, number)
        digest = self.ledger.released(run, number)
        if upload is None:
            return None
        if digest is None:
            entry = self._unreleased(run, number)
            if entry is None:
                return None
            digest = hashlib.sha256(upload).hexdigest()
            self.ledger.release(entry, digest)
        if digest != hashlib.sha256(upload).hexdigest():
            raise LedgerError(
                f"{self._path(run, number)}: expected the bytes that the ledger says were "
                "released, found others: put them back, or go on with the next round"
            )
        self._note("resent", run=run, round=number, sha256=digest)
        return upload

    def rounds_before(self, run: str, number: int) -> int:
        """Rounds of a run, other than this one, that were charged."""
        charged = {e.round for e in self.ledger.entries() if e.kind == "reserve" and e.run == run}
        return len(charged - {number})

    def _unreleased(self, run: str, number: int) -> Entry | None:
        """The last reservation for a round of which nothing was released yet."""
        found = [e for e in self.ledger.unreleased() if (e.run, e.round) == (run, number)]
        return found[-1] if found else None

    # --- figures -------------------------------------------------------------------------------

    @property
    def head(self) -> str:
        """Hash of the ledger's last entry."""
        return self.ledger.head

    def spent(self) -> float:
        """Epsilon so far, of the unit that has spent most."""
        return self.ledger.spent(self.terms.delta, self.terms.relation)

    def facts(self) -> dict[str, Any]:
        """What goes with the client's state: the head against rollback, and the planned noise."""
        return {"head": self.head, "sigma": self.sigma, "run": self.run}

    def recall(self, facts: dict[str, Any]) -> None:
        """Go on from the client's state.

        Raises:
            LedgerError: the ledger is older than the state.
        """
        self.expect(facts["head"])
        self.sigma, self.run = facts["sigma"], facts["run"]

    def _note(self, what: str, **facts: Any) -> None:
        """Say in the site's audit log what was done; in memory there is none."""
        if self.log is not None:
            self.log.append(what, **facts)

    # --- what was released ---------------------------------------------------------------------

    def _path(self, run: str, number: int) -> Path | None:
        return None if self.folder is None else self.folder / RELEASES / f"{run}-{number}.upload"

    def _keep(self, run: str, number: int, upload: bytes) -> None:
        path = self._path(run, number)
        if path is None:
            self._releases[run, number] = upload
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_atomic(path, upload, own=True)

    def _kept(self, run: str, number: int) -> bytes | None:
        path = self._path(run, number)
        if path is None:
            return self._releases.get((run, number))
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
