"""Every settings file that ships is read and checked as a user would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedistill import config
from fedistill.plan import describe

REPO = Path(__file__).resolve().parents[1]
FILES = sorted((REPO / "simulations").rglob("*.toml"))


@pytest.fixture
def at_home(monkeypatch):
    """As from the repository's root, with the data where they lie here."""
    monkeypatch.chdir(REPO)
    root = Path(os.environ.get("FEDISTILL_DATA") or REPO.parent / "shared" / "data")
    monkeypatch.setenv("FEDISTILL_DATA", str(root))
    return root


def absent(settings, root):
    """The first thing a simulation needs that this machine has not."""
    home = Path(settings.data.path) if settings.data.path else root
    for source in (settings.data.source, settings.data.test, settings.proxy.path):
        prefix, colon, name = source.partition(":")
        if prefix in {"hf", "openml"}:
            return f"{source} is online"
        stem = home / name
        if colon and not [*stem.parent.glob(f"{stem.name}*")]:
            return f"{stem} is not here"
    path = settings.clients.partition_path
    if path and not (Path(path).exists() or (home / path).exists()):
        return f"{path} is not here"
    return None


def test_there_are_simulations():
    assert "digits" in {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_simulation_is_read_without_a_problem(path):
    settings = config.load(path)
    assert config.parse(config.to_toml(settings)) == settings


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_simulation_passes_its_check(path, at_home):
    settings = config.load(path)
    if missing := absent(settings, at_home):
        pytest.skip(missing)
    told = "\n".join(describe(settings))
    for word in ("data", "clients", "proxy", "method", "bytes", "privacy"):
        assert f"\n{word}" in f"\n{told}"
