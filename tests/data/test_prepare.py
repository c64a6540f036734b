"""From settings to clients: nothing is used twice, nothing is lost, wrong sums are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedistill.config import ClientsSettings, DataSettings, ProxySettings
from fedistill.data import Federated, prepare
from fedistill.errors import DataError

BENCH = "bench/fashion10.npz"


def ids(rows: Any) -> list[int]:
    return [int(row) for row in rows.ids]


def check_disjoint(found: Federated, total: int) -> None:
    """Public, test and private rows are all rows of the source, once each."""
    private = [row for part in found.parts.values() for row in ids(part)]
    assert sorted(private) == sorted(ids(found.dataset.train))
    everything = private + ids(found.dataset.test) + ids(found.dataset.public)
    assert sorted(everything) == list(range(total))
    assert set(found.dataset.public.labels.tolist()) == {-1}


def hospital_file(root: Path, rows: int = 60) -> DataSettings:
    lines = [f"{row},{row % 7},{'abc'[row % 3]},{int(row % 5 == 0)}" for row in range(rows)]
    (root / "h.csv").write_text("x,y,ward,label\n" + "\n".join(lines), encoding="utf-8")
    return DataSettings(source="csv:h.csv", path=str(root))


BY_WARD = ClientsSettings(partition="by-column", column="ward")


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_digits_are_used_exactly_once(partition: str) -> None:
    found = prepare(DataSettings(), ProxySettings(), ClientsSettings(partition=partition), 7)
    assert list(found.parts) == [f"site-{number}" for number in range(8)]
    assert found.tests == {}
    assert len(found.dataset.public) == 400
    assert len(found.dataset.test) == 359
    check_disjoint(found, 1797)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(1, 30), st.floats(0.05, 0.4), st.integers(0, 1000))
def test_sites_are_used_exactly_once(tmp_path: Path, proxy: int, share: float, seed: int) -> None:
    data = replace(hospital_file(tmp_path), test_rows=share)
    found = prepare(data, ProxySettings(rows=proxy), BY_WARD, seed)
    check_disjoint(found, 60)
    for name, test in found.tests.items():
        assert set(test.site) == {name}
        assert set(found.parts[name].site) == {name}
        assert len(test) == max(round(20 * share), 1)
    # A site whose rows all became public has nothing left to take part with.
    taking_part = np.isin(found.dataset.test.site, list(found.parts))
    assert sum(map(len, found.tests.values())) == taking_part.sum()


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    data = hospital_file(tmp_path)
    runs = [prepare(data, ProxySettings(rows=9), BY_WARD, seed).dataset for seed in (7, 7, 8)]
    assert ids(runs[0].public) == ids(runs[1].public) != ids(runs[2].public)
    assert ids(runs[0].test) == ids(runs[1].test) != ids(runs[2].test)


def test_the_number_of_proxy_rows_does_not_change_the_test_rows(tmp_path: Path) -> None:
    data = hospital_file(tmp_path)
    few, many = (prepare(data, ProxySettings(rows=rows), BY_WARD, 7).dataset for rows in (5, 25))
    assert ids(few.test) == ids(many.test)


def test_a_count_of_test_rows_is_divided_among_the_sites(tmp_path: Path) -> None:
    data = replace(hospital_file(tmp_path), test_rows=13)
    found = prepare(data, ProxySettings(rows=5), BY_WARD, 7)
    assert sorted(map(len, found.tests.values())) == [4, 4, 5]


def test_statistics_come_from_public_rows_only(tmp_path: Path) -> None:
    data = hospital_file(tmp_path)
    before = prepare(data, ProxySettings(rows=9), BY_WARD, 7).dataset
    np.testing.assert_allclose(before.public.inputs.mean(axis=0), 0, atol=1e-6)
    lines = (tmp_path / "h.csv").read_text(encoding="utf-8").splitlines()
    changed = int(before.train.ids[0])
    lines[1 + changed] = "99999" + lines[1 + changed][lines[1 + changed].index(",") :]
    (tmp_path / "h.csv").write_text("\n".join(lines), encoding="utf-8")
    after = prepare(data, ProxySettings(rows=9), BY_WARD, 7).dataset
    assert np.array_equal(before.public.inputs, after.public.inputs)
    assert np.array_equal(before.train.inputs[1:], after.train.inputs[1:])
    assert not np.array_equal(before.train.inputs[0], after.train.inputs[0])


@pytest.mark.parametrize(("labelled", "expected"), [(2, 2), (0.25, None), (500, None), (0, None)])
def test_labelled_rows_hold_both_classes(
    tmp_path: Path, labelled: float, expected: int | None
) -> None:
    clients = replace(BY_WARD, labelled=labelled)
    whole = prepare(hospital_file(tmp_path), ProxySettings(rows=9), BY_WARD, 7).parts
    found = prepare(hospital_file(tmp_path), ProxySettings(rows=9), clients, 7).parts
    for name, part in found.items():
        size = len(whole[name])
        wanted = expected or (round(0.25 * size) if labelled == 0.25 else size)
        assert len(part) == wanted
        assert set(ids(part)) <= set(ids(whole[name]))
        assert set(part.labels.tolist()) == {0, 1}


def test_sources_of_their_own_for_test_and_proxy_rows(tmp_path: Path) -> None:
    data = replace(hospital_file(tmp_path), test="csv:t.csv")
    (tmp_path / "t.csv").write_text("x,y,ward,label\n1,2,a,0\n3,4,c,1\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text("y,x,ward,label\n1,2,a,\n3,4,b,1\n5,6,c,7\n", encoding="utf-8")
    proxy = ProxySettings(rows=2, path="csv:p.csv")
    (tmp_path / "q.csv").write_text("y,x,z\n1,2,3\n3,4,5\n", encoding="utf-8")
    with pytest.raises(DataError, match='found "z" besides'):
        prepare(data, replace(proxy, path="csv:q.csv"), BY_WARD, 7)
    found = prepare(data, proxy, BY_WARD, 7)
    assert sum(map(len, found.parts.values())) == 60
    assert {name: len(rows) for name, rows in found.tests.items()} == {"a": 1, "c": 1}
    assert len(found.dataset.public) == 2
    assert set(found.dataset.public.labels.tolist()) == {-1}


@pytest.mark.parametrize(
    ("data", "proxy", "clients", "said"),
    [
        ({}, {"rows": 48}, {}, "proxy.rows: expected fewer than 48"),
        ({"test_rows": 61}, {}, {}, "data.test_rows: expected at most 60"),
        ({"test_rows": 60}, {}, {}, "proxy.rows: expected fewer than 0"),
        ({"test_rows": 1.5}, {}, {}, "share below 1"),
        ({"test": "csv:h.csv"}, {}, {}, "data.test: expected another source"),
        ({}, {"path": "csv:h.csv"}, {}, "proxy.path: expected another source"),
        ({}, {}, {"column": "wrd"}, 'did you mean "ward"'),
        ({}, {}, {"partition": "irid"}, 'did you mean "iid"'),
        ({}, {}, {"partition": "iid", "count": 50}, "lower clients.count"),
        ({"positive_above": 5.0, "label": "y"}, {}, {"labelled": 1.5}, "clients.labelled"),
        ({"source": "csv:one.csv"}, {}, {}, "at least two classes"),
    ],
)
def test_bad_combinations_say_what_to_change(
    tmp_path: Path, data: dict[str, Any], proxy: dict[str, Any], clients: dict[str, Any], said: str
) -> None:
    (tmp_path / "one.csv").write_text("x,ward,label\n1,a,0\n2,b,0\n", encoding="utf-8")
    with pytest.raises(DataError, match=said):
        prepare(
            replace(hospital_file(tmp_path), **data),
            ProxySettings(**{"rows": 5} | proxy),
            replace(BY_WARD, **clients),
            7,
        )


def test_a_column_of_a_source_without_columns_is_refused() -> None:
    with pytest.raises(DataError, match="only csv, parquet, hf and openml"):
        prepare(DataSettings(), ProxySettings(), BY_WARD, 7)


def test_a_file_partition_by_hand(tmp_path: Path) -> None:
    data = hospital_file(tmp_path, rows=20)
    place = tmp_path / "rows.npz"
    np.savez(place, public=[0, 1, 2], k_0=[9, 3], k_1=[4])
    clients = ClientsSettings(
        count=2, partition="file", partition_path=str(place), partition_key="k"
    )
    found = prepare(data, ProxySettings(), clients, 7)
    assert [ids(part) for part in found.parts.values()] == [[9, 3], [4]]
    assert ids(found.dataset.public) == [0, 1, 2]
    assert set(ids(found.dataset.test)) <= set(range(5, 20)) - {9}
    with pytest.raises(DataError, match=r"set clients\.count = 2"):
        prepare(data, ProxySettings(), replace(clients, count=3), 7)
    np.savez(place, k_0=[9, 3], k_1=[4])
    with pytest.raises(DataError, match="add an array 'public'"):
        prepare(data, ProxySettings(), clients, 7)
    np.savez(place, public=np.arange(10), k_0=np.arange(10, 15), k_1=np.arange(15, 20))
    with pytest.raises(DataError, match=r"name a source of test rows as data\.test"):
        prepare(data, ProxySettings(), clients, 7)


def test_fashion10(real: Callable[[str], Path]) -> None:
    real("fashion_mnist")
    place = real(f"../{BENCH}")
    data = DataSettings(source="idx:fashion_mnist/train", test="idx:fashion_mnist/t10k")
    clients = ClientsSettings(
        count=10, partition="file", partition_path=str(place), partition_key="iid"
    )
    found = prepare(data, ProxySettings(), clients, 7)
    assert [len(part) for part in found.parts.values()] == [2000] * 10
    assert len(found.dataset.public) == 5000
    assert len(found.dataset.test) == 10000
    used = [row for part in found.parts.values() for row in ids(part)]
    assert len(set(used) | set(ids(found.dataset.public))) == 25000
    assert found.dataset.train.inputs.shape[1:] == (1, 28, 28)
    assert (found.dataset.train.inputs.min(), found.dataset.train.inputs.max()) == (-1.0, 1.0)


def test_the_four_hospitals(real: Callable[[str], Path]) -> None:
    real("heart_disease_uci")
    data = DataSettings(
        source="csv:heart_disease_uci/processed.*.data",
        header=False,
        label="-1",
        positive_above=0,
        indicators=0.0,
    )
    clients = ClientsSettings(partition="by-column", column="file", labelled=20)
    found = prepare(data, ProxySettings(rows=200), clients, 7)
    assert {name: len(rows) for name, rows in found.tests.items()} == {
        "cleveland": 61,
        "hungarian": 59,
        "switzerland": 25,
        "va": 40,
    }
    for part in found.parts.values():
        assert len(part) == 20
        assert np.isfinite(part.inputs).all()
        assert set(part.labels.tolist()) == {0, 1}


# --- proxy rows whose labels the server knows ----------------------------------------------------


def anchors(found: Federated) -> dict[int, int]:
    """Row numbers of the public rows that have a label, with it."""
    public = found.dataset.public
    return {
        int(row): int(label)
        for row, label in zip(public.ids, public.labels, strict=True)  # type: ignore[arg-type]
        if label >= 0
    }


@pytest.mark.parametrize("labelled", [0, 1, 4, 9])
def test_as_many_proxy_rows_as_asked_keep_their_label(tmp_path: Path, labelled: int) -> None:
    data = hospital_file(tmp_path)
    blank = prepare(data, ProxySettings(rows=9), BY_WARD, 7)
    found = prepare(data, ProxySettings(rows=9, labelled=labelled), BY_WARD, 7)
    assert ids(found.dataset.public) == ids(blank.dataset.public)
    np.testing.assert_array_equal(found.dataset.public.inputs, blank.dataset.public.inputs)
    assert len(anchors(found)) == labelled
    assert all(label == int(row % 5 == 0) for row, label in anchors(found).items())
    assert sorted(np.concatenate([part.ids for part in found.parts.values()])) == sorted(
        np.concatenate([part.ids for part in blank.parts.values()])
    )


def test_the_seed_decides_which_labels_are_known(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        "x,y,ward,label\n" + "\n".join(f"{row},1,a,{row % 2}" for row in range(40)),
        encoding="utf-8",
    )
    for proxy in (
        ProxySettings(rows=40, labelled=10, path="csv:p.csv"),
        ProxySettings(rows=30, labelled=10),
    ):
        first, again, other = (
            anchors(prepare(hospital_file(tmp_path), proxy, BY_WARD, seed)) for seed in (7, 7, 8)
        )
        assert first == again != other


def test_known_labels_do_not_change_when_a_site_is_left_out(tmp_path: Path) -> None:
    data, proxy = hospital_file(tmp_path), ProxySettings(rows=12, labelled=8)
    whole = anchors(prepare(data, proxy, BY_WARD, 7))
    for name in "abc":
        left = prepare(data, proxy, BY_WARD, 7, without=name)
        kept = set(ids(left.dataset.public))
        assert anchors(left) == {row: label for row, label in whole.items() if row in kept}


def test_labels_of_a_proxy_source_are_those_of_the_data(tmp_path: Path) -> None:
    """Numbers differ where the source of the proxy rows lacks a class; names decide."""
    data = replace(hospital_file(tmp_path), label="ward", drop=("label",))
    clients = ClientsSettings(partition="iid", count=2)
    (tmp_path / "p.csv").write_text("x,y,ward,label\n1,2,c,0\n3,4,b,0\n5,6,c,0\n", encoding="utf-8")
    found = prepare(data, ProxySettings(rows=3, labelled=3, path="csv:p.csv"), clients, 7)
    assert found.dataset.classes == ("a", "b", "c")
    assert anchors(found) == {0: 2, 1: 1, 2: 2}
    few = prepare(data, ProxySettings(rows=2, labelled=1, path="csv:p.csv"), clients, 7)
    assert len(anchors(few)) == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("x,y,ward\n1,2,a\n3,4,b\n", r'found none that fit \(.*"label".*set proxy.labelled = 0'),
        ("x,y,ward,label\n1,2,a,0\n3,4,b,\n", "found none that fit .*a label"),
        ("x,y,ward,label\n1,2,a,0\n3,4,b,7\n", "found none that fit .*another one in row 1"),
    ],
)
def test_labels_that_are_asked_and_not_there_are_missed(
    tmp_path: Path, rows: str, said: str
) -> None:
    data = hospital_file(tmp_path)
    (tmp_path / "p.csv").write_text(rows, encoding="utf-8")
    proxy = ProxySettings(rows=2, path="csv:p.csv")
    assert anchors(prepare(data, proxy, BY_WARD, 7)) == {}
    with pytest.raises(DataError, match=said):
        prepare(data, replace(proxy, labelled=1), BY_WARD, 7)


def test_more_labels_than_proxy_rows_are_refused(tmp_path: Path) -> None:
    data = hospital_file(tmp_path)
    np.savez(tmp_path / "p.npz", public=[0, 1, 2], k_0=np.arange(3, 25), k_1=np.arange(25, 40))
    clients = ClientsSettings(
        count=2, partition="file", partition_path=str(tmp_path / "p.npz"), partition_key="k"
    )
    assert len(anchors(prepare(data, ProxySettings(labelled=3), clients, 7))) == 3
    with pytest.raises(DataError, match=r"proxy\.labelled: expected at most 3, the number"):
        prepare(data, ProxySettings(labelled=4), clients, 7)
