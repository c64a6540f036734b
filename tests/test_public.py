"""The public face: its names, and what importing it costs."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fedistill

HEAVY = ("torch", "flwr", "opacus", "sklearn", "scipy", "pandas", "jinja2")
HOME = Path(fedistill.__file__)


def test_names_are_sorted_and_each_resolves():
    assert fedistill.__all__ == sorted(fedistill.__all__)
    assert len(set(fedistill.__all__)) == len(fedistill.__all__)
    for name in fedistill.__all__:
        assert getattr(fedistill, name) is not None
    assert dir(fedistill) == fedistill.__all__


def test_the_lazy_names_are_those_that_a_type_checker_sees():
    tree = ast.parse(HOME.read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = dict(fedistill._HOMES) | dict.fromkeys(fedistill._MODULES, "fedistill")
    assert seen == lazy
    assert set(lazy) == set(fedistill.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fedistill' has no attribute 'Federatoin'"):
        fedistill.Federatoin  # noqa: B018


def imported_by(code):
    """Heavy packages that a fresh interpreter holds after running ``code``."""
    report = f"; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_the_package_and_the_command_line_import_nothing_heavy():
    code = (
        "import fedistill, fedistill.cli, fedistill.types, fedistill.errors, fedistill.seeding, "
        "fedistill.config, fedistill.catalog, fedistill.presets, fedistill.wire.messages"
    )
    assert imported_by(code) == []


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["check", "no-such.toml"]])
def test_help_and_a_wrong_file_import_no_torch(arguments):
    code = (
        "import contextlib; from fedistill.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({arguments})\n"
        "pass"
    )
    assert "torch" not in imported_by(code)
    assert "sklearn" not in imported_by(code)


def modules_with_examples():
    for path in sorted(HOME.parent.rglob("*.py")):
        if ">>> " in path.read_text():
            name = path.relative_to(HOME.parent.parent).with_suffix("")
            yield ".".join(name.parts)


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_in_docstrings_do_what_they_say(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert version("fedistill") == fedistill.__version__
