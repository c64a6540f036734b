"""Between a student and its memory: what is drawn for a step, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.replay import Replay
from fedistill.distill.objectives import Objective
from fedistill.distill.teachers import evaluating
from fedistill.types import FloatArray, IntArray, Logits, Rows

EMPTY = ReplayBuffer(0)
"""What is drawn from where nothing is remembered."""
Score = Callable[[Replay], FloatArray]


def draws(
    replay: ReplayBuffer | None, objective: Objective, own: int, score: Callable[[], Score]
) -> list[Replay]:
    """The draws that an objective asks for; empty ones where nothing is remembered.

    Args:
        replay: the memory.
        objective: how many rows it wants stands in its ``draws``; 0 or none: as many as are new.
        own: new rows of the step.
        score: makes what judges candidates, where the memory draws by interference.
    """
    counts = [count or own for count in getattr(objective, "draws", (own,))]
    if replay is None or not len(replay):
        return [EMPTY.draw(0) for _ in counts]
    if replay.drawing != "mir" or not counts:
        return [replay.draw(count) for count in counts]
    judge = score()
    return [replay.draw(count, score=judge) for count in counts]


def interference(module: nn.Module, rate: float, inputs: Tensor, labels: Tensor) -> Score:
    """How the loss of remembered rows would grow by a step on the new rows alone (MIR).

    Looked at without dropout and batch statistics: trying a step must not move those.

    Args:
        module: the student; stays as it is.
        rate: of the step.
        inputs: new rows.
        labels: ``[n]``; -1 where none is known.
    """
    weights = {name: one for name, one in module.named_parameters() if one.requires_grad}
    with evaluating(module), torch.enable_grad():
        new = F.cross_entropy(module(inputs), labels, ignore_index=-1, reduction="sum")
        loss = new / max(len(labels), 1)
        parts = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
    there = {
        name: weight.detach() if part is None else (weight - rate * part).detach()
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }

    def score(rows: Replay) -> FloatArray:
        given = torch.from_numpy(rows.inputs).to(inputs)
        wanted = torch.from_numpy(rows.labels).to(labels)
        with evaluating(module):
            here = module(given)
            after: Tensor = torch.func.functional_call(module, there, (given,))
            grown = [
                F.cross_entropy(said, wanted, ignore_index=-1, reduction="none")
                for said in (after, here)
            ]
        found: FloatArray = (grown[0] - grown[1]).cpu().numpy()
        return found

    return score


def stored_logits(rows: Replay, classes: int) -> FloatArray:
    """The logits beside remembered rows, ``[n, classes]``; NaN where there is none."""
    if rows.logits.shape[1] == classes == rows.logits_classes.min(initial=classes):
        return rows.logits
    stored = np.full((len(rows), classes), np.nan, dtype=np.float32)
    width = min(rows.logits.shape[1], classes)
    stored[:, :width] = np.where(rows.logits_known, rows.logits, np.nan)[:, :width]
    return stored


def as_they_come(replay: ReplayBuffer | None) -> bool:
    """Whether rows are remembered batch by batch; herding wants them all at once."""
    return replay is not None and replay.policy.needs != "features"


def remember(replay: ReplayBuffer, rows: Rows, numbers: IntArray, said: Tensor) -> None:
    """Keep rows of an experience, with what was said of them before the step.

    Args:
        replay: the memory.
        rows: the experience.
        numbers: ``[n]`` which of its rows.
        said: ``[n, classes]`` logits.
    """
    scores = None
    if replay.policy.needs == "scores":
        known = torch.from_numpy(rows.labels[numbers]).to(said.device)
        scores = F.cross_entropy(said, known, ignore_index=-1, reduction="none").cpu().numpy()
    replay.add(
        rows.inputs[numbers],
        rows.labels[numbers],
        logits=said.cpu().numpy(),
        scores=scores,
        subject=None if rows.subject is None else rows.subject[numbers],
    )


def remember_all(replay: ReplayBuffer, rows: Rows, features: FloatArray, said: Logits) -> None:
    """Keep all rows of an experience that was learned, with the features that herding needs."""
    replay.add(rows.inputs, rows.labels, logits=said, features=features, subject=rows.subject)
