"""Events: nothing private can be in one, nothing foreign can forge one, and none stops a run."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from fedistill import log
from fedistill.errors import RunError
from fedistill.log import EVENTS, FIELDS, LONGEST_TEXT, WITHHELD, event, events_to, read_events

HOSTILE = [
    'a\n{"event": "run_done", "time": "2030-01-01T00:00:00Z"}',
    "\x1b[2J\x1b[1;1Hred",
    "a\r\nb\u2028c\u2029d\x85e",
    "\u202eevil",
    "\udcff\udc80 not UTF-8",
    "x" * 100_000,
    "\x00",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def logged(path: Path, name: str, **fields: object) -> dict:
    with events_to(path):
        event(name, **fields)
    return read_events(path)[-1]


# --- fields --------------------------------------------------------------------------------------


def test_an_event_has_its_time_name_fields_and_standing_fields(path):
    with events_to(path, site="clinic-a", version="0.2"):
        event("step_done", run="ab12", round=3, bytes_up=412, seconds=1.25, accuracy=0.5)
        event("plan_received", site="other")
    first, second = read_events(path)
    time = datetime.fromisoformat(first.pop("time"))
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
    assert first == {
        "event": "step_done",
        "site": "clinic-a",
        "version": "0.2",
        "run": "ab12",
        "round": 3,
        "bytes_up": 412,
        "seconds": 1.25,
        "accuracy": 0.5,
    }
    assert second["site"] == "other"


def test_every_field_can_be_written_and_is_read_back(path):
    values = {str: "a", int: 7, float: 0.5, list: ["a", "b"]}
    given = {name: values[kind] for name, kind in FIELDS.items()}
    found = logged(path, "run_started", **given)
    assert {key: found[key] for key in FIELDS} == given


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": 3},
        {"labels": [1]},
        {"path": "/srv/patients.csv"},
        {"error": "could not convert 'Miller'"},
        {"time": "2030-01-01T00:00:00Z"},
        {"event": "run_done"},
        {"reason": ValueError("Miller")},
        {"site": b"a"},
        {"sites": "abc"},
        {"asked": [1, 2]},
        {"asked": {"a": 1}},
        {"round": "3"},
        {"round": 1.5},
        {"round": True},
        {"accuracy": True},
        {"accuracy": "0.5"},
        {"accuracy": np.array([0.5, 0.6])},
        {"kind": ValueError},
    ],
    ids=repr,
)
def test_an_unknown_field_or_another_type_is_refused_without_its_value(fields, path):
    with events_to(path), pytest.raises(TypeError) as caught:
        event("answered", **fields)
    assert "Miller" not in str(caught.value)
    assert not path.exists()
    with pytest.raises(TypeError), events_to(path, **fields):
        pass


def test_an_unknown_event_is_refused():
    with pytest.raises(TypeError, match=r'EVENTS, found "patient_seen"'):
        event("patient_seen")


def test_numbers_of_numpy_are_numbers_and_what_is_not_finite_is_left_out(path):
    found = logged(path, "answered", round=np.int64(3), accuracy=np.float32(0.5), seconds=None)
    assert (found["round"], found["accuracy"]) == (3, 0.5)
    assert "seconds" not in found
    assert "accuracy" not in logged(path, "answered", accuracy=float("nan"))
    assert "accuracy" not in logged(path, "answered", accuracy=np.float64("inf"))
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["site", "run", "method", "address", "reason", "kind", "asked"])
def test_fault_64_foreign_text_is_one_short_plain_line(text, field, path, caplog):
    caplog.set_level(logging.INFO, "fedistill.events")
    found = logged(path, "answered", **{field: [text] if field == "asked" else text})
    content = path.read_bytes()
    assert content.count(b"\n") == 1
    assert content.isascii()
    kept = found[field][0] if field == "asked" else found[field]
    assert len(kept) <= LONGEST_TEXT
    assert kept.isprintable()
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 500


def test_a_long_list_is_cut(path):
    found = logged(path, "round_started", asked=["x" * 99] * 5000)
    assert len(found["asked"]) == 1000
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize("code", ["stale_round", "failed:ValueError", "quorum", "not-probs", ""])
def test_a_code_is_written_as_it_is(code, path):
    assert logged(path, "dropped", reason=code)["reason"] == code


@pytest.mark.parametrize(
    "code", ["MemoryError", "OSError at csvfile.py:31", "KeyError at <string>:1"]
)
def test_a_kind_is_a_class_and_perhaps_a_line_of_code(code, path):
    assert logged(path, "step_failed", kind=code)["kind"] == code


@pytest.mark.parametrize("field", ["reason", "kind"])
@pytest.mark.parametrize("text", ["could not convert 'Miller'", "row 3: 0.7", "a at b at c", "a\n"])
def test_a_sentence_is_no_code_and_is_withheld(text, field, path):
    assert logged(path, "run_failed", **{field: text})[field] == WITHHELD
    assert "Miller" not in path.read_text()


# --- logging -------------------------------------------------------------------------------------


def test_levels_and_message(caplog):
    caplog.set_level(logging.INFO, "fedistill.events")
    for name in EVENTS:
        event(name, round=3, site="a")
    levels = {record.event: record.levelno for record in caplog.records}
    loud = {name for name, level in levels.items() if level == logging.WARNING}
    assert set(levels) == set(EVENTS)
    assert loud == {"dropped", "run_failed", "step_failed"}
    assert caplog.records[0].getMessage() == 'run_started round=3 site="a"'
    assert caplog.records[0].fields == {"round": 3, "site": "a"}


def test_nothing_is_printed_unless_asked_for(tmp_path):
    code = (
        "from pathlib import Path; from fedistill.log import event, events_to\n"
        "with events_to(Path('e.jsonl')): event('run_started'); event('run_failed')\n"
        "event('run_failed')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert len(read_events(tmp_path / "e.jsonl")) == 2


def test_the_file_gets_events_whatever_a_program_does_with_logging(path, monkeypatch):
    monkeypatch.setattr(log.LOGGER, "disabled", True)
    assert logged(path, "run_done")["event"] == "run_done"


def test_a_file_gets_events_only_while_its_context_is_open(path, tmp_path):
    other = tmp_path / "folder" / "other.jsonl"
    with events_to(path):
        with events_to(other):
            event("run_started")
        event("run_done")
        with pytest.raises(ZeroDivisionError), events_to(other):
            raise ZeroDivisionError
    event("run_failed")
    assert [entry["event"] for entry in read_events(path)] == ["run_started", "run_done"]
    assert [entry["event"] for entry in read_events(other)] == ["run_started"]


# --- files ---------------------------------------------------------------------------------------


def test_only_the_owner_may_read_the_file(path):
    before = os.umask(0)
    try:
        logged(path, "run_done")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_several_processes_write_whole_lines(path):
    code = (
        "import sys; from pathlib import Path; from fedistill import log\n"
        "log.LARGEST = 20_000\n"
        "with log.events_to(Path(sys.argv[1]), site=sys.argv[2]):\n"
        "    for number in range(200): log.event('answered', round=number, run='x' * 60)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), f"site-{k}"]) for k in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    files = sorted(path.parent.glob("events.jsonl*"))
    assert 3 <= len(files) <= 6  # about 90 kB in files of 20 kB
    for file in files:
        # A line that another process is just writing can look torn: an empty one is put behind it.
        for line in filter(None, file.read_text().splitlines()):
            assert json.loads(line)["event"] == "answered"
    found = read_events(path, 10_000)
    for k in range(3):
        rounds = [entry["round"] for entry in found if entry["site"] == f"site-{k}"]
        assert rounds == list(range(200))


def test_rotation_keeps_the_newest_files_and_no_more(path, monkeypatch):
    monkeypatch.setattr(log, "LARGEST", 500)
    with events_to(path):
        for number in range(200):
            event("answered", round=number)
    kept = {file.name for file in path.parent.iterdir()}
    assert kept <= {"events.jsonl", *(f"events.jsonl.{k}" for k in range(1, 6))}
    assert len(kept) >= 6 - (not path.exists())
    assert all(file.stat().st_size < 700 for file in path.parent.iterdir())
    rounds = [entry["round"] for entry in read_events(path, 10_000)]
    assert rounds == list(range(rounds[0], 200))
    assert rounds[0] > 100
    assert [entry["round"] for entry in read_events(path, 12)] == list(range(188, 200))


def test_a_file_that_another_process_puts_aside_is_left_to_it(path, monkeypatch):
    logged(path, "run_started")
    monkeypatch.setattr(log, "LARGEST", 1)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        logged(path, "run_done")
        assert [file.name for file in path.parent.iterdir()] == ["events.jsonl"]
    logged(path, "run_started")
    assert [file.name for file in path.parent.iterdir()] == ["events.jsonl.1"]


def test_a_full_disk_costs_the_event_and_not_the_run(path, monkeypatch):
    real = os.write

    def full(handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with events_to(path):
        event("run_started")
        monkeypatch.setattr(os, "write", full)
        event("round_started")
        monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:20]))
        event("round_done")
        monkeypatch.setattr(os, "write", real)
        event("run_done")
    assert [entry["event"] for entry in read_events(path)] == ["run_started", "run_done"]


def test_a_folder_that_cannot_be_written_or_has_gone_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with events_to(tmp_path / "file" / "events.jsonl"):
        event("run_started")
    home = tmp_path / "home"
    with events_to(home / "events.jsonl"):
        home.rmdir()
        event("run_done")
    assert not home.exists()


@pytest.mark.parametrize("torn", [b'{"time": "2025-', b'{"event": "x"}\n', b"\xff\xfe\n", b"[1]\n"])
def test_a_torn_or_foreign_line_is_left_out_and_the_next_one_is_whole(torn, path):
    logged(path, "run_started")
    with path.open("ab") as file:
        file.write(torn)
    assert [entry["event"] for entry in read_events(path)] == ["run_started"]
    logged(path, "run_done")
    assert [entry["event"] for entry in read_events(path)] == ["run_started", "run_done"]


def test_reading_drops_fields_of_another_type(path):
    line = {"time": "2025-01-01T00:00:00Z", "event": "answered", "run": ["x"], "round": True}
    path.write_text(json.dumps(line | {"site": "a", "patient": "b", "seconds": 1}) + "\n")
    (found,) = read_events(path)
    assert found == {"time": line["time"], "event": "answered", "site": "a", "seconds": 1}


def test_only_the_end_of_a_large_file_is_read(path, monkeypatch):
    line = b'{"time": "2025-01-01T00:00:00Z", "event": "answered", "round": %d}\n'
    path.write_bytes(b"".join(line % number for number in range(100_000)))
    read: list[int] = []

    class Counted:
        def __init__(self, file):
            self.file = file

        def seek(self, *args):
            return self.file.seek(*args)

        def read(self, size):
            read.append(size)
            return self.file.read(size)

    real = log._tail
    monkeypatch.setattr(log, "_tail", lambda file, last: real(Counted(file), last))
    assert [entry["round"] for entry in read_events(path, 3)] == [99_997, 99_998, 99_999]
    assert sum(read) <= 1 << 16
    assert len(read_events(path, 5000)) == 5000


def test_no_file_is_no_events_and_an_unreadable_one_is_told(path, tmp_path):
    assert read_events(path) == []
    path.mkdir()
    with pytest.raises(
        RunError, match=r"expected a readable file of events, found .*events\.jsonl"
    ):
        read_events(path)
