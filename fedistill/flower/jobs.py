"""What the server app is to do, in a file on its own machine.

Flower sends the configuration of a run to every node. So only a name goes that way; the paths
behind it stay in a folder that the SuperLink's processes know from their environment.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedistill import store
from fedistill.errors import RunError

FOLDER = "FEDISTILL_JOBS"
"""Environment variable: the folder that jobs are laid down in."""
FILE = "job.json"


def lay_down(folder: Path, job: Mapping[str, Any]) -> str:
    """Write a job into a folder of its own, and return the name by which it is found."""
    store.save_json(folder / FILE, dict(job))
    return folder.name


def pick_up(name: str) -> dict[str, Any]:
    """The job of a name.

    Raises:
        RunError: there is none: it was submitted on another machine, or the variable is not set.
    """
    folder = Path(os.environ.get(FOLDER, "flower"))
    try:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError
        job: dict[str, Any] = json.loads((folder / name / FILE).read_text())
    except (OSError, ValueError):
        raise RunError(
            f"expected a job that fedistill run laid down in {folder}, found none: start the "
            f"SuperLink with {FOLDER} set, and run on its machine, as the same user"
        ) from None
    return job
