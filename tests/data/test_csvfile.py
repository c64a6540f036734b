"""Text tables by hand, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedistill.config import DataSettings
from fedistill.data import Table, read
from fedistill.errors import DataError

Write = Callable[[str, str], str]
SMALL = "age,colour,label\n1,red,no\n?,blue,yes\n3,,no\n"


def settings_for(root: str, **changes: object) -> DataSettings:
    return replace(DataSettings(path=root), **changes)


def load(write: Write, text: str, **changes: object) -> Table:
    return read("csv:t.csv", settings_for(write("t.csv", text), **changes))


def test_numbers_texts_and_gaps_by_hand(write: Write) -> None:
    table = load(write, SMALL)
    assert table.features == ("age", "colour=blue", "colour=red")
    assert table.classes == ("no", "yes")
    assert table.labels.tolist() == [0, 1, 0]
    expected = [[1, 0, 1], [np.nan, 1, 0], [3, 0, 0]]
    np.testing.assert_array_equal(table.inputs, np.array(expected, np.float32))


def test_no_header_tab_label_by_number_and_drop(write: Write) -> None:
    text = "0.0\t7\tx\n1\t8\ty\n\n1.0\t9\tz\n"
    table = load(write, text, header=False, separator="\t", label="0", drop=("-1",))
    assert table.features == ("1",)
    assert table.inputs.ravel().tolist() == [7, 8, 9]
    assert (table.classes, table.labels.tolist()) == (("0", "1"), [0, 1, 1])


def test_number_labels_are_sorted_as_numbers_and_cut_by_positive_above(write: Write) -> None:
    text = "a,label\n1,10\n2,9\n3,-1\n"
    assert load(write, text).classes == ("-1", "9", "10")
    table = load(write, text, positive_above=9.0)
    assert (table.classes, table.labels.tolist()) == (("<=9", ">9"), [1, 0, 0])


def test_packed_files_and_spaces_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeffa, label\n1, x\n2, y\n".encode()
    (tmp_path / "g.csv.gz").write_bytes(gzip.compress(text))
    (tmp_path / "x.csv.xz").write_bytes(lzma.compress(text))
    for name in ("g.csv", "g.csv.gz", "x.csv"):
        table = read(f"csv:{name}", settings_for(str(tmp_path)))
        assert (table.features, table.classes) == (("a",), ("x", "y"))


def test_several_files_and_the_file_column(write: Write) -> None:
    write("h.ulm.data", "1,0\n2,1\n")
    root = write("h.bern.data", "3,1\n")
    settings = settings_for(root, header=False, label="-1")
    table = read("csv:h.*.data", settings, column="file")
    assert table.columns["file"].tolist() == ["bern", "ulm", "ulm"]
    assert table.inputs.ravel().tolist() == [3, 1, 2]
    assert read("csv:h.*.data", settings).columns == {}


def test_a_site_column_is_no_feature(write: Write) -> None:
    root = write("t.csv", "ward,a,label\n1.0,5,0\n2,6,1\n")
    table = read("csv:t.csv", settings_for(root), column="ward")
    assert table.columns["ward"].tolist() == ["1", "2"]
    assert table.features == ("a",)


SECRET = "7654321"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"a,label\n1,0\n{SECRET},0,1\n", r"t\.csv, line 3: expected 2 columns.*found 3"),
        (f"a,label\n1,0\n{SECRET}\n", r"line 3: expected 2 columns.*found 1"),
        (f"a,label\n{SECRET},\n1,0\n", "line 2: expected a label"),
        (f"a,label\n{SECRET},?\n1,0\n", "line 2: expected a label"),
        ("a,label\n1,0\n2,1\nnan,1\n", 'line 4, column "a": expected a finite number'),
        ("a,label\n1,0\n-inf,1\n", 'line 3, column "a": expected a finite number'),
        ("a,label\n1,0\n1e300,1\n", 'line 3, column "a": expected a finite number'),
        ("a,label\n1,0\n2,nan\n", "line 3: expected a label"),
    ],
)
def test_fault_47_bad_rows_are_named_by_line_and_never_shown(
    write: Write, text: str, said: str
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load(write, text)
    assert SECRET not in str(caught.value)


def test_many_texts_are_refused_with_the_column(write: Write) -> None:
    text = "name,label\n" + "".join(f"patient{n},{n % 2}\n" for n in range(51))
    with pytest.raises(DataError, match=r'column "name", found 51: add "name" to data\.drop') as it:
        load(write, text)
    assert "patient" not in str(it.value)
    assert load(write, text.replace("patient50", "patient49")).inputs.shape == (51, 50)


def test_one_stray_text_in_a_column_of_numbers_is_named(write: Write) -> None:
    text = "a,label\n" + "".join(f"{n},{n % 2}\n" for n in range(60)) + f"x{SECRET},1\n"
    with pytest.raises(DataError, match='line 62, column "a": expected a number') as caught:
        load(write, text)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": "lable"}, 'did you mean "label"'),
        ({"drop": ("colr",)}, 'data.drop.*did you mean "colour"'),
        ({"label": "5"}, "found none"),
        ({"separator": ""}, "expected one character, found 0"),
        ({"drop": ("age", "colour")}, "a feature column"),
        ({"positive_above": 1.0}, "expected numbers as labels"),
    ],
)
def test_wrong_settings_say_what_to_do(write: Write, changes: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write, SMALL, **changes)


def test_a_first_line_of_data_is_not_shown_as_column_names(write: Write) -> None:
    with pytest.raises(DataError, match=r"set data\.header = false") as caught:
        load(write, f"{SECRET},1\n2,0\n", label="outcome")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found an empty file"),
        ("a,label\n", "expected rows, found none"),
        ("a,a,label\n1,2,0\n", "that of column 1 twice"),
        ("a,label\n" + "".join(f"1,{n}.5\n" for n in range(60)), "set data.positive_above"),
        ("a,label\n" + "".join(f"1,w{n}\n" for n in range(60)), "60 different values"),
    ],
)
def test_files_without_use_are_refused(write: Write, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write, text)


def test_files_with_other_columns_are_refused(write: Write) -> None:
    write("a.csv", "x,label\n1,0\n")
    root = write("b.csv", "y,label\n1,0\n")
    with pytest.raises(DataError, match=r"b\.csv: expected the same 2 columns as a\.csv"):
        read("csv:*.csv", settings_for(root))


def test_damaged_bytes_are_one_sentence(tmp_path: Path) -> None:
    whole = gzip.compress(SMALL.encode() * 50)
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.csv").write_bytes(b"a,label\n\xff,1\n")
    with pytest.raises(DataError, match="cut off or damaged"):
        read("csv:cut.csv", settings_for(str(tmp_path)))
    with pytest.raises(DataError, match="expected UTF-8"):
        read("csv:latin.csv", settings_for(str(tmp_path)))


def test_a_missing_site_is_named_by_line(write: Write) -> None:
    root = write("t.csv", "ward,a,label\nx,5,0\n,6,1\n")
    with pytest.raises(DataError, match='line 3: expected a site in column "ward"'):
        read("csv:t.csv", settings_for(root), column="ward")


def test_the_four_hospitals(real: Callable[[str], Path]) -> None:
    real("heart_disease_uci")
    settings = DataSettings(header=False, label="-1", positive_above=0)
    table = read("csv:heart_disease_uci/processed.*.data", settings, column="file")
    names, counts = np.unique(table.columns["file"], return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {
        "cleveland": 303,
        "hungarian": 294,
        "switzerland": 123,
        "va": 200,
    }
    assert table.inputs.shape == (920, 13)
    assert np.bincount(table.labels).tolist() == [411, 509]


def test_the_bank(real: Callable[[str], Path]) -> None:
    real("credit_default_uci")
    settings = DataSettings(label="default.payment.next.month", drop=("ID",))
    table = read("csv:credit_default_uci/UCI_Credit_Card.csv.gz", settings)
    assert table.inputs.shape == (30000, 23)
    assert int(table.labels.sum()) == 6636


# --- two classes out of many ----------------------------------------------------------------------


def test_labels_that_are_named_are_one_class_and_all_others_the_other(tmp_path):
    rows = "\n".join(f"{row},{('<30', '>30', 'NO')[row % 3]}" for row in range(9))
    (tmp_path / "rows.csv").write_text(f"x,label\n{rows}")
    settings = DataSettings(path=str(tmp_path), positive=("<30", ">30"))
    table = read("csv:rows.csv", settings)
    assert table.classes == ("other", "<30 or >30")
    assert table.labels.tolist() == [1, 1, 0] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positive": ("YES",)}, 'labels such as "YES"'),
        ({"positive": ("NO",), "positive_above": 1.0}, "found both"),
    ],
)
def test_named_labels_that_cannot_be(tmp_path, changes, words):
    (tmp_path / "rows.csv").write_text("x,label\n1,NO\n2,<30")
    with pytest.raises(DataError, match=words):
        read("csv:rows.csv", DataSettings(path=str(tmp_path), **changes))
