"""Who teaches."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import INPUTS, gaussian
from torch import nn

from fedistill import models
from fedistill.distill.teachers import (
    EmaTeacher,
    Ensemble,
    Frozen,
    Moving,
    as_teacher,
    best_of,
    born_again,
    confidence,
    module_of,
    pool,
    predict,
)
from fedistill.errors import CheckpointError, FedistillError

INPUT = torch.from_numpy(gaussian(12, 3).inputs)


class Noisy(nn.Module):
    """Dropout and batch statistics: everything that training mode changes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(INPUTS)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, inputs):
        return self.head(self.drop(self.norm(inputs)))


def says(*logits):
    return lambda inputs: torch.tensor(logits).expand(len(inputs), -1)


def build(seed=0, kind=Noisy):
    torch.manual_seed(seed)
    return kind()


# --- frozen --------------------------------------------------------------------------------------


def test_a_frozen_teacher_says_the_same_twice_and_leaves_its_module_alone():
    """P16: predictions in training mode; P7: a gradient into the teacher."""
    module = build().train()
    module.drop.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    teacher = Frozen(module)
    first, second = teacher(INPUT), teacher(INPUT)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert [module.training, module.norm.training, module.drop.training] == [True, True, False]
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modes_come_back_after_an_error():
    module = build().train()
    with pytest.raises(RuntimeError):
        Frozen(module)(torch.zeros(2, INPUTS + 1))
    assert module.norm.training


def test_a_module_is_a_frozen_teacher_and_a_callable_is_one_as_it_is():
    module = build()
    assert module_of(as_teacher(module)) is module
    told = says(1.0, 0.0, 0.0)
    assert as_teacher(told) is told
    assert module_of(told) is None


def test_predicting_in_parts_is_predicting():
    teacher = Frozen(build())
    rows = torch.randn(601, INPUTS)
    torch.testing.assert_close(predict(teacher, rows), teacher(rows))


# --- ensemble ------------------------------------------------------------------------------------


def test_an_ensemble_averages_probabilities_so_that_nobody_has_a_veto():
    teachers = [says(0.0, 0.0, -50.0), says(-50.0, 0.0, 0.0)]
    found = Ensemble(teachers)(INPUT).exp()
    torch.testing.assert_close(found, torch.tensor([0.25, 0.5, 0.25]).expand(12, -1))


def test_weights_are_shares():
    teachers = [says(1.0, 0.0), says(0.0, 2.0)]
    found = Ensemble(teachers, [3, 1])(INPUT[:1]).exp()
    expected = [
        0.75 * torch.tensor([1.0, 0.0]).softmax(0),
        0.25 * torch.tensor([0, 2.0]).softmax(0),
    ]
    torch.testing.assert_close(found[0], sum(expected))
    alone = Ensemble(teachers, [1, 0])(INPUT[:1])
    torch.testing.assert_close(alone, torch.tensor([[1.0, 0.0]]).log_softmax(1))


def test_the_confident_are_heard_row_by_row():
    sure, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.zeros(3)
    logits = torch.stack([torch.stack([sure, unsure]), torch.stack([unsure, unsure])])
    shares = confidence(logits)
    torch.testing.assert_close(shares, torch.tensor([[1.0, 0.5], [0.0, 0.5]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(pool(logits, shares)[0], sure.log_softmax(0), atol=1e-4, rtol=0)
    alike = logits.roll(1, dims=2)
    torch.testing.assert_close(confidence(alike), shares)


def test_an_ensemble_of_one_is_its_member_and_its_layers_have_names():
    module = build()
    ensemble = Ensemble([module, says(0.0, 0.0, 0.0)], [1, 0])
    torch.testing.assert_close(ensemble(INPUT), Frozen(module)(INPUT).log_softmax(1))
    assert dict(ensemble.module.named_modules())["0.head"] is module.head
    assert Ensemble([module], confidence)(INPUT).isfinite().all()


def test_targets_sum_to_one_whatever_the_number_of_teachers():
    """P13: added constants, and a scale that grows with the number of those who answer."""
    member = Frozen(build())
    alone = Ensemble([member])(INPUT)
    for count in (2, 5):
        for weights in (None, confidence, range(1, count + 1)):
            found = Ensemble([member] * count, weights)(INPUT)
            torch.testing.assert_close(found.exp().sum(1), torch.ones(12), atol=1e-6, rtol=0)
            torch.testing.assert_close(found, alone)


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]]
)
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(FedistillError, match="as many weights"):
        Ensemble([says(0.0), says(0.0)], weights)
    with pytest.raises(FedistillError, match="one teacher at least"):
        Ensemble([])


def test_the_best_teacher_has_the_lowest_loss_on_labels():
    rows = gaussian(20, 1, labels=[2])
    teachers = [says(0.0, 1.0, 0.0), says(0.0, 0.0, 1.0), says(0.0, 0.0, -1.0)]
    assert best_of(teachers, rows) is teachers[1]


# --- EMA -----------------------------------------------------------------------------------------


def test_the_average_by_hand_with_its_warm_up():
    student = nn.Linear(1, 1, bias=False)
    teacher = EmaTeacher(decay=0.15)
    student.weight.data.fill_(1.0)
    teacher.start(student)
    expected = 1.0
    for step, value in enumerate([2.0, 4.0, 8.0]):
        student.weight.data.fill_(value)
        teacher.update(student)
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert float(teacher.module.weight) == pytest.approx(expected)
    assert not teacher.module.weight.requires_grad


def test_buffers_are_copied_and_not_averaged():
    student = build().train()
    teacher = EmaTeacher()
    teacher.start(student)
    student(INPUT + 5)
    teacher.update(student)
    assert torch.equal(teacher.module.norm.running_mean, student.norm.running_mean)
    assert teacher.module.norm.num_batches_tracked == 1


def test_it_goes_on_from_its_state_to_the_same_weights():
    student = build()
    torch.manual_seed(1)
    moves = [torch.randn_like(student.head.weight) for _ in range(6)]

    def follow(teacher, steps):
        for move in steps:
            student.head.weight.data.copy_(move)
            teacher.update(student)

    whole, first, second = EmaTeacher(0.5), EmaTeacher(0.5), EmaTeacher(0.5)
    follow(whole, moves)
    follow(first, moves[:3])
    state = first.state_dict()
    assert all(isinstance(value, np.ndarray) for value in state.values())
    kept = {name: value.copy() for name, value in state.items()}
    first.update(build(9))
    second.start(build(5))
    second.load_state_dict(state)
    follow(second, moves[3:])
    assert all((state[name] == kept[name]).all() for name in kept), "a state is a copy"
    assert torch.equal(second.module.head.weight, whole.module.head.weight)
    assert isinstance(second, Moving)
    assert not isinstance(Frozen(student), Moving)


def test_it_says_what_it_needs():
    with pytest.raises(FedistillError, match=r"call start\(student\) first"):
        EmaTeacher()(INPUT)
    with pytest.raises(FedistillError, match=r"at least 0 and below 1, found 1\.0"):
        EmaTeacher(decay=1.0)
    teacher, other = EmaTeacher(), EmaTeacher()
    teacher.start(build())
    other.start(build(kind=partial(models.Linear, INPUTS, 3)))
    with pytest.raises(CheckpointError, match="another teacher"):
        other.load_state_dict(teacher.state_dict())


# --- born again ----------------------------------------------------------------------------------


def test_each_generation_is_taught_by_the_one_before():
    calls = []

    def train(teacher, number):
        calls.append((None if teacher is None else teacher.module, number))
        return build(number)

    made = list(born_again(train, 3))
    assert [module for module, _ in calls] == [None, made[0], made[1]]
    assert [number for _, number in calls] == [0, 1, 2]
