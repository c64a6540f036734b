"""Checkers of what a student that stays current is made of: policies, objectives, detectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.policies import Candidates, Keys, Policy, find_policy
from fedistill.continual.watch import LABELLED, values
from fedistill.continual.watcher import Detector, DriftState
from fedistill.distill.objectives import Group, Objective, Step
from fedistill.distill.objectives import objective as named
from fedistill.seeding import generator
from fedistill.testing.parts import CLASSES, expect, same
from fedistill.types import FloatArray

# --- buffer policies ---------------------------------------------------------------------------


def check_policy(policy: str | Policy | Keys) -> None:
    """Prove that a policy gives keys to rows, and that a buffer can stand on it.

    Keys are one finite number a row, the same when asked again and in another order of rows, and,
    where they are said to be for life, the same whatever other rows there are; arguments stay as
    they are. A buffer with it is never above its capacity, keeps what lies beside a row with that
    row, and goes on from its saved state as if nothing had happened.

    Args:
        policy: a name, a policy, or its function of rows.

    >>> check_policy("class-balanced")
    >>> check_policy(lambda rows: rows.uniform.argsort())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fedistill.testing.parts.CheckFailed: policy <lambda>, fewer rows: expected ..., found ...
    """
    policy = find_policy(policy)
    part = f"policy {policy.name}"
    random, count = generator("check-policy"), 24
    features = random.normal(size=(count, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    case: dict[str, Any] = {
        "uniform": random.random(count),
        "numbers": np.arange(count),
        "labels": np.arange(count) % CLASSES,
        "scores": random.normal(size=count),
        "features": features,
        "means": np.stack([features[k::CLASSES].mean(axis=0) for k in range(CLASSES)] * 8),
    }
    before = {name: value.copy() for name, value in case.items()}

    def keys(rows: Any, title: str) -> FloatArray:
        chosen = Candidates(**{name: value[rows] for name, value in case.items()})
        found = np.asarray(policy.keys(chosen), dtype=np.float64)
        good = found.shape == (len(chosen),) and bool(np.isfinite(found).all())
        expect(good, f"{part}, {title}", "a finite key for each row", found.shape)
        return found

    every = slice(None)
    usual = keys(every, "keys")
    same(keys(every, "keys"), usual, f"{part}, asked twice", within=0.0)
    changed = [name for name in case if not np.array_equal(case[name], before[name])]
    expect(not changed, part, "arguments left as they are", f"{', '.join(changed)} changed")
    if policy.lifelong:
        same(keys(slice(5, 9), "fewer rows"), usual[5:9], f"{part}, fewer rows", within=0.0)
    same(
        keys(slice(None, None, -1), "turned"),
        usual[::-1],
        f"{part}, rows in another order",
        within=0.0,
    )

    for capacity in (0, 1, 7):
        title = f"{part}, capacity {capacity}"
        first, second = ReplayBuffer(capacity, policy), ReplayBuffer(1, policy, seed=1)
        for start in range(0, count, 8):
            rows = slice(start, start + 8)
            names = ("labels", "scores", "features")
            extras = {name: case[name][rows] for name in names}
            number = case["numbers"][rows, None]
            first.add(number, logits=number, **extras)
            expect(len(first) <= capacity, title, f"at most {capacity} rows", len(first))
        held = first.rows()
        expect(bool((held.inputs == held.logits).all()), title, "logits of their rows", "others")
        second.load_state_dict(first.state_dict())
        alike = np.array_equal(first.draw(3).numbers, second.draw(3).numbers)
        expect(alike, f"{title}, restored", "the same draws", "others")


# --- objectives --------------------------------------------------------------------------------


def check_objective(objective: str | Objective) -> None:
    """Prove that an objective gives finite terms with a gradient, whatever rows there are.

    Terms are named numbers; their sum has a gradient with respect to the student's logits of new
    rows that have labels. Nothing remembered, nothing labelled, no public rows, no teacher, one
    row, classes that remembered rows do not know, and logits of 200 are all borne; the step is left
    as it is, and asked twice it says the same.

    Args:
        objective: a name, or anything that turns a step into terms.

    >>> check_objective("der++")
    """
    made = named(objective)
    part = f"objective {getattr(objective, '__name__', objective)}"
    draws = getattr(made, "draws", (4,))
    counts = all(isinstance(count, int) and count >= 0 for count in draws)
    expect(counts, part, "draws as whole numbers from 0", draws)
    cases: dict[str, dict[str, Any]] = {
        "usual": {},
        "nothing remembered": {"old": 0},
        "one new row": {"new": 1},
        "nothing labelled": {"labelled": False},
        "no teacher": {"taught": False},
        "new classes": {"width": 2},
        "large logits": {"size": 200.0},
    }
    for title, case in cases.items():
        step, weight = _step(len(draws), **case)
        before = [group.logits.detach().clone() for group in (step.new, *step.old)]
        terms = made(step)
        told = f"{part}, {title}"
        expect(isinstance(terms, dict) and bool(terms), told, "a dict of named terms", terms)
        shaped = all(term.dim() == 0 and bool(torch.isfinite(term)) for term in terms.values())
        expect(shaped, told, "finite numbers", {k: v.tolist() for k, v in terms.items()})
        again = made(step)
        repeated = all(torch.equal(terms[name], again[name]) for name in terms)
        expect(repeated, told, "the same when asked twice", "others")
        total = torch.stack([*terms.values()]).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
            grad = weight.grad
            expect(
                grad is None or bool(torch.isfinite(grad).all()), told, "a finite gradient", grad
            )
        after = [group.logits.detach() for group in (step.new, *step.old)]
        kept = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        expect(kept, told, "its step left as it is", "a changed one")


def _step(
    draws: int,
    *,
    new: int = 3,
    old: int = 4,
    labelled: bool = True,
    taught: bool = True,
    width: int = CLASSES,
    size: float = 1.0,
) -> tuple[Step, torch.nn.Parameter]:
    """A step of a linear student, and its weight."""
    random = generator("check-objective", new, old)
    weight = torch.nn.Parameter(torch.from_numpy(random.normal(size=(2, CLASSES))).float() * size)
    former = torch.from_numpy(random.normal(size=(2, width))).float() * size

    def group(count: int, known: bool) -> Group:
        inputs = torch.from_numpy(random.normal(size=(count, 2))).float()
        numbers = random.integers(0, width, count) if known else np.full(count, -1)
        stored = torch.full((count, CLASSES), torch.nan)
        stored[:, :width] = torch.from_numpy(random.normal(size=(count, width))).float() * size
        teacher = (lambda rows: rows @ former) if taught else None
        return Group(inputs, torch.from_numpy(numbers), inputs @ weight, stored, teacher)

    known = torch.arange(CLASSES) < width
    olds = tuple(group(old, labelled) for _ in range(draws))
    return Step(group(new, labelled), olds, group(5, False), known, [weight]), weight


# --- detectors ---------------------------------------------------------------------------------


def check_detector(make: Callable[[], Detector], rows: int = 2000) -> None:
    """Prove that a detector is calm where nothing moves, alarms where much does, and goes on.

    How a stream is cut into blocks changes no alarm; no values change nothing; a saved state goes
    on to the same alarms, through JSON; after ``reset`` a stream is met as if it were the first.

    Args:
        make: a factory of detectors.
        rows: of the calm stream, and of the moved one after it.

    >>> from fedistill.continual.adwin import Adwin
    >>> check_detector(Adwin)
    """
    first = make()
    part = f"detector {type(first).__name__}"
    calm, moved = _predictions(rows, 0.05), _predictions(rows, 0.9)
    labels = np.zeros(rows, dtype=np.int64)
    told = labels if first.on in LABELLED else None
    quiet, loud = (values(first.on, probs, told) for probs in (calm, moved))
    stream = np.concatenate([quiet, loud])

    found = _alarms(first, stream, len(stream))
    early = [row for row in found if row < rows]
    expect(not early, part, "no alarm while nothing moves", early)
    expect(bool(found), part, "an alarm after a large shift", "none")
    expect(_alarms(make(), stream, 37) == found, part, "the same alarms in small blocks", "others")
    empty = make()
    expect(empty.update(stream[:0]) is DriftState.OK, part, "OK of no values", "another")
    half, cut = make(), rows + 10
    before = _alarms(half, stream[:cut], 37)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict(), allow_nan=False)))
    after = _alarms(resumed, stream[cut:], 37)
    expect(before + after == found, f"{part}, resumed", f"alarms at {found}", before + after)


def _alarms(detector: Detector, stream: FloatArray, size: int) -> list[int]:
    found: list[int] = []
    for start in range(0, len(stream), size):
        state = detector.update(stream[start : start + size])
        found += list(detector.alarms) if state is DriftState.DRIFT else []
    return found


def _predictions(rows: int, doubt: float) -> FloatArray:
    """Predictions of two classes, unsure in a share of the rows."""
    random = generator("check-detector", str(doubt))
    unsure = random.random(rows) < doubt
    first = np.where(unsure, random.uniform(0.2, 0.55, rows), random.uniform(0.9, 0.99, rows))
    return np.stack([first, 1 - first], axis=1)
