"""The coordinator drops what it keeps of a client, says what it cannot, and the run goes on."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import INPUTS, federation, participants

import fedistill as fd
from fedistill import store
from fedistill.dropping import drop_client
from fedistill.errors import RunError
from fedistill.federation import Federation
from fedistill.receipts import Receipt


def checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays, facts, _ = store.load_state(folder / "checkpoint/server")
    return dict(arrays), facts["server"]


def dropped(folder: Path, client: str = "site-1", **options: Any) -> Receipt:
    return drop_client(folder, client, say=lambda text: None, **options)


@pytest.mark.parametrize("method", ["fedistill", "scarlet", "cfd", "ds-fl"])
def test_the_server_drops_what_it_keeps_of_a_client_and_makes_targets_anew(
    method: str, tmp_path: Path
) -> None:
    list(federation(method=method).run(3, out=tmp_path))
    before, facts = checkpoint(tmp_path)
    targets = int((before["stamp"] > 0).sum())
    assert targets
    heard = before.get("heard.site-1.round", np.empty(0))
    receipt = dropped(tmp_path)
    assert (receipt.targets, receipt.predictions) == (targets, int((heard > 0).sum()))
    assert receipt.written == ("checkpoint/server.previous", "checkpoint/server")
    for place in (tmp_path / "checkpoint/server", tmp_path / "checkpoint/server.previous"):
        arrays, meta, _ = store.load_state(place)
        assert not [n for n in arrays if n.startswith(("heard.site-1.", "targets."))]
        assert not arrays["stamp"].any()
        assert not arrays["table"].any()
        assert not arrays.get("cache.latest.round", np.zeros(1)).any()
        assert "targets" not in meta["server"]
        assert meta["server"]["enrolled"]["site-1"] is None
    arrays, after = checkpoint(tmp_path)
    for name in before:
        if name.startswith("heard.site-2."):
            np.testing.assert_array_equal(arrays[name], before[name])
    assert after["round"] == facts["round"] == 3
    # The run goes on: all targets are made anew, and the client is heard again.
    again = federation(method=method)
    rows = list(again.run(5, out=tmp_path, resume=True))
    assert [row["clients_ok"] for row in rows] == [4, 4]
    assert (again.server.stamp > 0).sum() == targets
    assert set(again.server.stamp[again.server.stamp > 0].tolist()) <= {4, 5}


def test_trust_in_a_client_is_dropped_too(tmp_path: Path) -> None:
    trusting = fd.method("fedistill", rule="trust")
    list(federation(method=trusting).run(2, out=tmp_path))
    assert "site-1" in checkpoint(tmp_path)[1]["rule"]["clients"]
    dropped(tmp_path)
    assert sorted(checkpoint(tmp_path)[1]["rule"]["clients"]) == ["site-0", "site-2", "site-3"]


@pytest.mark.parametrize("restart", [False, True])
def test_the_servers_student_keeps_what_it_learned_or_begins_anew(
    restart: bool, tmp_path: Path
) -> None:
    list(federation().run(2, out=tmp_path))
    receipt = dropped(tmp_path, restart=restart)
    assert ("NOT bounded" in receipt.weights["student"]) is not restart
    arrays, _ = checkpoint(tmp_path)
    assert any(name.startswith("student.") for name in arrays) is not restart
    assert len(list(federation().run(3, out=tmp_path, resume=True))) == 1


@pytest.mark.parametrize("method", ["fedavg", "fd", "fedproto"])
def test_tables_of_a_client_are_dropped_too(method: str, tmp_path: Path) -> None:
    def made() -> Federation:
        alike = partial(fd.models.Linear, INPUTS, 3)
        people = [dataclasses.replace(one, build=alike) for one in participants()]
        return federation(people, method=method, student=alike if method == "fedavg" else None)

    list(made().run(2, out=tmp_path))
    receipt = dropped(tmp_path)
    arrays, _ = checkpoint(tmp_path)
    assert not [name for name in arrays if name.startswith("own.")]
    assert ("common" in arrays) is (method == "fedavg")
    assert ("average" in receipt.weights) is (method == "fedavg")
    assert len(list(made().run(3, out=tmp_path, resume=True))) == 1
    dropped(tmp_path, restart=True)
    assert len(list(made().run(4, out=tmp_path, resume=True))) == 1


def test_a_private_client_is_bounded_by_what_it_said(tmp_path: Path) -> None:
    list(federation().run(1, out=tmp_path))
    path = tmp_path / "checkpoint/server"
    arrays, facts, _ = store.load_state(path)
    facts["server"]["privacy"] = {"receipts": {"site-1": "ab"}, "epsilons": {"site-1": 3.0}}
    store.save_state(path, arrays, facts)
    receipt = dropped(tmp_path)
    assert receipt.epsilon == 3.0
    assert "bounded by epsilon 3" in receipt.weights["student"]
    assert checkpoint(tmp_path)[1]["privacy"] == facts["server"]["privacy"]


def test_unknown_clients_and_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the folder of a run"):
        dropped(tmp_path)
    list(federation().run(1, out=tmp_path))
    with pytest.raises(RunError, match='found "site-9"; did you mean "site-'):
        dropped(tmp_path, "site-9")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    list(federation().run(1, out=tmp_path))
    before = (tmp_path / "checkpoint/server").read_bytes()
    with store.held(tmp_path / "checkpoint"), pytest.raises(RunError, match="is in use"):
        dropped(tmp_path)
    assert (tmp_path / "checkpoint/server").read_bytes() == before
