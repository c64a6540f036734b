"""FedProto's loss: features against the prototypes of their classes."""

from __future__ import annotations

import pytest
import torch

from fedistill.errors import FedistillError
from fedistill.losses import prototype_loss

LABELS = torch.tensor([0, 2, 1, 0])
PRESENT = torch.tensor([True, False, True])


def sides(rows=4, width=5, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, generator=random, dtype=dtype)
    return features, torch.randn(3, width, generator=random, dtype=dtype)


def test_by_hand():
    features = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]])
    prototypes = torch.tensor([[3.0, 2.0], [torch.nan, torch.nan], [0.0, 1.0]])
    # Row 0: (4 + 0), row 1: (0 + 1); the class of row 2 is absent.
    found = prototype_loss(features, torch.tensor([0, 2, 1]), prototypes, PRESENT)
    assert found == (4 + 1) / 4


def test_a_class_that_nobody_sent_does_not_count_in_the_mean():
    """P20: the published code gives the row its own features as target, a zero that counts."""
    features, prototypes = sides()
    alone = prototype_loss(features[[0, 1, 3]], LABELS[[0, 1, 3]], prototypes, PRESENT)
    torch.testing.assert_close(prototype_loss(features, LABELS, prototypes, PRESENT), alone)


def test_absent_prototypes_may_hold_anything_and_their_rows_get_no_gradient():
    features, prototypes = sides()
    features.requires_grad_()
    prototypes[1] = torch.nan
    prototype_loss(features, LABELS, prototypes, PRESENT).backward()
    assert features.grad.isfinite().all()
    assert (features.grad[2] == 0).all()
    assert features.grad[[0, 1, 3]].abs().min() > 0


@pytest.mark.parametrize("rows", [0, 4])
def test_without_any_class_it_is_zero_with_its_graph(rows):
    features, prototypes = sides(rows)
    features.requires_grad_()
    value = prototype_loss(features, LABELS[:rows], prototypes, torch.zeros(3, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert (features.grad == 0).all()


def test_one_hot_labels_are_labels():
    features, prototypes = sides()
    one_hot = torch.nn.functional.one_hot(LABELS, 3).float()
    torch.testing.assert_close(
        prototype_loss(features, one_hot, prototypes, PRESENT),
        prototype_loss(features, LABELS, prototypes, PRESENT),
    )


def test_zero_and_minimal_at_the_prototypes_and_no_gradient_into_them():
    _, prototypes = sides()
    features = prototypes[LABELS].clone().requires_grad_()
    prototypes.requires_grad_()
    value = prototype_loss(features, LABELS, prototypes, PRESENT)
    assert value == 0
    value.backward()
    assert (features.grad == 0).all()
    assert prototypes.grad is None


def test_a_batch_is_the_mean_of_its_parts_weighted_by_the_rows_that_count():
    features, prototypes = sides()
    counts = [2, 1]  # of rows 0, 1 and of rows 2, 3
    parts = [
        prototype_loss(features[part], LABELS[part], prototypes, PRESENT)
        for part in (slice(0, 2), slice(2, 4))
    ]
    whole = sum(c * p for c, p in zip(counts, parts, strict=True)) / 3
    torch.testing.assert_close(prototype_loss(features, LABELS, prototypes, PRESENT), whole)


def test_relabelling_the_classes_changes_nothing():
    features, prototypes = sides()
    order = torch.tensor([2, 0, 1])
    renamed = prototype_loss(features, order.argsort()[LABELS], prototypes[order], PRESENT[order])
    torch.testing.assert_close(renamed, prototype_loss(features, LABELS, prototypes, PRESENT))


def test_the_weight_means_the_same_at_any_width():
    features, prototypes = sides()
    wider = prototype_loss(features.repeat(1, 8), LABELS, prototypes.repeat(1, 8), PRESENT)
    torch.testing.assert_close(wider, prototype_loss(features, LABELS, prototypes, PRESENT))


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_at_extreme_features(scale):
    features, prototypes = (scale * side.sign() for side in sides(dtype=torch.float32))
    features.requires_grad_()
    value = prototype_loss(features, LABELS, prototypes, PRESENT)
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    features, prototypes = (side.bfloat16() for side in sides())
    value = prototype_loss(features, LABELS, prototypes, PRESENT)
    assert value.dtype == torch.float32
    wide = prototype_loss(features.float(), LABELS, prototypes.float(), PRESENT)
    torch.testing.assert_close(value, wide)


def test_gradcheck():
    features, prototypes = sides()
    features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: prototype_loss(h, LABELS, prototypes, PRESENT), (features,)
    )


@pytest.mark.parametrize(
    ("features", "labels", "prototypes", "present"),
    [
        (torch.zeros(4, 5), LABELS, torch.zeros(3, 6), PRESENT),
        (torch.zeros(4, 5), LABELS[:3], torch.zeros(3, 5), PRESENT),
        (torch.zeros(4, 5), LABELS, torch.zeros(3, 5), PRESENT[:2]),
        (torch.zeros(4, 5, 1), LABELS, torch.zeros(3, 5), PRESENT),
    ],
)
def test_sides_that_do_not_fit_are_refused(features, labels, prototypes, present):
    with pytest.raises(FedistillError, match="features of one width"):
        prototype_loss(features, labels, prototypes, present)
