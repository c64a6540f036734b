"""Starting points for a settings file: ``fedistill new``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from fedistill import config, store
from fedistill.errors import Problem, SettingsError, did_you_mean

EXAMPLES: Mapping[str, str] = {
    "digits": """
        # scikit-learn's digits over eight clients with unequal classes; needs no download
        [data]
        source = "digits"
        test_rows = 360
        """,
    "images": """
        # images in the idx format (MNIST, Fashion-MNIST) under the data root
        [data]
        source = "idx:fashion_mnist/train"
        test = "idx:fashion_mnist/t10k"
        [proxy]
        rows = 5000
        per_round = 1000
        [clients]
        count = 10
        alpha = 0.1
        model = "lenet"
        """,
    "hospitals": """
        # a csv file per hospital: every file is one client
        [data]
        source = "csv:heart_disease_uci/processed.*.data"
        header = false
        label = "-1"
        positive_above = 0.0
        [proxy]
        rows = 220
        [clients]
        partition = "by-column"
        column = "file"
        """,
    "csv": """
        # one csv file of your own, with a column that names the site
        [data]
        source = "csv:my-rows.csv"
        label = "label"
        [proxy]
        rows = 500
        [clients]
        partition = "by-column"
        column = "site"
        """,
}


def write_starter(path: Path, example: str) -> None:
    """Write a commented settings file; an existing file is left alone.

    Raises:
        SettingsError: unknown example, or the file exists.
    """
    if example not in EXAMPLES:
        text = f'unknown example "{example}"{did_you_mean(example, EXAMPLES)}'
        raise SettingsError([Problem("--example", text)])
    if path.exists():
        raise SettingsError([Problem(str(path), "exists already: choose another name")])
    if not path.parent.is_dir():
        raise SettingsError([Problem(str(path.parent), "no such folder: create it first")])
    text = textwrap.dedent(EXAMPLES[example]).strip()
    settings = config.parse(text)
    title = text.splitlines()[0]
    body = config.to_toml(settings, comment=config.comment)
    store.write_atomic(path, f"{title}\n\n{body}".encode())
