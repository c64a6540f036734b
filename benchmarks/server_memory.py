"""What the server's half of a round takes in memory, and whether reading in parts changes a bit.

`python benchmarks/server_memory.py [--clients 100] [--rows 10000] [--classes 1000] [--codec u8]
[--rules mean,trimmed-mean,...]` prints a JSON line for each rule, each from a process of its own.
Uploads are made one at a time, go through the door as any upload does, and are combined.

`payload_mb` is what was received, `kept_mb` what an answer keeps of it; `door_mb` and `peak_mb` are
the largest resident memory of checking and of combining, less what the process held before and less
the payloads. `combine_s` is processor time of flags, rule, sharpener and coding. Where all
predictions fit in one array of `--stacked` MB the same is done as with one array
(`stacked_peak_mb`, `stacked_s`), and `equal` says whether the soft targets are the same bytes.

`--scale` is the standard deviation of the logits: with 1.5 a payload hardly compresses, with 8 to a
small part.
Linux only: the peak is reset through `/proc`. Seconds to minutes a rule.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from fedistill.aggregate.rules import combine, log_softmax, softmax
from fedistill.aggregate.vigilance import flag_predictions
from fedistill.door import Answer
from fedistill.presets import method
from fedistill.server import Server
from fedistill.types import FloatArray, Probs, ProxySet, fingerprint_classes
from fedistill.wire.codec import encode_familiarity, pack
from fedistill.wire.delta import PLAIN, grid_of, quantise, restore
from fedistill.wire.messages import Plan, Upload

SOME = 256
"""Different rows that there are."""


def resident(what: str) -> float:
    """Megabytes of this process: ``VmRSS`` now, ``VmHWM`` the most since :func:`forget_peak`."""
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def forget_peak() -> None:
    """Let ``VmHWM`` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def upload(plan: Plan, server: Server, number: int, scale: float) -> Upload:
    """What client ``number`` might say: rows drawn from a pool, so that it is quickly made."""
    common, own = np.random.default_rng(0), np.random.default_rng(1 + number)
    codec, rows, classes = server.method.codec, plan.count(), len(server.classes)
    codes = []
    for start in range(0, rows, SOME):
        size = min(SOME, rows - start), classes
        codes.append(
            quantise(codec, softmax(scale * (common.normal(size=size) + own.normal(size=size))))
        )
    told = server.method.tells_familiarity()
    payload = zlib.compress(grid_of(codec).dump(np.concatenate(codes)), 1)
    return Upload(
        client=f"c{number:03d}",
        run=plan.run,
        round=plan.round,
        proxy=plan.proxy,
        classes=fingerprint_classes(server.classes),
        codec=codec,
        shape=(rows, classes),
        seen=format((1 << classes) - 1, "x") if classes <= 256 else "0",
        size=128,
        familiarity=told,
        ratios=pack(encode_familiarity(own.normal(size=rows))) if told else b"",
        payload=bytes([PLAIN]) + payload,
    )


def stacked(server: Server, answers: list[Answer]) -> Probs:
    """Soft targets as with all predictions in one array."""
    said = {answer.upload.client: answer.probs for answer in answers}
    told = all(answer.familiarity is not None for answer in answers)
    ratios = {a.upload.client: np.asarray(a.familiarity, np.float64) for a in answers}
    probs, weights, _ = flag_predictions(said, ratios if told else None)
    extras: dict[str, Any] = {
        "seen": np.array([a.upload.seen_classes(len(server.classes)) for a in answers]),
        "sizes": np.full(len(answers), 128.0),
        "clients": tuple(said),
        "familiarity": np.array(list(ratios.values())) if told else None,
        "anchors": np.full(len(server.proxy), -1),
    }
    logits: FloatArray = log_softmax(np.log(np.maximum(probs, 1e-12)))
    targets = combine(server.method.bound_rule(), logits, weights, **extras)
    codec, classes = server.method.down(), len(server.classes)
    codes = quantise(codec, targets.reshape(-1, classes))
    return restore(codec, codes, classes).reshape(targets.shape)


def measure(rule: str, given: argparse.Namespace) -> dict[str, Any]:
    """One line."""
    names = {f"c{k:03d}": 128 for k in range(given.clients)}
    server = Server(
        ProxySet(np.random.default_rng(7).normal(size=(given.rows, 4))),
        tuple(f"class {k}" for k in range(given.classes)),
        None,
        method(
            "ds-fl",
            rule=rule,
            student_rule="mean" if rule == "clusters" else "",
            sharpen="none",
            codec=given.codec,
            codec_down="u8",
        ),
        names,
        seed=7,
        quorum=1,
        limit=1 << 30,
    )
    plan, answers, seen = server.plan(1), list[Answer](), set[str]()
    before, payloads, door, checking = resident("VmRSS"), 0, 0.0, 0.0
    for number, name in enumerate(names):
        message = upload(plan, server, number, given.scale)
        payloads += len(message.payload)
        data = message.to_bytes()
        del message
        forget_peak()
        held, began = resident("VmRSS"), time.process_time()
        answers.append(server.check(data, plan, name, seen))
        checking += time.process_time() - began
        door = max(door, resident("VmHWM") - held)
    del data
    forget_peak()
    began = time.process_time()
    server.combine(plan, answers)
    combining = time.process_time() - began
    mega = 1 << 20
    line = {
        "rule": rule,
        "codec": given.codec,
        "clients": given.clients,
        "rows": given.rows,
        "classes": given.classes,
        "payload_mb": round(payloads / mega),
        "kept_mb": round(sum(answer.said.nbytes for answer in answers) / mega),
        "door_mb": round(door),
        "peak_mb": round(resident("VmHWM") - before - payloads / mega),
        "check_s": round(checking, 2),
        "combine_s": round(combining, 2),
    }
    if 8 * given.clients * given.rows * given.classes <= given.stacked << 20:
        forget_peak()
        began = time.process_time()
        wanted = stacked(server, answers)
        line["stacked_s"] = round(time.process_time() - began, 2)
        line["stacked_peak_mb"] = round(resident("VmHWM") - before - payloads / mega)
        assert server.targets is not None
        found = server.targets.probs()
        line["equal"] = bool(np.array_equal(found, wanted))
    return line | {"load": round(os.getloadavg()[0], 2)}


def tell(rule: str, given: argparse.Namespace) -> None:
    """Measure and print."""
    with threadpool_limits(1):
        print(json.dumps(measure(rule, given)), flush=True)


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description="Memory of the server's half, JSON lines.")
    for option, usual in (("clients", 100), ("rows", 10_000), ("classes", 1000), ("stacked", 512)):
        parser.add_argument(f"--{option}", type=int, default=usual)
    parser.add_argument("--codec", default="u8")
    parser.add_argument("--scale", type=float, default=1.5)
    parser.add_argument("--rules", default="mean,distribution-weighted,trimmed-mean,krum")
    given = parser.parse_args()
    for rule in given.rules.split(","):
        process = multiprocessing.get_context("spawn").Process(target=tell, args=(rule, given))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
