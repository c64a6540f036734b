"""Tiny federations on made-up rows, and the means to break them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedistill import models
from fedistill.backends import Reply
from fedistill.backends.serial import Serial
from fedistill.client import Client, Site
from fedistill.distill.recipe import Recipe
from fedistill.federation import Federation
from fedistill.presets import Method
from fedistill.presets import method as preset
from fedistill.server import Server
from fedistill.types import ProxySet, Rows, fingerprint_classes
from fedistill.wire.codec import pack
from fedistill.wire.delta import delta_encode, quantise
from fedistill.wire.envelope import CHECKSUM, VERSION, seal, unseal
from fedistill.wire.messages import Failure, Plan, Upload, bucket

torch.set_num_threads(1)

CLASSES = ("a", "b", "c")
INPUTS = 4
LIMIT = 64 << 20
CENTRES = np.array([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]], dtype=np.float32)

Change = Callable[[str, bytes, Plan], "Iterable[Reply | Failure] | Reply | Failure"]


def gaussian(count: int, seed: int, labels: Iterable[int] = (0, 1, 2)) -> Rows:
    """Rows around one centre per class."""
    random = np.random.default_rng(seed)
    chosen = random.choice(np.array(list(labels)), size=count).astype(np.int64)
    noise = random.normal(size=(count, INPUTS)).astype(np.float32)
    return Rows(CENTRES[chosen] + 0.7 * noise, chosen)


def proxy(rows: int = 40) -> ProxySet:
    return ProxySet(gaussian(rows, 1000).inputs.copy())


def participants(count: int = 4, rows: int = 24) -> list[Client]:
    """Clients of two architectures, with fewer rows the higher their number."""
    return [
        Client(
            f"site-{k}",
            partial(models.Linear, INPUTS, 3) if k % 2 else partial(models.MLP, INPUTS, 3, width=8),
            gaussian(rows - k, k),
            training=Recipe(epochs=1, batch_size=16),
        )
        for k in range(count)
    ]


def federation(clients: list[Client] | int = 4, **options: Any) -> Federation:
    """A federation whose round takes some milliseconds."""
    people = participants(clients) if isinstance(clients, int) else clients
    given: dict[str, Any] = {
        "proxy": proxy(),
        "student": partial(models.Linear, INPUTS, 3),
        "method": "fedistill",
        "classes": CLASSES,
        "seed": 7,
        "device": "cpu",
    }
    return Federation(people, **(given | options))


def held_out() -> Rows:
    return gaussian(30, 2000)


def timeless(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of figures without the only one that may differ between equal runs."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return timeless(json.loads(line) for line in path.read_text().splitlines())


# --- learners that say what they are told --------------------------------------------------------


class Saying:
    """A learner that predicts fixed logits (or the outcome of a function) and learns nothing."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits
        self.fitted = 0

    def absorb(self, inputs: Any, soft_targets: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def fit(self, rows: Rows, *, seed: int) -> None:
        self.fitted += 1

    def predict(self, inputs: Any) -> Any:
        return self.logits(self, inputs) if callable(self.logits) else self.logits

    def state_dict(self) -> dict[str, Any]:
        return {"fitted": np.array([self.fitted])}

    def load_state_dict(self, state: Mapping[str, Any], rows: Rows) -> None:
        self.fitted = int(state["fitted"][0])


def sulking(learner: Saying, inputs: Any) -> Any:
    """Logits that are never said: an error in a model, one that other processes can find."""
    raise ValueError(f"no logits for {len(inputs)} rows")


def saying(name: str, logits: Any, rows: int = 20) -> Client:
    return Client(name, lambda: Saying(logits), gaussian(rows, len(name)))


# --- messages ------------------------------------------------------------------------------------


def reseal(message: bytes, payload: bytes | None = None, **changes: Any) -> bytes:
    """The same message with other fields; ``None`` is a value, ``...`` takes the field out."""
    header, old = unseal(message, LIMIT)
    if payload is not None and header.get("kind") == "upload":
        first, *others = header["parts"]  # declined rows and familiarity stay
        header["parts"] = [len(payload), *others]
        payload += old[first:]
    elif payload is not None and isinstance(parts := header.get("parts"), list):
        header["parts"] = [len(payload), *[0] * (len(parts) - 1)]
    header = {k: v for k, v in (header | changes).items() if v is not ...}
    return seal(header, old if payload is None else payload)


def sealed_text(text: bytes, payload: bytes = b"") -> bytes:
    """A message whose checksum holds and whose header is any text."""
    import hashlib
    import struct

    body = b"FDst" + struct.pack("<HI", VERSION, len(text)) + text + payload
    return body + hashlib.sha256(body).digest()[:CHECKSUM]


MEAN = preset("ds-fl", rule="mean", codec="float32")
"""Plain mean of exact probabilities: the target can be computed by hand."""


def server(clients: int = 5, method: Method = MEAN, rows: int = 6, **options: Any) -> Server:
    """A server without a student, with enrolled clients c0, c1, ... of 16 rows each."""
    names = {f"c{k}": 16 for k in range(clients)}
    return Server(proxy(rows), CLASSES, None, method, names, seed=7, **options)


def probabilities(rows: int, seed: int, classes: int = 3, scale: float = 1.0) -> Any:
    logits = scale * np.random.default_rng(seed).normal(size=(rows, classes))
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def plain(probs: Any, codec: str = "float32") -> bytes:
    """Predictions as they travel, told as no change of anything."""
    values = np.asarray(probs, dtype=np.float32)
    if codec == "float32":  # also what no honest client could send
        return b"\0" + pack(values.astype("<f4").tobytes())
    return delta_encode(codec, quantise(codec, values))


def upload(plan: Plan, name: str, probs: Any, **changes: Any) -> Upload:
    """An honest answer to a plan, but for ``changes``."""
    probs = np.asarray(probs, dtype=np.float32)
    given: dict[str, Any] = {
        "client": name,
        "run": plan.run,
        "round": plan.round,
        "proxy": plan.proxy,
        "classes": fingerprint_classes(CLASSES),
        "codec": "float32",
        "shape": probs.shape[:2],
        "seen": "7",
        "size": bucket(16),
        "payload": plain(probs),
    }
    return Upload(**(given | changes))


# --- backends that go wrong ----------------------------------------------------------------------


class Tampered:
    """The serial backend, with a hand on the line: ``change(name, data, plan)``."""

    def __init__(self, sites: Mapping[str, Site], change: Change) -> None:
        self.serial = Serial(sites)
        self.change = change
        self.asked: list[tuple[str, ...]] = []

    def run(self, plan: Plan) -> Iterator[Reply | Failure]:
        self.asked.append(plan.clients)
        for reply in self.serial.run(plan):
            if isinstance(reply, Failure):
                yield reply
                continue
            changed = self.change(reply.client, reply.data, plan)
            yield from [changed] if isinstance(changed, Reply | Failure) else changed


def tampered(change: Change) -> Callable[[Mapping[str, Site]], Tampered]:
    return lambda sites: Tampered(sites, change)


def only(victim: str, change: Callable[[bytes, Plan], Any]) -> Change:
    """Change what one client says: bytes, a failure, or several replies."""

    def apply(name: str, data: bytes, plan: Plan) -> Any:
        if name != victim:
            return Reply(name, data)
        changed = change(data, plan)
        return Reply(name, changed) if isinstance(changed, bytes) else changed

    return apply


# --- a settings file -----------------------------------------------------------------------------


def write_settings(folder: Path, rounds: int = 4, **changes: Any) -> Path:
    """A whole experiment that runs in about a second, on rows that lie beside it."""
    rows = gaussian(200, 5)
    np.savez(folder / "rows.npz", x=rows.inputs, y=rows.labels)
    path = folder / "tiny.toml"
    path.write_text(f"""
seed = 3
rounds = {rounds}
[data]
source = "npz:rows.npz"
path = "{folder}"
test_rows = 40
[proxy]
rows = 40
[clients]
count = 4
partition = "iid"
width = 8
epochs = {changes.get("epochs", 2)}
batch_size = 16
[[clients.group]]
count = 1
model = "linear"
[student]
width = 8
[backend]
device = "cpu"
{changes.get("more", "")}
""")
    return path


def command_line(arguments: list[str]) -> None:
    """``fedistill ARGUMENTS`` in a process of its own."""
    from fedistill.cli import main

    main(arguments)
