"""One party's view: public rows alone decide on columns, categories and scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedistill.config import DataSettings, ProxySettings
from fedistill.data.site import Public, read_public, split
from fedistill.errors import DataError
from fedistill.types import ProxySet, Rows

CLASSES = ("healthy", "ill")
PUBLIC = "age,sex,pain,dose\n" + "\n".join(
    f"{20 + k},{'fm'[k % 2]},{['low', 'mid', 'high'][k % 3]},{k / 2}" for k in range(30)
)
Write = Callable[[str, str], str]


@pytest.fixture
def public(write: Write) -> Public:
    root = write("public.csv", PUBLIC)
    return read_public(data(root), ProxySettings(path="csv:public.csv", rows=30), CLASSES, 7)


def data(root: str, **changes: Any) -> DataSettings:
    return replace(DataSettings(source="", path=root, label="diagnosis"), **changes)


def own(public: Public, write: Write, text: str, **changes: Any) -> Rows:
    root = write("own.csv", text)
    return public.own("csv:own.csv", data(root, **changes))


HEAD = "age,sex,pain,dose,diagnosis\n"
ROWS = "25,f,low,1.0,ill\n31,m,high,2.5,healthy\n44,f,mid,0.5,ill\n"


def test_every_party_derives_the_same_numbers_from_the_public_rows(
    public: Public, write: Write
) -> None:
    root = write("public.csv", PUBLIC)
    again = read_public(data(root), ProxySettings(path="csv:public.csv", rows=30), CLASSES, 7)
    assert again.proxy.fingerprint == public.proxy.fingerprint
    np.testing.assert_array_equal(
        again.own("csv:own.csv", data(write("own.csv", HEAD + ROWS))).inputs,
        own(public, write, HEAD + ROWS).inputs,
    )


def test_own_rows_have_the_columns_of_the_public_ones_and_the_agreed_class_numbers(
    public: Public, write: Write
) -> None:
    rows = own(public, write, HEAD + ROWS)
    assert rows.inputs.shape == (3, public.proxy.inputs.shape[1])
    assert rows.inputs.dtype == np.float32
    assert rows.labels.tolist() == [1, 0, 1]


def test_a_row_that_is_also_public_comes_out_as_the_same_numbers(
    public: Public, write: Write
) -> None:
    lines = PUBLIC.splitlines()
    text = lines[0] + ",diagnosis\n" + "\n".join(f"{line},ill" for line in lines[1:6])
    rows = own(public, write, text)
    for row in rows.inputs:
        assert (np.abs(public.proxy.inputs - row).max(axis=1) == 0).sum() == 1


def test_columns_in_another_order_give_the_same_rows(public: Public, write: Write) -> None:
    plain = own(public, write, HEAD + ROWS)
    turned = own(
        public,
        write,
        "diagnosis,dose,pain,sex,age\nill,1.0,low,f,25\nhealthy,2.5,high,m,31\nill,0.5,mid,f,44\n",
    )
    np.testing.assert_array_equal(turned.inputs, plain.inputs)
    np.testing.assert_array_equal(turned.labels, plain.labels)


def test_a_value_of_a_category_that_the_public_rows_do_not_have_is_a_row_of_zeros_there(
    public: Public, write: Write
) -> None:
    rows = own(public, write, HEAD + "25,f,unbearable,1.0,ill\n25,f,low,1.0,ill\n")
    differing = np.flatnonzero(rows.inputs[0] != rows.inputs[1])
    assert len(differing) == 1
    assert np.isfinite(rows.inputs).all()


def test_a_site_of_one_class_keeps_the_agreed_numbers(public: Public, write: Write) -> None:
    assert own(public, write, HEAD + "25,f,low,1.0,ill\n").labels.tolist() == [1]
    assert own(public, write, HEAD + "25,f,low,1.0,healthy\n").labels.tolist() == [0]


WRONG: dict[str, tuple[str, str]] = {
    "a column less": (
        "age,sex,pain,diagnosis\n25,f,low,ill\n31,m,high,healthy\n",
        'expected a column "dose"',
    ),
    "a column more": (
        "age,sex,pain,dose,zip,diagnosis\n25,f,low,1,8001,ill\n31,m,mid,2,8002,healthy\n",
        '"zip" besides: name it in data.drop',
    ),
    "a class that nobody agreed on": (
        HEAD + "25,f,low,1.0,ill\n31,m,high,2.5,unclear\n",
        "expected the 2 classes",
    ),
    "another name for a column": (
        "years,sex,pain,dose,diagnosis\n25,f,low,1.0,ill\n31,m,mid,2.0,healthy\n",
        'expected a column "age"',
    ),
    "no labels": ("age,sex,pain,dose\n25,f,low,1.0\n", "diagnosis"),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
def test_own_rows_that_do_not_fit_are_refused_with_the_file_and_what_is_wrong(
    text: str, words: str, public: Public, write: Write
) -> None:
    with pytest.raises(DataError) as caught:
        own(public, write, text)
    assert words in str(caught.value)
    assert "own.csv" in str(caught.value)
    assert "8001" not in str(caught.value)
    assert "unclear" not in str(caught.value)  # fault 47: no value of a private row


def test_an_unknown_class_is_said_with_the_classes_that_were_agreed_on(
    public: Public, write: Write
) -> None:
    with pytest.raises(DataError, match="healthy, ill"):
        own(public, write, HEAD + "25,f,low,1.0,ill\n31,m,high,2.5,unclear\n")


def test_a_column_more_can_be_left_out(public: Public, write: Write) -> None:
    text = "age,sex,zip,pain,dose,diagnosis\n25,f,8001,low,1.0,ill\n31,m,8002,high,2.5,healthy\n"
    rows = own(public, write, text, drop=("zip",))
    assert rows.inputs.shape[1] == public.proxy.inputs.shape[1]


def test_a_party_without_rows_has_none_of_the_right_shape(public: Public) -> None:
    rows = public.own("", DataSettings(source=""))
    assert rows.inputs.shape == (0, public.proxy.inputs.shape[1])
    assert rows.labels.shape == (0,)


# --- npz: labels as numbers ----------------------------------------------------------------------


def arrays(root: Path, name: str, inputs: Any, labels: Any = None) -> None:
    told = {} if labels is None else {"labels": np.asarray(labels)}
    np.savez(root / name, inputs=np.asarray(inputs, np.float32), **told)


@pytest.fixture
def pictures(tmp_path: Path) -> Public:
    arrays(tmp_path, "public.npz", np.random.default_rng(0).random((12, 4)))
    told = DataSettings(source="", path=str(tmp_path), scale="none")
    return read_public(told, ProxySettings(path="npz:public.npz", rows=12), ("x", "y", "z"), 7)


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0], [2, 2, 2], [1, 0, 1]])
def test_numbered_labels_are_those_of_the_named_classes(
    labels: list[int], pictures: Public, tmp_path: Path
) -> None:
    arrays(tmp_path, "own.npz", np.ones((3, 4)), labels)
    rows = pictures.own("npz:own.npz", DataSettings(path=str(tmp_path), scale="none"))
    assert rows.labels.tolist() == labels


def test_a_number_beyond_the_named_classes_is_refused(pictures: Public, tmp_path: Path) -> None:
    arrays(tmp_path, "own.npz", np.ones((3, 4)), [0, 1, 3])
    with pytest.raises(DataError, match=r"class numbers from 0 to 2, found 3: map the labels"):
        pictures.own("npz:own.npz", DataSettings(path=str(tmp_path), scale="none"))


def test_classes_that_are_named_by_numbers_stay_those_numbers(tmp_path: Path) -> None:
    """A site with the digits 0 and 1 alone has not the first two of ("1", "0")."""
    arrays(tmp_path, "public.npz", np.random.default_rng(0).random((12, 4)))
    told = DataSettings(source="", path=str(tmp_path), scale="none")
    public = read_public(told, ProxySettings(path="npz:public.npz", rows=12), ("2", "1", "0"), 7)
    arrays(tmp_path, "own.npz", np.ones((3, 4)), [0, 1, 1])
    rows = public.own("npz:own.npz", replace(told, source="npz:own.npz"))
    assert rows.labels.tolist() == [2, 1, 1]


def test_rows_of_another_shape_are_refused(pictures: Public, tmp_path: Path) -> None:
    arrays(tmp_path, "own.npz", np.ones((3, 5)), [0, 1, 2])
    with pytest.raises(DataError, match=r"expected rows of shape \(4,\)"):
        pictures.own("npz:own.npz", DataSettings(path=str(tmp_path), scale="none"))


# --- the fingerprint -----------------------------------------------------------------------------


def test_other_public_rows_are_refused_by_their_fingerprint(public: Public, write: Write) -> None:
    """Fault 53."""
    fingerprint = public.proxy.fingerprint
    told = ProxySettings(path="csv:public.csv", rows=30)
    root = write("public.csv", PUBLIC)
    assert read_public(data(root), told, CLASSES, 7, fingerprint).proxy.fingerprint == fingerprint
    root = write("public.csv", PUBLIC.replace("21,m", "22,m"))
    with pytest.raises(DataError, match=r"expected proxy rows with the fingerprint .* found .*"):
        read_public(data(root), told, CLASSES, 7, fingerprint)


def test_public_rows_that_are_read_in_another_way_are_refused(public: Public, write: Write) -> None:
    root = write("public.csv", PUBLIC)
    told = ProxySettings(path="csv:public.csv", rows=30)
    with pytest.raises(DataError, match="with the agreed"):
        read_public(data(root, scale="none"), told, CLASSES, 7, public.proxy.fingerprint)


def test_more_public_rows_than_the_file_has_are_refused(write: Write) -> None:
    root = write("public.csv", PUBLIC)
    with pytest.raises(DataError, match=r"expected at most 30, .* found 31: lower it"):
        read_public(data(root), ProxySettings(path="csv:public.csv", rows=31), CLASSES, 7)


def test_a_part_of_the_public_rows_is_drawn_alike_everywhere(write: Write) -> None:
    root = write("public.csv", PUBLIC)
    told = ProxySettings(path="csv:public.csv", rows=10)
    found = [read_public(data(root), told, CLASSES, seed).proxy for seed in (7, 7, 8)]
    assert len(found[0]) == 10
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert isinstance(found[0], ProxySet)


# --- own rows to test on -------------------------------------------------------------------------


def numbered(labels: list[int]) -> Rows:
    return Rows(np.arange(len(labels), dtype=np.float32)[:, None], np.array(labels))


def test_own_test_rows_are_stratified_and_the_rest_is_trained_on() -> None:
    rows = numbered([0] * 30 + [1] * 10)
    train, test = split(rows, DataSettings(test_rows=8), 7, "a")
    assert (len(train), len(test)) == (32, 8)
    assert np.bincount(test.labels).tolist() == [6, 2]
    everything = sorted([*train.inputs[:, 0].tolist(), *test.inputs[:, 0].tolist()])
    assert everything == list(range(40))


def test_each_site_draws_its_own_test_rows_and_always_the_same() -> None:
    rows = numbered([0, 1] * 20)
    drawn = [split(rows, DataSettings(test_rows=0.2), 7, name)[1] for name in ("a", "a", "b")]
    np.testing.assert_array_equal(drawn[0].inputs, drawn[1].inputs)
    assert not np.array_equal(drawn[0].inputs, drawn[2].inputs)


def test_no_test_rows_and_no_rows_at_all_are_allowed() -> None:
    train, test = split(numbered([0, 1]), DataSettings(test_rows=0), 7, "a")
    assert (len(train), len(test)) == (2, 0)
    train, test = split(numbered([]), DataSettings(test_rows=0.2), 7, "a")
    assert (len(train), len(test)) == (0, 0)
