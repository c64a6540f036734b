"""What a ledger refuses: edits, damage, other versions, full disks, two writers."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedistill.errors import BudgetExceeded, LedgerError
from fedistill.privacy import ledger_file
from fedistill.privacy.chain import COLUMNS
from fedistill.privacy.events import Gaussian, Sampled, Spending
from fedistill.privacy.ledger import Entry, Ledger

DELTA = 1e-5
CHEAP = Spending.of(Gaussian(50.0))
RUN = Spending.of(Sampled(0.05, 1.0), 200)
SHA = "a" * 64


def reserve(ledger: Ledger, round: int, **changes: Any) -> Entry:
    asked: dict[str, Any] = {
        "run": "run",
        "round": round,
        "mechanism": "dpsgd",
        "spending": CHEAP,
        "unit": "record",
        "relation": "add-remove",
        "units": [b"a", b"b"],
        "epsilon": 100.0,
        "delta": DELTA,
    }
    return ledger.reserve(**{**asked, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of four rows in three rounds, closed as after a restart."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.release(reserve(ledger, 1), SHA)
    reserve(ledger, 2, units=[b"b", b"c"])
    reserve(ledger, 3)
    ledger.close()
    return tmp_path / "ledger.sqlite"


def edit(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def refused(path: Path, match: str) -> None:
    """Nothing can be read, reserved or released any more."""
    tries: list[Callable[[Ledger], object]] = [
        Ledger.entries,
        Ledger.verify,
        lambda ledger: ledger.head,
        lambda ledger: ledger.spent(DELTA),
        lambda ledger: reserve(ledger, 9),
        lambda ledger: ledger.acknowledge_loss(1.0, 1e-7),
        lambda ledger: ledger.tombstone([b"a"]),
    ]
    for attempt in tries:
        with pytest.raises(LedgerError, match=match) as told:
            attempt(Ledger(path))
        assert "\n" not in str(told.value)


# --- fault 38: edited by hand --------------------------------------------------------------------

EDITS = {
    "seq": "99",
    "entry_id": "'run/9/1'",
    "kind": "'void'",
    "time": "'2020-01-01T00:00:00+00:00'",
    "run": "'other'",
    "round": "9",
    "mechanism": "'none'",
    "spending": "'[]'",
    "unit": "'user'",
    "relation": "'replace-one'",
    "epsilon": "1000.0",
    "delta": "0.5",
    "cohorts": "'[]'",
    "splits": "'{}'",
    "touched": "''",
    "members": "''",
    "release_sha256": "''",
    "heads": "'[\"0\"]'",
    "prev": "''",
    "hash": "''",
}


@pytest.mark.parametrize("column", COLUMNS)
def test_fault_38_any_column_that_was_edited(path: Path, column: str) -> None:
    edit(path, f"UPDATE entry SET {column} = {EDITS[column]} WHERE seq = 3")
    refused(path, "was edited, row 3 does not")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET round = 2.0000001 WHERE seq = 3",
        "UPDATE entry SET spending = x'00ff' WHERE seq = 3",
        "UPDATE entry SET epsilon = NULL WHERE seq = 3",
        "DELETE FROM entry WHERE seq = 3",
    ],
)
def test_fault_38_other_edits_of_a_row(path: Path, statement: str) -> None:
    edit(path, statement)
    refused(path, "was edited, row 3 does not")


def test_fault_38_a_row_that_was_put_in(path: Path) -> None:
    names = ", ".join(COLUMNS)
    changed = {"seq": "5", "entry_id": "'run/3/1'", "kind": "'void'", "hash": "'x'"}
    values = ", ".join(changed.get(name, name) for name in COLUMNS)
    edit(path, f"INSERT INTO entry ({names}) SELECT {values} FROM entry WHERE seq = 4")
    refused(path, "was edited, row 5 does not follow")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE member SET cohort = '9-1' WHERE cohort = '3-1'",
        "UPDATE member SET erased = 1",
        "DELETE FROM member WHERE cohort = '3-1'",
        "INSERT INTO member VALUES (x'00', '1-1', 0)",
        "UPDATE member SET unit = x'00' WHERE cohort = '3-1'",
        "UPDATE member SET unit = hex(unit)",
    ],
)
def test_fault_38_who_is_in_a_cohort(path: Path, statement: str) -> None:
    edit(path, statement)
    refused(path, "was edited, who is in which cohort, .* is not what row 4 says")


def exchange_key(path: Path) -> None:
    """Another key, and its mark where that of the true one was."""
    other = os.urandom(32)
    path.with_suffix(".key").write_bytes(other)
    edit(path, f"UPDATE meta SET value = '{ledger_file._mark(other)}' WHERE name = 'key'")


def test_fault_38_another_key_under_which_everybody_is_a_newcomer(path: Path) -> None:
    exchange_key(path)
    refused(path, "was edited, who is in which cohort, or under which key, .* row 4 says")


def test_fault_38_a_key_that_is_exchanged_while_the_ledger_is_open(path: Path) -> None:
    ledger = Ledger(path)
    reserve(ledger, 4)
    exchange_key(path)
    with pytest.raises(LedgerError, match="or under which key"):
        reserve(ledger, 5)


def test_fault_38_an_edit_is_seen_by_a_process_that_has_it_open(path: Path) -> None:
    ledger = Ledger(path)
    entry = reserve(ledger, 5)
    edit(path, "UPDATE entry SET epsilon = 1000.0 WHERE seq = 3")
    with pytest.raises(LedgerError, match="row 3"):
        ledger.release(entry, SHA)


def test_rows_cut_off_at_the_end_are_seen_by_the_head_alone(path: Path) -> None:
    head = Ledger(path).head
    edit(path, "DELETE FROM entry WHERE seq = 4")
    shorter = Ledger(path)
    shorter.verify()
    assert not shorter.holds(head)


def test_fault_37_a_restored_backup_does_not_hold_the_head(path: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup.sqlite"
    shutil.copy(path, backup)
    ledger = Ledger(path)
    head = reserve(ledger, 4).hash
    ledger.close()
    shutil.copy(backup, path)
    restored = Ledger(path)
    restored.verify()
    assert not restored.holds(head)
    restored.acknowledge_loss(0.5, 1e-7, [head])
    assert restored.holds(head)
    assert not restored.holds("0" * 64)
    assert Ledger(path).holds(restored.head)


def test_fault_37_a_deleted_ledger_does_not_hold_the_head(path: Path) -> None:
    ledger = Ledger(path)
    head = ledger.head
    ledger.close()
    path.unlink()
    assert not Ledger(path).holds(head)


def test_fault_37_a_file_that_is_gone_while_its_log_is_there(path: Path) -> None:
    path.unlink()
    log = path.with_name(path.name + "-wal")
    log.write_bytes(b"pages")
    with pytest.raises(LedgerError, match="is gone, its -wal file is still there"):
        reserve(Ledger(path), 9)
    Ledger(path).acknowledge_loss(1.0, 1e-7)
    assert [entry.kind for entry in Ledger(path).entries()] == ["loss"]


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_fault_37_a_file_that_goes_while_it_is_in_use(path: Path, how: str) -> None:
    ledger = Ledger(path)
    entry = reserve(ledger, 4)
    if how == "replaced":
        copy = path.with_name("copy")
        shutil.copy(path, copy)
        copy.replace(path)
    else:
        path.unlink()
    for attempt in (lambda: ledger.release(entry, SHA), lambda: reserve(ledger, 5), ledger.entries):
        with pytest.raises(LedgerError, match="was replaced or deleted while it was in use"):
            attempt()


# --- damaged, newer, without its key -------------------------------------------------------------


@pytest.mark.parametrize("eighths", range(8))
def test_a_file_that_was_cut_short(path: Path, eighths: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * eighths // 8])
    refused(path, "is damaged")


def test_a_file_that_is_no_ledger(path: Path) -> None:
    path.write_bytes(b"seq,epsilon\n1,0.1\n" * 100)
    refused(path, "is damaged")


def test_another_database(path: Path) -> None:
    path.unlink()
    edit(path, "CREATE TABLE entry (x)", "CREATE TABLE meta (name, value)")
    refused(path, "is damaged")


def test_fault_36_a_newer_version(path: Path) -> None:
    edit(path, "UPDATE meta SET value = '2' WHERE name = 'schema'")
    refused(path, "has version 2, this is made for 1: it needs a newer fedistill")


@pytest.mark.parametrize("value", ["'none'", "'0'", "NULL"])
def test_a_version_that_is_none(path: Path, value: str) -> None:
    edit(
        path,
        "CREATE TABLE other (name TEXT, value TEXT)",
        "INSERT INTO other SELECT * FROM meta",
        "DROP TABLE meta",
        "ALTER TABLE other RENAME TO meta",
        f"UPDATE meta SET value = {value} WHERE name = 'schema'",
    )
    refused(path, "is damaged")


@pytest.mark.parametrize("lost", [True, False])
def test_without_its_key_nothing_is_reserved(path: Path, lost: bool) -> None:
    home = path.with_suffix(".key")
    home.unlink() if lost else home.write_bytes(bytes(32))
    ledger = Ledger(path)
    assert len(ledger.entries()) == 4
    assert ledger.spent(DELTA) > 0
    with pytest.raises(LedgerError, match=f"must be the key .*, found {'none' if lost else 'an'}"):
        reserve(ledger, 4)


# --- faults 31 and 32: the disk ------------------------------------------------------------------


def test_fault_31_a_full_disk_debits_and_releases_nothing(path: Path) -> None:
    ledger = Ledger(path)
    before = ledger.entries()
    db = ledger._file._opened()
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    many = [str(number).encode() for number in range(3000)]
    with pytest.raises(LedgerError, match=r"the disk is full or failing: nothing is released"):
        reserve(ledger, 4, units=many)
    assert ledger.entries() == before
    db.execute("PRAGMA max_page_count = 1000000")
    reserve(ledger, 4, units=many)
    ledger.verify()


def test_fault_32_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"cannot use .*ledger\.sqlite: .*; nothing is released"):
        reserve(Ledger(tmp_path / "file" / "ledger.sqlite"), 1)


def test_fault_32_a_ledger_that_cannot_be_written(path: Path) -> None:
    ledger = Ledger(path)
    ledger.entries()
    ledger._file._opened().execute("PRAGMA query_only = 1")
    with pytest.raises(LedgerError, match=r"cannot write to .*make the file and folder writable"):
        reserve(ledger, 4)


@pytest.mark.parametrize("call", ["link", "fsync", "open"])
def test_fault_31_a_disk_that_is_full_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    home = tmp_path / "ledger.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(LedgerError, match="no space left on device; nothing is released"):
            reserve(Ledger(home), 1)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    reserve(Ledger(home), 1)


# --- fault 39: two processes ---------------------------------------------------------------------


def test_fault_39_the_second_waits_and_then_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_file, "WAIT", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match=r"was in use by another process for 0\.05 s"):
            reserve(Ledger(path), 4)
    reserve(Ledger(path), 4)


def test_fault_39_what_another_process_spends_meanwhile_is_seen(tmp_path: Path) -> None:
    """It was affordable when it was computed, and no longer when it was to be written."""
    first, second = Ledger(tmp_path / "ledger.sqlite"), Ledger(tmp_path / "ledger.sqlite")
    asked = []

    def fits() -> bool:
        asked.append(first.entries())
        if len(asked) == 1:
            reserve(second, 1, spending=RUN, epsilon=5.0)
            return True
        return False

    with pytest.raises(BudgetExceeded) as refusal:
        reserve(first, 2, spending=RUN, epsilon=5.0, fits=fits)
    assert [len(entries) for entries in asked] == [0, 1]
    assert refusal.value.spent == pytest.approx(4.766, rel=1e-3)
    assert [entry.round for entry in first.entries()] == [1]


WRITER = """
import sys
from pathlib import Path
from fedistill.privacy.events import Gaussian, Spending
from fedistill.privacy.ledger import Ledger

ledger = Ledger(Path(sys.argv[1]))
for round in range(10):
    entry = ledger.reserve(
        run=sys.argv[2], round=round, mechanism="dpsgd", spending=Spending.of(Gaussian(50.0)),
        unit="record", relation="add-remove", units=[b"a", sys.argv[2].encode()], epsilon=9.0,
        delta=1e-5,
    )
    ledger.release(entry, "a" * 64)
"""


def test_fault_39_three_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    home = tmp_path / "ledger.sqlite"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(home), name])
        for name in ("x", "y", "z")
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    ledger = Ledger(home)
    ledger.verify()
    assert len(ledger.entries()) == 60
    assert ledger.worst([b"a"], DELTA) == CHEAP * 30
    assert ledger.worst([b"x"], DELTA) == CHEAP * 10
    assert ledger.unreleased() == ()


def test_a_forked_process_opens_the_ledger_anew(path: Path) -> None:
    ledger = Ledger(path)
    reserve(ledger, 4)
    child = os.fork()
    if child == 0:
        try:
            reserve(ledger, 5)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    reserve(ledger, 6)
    Ledger(path).verify()
    assert [e.round for e in ledger.entries() if e.kind == "reserve"] == [1, 2, 3, 4, 5, 6]
