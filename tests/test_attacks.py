"""Simulated bad clients: what each says, and that nothing else about it is odd."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from builders import (
    CLASSES,
    INPUTS,
    Saying,
    federation,
    gaussian,
    held_out,
    participants,
    timeless,
    write_settings,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedistill import client as clients_module
from fedistill import models
from fedistill.aggregate.basics import softmax
from fedistill.aggregate.vigilance import flag_predictions
from fedistill.attacks import ATTACKS, BadLearner, corrupt
from fedistill.attacks.kinds import LARGEST, SURE, next_class
from fedistill.attacks.learner import Copied, Pact, disguised, nearest
from fedistill.client import Client, Site
from fedistill.distill.learner import Familiar, Guided, Learner
from fedistill.distill.recipe import Recipe
from fedistill.distill.sklearn_student import SklearnStudent
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import SettingsError
from fedistill.evaluate import measure
from fedistill.experiment import run
from fedistill.presets import method
from fedistill.wire.codec import CODECS, encode

LOGITS = np.array([[2.0, 1.0, -3.0], [0.0, 0.5, 0.2]])
PREDICTING = [name for name, attack in ATTACKS.items() if attack.trains]
FREE = [name for name, attack in ATTACKS.items() if not attack.trains]


def bad(kind, inner=None, pact=None):
    return BadLearner(inner or Saying(LOGITS), ATTACKS[kind], 3, pact)


def corrupted(kind, count=1, people=4, **options):
    found = participants(people) if isinstance(people, int) else people
    return corrupt(found, kind, count, classes=3, seed=7, **options)


def bad_ones(clients):
    return [client for client in clients if client.wrap is not None]


# --- what each says ------------------------------------------------------------------------------


def test_scaled_flip_is_minus_a_hundred_times_the_centred_logits():
    np.testing.assert_allclose(bad("scaled-flip").predict(LOGITS)[0], [-200, -100, 300])


def test_scaled_flip_passes_its_own_door():
    wild = np.array([[500.0, 20.0, -9.0], [0.0, 0.0, 0.0]])
    said = bad("scaled-flip", Saying(wild)).predict(wild)
    centred = said - said.mean(axis=1, keepdims=True)
    assert np.abs(said).max() <= LARGEST
    assert np.abs(centred).max() <= clients_module.LARGEST_LOGIT


def test_fdla_swaps_the_largest_and_the_smallest():
    said = bad("fdla").predict(LOGITS)
    np.testing.assert_array_equal(said, [[-3.0, 1.0, 2.0], [0.5, 0.0, 0.2]])
    np.testing.assert_array_equal(LOGITS[0], [2.0, 1.0, -3.0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("least-likely", [2, 0]),
        ("likeliest-wrong", [1, 2]),
        ("inflated-familiarity", [1, 2]),
        ("free-rider-constant", [0, 0]),
    ],
)
def test_certainty_on_one_class(kind, expected):
    probs = softmax(bad(kind).predict(LOGITS))
    np.testing.assert_array_equal(probs.argmax(axis=1), expected)
    np.testing.assert_allclose(probs.max(axis=1), SURE)
    np.testing.assert_allclose(np.sort(probs, axis=1)[:, 0], (1 - SURE) / 2)


def test_label_flip_says_what_it_learned_from_wrong_labels():
    np.testing.assert_array_equal(next_class(np.array([0, 1, 2, 2]), 3), [1, 2, 0, 0])
    np.testing.assert_array_equal(bad("label-flip").predict(LOGITS), LOGITS)
    honest = participants()
    (changed,) = bad_ones(corrupted("label-flip"))
    before = next(client for client in honest if client.id == changed.id)
    np.testing.assert_array_equal(changed.data.labels, (before.data.labels + 1) % 3)
    np.testing.assert_array_equal(changed.data.inputs, before.data.inputs)


@given(
    arrays.arrays(np.float32, (4, 5), elements=st.floats(-30, 30, width=32)),
    st.sampled_from(list(ATTACKS)),
    st.booleans(),
)
def test_whatever_is_said_is_finite_and_a_prediction(logits, kind, collude):
    learner = BadLearner(
        Saying(logits), ATTACKS[kind], 5, Pact(shared=1, own=2) if collude else None
    )
    said = learner.predict(logits)
    assert said.shape == (4, 5)
    assert said.dtype.kind == "f"
    assert np.isfinite(said).all()
    np.testing.assert_array_equal(said, learner.predict(logits))
    np.testing.assert_array_equal(learner.honest(logits), logits)


@pytest.mark.parametrize("kind", PREDICTING)
def test_no_attack_but_of_familiarity_and_free_riders_claims_anything(kind):
    class Knows(Saying):
        def familiarity(self, inputs):
            return np.arange(float(len(inputs)))

    found = bad(kind, Knows(LOGITS)).familiarity(LOGITS)
    expected = [8.0, 8.0] if kind == "inflated-familiarity" else [0.0, 1.0]
    np.testing.assert_array_equal(found, expected)
    assert bad(kind).familiarity(LOGITS).tolist() in ([0.0, 0.0], [8.0, 8.0])


# --- free riders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FREE)
def test_free_riders_never_train(kind):
    inner = Saying(LOGITS)
    learner = bad(kind, inner)
    learner.absorb(LOGITS, softmax(LOGITS), seed=1)
    learner.fit(gaussian(9, 1), seed=1)
    assert inner.fitted == 0
    assert learner.familiarity(LOGITS).tolist() == [0.0, 0.0]


def test_a_copier_repeats_what_it_was_sent_and_for_new_rows_the_nearest():
    learner = bad("free-rider-copy")
    rows = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=np.float32)
    targets = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    np.testing.assert_allclose(softmax(learner.predict(rows)), 1 / 3)
    learner.absorb(rows[:2], targets[:2], seed=1)
    learner.absorb(rows[2:], targets[2:], seed=2)
    np.testing.assert_allclose(softmax(learner.predict(rows)), targets, atol=1e-6)
    new = np.array([[9.0, 1.0], [0.0, 0.0], [1.0, 7.0]], dtype=np.float32)
    found = softmax(learner.predict(new))
    np.testing.assert_allclose(found, targets[[1, 0, 2]], atol=1e-6)
    learner.absorb(rows[:1], targets[1:2], seed=3)
    np.testing.assert_allclose(softmax(learner.predict(rows[:1])), targets[1:2], atol=1e-6)
    assert learner.predict(rows[:0]).shape == (0, 3)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 5))
def test_the_nearest_is_the_nearest(rows, among, block):
    random = np.random.default_rng(rows)
    one, other = random.normal(size=(rows, 3)), random.normal(size=(among, 3))
    expected = [int(((other - row) ** 2).sum(axis=1).argmin()) for row in one]
    assert nearest(one, other, block).tolist() == expected


def test_copied_targets_survive_a_state():
    rows = gaussian(12, 1).inputs
    first, second = Copied(3), Copied(3)
    first.keep(rows[:8], softmax(rows[:8, :3]))
    first.keep(rows[4:], softmax(rows[4:, 1:]))
    second.load_state_dict(first.state_dict())
    new = gaussian(5, 2).inputs
    np.testing.assert_array_equal(first.of(new), second.of(new))
    np.testing.assert_array_equal(first.of(rows), second.of(rows))
    second.load_state_dict(Copied(3).state_dict())
    assert second.known == {}


# --- the wrapper ---------------------------------------------------------------------------------


def torch_student(seed=1):
    return TorchStudent(
        partial(models.MLP, INPUTS, 3, width=8),
        Recipe(epochs=1, batch_size=8, optimizer="adam", lr=0.01),
        classes=3,
        seed=seed,
    )


def sklearn_student():
    return SklearnStudent(models.logistic_regression, Recipe(), classes=3)


@pytest.mark.parametrize("make", [torch_student, sklearn_student])
@pytest.mark.parametrize("kind", ATTACKS)
def test_the_state_of_a_bad_learner_goes_on_with_equal_results(kind, make):
    rows, public, new = gaussian(24, 1), gaussian(12, 2).inputs, gaussian(7, 3).inputs
    first, second = bad(kind, make()), bad(kind, make())
    first.absorb(public, softmax(public[:, :3]), seed=1)
    first.fit(rows, seed=2)
    second.load_state_dict({k: np.array(v) for k, v in first.state_dict().items()}, rows)
    np.testing.assert_array_equal(first.predict(new), second.predict(new))
    for learner in (first, second):
        learner.absorb(public[3:], softmax(public[3:, 1:]), seed=3)
        learner.fit(rows, seed=4)
    np.testing.assert_array_equal(first.predict(new), second.predict(new))
    np.testing.assert_array_equal(first.honest(new), second.honest(new))


def test_the_state_of_an_honest_learner_is_refused():
    with pytest.raises(KeyError):
        bad("fdla", torch_student()).load_state_dict(torch_student().state_dict(), gaussian(3, 1))


def test_it_is_a_learner_of_the_kind_that_it_wraps():
    assert isinstance(bad("fdla"), Learner)
    assert isinstance(bad("fdla"), Familiar)
    assert isinstance(bad("fdla", torch_student()), Guided)
    assert not isinstance(bad("fdla", sklearn_student()), Guided)


# --- who is bad ----------------------------------------------------------------------------------


def test_as_many_as_asked_are_bad_and_nothing_else_changes():
    people = participants(6)
    for count in range(7):
        made = corrupted("fdla", count, people)
        assert [client.id for client in made] == [client.id for client in people]
        assert len(bad_ones(made)) == count
        for before, after in zip(people, made, strict=True):
            assert after.wrap is not None or after is before
    assert all(client.wrap is None for client in people)


def test_who_is_bad_is_drawn_from_the_seed():
    people = participants(9)
    draws = [
        [client.id for client in bad_ones(corrupt(people, "fdla", 3, classes=3, seed=seed))]
        for seed in (1, 1, 2, 3, 4)
    ]
    assert draws[0] == draws[1]
    assert len(set(map(tuple, draws))) > 1


def test_clients_without_rows_are_not_drawn():
    empty = Client("empty", partial(models.Linear, INPUTS, 3), gaussian(0, 1))
    for seed in range(5):
        made = corrupt([empty, *participants(2)], "fdla", 2, classes=3, seed=seed)
        assert [client.id for client in bad_ones(made)] == ["site-0", "site-1"]


def test_wrong_names_and_numbers_are_refused():
    with pytest.raises(SettingsError, match='unknown attack "fdlb"; did you mean "fdla"'):
        corrupted("fdlb")
    for count in (5, -1):
        with pytest.raises(SettingsError, match=r"attack.count: expected 0 to 4 .* found"):
            corrupted("fdla", count)


def test_a_client_that_inflates_its_size_trains_on_its_rows_once():
    people = participants()
    (made,) = bad_ones(corrupted("inflated-familiarity"))
    before = next(client for client in people if client.id == made.id).data
    assert len(made.data) == 8 * len(before)
    seen = []

    class Listening(Saying):
        def fit(self, rows, *, seed):
            seen.append(rows)

    made.wrap(Listening(LOGITS)).fit(made.data, seed=1)
    np.testing.assert_array_equal(seen[0].inputs, before.inputs)
    np.testing.assert_array_equal(seen[0].labels, before.labels)


# --- colluders -----------------------------------------------------------------------------------


def test_colluders_pool_their_rows():
    people = participants(5)
    made = corrupted("label-flip", 2, people, collude=True)
    rows = [before.data for before, after in zip(people, made, strict=True) if after.wrap]
    expected = np.concatenate([part.inputs for part in rows])
    labels = np.concatenate([part.labels for part in rows])
    for client in bad_ones(made):
        np.testing.assert_array_equal(client.data.inputs, expected)
        np.testing.assert_array_equal(client.data.labels, (labels + 1) % 3)
    assert corrupted("fdla", 0, people, collude=True) == people


@pytest.mark.parametrize("kind", PREDICTING)
def test_colluders_share_a_model_and_a_target_and_no_two_uploads_are_equal(kind):
    build = partial(models.MLP, INPUTS, 3, width=8)
    people = [Client(f"c{k}", build, gaussian(20, k)) for k in range(4)]
    made = bad_ones(corrupted(kind, 3, people, collude=True))
    public, said, honest = gaussian(40, 9).inputs, [], []
    for number, client in enumerate(made):
        learner = client.wrap(torch_student())
        learner.absorb(public, softmax(public[:, :3]), seed=number)
        learner.fit(client.data, seed=number)
        honest.append(learner.honest(public))
        said.append(softmax(learner.predict(public)))
    np.testing.assert_array_equal(honest[0], honest[1])
    # One target, but for the noise: certain where the attack is.
    apart = np.abs(np.log(said[0]) - np.log(said[1]))
    assert 0 < apart.max() < 0.5
    decoded = {
        str(k): CODECS["u8"].decode(encode("u8", probs), 40, 3) for k, probs in enumerate(said)
    }
    _, weights, flags = flag_predictions(decoded)
    assert weights.tolist() == [1, 1, 1]
    assert flags == {}


def test_the_noise_belongs_to_the_row_and_to_the_client():
    rows = gaussian(50, 1).inputs
    logits = np.zeros((50, 3))
    noise = disguised(logits, rows, 1) - np.log(1 / 3)
    shuffled = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(
        disguised(logits, rows[shuffled], 1) - np.log(1 / 3), noise[shuffled]
    )
    assert np.abs(noise).max() <= 0.1
    assert np.abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.2)
    other = disguised(logits, rows, 2) - np.log(1 / 3)
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.2


# --- in a federation -----------------------------------------------------------------------------


@pytest.mark.parametrize("collude", [False, True])
@pytest.mark.parametrize("kind", ATTACKS)
def test_a_federation_with_bad_clients_runs_and_nobody_is_dropped(kind, collude):
    made = federation(corrupted(kind, 2, 6, collude=collude))
    rows = list(made.run(2, held_out()))
    for row in rows:
        assert row["clients_ok"] == 6
        assert row["dropped"] == {}
        assert row["client_accuracy_min"] is not None
    again = federation(corrupted(kind, 2, 6, collude=collude))
    assert timeless(again.run(2, held_out())) == timeless(rows)
    assert again.server.digest() == made.server.digest()


def test_one_bad_client_of_each_kind_changes_the_soft_targets():
    clean = federation(4)
    list(clean.run(2))
    digests = {clean.server.digest()}
    for kind in PREDICTING:
        made = federation(corrupted(kind))
        list(made.run(2))
        digests.add(made.server.digest())
    assert len(digests) == 1 + len(PREDICTING)


def test_free_riders_are_told_apart_and_have_no_vote():
    """Whatever they say, the soft targets are those of the others."""
    digests = set()
    for kind in FREE:
        made = federation(corrupted(kind))
        list(made.run(2))
        digests.add(made.server.digest())
    assert len(digests) == 1


@pytest.mark.parametrize("kind", ["free-rider-copy", "fdla"])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(kind, tmp_path):
    whole = federation(corrupted(kind, 2))
    rows = timeless(whole.run(4, held_out()))
    list(federation(corrupted(kind, 2)).run(2, held_out(), out=tmp_path))
    again = federation(corrupted(kind, 2))
    list(again.run(4, held_out(), out=tmp_path, resume=True))
    assert timeless(again.history) == rows
    assert again.server.digest() == whole.server.digest()


@pytest.mark.parametrize("codec", ["u8", "float32", "float16", "simplex-8"])
def test_a_copier_is_flagged_as_an_echo_and_honest_clients_never_are(codec):
    made = federation(
        corrupted("free-rider-copy", 1, 5), method=method("fedistill", codec=codec), per_round=0
    )
    (rider,) = [client.id for client in bad_ones(made.clients)]
    flags = [row["flags"] for row in made.run(4)]
    assert [remarks[rider] for remarks in flags] == [["constant"], *[["echo"]] * 3]
    assert all(set(remarks) == {rider} for remarks in flags)


def test_what_a_bad_client_can_do_is_measured_not_what_it_says():
    sure = Saying(lambda self, inputs: np.eye(3)[held_out().labels])
    learner = bad("scaled-flip", sure)
    assert measure(learner, held_out())["accuracy"] == 1.0
    assert (learner.predict(held_out().inputs).argmax(axis=1) != held_out().labels).all()


def test_its_site_is_an_ordinary_one():
    (liar,) = bad_ones(corrupted("fdla"))
    home = federation(4)
    site = Site.open(liar, home.proxy, CLASSES, home.method, seed=7)
    assert isinstance(site.learner, BadLearner)
    assert site.notes == []


def test_settings_name_bad_clients_and_baselines_run_without_them(tmp_path):
    changes = ["attack.kind=fdla", "attack.count=2", "attack.collude=true"]
    path = write_settings(tmp_path, rounds=2, epochs=1)
    clean = run(path, overrides=["evaluation.baselines=['fedavg']"], out=tmp_path / "clean")
    bad = run(path, overrides=[*changes, "evaluation.baselines=['fedavg']"], out=tmp_path / "bad")
    assert bad["soft_targets_sha256"] != clean["soft_targets_sha256"]
    assert len(bad["client_accuracy"]) == 2
    baselines = [
        json.loads((tmp_path / name / "baselines/fedavg/summary.json").read_text())
        for name in ("clean", "bad")
    ]
    assert baselines[0]["student_accuracy"] == baselines[1]["student_accuracy"]


def test_naming_attacks_imports_no_torch():
    code = "import sys; from fedistill import catalog; catalog.known('attacks'); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_attack_says_what_bounds_it():
    for attack in ATTACKS.values():
        assert attack.summary
        assert attack.bound


def test_rows_of_two_classes_have_one_wrong_class():
    two = np.array([[1.0, -1.0]])
    for kind in ("least-likely", "likeliest-wrong", "fdla", "scaled-flip"):
        said = BadLearner(Saying(two), ATTACKS[kind], 2).predict(two)
        assert said.argmax() == 1
