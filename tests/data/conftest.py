"""Where the real data lie, and small helpers that every test of the data layer uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedistill.types import Rows

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A path under the real data; the test is skipped with a reason when it is absent."""
    root = Path(os.environ.get("FEDISTILL_DATA") or REPO.parent / "shared" / "data")

    def find(name: str) -> Path:
        place = root / name
        if not place.exists():
            pytest.skip(f"real data absent: {place} (set FEDISTILL_DATA)")
        monkeypatch.setenv("FEDISTILL_DATA", str(root))
        return place

    return find


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a small text file; the returned string is the data root."""

    def put(name: str, text: str) -> str:
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
        return str(tmp_path)

    return put


@pytest.fixture
def make_rows() -> Callable[..., Rows]:
    """Rows whose only input is their own number."""

    def make(labels: list[int], site: list[str] | None = None) -> Rows:
        count = len(labels)
        return Rows(
            np.arange(count, dtype=np.float32)[:, None],
            np.array(labels, dtype=np.int64),
            np.arange(count, dtype=np.int64),
            None if site is None else np.array(site),
        )

    return make
