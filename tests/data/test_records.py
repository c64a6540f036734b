"""A record is known by what was read of it, whatever is made of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fedistill.config import ClientsSettings, DataSettings, ProxySettings, StreamSettings
from fedistill.data import prepare, read, streams
from fedistill.data.records import of_arrays, of_bytes, of_cells
from fedistill.data.site import read_public
from fedistill.data.stream import gradual
from fedistill.data.table import rows_of
from fedistill.errors import BudgetExceeded
from fedistill.gathering import pooled
from fedistill.members import Client
from fedistill.privacy.events import Sampled, Spending
from fedistill.privacy.ledger import Ledger
from fedistill.privacy.sampling import units_of
from fedistill.types import Rows, joined_records

Write = Callable[[str, str], str]

TABLE = "who,ward,age,dose,label\nann,a,1,0.5,no\nbob,a,2,?,yes\nann,b,3,1.5,no\n"


def known(root: object, file: str = "t.csv", source: str = "csv", **how: object) -> list[bytes]:
    settings = replace(DataSettings(path=str(root), missing="?"), **how)
    record = rows_of(read(f"{source}:{file}", settings)).record
    assert record is not None
    return record.tolist()


# --- nothing but what was read ---------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"drop": ("who",)},
        {"drop": ("dose", "age")},
        {"categorical": ("age",)},
        {"zero_missing": ("age",)},
        {"subject": "who"},
        {"label": "ward"},
        {"positive": ("yes",)},
        {"missing": "? 1"},
    ],
    ids=str,
)
def test_how_columns_are_read_makes_no_other_record(write: Write, how: dict[str, object]) -> None:
    root = write("t.csv", TABLE)
    assert known(root, **how) == known(root)
    assert len(set(known(root))) == 3


def test_a_site_column_makes_no_other_record(write: Write) -> None:
    root = write("t.csv", TABLE)
    settings = DataSettings(path=root, missing="?")
    sited = rows_of(read("csv:t.csv", settings, column="ward"), "ward")
    assert sited.record is not None
    assert sited.record.tolist() == known(root)


def test_every_cell_counts_also_those_that_are_no_feature(write: Write) -> None:
    before = known(write("t.csv", TABLE), drop=("who",))
    after = known(write("t.csv", TABLE.replace("bob", "cy")), drop=("who",))
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_the_same_row_in_another_file_is_the_same_record(write: Write) -> None:
    head, *rows = TABLE.splitlines()
    write("one.csv", TABLE)
    root = write("two.csv", "\n".join([head, rows[2], "dan,b,9,9,yes", rows[0]]))
    one, two = known(root, "one.csv"), known(root, "two.csv")
    assert [two[2], two[0]] == [one[0], one[2]]
    assert known(root, "*.csv") == [*one, *two]  # the file's name is not part of it


def test_whole_numbers_may_be_written_anew_and_columns_turned() -> None:
    plain = of_cells(["a", "b"], [["1", "2"], ["x", ""]]).tolist()
    assert of_cells(["b", "a"], [["x", None], np.array([1.0, 2.0])]).tolist() == plain
    assert of_cells(["b", "a"], [["x", np.nan], [1, 2]]).tolist() == plain
    assert of_cells(["a", "c"], [["1", "2"], ["x", ""]]).tolist() != plain


def test_codes_that_look_like_equal_numbers_are_two() -> None:
    codes = ["007", "7", "9007199254740993", "9007199254740992"]
    assert len(set(of_cells(["who"], [codes]).tolist())) == 4


def test_cells_do_not_run_into_each_other() -> None:
    rows = of_cells(["a", "b"], [['x", "y', "x", "x\x1f"], ["", 'y", "', "y"]])
    assert len(set(rows.tolist())) == 3


def test_digests_keep_their_length() -> None:
    """Raw digests would lose zeros at their end."""
    digests = of_arrays(np.arange(2000.0))
    assert {len(one) for one in digests.tolist()} == {32}
    assert len(set(digests.tolist())) == 2000


# --- sources ---------------------------------------------------------------------------------


def test_parquet_knows_the_records_of_a_csv_file(tmp_path: Path, write: Write) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = write("t.csv", TABLE.replace("?", ""))
    columns = {
        "who": arrow.array(["ann", "bob", "ann"]).dictionary_encode(),
        "ward": ["a", "a", "b"],
        "age": [1, 2, 3],
        "dose": [0.5, None, 1.5],
        "label": ["no", "yes", "no"],
    }
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    assert known(root, "t.parquet", "parquet") == known(root)
    assert known(root, "t.parquet", "parquet", drop=("who", "dose")) == known(root)


def test_columns_of_other_types_count_where_they_are_dropped(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def written(times: list[int], tags: list[list[int]]) -> list[bytes]:
        stamps = arrow.array(times, arrow.timestamp("ns"))
        table = {"at": stamps, "tags": tags, "a": [1.0, 1.0], "label": ["x", "x"]}
        parquet.write_table(arrow.table(table), tmp_path / "t.parquet")
        return known(tmp_path, "t.parquet", "parquet", drop=("at", "tags"))

    first = written([1, 2], [[1], [1]])
    assert first[0] != first[1]
    assert written([1, 1], [[1], [1, 2]])[0] == first[0]
    assert len(set(written([1, 1], [[1], [1, 2]]))) == 2


def test_pictures_are_known_by_their_bytes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    places = [tmp_path / f"{number}.png" for number in range(2)]
    for number, place in enumerate(places):
        image.new("L", (4, 4), number * 90).save(place)
    cells = [{"bytes": place.read_bytes(), "path": None} for place in places]
    by_path = [{"bytes": None, "path": str(place)} for place in places]
    found = []
    for pictures in (cells, by_path):
        table = arrow.table({"image": pictures, "label": [0, 1]})
        parquet.write_table(table, tmp_path / "t.parquet")
        found.append(known(tmp_path, "t.parquet", "parquet"))
    assert found[0] == found[1]
    told = [of_bytes(place.read_bytes()) for place in places]
    assert found[0] == of_cells(["image", "label"], [told, [0, 1]]).tolist()


def test_arrays_are_known_by_their_numbers(tmp_path: Path) -> None:
    inputs: npt.NDArray[np.uint8] = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.savez(tmp_path / "a.npz", x=inputs, y=np.array([0, 1, 5]))
    np.savez(tmp_path / "b.npz", x=inputs.astype(np.float64), y=np.array([0.0, 1.0, 5.0]))
    found = known(tmp_path, "a.npz", "npz")
    assert found == of_arrays(inputs, np.array([0, 1, 5])).tolist()
    assert known(tmp_path, "b.npz", "npz") == found
    assert known(tmp_path, "a.npz", "npz", positive_above=1.0) == found
    assert len(set(of_arrays(np.ones((2, 3)), np.array([0, 1])).tolist())) == 2


@pytest.mark.parametrize("source", ["digits", "breast-cancer"])
def test_the_sets_of_scikit_learn_are_known_too(source: str) -> None:
    rows = rows_of(read(source, DataSettings()))
    assert rows.record is not None
    assert len(set(rows.record.tolist())) == len(rows)


# --- on the way ------------------------------------------------------------------------------


def numbered(count: int, first: int = 0) -> Rows:
    """The only input of a row says which record it is."""
    values = np.arange(first, first + count)
    return Rows(values[:, None], values // 2 % 2, record=of_arrays(values))


def fits(rows: Rows, values: npt.NDArray[np.floating]) -> None:
    assert rows.record is not None
    assert rows.record.tolist() == of_arrays(values).tolist()


def test_rows_that_are_taken_or_joined_stay_known() -> None:
    rows = numbered(40)
    fits(rows.take([3, 1, 1]), np.array([3, 1, 1]))
    for part in gradual([rows.take(np.arange(20)), rows.take(np.arange(20, 40))], 0.5, 1):
        fits(part, part.inputs[:, 0])
    one, two = (Client(name, lambda: None, numbered(5, at)) for name, at in (("a", 0), ("b", 5)))
    fits(pooled([one, two])[0].data, np.arange(10))


def test_rows_without_records_cost_the_others_none() -> None:
    bare = Rows(np.zeros((2, 1)), np.zeros(2, int))
    assert joined_records([bare, bare]) is None
    found = joined_records([bare, numbered(2)])
    assert found is not None
    assert found.tolist() == [b"", b"", *of_arrays(np.arange(2)).tolist()]


@pytest.mark.parametrize("shift", ["class-incremental", "permutation"])
def test_clients_and_streams_keep_records(write: Write, shift: str) -> None:
    lines = [f"{k},{k % 7},{'ny'[k % 2]}" for k in range(120)]
    root = write("t.csv", "a,b,label\n" + "\n".join(lines))
    data = DataSettings(source="csv:t.csv", path=root, test_rows=20)
    federated = prepare(data, ProxySettings(rows=20), ClientsSettings(count=2), 3)
    dealt = {one for part in federated.parts.values() for one in part.record.tolist()}  # type: ignore[union-attr]
    assert len(dealt) == 80
    how = StreamSettings(experiences=2, shift=shift)
    met = streams(federated.parts, federated.dataset.test, how, 3)
    for client, course in met.train.items():
        found = [one for part in course for one in part.record.tolist()]  # type: ignore[union-attr]
        assert sorted(found) == sorted(federated.parts[client].record.tolist())  # type: ignore[union-attr]


# --- fault: the ledger took the same patients for new ones -------------------------------------


def test_other_public_rows_do_not_reset_what_was_spent(write: Write) -> None:
    """300 patients, charged three times; between the runs the public rows change."""
    random = np.random.default_rng(0)

    def lines(count: int) -> list[str]:
        return [",".join(f"{value:.6f}" for value in row) for row in random.normal(size=(count, 3))]

    shared = lines(200)
    own = [f"{line},{'ny'[number % 2]}" for number, line in enumerate(lines(300))]
    root = write("own.csv", "a,b,c,label\n" + "\n".join(own))
    ledger = Ledger(None)
    inputs = []
    for run, public in enumerate((shared, shared[:-1], shared[1:])):
        columns = "a,b,c" if run < 2 else "c,b,a"
        write("public.csv", f"{columns}\n" + "\n".join(public))
        agreed = DataSettings(path=root, indicators=False)
        how = ProxySettings(path="csv:public.csv", rows=len(public))
        rows = read_public(agreed, how, ["n", "y"], 1).own("csv:own.csv", agreed)
        inputs.append(rows.inputs)

        def charge(number: int = run, rows: Rows = rows) -> None:
            ledger.reserve(
                run=f"run-{number}",
                round=1,
                mechanism="dpsgd",
                spending=Spending.of(Sampled(0.25, 1.2), 25),
                unit="record",
                relation="add-remove",
                units=units_of(rows, "record").names,
                epsilon=8.0,
                delta=1e-5,
            )

        if run == 0:
            charge()
            assert ledger.spent(1e-5) == pytest.approx(6.643, abs=0.01)
            continue
        with pytest.raises(BudgetExceeded):
            charge()
    assert not np.array_equal(inputs[0], inputs[1])  # the scale did change
    assert len(ledger.cohorts()) == 1
