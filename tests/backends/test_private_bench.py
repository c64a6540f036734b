"""Private clients side by side: the same steps, accounts of their own, noise of their own."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from builders import INPUTS, federation, gaussian, write_settings
from torch import nn

import fedistill as fd
from fedistill import experiment, models
from fedistill.backends import private_bench
from fedistill.backends.private_bench import PrivateBench, private_benches
from fedistill.backends.serial import Serial
from fedistill.backends.together import kind_of, unfit
from fedistill.backends.vectorized import Vectorized, alone
from fedistill.client import Client
from fedistill.distill.recipe import Recipe
from fedistill.errors import FedistillError, RunError
from fedistill.newcomer import private_client
from fedistill.privacy import entropy
from fedistill.privacy.clipping import cross_entropy
from fedistill.privacy.dpsgd import PrivateStudent
from fedistill.privacy.remembered import PrivateMemory
from fedistill.settings import PrivacySettings
from fedistill.types import Rows

LINEAR = partial(models.Linear, INPUTS, 3)
DEEP = partial(models.MLP, INPUTS, 3, width=6, depth=2)
COUNTS = [9, 40, 1, 17]
PUBLIC = gaussian(30, 1000).inputs
TARGETS = np.random.default_rng(0).dirichlet(np.ones(3), 30).astype(np.float32)
HOW = fd.Privacy(mechanism="dpsgd", epsilon=3.0, sample_rate=0.5, steps=4)


@pytest.fixture
def coins(monkeypatch):
    """Coins and noise that follow from the seed of a lesson, whoever comes first."""
    plain = PrivateStudent.open

    def seeded(self, lesson):
        plain(self, lesson)
        return tuple(torch.Generator().manual_seed(lesson.seed + 1000 * n) for n in range(2))

    monkeypatch.setattr(PrivateStudent, "open", seeded)


def students(build, count=4, privacy=None, replay=0, **recipe):
    how = {"mechanism": "dpsgd", "sample_rate": 0.5, "steps": 3, "clip_norm": 0.4}
    return [
        PrivateStudent(
            build,
            Recipe(**({"batch_size": 8, "lr": 0.2} | recipe)),
            classes=3,
            seed=k,
            privacy=PrivacySettings(**(how | (privacy or {}))),
            replay=PrivateMemory(replay) if replay else None,
        )
        for k in range(count)
    ]


def rows_of(k, number):
    return gaussian(COUNTS[k], 100 * number + k)


def one_by_one(learners, number, sigma=0.0, rows=rows_of):
    for k, learner in enumerate(learners):
        learner.absorb(PUBLIC, TARGETS, seed=10 * number + k)
        learner.allow(sigma)
        learner.fit(rows(k, number), seed=100 * number + k)


@torch.no_grad()
def side_by_side(learners, number, sigma=0.0, rows=rows_of, size=3):
    lessons = []
    for k, learner in enumerate(learners):
        heard = learner.hear(PUBLIC, TARGETS, seed=10 * number + k)
        learner.allow(sigma)
        own = learner.lesson(rows(k, number), 100 * number + k)
        lessons.append([one for one in (heard, own) if one is not None])
    assert len({kind_of(*pair) for pair in zip(learners, lessons, strict=True)}) == 1
    for places in private_benches(lessons, size):
        PrivateBench([learners[at] for at in places], [lessons[at] for at in places]).teach()


def assert_alike(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert (one.passed, one._steps) == (other.passed, other._steps)
        mine, theirs = one.state_dict(), other.state_dict()
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if key != "replay.keys":
                np.testing.assert_allclose(mine[key], value, atol=2e-5, err_msg=key)


# --- the same steps ------------------------------------------------------------------------------

RECIPES = {
    "plain": {"momentum": 0.9},
    "without momentum": {"momentum": 0.0, "soft_weight": 0.5, "scarce_rows": 30},
    "averaged": {"average": 0.9, "momentum": 0.5},
    "falling": {"schedule": "cosine", "privacy": {"lr": 0.05, "steps": 3}},
    "decayed": {"weight_decay": 0.1, "momentum": 0.9, "clip": 0.5},
    "adam": {"optimizer": "adam", "lr": 0.01, "average": 0.9, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "distil_epochs": 4},
    "mixed": {"mixup": 0.5, "temperature": 2.0},
    "hot": {"temperature": 3.0, "loss": "mae"},
    "never": {"distil": "never", "momentum": 0.9},
}


@pytest.mark.parametrize("distil", ["inside", "phase"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("build", [LINEAR, DEEP], ids=["linear", "mlp"])
def test_without_noise_they_learn_what_they_learn_one_after_another(coins, build, recipe, distil):
    """Over some rounds of other rows, unequally many; the last block is a smaller one."""
    given = {"distil": distil} | recipe
    serial, beside = students(build, **given), students(build, **given)
    for number in range(3):
        one_by_one(serial, number)
        side_by_side(beside, number)
    assert_alike(beside, serial)


def test_nobody_drawn_is_a_step_all_the_same(coins):
    how = {"sample_rate": 1e-9, "steps": 2}
    serial, beside = students(DEEP, privacy=how), students(DEEP, privacy=how)
    one_by_one(serial, 1)
    side_by_side(beside, 1)
    assert_alike(beside, serial)
    before = [value.copy() for value in beside[0].state_dict().values()]
    side_by_side(beside, 2, sigma=1.0)
    assert not all(map(np.array_equal, before, beside[0].state_dict().values()))


def test_remembered_rows_are_trained_on_beside_new_ones(coins):
    serial, beside = students(LINEAR, replay=1000), students(LINEAR, replay=1000)
    for number in (0, 1, 1):  # the second comes twice: it is remembered once
        one_by_one(serial, number)
        side_by_side(beside, number)
    assert [len(one.replay) for one in beside] == [2 * count for count in COUNTS]
    assert_alike(beside, serial)


def test_a_row_without_a_finite_gradient_adds_nothing(coins):
    def spoilt(k, number):
        rows = rows_of(k, number)
        rows.inputs[0] = np.inf if k == 1 else rows.inputs[0]
        return rows

    everybody = {"sample_rate": 1.0, "steps": 2}
    serial, beside = students(DEEP, privacy=everybody), students(DEEP, privacy=everybody)
    one_by_one(serial, 1, rows=spoilt)
    side_by_side(beside, 1, rows=spoilt)
    assert_alike(beside, serial)
    assert all(np.isfinite(one.predict(PUBLIC)).all() for one in beside)


def test_broken_weights_end_the_run():
    learners = students(DEEP)
    nn.init.constant_(learners[1].module.head.weight, torch.nan)
    with pytest.raises(RunError, match="what was spent stays spent"):
        side_by_side(learners, 1)


def test_a_block_holds_no_more_rows_than_a_step_should(monkeypatch):
    monkeypatch.setattr(private_bench, "STEP_ROWS", 1000)
    learners = students(LINEAR, count=3)
    for learner in learners:
        learner.allow(1.0)
    lessons = [
        [one.lesson(gaussian(c, 1), 0)] for one, c in zip(learners, (4, 900, 8), strict=True)
    ]
    assert private_benches(lessons, 20) == [[1, 2], [0]]
    assert private_benches(lessons, 1) == [[1], [2], [0]]
    assert private_benches([[], []], 5) == [[0, 1]]


# --- noise ---------------------------------------------------------------------------------------


def moved(learners, sigma):
    """What one step along everybody's gradient and noise changed, ``[clients, weights]``."""
    before = [np.concatenate([v.ravel() for v in s.state_dict().values()]) for s in learners]
    side_by_side(learners, 1, sigma=sigma, rows=lambda k, number: gaussian(20 + 10 * k, k), size=9)
    after = [np.concatenate([v.ravel() for v in s.state_dict().values()]) for s in learners]
    return np.stack(after)[:, :-1] - np.stack(before)[:, :-1]


def test_noise_is_each_clients_own_and_of_the_size_that_was_paid_for(monkeypatch):
    seeds = iter(range(1000))
    monkeypatch.setattr(
        entropy, "generator", lambda device="cpu": torch.Generator().manual_seed(next(seeds))
    )
    wide = partial(models.MLP, INPUTS, 3, width=300)
    given = {"momentum": 0.0, "distil": "never", "privacy": {"sample_rate": 1.0, "steps": 1}}
    clear, noisy = (moved(students(wide, 3, **given), sigma) for sigma in (0.0, 2.0))
    noise = noisy - clear
    for k, own in enumerate(noise):
        spread = 0.2 * 2.0 * 0.4 / (20 + 10 * k)  # rate sigma clip / expected
        assert own.std() == pytest.approx(spread, rel=0.1)
        assert abs(own.mean()) < 0.1 * spread
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.1


def test_noise_and_coins_are_not_those_of_a_seed():
    given = {"momentum": 0.0, "distil": "never", "privacy": {"sample_rate": 1.0, "steps": 1}}
    one, other = (moved(students(LINEAR, 3, **given), 1.0) for _ in range(2))
    assert np.abs(one - other).min() > 0
    for sigma in (0.0, 0.0):  # nobody knows who is drawn
        given["privacy"] = {"sample_rate": 0.5, "steps": 1}
        one, other = (moved(students(LINEAR, 3, **given), sigma) for _ in range(2))
        assert not np.array_equal(one, other)


# --- accounts ------------------------------------------------------------------------------------


def clients(count=4):
    recipe = Recipe(epochs=1, batch_size=8, momentum=0.9)
    return [
        Client(
            f"site-{k}",
            LINEAR if k % 2 else DEEP,
            gaussian(0 if k == 3 else 24 - k, k),
            training=recipe,
        )
        for k in range(count)
    ]


def entries(fed):
    """What the ledgers say that does not follow from the noise."""
    return {
        name: [(e.kind, e.round, e.mechanism, e.spending) for e in site.account.ledger.entries()]
        for name, site in fed.sites.items()
    }


def test_ledgers_hold_what_they_hold_one_after_another():
    found = []
    for backend in (Serial, Vectorized):
        fed = federation(clients(), privacy=HOW, quorum=1)
        rows = list(fed.run(3, backend=backend))
        found.append((entries(fed), [row["epsilon"] for row in rows], rows[-1]["clients_ok"]))
    assert found[0] == found[1]
    assert not any("alone" in note for note in fed.notes)
    kinds = [kind for kind, *_ in found[1][0]["site-0"]]
    assert kinds == ["reserve", "release"] * 3


def test_a_client_whose_budget_is_spent_does_not_stop_the_others():
    how = dataclasses.replace(HOW, sigma=2.5)
    rich = dataclasses.replace(how, epsilon=100.0)
    people = clients(3)
    people[1] = private_client(people[1], how, 6)
    people[::2] = [private_client(one, rich, 6) for one in people[::2]]
    fed = federation(people, privacy=how, quorum=1)
    rows = list(fed.run(6, backend=Vectorized))
    assert rows[0]["dropped"] == {}
    assert rows[-1]["dropped"] == {"site-1": "budget_exhausted"}
    assert rows[-1]["clients_ok"] == 2
    assert fed.summary()["privacy"]["sites"]["site-1"]["epsilon"] <= 3.0


def test_what_was_paid_stays_spent_where_training_breaks_off(monkeypatch):
    fed = federation(clients(3), privacy=HOW)
    order = []
    pay = PrivateStudent.allow
    monkeypatch.setattr(
        PrivateStudent, "allow", lambda self, sigma: (order.append("allow"), pay(self, sigma))[1]
    )

    def killed(*args, **kwargs):
        order.append("step")
        raise KeyboardInterrupt

    monkeypatch.setattr(private_bench, "noisy_gradients", killed)
    with pytest.raises(KeyboardInterrupt):
        list(fed.run(1, backend=Vectorized))
    assert order == ["allow"] * 3 + ["step"]
    for site in fed.sites.values():
        assert [e.kind for e in site.account.ledger.entries()] == ["reserve"]
        assert site.account.spent() > 0
        with pytest.raises(FedistillError, match="no allowance"):
            site.learner.fit(site.data, seed=0)


def test_a_settings_file_asks_for_it(tmp_path):
    how = '[privacy]\nmechanism = "dpsgd"\nepsilon = 9\nsteps = 2\nsigma = 3.0\n'
    settings = write_settings(tmp_path, rounds=2, more=how)
    told = experiment.run(settings, overrides=["backend.name=vectorized"], out=tmp_path / "run")
    assert told["backend"] == "vectorized"
    assert all(site["releases"] == 2 for site in told["privacy"]["sites"].values())


def test_rounds_after_those_that_are_paid_for_are_public(coins):
    how = fd.Privacy(mechanism="dpsgd", epsilon=9.0, sample_rate=0.5, steps=2, rounds=1, sigma=3.0)
    fed = federation(clients(3), privacy=how)
    rows = list(fed.run(3, backend=Vectorized))
    assert rows[0]["epsilon"] == rows[-1]["epsilon"]
    assert rows[-1]["clients_ok"] == 3


# --- who is trained so ---------------------------------------------------------------------------


def test_who_cannot_be_is_trained_alone_and_the_run_says_so():
    (learner,) = students(DEEP, 1)
    assert not unfit(learner)
    learner.listener = print
    assert "audited" in unfit(learner)
    learner.listener, learner.loss = None, lambda *given: cross_entropy(*given)
    assert "a loss of its own" in unfit(learner)
    assert "users" in unfit(students(DEEP, 1, privacy={"unit": "user"})[0])
    lenet = PrivateStudent(
        models.LeNet, Recipe(), classes=10, seed=0, privacy=PrivacySettings(mechanism="dpsgd")
    )
    assert "LeNet" in unfit(lenet)


PLANNED = {"mechanism": "dpsgd", "epsilon": 99.0, "steps": 2, "sigma": 9.0}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"unit": "user"}, "users"),
        ({"mechanism": "gnmax"}, "not by noisy steps"),
    ],
)
def test_other_private_clients_are_asked_as_by_the_serial_backend(how, reason):
    rows = gaussian(40, 1)
    named = Rows(rows.inputs, rows.labels, subject=np.array([f"p{n % 20}" for n in range(40)]))
    people = [Client(f"site-{k}", LINEAR, named, training=Recipe(epochs=1)) for k in range(2)]
    fed = federation(people, privacy=fd.Privacy(**(PLANNED | how)))
    (row,) = fed.run(1, backend=Vectorized)
    assert row["clients_ok"] == 2
    assert all(reason in alone(site) for site in fed.sites.values())
    assert any(reason in note and "trained alone" in note for note in fed.notes)
