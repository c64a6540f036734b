"""The Flower app that travels with a run: it names the installed package, and holds nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

SIMULATION = "simulation.toml"
"""Beside the folders of a deployment: the same federation as a simulation."""
APP: Mapping[str, str] = {
    "pyproject.toml": """\
[project]
name = "fdapp"
version = "1.0.0"
description = "a federation of fedistill; the code is that of the installed package"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedistill"

[tool.flwr.app.components]
serverapp = "fdapp.apps:server"
clientapp = "fdapp.apps:client"

[tool.flwr.app.config]
job = ""
""",
    "fdapp/__init__.py": "",
    "fdapp/apps.py": '''\
"""The installed package does everything: this bundle only names it."""

from fedistill.flower import client_app, server_app

client = client_app()
server = server_app()
''',
}
"""The Flower app, a file each. It has no dependencies to install: offline, that would fail."""


def write_app(folder: Path) -> Path:
    """The Flower app, in a folder of its own: whatever lies beside it would be shipped too."""
    for name, text in APP.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return folder
