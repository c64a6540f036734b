"""From the files of a real party to its half of the federation: the coordinator's, or a site's.

All parties hold the same ``federation.toml`` and the same proxy rows; a site has a ``site.toml``
beside them, with its own rows and what it allows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedistill import config, store
from fedistill.assembly import maker, method_of, model_factory, privately, recipe
from fedistill.client import Client, Site
from fedistill.config import DataSettings, Settings, SiteSettings, TrainSettings
from fedistill.course import Course
from fedistill.data import Federated
from fedistill.data.erased import without_erased
from fedistill.data.files import find_files
from fedistill.data.npz import load_arrays
from fedistill.data.site import Public, read_public, split
from fedistill.distill.learner import Learner
from fedistill.errors import (
    DataError,
    LedgerError,
    Problem,
    Rejected,
    RunError,
    SettingsError,
    did_you_mean,
)
from fedistill.exchange import EXCHANGES
from fedistill.incoming import Incoming
from fedistill.log import event
from fedistill.privacy import audit_log
from fedistill.privacy.audit_log import AuditLog
from fedistill.privacy.terms import PRIVATE
from fedistill.settings import OwnDataSettings
from fedistill.tables import TableSite
from fedistill.types import Dataset, FloatArray, Rows
from fedistill.wire.messages import Plan

SITE_FILE = "site.toml"
STATE = "state"


# --- the coordinator -----------------------------------------------------------------------------


def public_rows(settings: Settings) -> Public:
    """The public rows, as every party reads them.

    Raises:
        DataError: they are not what was agreed on.
    """
    agreed = settings.deployment
    return read_public(
        settings.data, settings.proxy, agreed.classes, settings.seed, agreed.proxy_sha256
    )


def coordinated(settings: Settings) -> Federated:
    """What the coordinator holds: public rows, test rows if it has any, and nobody's own."""
    public = public_rows(settings)
    test = public.own(settings.data.test, settings.data, owned=False)
    blank = Rows(public.proxy.inputs, np.full(len(public.proxy), -1, dtype=np.int64))
    name = settings.data.test or settings.proxy.path
    return Federated(Dataset(name, public.none(), test, blank, public.classes), parts={})


# --- a site --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Workplace:
    """A real site with its settings: who it is, what it holds, what it allows.

    Attributes:
        folder: where ``site.toml`` lies.
        settings: of the site.
        agreed: of the federation.
        site: the client at work.
        public: the public rows, and what they decide for all others.
    """

    folder: Path
    settings: SiteSettings
    agreed: Settings
    site: Site
    public: Public

    @property
    def state(self) -> Path:
        """Where everything is kept that must outlive a process."""
        return self.folder / STATE

    def student(self, run: str = "") -> Learner:
        """The site's student as its last round left it, for use on rows of its own.

        Args:
            run: which run; empty: the newest.

        Raises:
            RunError: the site has not taken part in a run yet, or not in this one.
        """
        states = sorted(
            (self.state / "runs").glob(f"{run or '*'}/state"), key=lambda path: path.stat().st_mtime
        )
        if not states:
            raise RunError(
                f"{self.folder}: expected the state of {run or 'a run'}, found none: the site "
                "has to answer a round first"
            )
        site = self.site
        site.path = states[-1]
        site.restore("", 0)
        return site.learner

    def allow(self, plan: Plan) -> None:
        """Refuse what goes beyond the site's own policy: it wins over any request.

        Raises:
            Rejected: ``policy``.
        """
        policy = self.settings.policy
        refuse(self.folder, self.objection())
        exchange = self.site.method.exchange
        if exchange != "predictions" and exchange not in policy.share:
            raise Rejected("policy", f"this site does not share {exchange}")
        known = {place.parent.name for place in (self.state / "runs").glob("*/state")}
        if policy.runs and plan.run not in known and len(known) >= policy.runs:
            raise Rejected("policy", f"this site answers {policy.runs} runs")
        if policy.rounds and plan.round > policy.rounds:
            raise Rejected("policy", f"this site answers {policy.rounds} rounds of a run")
        if policy.rows and plan.count() > policy.rows:
            raise Rejected("policy", f"this site answers {policy.rows} proxy rows in a round")

    def refuses(self) -> str:
        """Why this site answers nothing of what was agreed; empty: it does."""
        objection = self.objection()
        return objection.words if objection else ""

    def objection(self) -> Objection | None:
        """What the site's policy has against what was agreed."""
        return objection_of(self.settings, self.agreed, self.public.proxy.fingerprint)

    def prepare(self, message: bytes) -> None:
        """Allow a plan, and take up the state that its round begins with.

        Raises:
            Rejected: the plan cannot be read, or goes beyond the site's policy.
            CheckpointError: the state cannot be read.
        """
        plan = Plan.from_bytes(message, self.site.limit)
        self.allow(plan)
        older = self.site.recall(plan)
        if older is not None:
            event("state_restored", run=plan.run, round=self.site.round)
        elif not self.site.round:
            event("run_begun", run=plan.run, round=plan.round)

    def answer(self, message: bytes) -> bytes:
        """One round, in a process that may be new: a plan in, an upload out.

        Raises:
            Rejected: the plan is not for this site, goes beyond its policy, or its predictions
                cannot be shared.
            RunError: the state cannot be read or written.
        """
        self.prepare(message)
        return self.site.answer(message)

    def inputs(self, source: str) -> FloatArray:
        """New rows without labels, as the student takes them: for use, not for learning.

        Args:
            source: where they are, as ``source`` in ``[data]`` of ``site.toml``.

        Raises:
            DataError: they cannot be read, or lack a column that the public rows have.
        """
        with contextlib.chdir(self.folder):
            return self.public.inputs(source, own_data(self.settings, self.agreed))


@dataclass(frozen=True)
class Objection:
    """What a site's policy has against what all agreed on.

    Attributes:
        key: the key of the policy.
        words: for the site's administrator.
    """

    key: str
    words: str


def objection_of(settings: SiteSettings, agreed: Settings, proxy: str) -> Objection | None:
    """Why a site answers nothing of what was agreed; None: it does.

    A limit on epsilon is one on what is not private too: there epsilon has no bound.

    Args:
        settings: of the site.
        agreed: of the federation, as it stands in the site's own folder.
        proxy: fingerprint of the public rows.
    """
    policy, purpose = settings.policy, agreed.privacy.purpose
    mechanism = settings.mechanism or agreed.privacy.mechanism
    if policy.mechanisms and mechanism not in policy.mechanisms:
        wanted = " or ".join(policy.mechanisms)
        return Objection("mechanism", f"this site answers with {wanted}, agreed was {mechanism}")
    if (policy.epsilon or policy.delta) and mechanism not in PRIVATE:
        words = f"this site limits its privacy loss, and with {mechanism} it has no bound"
        return Objection("epsilon", words)
    if policy.purposes and purpose not in policy.purposes:
        words = "this site does not answer for the purpose that was agreed on"
        return Objection("purpose", words)
    if policy.proxies and proxy not in policy.proxies:
        return Objection("proxy", "this site does not answer on these proxy rows")
    return None


def refuse(folder: Path, objection: Objection | None) -> None:
    """Refuse to answer where the policy has something against it, and note it at the site.

    Raises:
        Rejected: ``policy``.
    """
    if objection is None:
        return
    with contextlib.suppress(LedgerError):  # where the log cannot be written it is refused as well
        AuditLog(folder / STATE / audit_log.NAME).append("policy_refused", reason=objection.key)
    raise Rejected("policy", objection.words)


def site_id(folder: Path) -> str:
    """The id of the site whose ``site.toml`` lies in ``folder``."""
    return config.load_site(folder / SITE_FILE).id


def open_site(folder: str | Path, *, cache: bool = False, willing: bool = False) -> Workplace:
    """A real site from its folder. Nothing is written until it answers a round.

    Args:
        folder: where ``site.toml`` lies.
        cache: keep the rows that were read in ``state/cache``, or take them from there.
        willing: only to answer: where the site's policy forbids that, no row of its own is read.

    Raises:
        Rejected: ``policy``, if it has to be willing.
        SettingsError: ``site.toml`` or ``federation.toml`` is wrong, or they do not fit together.
        DataError: rows that cannot be used, or proxy rows that are not the agreed ones.
    """
    folder = Path(folder)
    settings = config.load_site(folder / SITE_FILE)
    agreed = config.load(folder / settings.federation)
    if settings.id not in agreed.deployment.sites:
        known = agreed.deployment.sites
        text = f'"{settings.id}" is no site of the federation{did_you_mean(settings.id, known)}'
        raise SettingsError([Problem("id", text)], str(folder / SITE_FILE))
    _check_mechanism(settings, agreed, folder)
    with contextlib.chdir(folder):
        public = public_rows(agreed)
    if willing:
        refuse(folder, objection_of(settings, agreed, public.proxy.fingerprint))
    with contextlib.chdir(folder):
        rows, test = own_rows(settings, agreed, public, cache=cache)
    training = site_training(settings, agreed)
    shape = public.proxy.inputs.shape[1:]
    client = Client(
        settings.id,
        model_factory(training, shape, len(public.classes)),
        rows,
        test if len(test) else None,
        recipe(training),
        course=incoming(folder, settings, agreed, public, rows),
        make=maker(agreed, settings.id),
    )
    client = privately(client, agreed, settings.mechanism, settings.policy)
    method = method_of(agreed)
    kind = TableSite if method.exchange in EXCHANGES else Site
    site = kind.open(
        client,
        public.proxy,
        public.classes,
        method,
        seed=agreed.seed,
        device=agreed.backend.device,
        limit=int(agreed.backend.max_message_mb * (1 << 20)),
    )
    workplace = Workplace(folder, settings, agreed, site, public)
    site.keep_runs_in(workplace.state / "runs")
    return workplace


def _check_mechanism(settings: SiteSettings, agreed: Settings, folder: Path) -> None:
    """Refuse a mechanism of a site's own that does not fit what the others agreed on.

    A method tells more than predictions (familiarity, which classes) unless all agreed on a private
    mechanism, so one site alone cannot be private; and the others count on each being so.
    """
    own, all_ = settings.mechanism, agreed.privacy.mechanism
    if own in {None, all_} or {own, all_} <= set(PRIVATE):
        return
    text = (
        f"a site may have another private mechanism ({', '.join(PRIVATE)}) than the federation, "
        f'where that is private, found "{own}" beside "{all_}"'
    )
    raise SettingsError([Problem("mechanism", text)], str(folder / SITE_FILE))


def incoming(
    folder: Path, settings: SiteSettings, agreed: Settings, public: Public, rows: Rows
) -> Course | None:
    """The course of a site where rows arrive as files; None where they stay as they are."""
    source = settings.data.arrivals
    if not source:
        return None
    place = folder.absolute()

    def read(one: str) -> Rows:
        with contextlib.chdir(place):
            return public.own(one, own_data(settings, agreed))

    index = place / STATE / "arrivals.json"
    return Incoming(rows, source, place / settings.data.path, index, read)


def site_training(settings: SiteSettings, agreed: Settings) -> TrainSettings:
    """How the site trains: as all clients do, but for what it sets itself."""
    names = [item.name for item in dataclasses.fields(TrainSettings)]
    own = {name: getattr(settings.training, name) for name in names}
    return TrainSettings(
        **{name: getattr(agreed.clients, name) for name in names}
        | {name: value for name, value in own.items() if value is not None}
    )


def own_data(settings: SiteSettings, agreed: Settings) -> DataSettings:
    """How the site's files are read: as agreed, but for what it says itself."""
    own = {
        item.name: getattr(settings.data, item.name)
        for item in dataclasses.fields(OwnDataSettings)
        if item.name != "arrivals" and getattr(settings.data, item.name) is not None
    }
    return dataclasses.replace(agreed.data, **own)


def own_rows(
    settings: SiteSettings, agreed: Settings, public: Public, *, cache: bool = False
) -> tuple[Rows, Rows]:
    """The site's rows to train on and to test on, without those of people who were forgotten.

    Reading a large table takes longer than a step, and every message is served by a new process:
    what was read is kept in ``state/cache``, for as long as the files and settings are unchanged.
    """
    data = own_data(settings, agreed)
    kept = _cache(settings, agreed, public) if cache else None
    found = parts = None if kept is None else _cached(kept)
    if parts is None:
        rows = public.own(data.source, data)
        if data.test:
            parts = rows, public.own(data.test, data)
        else:  # divided first: nobody's rows change sides because another's are left out
            private = (settings.mechanism or agreed.privacy.mechanism) in PRIVATE
            parts = split(rows, data, agreed.seed, settings.id, alone=private)
    train, test = (without_erased(part, Path(STATE)) for part in parts)
    if kept is not None and found is None:
        _remember(kept, train, test)
    return train, test


def _cache(settings: SiteSettings, agreed: Settings, public: Public) -> Path | None:
    """Where the rows of exactly these files and settings are kept; None: not worth it."""
    stamps = []
    for source in (settings.data.source, settings.data.test):
        prefix, _, name = source.partition(":")
        if not source:
            continue
        if prefix != "csv":  # others are quick to read, or name files that no stamp would cover
            return None
        for place in find_files(settings.data.path, name):
            facts = place.stat()
            stamps.append(f"{place}:{facts.st_size}:{facts.st_mtime_ns}")
    told = [version("fedistill"), "record", config.to_toml(settings), config.to_toml(agreed)]
    told += [public.proxy.fingerprint, *stamps]
    digest = hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    return Path(STATE) / "cache" / f"rows-{digest}.npz"


def _cached(path: Path) -> tuple[Rows, Rows] | None:
    try:
        kept = load_arrays(path)
        train, test = (
            Rows(
                kept[f"{part}inputs"],
                kept[f"{part}labels"],
                subject=kept.get(f"{part}subject"),
                record=kept.get(f"{part}record"),
            )
            for part in ("", "test_")
        )
        return train, test
    except (DataError, KeyError, OSError):
        return None


def _remember(path: Path, rows: Rows, test: Rows) -> None:
    """Keep what was read; where that cannot be, it is read again next time."""
    with contextlib.suppress(OSError, RunError):
        store.probe(path.parent)
        path.parent.chmod(0o700)
        for old in path.parent.glob("rows-*.npz"):
            old.unlink(missing_ok=True)
        held = {
            f"{part}{name}": array
            for part, some in (("", rows), ("test_", test))
            for name in ("inputs", "labels", "subject", "record")
            if (array := getattr(some, name)) is not None
        }
        with _private(path) as file:
            np.savez(file, **held)


@contextlib.contextmanager
def _private(path: Path) -> Iterator[BinaryIO]:
    """A file for this user's eyes alone, in place only when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(mode=0o600)
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
