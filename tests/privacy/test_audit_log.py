"""The audit log shows every change, survives a kill at any moment, and holds no raw value."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fedistill.errors import LedgerError
from fedistill.privacy import audit_log
from fedistill.privacy.audit_log import EVENTS, FIELDS, START, AuditLog, entries, verify

RUN = "ab12"


@pytest.fixture
def log(tmp_path):
    return AuditLog(tmp_path / "site" / "audit-log.jsonl")


@pytest.fixture
def filled(log):
    """Five entries of a run of one round."""
    log.append("run_begun", run=RUN, purpose="readmission", mechanism="dpsgd", limit=3.0)
    log.append("charged", run=RUN, round=1, epsilon=1.25, delta=1e-5, sigma=1.1, entry=1)
    log.append("released", run=RUN, round=1, sha256="0f" * 32)
    log.append("refused", run=RUN, round=2, reason="proxy_version")
    log.append("exhausted", run=RUN, round=2, epsilon=1.25, limit=3.0)
    return log


def lines(log):
    return log.path.read_bytes().split(b"\n")[:-1]


def rewrite(log, found):
    log.path.write_bytes(b"".join(line + b"\n" for line in found))


def head(log):
    return log.path.with_name(f"{log.path.name}.head")


# --- a whole log ---------------------------------------------------------------------------------


def test_entries_come_back_in_order_and_each_names_the_one_before(filled):
    found = verify(filled.path)
    assert [entry["event"] for entry in found.entries] == [
        "run_begun",
        "charged",
        "released",
        "refused",
        "exhausted",
    ]
    assert [entry["seq"] for entry in found.entries] == [1, 2, 3, 4, 5]
    assert [entry["prev"] for entry in found.entries] == [
        START,
        *(entry["hash"] for entry in found.entries[:-1]),
    ]
    assert found.entries[1]["epsilon"] == 1.25
    assert found.head == found.entries[-1]["hash"]
    assert found.torn == 0
    assert entries(filled.path, 2) == found.entries[-2:]


def test_the_hash_is_sha256_over_canonical_json(filled):
    entry = json.loads(lines(filled)[2])
    told = entry.pop("hash")
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == told


def test_a_hash_kept_elsewhere_is_found_or_missed(filled):
    old = verify(filled.path).head
    filled.append("resent", run=RUN, round=1)
    assert verify(filled.path, head=old).head != old
    with pytest.raises(LedgerError, match="expected an entry with the hash 00000000"):
        verify(filled.path, head="0" * 64)


def test_only_the_owner_may_read(filled):
    assert filled.path.stat().st_mode & 0o077 == 0


def test_a_log_that_is_not_there(tmp_path):
    assert entries(tmp_path / "none") == ()
    with pytest.raises(LedgerError, match="expected an audit log, found none"):
        verify(tmp_path / "none")


# --- changes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"seq":', b'"seq": '), (b'"time":"20', b'"time":"19'), (b'"run":"ab12"', b'"run":"x"')],
)
def test_an_edited_line_is_named(place, old, new, filled):
    found = lines(filled)
    assert old in found[place]
    found[place] = found[place].replace(old, new)
    rewrite(filled, found)
    with pytest.raises(LedgerError, match=rf"line {place + 1}: .*edited"):
        verify(filled.path)


def test_an_edited_line_with_a_hash_that_fits_breaks_the_chain_after_it(filled):
    found = lines(filled)
    entry = json.loads(found[1]) | {"epsilon": 0.5}
    entry["hash"] = audit_log._hash(entry)
    found[1] = audit_log._canonical(entry)
    rewrite(filled, found)
    with pytest.raises(LedgerError, match="line 3: expected entry 3 with the hash of the one bef"):
        verify(filled.path)


def test_an_edited_last_line_with_a_hash_that_fits_is_not_what_the_head_file_knows(filled):
    found = lines(filled)
    entry = json.loads(found[-1]) | {"limit": 30.0}
    entry["hash"] = audit_log._hash(entry)
    rewrite(filled, [*found[:-1], audit_log._canonical(entry)])
    for check in (lambda: verify(filled.path), lambda: filled.append("resent")):
        with pytest.raises(LedgerError, match=r"entry 5: expected the hash in audit-log.jsonl.he"):
            check()


@pytest.mark.parametrize("place", range(4))
def test_a_removed_line_is_named(place, filled):
    found = lines(filled)
    del found[place]
    rewrite(filled, found)
    with pytest.raises(LedgerError, match=rf"line {place + 1}: .*removed, added or moved"):
        verify(filled.path)


def test_lines_that_changed_places_are_named(filled):
    found = lines(filled)
    found[1], found[2] = found[2], found[1]
    rewrite(filled, found)
    with pytest.raises(LedgerError, match=r"line 2: .*found entry 3"):
        verify(filled.path)


def test_a_line_twice_is_named(filled):
    found = lines(filled)
    rewrite(filled, [*found[:2], *found[1:]])
    with pytest.raises(LedgerError, match=r"line 3: .*found entry 2"):
        verify(filled.path)


@pytest.mark.parametrize("kept", range(5))
def test_a_log_cut_at_its_end_is_refused_and_not_written_to(kept, filled):
    rewrite(filled, lines(filled)[:kept])
    for check in (lambda: verify(filled.path), lambda: filled.append("resent")):
        with pytest.raises(LedgerError, match=rf"line {kept + 1}: .*the last lines were removed"):
            check()


def test_a_log_cut_within_a_line_that_was_whole_is_refused(filled):
    text = filled.path.read_bytes()
    filled.path.write_bytes(text[:-20])
    for check in (lambda: verify(filled.path), lambda: filled.append("resent")):
        with pytest.raises(LedgerError, match=r"line 5: .*the last lines were removed"):
            check()


@pytest.mark.parametrize("junk", [b"junk", b"[]", b"", b"\xff\xfe"])
def test_a_line_of_something_else_is_named(junk, filled):
    found = lines(filled)
    rewrite(filled, [*found[:2], junk, *found[2:]])
    with pytest.raises(LedgerError, match="line 3: expected an entry, found other bytes"):
        verify(filled.path)


def test_a_new_log_in_place_of_an_old_one_is_refused(filled):
    filled.path.unlink()
    with pytest.raises(LedgerError, match="expected entry 1 of 5, found the end of the log"):
        filled.append("run_begun", run=RUN)


@pytest.mark.parametrize("told", [None, b"", b"{}", b"junk", b'{"seq":"5","hash":"x"}'])
def test_a_head_file_that_is_gone_or_damaged_is_refused(told, filled):
    head(filled).unlink()
    if told is not None:
        head(filled).write_bytes(told)
    with pytest.raises(LedgerError, match=r"expected the file audit-log\.jsonl\.head"):
        verify(filled.path)


# --- crashes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1, 30, 150])
def test_a_torn_line_is_noticed_kept_and_stated_by_the_next_entry(share, filled):
    torn = lines(filled)[1][:share]
    with filled.path.open("ab") as file:
        file.write(torn)
    assert verify(filled.path).torn == len(torn)
    filled.append("resent", run=RUN, round=1)
    found = verify(filled.path)
    assert [entry["event"] for entry in found.entries[-3:]] == ["exhausted", "torn", "resent"]
    assert found.entries[-2]["sha256"] == hashlib.sha256(torn).hexdigest()
    assert found.entries[-2]["bytes"] == len(torn)
    assert torn in lines(filled), "it stays where it was"


def test_a_crash_while_a_torn_line_is_stated_is_stated_too(filled):
    with filled.path.open("ab") as file:
        file.write(b'{"torn": 1' + b"\n" + b'{"event":"torn","by')
    filled.append("resent", run=RUN, round=1)
    assert [entry["event"] for entry in verify(filled.path).entries[-2:]] == ["torn", "resent"]


@pytest.mark.parametrize("tail", [b"\n", b"\n\n", b"x\n", b"x\n\n"])
def test_line_ends_after_a_crash_do_not_confuse(tail, filled):
    with filled.path.open("ab") as file:
        file.write(tail)
    filled.append("resent", run=RUN, round=1)
    filled.append("resent", run=RUN, round=1)
    assert [e["event"] for e in verify(filled.path).entries[-3:]] == ["torn", "resent", "resent"]


def test_the_first_line_may_be_torn_as_well(log):
    log.path.parent.mkdir()
    log.path.write_bytes(b'{"epsi')
    log.append("run_begun", run=RUN)
    assert [entry["event"] for entry in verify(log.path).entries] == ["torn", "run_begun"]


def test_torn_bytes_that_were_changed_afterwards_are_refused(filled):
    with filled.path.open("ab") as file:
        file.write(b'{"torn": 1')
    filled.append("resent", run=RUN, round=1)
    rewrite(filled, [line.replace(b'{"torn": 1', b'{"torn": 2') for line in lines(filled)])
    with pytest.raises(LedgerError, match="line 6: expected the torn bytes in quarantine"):
        verify(filled.path)


def test_a_whole_entry_without_its_line_end_is_an_entry(filled):
    filled.path.write_bytes(filled.path.read_bytes()[:-1])
    filled.append("resent", run=RUN, round=1)
    assert len(verify(filled.path).entries) == 6


def test_a_head_file_that_a_crash_left_behind_is_in_order(filled):
    before = head(filled).read_bytes()
    filled.append("resent", run=RUN, round=1)
    head(filled).write_bytes(before)
    assert len(verify(filled.path).entries) == 6
    filled.append("resent", run=RUN, round=1)
    assert len(verify(filled.path).entries) == 7


WRITER = """
import sys
from pathlib import Path
from fedistill.privacy.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]))
while True:
    log.append("charged", run="ab12", round=1, epsilon=0.5, sigma=1.0)
    print("written", flush=True)
"""


def writers(log, count):
    command = [sys.executable, "-c", WRITER, str(log.path)]
    return [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]


def killed(processes, seconds):
    """Entries that each acknowledged before it was killed."""
    for process in processes:
        assert process.stdout.readline() == b"written\n"
    time.sleep(seconds)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    return sum(1 + len(process.communicate()[0].splitlines()) for process in processes)


def test_after_a_kill_the_chain_holds_and_nothing_acknowledged_is_missing(log):
    told = 0
    for wait in (0.0, 0.003, 0.01, 0.02):
        told += killed(writers(log, 1), wait)
        assert len(verify(log.path).entries) >= told
    log.append("run_begun", run=RUN)
    verify(log.path)


@pytest.mark.slow
def test_a_hundred_kills(log):
    told = 0
    for number in range(100):
        told += killed(writers(log, 1), number * 0.0007)
        assert len(verify(log.path).entries) >= told


def test_several_processes_write_one_chain(log):
    told = killed(writers(log, 3), 0.1)
    assert told <= len(verify(log.path).entries) <= told + 3


def test_several_threads_write_one_chain(log):
    def write():
        for number in range(20):
            log.append("released", run=RUN, round=number)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verify(log.path).entries) == 80


def test_a_disk_that_fills_up_is_an_error_and_the_next_entry_states_what_was_left(
    filled, monkeypatch
):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, text: write(handle, text[:40]))
    with pytest.raises(LedgerError, match="no room for a whole entry"):
        filled.append("resent", run=RUN, round=1)
    monkeypatch.undo()
    filled.append("resent", run=RUN, round=1)
    assert [entry["event"] for entry in verify(filled.path).entries[-2:]] == ["torn", "resent"]


# --- what an entry may hold ----------------------------------------------------------------------


def test_there_is_no_field_for_anything_of_a_row():
    told = {*audit_log.OWN, *FIELDS}
    assert not told & {"row", "rows_ids", "label", "labels", "value", "path", "text", "id", "ids"}
    assert len(told) == len(audit_log.OWN) + len(FIELDS)
    assert all(meaning for meaning in EVENTS.values())


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("nonsense", {}),
        ("torn", {}),
        ("charged", {"label": 1}),
        ("charged", {"epsilon": "high"}),
        ("charged", {"round": 1.5}),
        ("charged", {"round": True}),
        ("charged", {"run": b"x"}),
        ("charged", {"hash": "0"}),
        ("released", {"sha256": ["0"]}),
    ],
)
def test_what_is_unknown_is_an_error_that_quotes_no_value_and_writes_nothing(event, fields, log):
    with pytest.raises(TypeError) as caught:
        log.append(event, **fields)
    assert "high" not in str(caught.value)
    assert not log.path.exists()


def test_texts_are_escaped_cut_or_withheld(log):
    log.append(
        "refused",
        run="a\nb\x1b[2J\u202e" + "x" * 500,
        purpose="row 7 <b>",
        reason="could not read 37.5;Smith",
        sha256="not a digest",
        mechanism="dp-head",
    )
    entry = verify(log.path).entries[0]
    assert entry["run"].startswith(r"a\nb\x1b[2J\u202exx")
    assert len(entry["run"]) == 64
    assert (entry["reason"], entry["sha256"]) == ("withheld", "withheld")
    assert (entry["purpose"], entry["mechanism"]) == ("row 7 <b>", "dp-head")
    assert len(lines(log)) == 1
    assert b"Smith" not in log.path.read_bytes()


def test_counts_of_people_are_rounded_and_what_is_not_finite_is_left_out(log):
    log.append("forgotten", units=37, rows=1000, epsilon=float("inf"), sigma=float("nan"), run=None)
    entry = verify(log.path).entries[0]
    assert (entry["units"], entry["rows"]) == (32, 1024)
    assert not {"epsilon", "sigma", "run"} & {*entry}
