"""Names of sources, the built-in sets, and where files are looked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedistill import catalog
from fedistill.config import DataSettings
from fedistill.data import breast_cancer, digits, read
from fedistill.data.files import find_file, find_files, short_names
from fedistill.data.sources import SOURCES
from fedistill.errors import DataError


def test_every_source_has_a_summary() -> None:
    assert tuple(SOURCES) == (
        "digits",
        "breast-cancer",
        "idx",
        "csv",
        "npz",
        "parquet",
        "sessions",
        "hf",
        "openml",
    )
    for name in SOURCES:
        assert 20 < len(catalog.summary("sources", name)) < 100


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("dgits", 'did you mean "digits"'),
        ("", "known: breast-cancer"),
        ("csv", 'expected "csv:" and a name'),
        ("csv:", 'expected "csv:" and a name'),
        ("digits:3", 'expected "digits" alone'),
    ],
)
def test_unknown_sources(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(source, DataSettings())


def test_digits() -> None:
    data = digits(seed=7)
    assert [len(part) for part in (data.train, data.test, data.public)] == [1037, 360, 400]
    assert data.train.inputs.shape[1:] == (64,)
    assert (data.train.inputs.min(), data.train.inputs.max()) == (0.0, 1.0)
    assert set(data.public.labels.tolist()) == {-1}
    assert data.classes == tuple("0123456789")
    assert np.array_equal(digits(seed=7).train.ids, data.train.ids)
    assert not np.array_equal(digits(seed=8).train.ids, data.train.ids)


def test_breast_cancer() -> None:
    data = breast_cancer()
    assert [len(part) for part in (data.train, data.test, data.public)] == [355, 114, 100]
    # Not exactly 0: values beyond four deviations are limited.
    np.testing.assert_allclose(data.public.inputs.mean(axis=0), 0, atol=0.05)
    assert np.abs(data.public.inputs).max() <= 4
    assert data.classes == ("malignant", "benign")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fashion_mnist/train", "github.com/zalandoresearch/fashion-mnist"),
        ("heart_disease_uci/*.data", "archive.ics.uci.edu/dataset/45"),
        ("mine.csv", "put the file there"),
    ],
)
def test_an_absent_file_says_where_to_get_it(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDISTILL_DATA", str(tmp_path))
    with pytest.raises(DataError, match=said) as caught:
        find_files("", name)
    assert str(tmp_path / name) in str(caught.value)


def test_the_setting_wins_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.csv").touch()
    monkeypatch.setenv("FEDISTILL_DATA", str(tmp_path / "there"))
    assert find_file(str(tmp_path / "here"), "a.csv").parent.name == "here"
    assert find_file("", "a.csv").parent.name == "there"
    monkeypatch.delenv("FEDISTILL_DATA")
    monkeypatch.chdir(tmp_path / "here")
    assert find_file("", "a.csv") == Path("a.csv")


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["processed.va.data", "processed.cleveland.data"], ["va", "cleveland"]),
        (["ulm/rows.csv.gz", "bern/rows.csv"], ["ulm", "bern"]),
        (["site-1.csv", "site-10.csv"], ["1", "10"]),
        (["only.csv"], ["only"]),
        (["a.csv", "a.b.csv"], ["a.csv", "a.b.csv"]),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert short_names([Path(name) for name in names]) == short


def test_importing_the_data_layer_imports_neither_torch_nor_sklearn() -> None:
    code = "import sys, fedistill.data; sys.exit(bool({'torch', 'sklearn'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
