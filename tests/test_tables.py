"""Methods that exchange tables, over the loop of all others."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from builders import CLASSES, INPUTS, LIMIT, gaussian, proxy

from fedistill import models
from fedistill.client import Client
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import FedistillError, Rejected, SettingsError
from fedistill.exchange import EXCHANGES, flat_weights
from fedistill.presets import method as preset
from fedistill.tables import TableServer, TableSite, _usual_width
from fedistill.wire.envelope import pack_mask
from fedistill.wire.messages import Plan, Upload

MLP = partial(models.MLP, INPUTS, 3, width=8)
PROXY = proxy(12)


def method(name):
    return dataclasses.replace(preset("fedavg"), name=name, exchange=name)


def site(name, number, build=MLP, labels=(0, 1, 2), rows=24):
    own = gaussian(rows, number, labels)
    training = Recipe(epochs=1, batch_size=8)
    person = Client(f"c{number}", build, own, training=training)
    return TableSite.open(person, PROXY, CLASSES, method(name), seed=7)


def server(name, sites, seed=7, **options):
    student = TorchStudent(MLP, Recipe(), classes=3, seed=3) if name == "weights" else None
    enrolled = {one.client.id: len(one.client.data) for one in sites}
    return TableServer(PROXY, CLASSES, student, method(name), enrolled, seed=seed, **options)


def people(name):
    return [site(name, 0, labels=(0, 1)), site(name, 1, labels=(1, 2)), site(name, 2, labels=(0,))]


def play(made, sites, rounds):
    """The loop, on one page; the plans and answers of its last round."""
    for number in rounds:
        plan = made.plan(number)
        seen, answers = set(), []
        for one in sites:
            if one.client.id in plan.clients:
                data = one.answer(plan.message(one.client.id))
                answers.append(made.check(data, plan, one.client.id, seen))
        combined = made.combine(plan, answers)
        made.close(plan, seen)
        made.distil(plan)
    return plan, answers, combined


@pytest.mark.parametrize("name", EXCHANGES)
def test_rounds_come_to_the_mean_of_what_was_told(name):
    sites = people(name)
    made = server(name, sites)
    plan, answers, _ = play(made, sites, [1, 2, 3])
    tables = np.array([answer.probs for answer in answers], dtype=np.float64)
    sizes = np.array([24.0, 24.0, 24.0])
    wanted = EXCHANGES[name].combine(tables, sizes).astype(np.float32)
    np.testing.assert_array_equal(made.common, wanted)
    assert np.isfinite(tables[~np.isnan(tables)]).all()
    assert made.plan(4).table is not None
    read = Plan.from_bytes(made.plan(4).message("c1"), LIMIT)
    assert read.table is not None
    assert plan.table is not None


@pytest.mark.parametrize("name", EXCHANGES)
def test_the_same_seed_gives_the_same_table(name):
    digests = []
    for order in ([0, 1, 2], [2, 0, 1]):
        sites = people(name)
        made = server(name, sites)
        play(made, [sites[k] for k in order], [1, 2])
        digests.append(made.digest())
    assert digests[0] == digests[1]
    assert digests[0] != server(name, people(name)).digest()


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_server_goes_on_from_its_state(name):
    sites = people(name)
    first = server(name, sites)
    play(first, sites, [1])
    second = server(name, sites, seed=7)
    second.load_state_dict(*first.state_dict())
    assert second.digest() == first.digest()
    for one in sites:
        mine, theirs = (made.plan(2).message(one.client.id) for made in (first, second))
        assert mine == theirs


def test_fd_sends_each_the_mean_of_the_others():
    sites = people("class-logits")
    made = server("class-logits", sites)
    _, answers, _ = play(made, sites, [1])
    a, b, c = (answer.probs for answer in answers)
    assert np.isnan(a[2]).all()
    told = {n: Plan.from_bytes(made.plan(2).message(n), LIMIT).table.values for n in made.enrolled}
    nobody = np.full(3, np.nan)
    np.testing.assert_allclose(told["c0"], [c[0], b[1], b[2]], atol=1e-5)
    np.testing.assert_allclose(told["c1"], [(a[0] + c[0]) / 2, a[1], nobody], atol=1e-5)
    np.testing.assert_allclose(told["c2"], [a[0], (a[1] + b[1]) / 2, b[2]], atol=1e-5)


def test_who_said_nothing_in_the_last_round_gets_the_mean_of_all():
    sites = people("class-logits")
    made = server("class-logits", sites, quorum=1)
    plan = made.plan(1)
    answer = made.check(sites[0].answer(plan.message("c0")), plan, "c0", set())
    made.combine(plan, [answer])
    told = Plan.from_bytes(made.plan(2).message("c1"), LIMIT).table.values
    np.testing.assert_array_equal(told, answer.probs)
    assert np.isnan(Plan.from_bytes(made.plan(2).message("c0"), LIMIT).table.values).all()


def test_a_kernel_is_about_the_same_few_public_rows_in_every_round():
    sites = people("kernel")
    made = server("kernel", sites, per_round=5)
    rows = [made.plan(number).ask.rows().tolist() for number in (1, 2, 3)]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 5
    play(made, sites, [1])
    assert made.common.shape == (5, 5)
    assert server("prototypes", sites).plan(1).ask.count == 0


def test_who_has_no_rows_takes_part_and_tells_nothing():
    for name in EXCHANGES:
        sites = [site(name, 0), site(name, 1, rows=0)]
        made = server(name, sites)
        _, answers, _ = play(made, sites, [1, 2])
        assert [answer.upload.share for answer in answers] == [name, "none"]
        assert answers[1].upload.payload == b""


def test_fedavg_needs_a_torch_model_at_the_server():
    with pytest.raises(SettingsError, match="torch model at the server"):
        TableServer(PROXY, CLASSES, None, method("weights"), {"c0": 8}, seed=7)


def test_fedavg_makes_the_average_its_student():
    sites = people("weights")
    made = server("weights", sites)
    play(made, sites, [1])
    np.testing.assert_array_equal(made.common[0], flat_weights(made.student))


def test_a_learner_that_cannot_take_part_says_so():
    trees = site("prototypes", 0, build=models.gradient_boosting)
    plan = server("prototypes", [trees]).plan(1)
    with pytest.raises(FedistillError, match="found SklearnStudent"):
        trees.answer(plan.message("c0"))


# --- the door ------------------------------------------------------------------------------------


def knock(name, **changes):
    """An honest upload but for ``changes``, at the door of round 2."""
    sites = people(name)
    made = server(name, sites)
    play(made, sites, [1])
    plan = made.plan(2)
    honest = Upload.from_bytes(sites[0].answer(plan.message("c0")), LIMIT)
    made.check(dataclasses.replace(honest, **changes).to_bytes(), plan, "c0", set())


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"share": "probs"}, "kind"),
        ({"codec": "u8"}, "codec"),
        ({"shape": (1, 1)}, "shape"),
        ({"shape": (1 << 39, 1 << 39)}, "shape"),
        ({"payload": b"1234"}, "shape"),
        ({"declined": b"1" * 40}, "shape"),
        ({"ratios": b"1"}, "shape"),
        ({"share": "none"}, "shape"),
    ],
)
def test_a_bad_table_is_refused_with_a_reason(name, changes, reason):
    if not reason:
        knock(name)
        return
    with pytest.raises(Rejected) as refusal:
        knock(name, **changes)
    assert refusal.value.reason == reason


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "nonfinite"), (np.inf, "nonfinite"), (1e7, "extreme")]
)
def test_values_that_no_model_has_are_refused(value, reason):
    table = np.full((3, 3), value, dtype="<f4")
    with pytest.raises(Rejected) as refusal:
        knock("class-logits", payload=table.tobytes(), declined=b"")
    assert refusal.value.reason == reason


def test_the_width_of_the_last_round_binds_nobody():
    """Else a few clients of one round would decide for all others, for good."""
    table = np.zeros((3, 5), dtype="<f4").tobytes()
    knock("prototypes", shape=(3, 5), payload=table, declined=b"")


def test_a_table_without_anything_in_it_has_no_say_in_the_width():
    absent = pack_mask(np.ones(3, dtype=bool))
    with pytest.raises(Rejected, match="without anything"):
        knock("prototypes", shape=(3, 5), payload=b"", declined=absent)


def test_a_table_without_values_cannot_ask_for_memory():
    sites = people("prototypes")
    made = server("prototypes", sites)
    plan = made.plan(1)
    honest = Upload.from_bytes(sites[0].answer(plan.message("c0")), LIMIT)
    bomb = dataclasses.replace(
        honest, shape=(3, 1 << 39), payload=b"", declined=pack_mask(np.ones(3, dtype=bool))
    )
    with pytest.raises(Rejected, match="larger than a message"):
        made.check(bomb.to_bytes(), plan, "c0", set())


def test_features_of_another_width_are_left_out_of_the_first_round():
    odd = site("prototypes", 3, build=partial(models.MLP, INPUTS, 3, width=5))
    sites = [*people("prototypes"), odd]
    made = server("prototypes", sites)
    _, _, combined = play(made, sites, [1])
    assert made.common.shape == (3, 8)
    assert combined.flags == {"c3": ["width"]}
    assert _usual_width([5, 8, 8, 5]) == 5
