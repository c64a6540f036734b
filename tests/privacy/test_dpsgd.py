"""A student trained by DP-SGD."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedistill import models
from fedistill.distill.guide import Guide
from fedistill.distill.recipe import Recipe
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import FedistillError, RunError
from fedistill.privacy import dpsgd, entropy
from fedistill.privacy.clipping import cross_entropy
from fedistill.privacy.dpsgd import PrivateStudent
from fedistill.privacy.events import Sampled, Spending
from fedistill.privacy.learner import Private
from fedistill.privacy.sampling import units_of
from fedistill.settings import PrivacySettings
from fedistill.types import Rows

INPUTS = 4
RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 3, 40)
ROWS = Rows(RANDOM.normal(size=(40, INPUTS)) + np.eye(3, INPUTS)[LABELS] * 2, LABELS)
PUBLIC = RANDOM.normal(size=(30, INPUTS)).astype(np.float32)
TARGETS = RANDOM.dirichlet(np.ones(3), 30).astype(np.float32)
NOBODY = ROWS.take([])
ASKED = np.arange(5)
MLP = partial(models.MLP, INPUTS, 3, width=8)


def student(build=MLP, seed=1, loss=None, background=None, privacy=None, **recipe):
    return PrivateStudent(
        build,
        Recipe(**({"batch_size": 8} | recipe)),
        classes=3,
        seed=seed,
        loss=loss,
        background=background,
        privacy=PrivacySettings(**({"mechanism": "dpsgd"} | (privacy or {}))),
    )


def fitted(learner, sigma=1.0, rows=ROWS, seed=1):
    learner.allow(sigma)
    learner.fit(rows, seed=seed)
    return learner


def weights(learner):
    return np.concatenate([p.detach().numpy().ravel() for p in learner.module.parameters()])


@pytest.fixture
def watched(monkeypatch):
    """What each noisy step was given, and how often the optimizer moved."""
    seen = SimpleNamespace(drawn=[])
    plain = dpsgd.poisson

    def poisson(*args):
        seen.drawn.append(plain(*args))
        return seen.drawn[-1]

    monkeypatch.setattr(dpsgd, "poisson", poisson)
    return seen


@pytest.fixture
def repeatable(monkeypatch):
    monkeypatch.setattr(entropy, "generator", lambda device="cpu": torch.Generator().manual_seed(1))


# --- the account ------------------------------------------------------------------------------


def test_it_is_a_private_learner():
    assert isinstance(student(), Private)


@pytest.mark.parametrize(
    ("privacy", "epochs", "steps"),
    [
        ({}, 2, 8),
        ({"sample_rate": 0.3}, 1, 3),
        ({"sample_rate": 1.0}, 3, 3),
        ({"sample_rate": 0.9}, 0, 0),
        ({"steps": 5}, 2, 5),
        ({"steps": 5}, 0, 5),
    ],
)
def test_what_a_fit_costs(privacy, epochs, steps, watched):
    learner = student(epochs=epochs, privacy=privacy)
    rate = learner.privacy.sample_rate
    assert learner.quote(ROWS, ASKED)(1.5) == Spending.of(Sampled(rate, 1.5), steps)
    fitted(learner, 1.5)
    assert len(watched.drawn) == steps


def test_no_rows_cost_nothing():
    assert not student().quote(NOBODY, ASKED)(1.0)


def test_the_price_says_nothing_about_the_rows():
    learner = student()
    other = Rows(ROWS.inputs[:7] * 3, ROWS.labels[:7])
    assert learner.quote(ROWS, ASKED)(2.0) == learner.quote(other, ASKED)(2.0)


def test_without_an_allowance_no_fit_and_each_is_used_once():
    learner = student()
    before = weights(learner)
    with pytest.raises(FedistillError, match=r"no allowance.*charge the step first"):
        learner.fit(ROWS, seed=1)
    np.testing.assert_array_equal(weights(learner), before)
    fitted(learner)
    with pytest.raises(FedistillError, match="no allowance"):
        learner.fit(ROWS, seed=1)


@pytest.mark.parametrize("sigma", [-1.0, np.nan, np.inf])
def test_noise_that_cannot_be(sigma):
    with pytest.raises(FedistillError, match="noise multiplier"):
        student().allow(sigma)


def test_a_failed_fit_used_its_allowance_up():
    def broken(net, inputs, labels):
        raise RunError("the disk is full")

    learner = student(privacy={"sample_rate": 1.0, "steps": 4})
    learner.loss = broken
    with pytest.raises(RunError, match="disk"):
        fitted(learner)
    with pytest.raises(FedistillError, match="no allowance"):
        learner.fit(ROWS, seed=1)
    assert np.isfinite(weights(learner)).all()


def test_what_was_paid_for_is_done_once(repeatable):
    """Noted first and worked through later it is the same fit."""
    one, other = student(), fitted(student())
    one.allow(1.0)
    lesson = one.lesson(ROWS, 1)
    assert (lesson.noisy, lesson.steps, lesson.expected, lesson.sigma) == (8, 8, 10.0, 1.0)
    assert not one._steps
    one.work_through(lesson)
    np.testing.assert_array_equal(weights(one), weights(other))
    with pytest.raises(FedistillError, match="paid for once"):
        one.work_through(lesson)
    one.allow(1.0)
    stale = one.lesson(ROWS, 1)
    one.allow(1.0)
    one.lesson(ROWS, 1)
    with pytest.raises(FedistillError, match="charge another step"):
        one.work_through(stale)
    np.testing.assert_array_equal(weights(one), weights(other))


def test_an_allowance_is_not_for_a_later_fit():
    learner = student()
    learner.allow(1.0)
    learner.fit(NOBODY, seed=1)
    with pytest.raises(FedistillError, match="no allowance"):
        learner.fit(ROWS, seed=1)


def test_the_units_are_those_of_the_rows():
    assert student().units(ROWS) == units_of(ROWS, "record").names
    assert student().units(NOBODY) == ()


def test_rows_without_a_label_teach_nothing_and_cost_nothing():
    unlabelled = Rows(ROWS.inputs, np.full(40, -1))
    learner = student()
    assert not learner.quote(unlabelled, ASKED)(1.0)
    assert learner.units(unlabelled) == ()
    learner.fit(unlabelled, seed=1)


# --- noisy steps ------------------------------------------------------------------------------


def test_one_step_is_the_gradient_of_the_definition(repeatable):
    """lr times (clipped sum + noise) / (q n), from a loop over rows."""
    privacy = {"steps": 1, "sample_rate": 0.5, "clip_norm": 0.7, "lr": 0.3}
    learner = student(privacy=privacy)
    before, parts = weights(learner), list(learner.module.parameters())
    drawn = np.flatnonzero(
        torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) < 0.5
    )
    total = np.zeros_like(before)
    for row in drawn:
        loss = cross_entropy(
            learner.module,
            torch.from_numpy(ROWS.inputs[[row]]),
            torch.from_numpy(ROWS.labels[[row]]),
        )
        own = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), parts)]).numpy()
        total += own * min(1.0, 0.7 / np.linalg.norm(own))
    random = torch.Generator().manual_seed(1)
    noise = np.concatenate(
        [torch.normal(0, 1.4, p.shape, generator=random).numpy().ravel() for p in parts]
    )
    fitted(learner, sigma=2.0)
    expected = before - 0.3 * (total + noise) / 20
    np.testing.assert_allclose(weights(learner), expected, rtol=1e-4, atol=1e-5)


def test_equal_seeds_do_not_mean_equal_noise_or_equal_steps(watched):
    """Fault 63."""
    first, second = fitted(student()), fitted(student())
    assert not np.array_equal(weights(first), weights(second))
    half = len(watched.drawn) // 2
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(watched.drawn[:half], watched.drawn[half:], strict=True)
    )


def test_seeds_say_where_it_starts():
    np.testing.assert_array_equal(weights(student()), weights(student()))
    assert not np.array_equal(weights(student(seed=1)), weights(student(seed=2)))


def test_global_generators_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted(student())
    assert torch.equal(torch.rand(3), expected)


def test_the_size_of_a_step_varies_and_its_mean_is_the_rate(watched):
    fitted(student(privacy={"steps": 150, "sample_rate": 0.2}))
    sizes = [len(step) for step in watched.drawn]
    assert np.mean(sizes) == pytest.approx(8, abs=5 * (40 * 0.16 / 150) ** 0.5)
    assert len(set(sizes)) > 3


def test_steps_that_nobody_is_in_count(watched, repeatable):
    """Fault 51."""
    learner = fitted(student(privacy={"steps": 30, "sample_rate": 0.1}), rows=ROWS.take([0, 1]))
    assert min(len(step) for step in watched.drawn) == 0
    assert learner._steps == 30
    assert np.isfinite(weights(learner)).all()


@pytest.mark.parametrize("count", [1, 2])
def test_a_shard_of_one_row(count):
    """Fault 46."""
    learner = fitted(student(), rows=ROWS.take([0] * count))
    assert np.isfinite(learner.predict(PUBLIC)).all()


def test_a_record_that_lies_there_twice_is_drawn_by_one_coin(watched):
    """Fault 48."""
    fitted(student(privacy={"sample_rate": 1.0, "steps": 1}), rows=ROWS.take([0, 1, 0, 2, 1]))
    np.testing.assert_array_equal(watched.drawn[0], [0, 1, 2])


def test_memory_running_out_leaves_the_draw(watched):
    """Fault 61: the number of steps, and who is in them, are those that were paid for."""

    def small(net, inputs, labels):
        if len(inputs) > 6:
            raise torch.OutOfMemoryError
        return cross_entropy(net, inputs, labels)

    learner = student(privacy={"steps": 3, "sample_rate": 1.0})
    learner.loss = small
    fitted(learner)
    assert len(watched.drawn) == 3
    assert learner._largest == 5


def test_the_schedule_runs_over_the_noisy_steps(monkeypatch):
    rates = []
    learner = student(schedule="cosine", privacy={"steps": 4, "lr": 0.2})
    monkeypatch.setattr(learner._optimizer, "step", rates.append)
    fitted(learner)
    expected = [0.1 * (1 + np.cos(np.pi * k / 4)) for k in range(4)]
    np.testing.assert_allclose(rates, expected)


def test_the_average_of_noisy_weights_predicts():
    learner = fitted(student(average=0.9), sigma=20.0)
    last = learner.module(torch.from_numpy(PUBLIC)).detach().numpy()
    assert not np.allclose(learner.predict(PUBLIC), last)


def test_how_many_rows_were_drawn_is_not_told():
    learner = fitted(student(privacy={"steps": 3, "sample_rate": 0.25}))
    assert learner.passed == 30


def test_nothing_listens_after_a_fit():
    learner = fitted(student())
    assert not any(layer._forward_hooks for layer in learner.module.modules())
    assert not learner.module.training
    np.testing.assert_array_equal(learner.predict(PUBLIC), learner.predict(PUBLIC))


# --- public rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("distil", ["phase", "inside"])
def test_public_distillation_alone_is_that_of_any_student(distil):
    """It needs no allowance and is repeatable."""
    private = student(distil=distil, mixup=1.0)
    plain = TorchStudent(MLP, Recipe(batch_size=8, distil=distil, mixup=1.0), classes=3, seed=1)
    for learner in (private, plain):
        learner.absorb(PUBLIC, TARGETS, seed=3)
        learner.fit(NOBODY, seed=4)
    np.testing.assert_array_equal(private.predict(PUBLIC), plain.predict(PUBLIC))


@pytest.mark.parametrize(("steps", "passes", "public"), [(8, 1, 8), (2, 1, 4), (3, 3, 12)])
def test_public_steps_are_between_the_noisy_ones(monkeypatch, steps, passes, public):
    """30 rows in batches of 8: one public step a noisy one, and all passes at least."""
    learner = student(distil_epochs=passes, privacy={"steps": steps})
    batches, moves = [], []
    plain = learner._public_step
    monkeypatch.setattr(
        learner, "_public_step", lambda batch, *rest: (batches.append(batch), plain(batch, *rest))
    )
    monkeypatch.setattr(learner._optimizer, "step", moves.append)
    learner.absorb(PUBLIC, TARGETS, seed=3)
    fitted(learner)
    assert len(batches) == public
    assert len(moves) == steps + public
    own = {row.tobytes() for row in ROWS.inputs}
    assert not any(row.numpy().tobytes() in own for batch in batches for row in batch.inputs)
    assert all(batch.own == 0 for batch in batches)


def test_public_rows_do_not_change_the_price():
    learner = student()
    before = learner.quote(ROWS, ASKED)(1.0)
    learner.absorb(PUBLIC, TARGETS, seed=3)
    assert learner.quote(ROWS, ASKED)(1.0) == before


def test_public_rows_teach(repeatable):
    """Under so much noise that own rows cannot."""
    inputs = np.concatenate([ROWS.inputs] * 3)
    labels = np.eye(3, dtype=np.float32)[np.concatenate([ROWS.labels] * 3)]
    learner = student(distil_epochs=20, average=0.95, momentum=0.9, privacy={"lr": 0.001})
    learner.absorb(inputs, labels, seed=3)
    fitted(learner, sigma=5.0)
    assert (learner.predict(ROWS.inputs).argmax(1) == ROWS.labels).mean() > 0.8


# --- users ------------------------------------------------------------------------------------


def users(count=8):
    return Rows(ROWS.inputs, ROWS.labels, subject=np.array([f"p{n % count}" for n in range(40)]))


def test_users_are_drawn_with_all_of_their_rows(watched):
    learner, sizes = student(privacy={"unit": "user", "sample_rate": 0.5, "steps": 12}), []
    plain = learner.loss
    learner.loss = lambda net, x, y: (sizes.append(len(x)), plain(net, x, y))[1]
    assert len(learner.units(users())) == 8
    fitted(learner, rows=users())
    assert sizes == [5 * len(step) for step in watched.drawn if len(step)]
    assert max(max(step, default=0) for step in watched.drawn) < 8


def test_one_user_moves_a_step_by_the_norm_at_most(repeatable):
    """Its fifty rows are as extreme as can be."""
    many = np.full((50, INPUTS), 30.0, dtype=np.float32)
    moved = []
    for present in (0.0, 1.0):
        rows = Rows(
            np.concatenate([ROWS.inputs, present * many]),
            np.concatenate([ROWS.labels, np.ones(50, dtype=np.int64)]),
            subject=np.array([*users().subject, *["loud"] * 50]),
        )
        privacy = {"unit": "user", "sample_rate": 1.0, "steps": 1, "clip_norm": 0.4, "lr": 1.0}
        moved.append(weights(fitted(student(privacy=privacy), sigma=1.0, rows=rows)))
    # Both are in; each moves the sum by 0.4 at most, and so the step by 2 * 0.4 / 9.
    assert np.linalg.norm(moved[0] - moved[1]) <= 2 * 0.4 / 9 * (1 + 1e-3)


def test_users_have_to_be_known():
    learner = student(privacy={"unit": "user"})
    for call in (learner.units, lambda rows: fitted(learner, rows=rows)):
        with pytest.raises(FedistillError, match=r"data\.subject"):
            call(ROWS)


# --- what cannot be private ---------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"calibrate": True}, {"familiarity": True}])
def test_recipes_that_cannot_be_private(wrong):
    with pytest.raises(FedistillError, match="cannot be private"):
        student(**wrong)


def test_a_guide_is_refused():
    learner = student()
    learner.guide(None)
    with pytest.raises(FedistillError, match="no guide"):
        learner.guide(Guide("prototypes", np.zeros((3, 2)), np.ones(3, dtype=bool)))


def contrastive(net, inputs, labels):
    hidden = nn.functional.normalize(net(inputs), dim=1)
    same = (labels[:, None] == labels).float()
    return -(same * (hidden @ hidden.T / 0.1).log_softmax(1)).sum(1)


@pytest.mark.parametrize("background", [None, PUBLIC])
def test_a_loss_that_compares_rows_is_refused_before_anything_is_spent(background):
    learner = student(loss=contrastive, background=background)
    with pytest.raises(FedistillError, match="contrastive cannot be private"):
        learner.quote(ROWS, ASKED)
    with pytest.raises(FedistillError, match="contrastive cannot be private"):
        fitted(learner)


def test_a_loss_of_ones_own(monkeypatch):
    calls = []
    plain = dpsgd.check_loss
    monkeypatch.setattr(
        dpsgd, "check_loss", lambda *a, **k: (calls.append(k["name"]), plain(*a, **k))
    )

    def halved(net, inputs, labels):
        return cross_entropy(net, inputs, labels) / 2

    learner = student(loss=halved)
    learner.quote(ROWS, ASKED)
    fitted(learner)
    fitted(learner)
    assert calls == ["halved"]


def test_a_module_that_mixes_rows_is_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(INPUTS, 3)

        def forward(self, inputs):
            return self.head(inputs - inputs.mean(0))

    with pytest.raises(FedistillError, match="cannot be private"):
        student(Centred).quote(ROWS, ASKED)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.Softmax(dim=0), nn.Linear(8, 3)),
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2)),
            nn.TransformerEncoderLayer(2, 1, 8, dropout=0.0),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of attention, that rows may be nested
def test_layers_of_pytorch_that_compare_rows_are_refused(build):
    with pytest.raises(FedistillError, match="cannot be private"):
        student(build).quote(ROWS, ASKED)


def test_what_is_hung_on_a_model_is_tried_whenever_that_happens():
    learner = student()
    learner.quote(ROWS, ASKED)
    learner.module.trunk.register_forward_hook(lambda layer, given, gave: gave - 5 * gave.mean(0))
    with pytest.raises(FedistillError, match="cannot be private"):
        learner.quote(ROWS, ASKED)


class Shortening(nn.Module):
    """It shortens the vectors that are looked up, in place."""

    def __init__(self, learns):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.words.requires_grad_(learns)

    def forward(self, inputs):
        found = nn.functional.embedding(inputs.abs().long(), self.words.weight, max_norm=1e-3)
        return self.head(found.mean(1))


@pytest.mark.parametrize("mode", ["hooks", "gram"])
def test_weights_that_are_written_to_without_noise_are_refused(mode):
    learner = student(partial(Shortening, learns=False), background=np.full((16, 1), 8.0))
    learner._mode = mode
    with pytest.raises(FedistillError, match=r"its own words\.weight .* without noise"):
        fitted(learner)


class Counting(nn.Module):
    """It keeps something of the rows, and no weight: no noise would reach that."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(INPUTS, 3))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, inputs):
        if self.training:
            self.seen += inputs.mean()
        return self.head(inputs)


def test_statistics_of_own_rows_are_refused():
    with pytest.raises(FedistillError, match="its own seen"):
        fitted(student(Counting))


def test_batch_norm_is_replaced_with_a_word():
    def build():
        return nn.Sequential(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    learner = student(build)
    assert len(learner.notes) == 1
    assert "BatchNorm became GroupNorm" in learner.notes[0]
    fitted(learner)
    again = student(build, seed=2)
    again.load_state_dict(learner.state_dict(), ROWS)
    np.testing.assert_array_equal(again.predict(PUBLIC), learner.predict(PUBLIC))


# --- state ------------------------------------------------------------------------------------


def test_a_restored_student_predicts_and_goes_on(repeatable):
    recipe = {"momentum": 0.9, "average": 0.9}
    first = fitted(student(**recipe))
    second = student(seed=7, **recipe)
    second.load_state_dict(first.state_dict(), ROWS)
    np.testing.assert_array_equal(second.predict(PUBLIC), first.predict(PUBLIC))
    for learner in (first, second):
        fitted(learner)
    np.testing.assert_array_equal(second.predict(PUBLIC), first.predict(PUBLIC))


def test_an_allowance_is_not_restored():
    learner = student()
    state = learner.state_dict()
    learner.allow(1.0)
    learner.load_state_dict(state, ROWS)
    with pytest.raises(FedistillError, match="no allowance"):
        learner.fit(ROWS, seed=1)


def test_digits_are_learned():
    digits = load_digits()
    inputs = (digits.data / 16).astype(np.float32)
    learner = PrivateStudent(
        partial(models.MLP, 64, 10, width=32),
        Recipe(epochs=20, momentum=0.9, average=0.95),
        classes=10,
        seed=0,
        privacy=PrivacySettings(mechanism="dpsgd", lr=0.5),
    )
    fitted(learner, sigma=1.5, rows=Rows(inputs[:1300], digits.target[:1300]))
    assert (learner.predict(inputs[1300:]).argmax(1) == digits.target[1300:]).mean() > 0.82
