"""Every row goes to exactly one client, the seed decides, and impossible wishes are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill import catalog
from fedistill.config import ClientsSettings
from fedistill.data import by_column, by_file, dirichlet, iid, shards
from fedistill.data.partition import PARTITIONS, check_exactly_once, client_id, file_numbers
from fedistill.errors import DataError
from fedistill.types import Rows

Make = Callable[..., Rows]

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=120)
SEEDS = st.integers(0, 2**32)
quick = settings(max_examples=40, deadline=None)


def rows_with(labels: list[int]) -> Rows:
    count = len(labels)
    return Rows(np.zeros((count, 1), np.float32), np.array(labels), np.arange(count))


def ids(parts: list[Rows]) -> list[int]:
    return sorted(int(row) for part in parts for row in part.ids)


@quick
@given(LABELS, st.integers(1, 9), st.floats(0.001, 1e12), SEEDS)
def test_dirichlet_deals_every_row_once(
    labels: list[int], clients: int, alpha: float, seed: int
) -> None:
    parts = dirichlet(rows_with(labels), clients, alpha, seed)
    assert len(parts) == clients
    assert ids(parts) == list(range(len(labels)))


@quick
@given(LABELS, st.integers(1, 9), SEEDS)
def test_iid_deals_every_row_once_and_evenly(labels: list[int], clients: int, seed: int) -> None:
    clients = min(clients, len(labels))
    parts = iid(rows_with(labels), clients, seed)
    assert ids(parts) == list(range(len(labels)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@quick
@given(
    st.lists(st.integers(0, 4), min_size=18, max_size=120),
    st.integers(1, 6),
    st.integers(1, 3),
    SEEDS,
)
def test_shards_deal_every_row_once(labels: list[int], clients: int, each: int, seed: int) -> None:
    parts = shards(rows_with(labels), clients, each, seed)
    assert len(parts) == clients
    assert ids(parts) == list(range(len(labels)))


@quick
@given(st.lists(st.sampled_from(["ulm", "bern", "wien"]), min_size=1, max_size=50))
def test_by_column_gives_one_client_per_value(site: list[str]) -> None:
    rows = Rows(
        np.zeros((len(site), 1), np.float32),
        np.zeros(len(site), np.int64),
        np.arange(len(site)),
        np.array(site),
    )
    parts = by_column(rows)
    assert sorted(parts) == sorted(set(site))
    assert ids(list(parts.values())) == list(range(len(site)))
    for name, part in parts.items():
        assert set(part.site) == {name}


@pytest.mark.parametrize(
    "deal",
    [
        lambda rows, seed: iid(rows, 5, seed),
        lambda rows, seed: dirichlet(rows, 5, 0.5, seed),
        lambda rows, seed: shards(rows, 5, 2, seed),
    ],
)
def test_the_seed_decides(deal: Callable[[Rows, int], list[Rows]]) -> None:
    rows = rows_with([0, 1, 2, 3, 4] * 20)
    first, again, other = ([part.ids.tolist() for part in deal(rows, seed)] for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_small_alpha_is_skewed_and_large_alpha_is_even() -> None:
    rows = rows_with([0, 1, 2, 3] * 500)

    def largest_share(alpha: float) -> float:
        parts = [part for part in dirichlet(rows, 8, alpha, 7) if len(part)]
        return float(np.mean([np.bincount(part.labels).max() / len(part) for part in parts]))

    assert largest_share(0.05) > 0.75
    assert largest_share(1000.0) < 0.35


def test_fault_44_dirichlet_may_leave_a_client_empty_unless_told(make_rows: Make) -> None:
    rows = make_rows([0] * 6)
    assert min(map(len, dirichlet(rows, 6, 0.01, 7))) == 0
    assert min(map(len, dirichlet(rows, 3, 1.0, 7, min_rows=1))) >= 1


def test_fault_45_a_client_may_hold_a_single_class(make_rows: Make) -> None:
    parts = shards(make_rows([0] * 10 + [1] * 10), 2, 1, 7)
    assert [len(set(part.labels.tolist())) for part in parts] == [1, 1]


def test_fault_46_a_client_may_hold_a_single_row(make_rows: Make) -> None:
    assert [len(part) for part in iid(make_rows([0, 1, 0]), 3, 7)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda rows: iid(rows, 5, 7), "lower clients.count"),
        (lambda rows: iid(rows, 0, 7), "at least one client"),
        (lambda rows: dirichlet(rows, 2, 0.0, 7), "alpha above 0"),
        (lambda rows: dirichlet(rows, 2, 1.0, 7, min_rows=3), "lower min_rows"),
        (lambda rows: dirichlet(rows, 4, 0.001, 7, min_rows=1), "raise alpha"),
        (lambda rows: shards(rows, 3, 2, 7), "1 to 4 shards"),
        (by_column, "site column"),
    ],
)
def test_impossible_wishes_are_refused(
    make_rows: Make, call: Callable[[Rows], object], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        call(make_rows([0, 0, 0, 0]))


def test_sites_become_ids_that_are_folder_names(make_rows: Make) -> None:
    assert client_id("../../etc/passwd") == "etc_passwd"
    assert client_id("..") == "site"
    assert client_id("Zürich") == "Zurich"
    assert client_id("(north)") == "north_"
    with pytest.raises(DataError, match="same client id"):
        by_column(make_rows([0, 0], ["a b", "a/b"]))


def test_check_exactly_once_names_the_row() -> None:
    check_exactly_once([np.array([2, 0]), np.array([1])], 3)
    with pytest.raises(DataError, match="found row 1 0 times"):
        check_exactly_once([np.array([0, 2])], 3)
    with pytest.raises(DataError, match="found row 2 2 times"):
        check_exactly_once([np.array([0, 1, 2, 2])], 3)


def save(tmp_path: Path, **arrays: list[int] | list[float]) -> Path:
    place = tmp_path / "rows.npz"
    np.savez(place, **{name: np.array(values) for name, values in arrays.items()})
    return place


def test_by_file_takes_the_rows_it_names(tmp_path: Path, make_rows: Make) -> None:
    place = save(tmp_path, public=[0, 5], k_0=[4, 1], k_1=[2], other_0=[0])
    rows = make_rows([0, 1, 0, 1, 0, 1])
    assert [part.ids.tolist() for part in by_file(rows, place, "k")] == [[4, 1], [2]]
    private = rows.take([1, 2, 4])
    assert [part.ids.tolist() for part in by_file(private, place, "k")] == [[4, 1], [2]]
    with pytest.raises(DataError, match="k_1 holds another at position 0"):
        by_file(rows.take([1, 4]), place, "k")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"k_0": [0, 6]}, "k_0: expected row numbers from 0 to 5, found another at position 1"),
        ({"k_0": [-1]}, "k_0: .* found another at position 0"),
        ({"k_0": [1, 1]}, "found one in k_0 and again in k_0"),
        ({"k_0": [1], "k_1": [1]}, "found one in k_0 and again in k_1"),
        ({"k_0": [1], "public": [1]}, "found one in k_0 and again in public"),
        ({"k_0": [0.5]}, "k_0: expected a list of whole numbers"),
        ({"dir_0": [1]}, "clients.partition_key to one of dir"),
    ],
)
def test_bad_partition_files_are_refused(
    tmp_path: Path, arrays: dict[str, list[int]], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        file_numbers(save(tmp_path, **arrays), "k", 6)


def test_an_absent_or_damaged_partition_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an npz file at"):
        file_numbers(tmp_path / "none.npz", "k", 6)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match="damaged file or Python objects"):
        file_numbers(tmp_path / "bad.npz", "k", 6)


def test_the_table_names_every_partition_with_a_summary(make_rows: Make) -> None:
    assert tuple(PARTITIONS) == ("iid", "dirichlet", "shards", "by-column", "file")
    for name in PARTITIONS:
        assert len(catalog.summary("partitions", name)) > 20
    dealt = PARTITIONS["iid"].deal(make_rows([0, 1]), ClientsSettings(count=2), 7)
    assert list(dealt) == ["site-0", "site-1"]
