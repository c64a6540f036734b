"""What a deployment costs: bytes on the wire, seconds of a round, memory; real processes over TLS.

`python benchmarks/flower_deployment.py` prints three tables in Markdown; `--only bytes`, `rounds`
or `memory` prints one. Everything runs on this machine, by the kit's own scripts, so seconds are
those of a machine that plays all parties at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from flower.chaos import World, children_of, command_of, deploy, nginx, start_nginx, world
from flower.network import CountingProxy, Traffic

TRIVIAL = """
seed = 7
rounds = 5
[data]
source = "digits"
test_rows = 360
[proxy]
rows = 400
[clients]
alpha = 10.0
width = 8
epochs = 1
[student]
width = 8
epochs = 1
"""
IDLE = 30.0
"""Seconds over which an idle site is watched."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """One table in Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(str(cell) for cell in row), "|")
    print(flush=True)


def through_proxies(ours: World, stack: ExitStack, port: int) -> dict[str, CountingProxy]:
    """Every site reaches the coordinator through a forwarder of its own, which counts."""
    proxies = {
        site: stack.enter_context(CountingProxy(("127.0.0.1", 0), ("127.0.0.1", port)))
        for site in ours.trial.sites
    }
    for site, proxy in proxies.items():
        ours.set_environment(site, FEDISTILL_SUPERLINK=f"127.0.0.1:{proxy.address[1]}")
    return proxies


def measure_bytes(folder: Path, rounds: int) -> None:
    """Bytes of a site in a round, beside our messages; as deployed, and without nginx."""
    for door in ("nginx", "SuperLink") if nginx() else ("SuperLink",):
        bytes_through(folder.with_name(door), rounds, door)


def bytes_through(folder: Path, rounds: int, door: str) -> None:
    """One table: sites connect to nginx, or to the SuperLink itself."""
    deploy(folder, ["a", "b", "c"], TRIVIAL)
    with ExitStack() as stack, world(folder, watched=False) as ours:
        ours.agree(rounds=rounds)
        ours.open(sites=())
        port = start_nginx(ours) if door == "nginx" else ours.trial.port
        proxies = through_proxies(ours, stack, port)
        for site in proxies:
            ours.keep(site, lambda site=site: ours.trial.start_site(site))
        ours.rest(10)  # all have signed on
        before = {site: proxy.snapshot() for site, proxy in proxies.items()}
        began = time.monotonic()
        ours.rest(IDLE)
        passed = time.monotonic() - began
        quiet = [proxy.snapshot().total - before[site].total for site, proxy in proxies.items()]
        idle_up = statistics.mean(one.up for one in quiet) / passed
        idle_down = statistics.mean(one.down for one in quiet) / passed
        marks, times = [{s: p.snapshot() for s, p in proxies.items()}], [time.monotonic()]
        ours.submit()
        for number in range(1, rounds + 1):
            ours.until(lambda number=number: len(ours.rows()) >= number, f"round {number}")
            marks.append({site: proxy.snapshot() for site, proxy in proxies.items()})
            times.append(time.monotonic())
        ours.finish()
        told, sites = ours.rows(), len(proxies)
    rows = []
    for number in range(1, rounds + 1):
        moved = [marks[number][site].total - marks[number - 1][site].total for site in proxies]
        wire = Traffic(
            up=round(statistics.mean(one.up for one in moved)),
            down=round(statistics.mean(one.down for one in moved)),
        )
        seconds = times[number] - times[number - 1]
        links = statistics.mean(
            len(marks[number][site].connections) - len(marks[number - 1][site].connections)
            for site in proxies
        )
        up = round(told[number - 1]["bytes_up"] / sites)
        down = round(told[number - 1]["bytes_down"] / sites)
        rows.append(
            (
                number,
                f"{seconds:.1f}",
                f"{links:.1f}",
                up,
                wire.up,
                round(wire.up - up - idle_up * seconds),
                down,
                wire.down,
                round(wire.down - down - idle_down * seconds),
            )
        )
    print(f"\nSites connect to {door}. Idle: {idle_up:.0f} B/s up, {idle_down:.0f} B/s down.\n")
    head = "round|seconds|new connections|upload|wire up|wire up - upload - idle"
    head += "|plan|wire down|wire down - plan - idle"
    table(head.split("|"), rows)


def moment(event: dict[str, Any]) -> float:
    """When an event was, in seconds."""
    return datetime.fromisoformat(event["time"]).timestamp()


def measure_rounds(folder: Path, rounds: int) -> None:
    """Where the seconds of a round go, by the events of coordinator and sites."""
    deploy(folder, ["a", "b", "c"], TRIVIAL)
    with world(folder, watched=False) as ours:
        ours.agree(rounds=rounds)
        ours.open()
        ours.rest(10)
        ours.submit()
        ours.finish()
        coordinator = {
            name: ours.events(name) for name in ("round_started", "answered", "round_done")
        }
        sites = {
            site: {name: ours.site_events(site, name) for name in ("plan_received", "step_done")}
            for site in ours.trial.sites
        }
    rows = []
    for number in range(1, rounds + 1):

        def at(name: str, number: int = number, **which: Any) -> float:
            pool = coordinator[name]
            return next(
                moment(one)
                for one in pool
                if one["round"] == number
                and all(one.get(key) == value for key, value in which.items())
            )

        def there(site: str, name: str, number: int = number) -> float:
            return next(moment(one) for one in sites[site][name] if one["round"] == number)

        asked, done = at("round_started"), at("round_done")
        slowest = max(sites, key=lambda site: at("answered", site=site))
        received, answered = there(slowest, "plan_received"), there(slowest, "step_done")
        heard = at("answered", site=slowest)
        spans = (received - asked, answered - received, heard - answered, done - heard)
        rows.append((number, f"{done - asked:.2f}", *(f"{span:.2f}" for span in spans)))
    head = "round|seconds|until the slowest site has the plan|its step|until its upload is in"
    table((head + "|combine, teach, save").split("|"), rows)


def memory(pid: int) -> tuple[float, float]:
    """Resident and proportional megabytes of a process."""
    found = {"Rss": 0, "Pss": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name = line.split(":")[0]
            if name in found:
                found[name] = int(line.split()[1])
    return found["Rss"] / 1024, found["Pss"] / 1024


def program(pid: int) -> str:
    """Name of the program that a process runs."""
    words = command_of(pid).split()
    return next((Path(word).name for word in words if "fl" in Path(word).name[:6]), "?")


def measure_memory(folder: Path, count: int) -> None:
    """Megabytes of an idle site, and of a coordinator with so many sites, at their largest."""
    deploy(folder, [f"s{number}" for number in range(count)], TRIVIAL)
    largest: dict[str, tuple[float, float]] = {}
    whole = (0.0, 0.0)
    with world(folder, watched=False) as ours:
        ours.agree(rounds=2)
        ours.open()
        ours.rest(20)
        rows = []
        node = ours.units["s0"].child.process.pid
        parts = [(program(pid), *memory(pid)) for pid in (node, *children_of(node))]
        for name, rss, pss in parts:
            rows.append((f"idle site: {name}", f"{rss:.0f}", f"{pss:.0f}"))
        rss, pss = sum(part[1] for part in parts), sum(part[2] for part in parts)
        rows.append(("**idle site**", f"**{rss:.0f}**", f"**{pss:.0f}**"))
        ours.submit()
        link = ours.units["superlink"].child.process.pid

        def look() -> bool:
            nonlocal whole
            waiting = ours.coordinator.process.pid  # fedistill run, below its script
            pids = [link, *children_of(link), waiting, *children_of(waiting)]
            found = [(program(pid), memory(pid)) for pid in pids]
            for name, (rss, pss) in found:
                if rss > largest.get(name, (0.0, 0.0))[0]:
                    largest[name] = rss, pss
            both = sum(one[0] for _, one in found), sum(one[1] for _, one in found)
            whole = max(whole, both)
            return not ours.coordinator.running

        ours.until(look, "the end of the run")
        ours.finish()
    for name, (rss, pss) in sorted(largest.items()):
        rows.append((f"coordinator, {count} sites: {name}", f"{rss:.0f}", f"{pss:.0f}"))
    rows.append((f"**coordinator, {count} sites**", f"**{whole[0]:.0f}**", f"**{whole[1]:.0f}**"))
    table(("what", "RSS, MB", "PSS, MB"), rows)


def main() -> None:
    """All tables, or one."""
    measures: dict[str, Callable[[Path], None]] = {
        "bytes": lambda folder: measure_bytes(folder, asked.rounds),
        "rounds": lambda folder: measure_rounds(folder, asked.rounds),
        "memory": lambda folder: measure_memory(folder, asked.sites),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=measures)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sites", type=int, default=10, help="of the memory table")
    asked = parser.parse_args()
    for name, measure in measures.items():
        if asked.only in {None, name}:
            with tempfile.TemporaryDirectory() as scratch:
                measure(Path(scratch) / "deployment")


if __name__ == "__main__":
    main()
