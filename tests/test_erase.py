"""A person who is erased is found nowhere in a run folder: a search for planted bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from builders import INPUTS, gaussian

import fedistill as fd
from fedistill.distill.rehearsal import continual_learner
from fedistill.federation import Federation
from fedistill.settings import ContinualSettings
from fedistill.types import Rows

CANARY = np.float32(7.7112345)
NAME = "patient-Ω-4711"


def clients(build: object, how: ContinualSettings) -> list[fd.Client]:
    """Three clients; rows of one person at the first carry the canary."""
    made = []
    for k in range(3):
        rows = gaussian(30, k) if k else planted(gaussian(30, 0))
        make = partial(continual_learner, how, k)
        made.append(fd.Client(f"site-{k}", build, rows, None, fd.Recipe(epochs=1), make=make))
    return made


def planted(rows: Rows) -> Rows:
    inputs, subject = rows.inputs.copy(), np.full(len(rows), "someone", dtype="<U20")
    inputs[:5, 0], subject[:5] = CANARY, NAME
    return Rows(inputs, rows.labels, subject=subject)


def traces(folder: Path) -> list[str]:
    """Files below a folder that hold the canary or the name, however texts are kept."""
    marks = [CANARY.tobytes(), NAME.encode(), NAME.encode("utf-32-le"), NAME.encode("utf-16-le")]
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and any(mark in path.read_bytes() for mark in marks)
    )


@pytest.mark.parametrize("kind", ["torch", "sklearn"])
def test_nothing_of_an_erased_person_is_left_on_disk(kind: str, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    build = partial(fd.models.MLP, INPUTS, 3) if kind == "torch" else LogisticRegression
    how = ContinualSettings(buffer=1000, objective="der++" if kind == "torch" else "er")
    proxy = fd.ProxySet(gaussian(40, 9).inputs)
    federation = Federation(clients(build, how), proxy, partial(fd.models.MLP, INPUTS, 3), seed=1)
    list(federation.run(2, out=tmp_path))
    assert traces(tmp_path) == ["sites/site-0/state", "sites/site-0/state.previous"]

    receipt = federation.sites["site-0"].erase(NAME)
    assert receipt.rows == 5
    assert traces(tmp_path) == []

    # Nor does it come back: the client still holds the rows, and offers them again.
    list(federation.run(3, out=tmp_path))
    held = federation.sites["site-0"].learner.replay.rows()
    assert NAME not in set(held.subjects)


def test_a_client_that_remembers_nothing_says_so() -> None:
    plain = [
        fd.Client(f"site-{k}", partial(fd.models.MLP, INPUTS, 3), gaussian(30, k)) for k in (0, 1)
    ]
    federation = Federation(plain, fd.ProxySet(gaussian(40, 9).inputs), None, "ds-fl", quorum=1)
    list(federation.run(1))
    with pytest.raises(fd.FedistillError, match="site-0 remembers no rows"):
        federation.sites["site-0"].erase("anybody")
