"""Defects of peers that no single part of ours could have: each shown once, by its number.

The others stand beside the part they are about: P1 to P3 in ``test_cache.py``, P4, P20 in
``test_exchange.py``, P5 to P10 in ``losses/``, P11, P12 in ``distill/test_density.py``, P13 to P16
in ``distill/``, P22 in ``wire/test_topk.py``, P23, P26 and P27 in ``test_methods.py``.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from builders import federation, held_out, participants, probabilities, server, upload

import fedistill
from fedistill.aggregate.clusters import clusters
from fedistill.backends.serial import Serial
from fedistill.errors import DataError, QuorumError, Rejected
from fedistill.presets import METHODS, method
from fedistill.types import ProxySet
from fedistill.wire.codec import CODECS
from fedistill.wire.messages import UPLOAD_FIELDS, Plan

PACKAGE = Path(fedistill.__file__).parent


class Weighed(Serial):
    """The serial backend, with a scale under every message."""

    def __init__(self, sites):
        super().__init__(sites)
        self.up = self.down = 0

    def run(self, plan):
        self.down += sum(len(plan.message(name)) for name in plan.clients)
        for reply in super().run(plan):
            self.up += len(reply.data)
            yield reply


@pytest.mark.parametrize("name", ["ds-fl", "scarlet", "selective-fd", "comet", "fd", "fedistill"])
def test_p17_bytes_are_those_that_were_sent(name):
    scales = []

    def weighed(sites):
        scales.append(Weighed(sites))
        return scales[-1]

    rows = list(federation(method=name, per_round=10).run(3, held_out(), backend=weighed))
    assert sum(row["bytes_up"] for row in rows) == scales[0].up
    assert sum(row["bytes_down"] for row in rows) == scales[0].down


def test_p17_a_row_costs_a_byte_a_class_and_a_set_of_rows_next_to_nothing():
    assert CODECS["u8"].size(1, 10) <= 10
    few, many = (
        len(server(rows=rows, per_round=rows // 2).plan(1).to_bytes()) for rows in (100, 1000)
    )
    assert many - few <= 16


@pytest.mark.parametrize("bad", ["nonfinite", "constant"])
def test_p18_a_round_without_a_usable_teacher_is_told_and_divides_by_nothing(bad):
    door = server(4)
    plan = door.plan(1)
    if bad == "nonfinite":
        with pytest.raises(QuorumError, match="0 usable uploads"):
            door.combine(plan, [])
        return
    flat = np.full((plan.count(), 3), 1 / 3)
    answers = [
        door.check(upload(plan, f"c{k}", flat).to_bytes(), plan, f"c{k}", set()) for k in range(4)
    ]
    door.combine(plan, answers)
    np.testing.assert_allclose(door.table[plan.rows()], flat, atol=1e-6)


@pytest.mark.parametrize(
    ("clients", "share", "asked"), [(100, 0.29, 29), (10, 0.01, 1), (7, 0.5, 4), (3, 1.0, 3)]
)
def test_p19_the_share_of_clients_is_rounded_and_never_none(clients, share, asked):
    door = server(clients, participation=share, quorum=1)
    assert len(door.plan(1).clients) == asked


def test_p19_a_round_does_not_wait_for_those_who_are_gone():
    class OneIsGone(Serial):
        def run(self, plan):
            return super().run(
                dataclasses.replace(plan, clients=tuple(n for n in plan.clients if n != "site-0"))
            )

    rows = list(federation(5).run(3, held_out(), backend=OneIsGone))
    assert [row["clients_ok"] for row in rows] == [4, 4, 4]


def test_p21_fewer_uploads_than_centroids():
    said = np.log(np.array([probabilities(5, k) for k in range(2)]))
    assert clusters(said, np.ones(2), centroids=4).shape[1] <= 2
    assert clusters(said[:1], np.ones(1), centroids=2).shape == (5, 1, 3)


def test_p24_nothing_but_predictions_and_claims_can_be_in_an_upload():
    known = {"kind", "client", "run", "round", "proxy", "classes", "share", "codec", "temperature"}
    known |= {"shape", "familiarity", "seen", "size", "epsilon", "ledger", "parts"}
    assert set(UPLOAD_FIELDS) == known


def test_p25_no_pickle_and_no_unchecked_loading_anywhere():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            assert not {"pickle", "cloudpickle", "dill", "joblib"} & set(names), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.exchange == "predictions"])
def test_p28_other_proxy_rows_at_a_site_are_noticed_at_once(name):
    fed = federation(3, method=name)
    list(fed.run(1))
    site = fed.sites["site-0"]
    other = site.proxy.inputs.copy()
    other[0] += 1
    site.proxy = ProxySet(other)
    plan = Plan.from_bytes(fed.server.plan(2).message("site-0"))
    with pytest.raises(Rejected, match="proxy_version"):
        site.agree(plan)


def test_p28_proxy_rows_that_are_no_numbers_are_refused():
    rows = np.ones((3, 4), dtype=np.float32)
    rows[1, 2] = np.nan
    with pytest.raises(DataError, match="proxy rows must be finite, row 1 is not"):
        ProxySet(rows)


def test_a_method_that_teaches_by_the_student_needs_one():
    with pytest.raises(DataError, match="found none"):
        federation(participants(3), method=method("cfd"), student=None)
