"""Settings that are possible alone and impossible together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from fedistill import catalog
from fedistill.errors import Problem, did_you_mean
from fedistill.settings import CLIENT_ID, CLIENT_ID_WORDS, SHARED, Settings, SiteSettings

Lines: TypeAlias = Mapping[tuple[str | int, ...], int]
"""Where each key stands in the file that was read."""
FEATURES = ("fedproto", "fedhenn")
"""Methods in which no predictions are shared that an attack could change."""


def contradictions(settings: Settings, lines: Lines) -> Iterator[Problem]:
    """Values that are possible alone and impossible together."""

    def problem(key: str, text: str) -> Problem:
        return Problem(key, text, lines.get(tuple(key.split("."))))

    clients, proxy, method = settings.clients, settings.proxy, settings.method
    if proxy.per_round > proxy.rows and clients.partition != "file":
        yield problem(
            "proxy.per_round",
            f"expected at most proxy.rows ({proxy.rows}), found {proxy.per_round}",
        )
    if proxy.labelled > proxy.rows and clients.partition != "file":
        yield problem(
            "proxy.labelled",
            f"expected at most proxy.rows ({proxy.rows}), found {proxy.labelled}",
        )
    if clients.partition == "by-column" and not clients.column:
        yield problem("clients.column", "by-column needs the name of a column, found none")
    if clients.partition == "file" and not (clients.partition_path and clients.partition_key):
        yield problem(
            "clients.partition_path",
            "a file partition needs partition_path and partition_key, found neither or one",
        )
    if clients.partition != "by-column":
        asked = max(1, round(clients.participation * clients.count))
        if clients.count >= clients.quorum > asked:
            yield problem(
                "clients.quorum",
                f"{asked} of {clients.count} clients are asked in a round (clients.participation), "
                f"the quorum of {clients.quorum} can never be met",
            )
        if clients.quorum > clients.count:
            yield problem(
                "clients.quorum",
                f"expected at most clients.count ({clients.count}), found {clients.quorum}",
            )
        grouped = sum(group.count for group in clients.group)
        if grouped > clients.count:
            yield problem(
                "clients.group",
                f"the counts of the groups add up to {grouped}, "
                f"expected at most clients.count ({clients.count})",
            )
        if clients.names and len(clients.names) != clients.count:
            yield problem(
                "clients.names",
                f"expected clients.count ({clients.count}) names, found {len(clients.names)}",
            )
    for number, group in enumerate(clients.group):
        if bool(group.count) == bool(group.sites):
            yield Problem(
                f"clients.group.{number}",
                "expected count or sites, found " + ("both" if group.count else "neither"),
                lines.get(("clients", "group", number)),
            )
    sharpen = re.fullmatch(r"(?:era|power):(\d+\.?\d*|\.\d+)", method.sharpen or "")
    anchored = "trust-anchored" in {method.rule, method.student_rule}
    if anchored and not proxy.labelled:
        yield problem(
            "proxy.labelled",
            "trust-anchored judges clients by labelled proxy rows, found 0: label some (in a "
            "simulation; with real sites there are none)",
        )
    if method.sharpen not in {None, "none"} and not (sharpen and float(sharpen[1]) > 0):
        yield problem(
            "method.sharpen", f'expected none, era:0.1 or power:2, found "{method.sharpen}"'
        )
    if not settings.data.test_rows and not settings.deployment.sites:
        yield problem("data.test_rows", "expected a number above 0, found 0")
    for key, amount in (
        ("data.test_rows", settings.data.test_rows),
        ("clients.labelled", clients.labelled),
    ):
        if amount >= 1 and amount != int(amount):
            yield problem(
                key, f"expected a share below 1 or a whole number of rows, found {amount}"
            )
    for key, source in (
        ("data.source", settings.data.source),
        ("data.test", settings.data.test),
        ("proxy.path", proxy.path),
    ):
        kind = source.partition(":")[0]
        if source and kind not in catalog.known("sources"):
            hint = did_you_mean(kind, catalog.known("sources"))
            yield problem(key, f'unknown source "{kind}"{hint}')
    for name in settings.evaluation.baselines:
        if name not in catalog.known("methods"):
            yield problem(
                "evaluation.baselines",
                f'unknown method "{name}"' + did_you_mean(name, catalog.known("methods")),
            )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", settings.backend.device):
        yield problem(
            "backend.device", f'expected auto, cpu or cuda, found "{settings.backend.device}"'
        )

    yield from _simulation_contradictions(settings, problem)
    yield from _deployment_contradictions(settings, problem)
    yield from _stream_contradictions(settings, problem)
    yield from _continual_contradictions(settings, problem)
    yield from _privacy_contradictions(settings, problem)


def _simulation_contradictions(
    settings: Settings, problem: Callable[[str, str], Problem]
) -> Iterator[Problem]:
    """What simulated bad, lost and late clients need."""
    clients, attack, real = settings.clients, settings.attack, settings.deployment.sites
    if attack.count and attack.kind is None:
        yield problem("attack.kind", f"{attack.count} bad clients need a kind, found none")
    if attack.kind is not None and not attack.count:
        yield problem("attack.count", f"{attack.kind} needs bad clients, found a count of 0")
    if clients.partition != "by-column" and attack.count > clients.count:
        yield problem(
            "attack.count",
            f"expected at most clients.count ({clients.count}), found {attack.count}",
        )
    if attack.kind is not None and settings.method.preset in {"local", "centralised", "fedavg"}:
        yield problem(
            "attack.kind",
            "bad clients tamper with predictions, found the baseline "
            f'"{settings.method.preset}", which shares none',
        )
    if attack.kind not in {None, "label-flip"} and settings.method.preset in FEATURES:
        yield problem(
            "attack.kind",
            f"{settings.method.preset} shares hidden features, which only label-flip changes, "
            f"found {attack.kind}",
        )
    if attack.kind is not None and settings.evaluation.leave_one_out:
        yield problem(
            "attack.kind",
            "without one client others would be drawn to be bad: leave evaluation.leave_one_out "
            "or the attack out",
        )
    if real and attack.kind is not None:
        yield problem("attack.kind", "simulated bad clients are for simulations, found real sites")
    for name in ("dropout", "stragglers"):
        if not getattr(clients, name):
            continue
        key = f"clients.{name}"
        if real:
            yield problem(key, "clients are lost for simulations only, found real sites")
        elif settings.backend.name == "flower":
            yield problem(
                key,
                'lost and late clients are simulated by every backend but "flower", which was '
                "found",
            )


def _stream_contradictions(
    settings: Settings, problem: Callable[[str, str], Problem]
) -> Iterator[Problem]:
    """What a stream needs, where there is one."""
    stream = settings.stream
    if not stream.experiences:
        return
    wanted = stream.experiences * max(stream.every, 1)
    if wanted > settings.rounds:
        yield problem(
            "stream.experiences",
            f"expected at most one a round, {settings.rounds} rounds, found {wanted}: raise rounds",
        )
    if stream.order == "own" and stream.shift == "time":
        yield problem("stream.order", 'time runs one way for all: expected "same", found "own"')
    if settings.deployment.sites:
        yield problem(
            "stream.experiences",
            "streams are simulated; at real sites rows arrive as files (arrivals in site.toml)",
        )
    elif settings.backend.name == "flower":
        yield problem(
            "stream.experiences",
            'streams are simulated by every backend but "flower", which was found',
        )
    if settings.attack.kind is not None:
        yield problem("attack.kind", "bad clients of a stream are not simulated: leave one out")
    if settings.evaluation.leave_one_out:
        yield problem(
            "evaluation.leave_one_out", "expected false with a stream, whose rows are dealt to all"
        )


NEED_MEMORY = ("er", "er-ace", "der", "der++", "a-gem", "gdumb", "steady")
"""Objectives that are nothing without remembered rows."""


def _continual_contradictions(
    settings: Settings, problem: Callable[[str, str], Problem]
) -> Iterator[Problem]:
    """What a memory and a detector need."""
    how, clients = settings.continual, settings.clients
    if how.objective in NEED_MEMORY and not how.buffer:
        yield problem(
            "continual.buffer", f"{how.objective} replays remembered rows, found room for 0"
        )
    if how.quorum and how.drift is None:
        yield problem("continual.drift", "a quorum of alarms needs a detector, found none")
    if clients.partition != "by-column" and how.quorum > clients.count:
        yield problem(
            "continual.quorum",
            f"expected at most clients.count ({clients.count}), found {how.quorum}",
        )
    if how.drift is not None and how.on == "predictions" and how.drift != "mmd":
        yield problem("continual.on", f"{how.drift} watches one number a row, mmd all predictions")
    if settings.method.preset in {"centralised", "local"} and how.quorum:
        yield problem("continual.quorum", "a baseline in which nobody shares has no quorum")


ACCOUNTED = ("dpsgd", "dp-head", "gnmax")
"""Mechanisms that a client keeps an account for."""
UNMIXED = ("", "er", "fine-tune")
"""Objectives whose steps are sums over rows, each of which can be clipped alone."""


def _privacy_contradictions(
    settings: Settings, problem: Callable[[str, str], Problem]
) -> Iterator[Problem]:
    """What privacy needs, and what would break it."""
    how, clients, continual = settings.privacy, settings.clients, settings.continual
    for number, group in enumerate(clients.group):
        if group.mechanism is not None and (
            how.mechanism not in ACCOUNTED or group.mechanism not in ACCOUNTED
        ):
            yield problem(
                f"clients.group.{number}.mechanism",
                f"a group may have another private mechanism ({', '.join(ACCOUNTED)}) than the "
                f'federation, where that is private, found "{group.mechanism}" beside '
                f'"{how.mechanism}"',
            )
    if how.mechanism == "central-gauss":
        yield from _central_contradictions(settings, problem)
    if how.mechanism not in ACCOUNTED:
        return
    if how.unit == "user" and not settings.data.subject and not _is_sessions(settings):
        yield problem(
            "data.subject", "users as the unit of privacy need the column that names them"
        )
    if how.unit == "record" and (clients.model == "sequential" or _is_sessions(settings)):
        yield problem(
            "privacy.unit", 'a user has many rows in a recommender: expected "user", found "record"'
        )
    if settings.attack.kind is not None:
        yield problem("attack.kind", "simulated bad clients keep no account: leave one of both out")
    if (continual.objective or "") not in UNMIXED:
        yield problem(
            "continual.objective",
            f"{continual.objective} joins rows in one gradient, which cannot be clipped row by "
            "row: expected er or fine-tune",
        )
    if continual.buffer and (continual.policy, continual.draw) != ("reservoir", "uniform"):
        yield problem(
            "continual.policy",
            "under a privacy budget rows must stay by their own coin, whatever other rows are: "
            f"expected reservoir and uniform, found {continual.policy} and {continual.draw}",
        )
    if continual.drift is not None or continual.teacher != "none" or continual.max_uses:
        yield problem(
            "continual.drift",
            "detectors, teachers besides and max_uses look at private rows without an account: "
            "leave them out",
        )


def _central_contradictions(
    settings: Settings, problem: Callable[[str, str], Problem]
) -> Iterator[Problem]:
    """Noise at the server hides one client among many."""
    if settings.clients.partition != "by-column" and settings.clients.count < MOST_ALONE:
        yield problem(
            "privacy.mechanism",
            f"central-gauss hides a client among {MOST_ALONE} or more, found "
            f"{settings.clients.count}: the noise would drown the mean; take dpsgd or dp-head",
        )
    if settings.method.rule not in {None, "mean"}:
        yield problem(
            "method.rule", f'central-gauss is noise on the mean, found "{settings.method.rule}"'
        )
    if settings.method.student_rule is not None:
        yield problem(
            "method.student_rule",
            f"central-gauss teaches the student from the same noisy mean, found "
            f'"{settings.method.student_rule}": leave it out',
        )


MOST_ALONE = 100
"""Clients below which noise at the server is refused."""


def _is_sessions(settings: Settings) -> bool:
    return settings.data.source.partition(":")[0] == "sessions"


def _deployment_contradictions(
    settings: Settings, problem: Callable[[str, str], Problem]
) -> Iterator[Problem]:
    """What a federation of real sites needs, where one is described."""
    deployment = settings.deployment
    if not deployment.sites:
        return
    if settings.backend.name != "flower":
        yield problem(
            "backend.name",
            f'real sites (deployment.sites) are reached by "flower", found '
            f'"{settings.backend.name}"',
        )
    for name in deployment.sites:
        if not re.fullmatch(CLIENT_ID, name):
            yield problem("deployment.sites", f"{CLIENT_ID_WORDS}, found {name[:64]!r}")
    if len(set(deployment.sites)) < len(deployment.sites):
        yield problem("deployment.sites", "expected ids that differ, found one twice")
    if len(set(deployment.classes)) < len(deployment.classes):
        yield problem("deployment.classes", "expected names that differ, found one twice")
    if len(deployment.classes) < 2:
        yield problem("deployment.classes", "expected the names of two classes or more")
    if not settings.proxy.path:
        yield problem("proxy.path", "real sites need a file of proxy rows, found none")
    if settings.proxy.labelled:
        yield problem(
            "proxy.labelled",
            "real sites and their coordinator read one file of proxy rows without labels, so none "
            f"is known to the server alone: expected 0, found {settings.proxy.labelled}",
        )
    if settings.clients.quorum > len(deployment.sites):
        yield problem(
            "clients.quorum",
            f"expected at most the number of sites ({len(deployment.sites)}), found "
            f"{settings.clients.quorum}",
        )
    if settings.clients.group:
        yield problem(
            "clients.group", "a real site names its own model in its site.toml: found groups here"
        )
    if settings.evaluation.baselines or settings.evaluation.leave_one_out:
        yield problem(
            "evaluation.baselines",
            "real sites cannot be compared with baselines, which need all rows in one place",
        )
    if settings.evaluation.repeats > 1:
        yield problem(
            "evaluation.repeats",
            "real sites train with the one agreed seed, found "
            f"{settings.evaluation.repeats} repeats",
        )
    if settings.method.preset in {"local", "centralised", "fedavg"}:
        yield problem(
            "method.preset",
            f'real sites share predictions only, found the baseline "{settings.method.preset}"',
        )


def site_contradictions(settings: SiteSettings, lines: Lines) -> Iterator[Problem]:
    """Values of a site's own file that cannot be."""
    if not re.fullmatch(CLIENT_ID, settings.id):
        text = f"{CLIENT_ID_WORDS}, found {settings.id[:64]!r}"
        yield Problem("id", text, lines.get(("id",)))
    kind = settings.data.source.partition(":")[0]
    if kind and kind not in catalog.known("sources"):
        hint = did_you_mean(kind, catalog.known("sources"))
        text = f'unknown source "{kind}"{hint}'
        yield Problem("data.source", text, lines.get(("data", "source")))
    for name in settings.policy.share:
        if name not in SHARED:
            text = f'expected {", ".join(SHARED)}, found "{name}"'
            yield Problem("policy.share", text, lines.get(("policy", "share")))
    known = catalog.known("mechanisms")
    for name in settings.policy.mechanisms:
        if name not in known:
            text = f'unknown value "{name}"{did_you_mean(name, known)}'
            yield Problem("policy.mechanisms", text, lines.get(("policy", "mechanisms")))
