"""One audit: honest noise passes, noise that was switched off is caught."""

import json

import numpy as np
import pytest

from fedistill.privacy.attacks import LabelMix
from fedistill.privacy.audit import Audit, Subject, audit_once
from fedistill.privacy.entropy import numpy_generator
from fedistill.privacy.events import Gaussian, Spending
from fedistill.privacy.labels import hard_labels
from fedistill.privacy.terms import Terms
from fedistill.types import Rows

CLASSES, WIDTH, FEATURES, STEPS = 4, 20, 800, 60


class Regression:
    """Softmax regression on random features by full-batch DP-SGD, small enough to read.

    Args:
        seed: of the features.
        broken: ignore the noise that was paid for.
    """

    def __init__(self, seed=0, broken=False):
        self.broken = broken
        self.projection = np.random.default_rng(seed).normal(size=(WIDTH, FEATURES))
        self.weights = np.zeros((FEATURES, CLASSES))
        self.sigma = None

    def quote(self, rows, asked):
        return lambda sigma: Spending.of(Gaussian(sigma), STEPS)

    def allow(self, sigma):
        self.sigma = sigma

    def units(self, rows):
        return tuple(
            x.tobytes() + bytes([y]) for x, y in zip(rows.inputs, rows.labels, strict=True)
        )

    def features(self, inputs):
        raw = np.sin(inputs @ self.projection)  # wide apart: every row can be learned by heart
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)

    def fit(self, rows, *, seed):
        sigma, self.sigma = self.sigma, None
        noise = numpy_generator()
        x, y = self.features(rows.inputs), np.eye(CLASSES)[rows.labels]
        for _ in range(STEPS):
            error = y - self.probs(x)
            error /= np.maximum(np.linalg.norm(error, axis=1, keepdims=True), 1)  # |x| = 1: clipped
            update = x.T @ error
            if not self.broken:
                update += sigma * noise.normal(size=update.shape)
            self.weights += update

    def probs(self, features):
        logits = features @ self.weights
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    def predict(self, inputs):
        return np.log(self.probs(self.features(inputs)) + 1e-9)

    def absorb(self, inputs, soft_targets, *, seed, weights=None):
        raise AssertionError("an audit absorbs nothing")

    def state_dict(self):
        return {}

    def load_state_dict(self, state, rows):
        pass


class Voter(Regression):
    """Answers about its proxy rows, and says nothing else."""

    def __init__(self, proxy, broken=False):
        super().__init__(broken=broken)
        self.proxy = proxy

    def answer(self, asked):
        return super().predict(self.proxy[asked])

    def predict(self, inputs):
        raise AssertionError("what is not released is not asked for")


def subject(make, *, rounds=2, terms=None, **more):
    rng = np.random.default_rng(1)
    rows = Rows(rng.normal(size=(60, WIDTH)), rng.choice(3, size=60, p=[0.8, 0.1, 0.1]))
    proxy = rng.normal(size=(500, WIDTH)).astype(np.float32)
    return Subject(make, rows, proxy, CLASSES, rounds, terms, **more)


TERMS = Terms(mechanism="dpsgd", epsilon=1.0, rounds=2)


def test_honest_noise_passes():
    found = audit_once(subject(Regression, terms=TERMS), canaries=1000, seed=3, delta=1e-5)
    assert 0.9 < found.spent <= 1.0
    assert found.epsilon < found.spent < found.ceiling
    assert found.sigma > 5
    assert not found.quiet
    assert {a.view for a in found.attacks} == {"model", "proxy"}


def test_noise_that_was_switched_off_is_caught_at_the_same_claim():
    broken = subject(lambda: Regression(broken=True), terms=TERMS)
    found = audit_once(broken, canaries=1000, seed=3, delta=1e-5)
    assert found.spent <= 1.0 < found.epsilon
    best = {a.view: a for a in found.attacks if a.name == "reference"}
    assert best["model"].auc > 0.9
    assert best["proxy"].auc > 0.9


def test_a_learner_that_answers_is_judged_by_its_answers_alone():
    base = subject(Regression)
    voter = subject(lambda: Voter(base.proxy, broken=True), rounds=1)
    found = audit_once(voter, canaries=600, seed=3, delta=1e-5)
    assert {a.view for a in found.attacks} == {"proxy"}
    assert found.epsilon > 1
    assert found.spent == np.inf


def test_proxy_rows_that_were_not_asked_tell_nothing():
    broken = subject(lambda: Regression(broken=True), rounds=1, per_round=50)
    found = audit_once(broken, canaries=1000, seed=3, delta=1e-5)
    area = {(a.view, a.name): a.auc for a in found.attacks}
    assert area["model", "loss"] > 0.8 > 0.6 > area["proxy", "loss"] > 0.5


def test_labels_in_place_of_probabilities_tell_less():
    soft, hard = (
        audit_once(
            subject(lambda: Regression(broken=True), rounds=1, **more),
            canaries=1000,
            seed=3,
            delta=1e-5,
        )
        for more in ({}, {"told": hard_labels})
    )
    area = [next(a.auc for a in one.attacks if a.view == "proxy") for one in (soft, hard)]
    assert area[0] > area[1] > 0.6


def test_the_label_mix_is_that_of_the_own_rows():
    found = audit_once(
        subject(lambda: Regression(broken=True), rounds=1), canaries=200, seed=3, delta=1e-5
    )
    assert found.mix.guess == pytest.approx(0.55, abs=0.1)
    assert found.mix.error < found.mix.guess


def test_one_seed_gives_the_same_canaries_and_facts_are_json():
    make = lambda: Regression(broken=True)  # noqa: E731
    first, again = (
        audit_once(subject(make, rounds=1), canaries=300, seed=s, delta=1e-5) for s in (5, 5)
    )
    assert first == again
    told = json.loads(json.dumps(first.facts(), allow_nan=False))
    assert told["included"] == first.included
    false, true = zip(*told["attacks"][0]["curve"], strict=True)
    assert list(false) == sorted(false)
    assert list(true) == sorted(true)
    assert (false[-1], true[-1]) == (1.0, 1.0)
    assert told["spent"] is None


@pytest.mark.parametrize(
    ("noise", "draws", "quiet"),
    [
        (None, 0, False),
        (0.0, 100, True),
        (1.0, 100, False),
        (0.9, 100, False),  # 100 draws: chance explains it
        (0.9, 100_000, True),
        (0.96, 100_000, False),  # within what a measurement may be off
    ],
)
def test_measured_noise_fails_only_beyond_doubt(noise, draws, quiet):
    found = Audit(1000, 500, (), LabelMix(0.1, 0.2), 1.0, noise, draws, 1.0)
    assert found.quiet is quiet
