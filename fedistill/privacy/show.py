"""The ledger in words, for the commands ``fedistill ledger``.

Paths are those of a ledger, or of the folder that holds one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedistill.errors import LedgerError
from fedistill.privacy import accounting, audit_log
from fedistill.privacy.audit_log import AuditLog
from fedistill.privacy.chain import Entry
from fedistill.privacy.cohorts import charged, undominated
from fedistill.privacy.events import Claim, Event, Gaussian, Spending
from fedistill.privacy.ledger import LEDGER, Ledger

HEADER = ("seq", "time", "run", "round", "mechanism", "what", "unit", "state", "epsilon")


def show(path: Path) -> Iterator[str]:
    """One line for each debit, then what they add up to.

    The epsilons of the column are computed on a coarse grid (quick, never too small, some 0.1 %
    too large); those of the totals are the ones that count.

    Raises:
        LedgerError: there is no ledger, or it cannot be trusted.
    """
    ledger = _existing(path)
    entries = ledger.entries()
    if not entries:
        yield f"{ledger.path}: empty, nothing was spent"
        return
    delta = next((e.delta for e in reversed(entries) if e.delta is not None), 1e-5)
    yield from _table([HEADER, *_lines(entries, delta)])
    yield ""
    yield from _totals(ledger, entries, delta)


def verify(path: Path) -> str:
    """What was proved, in one line.

    Raises:
        LedgerError: with the reason, and the row.
    """
    ledger = _existing(path)
    ledger.verify()
    rows = len(ledger.entries())
    head = ledger.head[:12] or "none"
    return (
        f"{ledger.path}: {rows} row{'' if rows == 1 else 's'}, chain and cohorts hold, head {head}"
    )


def acknowledge(
    path: Path, epsilon: float, delta: float | None = None, heads: Sequence[str] = ()
) -> str:
    """Charge what a restored ledger does not know of, and say what is spent now.

    A ledger that is gone altogether is begun anew with that charge.

    Args:
        path: the ledger, or its folder.
        epsilon: the most that the lost rows can have spent.
        delta: its delta; a tenth of the budget's where it is not given.
        heads: first 12 digits or more of the heads that are asked for in vain.

    Raises:
        LedgerError: an epsilon below 0, a delta that uses the budget's up, a head that is none; or
            the ledger cannot be trusted.
    """
    ledger = Ledger(_home(path))
    known = [entry.delta for entry in ledger.entries() if entry.delta is not None]
    budget = min([*known[-1:], 1e-5])
    delta = float(f"{budget / 10:.3g}") if delta is None else delta
    if not (0 <= epsilon < float("inf") and 0 <= delta < budget):
        raise LedgerError(
            f"a loss needs an epsilon from 0 and a delta below {budget:g}, the budget's, of which "
            f"it uses a part; found {epsilon:g} and {delta:g}"
        )
    try:
        entry = ledger.acknowledge_loss(epsilon, delta, heads)
    except ValueError as error:
        raise LedgerError(f"{error}, found {', '.join(heads)}: copy it from the message") from None
    assert ledger.path is not None
    log = AuditLog(ledger.path.parent / audit_log.NAME)
    facts = {"epsilon": epsilon, "delta": delta, "entry": entry.seq, "ledger": entry.hash}
    log.append("loss_acknowledged", **facts)
    spent = ledger.spent(budget)
    return (
        f"{ledger.path}: ({epsilon:g}, {delta:g}) is charged to all; epsilon {spent:.4g} is spent "
        f"at delta {budget:g}, head {ledger.head[:12]}"
    )


def words(spending: Spending) -> str:
    """Events for readers.

    >>> from fedistill.privacy.events import Sampled
    >>> words(Spending.of(Sampled(0.05, 1.0), 200))
    '200 x Poisson(0.05) Gaussian(1)'
    """
    return " + ".join(f"{times} x {_event(event)}" for event, times in spending) or "-"


def _home(path: Path) -> Path:
    return path / LEDGER if path.is_dir() else path


def _existing(path: Path) -> Ledger:
    home = _home(path)
    if not home.exists():
        raise LedgerError(f"{home} must be a ledger, found no such file: check the path")
    return Ledger(home)


def _event(event: Event) -> str:
    if isinstance(event, Claim):
        return f"claim of ({event.epsilon:g}, {event.delta:g})"
    noise = f"Gaussian({event.sigma:g})"
    if isinstance(event, Gaussian):
        return noise
    copies = f" of {event.copies} copies" if event.copies > 1 else ""
    return f"Poisson({event.rate:g}) {noise}{copies}"


def _lines(entries: Sequence[Entry], delta: float) -> Iterator[tuple[str, ...]]:
    after = {e.entry_id: e.kind for e in entries if e.kind in ("release", "void")}
    states = {"release": "released", "void": "void", "": "reserved"}
    for place, entry in enumerate(entries, 1):
        if entry.kind in ("release", "void"):
            continue
        debit = entry.kind == "reserve"
        yield (
            str(entry.seq),
            entry.time,
            entry.run or "-",
            str(entry.round) if debit else "-",
            entry.mechanism or "-",
            words(entry.spending),
            entry.unit or "-",
            states[after.get(entry.entry_id, "")] if debit else entry.kind,
            f"{_so_far(entries[:place], entries, delta):.3g}",
        )


def _so_far(first: Sequence[Entry], entries: Sequence[Entry], delta: float) -> float:
    """Epsilon of the costliest cohort after some rows, without what was taken back later."""
    voids = [entry for entry in entries if entry.kind == "void"]
    total = charged([*first, *voids])
    return max(accounting.quick_epsilon(one, delta) for one in undominated(total.values()))


def _totals(ledger: Ledger, entries: Sequence[Entry], delta: float) -> Iterator[str]:
    debits = [entry for entry in entries if entry.kind == "reserve"]
    limits = [entry.epsilon for entry in debits if entry.epsilon is not None]
    limit = f" of {limits[-1]:g}" if limits else ""
    who = ", ".join(sorted({f"{e.mechanism}, per {e.unit}" for e in debits})) or "no debits"
    yield f"epsilon {ledger.spent(delta):.4g}{limit} at delta {delta:g}, add-remove"
    yield f"replace-one: {_replace_one(ledger, delta)}"
    cohorts = len(ledger.cohorts())
    yield f"{who}; {cohorts} cohort{'' if cohorts == 1 else 's'}, the costliest counts"
    yield f"accountant: {accounting.ACCOUNTANT}"
    open_ones = len(ledger.unreleased())
    if open_ones:
        yield f"{open_ones} reserved and not released: they stay charged"
    yield f"head {ledger.head}"


def _replace_one(ledger: Ledger, delta: float) -> str:
    try:
        return f"epsilon {ledger.spent(delta, 'replace-one'):.4g}"
    except ValueError:
        return "not known, as rows may lie there several times"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
