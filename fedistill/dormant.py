"""Many clients: the sites of a federation, of which only some are in memory.

A site is opened when it is asked for. It sleeps when others are needed: one that never took part
leaves nothing behind, for its first state comes from the seed; any other is dropped once its state
is safe, in its own file where the run has a folder and that file holds all of it, else in a
:class:`fedistill.state_store.StateStore`. Woken, it goes on to the bit.

Whoever only wants to know how a site stands (:func:`standing`), or what kinds of sites there are
(:func:`by_kind`), wakes none, or one of each kind. These functions take plain mappings, too.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fedistill import store
from fedistill.client import Client, Site
from fedistill.errors import CheckpointError, DataError
from fedistill.kept import state_path
from fedistill.newcomer import observations
from fedistill.privacy.account import Account
from fedistill.state_store import StateStore
from fedistill.types import ProxySet, State

MANY = 1000
"""A federation of more clients lets sites sleep, and measures those that a round asks."""
AWAKE = 100
"""Sites that are awake at once in such a federation."""


class Standing(Protocol):
    """How a site stands, awake or not: attributes of :class:`fedistill.client.Site`."""

    @property
    def run(self) -> str:
        """The run that it takes part in; empty: in none yet."""

    @property
    def round(self) -> int:
        """The last round that it answered."""

    @property
    def clipped(self) -> int:
        """Rows that were clipped in that round."""

    @property
    def refusal(self) -> object:
        """Why it sent nothing in that round; None: it did."""

    @property
    def exhausted(self) -> bool:
        """Whether its privacy budget is spent."""


@dataclass(frozen=True)
class Asleep:
    """What is known of a site that sleeps.

    Attributes:
        path: the file that holds its state; None: it rests in the store.
        account: its privacy account, which stays.
    """

    run: str = ""
    round: int = 0
    clipped: int = 0
    refusal: object = None
    exhausted: bool = False
    path: Path | None = None
    account: Account | None = None


UNTOUCHED = Asleep()
"""How a site stands that never took part."""


class Dormant(Mapping[str, Site]):
    """Sites by client id, opened when they are asked for.

    The last ``awake`` sites asked for are in memory. A site that is held longer is a copy of what
    the client was: whoever works on several at a time says so first (:meth:`at_least`).

    Args:
        clients: who takes part, by id.
        open_site: from a client and the run folder to its site, untaught.
        folder: the run folder, or None.
        awake: how many sites are in memory, at least one.
        rest: where the states of the others are, as far as they are not in the folder.
        begin: what is done with a site that is opened for the first time, or was never touched.
    """

    def __init__(
        self,
        clients: Mapping[str, Client],
        open_site: Callable[[Client, Path | None], Site],
        folder: Path | None,
        *,
        awake: int,
        rest: StateStore,
        begin: Callable[[Site], object] = lambda site: None,
    ) -> None:
        self.clients = dict(clients)
        self.folder = folder
        self.awake = awake
        self.rest = rest
        self._open = open_site
        self._begin = begin
        self._awake: OrderedDict[str, Site] = OrderedDict()
        self._asleep: dict[str, Asleep] = {}

    def __getitem__(self, name: str) -> Site:
        """The site of a client, awake."""
        if name in self._awake:
            self._awake.move_to_end(name)
            return self._awake[name]
        client = self.clients[name]
        self._make_room()
        site = self._awake[name] = self._wake(client)
        return site

    def __iter__(self) -> Iterator[str]:
        """Ids of all clients."""
        return iter(self.clients)

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self.clients)

    def __contains__(self, name: object) -> bool:
        """Whether there is a client of this id."""
        return name in self.clients

    def at_least(self, count: int) -> None:
        """Keep no fewer sites awake than this: so many are worked on at a time."""
        self.awake = max(self.awake, count)

    def settle(self, clients: Iterable[Client], folder: Path | None) -> None:
        """From now on with these clients, the same by id, and their states under this folder."""
        self.clients = {client.id: client for client in clients}
        self.folder = folder
        for site in self._awake.values():
            site.keep_in(folder)

    def standing(self, name: str) -> Standing:
        """How a site stands, without waking it."""
        return self._awake.get(name) or self._asleep.get(name, UNTOUCHED)

    def untouched(self, name: str) -> bool:
        """Whether a site, if it was opened at all, is as its client and the seed make it."""
        if name in self._awake:
            return not self._awake[name].touched
        return name not in self._asleep

    def rests_in(self, name: str, folder: Path | None) -> bool:
        """Whether a site sleeps, and its file in this run folder holds all of its state."""
        path = self._asleep.get(name, UNTOUCHED).path
        return path is not None and folder is not None and path == state_path(folder, name)

    def leave_files(self) -> None:
        """Rely on no file any more: what sleeps in one rests in the store.

        Raises:
            CheckpointError: a file is damaged or gone, or another was put there.
        """
        for site in self._awake.values():
            site.saved = None
        for name, was in self._asleep.items():
            if was.path is not None:
                self.rest.put(name, store.state_bytes(*_read(was.path, was)))
                self._asleep[name] = replace(was, path=None)

    def accounts(self) -> Iterator[Account]:
        """The privacy accounts of sites that were opened."""
        opened: list[Site | Asleep] = [*self._awake.values(), *self._asleep.values()]
        yield from (site.account for site in opened if site.account is not None)

    def _make_room(self) -> None:
        while len(self._awake) >= self.awake:
            name, site = next(iter(self._awake.items()))
            self._lay_down(name, site)
            del self._awake[name]

    def _lay_down(self, name: str, site: Site) -> None:
        """Keep what a site is, as far as that does not follow from its client."""
        if not site.touched:
            return
        path = site.path if site.saved == (site.path, site.facts()) else None
        if path is None:
            self.rest.put(name, store.state_bytes(*site.packed()))
        else:
            self.rest.drop(name)
        if site.account is not None and site.account.folder is not None:
            site.account.ledger.close()  # a file for each of ten thousand would be too many
        self._asleep[name] = Asleep(
            site.run,
            site.round,
            site.clipped,
            site.refusal,
            site.exhausted,
            path,
            site.account,
        )

    def _wake(self, client: Client) -> Site:
        site = self._open(client, self.folder)
        was = self._asleep.get(client.id)
        if was is None:
            self._begin(site)
            site.touched = False
            return site
        account = site.account
        if account and was.account and account.folder == was.account.folder:
            site.account = was.account
        if was.path is None:
            site.unpack(*store.read_state_bytes(self.rest.get(client.id), f"{client.id}, asleep,"))
        else:
            site.unpack(*_read(was.path, was))
            site.saved = (site.path, site.facts()) if site.path == was.path else None
        site.exhausted, site.touched = was.exhausted, True
        del self._asleep[client.id]
        return site


def _read(path: Path, was: Asleep) -> tuple[State, dict[str, Any]]:
    """A state from its own file; a newer one than was left there is of a process at work on it.

    Raises:
        CheckpointError: it is damaged or gone, or an older one was put there, or another run's.
    """
    found = "none"
    with contextlib.suppress(FileNotFoundError):
        arrays, facts, note = store.load_state(path)
        of_this = was.run in {"", facts["run"]}
        if not note and of_this and facts["round"] >= was.round:
            return arrays, facts
        found = note or f"that of round {facts['round']}{'' if of_this else ' of another run'}"
    raise CheckpointError(
        f"{path}: expected the state of round {was.round}, found {found}: keep others away from "
        "the run folder, then --resume"
    )


# --- of any mapping of sites ---------------------------------------------------------------------


def most_awake(asked: int | None, clients: int) -> int:
    """Sites in memory at once, of so many clients; 0: all of them.

    Args:
        asked: the setting ``backend.awake``; None: not set.
        clients: how many take part.

    Raises:
        DataError: a negative number was asked.

    >>> most_awake(None, 1000), most_awake(None, 10_000), most_awake(8, 20), most_awake(8, 8)
    (0, 100, 8, 0)
    """
    if asked is not None and asked < 0:
        raise DataError(f"awake: expected 0 (all) or how many sites are awake, found {asked}")
    most = (AWAKE if clients > MANY else 0) if asked is None else asked
    return most if most < clients else 0


def standing(sites: Mapping[str, Site], name: str) -> Standing:
    """How a site stands; one that sleeps is not woken."""
    return sites.standing(name) if isinstance(sites, Dormant) else sites[name]


def client_of(sites: Mapping[str, Site], name: str) -> Client:
    """Whose site it is; one that sleeps is not woken."""
    return sites.clients[name] if isinstance(sites, Dormant) else sites[name].client


def by_kind(sites: Mapping[str, Site]) -> Iterator[tuple[Sequence[str], Site]]:
    """Clients whose sites are of one kind, and the site of the first of them.

    Those in memory are taken one by one. Of others only one of a kind is woken: clients are of one
    kind that have equal factories, train alike, and are private, bad or in a stream all of them.
    """
    if not isinstance(sites, Dormant):
        yield from (([name], site) for name, site in sites.items())
        return
    kinds: dict[Hashable, list[str]] = {}
    for name, client in sites.clients.items():
        kinds.setdefault(_kind(client), []).append(name)
    for names in kinds.values():
        yield names, sites[names[0]]


def remarks(sites: Dormant, proxy: ProxySet, classes: int) -> Iterator[str]:
    """What a user should know of the clients: the notes of their sites, but one of a kind woken."""
    own: dict[str, list[str]] = {}
    for names, site in by_kind(sites):
        own |= dict.fromkeys(names, getattr(site.learner, "notes", []))
    for name, client in sites.clients.items():
        yield from observations(client, proxy, classes)
        yield from (f"{name}: {note}" for note in own[name])


def settle(sites: Mapping[str, Site], clients: Iterable[Client], folder: Path | None) -> None:
    """Keep all states under this folder from now on; of those who sleep, the clients may be new."""
    if isinstance(sites, Dormant):
        sites.settle(clients, folder)
    else:
        for site in sites.values():
            site.keep_in(folder)


def leave_files(sites: Mapping[str, Site]) -> None:
    """Before files of states are taken away: what sleeps in one is kept elsewhere."""
    if isinstance(sites, Dormant):
        sites.leave_files()


def with_files(sites: Mapping[str, Site], folder: Path | None) -> Iterator[Site]:
    """The sites whose states a run folder may hold: of those that sleep, with a file in it."""
    for name in sites:
        path = None if folder is None else state_path(folder, name)
        if not isinstance(sites, Dormant) or (
            path is not None and (path.exists() or store.previous(path).exists())
        ):
            yield sites[name]


def accounts(sites: Mapping[str, Site]) -> Iterator[Account]:
    """The privacy accounts there are; a site that was never opened has its client's terms."""
    if isinstance(sites, Dormant):
        yield from sites.accounts()
    else:
        yield from (site.account for site in sites.values() if site.account is not None)


def _kind(client: Client) -> Hashable:
    """What clients must have in common to be of one kind."""
    return (
        _factory(client.build),
        client.training,
        _maker(client.make),
        getattr(client.wrap, "func", client.wrap),
        client.course is None,
        client.mechanism,
        None if client.terms is None else client.terms.mechanism,
    )


def _maker(make: Callable[..., Any] | None) -> Hashable:
    """What makes a learner, but for whole numbers: seeds, of which each client has its own."""
    if not isinstance(make, partial):
        return make
    told = {name: value for name, value in make.keywords.items() if type(value) is not int}
    return _factory(partial(make.func, *(v for v in make.args if type(v) is not int), **told))


def _factory(build: Callable[..., Any]) -> Hashable:
    """A factory by what it makes; two that are not ``partial`` of one thing are two."""
    found: Any = build
    if isinstance(build, partial):
        found = build.func, build.args, tuple(sorted(build.keywords.items()))
    try:
        hash(found)
    except TypeError:
        return id(build)
    return found  # type: ignore[no-any-return]
