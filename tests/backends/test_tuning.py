"""How many clients side by side."""

from __future__ import annotations

import pytest

from fedistill.backends import tuning


def test_the_last_cache_is_the_largest_one_that_the_system_names(tmp_path, monkeypatch):
    for number, size in enumerate(["48K", "2048K", "32M", "said otherwise"]):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(tuning, "CACHE", tmp_path)
    assert tuning.last_cache.__wrapped__() == 32 << 20
    monkeypatch.setattr(tuning, "CACHE", tmp_path / "none")
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
