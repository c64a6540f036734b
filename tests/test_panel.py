"""The panel: read in parts it is the array of all that the teachers say, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from builders import probabilities, server, upload
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.aggregate import chunked
from fedistill.aggregate.rules import log_softmax
from fedistill.aggregate.vigilance import flag_predictions
from fedistill.door import Answer
from fedistill.metrics import agreement
from fedistill.panel import Panel
from fedistill.wire.delta import quantise
from fedistill.wire.folded import Folded

ASKED = np.array([7, 3, 11, 0, 5, 9, 2, 8, 1])
CLASSES = 3


def answer(name: str, rows: Any, probs: Any, **facts: Any) -> Answer:
    sent = upload(server().plan(1), name, probs, payload=b"")
    return Answer(sent, np.asarray(rows), Folded(quantise("float32", np.float32(probs))), **facts)


def teachers(seed: int = 0) -> list[Answer]:
    """One that answers everything, one some rows, a late one, a copy, one that is too sure."""
    whole = probabilities(9, seed)
    sure = np.eye(3)[np.arange(9) % 3]
    late = np.array([0, 4, 7, 6, 9])
    return [
        answer("a", ASKED, whole),
        answer("b", ASKED[[0, 3, 4, 8]], probabilities(4, seed + 1)),
        answer("c", late, probabilities(5, seed + 2), age=2),
        answer("d", ASKED, whole),
        answer("e", ASKED, sure),
    ]


def stack(answers: list[Answer]) -> tuple[Any, Any]:
    """All in one array, by a loop."""
    probs = np.full((len(answers), len(ASKED), CLASSES), 1 / CLASSES)
    answered = np.zeros(probs.shape[:2], dtype=bool)
    for number, one in enumerate(answers):
        for place, row in enumerate(ASKED):
            for said, at in zip(one.probs, one.rows, strict=True):
                if row == at:
                    probs[number, place], answered[number, place] = said, True
    return probs, answered


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 20), window=st.integers(1, 200), informed=st.booleans())
def test_flags_and_logits_are_those_of_one_array(seed: int, window: int, informed: bool) -> None:
    answers = teachers(seed)
    probs, answered = stack(answers)
    names = [one.upload.client for one in answers]
    familiarity = None
    if informed:
        random = np.random.default_rng(seed)
        told = [random.normal(size=len(one.rows)) for one in answers]
        answers = [
            dataclasses.replace(one, familiarity=own)
            for one, own in zip(answers, told, strict=True)
        ]
        familiarity = np.zeros(answered.shape)
        for number, one in enumerate(answers):
            for place, row in enumerate(ASKED):
                if answered[number, place]:
                    familiarity[number, place] = told[number][list(one.rows).index(row)]
    marks = answered if familiarity is None else familiarity
    wanted, weights, flags = flag_predictions(
        dict(zip(names, probs, strict=True)),
        dict(zip(names, marks, strict=True)),
        answered=dict(zip(names, answered, strict=True)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "WHOLE", 0)
        patch.setattr(chunked, "WINDOW", window)
        panel, found = Panel.of(answers, ASKED, CLASSES).watched(None, coarse=False, quorum=1)
        logits = panel.logits().whole()
    assert found == flags
    assert "overconfident" in flags["e"]
    assert informed or flags["a"] == ["identical"]
    np.testing.assert_array_equal(panel.weights, weights)
    np.testing.assert_array_equal(panel.answered, answered)
    if familiarity is not None:
        np.testing.assert_array_equal(panel.familiarity, familiarity)
    assert logits.tobytes() == log_softmax(np.log(np.maximum(wanted, 1e-12))).tobytes()
    targets = probabilities(9, 50)
    targets[2] = np.nan
    told_rows = answered & ~np.isnan(targets).any(axis=1)
    shares = [
        agreement(said[rows], targets[rows]) for said, rows in zip(wanted, told_rows, strict=True)
    ]
    assert panel.agreement(targets) == float(np.mean(shares))
