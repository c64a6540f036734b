"""Which node is which site.

Flower knows nodes by numbers. Over a real network a site is whoever holds its private key: the
number may change, the key may not, and nobody else can answer under its id. In a simulation
there are no keys, and nodes are asked who they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.serverapp import Grid

from fedistill.errors import Rejected, RunError
from fedistill.flower import convert

Roster = Callable[[Grid], Mapping[str, int]]
"""The sites that are online now, with the node of each."""


def by_key(folder: Path, sites: tuple[str, ...]) -> Roster:
    """Sites known by their public keys, ``folder/ID.pub``.

    Raises:
        RunError: a site has no readable key, or two sites have the same.
    """
    owners: dict[bytes, str] = {}
    for site in sites:
        key = read_key(folder / f"{site}.pub")
        if key in owners:
            raise RunError(
                f"{folder}: sites {owners[key]} and {site} have the same key: every site needs "
                "its own (ssh-keygen -t ecdsa -b 256)"
            )
        owners[key] = site

    def online(grid: Grid) -> Mapping[str, int]:
        found = {owners.get(bytes(node.public_key)): node.node_id for node in grid.get_nodes()}
        return {site: node for site, node in found.items() if site is not None}

    return online


def read_key(path: Path) -> bytes:
    """A public key in the form in which Flower reports that of a node."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_ssh_public_key,
    )

    try:
        key = load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise RunError(
            f"{path}: expected a site's public key (ecdsa, OpenSSH format), found none: ask the "
            "site for the file node.key.pub"
        )
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def by_asking(
    sites: tuple[str, ...],
    *,
    patience: float = 60.0,
    pause: float = 0.1,
    extra: Mapping[str, str] | None = None,
) -> Roster:
    """Nodes that say themselves who they are: for simulations, where nobody can pretend.

    The first node that claims a site keeps it for as long as it is online.

    Args:
        sites: ids that exist; a node that claims another is left out.
        patience: seconds that a node has to say who it is.
        pause: seconds between two looks.
        extra: texts that go with the question, for client apps that need them.
    """
    known: dict[int, str] = {}

    def ask(grid: Grid, nodes: set[int]) -> None:
        asked = [
            convert.request(convert.WHO, node, dict(extra or {}), group="who", ttl=patience)
            for node in nodes
        ]
        grid.push_messages(asked)
        waiting = {m.metadata.message_id: m.metadata.dst_node_id for m in asked}
        end = time.monotonic() + patience
        while waiting and time.monotonic() < end:
            for answer in grid.pull_messages(list(waiting)):
                node = waiting.pop(answer.metadata.reply_to_message_id, None)
                if node is None or answer.has_error():
                    continue
                try:
                    known[node] = convert.text_of(answer, "site")
                except Rejected:
                    known[node] = ""
            if waiting:
                time.sleep(pause)

    def online(grid: Grid) -> Mapping[str, int]:
        nodes = set(grid.get_node_ids())
        for gone in set(known) - nodes:
            del known[gone]
        if strangers := nodes - set(known):
            ask(grid, strangers)
        found: dict[str, int] = {}
        for node, site in known.items():  # in the order of meeting: the first one keeps the name
            if site in sites:
                found.setdefault(site, node)
        return found

    return online
