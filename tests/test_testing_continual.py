"""Checkers of objectives and detectors: ours pass, and what breaks a promise is named."""

from __future__ import annotations

import pytest
import torch

import fedistill as fd
from fedistill.catalog import OBJECTIVES
from fedistill.continual.detectors import DETECTORS
from fedistill.distill.objectives import Step, Terms, labels
from fedistill.testing import CheckFailed, check_detector, check_objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_our_objectives_keep_their_promises(name: str) -> None:
    check_objective(name)


def log_of_nothing(step: Step) -> Terms:
    (old,) = step.old
    return {"new": labels(step.new), "old": labels(old) / len(old)}


def one_number(step: Step) -> torch.Tensor:
    return labels(step.new)


class Forgetful:
    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, step: Step) -> Terms:
        self.asked += 1
        return {"new": labels(step.new) + self.asked}


def greedy(step: Step) -> Terms:
    with torch.no_grad():
        step.new.logits.data.add_(1)
    return {"new": labels(step.new)}


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (one_number, "a dict of named terms"),
        (Forgetful(), "the same when asked twice"),
        (greedy, "its step left as it is"),
    ],
)
def test_a_broken_objective_is_named(broken: object, told: str) -> None:
    with pytest.raises(CheckFailed, match=told):
        check_objective(broken)  # type: ignore[arg-type]


def test_an_objective_that_divides_by_what_is_remembered_is_named() -> None:
    with pytest.raises((CheckFailed, ZeroDivisionError)):
        check_objective(log_of_nothing)


@pytest.mark.parametrize("name", DETECTORS)
def test_our_detectors_keep_their_promises(name: str) -> None:
    options = {"threshold": 20.0} if name == "page-hinkley" else {}
    check_detector(lambda: DETECTORS[name](**options))


def test_a_detector_that_hears_nothing_is_named() -> None:
    with pytest.raises(CheckFailed, match="an alarm after a large shift"):
        check_detector(lambda: fd.PageHinkley(threshold=1e6))
