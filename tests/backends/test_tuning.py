"""How many clients side by side."""

from __future__ import annotations

import json

import pytest

from fedistill.backends import tuning
from fedistill.backends.tuning import Choice, Choices, Shape

SHAPE = Shape((6, 8, 3), 16)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A measurement that finds another block each time, its calls, and a cache of its own."""
    calls = []

    def measure(shape):
        calls.append(shape)
        return Choice(6 + len(calls), 100, "highest")

    monkeypatch.setattr(tuning, "measured", measure)
    monkeypatch.setenv("FEDISTILL_CACHE", str(tmp_path / "cache"))
    return calls


def test_the_last_cache_is_the_largest_one_that_the_system_names(tmp_path, monkeypatch):
    for number, size in enumerate(["48K", "2048K", "32M", "said otherwise"]):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(tuning, "FACTS", tmp_path)
    assert tuning.last_cache.__wrapped__() == 32 << 20
    monkeypatch.setattr(tuning, "FACTS", tmp_path / "none")
    assert tuning.last_cache.__wrapped__() == 0


@pytest.mark.parametrize(
    ("cache", "weights", "block"),
    [
        (0, 100_000, 5),
        (32 << 20, 100_000, 5),
        (1 << 30, 100_000, 20),
        (1 << 30, 10**9, 1),
        (0, 9, 25),
    ],
)
def test_a_block_fills_a_share_of_the_cache_and_is_never_empty(monkeypatch, cache, weights, block):
    monkeypatch.setattr(tuning, "last_cache", lambda: cache)
    assert tuning.block_of(weights) == block


def test_the_size_of_a_student():
    assert SHAPE.weights == 6 * 8 + 8 + 8 * 3 + 3


def test_without_measuring_equal_facts_choose_alike(measured):
    assert Choices().of("run", SHAPE) == tuning.by_facts(SHAPE)
    assert Choices().of("other", SHAPE).block == tuning.block_of(SHAPE.weights)
    assert not measured


def test_a_machine_is_measured_once_for_each_shape(measured, tmp_path):
    assert tuning.tuned(SHAPE) == tuning.tuned(SHAPE) == Choice(7, 100, "highest")
    assert tuning.tuned(Shape((6, 3), 16)).block == 8
    assert len(measured) == 2
    assert len(json.loads((tmp_path / "cache" / "tuning.json").read_text())) == 2


@pytest.mark.parametrize("torn", ["", "{", "[1]", '{"a": 1}', "\xff", "[" * 100_000])
def test_a_torn_cache_is_measured_again_and_mended(measured, tmp_path, torn):
    path = tmp_path / "cache" / "tuning.json"
    path.parent.mkdir()
    path.write_bytes(torn.encode("latin-1"))
    assert tuning.tuned(SHAPE).block == 7
    assert tuning.tuned(SHAPE).block == 7
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_is_no_error(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDISTILL_CACHE", str(tmp_path / "file"))
    assert [tuning.tuned(SHAPE).block, tuning.tuned(SHAPE).block] == [7, 8]


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDISTILL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cached() == tmp_path / "fedistill" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cached() == tmp_path / ".cache" / "fedistill" / "tuning.json"


def test_a_run_that_goes_on_goes_on_with_what_it_chose(measured, tmp_path):
    path = tmp_path / "tuning.json"
    first = Choices(path, tune=True).of("run", SHAPE)
    (tmp_path / "cache" / "tuning.json").unlink()
    assert Choices(path, tune=True).of("run", SHAPE) == first
    assert Choices(path).of("run", SHAPE) == first
    assert len(measured) == 1
    assert Choices(path).of("another run", SHAPE) == tuning.by_facts(SHAPE)


RIGHT = {"block": 1, "rows": 1, "mode": "highest"}


@pytest.mark.parametrize(
    "found",
    [
        None,
        3,
        {},
        RIGHT | {"block": 0},
        RIGHT | {"block": True},
        RIGHT | {"rows": "1"},
        RIGHT | {"mode": "high"},
        RIGHT | {"more": 1},
    ],
)
def test_what_is_no_choice_is_none(found):
    assert Choice.of(found) is None


def test_a_mode_that_is_not_exact_on_this_machine_is_not_taken_from_a_file(monkeypatch):
    held = {"block": 1, "rows": 1, "mode": "medium"}
    monkeypatch.setattr(tuning, "error_of", lambda mode: 1e-3)
    assert Choice.of(held) is None
    monkeypatch.setattr(tuning, "error_of", lambda mode: 1e-7)
    assert Choice.of(held) == Choice(1, 1, "medium")


def test_what_gains_too_little_is_not_taken():
    usual, other = Choice(5, 500, "highest"), Choice(10, 500, "highest")
    took = {5: 1.0, 10: 0.97}
    assert tuning._fastest(usual, [other], SHAPE, lambda one, _: took[one.block]) == usual
    took[10] = 0.9
    assert tuning._fastest(usual, [other], SHAPE, lambda one, _: took[one.block]) == other


def test_the_measurement_finds_a_choice_of_exact_products(monkeypatch):
    monkeypatch.setattr(tuning, "error_of", lambda mode: 1e-3 if mode == "medium" else 1e-7)
    found = tuning.measured(SHAPE)
    assert found.mode == "highest"
    assert 1 <= found.block <= tuning.LARGEST_BLOCK
