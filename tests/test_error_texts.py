"""The texts that users see when something is wrong, word for word.

A changed text is a changed promise: FEDISTILL_ERROR_TEXTS=write renews error_texts.json, and the
difference is read before it is committed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import INPUTS, MEAN, federation, gaussian, participants, server

import fedistill as fd
from fedistill import config, models, testing
from fedistill.aggregate import rules
from fedistill.client import Client
from fedistill.distill.build import build_learner
from fedistill.errors import FedistillError, MissingExtra
from fedistill.types import ProxySet, Rows
from fedistill.wire.envelope import seal, unseal
from fedistill.wire.messages import Plan, Upload

SNAPSHOT = Path(__file__).with_name("error_texts.json")
SMALL = partial(models.MLP, INPUTS, 3, width=4)


def rows(label: int = 0, value: float = 1.0) -> Rows:
    return Rows(np.full((2, INPUTS), value, np.float32), np.array([0, label]))


def raise_(error: Exception) -> None:
    raise error


def quorum() -> None:
    made = server(5, MEAN)
    made.combine(made.plan(1), [])


def other_run() -> None:
    site = next(iter(federation(3)._sites(None).values()))
    plan = federation(3).server.plan(1)
    site.answer(
        Plan(run=plan.run, round=1, ask=plan.ask, proxy="other", classes=plan.classes).to_bytes()
    )


def fedavg() -> None:
    federation(3, student=models.logistic_regression, method="fedavg")


CASES: dict[str, Callable[[], Any]] = {
    "settings: every kind of problem": lambda: config.parse(
        'seed = -1\nrouns = 1\n[clients]\nmodel = "mpl"\nlr = "x"\nalpha = 0\n[data]\ndrop = 3\n',
        ["nonsense", "seed.x=1"],
    ),
    "settings: contradictions": lambda: config.parse(
        "[proxy]\nrows = 5\nper_round = 9\n[clients]\ncount = 2\nquorum = 3\n"
        'partition = "by-column"\n[[clients.group]]\nlr = 1.0\n[method]\nsharpen = "era"\n'
        '[evaluation]\nbaselines = ["locl"]\n[backend]\ndevice = "gpu"\n'
    ),
    "settings: broken TOML": lambda: config.parse("a = = 1", source="x.toml"),
    "settings: no file": lambda: config.load("no/such.toml"),
    "settings: unknown site in a group": lambda: config.client_settings(
        config.parse("[[clients.group]]\nsites = ['x']").clients, ["a", "b"]
    ),
    "method: unknown": lambda: fd.method("dsfl"),
    "method: unknown field": lambda: fd.method("ds-fl", ruel="mean"),
    "method: unknown codec": lambda: fd.method("ds-fl", codec="u9"),
    "rule: unknown": lambda: rules.configure("meen"),
    "rule: wrong shape": lambda: rules.combine(
        lambda logits, weights: logits[0, 0], np.zeros((2, 3, 4)), np.ones(2)
    ),
    "rule: no probabilities": lambda: rules.combine(
        lambda logits, weights: logits[0] - 1, np.zeros((2, 3, 4)), np.ones(2)
    ),
    "rule: checked": lambda: testing.check_rule(lambda logits, weights: rules.softmax(logits[0])),
    "codec: checked": lambda: testing.check_codec("u8", loss=0.0),
    "model: lenet on flat rows": lambda: models.factory("lenet", (64,), 3),
    "model: cnn on flat rows": lambda: models.factory("cnn", (64,), 3),
    "model: cnn width": lambda: models.CNN(1, 3, width=6),
    "model: no such device": lambda: models.pick_device("cuda:99"),
    "learner: wrong factory": lambda: build_learner(lambda: 3, fd.Recipe(), classes=3, seed=1),
    "rows: unequal lengths": lambda: Rows(np.zeros((2, 1)), np.zeros(3, int)),
    "proxy: empty": lambda: ProxySet(np.zeros((0, 3))),
    "proxy: not finite": lambda: ProxySet(np.array([[0.0], [np.nan]])),
    "client: id": lambda: Client("a/b", SMALL, rows()),
    "federation: no clients": lambda: federation([]),
    "federation: equal ids": lambda: federation(participants(1) * 2),
    "federation: label outside": lambda: federation([Client("a", SMALL, rows(label=7))]),
    "federation: not finite": lambda: federation([Client("a", SMALL, rows(value=np.inf))]),
    "round: no quorum": quorum,
    "site: other proxy rows": other_run,
    "fedavg: no torch student": fedavg,
    "message: truncated": lambda: unseal(b"FDst", 99),
    "message: too large": lambda: unseal(b"x" * 100, 99),
    "message: unknown version": lambda: unseal(b"FDst\x09\x00" + bytes(40), 99),
    "message: foreign": lambda: unseal(bytes(60), 99),
    "upload: unknown field": lambda: Upload.from_bytes(seal({"rows": 1}, b"")),
    "extra: not installed": lambda: raise_(MissingExtra("pyarrow", "parquet", "a parquet source")),
    "data: unknown source": lambda: fd.data.read("digit", config.DataSettings()),
    "data: too many clients": lambda: fd.data.iid(gaussian(3, 1), 4, seed=1),
    "data: alpha": lambda: fd.data.dirichlet(gaussian(9, 1), 2, 0.0, seed=1),
}


def text_of(case: Callable[[], Any]) -> str:
    with pytest.raises(FedistillError) as caught:
        case()
    return f"{type(caught.value).__name__} ({caught.value.exit_code}): {caught.value}"


@pytest.mark.parametrize("name", CASES)
def test_error_text(name: str) -> None:
    if name == "model: no such device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    found = text_of(CASES[name])
    if os.environ.get("FEDISTILL_ERROR_TEXTS") == "write":
        texts = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
        texts = {key: text for key, text in (texts | {name: found}).items() if key in CASES}
        SNAPSHOT.write_text(json.dumps(texts, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert found == json.loads(SNAPSHOT.read_text())[name]


def test_the_snapshot_holds_no_text_that_nobody_raises() -> None:
    assert set(json.loads(SNAPSHOT.read_text())) == set(CASES)
