"""Many clients at once say what they would say one after another, and what cannot does so alone."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from builders import INPUTS, federation, gaussian, held_out, read_lines, write_settings
from torch import nn

from fedistill import config, experiment, models
from fedistill.backends import tuning
from fedistill.backends.serial import Serial
from fedistill.backends.unreliable import unreliable
from fedistill.backends.vectorized import Resident, Vectorized, alone
from fedistill.client import Client
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import seeded
from fedistill.models import gradient_boosting
from fedistill.presets import method
from fedistill.wire.messages import Upload

MLP = partial(models.MLP, INPUTS, 3, width=8)
DEEP = partial(models.MLP, INPUTS, 3, width=6, depth=2)
LINEAR = partial(models.Linear, INPUTS, 3)
EDGE = 1e-6
"""Nearer to 0 than this a unit's input, of some terms about 1, may change its side by rounding."""


def people(count, build, recipe, rows=24):
    """Clients of one kind with fewer rows the higher their number, and one without any."""
    return [
        Client(f"site-{k}", build, gaussian(0 if k == 3 else rows - 3 * k, k), training=recipe)
        for k in range(count)
    ]


def after(backend, clients, chosen, rounds):
    """Soft targets, weights and other state of clients after some rounds, and what they sent."""
    fed = federation(clients, method=chosen, per_round=30, quorum=1)
    rows = list(fed.run(rounds, backend=backend))
    return fed, rows


def compare(clients, chosen, rounds=2, backend=Vectorized):
    serial, one = after(Serial, clients, chosen, rounds)
    fast, other = after(backend, clients, chosen, rounds)
    assert one[-1]["clients_ok"] == other[-1]["clients_ok"]
    for name, site in serial.sites.items():
        # Rounding may move a coded symbol: the codec here is exact.
        np.testing.assert_allclose(fast.sites[name].targets, site.targets, atol=1e-5)
        wanted, found = site.learner.state_dict(), fast.sites[name].learner.state_dict()
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, atol=5e-5, err_msg=f"{name} {key}")
        assert fast.sites[name].learner.passed == site.learner.passed
    return fast


def normed():
    """A module without kernels that can be mapped."""
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


RECIPES = {
    "plain": Recipe(epochs=1, batch_size=8, clip=0.0, momentum=0.9),
    "clipped": Recipe(epochs=2, batch_size=8, clip=0.5, momentum=0.9),
    "decayed": Recipe(epochs=1, batch_size=8, weight_decay=0.01, momentum=0.5, average=0.9),
    "falling": Recipe(epochs=2, batch_size=8, schedule="cosine", momentum=0.0),
    "mixed": Recipe(epochs=1, batch_size=8, mixup=0.5, temperature=2.0, calibrate=True),
    "phase": Recipe(epochs=1, batch_size=8, distil="phase", temperature=3.0, momentum=0.9),
    "never": Recipe(epochs=1, batch_size=8, distil="never"),
    "adam": Recipe(epochs=1, batch_size=8, optimizer="adam", lr=0.01, weight_decay=0.01),
    "adam, clipped": Recipe(
        epochs=2, batch_size=8, optimizer="adam", lr=0.01, clip=0.5, average=0.9
    ),
    "adamw": Recipe(
        epochs=1, batch_size=8, optimizer="adamw", lr=0.01, weight_decay=0.1, schedule="cosine"
    ),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("build", [LINEAR, MLP, DEEP], ids=["linear", "mlp", "deep"])
def test_every_recipe_teaches_what_it_teaches_one_after_another(build, recipe):
    chosen = dataclasses.replace(
        method("ds-fl"), codec="float32", client={"distil": recipe.distil, "momentum": None}
    )
    compare(people(5, build, recipe), chosen)


@pytest.mark.parametrize("name", ["fedistill", "fedmd", "ds-fl", "selective-fd", "fedema-distill"])
def test_methods_give_what_they_give_one_after_another(name):
    chosen = dataclasses.replace(method(name), codec="float32", cache=False)
    fast = compare(people(4, MLP, Recipe(epochs=1, batch_size=8)), chosen)
    assert not any("trained alone" in note for note in fast.notes)


@pytest.mark.parametrize("backend", [Vectorized, partial(Vectorized, mapped=True)])
def test_a_phase_that_is_longer_than_training_leaves_no_step_out(backend):
    """The shortest training first: all phases are equally long."""
    recipe = Recipe(epochs=1, batch_size=8, distil_epochs=9)
    chosen = dataclasses.replace(
        method("ds-fl"), codec="float32", client={"distil": "phase", "distil_epochs": 9}
    )
    build = normed if backend is not Vectorized else MLP
    clients = [
        Client(f"site-{k}", build, gaussian(9 + 15 * k, k), training=recipe) for k in range(3)
    ]
    compare(clients, chosen, backend=backend)


def test_a_phase_leaves_the_score_of_familiarity_and_its_momentum_alone():
    chosen = dataclasses.replace(
        method("fedistill"),
        codec="float32",
        cache=False,
        client={"distil": "phase", "average": 0.9, "momentum": 0.9},
    )
    compare(people(5, MLP, Recipe(epochs=1, batch_size=8)), chosen, rounds=2)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_weights_agree_after_a_round_where_no_unit_is_on_the_edge(count, monkeypatch):
    """The gate of 1e-5 on soft targets and 5e-5 on weights; the last block is a smaller one.

    A unit whose input is 0 to rounding is on in one order of adding up and off in another, and its
    row's whole gradient comes or goes: serial differs from itself by as much when a weight begins
    one ulp apart. So the gate holds where no input of a unit comes that near to 0.
    """
    monkeypatch.setattr(tuning, "block_of", lambda weights: 4)
    recipe = Recipe(epochs=1, batch_size=8, momentum=0.9)
    clients = [Client(f"site-{k}", MLP, gaussian(20, k), training=recipe) for k in range(count)]
    margins = []

    class Watched(Serial):
        def __init__(self, sites):
            super().__init__(sites)
            for site in sites.values():
                site.learner.module.trunk[0].register_forward_hook(
                    lambda layer, rows, found: margins.append(float(found.detach().abs().min()))
                )

    chosen = dataclasses.replace(method("fedistill"), codec="float32", cache=False)
    serial, _ = after(Watched, clients, chosen, 2)
    fast, _ = after(Vectorized, clients, chosen, 2)
    assert min(margins) > EDGE
    for name, site in serial.sites.items():
        np.testing.assert_allclose(fast.sites[name].targets, site.targets, atol=1e-5)
        found = fast.sites[name].learner.state_dict()
        for key, value in site.learner.state_dict().items():
            np.testing.assert_allclose(found[key], value, atol=5e-5, err_msg=f"{name} {key}")


def test_a_unit_whose_input_is_0_is_off_as_with_the_serial_backend():
    def build():
        module = MLP()
        nn.init.zeros_(module.trunk[0].bias)
        return module

    data = gaussian(24, 0)
    data.inputs[::2] = 0.0  # exactly 0, whatever the order of adding up
    recipe = Recipe(epochs=1, batch_size=24, momentum=0.9)
    chosen = dataclasses.replace(method("ds-fl"), codec="float32")
    compare([Client(f"site-{k}", build, data, training=recipe) for k in range(2)], chosen, 1)


@pytest.mark.parametrize("count", [1, 3, 26])
def test_blocks_of_any_size_and_a_smaller_last_one(count):
    chosen = dataclasses.replace(method("ds-fl"), codec="float32")
    recipe = Recipe(epochs=1, batch_size=8)
    clients = [Client(f"site-{k}", LINEAR, gaussian(12, k), training=recipe) for k in range(count)]
    compare(clients, chosen)


def test_uploads_have_the_same_shape_bytes_and_fields():
    clients = people(4, MLP, Recipe(epochs=1, batch_size=8))
    serial, one = after(Serial, clients, "fedistill", 3)
    fast, other = after(Vectorized, clients, "fedistill", 3)
    for name in serial.sites:
        wanted = Upload.from_bytes(serial.sites[name].upload)
        found = Upload.from_bytes(fast.sites[name].upload)
        assert (found.shape, found.share, found.seen, found.size, found.familiarity) == (
            (wanted.shape, wanted.share, wanted.seen, wanted.size, wanted.familiarity)
        )
    for a, b in zip(one, other, strict=True):
        assert b["clients_ok"] == a["clients_ok"]
        assert b["bytes_up"] == pytest.approx(a["bytes_up"], rel=0.05)


class Own(nn.Module):
    """A module that no kernel knows."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(INPUTS, 3)
        self.norm = nn.BatchNorm1d(INPUTS)

    def forward(self, inputs):
        return self.head(self.norm(inputs))


def with_tanh():
    made = MLP()
    made.trunk[1] = nn.Tanh()
    return made


def doubled():
    made = MLP()
    made.trunk.register_forward_hook(lambda layer, given, gave: 2 * gave)
    return made


def replaced():
    made = MLP()
    made.forward = lambda inputs: made.head(made.trunk(inputs)) * 2
    return made


@pytest.mark.parametrize("build", [with_tanh, doubled, replaced])
def test_what_was_changed_after_it_was_built_is_asked_alone_to_the_same_bytes(build):
    clients = people(3, build, Recipe(epochs=1, batch_size=8))
    chosen = dataclasses.replace(method("fedistill"), codec="float32", cache=False)
    serial, _ = after(Serial, clients, chosen, 2)
    fast, _ = after(Vectorized, clients, chosen, 2)
    (note,) = [note for note in fast.notes if "trained alone" in note]
    assert "its MLP was changed after it was built, or has hooks" in note
    for name, site in serial.sites.items():
        np.testing.assert_array_equal(fast.sites[name].targets, site.targets)


def test_what_has_no_kernel_is_asked_alone_to_the_same_bytes_and_the_run_says_so():
    recipe = Recipe(epochs=1, batch_size=8)
    clients = [
        Client("own", Own, gaussian(20, 0), training=recipe),
        Client("trees", gradient_boosting, gaussian(20, 1), training=recipe),
        Client("nothing", Own, gaussian(0, 2), training=recipe),
        Client("known", MLP, gaussian(20, 3), training=recipe),
    ]
    chosen = dataclasses.replace(method("ds-fl"), codec="float32", client={"distil": "inside"})
    serial, _ = after(Serial, clients, chosen, 1)
    fast, _ = after(Vectorized, clients, chosen, 1)
    for name in ("own", "trees", "nothing"):
        sent = [Upload.from_bytes(fed.sites[name].upload).payload for fed in (serial, fast)]
        assert sent[0] == sent[1]
        assert alone(fast.sites[name])
        assert any(name in note and "trained alone" in note for note in fast.notes)
    assert not alone(fast.sites["known"])
    assert not any("known" in note for note in fast.notes)


def test_tables_are_exchanged_as_by_the_serial_backend():
    clients = people(3, MLP, Recipe(epochs=1, batch_size=8))
    serial, _ = after(Serial, clients, "fedproto", 2)
    fast, _ = after(Vectorized, clients, "fedproto", 2)
    assert serial.server.digest() == fast.server.digest()
    assert any("tables" in note for note in fast.notes)


def test_two_clients_of_different_kinds_are_not_mixed():
    recipe = Recipe(epochs=1, batch_size=8)
    other = dataclasses.replace(recipe, lr=0.02)
    clients = [
        Client(f"site-{k}", [MLP, LINEAR, DEEP][k % 3], gaussian(20, k), training=one)
        for k, one in enumerate([recipe, recipe, recipe, other, other, recipe, recipe])
    ]
    compare(clients, dataclasses.replace(method("ds-fl"), codec="float32"))


def test_a_refusal_is_a_failure_and_the_others_go_on():
    fed = federation(people(3, MLP, Recipe(epochs=1, batch_size=8)), method="ds-fl", quorum=1)

    class Spoilt(Vectorized):
        def run(self, plan):
            weight = self.sites["site-1"].learner.module.head.weight
            weight.data.fill_(float("nan"))
            yield from super().run(plan)

    (row,) = fed.run(1, backend=Spoilt)
    assert row["clients_ok"] == 2
    assert row["dropped"] == {"site-1": "nonfinite"}


def test_a_run_that_was_stopped_goes_on_to_the_same_targets(tmp_path):
    clients = people(5, MLP, Recipe(epochs=1, batch_size=8))

    def run(rounds, folder, resume=False):
        fed = federation(clients, method="fedistill", per_round=30)
        list(fed.run(rounds, held_out(), out=folder, resume=resume, backend=Vectorized))
        return fed.server.digest()

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "parts")
    assert run(4, tmp_path / "parts", resume=True) == whole
    lines = [read_lines(tmp_path / name / "rounds.jsonl") for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_public_rows_are_sent_to_a_device_once_for_all_and_not_copied_on_the_cpu():
    resident, device = Resident(), torch.device("cpu")
    rows = gaussian(6, 0).inputs.astype(np.float32)
    first = resident.rows(rows, device)
    assert resident.rows(rows[:], device) is first
    assert first.data_ptr() == torch.from_numpy(rows).data_ptr()
    np.testing.assert_array_equal(resident.rows(rows[:3], device), rows[:3])
    np.testing.assert_array_equal(resident.rows(rows[::2], device), rows[::2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", [RECIPES["plain"], RECIPES["adam"]], ids=["sgd", "adam"])
def test_on_a_gpu_it_teaches_what_it_teaches_on_the_cpu(recipe):
    chosen = dataclasses.replace(method("fedistill"), codec="float32", cache=False)
    found = []
    for device, backend in (("cpu", Serial), ("cuda", Vectorized)):
        clients = people(4, MLP, recipe)
        fed = federation(clients, method=chosen, per_round=30, quorum=1, device=device)
        list(fed.run(2, backend=backend))
        found.append(fed.sites)
    for name, site in found[0].items():
        np.testing.assert_allclose(found[1][name].targets, site.targets, atol=1e-4)


def test_lost_clients_are_lost_as_with_the_serial_backend():
    clients = people(5, MLP, Recipe(epochs=1, batch_size=8))
    chosen = dataclasses.replace(method("ds-fl"), codec="float32")
    loses = partial(unreliable, seed=3, dropout=0.3, stragglers=0.3)
    _, one = after(loses(Serial), clients, chosen, 3)
    _, other = after(loses(Vectorized), clients, chosen, 3)
    assert [row["dropped"] for row in one] == [row["dropped"] for row in other]


def test_settings_name_the_backend_and_the_summary_tells_it(tmp_path, monkeypatch):
    settings = write_settings(tmp_path, rounds=2)
    serial = experiment.run(settings, out=tmp_path / "serial")
    given = ["backend.name=vectorized"]
    fast = experiment.run(settings, overrides=given, out=tmp_path / "fast")
    assert (serial["backend"], fast["backend"]) == ("serial", "vectorized")
    assert fast["student_accuracy"] == pytest.approx(serial["student_accuracy"], abs=0.1)
    given += ["backend.tune=true"]
    monkeypatch.setenv("FEDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "measured", lambda shape: tuning.Choice(2, 100, "highest"))
    tuned = experiment.run(settings, overrides=given, out=tmp_path / "tuned")
    assert '"block": 2' in (tmp_path / "tuned" / "tuning.json").read_text()
    assert tuned["student_accuracy"] == pytest.approx(serial["student_accuracy"], abs=0.1)
    again = experiment.run(settings, overrides=given[:1], out=tmp_path / "again")
    assert again["soft_targets_sha256"] == fast["soft_targets_sha256"]


def test_lost_clients_and_streams_may_be_simulated_by_it(tmp_path):
    settings = write_settings(tmp_path, rounds=2)
    given = ["backend.name=vectorized", "clients.dropout=0.1"]
    assert config.load(settings, given).backend.name == "vectorized"


class Deaf(Vectorized):
    """Stops listening after two answers."""

    def run(self, plan):
        for number, reply in enumerate(super().run(plan)):
            if number == 2:
                raise OSError("the line is dead")
            yield reply


def test_who_stops_listening_and_goes_on_finds_nobody_trained_twice():
    chosen = dataclasses.replace(method("ds-fl"), codec="float32")
    whole, broken = (
        federation(people(5, MLP, RECIPES["plain"]), method=chosen, per_round=30, quorum=1)
        for _ in range(2)
    )
    list(whole.run(3, backend=Vectorized))
    list(broken.run(1, backend=Vectorized))
    with pytest.raises(OSError, match="dead"):
        list(broken.run(3, backend=Deaf))
    list(broken.run(3, backend=Vectorized))
    for name, site in whole.sites.items():
        found = broken.sites[name].learner.state_dict()
        for key, value in site.learner.state_dict().items():
            np.testing.assert_allclose(found[key], value, atol=1e-6, err_msg=f"{name} {key}")


def test_rows_that_are_too_large_to_be_squared_are_clipped_as_one_after_another():
    chosen = dataclasses.replace(method("ds-fl"), codec="float32", client={"distil": "inside"})
    clients = people(4, MLP, RECIPES["clipped"])
    loud = clients[1].data
    clients[1] = dataclasses.replace(
        clients[1], data=dataclasses.replace(loud, inputs=loud.inputs * np.float32(1e25))
    )
    serial, one = after(Serial, clients, chosen, 2)
    fast, other = after(Vectorized, clients, chosen, 2)
    assert [row["clients_ok"] for row in other] == [row["clients_ok"] for row in one]
    assert one[0]["clients_ok"] == 4
    for name in ("site-0", "site-2"):
        np.testing.assert_allclose(fast.sites[name].targets, serial.sites[name].targets, atol=1e-5)


def test_clients_that_share_a_module_are_asked_one_after_another():
    def group():
        with seeded(7):
            shared = MLP()
        return [
            Client(f"site-{k}", lambda: shared, gaussian(20, k), training=RECIPES["plain"])
            for k in range(2)
        ] + people(3, MLP, RECIPES["plain"])[2:]

    chosen = dataclasses.replace(method("ds-fl"), codec="float32")
    serial, _ = after(Serial, group(), chosen, 2)
    fast, _ = after(Vectorized, group(), chosen, 2)
    for name, site in serial.sites.items():
        np.testing.assert_allclose(fast.sites[name].targets, site.targets, atol=1e-5)
