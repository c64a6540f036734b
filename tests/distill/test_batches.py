"""What a step sees: which rows, how often, and with which weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.distill.batches import Batch, Memory, local_batches, mix, passes, soft_batches
from fedistill.distill.recipe import Recipe
from fedistill.losses import own_or_proxy, soft_cross_entropy


def own(rows, classes=3):
    """Rows that carry their number."""
    labels = torch.arange(rows) % classes
    return torch.arange(rows, dtype=torch.float32)[:, None], torch.eye(classes)[labels]


def memory(rows=12, classes=3, weights=None, first=1000.0):
    targets = torch.rand(rows, classes, generator=torch.Generator().manual_seed(1)).softmax(1)
    inputs = first + torch.arange(rows, dtype=torch.float32)[:, None]
    return Memory(inputs, targets, np.ones(rows) if weights is None else np.asarray(weights))


# --- passes --------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_row_comes_once_in_every_epoch(rows, size, epochs, seed):
    batches = list(passes(rows, size, epochs, seed, "own"))
    seen = Counter(row for batch in batches for row in batch.tolist())
    assert seen == (Counter(dict.fromkeys(range(rows), epochs)) if epochs else Counter())
    assert all(len(batch) <= size + 1 for batch in batches)
    if size > 1:
        assert all(len(batch) > 1 for batch in batches) or rows == 1


def test_a_last_batch_of_one_joins_the_one_before():
    assert [len(batch) for batch in passes(9, 4, 1, 0, "own")] == [4, 5]
    assert [len(batch) for batch in passes(10, 4, 1, 0, "own")] == [4, 4, 2]
    assert [len(batch) for batch in passes(1, 4, 1, 0, "own")] == [1]


def test_order_is_shuffled_reproducible_and_another_in_each_epoch():
    first, again, other = (
        [batch.tolist() for batch in passes(20, 20, 2, seed, "own")] for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert first[0] != first[1]
    assert first[0] != sorted(first[0])


# --- local steps ---------------------------------------------------------------------------------


def batches_of(rows, stored=None, background=None, seed=5, **recipe):
    return list(local_batches(*own(rows), stored, background, Recipe(**recipe), seed))


def test_own_rows_come_once_in_an_epoch_whatever_joins_them():
    plain = batches_of(20, epochs=2, batch_size=6)
    joined = batches_of(
        20, memory(), memory(5, first=500).inputs, epochs=2, batch_size=6, mixup=1.0
    )
    for batches in (plain, joined):
        seen = Counter(int(row) for batch in batches for row in batch.inputs[: batch.own, 0])
        assert seen == Counter(dict.fromkeys(range(20), 2))


def test_soft_targets_get_their_passes_however_few_the_own_rows_are():
    batches = batches_of(4, memory(64), epochs=1, batch_size=8, distil_epochs=3)
    soft = sum(len(batch) - batch.own for batch in batches)
    assert soft >= 3 * 64
    counts = Counter(int(row) for batch in batches for row in batch.inputs[: batch.own, 0])
    assert set(counts) == set(range(4))
    assert max(counts.values()) - min(counts.values()) == 0


def test_faded_targets_ask_for_fewer_passes_and_are_drawn_less():
    weights = np.repeat([1.0, 0.25], 40)
    batches = batches_of(8, memory(80, weights=weights), epochs=1, batch_size=8, distil_epochs=4)
    assert len(batches) == 4 * 50 / 8
    drawn = torch.cat([batch.inputs[batch.own :, 0] for batch in batches]).numpy() - 1000
    fresh = (drawn < 40).mean()
    assert 0.7 < fresh < 0.9, "expected 0.8 of the draws to be fresh"


def test_the_parts_of_a_step_weigh_one_each():
    (batch,) = batches_of(
        6,
        memory(),
        memory().inputs,
        epochs=1,
        batch_size=6,
        mixup=1.0,
        soft_weight=0.5,
        distil_epochs=1,
        temperature=2.0,
    )[:1]
    assert len(batch) == 18
    assert batch.own == 6
    sums = [float(batch.weight[part].sum()) for part in (slice(6), slice(6, 12), slice(12, 18))]
    assert sums == pytest.approx([1.0, 0.5 * 4, 0.5 * 4])
    sides = [float(batch.familiar[part].sum()) for part in (slice(6), slice(6, 12), slice(12, 18))]
    assert sides == pytest.approx([1.0, -1.0, 0.0])


def test_soft_weight_zero_leaves_the_labels_alone():
    (batch,) = batches_of(6, memory(), epochs=1, batch_size=6, soft_weight=0.0, distil_epochs=1)[:1]
    assert (batch.weight[batch.own :] == 0).all()
    logits = torch.randn(len(batch), 3, generator=torch.Generator().manual_seed(0))
    soft = soft_cross_entropy(logits, batch.targets, batch.weight)
    hard = torch.nn.functional.cross_entropy(logits[:6], batch.targets[:6])
    torch.testing.assert_close(soft, hard)


def test_before_there_are_targets_proxy_rows_only_teach_familiarity():
    (batch,) = batches_of(6, None, memory().inputs, epochs=1, batch_size=6)
    assert (batch.weight[6:] == 0).all()
    assert float(batch.familiar[6:].sum()) == pytest.approx(-1.0)
    assert (batch.inputs[6:] >= 1000).all()


def test_equal_seeds_draw_equal_batches_and_others_do_not():
    def told(seed):
        return torch.cat([b.inputs for b in batches_of(9, memory(), seed=seed, mixup=1.0)])

    torch.testing.assert_close(told(1), told(1), rtol=0, atol=0)
    assert not torch.equal(told(1), told(2))


# --- phases --------------------------------------------------------------------------------------


def test_a_phase_visits_every_target_once_in_an_epoch():
    batches = list(soft_batches(memory(13), Recipe(batch_size=4, distil_epochs=3), seed=1))
    seen = Counter(int(row) - 1000 for batch in batches for row in batch.inputs[:, 0])
    assert seen == Counter(dict.fromkeys(range(13), 3))
    assert all(float(batch.weight.sum()) == pytest.approx(1) for batch in batches)


def test_a_phase_on_faded_targets_is_as_long_and_favours_the_fresh():
    stored = memory(100, weights=np.repeat([1.0, 0.1], 50))
    batches = list(soft_batches(stored, Recipe(batch_size=10, distil_epochs=5), seed=1))
    assert len(batches) == 50
    drawn = torch.cat([batch.inputs[:, 0] for batch in batches]) - 1000
    assert float((drawn < 50).float().mean()) > 0.8


def test_a_phase_without_targets_has_no_steps():
    assert list(soft_batches(memory(0), Recipe(), seed=1)) == []


# --- mixtures ------------------------------------------------------------------------------------


def test_mixtures_lie_between_their_rows_and_stay_probabilities():
    stored = memory(10)
    random = np.random.default_rng(0)
    inputs, targets = mix(stored.inputs, stored.targets, 50, 1.0, random)
    assert inputs.shape == (50, 1)
    assert float(inputs.min()) >= 1000
    assert float(inputs.max()) <= 1009
    torch.testing.assert_close(targets.sum(1), torch.ones(50))


def test_inputs_and_targets_are_mixed_alike():
    rows = torch.eye(4)
    inputs, targets = mix(rows, rows, 30, 0.5, np.random.default_rng(3))
    torch.testing.assert_close(inputs, targets)
    assert (inputs.max(dim=1).values >= 0.5).all()


def test_the_larger_share_goes_to_the_first_row_of_a_pair():
    first, _ = np.random.default_rng(3).integers(0, 4, (2, 30))
    inputs, _ = mix(torch.eye(4), torch.eye(4), 30, 0.5, np.random.default_rng(3))
    assert (inputs[np.arange(30), first] >= 0.5).all()


def test_images_mix_too():
    images = torch.rand(5, 1, 4, 4)
    inputs, _ = mix(images, torch.eye(5), 7, 1.0, np.random.default_rng(0))
    assert inputs.shape == (7, 1, 4, 4)


# --- cutting -------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_gradient_in_parts_is_the_gradient_of_the_whole(size, seed):
    (batch,) = batches_of(
        7,
        memory(),
        memory().inputs,
        epochs=1,
        batch_size=7,
        mixup=1.0,
        seed=seed,
        distil_epochs=1,
    )[:1]
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def grad(parts: list[Batch]):
        weight = start.clone().requires_grad_()
        for part in parts:
            features = torch.cat([part.inputs / 1000, torch.ones_like(part.inputs)], 1).double()
            out = features.repeat(1, 2)[:, :3] @ weight
            loss = soft_cross_entropy(out[:, :3], part.targets.double(), part.weight.double())
            (loss + own_or_proxy(out[:, 3], part.familiar.double())).backward()
        return weight.grad

    cut = [batch.cut(k, k + size) for k in range(0, len(batch), size)]
    assert sum(part.own for part in cut) == batch.own
    torch.testing.assert_close(grad(cut), grad([batch]))


def test_cut_counts_the_own_rows_of_each_part():
    whole = Batch(torch.zeros(10, 1), torch.zeros(10, 3), torch.ones(10), torch.ones(10), own=4)
    assert [whole.cut(k, k + 3).own for k in (0, 3, 6, 9)] == [3, 1, 0, 0]
