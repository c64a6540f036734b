"""Where states of sleeping sites rest: what was put comes back, whatever grew, shrank or left."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedistill.errors import CheckpointError, FedistillError, RunError
from fedistill.state_store import DiskStore, MemoryStore, StateStore, slot_size, store_of
from fedistill.store import read_state_bytes, state_bytes

BOTH = pytest.mark.parametrize("make", [MemoryStore, DiskStore])


def state(length: int, value: int) -> bytes:
    return bytes([value]) * length


@BOTH
def test_what_was_put_last_comes_back(make: Callable[[], StateStore]) -> None:
    kept = make()
    kept.put("a", b"one")
    kept.put("b", b"two")
    kept.put("a", b"three")
    assert (kept.get("a"), kept.get("b")) == (b"three", b"two")
    kept.drop("a")
    kept.drop("a")
    with pytest.raises(KeyError):
        kept.get("a")
    assert kept.get("b") == b"two"


@BOTH
def test_states_that_grow_shrink_and_leave_are_those_of_a_plain_dict(
    make: Callable[[], StateStore],
) -> None:
    kept, naive, random = make(), {}, np.random.default_rng(3)
    for _ in range(600):
        name = f"c{random.integers(12)}"
        if name in naive and random.random() < 0.2:
            kept.drop(name)
            del naive[name]
        else:
            # of one layout mostly, with an upload that differs; now and then of another model
            size = int(random.integers(9000, 9100) * random.choice([1, 1, 1, 8]))
            naive[name] = random.bytes(size)
            kept.put(name, naive[name])
        assert {known: kept.get(known) for known in naive} == naive


def test_a_copy_has_files_of_its_own() -> None:
    kept = DiskStore()
    kept.put("a", b"one")
    copied = copy.deepcopy(kept)
    kept.put("a", b"two")
    copied.put("b", b"three")
    assert (kept.get("a"), copied.get("a"), copied.get("b")) == (b"two", b"one", b"three")


def test_states_of_one_layout_share_a_file_and_what_is_freed_is_used_again() -> None:
    kept = DiskStore()
    for number in range(5):
        kept.put(f"c{number}", state(5000 + number, number))
    (group,) = kept._groups.values()
    assert group.rows == 5
    kept.put("c2", state(50_000, 9))  # its layout changed
    assert len(kept._groups) == 2
    kept.put("new", state(5001, 7))
    assert group.rows == 5
    assert [kept.get(name)[0] for name in ("c1", "c2", "c3", "new")] == [1, 9, 3, 7]


@pytest.mark.parametrize("length", [0, 1, 4096, 4097, 123_456, 10_000_000])
def test_a_slot_is_at_most_a_quarter_too_long(length: int) -> None:
    size = slot_size(length)
    assert length <= size <= max(4096, 1.25 * length + 1)
    assert slot_size(size) == size


def test_nothing_is_left_in_the_folder_even_while_it_is_in_use(tmp_path: Path) -> None:
    kept = DiskStore(tmp_path)
    kept.put("a", state(9000, 1))
    assert list(tmp_path.iterdir()) == []
    assert kept.get("a") == state(9000, 1)


def test_a_system_that_writes_less_at_once_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:1000], at))
    kept = DiskStore()
    data = np.random.default_rng(0).bytes(4500)
    kept.put("a", data)
    assert kept.get("a") == data


def test_a_torn_state_is_noticed() -> None:
    kept = DiskStore()
    kept.put("a", state_bytes({"x": np.arange(2000)}, {"round": 1}))
    assert read_state_bytes(kept.get("a"))[1] == {"round": 1}
    (group,) = kept._groups.values()
    os.pwrite(group.file.fileno(), b"\0" * 100, 3000)
    with pytest.raises(CheckpointError, match="checksum"):
        read_state_bytes(kept.get("a"))
    os.ftruncate(group.file.fileno(), 2000)
    with pytest.raises(CheckpointError, match="checksum"):
        read_state_bytes(kept.get("a"))


def test_a_full_disk_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = DiskStore(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"No space left.*TMPDIR.*backend.store = \"memory\""):
        kept.put("a", b"x")
    with pytest.raises(RunError, match=r"absent.*No such file"):
        DiskStore(tmp_path / "absent").put("a", b"x")


def test_an_unknown_store_is_told_which_there_are() -> None:
    with pytest.raises(FedistillError, match='unknown store "dsk"; did you mean "disk"'):
        store_of("dsk")
