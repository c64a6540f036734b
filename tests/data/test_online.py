"""Online sources, with the network replaced by small local data."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedistill.config import DataSettings
from fedistill.data import read
from fedistill.errors import DataError, MissingExtra


def bunch(**changes: Any) -> SimpleNamespace:
    """What fetch_openml returns for a number, a nominal column and a nominal target."""
    usual: dict[str, Any] = {
        "data": np.array([[1.5, 0.0], [np.nan, 1.0], [2.5, np.nan]]),
        "target": np.array(["good", "bad", "good"], dtype=object),
        "feature_names": ["amount", "colour"],
        "target_names": ["class"],
        "categories": {"colour": ["red", "blue"]},
    }
    return SimpleNamespace(**(usual | changes))


@pytest.fixture
def openml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    def install(answer: Any) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def fetch(**wanted: Any) -> Any:
            calls.append(wanted)
            if isinstance(answer, Exception):
                raise answer
            return answer

        datasets = importlib.import_module("sklearn.datasets")
        monkeypatch.setattr(datasets, "fetch_openml", fetch)
        return calls

    return install


def test_openml_by_number_and_by_name(openml: Callable[..., list[dict[str, Any]]]) -> None:
    calls = openml(bunch())
    table = read("openml:31", DataSettings())
    read("openml:credit-g", DataSettings())
    assert [calls[0]["data_id"], calls[1]["name"]] == [31, "credit-g"]
    assert table.features == ("amount", "colour=blue", "colour=red")
    expected = [[1.5, 0, 1], [np.nan, 1, 0], [2.5, 0, 0]]
    np.testing.assert_array_equal(table.inputs, np.array(expected, np.float32))
    assert (table.classes, table.labels.tolist()) == (("bad", "good"), [1, 0, 1])


def test_openml_number_target_other_label_and_site(
    openml: Callable[..., list[dict[str, Any]]],
) -> None:
    openml(bunch(target=np.array([1.0, 5.0, 9.0])))
    table = read("openml:31", DataSettings(positive_above=4.0))
    assert table.labels.tolist() == [0, 1, 1]
    openml(bunch(data=np.array([[1.5, 0.0], [3.0, 1.0], [2.5, 0.0]])))
    table = read("openml:31", DataSettings(label="class"), column="colour")
    assert table.columns["colour"].tolist() == ["red", "blue", "red"]
    assert table.features == ("amount",)


def test_openml_without_network_says_what_to_do(
    openml: Callable[..., list[dict[str, Any]]],
) -> None:
    openml(OSError("no route"))
    with pytest.raises(DataError, match=r"found OSError: .*www\.openml\.org.*csv:FILE") as caught:
        read("openml:31", DataSettings())
    assert "\n" not in str(caught.value)
    openml(bunch(target=None))
    with pytest.raises(DataError, match="one target column"):
        read("openml:31", DataSettings())


class FakeSet:
    """The part of datasets.Dataset that is used."""

    def __init__(self, table: Any, names: list[str]) -> None:
        self.table = table
        self.features = {"label": SimpleNamespace(names=names)}

    def with_format(self, kind: str) -> FakeSet:
        assert kind == "arrow"
        return self

    def __getitem__(self, _: slice) -> Any:
        return self.table


def install_datasets(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hf_names_splits_and_class_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow absent")
    seen: list[tuple[str, str]] = []

    def load(name: str, split: str) -> FakeSet:
        seen.append((name, split))
        return FakeSet(arrow.table({"a": [1.0, 2.0], "label": [1, 0]}), ["cat", "dog"])

    install_datasets(monkeypatch, load)
    settings = DataSettings(path=str(tmp_path))
    table = read("hf:someone/pets@test", settings)
    assert (table.classes, table.labels.tolist()) == (("cat", "dog"), [1, 0])
    (tmp_path / "local").mkdir()
    read("hf:local", settings)
    assert seen == [("someone/pets", "test"), (str(tmp_path / "local"), "train")]


def test_hf_fault_47_a_label_beyond_the_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow absent")
    table = arrow.table({"a": [1.0, 2.0], "label": [1, 2]})
    install_datasets(monkeypatch, lambda name, split: FakeSet(table, ["cat", "dog"]))
    with pytest.raises(DataError, match="row 1: expected a class number from 0 to 1"):
        read("hf:x", DataSettings())


def test_hf_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> None:
        raise ConnectionError(name)

    install_datasets(monkeypatch, load)
    with pytest.raises(DataError, match=r"huggingface\.co/datasets/a/b and put its parquet files"):
        read("hf:a/b", DataSettings())


def test_hf_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"fedistill\[online\]"):
        read("hf:a/b", DataSettings())
