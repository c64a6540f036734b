"""Rows that arrive at a real site as files: each is met once, in order, and survives restarts."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedistill import config, deployment, plan
from fedistill.deployment import open_site
from fedistill.errors import DataError
from fedistill.incoming import Incoming
from fedistill.types import Rows, fingerprint_classes
from fedistill.wire.messages import Plan, RowSpec, Upload

PUBLIC = "age,dose\n" + "\n".join(f"{20 + k},{k % 7}" for k in range(30))


def rows_of(count: int, start: int = 0) -> str:
    lines = [f"{k % 5},{('healthy', 'ill')[k % 2]},{30 + k}" for k in range(start, start + count)]
    return "dose,diagnosis,age\n" + "\n".join(lines)


AGREED = """
seed = 3
[data]
label = "diagnosis"
path = "."
[proxy]
path = "csv:public.csv"
rows = 30
[clients]
count = 2
quorum = 1
model = "mlp"
width = 8
epochs = 1
[continual]
buffer = 10
drift = "adwin"
quorum = 1
[backend]
name = "flower"
device = "cpu"
[deployment]
sites = ["north", "south"]
classes = ["healthy", "ill"]
proxy_sha256 = "FINGERPRINT"
"""
SITE = """
id = "north"
[data]
source = "csv:own.csv"
arrivals = "csv:new/*.csv"
test_rows = 0.25
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("FEDISTILL_DATA", raising=False)
    (tmp_path / "public.csv").write_text(PUBLIC)
    (tmp_path / "own.csv").write_text(rows_of(24))
    (tmp_path / "new").mkdir()
    (tmp_path / "site.toml").write_text(SITE)
    agreed = config.parse(AGREED.replace("FINGERPRINT", ""))
    with contextlib.chdir(tmp_path):
        mark = deployment.public_rows(agreed).proxy.fingerprint
    (tmp_path / "federation.toml").write_text(AGREED.replace("FINGERPRINT", mark))
    return tmp_path


def ask(folder: Path, number: int, **changes: object) -> Upload:
    """One round in a process of its own, as a real site answers it."""
    place = open_site(folder)
    asked = Plan(
        run="r",
        round=number,
        ask=RowSpec(1, number, 30, 30),
        proxy=place.site.proxy.fingerprint,
        classes=fingerprint_classes(place.site.classes),
        **{"watch": True} | changes,  # type: ignore[arg-type]
    )
    upload = Upload.from_bytes(place.answer(asked.to_bytes()))
    kept = open_site(folder)
    kept.site.recall(asked)
    ask.position = kept.site.position  # type: ignore[attr-defined]
    ask.met = [(one.position, one.rows) for one in kept.site.met]  # type: ignore[attr-defined]
    return upload


def test_each_file_is_met_once_in_order_of_names(folder: Path) -> None:
    ask(folder, 1)
    assert ask.met == [(0, 18)]
    ask(folder, 2)
    assert ask.met == [(0, 18)]  # nothing came: the rows of the day stay
    (folder / "new" / "2026-02.csv").write_text(rows_of(6, 100))
    (folder / "new" / "2026-01.csv").write_text(rows_of(5, 200))
    ask(folder, 3)
    assert ask.met == [(0, 18), (1, 5)]
    (folder / "new" / "2025-12.csv").write_text(rows_of(7, 300))  # late, and takes no one's place
    ask(folder, 4)
    assert ask.met == [(0, 18), (1, 5), (2, 7)]
    ask(folder, 5)
    assert ask.met == [(0, 18), (1, 5), (2, 7), (3, 6)]
    told = json.loads((folder / "state" / "arrivals.json").read_text())
    assert told == ["2026-01.csv", "2025-12.csv", "2026-02.csv"]


def test_asked_twice_a_site_takes_no_further_file(folder: Path) -> None:
    ask(folder, 1)
    for name in ("a", "b"):
        (folder / "new" / f"{name}.csv").write_text(rows_of(5, 100))
    first = ask(folder, 2)
    assert ask(folder, 2) == first
    assert ask.position == 1


def test_no_file_is_taken_up_in_a_round_of_distillation(folder: Path) -> None:
    ask(folder, 1)
    (folder / "new" / "a.csv").write_text(rows_of(5, 100))
    ask(folder, 2, consolidate=True, extra=1)
    assert ask.met == [(0, 18)]
    ask(folder, 3, extra=1)
    assert ask.met == [(0, 18), (1, 5)]


def test_a_site_that_starts_without_rows_teaches_when_some_come(folder: Path) -> None:
    text = (folder / "site.toml").read_text().replace('source = "csv:own.csv"', 'source = ""')
    (folder / "site.toml").write_text(text)
    assert ask(folder, 1).share == "none"
    (folder / "new" / "a.csv").write_text(rows_of(8, 100))
    upload = ask(folder, 2)
    assert (upload.share, upload.size) == ("probs", 8)


def test_a_file_that_is_gone_or_broken_is_named(folder: Path) -> None:
    ask(folder, 1)
    (folder / "new" / "a.csv").write_text("dose,age\n1,2\n")
    with pytest.raises(DataError, match="diagnosis"):
        ask(folder, 2)
    (folder / "new" / "a.csv").write_text(rows_of(5, 100))  # mended, it is taken up
    ask(folder, 2)
    assert ask.position == 1
    shutil.rmtree(folder / "new")
    with pytest.raises(DataError, match=r"expected a\.csv, .* found it gone"):
        ask(folder, 3)


def test_only_what_is_there_counts(tmp_path: Path) -> None:
    none = Rows(np.empty((0, 1)), np.empty(0, dtype=np.int64))
    index = tmp_path / "state" / "arrivals.json"
    course = Incoming(none, "csv:new/*.csv", tmp_path, index, lambda source: none)
    assert course.position(1, -1) == 0
    assert course.position(2, 0) == 0
    assert course.rows(0) is none
    assert not index.exists()
    with pytest.raises(DataError, match="number 3"):
        course.rows(3)


def test_a_site_says_what_it_remembers_and_that_it_stays(folder: Path) -> None:
    told = "\n".join(plan.describe_site(folder))
    assert "arrivals  csv:new/*.csv" in told
    assert "memory    10 own rows" in told
