"""Sessions of clicks as a table."""

from __future__ import annotations

import numpy as np
import pytest

from fedistill.config import DataSettings
from fedistill.data.sessions import clicks_before, windows
from fedistill.data.sources import read
from fedistill.data.table import rows_of
from fedistill.errors import DataError


def write(folder, **arrays):
    np.savez(folder / "clicks.npz", **arrays)
    return DataSettings(path=str(folder), history=3, items=0)


CLICKS = {
    "period": np.array([0, 0, 0, 0, 0, 1, 1, 0], dtype=np.uint8),
    "c1": np.array([1, 2, 1, 1, 2, 1, 1, 3]),
    "c2": np.array([10, 20, 20, 30, 20, 30, 10, 20]),
}
"""Sessions of period 0: 1 = 10 20 30, 2 = 20 20, 3 = 20; of period 1: 1 = 30 10."""


def test_the_clicks_before_are_the_input_and_the_next_is_the_class(tmp_path):
    found = read("sessions:clicks.npz", write(tmp_path, **CLICKS))
    assert found.classes == ("20", "10", "30")  # most frequent first, ties by number
    assert found.inputs.tolist() == [[0, 0, 2], [0, 2, 1], [0, 0, 1], [0, 0, 3]]
    assert [found.classes[label] for label in found.labels] == ["20", "30", "20", "10"]
    assert found.inputs.dtype == np.float32
    assert (found.kind, found.auto) == ("table", "none")
    assert rows_of(found).ids.tolist() == [0, 1, 2, 3]


def test_rare_items_are_as_if_they_had_not_been_clicked(tmp_path):
    settings = write(tmp_path, **CLICKS)
    settings = DataSettings(path=settings.path, history=1, items=2)
    found = read("sessions:clicks.npz", settings)
    assert found.classes == ("20", "10")
    assert found.inputs.tolist() == [[2], [1]]


def test_periods_may_be_sites_and_labels_may_be_left_out(tmp_path):
    settings = write(tmp_path, **CLICKS)
    found = read("sessions:clicks.npz", settings, column="period", labelled=False)
    assert found.columns["period"].tolist() == ["0", "0", "0", "1"]
    assert found.labels.tolist() == [-1] * 4


def test_windows_of_a_session_do_not_reach_into_another():
    sessions, items = np.array([5, 3, 5, 3, 5]), np.array([1, 2, 3, 4, 5])
    assert clicks_before(sessions, items, 2).tolist() == [[0, 0], [0, 0], [0, 1], [0, 2], [1, 3]]
    none = np.empty(0, dtype=np.int64)
    assert clicks_before(none, none, 2).shape == (0, 2)
    assert windows(none, np.zeros(1, int), np.zeros(1, int), 2).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"c2": CLICKS["c2"][:3]}, "whole numbers period, c1"),
        ({"c2": CLICKS["c2"] * 0}, "items numbered from 1"),
        ({"c1": CLICKS["c1"] * 0.5}, "whole numbers period, c1"),
        ({"c1": np.arange(8)}, "sessions of two clicks or more"),
    ],
)
def test_unusable_archives_say_why(tmp_path, change, text):
    with pytest.raises(DataError, match=text):
        read("sessions:clicks.npz", write(tmp_path, **{**CLICKS, **change}))


def test_an_absent_archive_and_an_absent_array(tmp_path):
    with pytest.raises(DataError, match="expected a data file at"):
        read("sessions:clicks.npz", DataSettings(path=str(tmp_path)))
    with pytest.raises(DataError, match="period, c1"):
        read("sessions:clicks.npz", write(tmp_path, period=CLICKS["period"]))


def test_the_real_sessions(real):
    real("ader_diginetica/diginetica.npz")
    found = read("sessions:ader_diginetica/diginetica.npz", DataSettings(items=200))
    assert len(found.classes) == 200
    assert found.inputs.shape[1] == DataSettings().history
    assert (found.inputs[:, -1] > 0).all()
    assert found.inputs.max() == 200
    assert found.labels.max() == 199
