"""A recommender that is kept current."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedistill.data.interactions import Block, Interactions, no_interactions
from fedistill.errors import CheckpointError, DataError, FedistillError
from fedistill.losses import logit_kl
from fedistill.recommend import STRATEGIES, Recommender, Strategy, Training, with_strategy
from fedistill.recommend.seen import Numbering, Seen, Shelves
from fedistill.recommend.training import by_user, draw_items

QUICK = Training(
    steps=40, update_steps=25, lr=0.1, update_lr=0.1, penalty=0.02, smooth=1.0, history=5
)
TASTES = 3
MODELS = ["mf", "mf/gradient", "two-tower", "sequential"]


def block(users, seed=0, per_user=8, items=60, start=0):
    """Users who choose items of their own taste: users and items of one number modulo three."""
    random = np.random.default_rng(seed)
    who = np.repeat(np.asarray(users), per_user)
    what = random.integers(0, items // TASTES, len(who)) * TASTES + who % TASTES + start
    order = random.permutation(len(who))
    return Block(Interactions(who[order], what[order], np.arange(len(who))), no_interactions())


STREAM = [block(range(30)), block(range(15, 45), seed=1), block(range(10, 50), seed=2, items=66)]


def student(model="mf", strategy="fedistill", seed=0, **given):
    """``mf/gradient`` is the factorisation that learns by steps."""
    model, _, solver = model.partition("/")
    training = replace(QUICK, solver=solver or "spectral")
    return Recommender(model, strategy, width=8, training=training, seed=seed, **given)


def bytes_of(recommender):
    return {name: value.tobytes() for name, value in recommender.state_dict().items()}


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_it_learns_tastes_and_is_tested_first(model):
    recommender = student(model)
    reports = [recommender.learn(one) for one in STREAM]
    assert reports[0].tested is None
    assert (reports[0].step, reports[0].new_users) == (0, 30)
    tested = reports[1].tested
    assert (len(tested.users), tested.new_users, tested.unseen) == (15, 15, 0)
    assert reports[1].new_users == 15
    assert tested.values.mean() == pytest.approx(tested.ndcg)
    assert reports[2].tested.recall > 0.45  # 20 of 60 items: a third by chance
    top = recommender.recommend(range(50), 5)
    assert (top % TASTES == np.arange(50)[:, None] % TASTES).mean() > 0.8


def test_a_sketch_goes_on_to_where_training_from_scratch_leads():
    """With a sketch that cuts nothing off, being kept current equals full retraining."""
    kept, oracle = student(), student(strategy="retrain")
    for one in STREAM:
        kept.learn(one)
        oracle.learn(one)
    everybody = range(50)
    np.testing.assert_allclose(
        kept.predict(everybody), oracle.predict(everybody), atol=0.02, rtol=0.02
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_the_stream(strategy):
    recommender = student(strategy=strategy)
    reports = [recommender.learn(one) for one in STREAM]
    assert np.isfinite([report.loss for report in reports]).all()
    stored = int(STRATEGIES[strategy].replay * sum(len(one.train) for one in STREAM))
    assert len(recommender.state_dict()["buffer.rows.labels"] if stored else []) <= stored
    if strategy == "none":
        assert reports[2].tested.unseen == 15
        assert np.isnan(recommender.predict([44])).all()
    else:
        assert reports[2].tested.unseen == 0


def test_the_oracle_is_a_student_that_never_saw_the_blocks_apart():
    apart, whole = student(strategy="retrain"), student(strategy="retrain")
    for one in STREAM[:2]:
        apart.learn(one, test=False)
    both = [one.train for one in STREAM[:2]]
    columns = (np.concatenate([getattr(b, n) for b in both]) for n in ("users", "items", "times"))
    whole.learn(Interactions(*columns), test=False)
    np.testing.assert_allclose(
        apart.predict(range(45)), whole.predict(range(45)), atol=0.02, rtol=0.02
    )
    assert apart.items.tolist() == whole.items.tolist()


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others():
    runs = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator is nobody's business
        recommender = student(seed=seed)
        for one in STREAM[:2]:
            recommender.learn(one)
        runs.append(bytes_of(recommender))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    student().learn(STREAM[0])
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", ["fedistill", "er"])
def test_resuming_gives_the_same_bytes(model, strategy):
    straight, first = student(model, strategy), student(model, strategy)
    for one in STREAM[:2]:
        straight.learn(one)
        first.learn(one)
    resumed = student(model, strategy, seed=9)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    straight.learn(STREAM[2])
    resumed.learn(STREAM[2])
    assert bytes_of(resumed) == bytes_of(straight)


def test_testing_changes_nothing():
    one, other = student(), student()
    for each in STREAM[:2]:
        one.learn(each)
        other.learn(each, test=False)
    one.recommend(range(5))
    assert bytes_of(one) == bytes_of(other)


def test_a_teacher_for_everybody_holds_what_a_fine_tuned_student_forgets():
    """Users of the first block are away in the second: their scores should stay."""
    first, second = block(range(30)), block(range(30, 60), seed=1)
    start = student("mf/gradient")
    start.learn(first)
    before = start.predict(range(30), start.items)
    moved = {}
    for strategy in ("fine-tune", "fedistill"):
        recommender = with_strategy(start, strategy)
        recommender.learn(second)
        after = recommender.predict(range(30), start.items)
        moved[strategy] = float(logit_kl(torch.from_numpy(after), torch.from_numpy(before)))
    assert moved["fedistill"] < moved["fine-tune"] / 2


@pytest.mark.parametrize("solver", ["spectral", "gradient"])
def test_older_choices_may_fade(solver):
    """The user turned to another taste in the second block."""
    old = block([0, 3, 6, 9])
    new = Interactions(old.train.users, old.train.items + 1, old.train.times)
    likes = []
    for fade in (1.0, 0.1):
        training = Training(steps=60, lr=0.1, penalty=0.02, fade=fade, solver=solver)
        recommender = Recommender(strategy="retrain", width=8, training=training)
        recommender.learn(old)
        recommender.learn(new)
        scores = recommender.predict([0])[0]
        likes.append(scores[recommender.items % 3 == 1].mean() - scores.mean())
    assert likes[1] > likes[0]


# --- edges ---------------------------------------------------------------------------------------


def test_empty_and_one_row_blocks():
    recommender = student()
    empty = recommender.learn(no_interactions())
    assert (empty.choices, empty.tested) == (0, None)
    assert recommender.learn(Interactions([7], [3], [0])).new_items == 1
    report = recommender.learn(Interactions([7], [4], [0]))
    assert (report.choices, len(report.tested.users)) == (1, 1)
    assert recommender.learn(no_interactions()).tested.ndcg == 0
    assert recommender.recommend([7], 3).tolist() == [[-1, -1, -1]]  # all is chosen
    assert recommender.recommend([8], 1).tolist() in ([[3]], [[4]])


def test_an_item_beyond_the_catalogue_is_told_and_nothing_is_lost():
    recommender = student(catalogue=70)
    recommender.learn(STREAM[0])
    before = bytes_of(recommender)
    with pytest.raises(DataError, match="items below 70, the catalogue, found item 99"):
        recommender.learn(Interactions([1, 2], [5, 99], [0, 1]))
    assert bytes_of(recommender) == before
    recommender.learn(STREAM[1])


def test_before_anything_is_learned_nobody_is_known():
    recommender = student()
    assert recommender.recommend([0, 1], 2).tolist() == [[-1, -1], [-1, -1]]
    assert recommender.predict([0]).shape == (1, 0)


def test_scores_are_asked_for_by_id():
    recommender = student()
    recommender.learn(block(range(30), start=100))
    scores = recommender.predict([4, 999], [106, 101])
    assert np.isnan(scores[1]).all()
    whole = recommender.predict([4])[0]
    np.testing.assert_allclose(
        scores[0], [whole[recommender.items == i][0] for i in (106, 101)], rtol=1e-5
    )
    with pytest.raises(DataError, match="items that were learned, found item 3"):
        recommender.predict([4], [106, 3])


def test_what_was_chosen_is_not_recommended():
    recommender = student()
    recommender.learn(STREAM[0])
    top = recommender.recommend(range(30), 20)
    for user in range(30):
        chosen = STREAM[0].train.items[STREAM[0].train.users == user]
        assert not set(top[user]) & set(chosen)
    strangers = recommender.recommend([77], 3)[0]
    counts = np.bincount(STREAM[0].train.items)
    assert counts[strangers].tolist() == sorted(counts, reverse=True)[:3]


def test_ranking_in_small_pieces_is_the_same(monkeypatch):
    recommender = student()
    recommender.learn(STREAM[0])
    wanted = recommender.recommend(range(30))
    monkeypatch.setattr("fedistill.recommend.ranker.SCORES", 100)
    assert (recommender.recommend(range(30)) == wanted).all()


def test_unknown_names_are_told():
    with pytest.raises(FedistillError, match='unknown recommender "mff"; did you mean "mf"'):
        Recommender("mff")
    with pytest.raises(FedistillError, match='unknown strategy "lfw"; did you mean "lwf"'):
        Recommender(strategy="lfw")
    with pytest.raises(FedistillError, match="expected teacher of none, current, everybody"):
        Strategy(summary="", teacher="all")
    with pytest.raises(FedistillError, match="replay as a share"):
        Strategy(summary="", replay=2)
    with pytest.raises(FedistillError, match='a weight from 0 or "share"'):
        Strategy(summary="", teacher_weight="much")
    for wrong in ({"steps": -1}, {"lr": 0.0}, {"penalty": -1.0}, {"fade": 0.0}, {"solver": "x"}):
        with pytest.raises(FedistillError, match="training: expected"):
            Training(**wrong)


# --- who leaves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mf", "mf/gradient", "two-tower"])
def test_an_erased_user_leaves_and_is_not_let_in_again(model):
    recommender = student(model, Strategy(summary="", replay=0.5))
    recommender.learn(STREAM[0])
    old = copy.deepcopy(recommender.state_dict())
    receipt = recommender.erase(4)
    assert receipt.tombstone.rows > 0
    assert np.isnan(recommender.predict([4])).all()
    state = recommender.state_dict()
    row = int(np.flatnonzero(state["users"] == 4)[0])
    assert row not in state["seen.users"]
    assert (state["model.users"][row] == 0).all()
    report = recommender.learn(STREAM[0])
    assert report.choices == len(STREAM[0].train) - 8
    assert np.isnan(recommender.predict([4])).all()
    recommender.load_state_dict(old)  # a file from before brings nobody back
    assert np.isnan(recommender.predict([4])).all()
    assert row not in recommender.state_dict()["seen.users"]


def test_a_state_of_another_model_is_refused_and_nothing_is_lost():
    recommender, other = student(), student("two-tower")
    recommender.learn(STREAM[0])
    other.learn(STREAM[0])
    before = bytes_of(recommender)
    with pytest.raises(CheckpointError, match="the saved recommender cannot be read"):
        recommender.load_state_dict(other.state_dict())
    damaged = recommender.state_dict()
    damaged.pop("users")
    with pytest.raises(CheckpointError):
        recommender.load_state_dict(damaged)
    assert bytes_of(recommender) == before


# --- books ---------------------------------------------------------------------------------------


def test_ids_get_rows_in_order_of_appearance():
    numbering = Numbering()
    assert numbering.add([9, 4, 9]) == 2
    assert numbering.add([4, 1]) == 1
    assert numbering.ids.tolist() == [9, 4, 1]
    assert numbering.rows([1, 9, 7]).tolist() == [2, 0, -1]
    assert Numbering().rows([3]).tolist() == [-1]


def test_shelves_know_who_chose_what_and_when():
    none = np.empty(0, dtype=np.int64)
    seen = Seen(none, none, none).plus(np.array([1, 0, 1, 1]), np.array([5, 6, 7, 8]), 0)
    shelves = Shelves(seen, 3)
    owner, items = shelves.of(np.array([1, 2, 0]))
    assert (owner.tolist(), items.tolist()) == ([0, 0, 0, 2], [5, 7, 8, 6])
    assert shelves.history(np.array([0, 1]), 2).tolist() == [[0, 7], [8, 9]]
    assert shelves.before(2).tolist() == [[0, 0], [0, 0], [0, 6], [6, 8]]


def test_choices_of_a_user_lie_together():
    choices = by_user(np.array([4, 2, 4]), np.array([7, 8, 9]), np.array([1.0, 2.0, 3.0]))
    assert choices.users.tolist() == [2, 4]
    assert choices.owners.tolist() == [0, 1, 1]
    assert choices.items.tolist() == [8, 7, 9]
    assert choices.weights.tolist() == [2, 1, 3]


def test_drawn_items_stand_for_the_catalogue():
    """The sum over drawn items, each by its chance, is on average the sum over all."""
    counts = np.arange(50.0)
    values = np.random.default_rng(0).random(50)
    random = np.random.default_rng(1)
    sums = []
    for _ in range(300):
        drawn, log_q = draw_items(counts, 20, random)
        sums.append((values[drawn] / log_q.exp().numpy()).sum())
    assert np.mean(sums) == pytest.approx(values.sum(), rel=0.05)
    whole, none = draw_items(counts, 50, random)
    assert (whole.tolist(), none) == (list(range(50)), None)
