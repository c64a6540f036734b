"""Streams of interactions."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from fedistill.data.interactions import (
    Block,
    Interactions,
    diginetica,
    gowalla,
    join,
    movielens,
    no_interactions,
)
from fedistill.errors import DataError


def some(n=4):
    return Interactions(np.arange(n) % 3, np.arange(n), 10 + np.arange(n))


def test_take_by_number_and_by_mask():
    taken = some().take([2, 0])
    assert (taken.users.tolist(), taken.items.tolist(), taken.times.tolist()) == (
        [2, 0],
        [2, 0],
        [12, 10],
    )
    assert some().take(some().users == 0).items.tolist() == [0, 3]
    assert len(some().take([])) == 0
    assert taken.users.dtype == np.int64


def test_a_block_is_tested_on_everything_and_learned_in_part():
    block = Block(some(3), some(2), some(1))
    assert len(block.everything()) == 6
    assert len(Block(some(3), no_interactions()).everything()) == 3
    assert len(join([])) == 0


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (([0, 1], [0], [0, 1]), "equal length, found 2, 1 and 2"),
        (([0, -1], [0, 1], [0, 1]), "users and items from 0, found a negative number"),
        (([0.5, 1], [0, 1], [0, 1]), "expected users as a list of whole numbers, found float64"),
        (([[0]], [[0]], [[0]]), "as a list of whole numbers"),
    ],
)
def test_bad_interactions_say_what_is_wrong(columns, text):
    with pytest.raises(DataError, match=text):
        Interactions(*map(np.array, columns))


def write_movielens(folder, lines):
    place = folder / "movielens_100k" / "ml-100k.inter.gz"
    place.parent.mkdir()
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    place.write_bytes(gzip.compress("\n".join([head, *lines, ""]).encode()))


def test_movielens_is_cut_in_time_order(tmp_path):
    """Twenty ratings written backwards: ten, then two each; ties keep user and item order."""
    lines = [f"{1 + n % 4}\t{1 + n}\t3\t{100 + n // 2}" for n in range(20)]
    write_movielens(tmp_path, lines[::-1])
    blocks = movielens(str(tmp_path))
    assert [len(block.train) for block in blocks] == [10, 2, 2, 2, 2, 2]
    assert join([block.train for block in blocks]).items.tolist() == list(range(20))
    assert [len(block.train) for block in movielens(str(tmp_path), tenths=2)] == [10, 2, 2]


@pytest.mark.parametrize("lines", [["1\t2"], ["a\t2\t3\t4"], ["0\t1\t3\t5"], []])
def test_a_damaged_movielens_is_told(tmp_path, lines):
    write_movielens(tmp_path, lines)
    with pytest.raises(DataError, match=r"ml-100k\.inter\.gz: expected"):
        movielens(str(tmp_path))


@pytest.mark.parametrize("read", [movielens, gowalla, diginetica])
def test_an_absent_file_is_told(tmp_path, read):
    with pytest.raises(DataError, match="expected a data file at"):
        read(str(tmp_path))


def test_tenths_are_few(tmp_path):
    with pytest.raises(DataError, match="0 to 5 tenths"):
        movielens(str(tmp_path), tenths=6)


def write_gowalla(folder, **arrays):
    (folder / "ccd_gowalla").mkdir(exist_ok=True)
    np.savez(folder / "ccd_gowalla" / "gowalla_blocks.npz", **arrays)


def test_gowalla_has_the_blocks_of_the_file(tmp_path):
    pairs = np.array([[3, 5], [0, 7]], dtype=np.int32)
    arrays = {f"{part}_{k}": pairs + k for part in ("train", "valid", "test") for k in range(2)}
    write_gowalla(tmp_path, **arrays)
    first, second = gowalla(str(tmp_path))
    assert (second.train.users.tolist(), second.test.items.tolist()) == ([4, 1], [6, 8])
    assert set(second.valid.times.tolist()) == {1}
    assert len(first.everything()) == 6


def test_a_damaged_gowalla_is_told(tmp_path):
    good = np.zeros((2, 2), dtype=np.int32)
    for arrays, text in [
        ({"other": good}, "expected arrays train_0"),
        ({"train_0": good, "test_0": good}, "valid_0"),
        ({"train_0": good[:, 0], "test_0": good, "valid_0": good}, "train_0"),
        ({"train_0": good - 1, "test_0": good, "valid_0": good}, "train_0 numbered from 0"),
    ]:
        write_gowalla(tmp_path, **arrays)
        with pytest.raises(DataError, match=text):
            gowalla(str(tmp_path))


def test_diginetica_numbers_sessions_of_each_period(tmp_path):
    (tmp_path / "ader_diginetica").mkdir()
    np.savez(
        tmp_path / "ader_diginetica" / "diginetica.npz",
        period=np.array([1, 0, 0, 1], dtype=np.uint8),
        c1=np.array([7, 7, 9, 7]),
        c2=np.array([4, 1, 2, 3]),
    )
    first, second = diginetica(str(tmp_path))
    assert (first.train.users.tolist(), first.train.items.tolist()) == ([0, 1], [0, 1])
    assert (second.train.users.tolist(), second.train.items.tolist()) == ([2, 2], [3, 2])


def test_the_real_streams(real):
    root = real("movielens_100k/ml-100k.inter.gz").parents[1]
    blocks = movielens(str(root))
    assert [len(block.train) for block in blocks] == [50_000, *[10_000] * 5]
    known = np.unique(blocks[0].train.users)
    with_history = [np.isin(block.train.users, known).sum() for block in blocks[1:2]]
    assert with_history == [1630]
