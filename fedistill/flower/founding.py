"""From the settings of an experiment to the folders of a deployment: ``fedistill deploy init``.

Where the settings name a source of private rows, those are dealt to the sites, each part into its
site's folder: then the whole can be rehearsed on one machine, and gives what the simulation
gives. Where they name only public rows and classes, the sites put in rows of their own.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedistill import config, data, deployment
from fedistill.config import DataSettings, DeploymentSettings, Settings, SiteSettings, TrainSettings
from fedistill.data import Federated
from fedistill.data.files import find_file
from fedistill.data.npz import Arrays
from fedistill.errors import DataError, Problem, SettingsError
from fedistill.flower.bundle import SIMULATION
from fedistill.flower.kit import Kit, write_kit
from fedistill.privacy.terms import PRIVATE
from fedistill.settings import (
    CLIENT_ID,
    CLIENT_ID_WORDS,
    OwnDataSettings,
    PolicySettings,
    TrainOverrides,
)
from fedistill.types import ProxySet, Rows

RUNS = 20
"""Runs that a site answers until its administrator says otherwise."""
EXAMPLE = """
seed = 7
rounds = 5
[data]
source = "digits"
test_rows = 360
[proxy]
rows = 400
[clients]
alpha = 1.0
width = 48
epochs = 5
batch_size = 20
[student]
width = 128
batch_size = 20
epochs = 15
"""
"""What is deployed if nothing is named: scikit-learn's digits, dealt to the sites."""


@dataclass(frozen=True, eq=False)
class Parties:
    """What each party of a deployment gets.

    Attributes:
        agreed: the settings that all hold.
        settings: each site's own.
        public: files for everybody.
        coordinator: files for the coordinator.
        own: files for each site.
    """

    agreed: Settings
    settings: Mapping[str, SiteSettings]
    public: Mapping[str, bytes]
    coordinator: Mapping[str, bytes] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)


def write_deployment(
    folder: Path,
    sites: Sequence[str],
    settings: Settings | None = None,
    *,
    host: str = "localhost",
    port: int = 8443,
) -> None:
    """Write the folders of a deployment: one for the coordinator, one for every site.

    Args:
        folder: where to; it must not hold anything yet.
        sites: ids of the sites.
        settings: of the experiment; None: an example on digits.
        host: name or address by which sites reach the coordinator.
        port: that sites reach the coordinator at.

    Raises:
        SettingsError: settings that do not fit real sites.
        DataError: rows that cannot be read or dealt.
        RunError: the folder is not empty.
    """
    _check_ids(sites)
    settings = settings or config.parse(EXAMPLE)
    alike = None if settings.deployment.classes else as_simulation(settings, tuple(sites))
    if alike is None:
        parties = _with_rows_of_their_own(settings, tuple(sites))
    else:
        _check(alike)
        parties = _dealt_to(alike, tuple(sites))
    _check(parties.agreed)
    kit = Kit(
        sites=tuple(sites),
        host=host,
        port=port,
        federation=config.to_toml(parties.agreed, config.comment),
        site_settings={
            site: config.to_toml(own, config.comment) for site, own in parties.settings.items()
        },
        public=parties.public,
        coordinator=parties.coordinator,
        own=parties.own,
        private=parties.agreed.privacy.mechanism in PRIVATE,
    )
    write_kit(folder, kit)
    if alike is not None:
        (folder / SIMULATION).write_text(config.to_toml(alike))


def _dealt_to(alike: Settings, sites: tuple[str, ...]) -> Parties:
    """The rows of an experiment, dealt to the sites as to its clients."""
    if alike.privacy.unit == "user" and alike.privacy.mechanism in PRIVATE:
        text = (
            "rows that are dealt out are numbers without names, so no user can be told from "
            "another: rehearse with records, or name the classes and give each site a file"
        )
        raise SettingsError([Problem("privacy.unit", text)])
    dealt = data.prepare(alike.data, alike.proxy, alike.clients, alike.seed)
    if set(dealt.parts) != set(sites):
        known = ", ".join(dealt.parts)
        text = f"expected the sites that the data has ({known}), found {', '.join(sites)}"
        raise SettingsError([Problem("--sites", text)])
    return Parties(
        agreed=_agree(alike, dealt),
        settings={site: _site(site, alike, dealt) for site in sites},
        public={"proxy.npz": archive({"inputs": dealt.dataset.public.inputs})},
        coordinator=_labelled("test.npz", dealt.dataset.test),
        own={
            site: _labelled("rows.npz", dealt.parts[site])
            | _labelled("own-test.npz", dealt.tests.get(site))
            for site in sites
        },
    )


def _with_rows_of_their_own(settings: Settings, sites: tuple[str, ...]) -> Parties:
    """Public rows for all; the sites put in their own."""
    agreed, public = _agree_on_files(settings, sites)
    kind = agreed.proxy.path.partition(":")[0]
    # No file of this name is there: a site that forgets to name its rows is told so.
    rows = OwnDataSettings(source=f"{kind}:rows.{kind}")
    own = {site: SiteSettings(id=site, data=rows, policy=_policy(agreed)) for site in sites}
    return Parties(agreed, own, public)


def _policy(agreed: Settings) -> PolicySettings:
    """Limits to start from: as many rounds as were agreed on, and as many again; some runs.

    Where a private mechanism was agreed on, a site holds the others to it, and to its purpose.
    """
    limits = PolicySettings(runs=RUNS, rounds=2 * agreed.rounds)
    how = agreed.privacy
    if how.mechanism not in PRIVATE:
        return limits
    purposes = (how.purpose,) if how.purpose else ()
    return dataclasses.replace(limits, mechanisms=PRIVATE, epsilon=how.epsilon, purposes=purposes)


def _check(agreed: Settings) -> None:
    """Read the settings as every party will; nobody has seen them yet, so lines would mislead."""
    try:
        config.parse(config.to_toml(agreed))
    except SettingsError as wrong:
        raise SettingsError([Problem(each.key, each.text) for each in wrong.problems]) from None


def _check_ids(sites: Sequence[str]) -> None:
    """Refuse ids that could not be names of folders, before anything is made of them."""
    problems = [
        Problem("--sites", f"{CLIENT_ID_WORDS}, found {site[:64]!r}")
        for site in sites
        if not re.fullmatch(CLIENT_ID, site)
    ]
    if not sites:
        problems.append(Problem("--sites", "expected ids with commas between, as in a,b,c"))
    if len(set(sites)) < len(sites):
        problems.append(Problem("--sites", "expected ids that differ, found one twice"))
    if problems:
        raise SettingsError(problems)


def as_simulation(settings: Settings, sites: tuple[str, ...]) -> Settings:
    """The experiment with these sites as its clients, and nothing beside it."""
    clients = dataclasses.replace(settings.clients, quorum=min(settings.clients.quorum, len(sites)))
    if clients.partition != "by-column":
        clients = dataclasses.replace(clients, count=len(sites), names=sites)
    return dataclasses.replace(
        settings,
        clients=clients,
        backend=dataclasses.replace(settings.backend, name="serial"),
        evaluation=config.EvaluationSettings(),
    )


def _agree(alike: Settings, dealt: Federated) -> Settings:
    """What all parties hold: everything but who holds which rows."""
    proxy = dealt.dataset.public.inputs
    fingerprint = ProxySet(proxy).fingerprint
    test = "npz:test.npz" if len(dealt.dataset.test) else ""
    return _real(
        alike,
        tuple(dealt.parts),
        DataSettings(source="", path=".", test=test, test_rows=0, scale="none"),
        dataclasses.replace(alike.proxy, path="npz:proxy.npz", rows=len(proxy)),
        DeploymentSettings(classes=dealt.dataset.classes, proxy_sha256=fingerprint),
    )


def _agree_on_files(
    settings: Settings, sites: tuple[str, ...]
) -> tuple[Settings, Mapping[str, bytes]]:
    """What all parties hold where the public rows are a file of their own."""
    prefix, _, name = settings.proxy.path.partition(":")
    if prefix not in {"csv", "npz", "parquet"} or "#" in name:
        text = f'expected csv:, npz: or parquet: and one file, found "{settings.proxy.path}"'
        raise SettingsError([Problem("proxy.path", text)])
    public = deployment.public_rows(settings)
    file = find_file(settings.data.path, name)
    agreed = _real(
        settings,
        sites,
        dataclasses.replace(settings.data, source="", test="", path="."),
        dataclasses.replace(settings.proxy, path=f"{prefix}:{file.name}"),
        dataclasses.replace(settings.deployment, proxy_sha256=public.proxy.fingerprint),
    )
    try:
        return agreed, {file.name: file.read_bytes()}
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None


def _real(
    settings: Settings,
    sites: tuple[str, ...],
    data: DataSettings,
    proxy: config.ProxySettings,
    agreed: DeploymentSettings,
) -> Settings:
    clients = settings.clients
    return dataclasses.replace(
        settings,
        data=data,
        proxy=proxy,
        clients=config.ClientsSettings(
            **{
                item.name: getattr(clients, item.name) for item in dataclasses.fields(TrainSettings)
            },
            count=len(sites),
            participation=clients.participation,
            quorum=min(clients.quorum, len(sites)),
            partition="iid",
        ),
        backend=dataclasses.replace(settings.backend, name="flower"),
        evaluation=config.EvaluationSettings(),
        deployment=dataclasses.replace(agreed, sites=sites),
    )


def _site(site: str, alike: Settings, dealt: Federated) -> SiteSettings:
    """A site's own settings: the files that were dealt to it, and what its model has of its own."""
    own = config.client_settings(alike.clients, list(dealt.parts))[site]
    common = config.client_settings(dataclasses.replace(alike.clients, group=()), [site])[site]
    changed = {
        item.name: getattr(own, item.name)
        for item in dataclasses.fields(TrainSettings)
        if getattr(own, item.name) != getattr(common, item.name)
    }
    tests = dealt.tests.get(site)
    return SiteSettings(
        id=site,
        data=OwnDataSettings(
            source="npz:rows.npz" if len(dealt.parts[site]) else "",
            test="npz:own-test.npz" if tests is not None and len(tests) else "",
            test_rows=0,
        ),
        mechanism=config.group_value(alike.clients, list(dealt.parts), "mechanism").get(site),
        training=TrainOverrides(**changed),
        policy=_policy(alike),
    )


def _labelled(name: str, rows: Rows | None) -> dict[str, bytes]:
    """Labelled rows as a file of this name; nothing where there are none."""
    if rows is None or not len(rows):
        return {}
    return {name: archive({"inputs": rows.inputs, "labels": rows.labels})}


def archive(arrays: Arrays) -> bytes:
    """Arrays as the bytes of an npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
