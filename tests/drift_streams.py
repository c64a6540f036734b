"""Streams on which our detectors must alarm where river 0.26.1 does.

``river_alarms.json`` holds river's alarms, so that the comparison needs no river. With it
installed, FEDISTILL_RIVER_ALARMS=write renews the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.continual.watcher import Detector
from fedistill.seeding import generator

GOLDEN = Path(__file__).parent / "continual" / "river_alarms.json"
Stream = npt.NDArray[np.float64]


def bell(name: str, n: int) -> Stream:
    """Nearly normal, from uniform numbers only: the same bits with every NumPy."""
    return generator("drift", name).random((n, 12)).sum(axis=1) - 6.0


def flips(name: str, *chances: float, each: int = 1500) -> Stream:
    return np.concatenate(
        [
            (generator("drift", name, i).random(each) < chance).astype(np.float64)
            for i, chance in enumerate(chances)
        ]
    )


def streams() -> dict[str, Stream]:
    n = np.arange(4000)
    return {
        "errors": flips("errors", 0.1, 0.15, 0.3, 0.05, 0.9),
        "confidence": np.clip(np.where(n < 2500, 0.9, 0.8) + 0.07 * bell("confidence", 4000), 0, 1),
        "slope": n / 4000 + 0.1 * bell("slope", 4000),
        "wide": 50.0 * bell("wide", 4000) + 100.0 * (n > 2000),
        "recurring": 0.3 * (n // 500 % 2) + 0.1 * bell("recurring", 4000),
        "walk": np.add.accumulate(bell("walk", 4000)) / 100.0,
        "rounded": np.round(generator("drift", "rounded").random(4000), 1) + 0.25 * (n // 900 % 2),
        "calm": 0.5 + 0.05 * bell("calm", 4000),
        "constant": np.full(1000, 0.3),
    }


def same_streams() -> str:
    """A digest, to tell a changed stream from a changed detector."""
    text = b"".join(stream.astype("<f8").tobytes() for stream in streams().values())
    return hashlib.sha256(text).hexdigest()


def blocks(detector: Detector, stream: Stream, size: int) -> list[int]:
    """All alarms of a stream cut into blocks."""
    found: list[int] = []
    for start in range(0, len(stream), size):
        detector.update(stream[start : start + size])
        found += detector.alarms
    return found


def river_alarms(made: Any, stream: Stream) -> list[int]:
    found = []
    for row, value in enumerate(stream.tolist()):
        made.update(value)
        if made.drift_detected:
            found.append(row)
    return found


def golden(name: str, options: list[dict[str, Any]], river: Any = None) -> dict[str, Any]:
    """What river said, of one detector: ``{"options as JSON / stream": alarms}``.

    With ``river`` (its class) it is asked again; and the file renewed, where the variable says so.
    """
    held = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if river is None:
        assert held["streams"] == same_streams(), "the streams changed, not the detectors"
        found: dict[str, Any] = held[name]
        return found
    asked = {
        f"{json.dumps(option)} / {key}": river_alarms(river(**option), stream)
        for option in options
        for key, stream in streams().items()
    }
    if os.environ.get("FEDISTILL_RIVER_ALARMS") == "write":
        held |= {"river": "0.26.1", "streams": same_streams(), name: asked}
        text = json.dumps(held, indent=1, sort_keys=True)
        GOLDEN.write_text(re.sub(r"(?<=[\[\d,])\s+(?=[\d\]])", "", text) + "\n")
    return asked
