"""The files of a deployment: one folder for the coordinator, one for every site.

``write_kit`` is what ``fedistill deploy init`` calls. Everything it writes can be read: settings,
keys, and a few shell scripts and service files that start Flower's own programs. What each party
gets is decided in three lists, one function each: :func:`_authority`, :func:`_coordinator` and
:func:`_site`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedistill import __version__
from fedistill.errors import RunError
from fedistill.flower import bundle
from fedistill.flower.kit import keys
from fedistill.settings import CLIENT_ID, CLIENT_ID_WORDS

FLWR = "1.41.0"
"""The version of flwr that a container installs and the notes name."""
OTHER_APPS = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")
"""What else a SuperNode of flwr 1.41 would start if the coordinator asked; a site starts none."""
FLEET = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-fab",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
)
"""What nginx passes: all that a SuperNode of flwr 1.41 with a registered key asks the Fleet API."""
HOST = r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
FILE = r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)+"


@dataclass(frozen=True)
class Kit:
    """What goes into the folders of a deployment.

    Args:
        sites: ids of the sites.
        host: DNS name or IP address by which the sites reach the coordinator.
        port: TCP port for it.
        federation: the text of ``federation.toml``, the same for everybody.
        site_settings: the text of ``site.toml``, for every site.
        public: files for everybody, such as the proxy set.
        coordinator: files for the coordinator alone.
        own: files of single sites.
        private: whether all agreed on a private mechanism.
        inner: port of the SuperLink itself, on the coordinator's loopback only.
    """

    sites: tuple[str, ...]
    host: str
    port: int
    federation: str
    site_settings: Mapping[str, str]
    public: Mapping[str, bytes] = field(default_factory=dict)
    coordinator: Mapping[str, bytes] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    private: bool = False
    inner: int = 9091

    @property
    def address(self) -> str:
        """Host and port as a client writes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Item:
    """One file of a kit."""

    content: bytes
    mode: int = 0o644


Items = dict[str, Item]
"""Path below the folder of the kit, to what stands there."""


def write_kit(folder: Path, kit: Kit) -> None:
    """Write the folders of a deployment, with fresh keys.

    Args:
        folder: where to; absent or empty.
        kit: what to write.

    Raises:
        RunError: the folder is not empty, cannot be written, or the kit contradicts itself.
    """
    _check(kit)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "a folder that is not empty" if folder.is_dir() else "a file"
        raise RunError(
            f"expected a new or empty folder for the deployment, found {what}, {folder}: name "
            "another one, or move this one away (it may hold the only copy of its keys)"
        )
    items = _items(kit)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        for path, item in items.items():
            _write(folder, path, item)
    except BaseException as error:
        # Half a kit must not be sent to anybody; the folder was empty, so all in it is ours.
        for child in folder.iterdir() if folder.is_dir() else ():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(
                f"expected to write the deployment to {folder}, found {error.strerror}: make "
                "room, or name a folder that may be written to"
            ) from None
        raise


def _write(folder: Path, path: str, item: Item) -> None:
    """Write one file of a new folder; no moment in which a secret is readable by others."""
    target = folder / path
    for parent in reversed(Path(path).parents[:-1]):
        made = folder / parent
        if not made.exists():
            made.mkdir()
            made.chmod(0o700)
    if path.endswith("/"):
        if not target.exists():
            target.mkdir()
        target.chmod(item.mode)
        return
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(item.content)
    target.chmod(item.mode)


def _items(kit: Kit) -> Items:
    """Every file of the kit."""
    ca = keys.authority("fedistill federation")
    nodes = {site: keys.node_key() for site in kit.sites}
    facts: dict[str, Any] = {
        "address": kit.address,
        "days": keys.SERVER_DAYS,
        "digests": {name: hashlib.sha256(data).hexdigest() for name, data in kit.public.items()},
        "fedistill": __version__,
        "fingerprint": keys.fingerprint(ca[1]),
        "fleet": FLEET,
        "flwr": FLWR,
        "host": kit.host,
        "inner": kit.inner,
        "ipv6": ":" in kit.host,
        "names": ",".join(
            f"{'IP' if _is_address(name) else 'DNS'}:{name}"
            for name in dict.fromkeys([kit.host, *keys.LOOPBACK])
        ),
        "other_apps": OTHER_APPS,
        "port": kit.port,
        "private": kit.private,
        "sites": kit.sites,
    }
    common = _joined(
        {
            "ca.crt": Item(keys.certificate_pem(ca[1])),
            "federation.toml": Item(kit.federation.encode()),
        },
        {name: Item(data) for name, data in kit.public.items()},
    )
    folders = {
        "": {"README.md": _filled("kit.md", facts)},
        "authority/": _authority(ca, facts),
        "coordinator/": _joined(common, *_coordinator(kit, ca, nodes, facts)),
    } | {
        f"sites/{site}/": _joined(common, *_site(kit, site, nodes[site], facts | {"site": site}))
        for site in kit.sites
    }
    return {place + name: item for place, held in folders.items() for name, item in held.items()}


def _authority(ca: keys.Authority, facts: Mapping[str, Any]) -> Items:
    """What is kept offline."""
    return {
        "ca.crt": Item(keys.certificate_pem(ca[1])),
        "ca.key": Item(keys.key_pem(ca[0]), 0o600),
        "renew.sh": _filled("renew.sh", facts),
    }


def _coordinator(
    kit: Kit,
    ca: keys.Authority,
    nodes: Mapping[str, tuple[bytes, bytes]],
    facts: Mapping[str, Any],
) -> tuple[Items, Items]:
    """What only the coordinator holds, ours and given; of the sites, public keys alone."""
    server = keys.server_certificate(ca, [kit.host], keys.SERVER_DAYS)
    written = {
        ".dockerignore": "dockerignore",
        "Dockerfile": "Dockerfile",
        "README.md": "coordinator.md",
        "compose.yaml": "coordinator.yaml",
        "fedistill-nginx.service": "nginx.service",
        "fedistill-status.service": "status.service",
        "fedistill-superlink.service": "superlink.service",
        "nginx.conf": "nginx.conf",
        "register-sites.sh": "register-sites.sh",
        "run.sh": "run.sh",
        "start-nginx.sh": "start-nginx.sh",
        "start-superlink.sh": "start-superlink.sh",
    }
    ours = {
        **{name: _filled(template, facts) for name, template in written.items()},
        **{f"app/{name}": Item(text.encode()) for name, text in bundle.APP.items()},
        "server.crt": Item(keys.certificate_pem(server[1])),
        "server.key": Item(keys.key_pem(server[0]), 0o600),
        **{f"sites/{site}.pub": Item(public) for site, (_, public) in nodes.items()},
        **{place: Item(b"", 0o700) for place in ("flower/", "logs/", "state/")},
        "wheels/.keep": Item(b""),
    }
    return ours, {name: Item(data, 0o600) for name, data in kit.coordinator.items()}


def _site(
    kit: Kit, site: str, key: tuple[bytes, bytes], facts: dict[str, Any]
) -> tuple[Items, Items]:
    """What one site holds, ours and given; nothing of any other."""
    written = {
        ".dockerignore": "dockerignore",
        "Dockerfile": "Dockerfile",
        "README.md": "site.md",
        "bin/flwr-clientapp": "flwr-clientapp.sh",
        "compose.yaml": "site.yaml",
        "fedistill-site.service": "site.service",
        "start.sh": "start-site.sh",
    }
    ours = {
        **{name: _filled(template, facts) for name, template in written.items()},
        **{f"bin/{name}": _filled("refuse.sh", facts | {"name": name}) for name in OTHER_APPS},
        "node.key": Item(key[0], 0o600),
        "node.key.pub": Item(key[1]),
        "site.toml": Item(kit.site_settings[site].encode()),
        "state/": Item(b"", 0o700),
        "wheels/.keep": Item(b""),
    }
    return ours, {name: Item(data, 0o600) for name, data in kit.own.get(site, {}).items()}


def _joined(*parts: Items) -> Items:
    """All files of one folder, none of which may replace another."""
    joined: Items = {}
    for part in parts:
        for name, item in part.items():
            # On some file systems capitals make no difference.
            if name.casefold() in {taken.casefold() for taken in joined}:
                raise RunError(
                    f"expected every file of a folder to have a name of its own, found {name!r} "
                    "twice: rename yours"
                )
            joined[name] = item
    return joined


def _filled(template: str, facts: Mapping[str, Any]) -> Item:
    """A template of this package with its values; one that begins with ``#!`` can be executed."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    place = files(__package__) / "templates"
    environment = Environment(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: (place / f"{name}.j2").read_text("utf-8")),
    )
    text = environment.get_template(template).render(facts)
    return Item(text.encode(), 0o755 if text.startswith("#!") else 0o644)


def _check(kit: Kit) -> None:
    """Refuse a kit whose parts contradict one another, or that could not be started."""
    for problem in _problems(kit):
        raise RunError(problem)


def _problems(kit: Kit) -> Iterator[str]:
    if not kit.sites:
        yield "expected at least one site, found none: name them, as in --sites a,b,c"
    for site in kit.sites:
        if not re.fullmatch(CLIENT_ID, site):
            yield f"{CLIENT_ID_WORDS}, found {site[:64]!r}: rename the site"
    if len({site.casefold() for site in kit.sites}) < len(kit.sites):
        yield (
            f"expected sites that differ in more than capitals, found {', '.join(kit.sites)}: "
            "rename one, for each becomes a folder"
        )
    if not _is_host(kit.host):
        yield (
            "expected the DNS name or the IP address of the coordinator, "
            f"found {kit.host[:64]!r}: name one that the sites can reach, without a port"
        )
    for port in (kit.port, kit.inner):
        if not 0 < port < 65536:
            yield f"expected a TCP port from 1 to 65535, found {port}: name another"
    if kit.port == kit.inner:
        yield (
            f"expected two ports, one for the sites and one for the SuperLink on the loopback, "
            f"found {kit.port} twice: name another"
        )
    if set(kit.site_settings) != set(kit.sites):
        yield (
            f"expected settings for the sites {', '.join(sorted(kit.sites))}, found settings for "
            f"{', '.join(sorted(kit.site_settings)) or 'none'}: give each site its own"
        )
    if strangers := sorted(set(kit.own) - set(kit.sites)):
        yield (
            f"expected files of the sites {', '.join(sorted(kit.sites))}, found files of "
            f"{', '.join(strangers)}: add the site, or leave its files out"
        )
    for names in (kit.public, kit.coordinator, *kit.own.values()):
        for name in names:
            if not re.fullmatch(FILE, name):
                yield f"expected a plain file name such as rows.npz, found {name!r}: rename it"


def _is_host(host: str) -> bool:
    if _is_address(host):
        return "%" not in host  # the scope of an address means something on one machine only
    return len(host) <= 253 and re.fullmatch(HOST, host) is not None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
