"""The strongest views: canaries told from noisy updates and counts, and the noise measured."""

import numpy as np
import pytest
import torch
from torch import nn

from fedistill.privacy import bounds
from fedistill.privacy.canaries import Canaries, copied
from fedistill.privacy.tap import CountTap, Tap
from fedistill.types import Rows

RATE, CLIP = 0.5, 1.0


def canaries(count, rng, width=40, classes=5):
    inputs = rng.choice([-1.0, 1.0], size=(count, width)).astype(np.float32)
    rows = Rows(inputs, rng.integers(classes, size=count))
    return Canaries(rows, rng.random(count) < 0.5, np.full(count, -1))


def clipped_gradients(module, rows):
    """One clipped gradient a row, by a backward pass for each."""
    found = []
    for x, y in zip(torch.from_numpy(rows.inputs), torch.from_numpy(rows.labels), strict=True):
        module.zero_grad()
        nn.functional.cross_entropy(module(x[None]), y[None]).backward()
        flat = torch.cat([w.grad.flatten() for w in module.parameters() if w.requires_grad])
        found.append(flat * min(1.0, CLIP / float(flat.norm())))
    return torch.stack(found)


def hear(tap, module, gradients, present, sigma, steps, rng):
    """DP-SGD as an accountant sees it, with weights that stay."""
    units = int(present.sum())
    weights = [w for w in module.parameters() if w.requires_grad]
    for _ in range(steps):
        drawn = torch.from_numpy((rng.random(len(present)) < RATE) & present)
        noise = sigma * CLIP * torch.from_numpy(rng.normal(size=gradients.shape[1])).float()
        mean = (gradients[drawn].sum(0) + noise) / (RATE * units)
        for weight, part in zip(weights, mean.split([w.numel() for w in weights]), strict=True):
            weight.grad = part.view_as(weight)
        tap(module)
    return tap


@pytest.fixture
def trial():
    """60 canaries and 20 own rows of a small network, with their clipped gradients."""
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 5))
    made = canaries(60, rng)
    own = canaries(20, rng).rows
    rows = Rows(
        np.concatenate([made.rows.inputs, own.inputs]),
        np.concatenate([made.rows.labels, own.labels]),
    )
    present = np.concatenate([made.included, np.ones(20, dtype=bool)])

    def run(sigma, steps=30, module=module):
        gradients = clipped_gradients(module, rows)
        tap = Tap(module, own, made.rows, RATE, CLIP, int(present.sum()), sigma=sigma)
        return hear(tap, module, gradients, present, sigma, steps, rng), made

    return run


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_noise_is_measured_from_what_no_row_explains(trial, sigma):
    tap, _ = trial(sigma)
    assert tap.noise == pytest.approx(sigma, rel=0.03)
    assert tap.draws > 1000


def test_without_noise_every_canary_is_told_and_the_noise_is_none(trial):
    tap, made = trial(0.0)
    scores, which = tap.scores()["gradients"]
    np.testing.assert_array_equal(which, np.arange(60))
    assert bounds.auc(scores, made.included) > 0.99
    assert tap.noise < 0.02


def test_more_noise_tells_less(trial):
    areas = [
        bounds.auc(tap.scores()["gradients"][0], made.included)
        for tap, made in (trial(sigma, steps=10) for sigma in (0.3, 30.0))
    ]
    assert areas[0] > 0.95
    assert areas[1] < 0.8


def test_a_frozen_first_part_takes_no_part_and_with_few_weights_no_noise_is_supposed(trial):
    frozen = nn.Linear(40, 10).requires_grad_(False)
    module = nn.Sequential(frozen, nn.Linear(10, 5))
    tap, made = trial(0.2, module=module)
    assert list(dict(tap.clean.named_parameters())) == ["1.weight", "1.bias"]
    assert tap.noise is None
    assert set(tap.scores()) == {"gradients", "gradients, no noise"}
    assert bounds.auc(tap.scores()["gradients"][0], made.included) > 0.6


def test_too_many_weights_are_told_one_by_one_and_noise_is_measured_on_some(trial, monkeypatch):
    monkeypatch.setattr("fedistill.privacy.tap.MOST_NUMBERS", 80 * 400)
    tap, made = trial(0.2)
    assert tap.noise == pytest.approx(0.2, rel=0.05)
    assert bounds.auc(tap.scores()["gradients"][0], made.included) > 0.8


def test_too_many_rows_are_told_one_by_one(trial, monkeypatch):
    monkeypatch.setattr("fedistill.privacy.tap.MOST_ROWS", 10)
    tap, made = trial(0.2)
    assert tap.noise is None
    assert bounds.auc(tap.scores()["gradients"][0], made.included) > 0.8


def test_counts_score_the_label_of_the_copied_row_by_hand():
    public = np.arange(8, dtype=np.float32).reshape(4, 2)
    made = copied(4, public, 3, seed=1)
    tap = CountTap(made)
    noisy = np.arange(6.0).reshape(2, 3)
    tap(np.array([1, 3]), noisy)
    scores, which = tap.scores()["counts"]
    for score, number in zip(scores, which, strict=True):
        row, label = made.proxy[number], made.rows.labels[number]
        assert score == noisy[{1: 0, 3: 1}[row], label]
    assert len(which) == 2
    assert CountTap(made).scores() == {}
    assert CountTap(made).noise is None


def test_noise_of_votes_is_measured_from_the_sums_of_the_counts():
    rng = np.random.default_rng(5)
    votes = rng.multinomial(50, np.ones(10) / 10, size=400)
    tap = CountTap(copied(10, np.ones((400, 2), dtype=np.float32), 10, seed=1))
    tap(np.arange(400), votes + rng.normal(0, 20, votes.shape))
    assert tap.noise == pytest.approx(20, rel=0.1)
    assert tap.draws == 399
    quiet = CountTap(copied(10, np.ones((400, 2), dtype=np.float32), 10, seed=1))
    quiet(np.arange(400), votes.astype(float))
    assert quiet.noise == 0.0
