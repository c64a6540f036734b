"""Two towers, and how they grow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedistill import models
from fedistill.catalog import MODELS
from fedistill.distill.torch_student import seeded
from fedistill.errors import FedistillError, SettingsError
from fedistill.recommend import MatrixFactorisation, SequentialRecommender, TwoTower, scores_of
from fedistill.recommend.neighbours import neighbour_vectors

HISTORY = torch.tensor([[0, 0, 1], [2, 3, 4], [0, 4, 4]])
USERS = torch.arange(3)


def build(kind, seed=0):
    with seeded(seed):
        model = kind(3, 4, 8) if kind is not SequentialRecommender else kind(4, 8)
    for weight in model.parameters():
        weight.data += 0.1
    return model


def pairwise(model, users=3, items=4):
    """Scores pair by pair: a product of matrices may be summed in another order when wider."""
    vectors = model.user_vectors(USERS[:users], HISTORY[:users])
    return (vectors[:, None] * model.item_vectors()[None, :items]).sum(-1) + (
        model.item_biases()[:items]
    )


@pytest.mark.parametrize("kind", [MatrixFactorisation, TwoTower, SequentialRecommender])
def test_growing_changes_no_old_score_by_a_bit(kind):
    model = build(kind)
    before = pairwise(model).detach()
    model.grow(2, 3)
    assert model.item_vectors().shape == (7, 8)
    assert model.item_biases().shape == (7,)
    assert torch.equal(pairwise(model), before)
    grown = model.item_vectors().detach().clone()
    model.grow(torch.ones(1, 8), torch.full((1, 8), 2.0))
    assert torch.equal(model.item_vectors()[:7], grown)
    assert (model.item_vectors()[7] == 2).all()
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("kind", [MatrixFactorisation, TwoTower, SequentialRecommender])
def test_new_items_are_as_rare_as_the_rarest(kind):
    model = build(kind)
    model.bias.data = torch.tensor([0.5, -2.0, 1.0, 0.0])
    model.grow(0, 1)
    assert float(model.item_biases()[-1].detach()) == -2


def test_grow_takes_one_vector_for_each():
    with pytest.raises(FedistillError, match=r"vectors \[new, 8\], found \[2, 5\]"):
        build(MatrixFactorisation).grow(0, torch.zeros(2, 5))


@pytest.mark.parametrize("kind", [MatrixFactorisation, TwoTower])
def test_scores_are_products_of_towers(kind):
    model = build(kind)
    scores = model(USERS, HISTORY)
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores, pairwise(model))
    some = scores_of(model, USERS[:2], HISTORY[:2], torch.tensor([3, 1]))
    torch.testing.assert_close(some, scores[:2, [3, 1]])


def test_a_two_tower_user_without_history_is_its_own_vector():
    model = build(TwoTower)
    with torch.no_grad():
        nothing = model.user_vectors(USERS, torch.zeros(3, 5, dtype=torch.long))
        torch.testing.assert_close(nothing, model.users)
        torch.testing.assert_close(model.user_vectors(USERS), model.users)


def test_a_sequential_recommender_is_a_classifier_of_clicks():
    model = build(SequentialRecommender)
    logits = model(HISTORY.float())
    assert logits.shape == (3, 4)
    assert not torch.equal(model(HISTORY.flip(1).float())[1], logits[1])  # order counts
    empty = model(torch.zeros(2, 3))
    torch.testing.assert_close(empty[0], model.bias)
    assert model(torch.zeros(0, 3)).shape == (0, 4)
    with pytest.raises(FedistillError, match="needs histories"):
        model.user_vectors(USERS)


def test_settings_can_name_it():
    assert "sequential" in MODELS
    built = models.factory("sequential", (20,), 50, width=16)()
    assert built(torch.ones(2, 20)).shape == (2, 50)
    with pytest.raises(SettingsError, match="the last clicks of a session"):
        models.factory("sequential", (1, 8, 8), 50)


def test_a_longer_table_begins_with_the_rows_of_a_shorter_one():
    tables = []
    for users in (3, 9):
        with seeded(4):
            tables.append(MatrixFactorisation(users, 0, 8).users.detach())
    assert torch.equal(tables[0], tables[1][:3])


# --- neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [0, 1, 2, 5])
def test_a_new_user_begins_among_those_who_chose_the_same(neighbours):
    """CCD's slice took all old users when their number was the bound; here any number works."""
    with seeded(0):
        model = MatrixFactorisation(6, 3, 4)
    users = np.array([*range(neighbours), 6, 6])
    items = np.array([*[0] * neighbours, 0, 2])
    fresh, none = neighbour_vectors(model, users, items, (6, 3), (1, 0))
    wanted = model.users[:neighbours] if neighbours else model.users
    torch.testing.assert_close(fresh[0], wanted.mean(0).detach())
    assert none.shape == (0, 4)


def test_a_new_item_begins_among_what_its_users_chose():
    with seeded(0):
        model = MatrixFactorisation(2, 4, 4)
    users, items = np.array([0, 0, 1, 1, 1]), np.array([1, 4, 2, 3, 4])
    _, fresh = neighbour_vectors(model, users, items, (2, 4), (0, 1))
    wanted = (model.items[1] + model.items[2:4].mean(0)) / 2
    torch.testing.assert_close(fresh[0], wanted.detach())
