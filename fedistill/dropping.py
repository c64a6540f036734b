"""The coordinator drops what it keeps of a client, because the client has forgotten somebody.

What a server keeps: the combined soft targets of all clients, the last ones as they travel, with a
cache a copy of what each client predicted last, and how far it trusts each. From combined targets
no client can be taken out again, and the copies of the others are of many rounds and without what
their rule weighs them by. So all soft targets are dropped, and the next rounds make them anew:
from the others, and from what the client says by then. Weights that were averaged could not be
made anew at all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedistill import store
from fedistill.errors import RunError, did_you_mean
from fedistill.receipts import Receipt, names, write_receipt
from fedistill.rewriting import newest, read_generations, rewrite
from fedistill.types import State

RESTARTED = "begins anew in the next round"
BOUNDED = "keeps what it learned; what it knows of the client's rows is bounded by epsilon {:.4g}"
UNBOUNDED = "influence NOT bounded: it has learned from soft targets that the client helped to make"
AVERAGE = "influence NOT bounded: weights that were averaged cannot be averaged anew without one"

GENERATIONS = ("latest", "before")
BY_CLIENT = {
    "heard": "last",
    "vigilance": "misses",
    "rule": "clients",
    "student_rule": "clients",
}
"""Facts of a server that are told by client, and under which key."""

OTHERS = "all soft targets were combined from several clients: the next rounds make them anew"
SENT = "what other clients have learned from earlier soft targets is not undone"


def drop_client(
    folder: str | Path, client: str, *, say: Callable[[str], None] = print, restart: bool = False
) -> Receipt:
    """Drop a client's stored predictions, and every soft target that they may be part of.

    The client may go on taking part; it is then as one that was not heard yet.

    Args:
        folder: of the coordinator's run, or of a simulated one.
        client: its id.
        say: is told what was done.
        restart: the server's student begins as it was built.

    Raises:
        RunError: no run, no such client, in use by another process, or it cannot be written.
        CheckpointError: both generations of the checkpoint are damaged.
    """
    folder = Path(folder)
    path = folder / "checkpoint" / "server"
    if not (path.exists() or store.previous(path).exists()):
        raise RunError(
            f"{folder}: expected the folder of a run, with its checkpoint, found none: check the "
            "path; of several seeds, name the folder of one"
        )
    with store.held(folder), store.held(path.parent):
        generations = read_generations(path)
        content = newest(generations)
        assert content is not None
        check_client(client, content[1]["server"])
        receipt = described(client, *content, restart=restart)
        written, removed = rewrite(
            generations, lambda one: without_client(client, *one, restart=restart)
        )
        receipt = replace(receipt, written=names(written, folder), removed=names(removed, folder))
        write_receipt(folder, receipt)
    say(receipt.text())
    return receipt


def check_client(client: str, server: Mapping[str, Any]) -> None:
    """Refuse a name that is nobody's.

    Raises:
        RunError: no client of the run is called so.
    """
    if client not in server["enrolled"]:
        hint = did_you_mean(client, server["enrolled"])
        raise RunError(f'drop: expected a client of the run, found "{client}"{hint}')


def described(client: str, arrays: State, facts: Mapping[str, Any], *, restart: bool) -> Receipt:
    """What dropping the client from this checkpoint comes to."""
    server = facts["server"]
    shelf = arrays.get(f"heard.{client}.round", np.empty(0))
    said = server.get("privacy", {}).get("epsilons", {}).get(client)
    weights = {}
    if any(name.startswith("student.") for name in arrays):
        bound = UNBOUNDED if said is None else BOUNDED.format(said)
        weights["student"] = RESTARTED if restart else bound
    if "common" in arrays and is_average(arrays):
        weights["average"] = RESTARTED if restart else AVERAGE
    return Receipt(
        kind="drop",
        site=client,
        predictions=int((shelf > 0).sum()),
        targets=int((arrays["stamp"] > 0).sum()),
        weights=weights,
        epsilon=said,
        notes=(OTHERS, SENT),
    )


def without_client(
    client: str, arrays: State, facts: Mapping[str, Any], *, restart: bool
) -> tuple[State, dict[str, Any]]:
    """A server's checkpoint as if nothing of the client were known, and nothing were combined.

    What remains are its name, the head of its ledger and its epsilon: they guard the client. Its
    uploads that are still on their way are not let in.

    Args:
        client: its id.
        arrays: of the checkpoint.
        facts: of the checkpoint.
        restart: leave the student (or the average) out, too.
    """
    kept = dict(arrays)
    average = is_average(arrays)
    gone = [
        f"heard.{client}.",
        "targets.",
        "own.",
        *([] if average and not restart else ["common"]),
    ]
    gone += ["student."] if restart else []
    for name in list(kept):
        if name.startswith(tuple(gone)):
            del kept[name]
    blank = ("table", "stamp", *(f"cache.{g}.{p}" for g in GENERATIONS for p in ("codes", "round")))
    kept |= {name: np.zeros_like(kept[name]) for name in blank if name in kept}
    server = {key: value for key, value in facts["server"].items() if key != "targets"}
    if "cache.held" in kept:  # of targets that are no more
        kept["cache.held"] = np.frombuffer(zlib.compress(b"", 1), dtype=np.uint8)
        server["cache"] = {**server["cache"], "clients": []}
    for part, key in BY_CLIENT.items():
        if key in server.get(part, {}):
            server[part] = {**server[part], key: _without(client, server[part][key])}
    server["enrolled"] = {**server["enrolled"], client: None}
    if "late" in server:
        asked = server["late"]["asked"].items()
        told = {number: [name for name in those if name != client] for number, those in asked}
        server["late"] = {**server["late"], "asked": told}
    return kept, {**facts, "server": server}


def is_average(arrays: State) -> bool:
    """Whether the table that all share is an average of weights, as of a server with a student."""
    return "common" in arrays and any(name.startswith("student.") for name in arrays)


def _without(client: str, known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in known.items() if name != client}
