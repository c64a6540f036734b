"""``fedistill forget``: a person's rows leave a site's memory and disk, and a receipt says so.

In this order, so that whatever happens in between, the command can be given again and nothing comes
back: a tombstone is written, which every later load of rows heeds; memories and caches are washed
of the person's rows, in both generations of each state; the ledger is told; the receipt is written.
What the model has learned from those rows stays in its weights, unless it begins anew: the receipt
says which, and with what bound.

No torch here, and no model: the files are all that is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedistill import config, store
from fedistill.continual.purge import Arrays, purge
from fedistill.data.erased import bury
from fedistill.dropping import drop_client as drop_client
from fedistill.errors import DataError, FedistillError, LedgerError, RunError
from fedistill.receipts import Receipt, names, write_receipt
from fedistill.rewriting import Content, newest, read_generations, rewrite
from fedistill.settings import DataSettings
from fedistill.types import Rows, State

Say = Callable[[str], None]

SITE_FILE = "site.toml"
LEDGER = "ledger.sqlite"
DELTA = 1e-5
"""At which epsilon is stated, where settings name no other delta."""

RESTARTED = "begins anew in its next round, and has then never seen these rows"
REFITTED = "is fitted to its rows anew at every start: from the next one on it has not seen these"
BOUNDED = "keeps what it learned; the influence of these rows is bounded by epsilon"
UNBOUNDED = "influence NOT bounded: the model has learned from these rows; --restart begins anew"

REFUND = "erasure refunds no epsilon: what was spent stays on the ledger"
PAY = "what begins anew has to be paid for anew: with a spent budget this site answers no more"
GROUP = "epsilon is that of one record: of a person with several, it is so many times as much"
UNTRUSTED = "the ledger cannot be trusted, so no bound is stated: see `fedistill ledger verify`"
SHARED = "soft targets of other sites' making may still reflect these rows until they are made anew"
OWNER = "the source files are their owner's affair: take the person's rows out of them, too"
COPIES = "copies and backups of this folder are not known here: replace them"
COORDINATOR = (
    "the coordinator should drop what this client said: `fedistill forget RUN --client {site}`"
)


@dataclass(frozen=True)
class Place:
    """Where one site keeps what outlives a process.

    Attributes:
        site: its name.
        home: what file names in the receipt start from.
        folder: of tombstones, ledger and receipts.
        locks: folders that others must stay out of.
        states: its state, one for each run.
    """

    site: str
    home: Path
    folder: Path
    locks: tuple[Path, ...]
    states: tuple[Path, ...]


def forget(
    path: str | Path, subjects: Sequence[str], *, say: Say = print, restart: bool = False
) -> list[Receipt]:
    """Forget people at one site, or at all sites of a simulated run.

    Args:
        path: a site's folder (with ``site.toml``), ``sites/ID`` of a run, or the folder of a run.
        subjects: names, as the column that ``data.subject`` names has them.
        say: is told what was done, without any name.
        restart: the next round begins with the student as it was built.

    Returns:
        A receipt for each site. That nothing of a person was found is no error.

    Raises:
        FedistillError: no name, or the empty one.
        RunError: the folder is none of these, is in use, or cannot be written.
        DataError: nothing says whose row is whose.
        CheckpointError: both generations of a state are damaged.
    """
    people = list(dict.fromkeys(subjects))
    if not people or "" in people:
        raise FedistillError("forget: expected a subject, found none: name the person")
    folder = Path(path)
    places = places_in(folder)
    with contextlib.ExitStack() as locks:
        for lock in _locks(folder, places):
            if not lock.is_dir():
                store.probe(lock)
            locks.enter_context(store.held(lock))
        return [_told(forget_at(place, people, restart=restart), say) for place in places]


def forget_at(place: Place, subjects: Sequence[str], *, restart: bool) -> Receipt:
    """Forget people at one site, whose folder is held."""
    store.probe(place.folder)
    marks = bury(place.folder, subjects)
    count = 0
    weights: dict[str, str] = {}
    written: list[Path] = []
    removed = sorted((place.folder / "cache").glob("rows-*.npz"))
    for cache in removed:
        cache.unlink()

    def washed(content: Content) -> Content:
        arrays, facts = content
        clean = purge(arrays, subjects)[0]
        return (untaught(clean) if restart else clean), facts

    for state in place.states:
        generations = read_generations(state)
        content = newest(generations)
        if content is None:
            continue
        count += purge(content[0], subjects)[1]
        weights[str(content[1]["run"])] = RESTARTED if restart else remains(content[0])
        files = rewrite(generations, washed)
        written, removed = written + files[0], removed + files[1]
    receipt = Receipt(
        kind="forget",
        site=place.site,
        subjects=tuple(marks),
        rows=count,
        written=names(written, place.home),
        removed=names(removed, place.home),
        weights=weights,
        notes=(SHARED,),
        elsewhere=(OWNER, COPIES, COORDINATOR.format(site=place.site)),
    )
    if (place.folder / LEDGER).exists():
        receipt = accounted(receipt, place, subjects)
    _log(place, receipt, write_receipt(place.folder, receipt))
    return receipt


def untaught(arrays: State) -> Arrays:
    """A site's state whose learner begins as it was built, and holds no soft targets.

    What was answered stays, so that the last round is not answered anew.
    """
    left = {name: array for name, array in arrays.items() if not name.startswith("learner.")}
    return left | {name: np.zeros_like(arrays[name]) for name in ("targets", "stamp")}


def remains(arrays: State) -> str:
    """What becomes of what a site's model has learned, as far as its state tells."""
    if not any(name.startswith("learner.") for name in arrays):
        return RESTARTED
    return REFITTED if is_refitted(arrays) else UNBOUNDED


def is_refitted(arrays: State) -> bool:
    """Whether a state has no weights: its model is restored by fitting it to its rows again."""
    homes = [name.removesuffix("fitted") for name in arrays if name.endswith(".fitted")]
    return any(f"{home}seed" in arrays for home in homes)


def accounted(receipt: Receipt, place: Place, subjects: Sequence[str]) -> Receipt:
    """The receipt with what the ledger says, once the erasure stands in its chain."""
    from fedistill.privacy.ledger import Ledger

    ledger = Ledger(place.folder / LEDGER)
    notes = (*receipt.notes, REFUND)
    try:
        ledger.verify()
        paid = [entry for entry in ledger.entries() if entry.kind == "reserve"]
        delta = paid[-1].delta or DELTA if paid else DELTA
        ledger.tombstone(units_of(subjects))
        spent, head = ledger.spent(delta), ledger.head
    except LedgerError:
        return replace(receipt, notes=(*notes, UNTRUSTED))
    finally:
        ledger.close()
    if RESTARTED in receipt.weights.values():
        notes = (*notes, PAY)
    runs, unit = {entry.run for entry in paid}, paid[-1].unit or "" if paid else ""
    return replace(
        receipt,
        weights={
            run: BOUNDED if words == UNBOUNDED and run in runs else words
            for run, words in receipt.weights.items()
        },
        epsilon=spent,
        delta=delta,
        unit=unit,
        ledger=head,
        notes=(*notes, GROUP) if unit == "record" else notes,
    )


def units_of(subjects: Sequence[str]) -> tuple[bytes, ...]:
    """How a ledger that counts by users knows these people.

    Records are not named to it: a record of somebody else may be the same.
    """
    from fedistill.privacy.sampling import names_of

    count = len(subjects)
    people = Rows(np.zeros((count, 1)), np.zeros(count, dtype=np.int64), subject=np.array(subjects))
    return tuple(names_of(people, "user"))


def _log(place: Place, receipt: Receipt, file: Path) -> None:
    """Note the erasure in the site's audit log, if it keeps one."""
    from fedistill.privacy.audit_log import NAME, AuditLog

    if not (place.folder / NAME).exists():
        return
    with contextlib.suppress(LedgerError):  # it says what is wrong with it when it is verified
        AuditLog(place.folder / NAME).append(
            "forgotten",
            site=place.site,
            units=len(receipt.subjects),
            rows=receipt.rows,
            epsilon=receipt.epsilon,
            delta=receipt.delta,
            ledger=receipt.ledger or None,
            sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        )


# --- where things are ----------------------------------------------------------------------------


def places_in(folder: Path) -> list[Place]:
    """The sites whose folder, or whose run's folder, this is.

    Raises:
        RunError: it is neither.
        DataError: its settings do not say whose row is whose.
    """
    if (folder / SITE_FILE).exists():
        return [_real(folder)]
    if folder.parent.name == "sites" and any(folder.glob("state*")):
        return [_simulated(folder)]
    found = sorted({state.parent for state in folder.rglob("sites/*/state*")})
    if not found:
        raise RunError(
            f"{folder}: expected a site's folder (with {SITE_FILE}), the folder of a run with "
            "sites, or one of its sites/ID, found none of them: check the path"
        )
    return [_real(one) if (one / SITE_FILE).exists() else _simulated(one) for one in found]


def _real(folder: Path) -> Place:
    settings = config.load_site(folder / SITE_FILE)
    agreed = config.load(folder / settings.federation)
    _check_subject(settings.id, settings.data.source, agreed.data)
    state = folder / "state"
    runs = sorted({one.with_name("state") for one in state.glob("runs/*/state*")})
    return Place(settings.id, folder, state, (state,), tuple(runs))


def _simulated(folder: Path) -> Place:
    run = folder.parent.parent
    if (run / "config.toml").exists():
        agreed = config.load(run / "config.toml")
        _check_subject(folder.name, agreed.data.source, agreed.data)
    locks = [place for place in (run, run / "checkpoint") if place.is_dir()]
    return Place(folder.name, run, folder, tuple(locks), (folder / "state",))


def _check_subject(site: str, source: str, data: DataSettings) -> None:
    """Without a column there is nobody to forget.

    Raises:
        DataError: no column says whose row is whose, and no session does.
    """
    if not data.subject and not source.startswith("sessions:"):
        raise DataError(
            f"{site}: expected data.subject to name the column that says whose row it is, found "
            "none: without it nobody's rows can be told from another's; name it, or take the "
            "person's rows out of the source files and begin a new run"
        )


def _locks(folder: Path, places: Sequence[Place]) -> list[Path]:
    """Folders to hold, each once; that of several seeds is held by whoever runs one of them."""
    wanted = [lock for place in places for lock in place.locks]
    if (folder / "config.toml").exists():
        wanted.append(folder)
    return sorted({lock.resolve(): lock for lock in wanted}.values())


def _told(receipt: Receipt, say: Say) -> Receipt:
    say(receipt.text())
    return receipt
