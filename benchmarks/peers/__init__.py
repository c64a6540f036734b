"""Other simulators on the same round; each is optional.

Each module has an engine for `fd_round.py`: the round as that project's own documentation would
have it written, with no engine of this package in it. Where a project visits each client once a
round, the round is distil, train, predict: the same work with the border between rounds moved, and
one visit in place of two, to its advantage.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

from task import Engine

NEEDS = {
    "flower": ("ray", "Flower's simulation engine is not installed: pip install flwr[simulation]"),
    "blazefl": ("blazefl", "BlazeFL is not installed: see peers/blaze.py"),
}
"""What each imports, and what to say where that is not there."""


def absent(name: str) -> str:
    """Why an engine cannot run here; empty if it can."""
    package, why = NEEDS.get(name, ("", ""))
    return why if package and find_spec(package) is None else ""


def engines(model: str, clients: int, batch: int, workers: int) -> dict[str, Engine]:
    """All by name; the projects themselves are imported in the engine's process."""
    return {
        "flower": partial(_flower, model, clients, batch, workers),
        "blazefl": partial(_blazefl, workers),
    }


def _flower(*arguments):
    from peers.flower_ray import flower

    return flower(*arguments)


def _blazefl(*arguments):
    from peers.blaze import blazefl

    return blazefl(*arguments)
