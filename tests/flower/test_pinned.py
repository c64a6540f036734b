"""A site runs the installed app and no other, whatever app came with the run."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from flwr.clientapp import ClientApp

from fedistill.flower import pinned


def runner(**changes: Any) -> Any:
    """A stand-in for Flower's runner, so that the real one stays as it is."""
    module = types.ModuleType("runner")
    for name in pinned.REPLACED:
        setattr(module, name, lambda *args, **kwargs: pytest.fail("Flower's own was called"))
    for name, value in changes.items():
        setattr(module, name, value)
    return module


def test_the_names_that_are_replaced_are_those_that_this_flwr_calls() -> None:
    from flwr.supernode.runtime import run_clientapp

    text = Path(run_clientapp.__file__).read_text()
    for name in pinned.REPLACED:
        assert callable(getattr(run_clientapp, name)), name
        assert f"{name}(" in text, name
    # Nothing else in it unpacks or imports an app.
    assert "import_module" not in text
    assert "load_app(" not in text


def test_an_app_that_came_is_neither_unpacked_nor_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module is where Flower would find it; importing it leaves a trace."""
    app = tmp_path / "apps" / "evil.fdapp.1.0.0.abcdef12"
    (app / "fdapp").mkdir(parents=True)
    trace = tmp_path / "it-was-imported"
    (app / "fdapp" / "__init__.py").write_text(f"open({str(trace)!r}, 'w')\nclient = None\n")
    (app / "pyproject.toml").write_text(
        '[project]\nname="fdapp"\nversion="1.0.0"\n[tool.flwr.app]\npublisher="evil"\n'
        '[tool.flwr.app.components]\nclientapp="fdapp:client"\n'
    )
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(app))
    module = runner()
    pinned.pin(module)
    assert module.install_from_fab(b"PK\x03\x04 no zip at all", skip_prompt=True) is None
    module.get_project_dir("evil/fdapp", "1.0.0", "abcdef12")
    load = module.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    loaded = load("evil/fdapp", "1.0.0", "abcdef12")
    assert isinstance(loaded, ClientApp)
    assert not trace.exists()
    assert "fdapp" not in sys.modules


@pytest.mark.parametrize("missing", pinned.REPLACED)
def test_a_flwr_that_works_otherwise_is_refused_before_anything_runs(missing: str) -> None:
    module = runner()
    delattr(module, missing)
    with pytest.raises(SystemExit, match=f"no {missing} to replace.*install the version of flwr"):
        pinned.pin(module)


@pytest.mark.parametrize("name", pinned.REPLACED)
def test_a_name_that_is_no_function_is_not_the_one_we_know(name: str) -> None:
    with pytest.raises(SystemExit, match=name):
        pinned.pin(runner(**{name: None}))


def test_the_pinned_program_takes_the_arguments_of_flowers() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "fedistill.flower.pinned", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert "--token" in told.stdout
