"""The sketch of who chose what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedistill.distill.torch_student import seeded
from fedistill.recommend.spectral import sketched


def choices(n=400, users=20, items=30, seed=0):
    random = np.random.default_rng(seed)
    who = random.integers(0, users, n)
    return who, (random.integers(0, items // 2, n) * 2 + who % 2), np.ones(n)


def sketch(*given, **more):
    with seeded(1):
        return sketched(*given, **more)


def products(found):
    return (found.users @ found.items.T).numpy()


def dense(who, what, weights, sizes, smooth):
    """The same by hand, with the whole matrix."""
    table = np.zeros(sizes)
    np.add.at(table, (who, what), weights)
    own, theirs, total = table.sum(1), table.sum(0), table.sum()
    excess = table - np.outer(own, theirs) / total
    return excess * total / np.outer(own + smooth, theirs + smooth)


def test_a_whole_sketch_is_how_much_more_often_than_by_chance():
    who, what, weights = choices()
    found = sketch(who, what, weights, (20, 30), 20, smooth=3.0)
    np.testing.assert_allclose(products(found), dense(who, what, weights, (20, 30), 3.0), atol=1e-3)


def test_a_cut_sketch_is_the_best_of_its_rank():
    who, what, weights = choices()
    smooth = 3.0
    own, theirs = np.bincount(who) + smooth, np.bincount(what) + smooth
    scale = np.sqrt(np.outer(own, theirs))
    whole = dense(who, what, weights, (20, 30), smooth) * scale
    left, values, right = np.linalg.svd(whole)
    best = (left[:, :4] * values[:4]) @ right[:4]
    found = sketch(who, what, weights, (20, 30), 4, smooth=smooth)
    np.testing.assert_allclose(products(found) * scale, best, atol=0.02 * np.abs(best).max())


@pytest.mark.parametrize("fade", [1.0, 0.3])
def test_going_on_from_a_whole_sketch_equals_beginning_anew(fade):
    """New users and items among them; older choices fade alike."""
    who, what, weights = choices()
    more, other, ones = choices(200, users=25, items=36, seed=1)
    old = sketch(who, what, weights, (20, 30), 30)
    kept = sketch(more, other, ones, (25, 36), 30, old=old, fade=fade)
    both = np.concatenate([who, more]), np.concatenate([what, other])
    anew = sketch(*both, np.concatenate([fade * weights, ones]), (25, 36), 30)
    np.testing.assert_allclose(products(kept), products(anew), atol=2e-3)
    torch.testing.assert_close(kept.user_counts, anew.user_counts)
    torch.testing.assert_close(kept.item_counts, anew.item_counts)


def test_more_numbers_than_there_are_directions_are_zero():
    found = sketch(np.array([0, 1]), np.array([0, 1]), np.ones(2), (2, 3), 6)
    assert found.users.shape == (2, 6)
    assert found.items.shape == (3, 6)
    assert (found.users[:, 2:] == 0).all()
    assert found.items.isfinite().all()


def test_one_choice_is_enough():
    found = sketch(np.array([0]), np.array([0]), np.ones(1), (1, 1), 2)
    assert found.users.isfinite().all()
