"""Clients, proxy rows, a student and a method put together."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import (
    CLASSES,
    INPUTS,
    MEAN,
    Saying,
    federation,
    gaussian,
    held_out,
    proxy,
    read_lines,
    server,
    timeless,
)

import fedistill as fd
from fedistill import models
from fedistill.aggregate.rules import softmax
from fedistill.backends.serial import Serial
from fedistill.client import Client
from fedistill.distill.recipe import Recipe
from fedistill.errors import DataError, SettingsError
from fedistill.exchange import EXCHANGES, flat_weights
from fedistill.presets import METHODS
from fedistill.types import Rows
from fedistill.wire.codec import expected_size
from fedistill.wire.messages import Failure, Plan, RowSpec, Upload
from fedistill.wire.shelf import Shelf

SMALL = partial(models.MLP, INPUTS, 3, width=8)
EXCHANGING = [name for name, entry in METHODS.items() if entry.exchange == "predictions"]


def alike(count=3, rows=24, build=SMALL, **recipe):
    """Clients with the architecture of the student."""
    training = Recipe(**({"epochs": 1, "batch_size": 16} | recipe))
    return [Client(f"site-{k}", build, gaussian(rows, k), None, training) for k in range(count)]


class Weighing:
    """The serial backend on a scale."""

    def __init__(self, sites):
        self.serial, self.up, self.down = Serial(sites), [], []

    def run(self, plan):
        self.down.append(sum(len(plan.message(name)) for name in plan.clients))
        replies = list(self.serial.run(plan))
        self.up.append(sum(len(reply.data) for reply in replies))
        yield from replies


# --- who takes part ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXCHANGING)
def test_three_architectures_teach_one_another(name):
    builds = [SMALL, partial(models.Linear, INPUTS, 3), models.logistic_regression]
    clients = [
        Client(f"site-{k}", build, gaussian(24, k), training=Recipe(epochs=1, batch_size=16))
        for k, build in enumerate(builds)
    ]
    made = federation(clients, method=name)
    for row in made.run(3, held_out()):
        assert row["clients_ok"] == 3
        assert row["dropped"] == {}
        assert 0 <= row["client_accuracy_min"] <= row["client_accuracy_mean"] <= 1
    assert row["student_accuracy"] is not None
    assert {type(site.learner).__name__ for site in made.sites.values()} == {
        "TorchStudent",
        "SklearnStudent",
    }


@pytest.mark.parametrize(
    ("participation", "clients", "expected"),
    [(0.29, 100, 29), (0.1, 5, 1), (0.01, 100, 1), (0.5, 7, 4), (1.0, 6, 6), (0.001, 3, 1)],
)
def test_participation_is_rounded_and_never_nobody(participation, clients, expected):
    made = server(clients, participation=participation, quorum=1)
    asked = [made.plan(number).clients for number in range(1, 30)]
    assert {len(names) for names in asked} == {expected}
    assert all(list(names) == sorted(set(names)) for names in asked)
    if expected < clients:
        assert len(set(asked)) > 1, "every round draws its own participants"


@pytest.mark.parametrize("participation", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["fedistill", "ds-fl", "scarlet", "selective-fd"])
def test_twenty_rounds_at_any_participation_with_a_part_of_the_proxy_rows(name, participation):
    made = federation(5, method=name, participation=participation, per_round=15, quorum=1)
    rows = list(made.run(20))
    assert len(rows) == 20
    assert {row["clients_failed"] for row in rows} == {0}
    for site in made.sites.values():
        told = site.stamp > 0
        np.testing.assert_array_equal(
            site.targets[told & (site.stamp == made.server.stamp)],
            made.server.table[told & (site.stamp == made.server.stamp)],
        )


def test_a_client_without_rows_learns_and_does_not_teach():
    empty = Client("empty", SMALL, gaussian(4, 9).take([]), training=Recipe(batch_size=16))
    method = fd.method("ds-fl", distil_epochs=10)
    made = federation([*alike(3, epochs=4), empty], method=method)
    without = federation(alike(3, epochs=4), method=method)
    rows, others = list(made.run(5, held_out())), list(without.run(5, held_out()))
    np.testing.assert_array_equal(made.server.table, without.server.table)
    assert [row["client_accuracy"]["empty"] for row in rows][-1] > 0.6
    assert rows[0]["clients_ok"] == 4
    assert others[0]["clients_ok"] == 3
    fresh = made._sites(None)["empty"].learner.predict(made.proxy.inputs)
    assert (made.sites["empty"].learner.predict(made.proxy.inputs) != fresh).any()
    assert any("learns and does not teach" in note for note in made.notes)


def test_a_scikit_learn_client_without_rows_learns_from_the_targets():
    empty = Client("empty", models.logistic_regression, gaussian(4, 9).take([]))
    made = federation([*alike(3, epochs=6), empty], method="fedistill")
    *_, last = made.run(3, held_out())
    assert last["client_accuracy"]["empty"] > 0.6


# --- the step ------------------------------------------------------------------------------------


def test_each_round_absorbs_then_fits_then_predicts():
    calls = []

    class Logged(Saying):
        def absorb(self, *args, **kwargs):
            calls.append("absorb")

        def fit(self, rows, *, seed):
            calls.append("fit")

        def predict(self, inputs):
            calls.append("predict")
            return super().predict(inputs)[: len(inputs)]

    logits = np.random.default_rng(0).normal(size=(40, 3))
    logged = Client("logged", lambda: Logged(logits), gaussian(20, 1))
    list(federation([logged, *alike(2)], method="fedmd").run(2))
    assert calls == ["fit", "predict", "absorb", "fit", "predict"]


@pytest.mark.parametrize("name", ["fedistill", "ds-fl", "scarlet"])
def test_published_targets_are_what_every_client_decodes(name):
    made = federation(alike(3), method=name)
    list(made.run(2))
    plan = made.server.plan(3)
    for client, site in made.sites.items():
        told = Plan.from_bytes(plan.message(client)).targets
        rows = told.rows()
        assert len(rows) == 40
        np.testing.assert_array_equal(told.probs(site.told), made.server.table[rows])
    np.testing.assert_allclose(made.server.table.sum(axis=1), 1, atol=1e-6)


def test_two_clients_with_equal_rows_do_not_shuffle_alike():
    rows = gaussian(24, 1)
    training = Recipe(epochs=1, batch_size=4)
    made = federation(
        [Client(name, SMALL, rows, training=training) for name in ("a", "b", "c")],
        method="local",
    )
    list(made.run(1))
    said = [made.sites[name].learner.predict(rows.inputs) for name in ("a", "b", "c")]
    assert (said[0] != said[1]).any()
    assert (said[1] != said[2]).any()


def test_equal_seeds_equal_runs_and_other_seeds_others():
    def run(seed):
        made = federation(alike(3), seed=seed)
        return timeless(made.run(2, held_out())), made.server.digest()

    assert run(1) == run(1)
    assert run(1)[1] != run(2)[1]


# --- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_reports_the_same_figures(name):
    made = federation(alike(3), method=name)
    rows = list(made.run(2, held_out()))
    assert [row["round"] for row in rows] == [1, 2]
    for row in rows:
        assert row["client_accuracy_mean"] is not None
        assert row["epsilon_max"] is None
        shares = METHODS[name].exchange in {"predictions", *EXCHANGES}
        assert (row["bytes_up"] > 0, row["bytes_down"] > 0) == (shares, shares)
        assert row["dropped"] == {}
    told = made.summary()
    assert told["method"] == name
    assert told["privacy"]["statement"] == "no differential privacy"
    with_student = METHODS[name].exchange in {"predictions", "weights", "rows"}
    assert (told["student_accuracy"] is not None) == with_student


@pytest.mark.parametrize("name", EXCHANGING)
def test_what_is_exchanged_changes_every_client_and_the_student(name):
    told, alone = federation(alike(3), method=name), federation(alike(3), method="local")
    runs = [list(made.run(2)) for made in (told, alone)]
    assert len(runs[0]) == 2
    for site in told.sites:
        said = [made.sites[site].learner.predict(proxy().inputs) for made in (told, alone)]
        assert np.abs(said[0] - said[1]).max() > 1e-4
    fresh = federation(alike(3), method=name).server.student.predict(proxy().inputs)
    assert np.abs(told.server.student.predict(proxy().inputs) - fresh).max() > 1e-4


def test_centralised_trains_one_model_on_all_rows():
    clients = alike(3, rows=20)
    made = federation(clients, method="centralised")
    list(made.run(1, held_out()))
    assert list(made.sites) == ["pooled"]
    assert len(made.sites["pooled"].client.data) == 60
    row = made.history[0]
    assert row["student_accuracy"] == row["client_accuracy"]["pooled"]


def test_fedavg_of_equal_clients_is_what_one_of_them_learns():
    rows = gaussian(32, 1)
    training = Recipe(epochs=1, batch_size=32)
    clients = [Client(name, SMALL, rows, None, training) for name in ("a", "b", "c")]
    made = federation(clients, student=SMALL, method="fedavg")
    list(made.run(3))
    alone = federation(clients[:1], method="local")
    list(alone.run(3))
    inputs = proxy().inputs
    np.testing.assert_allclose(
        made.server.student.predict(inputs), alone.sites["a"].learner.predict(inputs), atol=1e-5
    )


def test_fedavg_weighs_clients_by_their_rows():
    clients = [
        Client(f"s{n}", SMALL, gaussian(n, n), None, Recipe(epochs=1, batch_size=64))
        for n in (16, 64)
    ]
    made = federation(clients, student=SMALL, method="fedavg", quorum=2)
    list(made.run(1))
    small, large = (flat_weights(made.sites[name].learner) for name in ("s16", "s64"))
    found = flat_weights(made.server.student)
    np.testing.assert_allclose(found, 0.2 * small + 0.8 * large, atol=1e-6)


def test_fedavg_without_a_torch_student_is_refused_in_a_sentence():
    with pytest.raises(SettingsError, match="fedavg needs a torch model"):
        federation(alike(3), student=models.logistic_regression, method="fedavg")


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["fedistill", "ds-fl", "scarlet", "cfd", "selective-fd", "comet", "fd", "fedavg"]
)
def test_bytes_reported_are_bytes_sent(name):
    scales = []

    def weigh(sites):
        scales.append(Weighing(sites))
        return scales[0]

    made = federation(alike(4), student=SMALL, method=name, participation=0.75)
    rows = list(made.run(3, backend=weigh))
    assert [row["bytes_up"] for row in rows] == scales[0].up
    assert [row["bytes_down"] for row in rows] == scales[0].down
    told = made.summary()
    assert told["bytes_up_per_client_round"] == round(sum(scales[0].up) / 9, 1)
    assert told["bytes_down_per_client_round"] == round(sum(scales[0].down) / 9, 1)


def test_a_set_of_rows_costs_a_few_bytes_whatever_its_size():
    def size(count):
        plan = Plan(run="r", round=1, ask=RowSpec(2**62, 1, count, 10**6), proxy="p", classes="c")
        return len(plan.to_bytes())

    assert size(10**6 - 1) - size(1) <= 16


def test_a_row_of_ten_classes_costs_ten_bytes():
    assert expected_size("u8", 1, 10) <= 10


def test_fedavg_bytes_stand_beside_ours():
    made = federation(alike(3), student=SMALL)
    list(made.run(1))
    told = made.summary()
    assert told["fedavg_bytes_per_client_round"] == 4 * (INPUTS * 8 + 8 + 8 * 3 + 3)
    up, down = told["bytes_up_per_client_round"], told["bytes_down_per_client_round"]
    expected = 2 * told["fedavg_bytes_per_client_round"] / (up + down)
    assert told["bytes_saving"] == pytest.approx(expected, abs=1e-3)


def test_no_private_row_is_in_an_upload():
    made = federation(alike(3))
    uploads = []

    class Tap(Serial):
        def run(self, plan):
            for reply in super().run(plan):
                uploads.append((reply, plan.rows()))
                yield reply

    list(made.run(2, backend=Tap))
    held = {name: Shelf(made.method.codec, 40, 3) for name in made.sites}
    for reply, asked in uploads:
        rows = made.sites[reply.client].client.data
        upload, shelf = Upload.from_bytes(reply.data), held[reply.client]
        probs, familiarity = upload.decode(shelf.reference(asked))
        shelf.put(asked, upload.codes(shelf.reference(asked)), upload.round)
        assert probs.shape == (40, 3)
        assert familiarity.shape == (40,)
        for row in rows.inputs:
            assert row.tobytes() not in reply.data
            assert row.tobytes() not in probs.tobytes()
        assert upload.size in {16, 32}


# --- proxy rows ----------------------------------------------------------------------------------


def test_only_asked_rows_get_targets_and_every_pass_asks_all():
    made = federation(alike(3), per_round=10, method="ds-fl")
    covered = [int((made.server.stamp > 0).sum()) for _ in made.run(4)]
    assert covered == [10, 20, 30, 40]


def test_a_rule_that_gives_up_a_row_leaves_it_without_a_target():
    def shy(logits, weights):
        probs = softmax(logits).mean(axis=0)
        probs[3] = np.nan
        return probs

    made = federation(alike(3), method=fd.method("ds-fl", rule=shy, codec="u8"))
    list(made.run(2))
    missing = made.server.plan(1).ask.rows()[3], made.server.plan(2).ask.rows()[3]
    assert made.server.stamp[missing[1]] in {0, 1}
    assert np.isfinite(made.server.table).all()


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clients", "told"),
    [
        ([], "at least one client"),
        ([*alike(1), *alike(1)], '"site-0" stands twice'),
        (
            [Client("a", SMALL, Rows(np.ones((2, 4), np.float32), np.array([0, 3])))],
            "a: labels must be 0 to 2, row 1 is outside",
        ),
        (
            [Client("a", SMALL, Rows(np.array([[1, 1, 1, np.nan]], np.float32), np.array([0])))],
            "a: inputs must be finite, row 0 is not",
        ),
    ],
)
def test_unusable_clients_are_refused_before_the_first_round(clients, told):
    with pytest.raises(DataError, match=told):
        federation(clients)


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a b", "x" * 65, "-a", "é"])
def test_an_id_that_cannot_be_a_folder_is_refused(name):
    with pytest.raises(DataError, match="a client id must be 1 to 64 letters"):
        Client(name, SMALL, gaussian(4, 1))


def test_classes_are_counted_when_they_are_not_named():
    made = fd.Federation(alike(3), proxy(), SMALL, MEAN, device="cpu")
    assert made.classes == ("0", "1", "2")
    assert federation(alike(3)).classes == CLASSES


def test_without_a_student_the_clients_still_teach_one_another():
    made = federation(alike(3), student=None)
    rows = list(made.run(2, held_out()))
    assert rows[-1]["student_accuracy"] is None
    assert rows[-1]["client_accuracy_mean"] > 0.3
    assert made.summary()["fedavg_bytes_per_client_round"] is None


def test_test_rows_of_their_own_are_what_clients_are_measured_on():
    own = gaussian(10, 77)
    clients = [Client("a", SMALL, gaussian(20, 1), own), *alike(2)]
    made = federation(clients)
    (row,) = made.run(1, held_out())
    logits = made.sites["a"].learner.predict(own.inputs)
    assert row["client_accuracy"]["a"] == (logits.argmax(1) == own.labels).mean()


def test_a_federation_goes_on_when_it_is_run_again_and_keeps_its_folder(tmp_path):
    made = federation(alike(3))
    assert [row["round"] for row in made.run(2, held_out(), out=tmp_path)] == [1, 2]
    assert [row["round"] for row in made.run(2, held_out(), out=tmp_path)] == []
    assert len(read_lines(tmp_path / "rounds.jsonl")) == 2
    assert [row["round"] for row in made.run(3, held_out(), out=tmp_path)] == [3]
    whole = federation(alike(3))
    assert timeless(whole.run(3, held_out())) == timeless(read_lines(tmp_path / "rounds.jsonl"))


class Silly(torch.nn.Module):
    """A model that is never finite."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(inputs) * float("nan")


def test_one_bad_client_among_few_asked_does_not_end_the_run():
    people = alike(10)
    people[4] = Client("zz-bad", Silly, people[4].data, training=people[4].training)
    made = federation(people, participation=0.3, method="ds-fl")
    rows = list(made.run(8, held_out()))
    assert len(rows) == 8
    assert any("zz-bad" in row["dropped"] for row in rows), "it was asked at least once"
    assert all(row["clients_ok"] >= 3 for row in rows)


def test_the_bytes_of_a_missed_attempt_are_counted():
    sent = []

    class Forgetful(Serial):
        """Loses all answers of the first attempt but one."""

        def run(self, plan):
            for number, reply in enumerate(super().run(plan)):
                sent.append(len(reply.data))
                late = len(sent) <= len(plan.clients) and number
                yield Failure(reply.client, plan.round, "lost") if late else reply

    made = federation(alike(4), method="ds-fl")
    (row,) = made.run(1, held_out(), backend=Forgetful)
    arrived = [sent[0], *sent[4:]]
    assert row["bytes_up"] == sum(arrived)
    first = federation(alike(4), method="ds-fl").server.plan(1)
    assert row["bytes_down"] == 2 * 4 * len(first.to_bytes())


def test_torch_threads_are_put_back():
    before = torch.get_num_threads()
    list(federation(alike(3)).run(1, held_out()))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (models.MLP(4, 3), "must be a factory"),
        (models.MLP, "callable without arguments"),
        (partial(models.MLP, 4, 7), r"must return logits \[rows, classes\] = \[2, 3\]"),
        (partial(models.MLP, 5, 3), "cannot take rows of shape"),
    ],
)
def test_a_model_that_cannot_take_part_is_told_before_training(build, told):
    people = [*alike(2), Client("odd", build, alike(1)[0].data)]
    with pytest.raises(fd.FedistillError, match=told):
        list(federation(people).run(1))
