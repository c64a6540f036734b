"""Whose row it is: read from a column that is no input, and kept all the way to the clients."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedistill.config import ClientsSettings, DataSettings, ProxySettings, StreamSettings
from fedistill.data import prepare, read, streams
from fedistill.data.erased import (
    LEFT_OUT,
    TOMBSTONES,
    bury,
    known_as,
    read_tombstones,
    without_erased,
)
from fedistill.data.site import read_public, split
from fedistill.data.table import rows_of
from fedistill.distill.arriving import fingerprint
from fedistill.errors import CheckpointError, DataError, FedistillError
from fedistill.types import Rows

TABLE = "who,ward,age,label\nann,a,1,no\nbob,a,2,yes\nann,b,3,no\n"


def settings(root: object, **changes: object) -> DataSettings:
    return replace(DataSettings(path=str(root), subject="who"), **changes)


def people(count: int) -> str:
    """Rows of persons p0 to p9; the age of each names its owner."""
    lines = [
        f"p{k % 10},{'ab'[k % 2]},{k % 10},{k},{('no', 'yes')[k // 2 % 2]}" for k in range(count)
    ]
    return "who,ward,age,dose,label\n" + "\n".join(lines)


def fits(rows: Rows, ages: np.ndarray) -> None:
    assert rows.subject is not None
    assert rows.subject.tolist() == [f"p{int(age)}" for age in ages]


# --- csv and parquet -------------------------------------------------------------------------


def test_a_column_by_name_or_number_is_no_feature(write) -> None:
    root = write("t.csv", TABLE)
    for name in ("who", "0", "-4"):
        table = read("csv:t.csv", settings(root, subject=name))
        assert table.features == ("ward=a", "ward=b", "age")
        assert rows_of(table).subject.tolist() == ["ann", "bob", "ann"]
    assert rows_of(read("csv:t.csv", settings(root, subject="", drop=("who",)))).subject is None


def test_names_stay_as_the_file_has_them(write) -> None:
    root = write("t.csv", "who,a,label\n007,1,x\n7,2,y\n7.0,3,x\n")
    assert read("csv:t.csv", settings(root)).subjects.tolist() == ["007", "7", "7.0"]


def test_owner_site_and_file_may_be_one_column(write) -> None:
    root = write("t.csv", TABLE)
    table = read("csv:t.csv", settings(root, subject="ward"), column="ward")
    assert table.subjects.tolist() == table.columns["ward"].tolist() == ["a", "a", "b"]
    assert read("csv:t.csv", settings(root, subject="file")).subjects.tolist() == ["t"] * 3


def test_a_row_of_nobody_is_refused_without_showing_names(write) -> None:
    root = write("t.csv", TABLE.replace("bob", ""))
    with pytest.raises(DataError, match=r"t.csv, line 3: expected a person in column \"who\""):
        read("csv:t.csv", settings(root))
    proxy = read("csv:t.csv", settings(root), labelled=False)
    assert (len(proxy), proxy.features) == (3, ("ward=a", "ward=b", "age"))


def test_an_absent_column_is_said(write) -> None:
    root = write("t.csv", TABLE)
    with pytest.raises(DataError, match=r'a column "whom" \(data.subject\), found none'):
        read("csv:t.csv", settings(root, subject="whom"))
    with pytest.raises(DataError, match=r"another column as data\.subject"):
        read("csv:t.csv", settings(root, subject="label"))
    assert read("csv:t.csv", settings(root, subject="whom"), owned=False).subjects is None
    with pytest.raises(DataError, match=r"digits: expected a column \"who\" .* leave data.subject"):
        read("digits", DataSettings(subject="who"))


def test_parquet_keeps_long_numbers_whole(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ids = [9007199254740993, 9007199254740992, 5]
    columns = {"who": ids, "a": [1.0, 2.0, 3.0], "label": ["x", "y", "x"]}
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    table = read("parquet:t.parquet", settings(tmp_path))
    assert table.features == ("a",)
    assert table.subjects.tolist() == [str(one) for one in ids]
    short = arrow.table({**columns, "who": ["ann", None, "bob"]})
    parquet.write_table(short, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="row 1: expected a person"):
        read("parquet:t.parquet", settings(tmp_path))


# --- sessions --------------------------------------------------------------------------------

CLICKS = {
    "period": np.array([0, 0, 0, 0, 1, 1, 0]),
    "c1": np.array([1, 2, 1, 2, 1, 1, 3]),
    "c2": np.array([10, 20, 20, 20, 30, 10, 20]),
}


def test_a_session_is_somebody_unless_users_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", **CLICKS)
    plain = DataSettings(path=str(tmp_path), history=2, items=0)
    assert read("sessions:c.npz", plain).subjects.tolist() == ["0-1", "0-2", "1-1"]
    with pytest.raises(DataError, match="whole numbers user"):
        read("sessions:c.npz", replace(plain, subject="user"))
    np.savez(tmp_path / "c.npz", **CLICKS, user=np.array([5, 6, 5, 6, 5, 5, 7]))
    assert read("sessions:c.npz", plain).subjects.tolist() == ["5", "6", "5"]
    forced = read("sessions:c.npz", replace(plain, subject="session"))
    assert forced.subjects.tolist() == ["0-1", "0-2", "1-1"]
    with pytest.raises(DataError, match='expected "user" or "session"'):
        read("sessions:c.npz", replace(plain, subject="who"))
    assert read("sessions:c.npz", plain, labelled=False).subjects is None


# --- to the clients --------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "by-column"])
def test_clients_know_whose_rows_they_hold(write, partition: str) -> None:
    root = write("t.csv", people(120))
    data = settings(root, source="csv:t.csv", scale="none", test_rows=20)
    clients = ClientsSettings(partition=partition, count=3, column="ward", labelled=0.5)
    federated = prepare(data, ProxySettings(rows=20), clients, 3)
    # Features are ward=a, ward=b, age, dose, or without ward where it holds the sites.
    age = -2
    for rows in (*federated.parts.values(), *federated.tests.values(), federated.dataset.test):
        fits(rows, rows.inputs[:, age])


def test_streams_keep_owners(write) -> None:
    root = write("t.csv", people(120))
    data = settings(root, source="csv:t.csv", scale="none", test_rows=20)
    federated = prepare(data, ProxySettings(rows=20), ClientsSettings(count=2), 3)
    how = StreamSettings(experiences=2, shift="class-incremental")
    met = streams(federated.parts, federated.dataset.test, how, 3)
    for rows in (*met.tests, *(one for course in met.train.values() for one in course)):
        fits(rows, rows.inputs[:, -2])


def test_a_real_site_knows_whose_rows_it_holds(write) -> None:
    write("public.csv", "age,dose,label\n" + "\n".join(f"{k % 10},{k},no" for k in range(30)))
    data = settings(write("own.csv", people(40)), drop=("ward",), scale="none", test_rows=0.25)
    agreed = replace(data, drop=())
    public = read_public(agreed, ProxySettings(path="csv:public.csv", rows=30), ["no", "yes"], 1)
    rows = public.own("csv:own.csv", data)
    for part in (rows, *split(rows, data, 1, "north")):
        fits(part, part.inputs[:, 0])
    with pytest.raises(DataError, match=r'a column "who" \(data.subject\)'):
        public.own("csv:public.csv", agreed)
    assert public.own("csv:public.csv", agreed, owned=False).subject is None


# --- without the forgotten -------------------------------------------------------------------


def owned(names: list[str]) -> Rows:
    count = len(names)
    return Rows(
        np.arange(count)[:, None], np.zeros(count, int), np.arange(count), None, np.array(names)
    )


def test_rows_of_the_forgotten_are_left_out(tmp_path: Path) -> None:
    rows = owned(["ann", "bob", "ann", "", "cy"])
    assert without_erased(rows, tmp_path) is rows
    marks = bury(tmp_path, ["ann"])
    left = without_erased(rows, tmp_path)
    assert left.ids.tolist() == [1, 3, 4]
    assert left.subject.tolist() == ["bob", "", "cy"]
    assert without_erased(left, tmp_path) is left
    assert bury(tmp_path, ["cy", "ann"])[1] == marks[0]
    assert without_erased(rows, tmp_path).ids.tolist() == [1, 3]
    nobodys = Rows(rows.inputs, rows.labels)
    assert without_erased(nobodys, tmp_path) is nobodys


def test_rows_are_known_by_what_they_were_before_each_erasure(tmp_path: Path) -> None:
    rows = owned(["ann", "bob", "ann", "cy", "dan"])
    assert known_as(rows, tmp_path) == []
    bury(tmp_path, ["cy"])
    bury(tmp_path, ["nobody", "ann", "cy"])
    left = without_erased(rows, tmp_path)
    before = [fingerprint(rows), fingerprint(rows.take([0, 1, 2, 4]))]
    assert known_as(left, tmp_path) == before
    assert known_as(rows, tmp_path) == []
    bury(tmp_path, ["dan"])
    without_erased(rows, tmp_path)
    now = rows.take([1])
    assert known_as(now, tmp_path) == [*before, fingerprint(left)]
    (tmp_path / LEFT_OUT).write_text("[")
    assert known_as(now, tmp_path) == []


def test_tombstones_hold_no_names_and_no_two_sites_have_equal_ones(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    first, second = (bury(tmp_path / name, ["patient-Ω"]) for name in ("x", "y"))
    path = tmp_path / "x" / TOMBSTONES
    assert first != second
    assert "patient" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_tombstones(tmp_path / "x").marks == tuple(first)
    with pytest.raises(FedistillError, match="found the empty one"):
        bury(tmp_path, [""])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"key": "zz", "marks": []}', "\xff"])
def test_damaged_tombstones_bring_nobody_back(tmp_path: Path, text: str) -> None:
    (tmp_path / TOMBSTONES).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="their rows would be used again"):
        without_erased(owned(["ann"]), tmp_path)


def test_every_cut_of_the_file_is_noticed(tmp_path: Path) -> None:
    bury(tmp_path, ["ann", "bob"])
    whole = (tmp_path / TOMBSTONES).read_bytes()
    for part in range(8):
        (tmp_path / TOMBSTONES).write_bytes(whole[: len(whole) * part // 8])
        with pytest.raises(CheckpointError):
            read_tombstones(tmp_path)
    json.loads(whole)
