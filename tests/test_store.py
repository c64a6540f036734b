"""State on disk: whole or not at all, and what is not ours is not opened."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedistill import store
from fedistill.errors import CheckpointError, RunError

ARRAYS = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.array([7], dtype=np.int64)}
OTHER = {"w": np.zeros((3, 4), dtype=np.float32), "n": np.array([8], dtype=np.int64)}


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.rglob("*")}


def same(arrays: Any, expected: Any) -> bool:
    return set(arrays) == set(expected) and all(
        np.array_equal(arrays[k], expected[k]) and arrays[k].dtype == expected[k].dtype
        for k in expected
    )


def test_a_state_reads_back_with_its_facts(tmp_path: Path) -> None:
    facts = {"run": "é\n", "round": 3, "deep": [{"a": None}]}
    store.save_state(tmp_path / "s", ARRAYS, facts)
    arrays, meta, note = store.load_state(tmp_path / "s")
    assert same(arrays, ARRAYS)
    assert (meta, note) == (facts, None)


def test_empty_and_scalar_and_strided_arrays_read_back(tmp_path: Path) -> None:
    odd = {"none": np.zeros((0, 3), np.float32), "one": np.array(2.5), "cut": np.arange(9)[::2]}
    store.save_state(tmp_path / "s", odd, {})
    assert same(store.load_state(tmp_path / "s")[0], odd)


def test_the_generation_before_is_kept_and_only_that(tmp_path: Path) -> None:
    for number in range(4):
        store.save_state(tmp_path / "s", {"n": np.array([number])}, {"number": number})
    assert names(tmp_path) == {"s", "s.previous"}
    (tmp_path / "s").unlink()
    arrays, meta, note = store.load_state(tmp_path / "s")
    assert (int(arrays["n"][0]), meta["number"]) == (2, 2)
    assert note is not None
    assert "generation before" in note


def test_equal_content_gives_equal_bytes() -> None:
    assert store.state_bytes(ARRAYS, {"a": 1}) == store.state_bytes(dict(ARRAYS), {"a": 1})


def test_no_state_at_all_is_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.load_state(tmp_path / "s")


# --- disk full, at every call --------------------------------------------------------------------


class Full:
    """The k-th call of any of the disk's functions fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, k: int, code: int = errno.ENOSPC) -> None:
        self.left = k
        self.code = code
        self.failed = ""
        monkeypatch.setattr(os, "fsync", self.guard("fsync", os.fsync))
        monkeypatch.setattr(os, "link", self.guard("link", os.link))
        monkeypatch.setattr(Path, "replace", self.guard("replace", Path.replace))
        monkeypatch.setattr(Path, "open", self.guard_open(Path.open))

    def count(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.failed = name
            raise OSError(self.code, os.strerror(self.code))

    def guard(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count(name)
            return real(*args, **kwargs)

        return call

    def guard_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode:
                return real(path, mode, *args, **kwargs)
            self.count("open")
            file = real(path, mode, *args, **kwargs)
            write = file.write

            class Half:
                def __enter__(half) -> Any:
                    return half

                def __exit__(half, *told: object) -> None:
                    file.close()

                def __getattr__(half, name: str) -> Any:
                    return getattr(file, name)

                def write(half, data: bytes) -> int:
                    write(data[: len(data) // 2])
                    self.count("write")
                    return write(data[len(data) // 2 :])

            return Half()

        return call


CALLS = 7
"""Open, write, sync, link, two renames, sync of the folder."""


@pytest.mark.parametrize("k", range(1, CALLS + 3))
def test_a_full_disk_at_any_call_leaves_whole_files_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    place = tmp_path / "s"
    store.save_state(place, OTHER, {"g": 1})
    store.save_state(place, OTHER, {"g": 2})
    with monkeypatch.context() as patch:
        full = Full(patch, k)
        with (
            contextlib.nullcontext()
            if k > CALLS
            else pytest.raises(RunError, match=r"disk full .*--resume") as caught
        ):
            store.save_state(place, ARRAYS, {"g": 3})
    assert k > CALLS or caught.value.exit_code == 3
    assert names(tmp_path) == {"s", "s.previous"}
    arrays, meta, note = store.load_state(place)
    assert note is None
    # The folder is synced last: when only that fails, the new content already stands there.
    done = not full.failed or (full.failed == "fsync" and meta["g"] == 3)
    assert meta["g"] == (3 if done else 2)
    assert same(arrays, ARRAYS if done else OTHER)
    if full.failed in {"open", "write", "link", "replace"}:
        assert meta["g"] == 2
    assert store.load_state(store.previous(place))[1]["g"] in {1, 2}


def test_the_walk_over_all_calls_reached_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above is only as good as its reach."""
    reached = []
    for k in range(1, CALLS + 5):
        store.save_state(tmp_path / "s", OTHER, {})
        with monkeypatch.context() as patch:
            full = Full(patch, k)
            try:
                store.save_state(tmp_path / "s", ARRAYS, {})
            except RunError:
                reached.append(full.failed)
    assert reached == ["open", "write", "fsync", "link", "replace", "replace", "fsync"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_other_faults_of_a_disk_are_one_sentence_that_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with monkeypatch.context() as patch:
        Full(patch, 1, code)
        with pytest.raises(RunError) as caught:
            store.write_atomic(tmp_path / "f", b"x")
    assert str(tmp_path / "f") in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("write", [store.save_json, store.save_lines])
def test_numbers_that_json_does_not_know_leave_the_old_file(tmp_path: Path, write: Any) -> None:
    place = tmp_path / "f"
    write(place, [{"a": 1}])
    before = place.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write(place, [{"a": float("nan")}])
    assert place.read_bytes() == before
    assert names(tmp_path) == {"f"}


# --- killed in the middle ------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing below it is allowed to tidy up."""


@pytest.mark.parametrize("k", range(1, 9))
def test_killed_at_any_call_the_old_or_the_new_state_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    store.save_state(tmp_path / "s", OTHER, {"g": 2})
    with monkeypatch.context() as patch:
        full = Full(patch, k)
        monkeypatch.setattr(full, "count", lambda name: _die(full))
        with contextlib.suppress(Killed):
            store.save_state(tmp_path / "s", ARRAYS, {"g": 3})
    arrays, meta, note = store.load_state(tmp_path / "s")
    assert note is None
    assert same(arrays, ARRAYS if meta["g"] == 3 else OTHER)
    store.probe(tmp_path)
    assert names(tmp_path) <= {"s", "s.previous"}


def _die(full: Full) -> None:
    full.left -= 1
    if full.left == 0:
        raise Killed


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eighth", range(8))
def test_a_state_cut_at_an_eighth_falls_back_and_says_so(tmp_path: Path, eighth: int) -> None:
    place = tmp_path / "s"
    store.save_state(place, OTHER, {"g": 1})
    store.save_state(place, ARRAYS, {"g": 2})
    data = place.read_bytes()
    place.write_bytes(data[: len(data) * eighth // 8])
    arrays, meta, note = store.load_state(place)
    assert (meta["g"], same(arrays, OTHER)) == (1, True)
    assert note is not None
    assert "s is damaged" in note


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    place = tmp_path / "s"
    store.save_state(place, OTHER, {"g": 1})
    store.save_state(place, ARRAYS, {"g": 2})
    data = place.read_bytes()
    for index in range(len(data)):
        broken = bytearray(data)
        broken[index] ^= 1 << index % 8
        place.write_bytes(bytes(broken))
        try:
            meta, note = store.load_state(place)[1:]
        except CheckpointError as error:
            assert "newer" in str(error)  # noqa: PT017
            assert len(store.MAGIC) <= index < len(store.MAGIC) + 2
        else:
            assert (meta["g"], note is None) == (1, False)


@pytest.mark.parametrize("eighth", range(8))
def test_both_generations_damaged_is_one_sentence_and_no_fresh_start(
    tmp_path: Path, eighth: int
) -> None:
    place = tmp_path / "s"
    store.save_state(place, OTHER, {})
    store.save_state(place, ARRAYS, {})
    for file in (place, store.previous(place)):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) * eighth // 8])
    with pytest.raises(CheckpointError) as caught:
        store.load_state(place)
    text = str(caught.value)
    assert str(place) in text
    assert "damaged" in text
    assert "--out" in text
    assert "\n" not in text


def test_content_that_lies_behind_a_valid_checksum_is_damage(tmp_path: Path) -> None:
    import hashlib

    for content in (b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}", b"x" * 100):
        digest = hashlib.sha256(content).digest()
        (tmp_path / "s").write_bytes(store.MAGIC + b"\x01\x00" + digest + content)
        with pytest.raises(CheckpointError, match="damaged"):
            store.load_state(tmp_path / "s")


# --- files of another kind -----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_never_opened(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    (tmp_path / "s").write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(CheckpointError) as caught:
        store.load_state(tmp_path / "s")
    assert not marker.exists()
    if protocol >= 2:
        assert "can carry code" in str(caught.value)


def test_a_pickle_or_torch_archive_is_refused_even_with_an_older_generation(tmp_path: Path) -> None:
    import torch

    store.save_state(tmp_path / "s", OTHER, {})
    store.save_state(tmp_path / "s", ARRAYS, {})
    torch.save({"w": torch.zeros(2)}, tmp_path / "s")
    with pytest.raises(CheckpointError, match="can carry code"):
        store.load_state(tmp_path / "s")


def test_a_newer_format_is_refused_by_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_state(tmp_path / "s", OTHER, {})
    with monkeypatch.context() as patch:
        patch.setattr(store, "SCHEMA", 2)
        store.save_state(tmp_path / "s", ARRAYS, {})
    with pytest.raises(CheckpointError, match="needs a newer fedistill"):
        store.load_state(tmp_path / "s")


def test_a_folder_in_place_of_a_state_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        store.load_state(tmp_path / "s")


def test_another_model_is_refused_with_the_names_that_differ() -> None:
    wanted = {"head.weight": np.zeros((3, 8)), "head.bias": np.zeros(3)}
    store.same_names(wanted, dict(wanted), "site-1")
    saved = {"head.weight": np.zeros((3, 16)), "trunk.0.weight": np.zeros(2)}
    with pytest.raises(CheckpointError) as caught:
        store.same_names(saved, wanted, "site-1")
    text = str(caught.value)
    for part in (
        "site-1",
        "missing head.bias",
        "unexpected trunk.0.weight",
        "head.weight [3, 16] instead of [3, 8]",
        "resume with the settings",
    ):
        assert part in text


# --- the probe -----------------------------------------------------------------------------------


def test_the_probe_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    store.probe(tmp_path / "a" / "b")
    assert names(tmp_path) == {"a", "b"}


def test_a_file_in_place_of_the_folder_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("keep me")
    for place in (tmp_path / "f", tmp_path / "f" / "deeper"):
        with pytest.raises(RunError, match="choose another folder with --out"):
            store.probe(place)
    assert (tmp_path / "f").read_text() == "keep me"


def test_a_folder_without_right_to_write_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(RunError, match="Read-only file system") as caught:
        store.probe(tmp_path)
    assert caught.value.exit_code == 3


def test_the_probe_takes_away_our_leftovers_and_nothing_else(tmp_path: Path) -> None:
    ours = {".state.123.tmp", ".state.123.link"}
    others = {".vimrc.tmp", "notes.tmp", ".x.link", ".a.b.tmp"}
    (tmp_path / "sites").mkdir()
    for name in ours | others:
        (tmp_path / "sites" / name).touch()
    store.probe(tmp_path)
    assert names(tmp_path / "sites") == others
