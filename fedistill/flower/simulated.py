"""A site of a simulation on Flower's engine: rebuilt from the run folder in whatever worker.

The engine hands a message to any worker process; all of them, and the server, see one disk.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedistill import config, data
from fedistill.assembly import assemble, method_of
from fedistill.client import Site
from fedistill.errors import FedistillError, RunError
from fedistill.federation import Federation
from fedistill.flower.work import answer_from_disk
from fedistill.models import threads as computing


@functools.lru_cache(maxsize=2)
def federation(home: str) -> Federation:
    """The federation whose run folder is ``home``, as its settings describe it."""
    settings = config.load(Path(home) / "config.toml")
    federated = data.prepare(settings.data, settings.proxy, settings.clients, settings.seed)
    return assemble(settings, federated, method_of(settings))


def site_id(home: str, node: Mapping[str, Any]) -> str:
    """The id of the client that a node of the engine plays.

    Raises:
        RunError: the engine has more nodes than the settings have clients.
    """
    ids = [client.id for client in federation(home).clients]
    number = int(node["partition-id"])
    if number >= len(ids):
        raise RunError(f"expected {len(ids)} nodes, found one with the number {number}")
    return ids[number]


def answering(home: str, node: Mapping[str, Any]) -> Callable[[bytes], bytes]:
    """What answers a message for the client that a node plays."""
    site = _site(home, site_id(home, node))
    threads = config.load(Path(home) / "config.toml").backend.threads

    def answer(message: bytes) -> bytes:
        try:
            with computing(threads):
                return answer_from_disk(site, message)
        except FedistillError:
            raise
        except Exception:
            # In a simulation the one who wrote the model is looking: show where it broke.
            traceback.print_exc()
            raise

    return answer


@functools.lru_cache(maxsize=64)
def _site(home: str, name: str) -> Site:
    """One client at work, with its state under ``home``."""
    ours = federation(home)
    client = next(client for client in ours.clients if client.id == name)
    return ours.site(client, Path(home))
