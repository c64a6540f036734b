"""A planted row is found nowhere: not in a thousand uploads, nor in a log, a report or a state."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import CLASSES, INPUTS, federation, gaussian, held_out, participants

import fedistill as fd
from fedistill.backends import Reply
from fedistill.backends.serial import Serial
from fedistill.experiment import write_report
from fedistill.log import events_to
from fedistill.store import save_json
from fedistill.types import Rows
from fedistill.wire.envelope import unseal
from fedistill.wire.messages import UPLOAD_FIELDS, Plan, Upload

PLANTED = np.array([7.1234567, -3.7654321, 5.5512345, 1.9876543], dtype=np.float32)
NAME = "Ottilie von Faber"
HOW = fd.Privacy(mechanism="dpsgd", epsilon=4.0, sample_rate=0.5, steps=4, rounds=4)
CLIENTS, ROUNDS = 10, 100


def traces() -> list[bytes]:
    """How the planted row, or whose it is, could be told."""
    found = [NAME.encode(), NAME.upper().encode()]
    for value in PLANTED.tolist():
        found += [struct.pack("<f", value), struct.pack(">f", value), struct.pack("<d", value)]
        # Fewer digits would also be the seconds of some round.
        found += [f"{value:.5f}".encode(), f"{value:.6f}".encode(), repr(value).encode()]
    return found


def people() -> list[Any]:
    clients = []
    for number, client in enumerate(participants(CLIENTS, rows=34)):
        rows = client.data
        inputs = np.concatenate([rows.inputs, PLANTED[None]])
        labels = np.append(rows.labels, number % 3)
        names = np.array(["somebody"] * len(rows) + [NAME])
        clients.append(dataclasses.replace(client, data=Rows(inputs, labels, subject=names)))
    return clients


class Listening(Serial):
    """The serial backend, with somebody who reads every message."""

    uploads: list[bytes]

    def run(self, plan: Plan) -> Iterator[Any]:
        for answer in super().run(plan):
            if isinstance(answer, Reply):
                self.uploads.append(answer.data)
            yield answer


def opened(message: bytes) -> Iterator[bytes]:
    """A message, and all that is packed in it."""
    yield message
    header, payload = unseal(message, 1 << 20)
    yield repr(header).encode()
    start = 0
    for length in header["parts"]:
        part = payload[start : start + length]
        start += length
        yield part
        try:
            yield zlib.decompress(part)
        except zlib.error:
            continue


def names_of(found: list[bytes], content: bytes) -> list[bytes]:
    return [trace for trace in found if trace in content]


@pytest.mark.parametrize("unit", ["record", "user"])
def test_a_planted_row_is_nowhere_in_a_thousand_uploads_logs_and_reports(
    tmp_path: Path, unit: str
) -> None:
    how = dataclasses.replace(HOW, unit=unit)
    uploads: list[bytes] = []

    def backend(sites: Any) -> Listening:
        heard = Listening(sites)
        heard.uploads = uploads
        return heard

    rounds = ROUNDS if unit == "record" else ROUNDS // 10
    fed = federation(people(), privacy=how, classes=CLASSES)
    with events_to(tmp_path / "events.jsonl"):
        rows = list(fed.run(rounds, held_out(), out=tmp_path, backend=backend, measure_every=50))
    assert len(uploads) == CLIENTS * rounds
    assert all(row["epsilon_max"] <= 4.0 for row in rows)
    found = traces()
    for message in uploads:
        header, _ = unseal(message, 1 << 20)
        assert set(header) == set(UPLOAD_FIELDS)
        assert Upload.from_bytes(message).size == 32  # how many rows, to a power of two
        for content in opened(message):
            assert not names_of(found, content)
    save_json(tmp_path / "summary.json", fed.summary() | {"name": "planted", "status": "done"})
    (tmp_path / "config.toml").write_text('[privacy]\nmechanism = "dpsgd"\n')
    write_report(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"report.html", "disclosure.json", "ledger.sqlite", "audit-log.jsonl"} <= names
    assert {"state", "server", "rounds.jsonl", "events.jsonl"} <= names
    for path in files:
        assert not names_of(found, path.read_bytes()), path


def test_the_search_finds_what_is_there() -> None:
    found = traces()
    assert names_of(found, b"xx" + PLANTED.tobytes() + b"yy")
    assert names_of(found, f"patient {NAME}".encode())
    assert names_of(found, repr(PLANTED.tolist()).encode())
    assert not names_of(found, gaussian(400, 3).inputs.astype("<f4").tobytes())
    assert len(PLANTED) == INPUTS
