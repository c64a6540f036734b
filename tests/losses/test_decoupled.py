"""Decoupled distillation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.losses import decoupled_kd, logit_kl


def case(rows=6, classes=5):
    random = torch.Generator().manual_seed(3)
    made = [1.5 * torch.randn(rows, classes, generator=random, dtype=torch.float64) for _ in "st"]
    return *made, torch.arange(rows) % classes


def published(student, teacher, labels, temperature, target_weight, other_weight):
    """The authors' code, as the paper's Algorithm 1 has it."""
    mask = F.one_hot(labels, student.shape[1]).bool()
    p, q = ((side / temperature).softmax(1) for side in (student, teacher))

    def events(probs):
        return torch.stack([(probs * mask).sum(1), (probs * ~mask).sum(1)], 1)

    target = F.kl_div(events(p).log(), events(q), reduction="batchmean")
    others = [(side / temperature - 1000.0 * mask) for side in (student, teacher)]
    other = F.kl_div(others[0].log_softmax(1), others[1].softmax(1), reduction="batchmean")
    return temperature**2 * (target_weight * target + other_weight * other)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_the_published_loss(temperature):
    student, teacher, labels = case()
    found = decoupled_kd(student, teacher, labels, temperature, 1.0, 8.0)
    torch.testing.assert_close(found, published(student, teacher, labels, temperature, 1.0, 8.0))


def test_kl_is_its_two_parts_the_second_muted_where_the_teacher_is_sure():
    """KL = TCKD + (1 - q) NCKD, the identity of the paper, row by row."""
    student, teacher, labels = case()
    for row in range(6):
        one = slice(row, row + 1)
        q = teacher[one].softmax(1)[0, labels[row]]
        expected = decoupled_kd(student[one], teacher[one], labels[one], 1.0, 1.0, float(1 - q))
        torch.testing.assert_close(logit_kl(student[one], teacher[one], 1.0), expected)


def test_among_two_classes_there_is_no_order_of_the_others():
    student, teacher, labels = case(classes=2)
    assert decoupled_kd(student, teacher, labels, target_weight=0.0) == 0


def test_one_class_is_refused():
    with pytest.raises(FedistillError, match="two classes at least, found 1"):
        decoupled_kd(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
