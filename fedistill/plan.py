"""What a run will do, told before it starts: who, what, how many bytes, how much privacy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedistill import config, data
from fedistill.aggregate.rules import wants
from fedistill.assembly import assemble, method_of
from fedistill.config import Settings
from fedistill.data import Federated
from fedistill.presets import Method
from fedistill.wire.codec import expected_size

MOST_CLIENTS = 20
"""Clients that the plan lists one by one."""
ENVELOPE = 450
"""Bytes of header and checksum of a message, about."""


def describe(settings: Settings) -> Iterator[str]:
    """The plan of a run, a line each; reads the data, trains nothing."""
    federated = data.prepare(settings.data, settings.proxy, settings.clients, settings.seed)
    chosen = method_of(settings)
    federation = assemble(settings, federated, chosen)
    dataset = federated.dataset
    asked = min(settings.proxy.per_round or len(dataset.public), len(dataset.public))
    yield f"data      {dataset.name}: {len(dataset.classes)} classes, inputs " + "x".join(
        map(str, dataset.public.inputs.shape[1:])
    )
    yield f"clients   {len(federated.parts)}, participation {settings.clients.participation:g}"
    yield from (f"          {line}" for line in _clients(settings, federated))
    yield (
        f"proxy     {len(dataset.public)} rows, {asked} asked in a round, "
        f"fingerprint {federation.proxy.fingerprint[:12]}"
    )
    yield f"test      {len(dataset.test)} rows"
    yield f"method    {chosen.name}: {chosen.summary}"
    yield f"rounds    {settings.rounds}, seed {settings.seed}, backend {settings.backend.name}"
    yield from _bytes(chosen, asked, len(dataset.classes), federation.fedavg_bytes())
    yield "privacy   no differential privacy (projected epsilon: infinite)"


def _clients(settings: Settings, federated: Federated) -> Iterator[str]:
    """A line for each client: its rows, the classes among them, its model."""
    ids = list(dict.fromkeys([*federated.tests, *federated.parts]))
    training = config.client_settings(settings.clients, ids)
    width, classes = max(map(len, federated.parts)), len(federated.dataset.classes)
    for name, rows in list(federated.parts.items())[:MOST_CLIENTS]:
        model = training[name]
        size = f" {model.width}" if model.model in {"mlp", "cnn"} else ""
        met = f"{len(np.unique(rows.labels))} of {classes} classes"
        teaches = met if len(rows) else "learns, does not teach"
        yield f"{name:<{width}}  {len(rows):>6,} rows  {teaches:<17}  {model.model}{size}"
    if len(federated.parts) > MOST_CLIENTS:
        yield f"and {len(federated.parts) - MOST_CLIENTS} more"


def _bytes(chosen: Method, rows: int, classes: int, fedavg: int | None) -> Iterator[str]:
    """Bytes per client and round, at most (before zlib), against FedAvg."""
    if chosen.exchange == "weights":
        yield f"bytes     {fedavg:,} each way per client and round (weights in float32)"
        return
    if chosen.exchange != "predictions":
        yield "bytes     none: this baseline exchanges nothing"
        return
    familiar = "familiarity" in wants(chosen.bound_rule())
    up = expected_size(chosen.codec, rows, classes, familiar) + ENVELOPE
    down = expected_size(chosen.codec, rows, classes) + ENVELOPE
    yield f"bytes     at most {up:,} up and {down:,} down per client and round ({chosen.codec})"
    if fedavg:
        ratio = 2 * fedavg / (up + down)
        yield f"          FedAvg would send {fedavg:,} each way: {ratio:.1f} times as much"
        if ratio < 1:
            yield (
                "          WARNING: predictions cost more than weights here; lower "
                "proxy.per_round, or take a smaller codec"
            )
