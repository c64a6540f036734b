"""Sites made of several columns, and of bands of numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedistill.config import DataSettings
from fedistill.data import bands
from fedistill.data.bands import Part, banded, joined, parse
from fedistill.data.partition import by_column
from fedistill.data.sources import read
from fedistill.data.table import rows_of
from fedistill.errors import DataError

TABLE = "school,age,income,label\n" + "\n".join(
    f"{row % 3 + 1},{20 + row},{row * 10},{row % 2}" for row in range(30)
)


def test_parts_are_read_from_one_text() -> None:
    assert parse("town") == (Part("town"),)
    assert parse("a:1 + b") == (Part("a", (1.0,)), Part("b"))
    assert parse(" age : 35 , 50 ") == (Part("age", (35.0, 50.0)),)


@pytest.mark.parametrize("text", ["age:", "age:old", "age:50,35", "age:35,35"])
def test_cuts_that_are_no_rising_numbers_are_refused(text: str) -> None:
    with pytest.raises(DataError, match='rising numbers after "age:"'):
        parse(text)


def test_a_number_on_a_cut_belongs_to_the_band_above() -> None:
    found = banded(Part("age", (35.0, 50.0)), np.array([34.9, 35.0, 49.0, 50.0]))
    assert found.tolist() == ["age-below-35", "age-35-50", "age-35-50", "age-from-50"]
    assert joined([found, found])[0] == "age-below-35_age-below-35"


def table(folder: Path, column: str, **changes: object) -> object:
    (folder / "rows.csv").write_text(TABLE)
    settings = DataSettings(path=str(folder), **changes)  # type: ignore[arg-type]
    return read("csv:rows.csv", settings, column=column)


def test_the_columns_that_make_sites_stay_among_the_features(tmp_path: Path) -> None:
    found = table(tmp_path, "school:2 + age:30")
    assert found.features == ("school", "age", "income")  # type: ignore[attr-defined]
    parts = by_column(rows_of(found, "school:2 + age:30"))  # type: ignore[arg-type]
    assert sorted(parts) == [
        "school-below-2_age-below-30",
        "school-below-2_age-from-30",
        "school-from-2_age-below-30",
        "school-from-2_age-from-30",
    ]
    assert sum(map(len, parts.values())) == 30
    old = parts["school-from-2_age-from-30"].inputs
    assert (old[:, 0] >= 2).all()
    assert (old[:, 1] >= 30).all()


def test_values_and_bands_may_be_joined(tmp_path: Path) -> None:
    parts = by_column(rows_of(table(tmp_path, "school+age:30"), "school+age:30"))  # type: ignore[arg-type]
    assert len(parts) == 6
    assert "school-3_age-below-30" in parts


@pytest.mark.parametrize(
    ("column", "words"),
    [("town:3", 'expected a column "town"'), ("school + aged:30", 'did you mean "age"')],
)
def test_a_column_that_is_not_there_is_named(tmp_path: Path, column: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        table(tmp_path, column)


def test_texts_cannot_be_cut(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("town,x,label\n" + "\n".join(["a,1,0", "b,2,1"] * 3))
    with pytest.raises(DataError, match="expected numbers"):
        read("csv:rows.csv", DataSettings(path=str(tmp_path)), column="town:3")


def test_a_column_whose_name_looks_like_bands_is_that_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a:1,x,label\n" + "\n".join(["u,1,0", "v,2,1"] * 3))
    found = read("csv:rows.csv", DataSettings(path=str(tmp_path)), column="a:1")
    assert sorted(by_column(rows_of(found, "a:1"))) == ["u", "v"]
    assert bands.parse("a:1") == (Part("a", (1.0,)),)
