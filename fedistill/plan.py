"""What a run will do, told before it starts: who, what, how many bytes, how much privacy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedistill import config, deployment
from fedistill.assembly import assemble, every, method_of
from fedistill.config import Settings
from fedistill.data import Federated
from fedistill.exchange import EXCHANGES, Exchange
from fedistill.experiment import rows_of
from fedistill.outlook import privacy
from fedistill.presets import Method
from fedistill.wire.codec import expected_size

MOST_CLIENTS = 20
"""Clients that the plan lists one by one."""
ENVELOPE = 450
"""Bytes of header and checksum of a message, about."""


def describe(settings: Settings) -> Iterator[str]:
    """The plan of a run, a line each; reads the data, trains nothing."""
    if settings.deployment.classes and not settings.deployment.sites:
        yield from _before_there_are_sites(settings)
        return
    federated = rows_of(settings)
    chosen = method_of(settings)
    federation = assemble(settings, federated, chosen)
    dataset = federated.dataset
    asked = min(settings.proxy.per_round or len(dataset.public), len(dataset.public))
    yield f"data      {dataset.name}: {len(dataset.classes)} classes, inputs " + "x".join(
        map(str, dataset.public.inputs.shape[1:])
    )
    participants = len(federation.members)
    yield f"clients   {participants}, participation {settings.clients.participation:g}"
    yield from (f"          {line}" for line in _clients(settings, federated))
    yield (
        f"proxy     {len(dataset.public)} rows, {asked} asked in a round, "
        f"fingerprint {federation.proxy.fingerprint[:12]}"
    )
    yield f"test      {len(dataset.test)} rows"
    yield f"method    {chosen.name}: {chosen.summary}"
    yield from _choices(settings, chosen, asked)
    yield from _stream(settings, federated)
    yield f"rounds    {settings.rounds}, seed {settings.seed}, backend {settings.backend.name}"
    yield from _bytes(chosen, asked, len(dataset.classes), federation.fedavg_bytes())
    yield from privacy(settings, federation.clients, federation.proxy)


def _stream(settings: Settings, federated: Federated) -> Iterator[str]:
    """What changes, and what clients do about it."""
    stream = federated.stream
    if stream is not None:
        met = "each client in its own order" if settings.stream.order == "own" else "in this order"
        shown = ", ".join(stream.names[:6]) + (", ..." if len(stream.names) > 6 else "")
        yield (
            f"stream    {len(stream.names)} experiences ({settings.stream.shift}, "
            f"{settings.stream.course}), {every(settings)} rounds each, {met}"
        )
        yield f"          {shown}"
    yield from _memory(settings)


def _memory(settings: Settings) -> Iterator[str]:
    """What clients remember, what a step minimises, what watches for drift."""
    how = settings.continual
    if how.buffer:
        yield f"memory    {how.buffer} own rows a client ({how.policy}), which stay at the client"
    if how.active:
        yield f"          objective {how.objective or ('er' if how.buffer else 'fine-tune')}"
    if how.drift is not None:
        then = f"; {how.quorum} alarms make an extra round" if how.quorum else ""
        yield f"drift     {how.drift} on {how.on}{then}"


def _choices(settings: Settings, chosen: Method, asked: int) -> Iterator[str]:
    """What else was chosen: the rule, what is known beforehand, who is bad, lost or late."""
    clients, attack, rows = settings.clients, settings.attack, settings.proxy
    if chosen.exchange == "predictions":
        rule = chosen.rule if isinstance(chosen.rule, str) else "a rule of your own"
        yield f"          rule {rule}, sharpen {chosen.sharpen}, {chosen.rows} rows"
    if rows.labelled:
        yield f"anchors   the server knows the labels of {rows.labelled} proxy rows"
    if chosen.cache_rounds and asked == rows.rows:
        yield (
            f"          WARNING: all rows are asked in round 1 and not again for "
            f"{chosen.cache_rounds} rounds: set proxy.per_round, or method.cache_rounds"
        )
    if attack.kind is not None:
        together = ", colluding" if attack.collude else ""
        yield f"attack    {attack.count} clients: {attack.kind}{together}"
    if clients.dropout:
        yield f"losses    {clients.dropout:.0%} of those asked are offline in a round"
    if clients.stragglers:
        counted = f"counts {chosen.late:g}" if chosen.late else "is refused (method.late)"
        yield (
            f"losses    {clients.stragglers:.0%} are late by {clients.lateness} "
            f"round{'s' * (clients.lateness > 1)}; what is late {counted}"
        )


def _before_there_are_sites(settings: Settings) -> Iterator[str]:
    """What is agreed on before ``deploy init`` names the sites: the public rows."""
    public = deployment.public_rows(settings)
    shape = "x".join(map(str, public.proxy.inputs.shape[1:]))
    yield f"data      {len(public.classes)} classes ({', '.join(public.classes)}), inputs {shape}"
    yield f"proxy     {len(public.proxy)} rows, fingerprint {public.proxy.fingerprint[:12]}"
    yield "sites     none named yet: fedistill deploy init DIR --sites a,b,c --settings THIS_FILE"


def describe_site(folder: Path) -> Iterator[str]:
    """What a real site will do: its rows, its model, what it shares; trains nothing."""
    place = deployment.open_site(folder)
    site, agreed = place.site, place.agreed
    rows, classes = site.data, len(site.classes)
    training = deployment.site_training(place.settings, agreed)
    asked = min(agreed.proxy.per_round or len(site.proxy), len(site.proxy))
    met = len(np.unique(rows.labels))
    yield f"site      {place.settings.id} of {', '.join(agreed.deployment.sites)}"
    yield f"rows      {len(rows):,} to learn from, {met} of {classes} classes; " + (
        f"{len(site.client.test):,} kept for its own tests"
        if site.client.test
        else "none for tests"
    )
    yield f"model     {training.model}, {training.epochs} epochs in a round"
    yield (
        f"proxy     {len(site.proxy)} rows, as agreed (fingerprint {site.proxy.fingerprint[:12]}), "
        f"{asked} asked in a round"
    )
    yield f"method    {site.method.name}: {site.method.summary}"
    if place.settings.data.arrivals:
        yield f"arrivals  {place.settings.data.arrivals}: a file a round, each an experience"
    yield from _memory(agreed)
    yield from (f"note      {note}" for note in site.notes)
    exchange = EXCHANGES.get(site.method.exchange)
    if exchange is None:
        familiar = site.method.tells_familiarity()
        up = expected_size(site.method.codec, asked, classes, familiar) + ENVELOPE
        yield (
            f"leaves    at most {up:,} bytes a round: predictions on proxy rows, no row, no weight"
        )
    elif exchange.name in place.settings.policy.share:
        yield f"leaves    {exchange.summary}"
        yield f"          it tells {exchange.tells}"
    else:
        yield f"leaves    nothing: policy.share does not allow {exchange.name}"
    if refused := place.refuses():
        yield f"refused   {refused} (policy in site.toml)"
    yield from privacy(agreed, [site.client], site.proxy, site.account)


def _clients(settings: Settings, federated: Federated) -> Iterator[str]:
    """A line for each client: its rows, the classes among them, its model."""
    ids = list(dict.fromkeys([*federated.tests, *federated.parts]))
    training = config.client_settings(settings.clients, ids)
    width = max(map(len, federated.parts), default=0)
    classes = len(federated.dataset.classes)
    yield from (f"{name}  a real site" for name in settings.deployment.sites[:MOST_CLIENTS])
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
    if chosen.exchange in EXCHANGES:
        yield from _table_bytes(EXCHANGES[chosen.exchange], rows, classes, fedavg)
        return
    if chosen.exchange != "predictions":
        yield "bytes     none: this baseline exchanges nothing"
        return
    up = expected_size(chosen.codec, rows, classes, chosen.tells_familiarity()) + ENVELOPE
    down = expected_size(chosen.down(), rows, classes) + ENVELOPE
    codec = chosen.codec if chosen.down() == chosen.codec else f"{chosen.codec}, {chosen.down()}"
    cached = ", less what the other side holds" if chosen.cache else ""
    yield f"bytes     at most {up:,} up and {down:,} down per client and round ({codec}{cached})"
    if fedavg:
        ratio = 2 * fedavg / (up + down)
        yield f"          FedAvg would send {fedavg:,} each way: {ratio:.1f} times as much"
        if ratio < 1:
            yield (
                "          WARNING: predictions cost more than weights here; lower "
                "proxy.per_round, or take a smaller codec"
            )


def _table_bytes(exchange: Exchange, rows: int, classes: int, fedavg: int | None) -> Iterator[str]:
    """Bytes of a table each way, as far as they are known beforehand, and what it tells."""
    items, width = exchange.sides(classes, min(exchange.public, rows))
    size = 4 * items * width + ENVELOPE
    told = f"at most {size:,}" if width else f"{items} times 4 for each hidden feature"
    yield f"bytes     {told} each way per client and round ({exchange.summary})"
    if fedavg and width:
        yield f"          FedAvg would send {fedavg:,} each way: {fedavg / size:.1f} times as much"
    yield f"          WARNING: it tells {exchange.tells}"
