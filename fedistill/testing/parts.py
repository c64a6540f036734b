"""Checkers of rules, codecs and learners."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedistill.aggregate.chunked import Chunked, reads
from fedistill.aggregate.rules import Rule, configure, softmax, takes, wants
from fedistill.distill.build import build_learner
from fedistill.distill.learner import Familiar, Learner
from fedistill.distill.recipe import Recipe
from fedistill.errors import FedistillError
from fedistill.seeding import generator
from fedistill.types import FloatArray, Probs, Rows
from fedistill.wire.codec import CODECS, Codec, kl

ROWS = 7
CLASSES = 3
LOSS = 0.01
"""Nats that a codec may lose by default, mean over rows."""


class CheckFailed(FedistillError, AssertionError):
    """A part that breaks a promise of its seam."""


def expect(holds: bool, part: str, expected: str, found: object) -> None:
    """Raise unless ``holds``.

    >>> expect(1 + 1 == 3, "arithmetic", "3", 1 + 1)
    Traceback (most recent call last):
        ...
    fedistill.testing.parts.CheckFailed: arithmetic: expected 3, found 2
    """
    if not holds:
        raise CheckFailed(f"{part}: expected {expected}, found {found}")


def _name(function: Any) -> str:
    function = getattr(function, "func", function)
    return str(getattr(function, "__name__", type(function).__name__))


# --- rules -------------------------------------------------------------------------------------


def check_rule(rule: Rule | str) -> None:
    """Prove that a rule makes one row of probabilities of many, and treats clients alike.

    The result has shape ``[rows, classes]``, is finite and non-negative, and sums to 1, also for
    one client, one class, float16 and extreme logits, weights ``[clients, rows]``, clients that
    have seen no class, and without what it can do without. Order of clients means nothing;
    renaming classes renames the output; what everybody says first stays first; a client of weight
    zero has no say; a row on which all weights are zero is NaN or a row of probabilities; the
    arguments stay as they are.

    A rule that returns several targets a row, ``[rows, choices, classes]``, keeps all this for
    each of them. One that remembers keeps it in any one round, and goes on from what
    ``state_dict`` gave as if nothing had happened. One that declares how it reads
    (:mod:`fedistill.aggregate.chunked`) makes the same bytes of its rows in parts.

    Args:
        rule: a function; a class, which is made anew for each property as
            :func:`~fedistill.aggregate.rules.configure` makes it anew for each federation; an
            object with ``state_dict``, of which each property gets a copy; or the name of a rule.

    >>> def boldest(logits, weights):
    ...     probs = softmax(logits) * weights.reshape(len(logits), -1, 1)
    ...     top = probs.max(axis=0)
    ...     return top / top.sum(axis=1, keepdims=True)
    >>> check_rule(boldest)
    >>> check_rule(lambda logits, weights: logits.mean(axis=0))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fedistill.testing.parts.CheckFailed: rule <lambda>, three clients: expected ..., found ...
    >>> check_rule("trust")
    """
    part = f"rule {rule if isinstance(rule, str) else _name(rule)}"
    make = _maker(rule)
    case = _case()
    before = {name: value.copy() for name, value in case.items()}
    usual = _probs(make(), case, f"{part}, three clients")
    changed = [name for name in case if not np.array_equal(case[name], before[name])]
    expect(not changed, part, "arguments left as they are", f"{', '.join(changed)} changed")
    same(_probs(make(), case, part), usual, f"{part}, called twice")

    for title, other in _hard_cases():
        _probs(make(), other, f"{part}, {title}")
    if spare := sorted(takes(make()) - wants(make())):
        bare = {name: value for name, value in case.items() if name not in spare}
        _probs(make(), bare, f"{part}, without {', '.join(spare)}")
    half = case | {"logits": case["logits"].astype(np.float16)}
    same(
        _probs(make(), half, f"{part}, float16"),
        _probs(make(), half | {"logits": half["logits"].astype(np.float64)}, part),
        f"{part}, float16",
        within=1e-3,
    )

    turned = {n: value if n == "anchors" else value[[2, 0, 1]] for n, value in case.items()}
    same(_probs(make(), turned, part), usual, f"{part}, clients in another order")

    classes, anchors = [2, 0, 1], case["anchors"]
    renamed = case | {
        "logits": case["logits"][:, :, classes],
        "seen": case["seen"][:, classes],
        "anchors": np.where(anchors >= 0, np.argsort(classes)[anchors], -1),
    }
    same(_probs(make(), renamed, part), usual[..., classes], f"{part}, classes renamed")

    agreed = case["logits"].argmax(axis=2)[0]
    united = case | {
        "logits": case["logits"] + 9 * (np.arange(CLASSES) == agreed[:, None]),
        "seen": np.ones_like(case["seen"]),
        "anchors": np.where(anchors >= 0, agreed, -1),
    }
    found = _probs(make(), united, part).argmax(axis=-1).reshape(ROWS, -1)
    expect(
        bool((found == agreed[:, None]).all()),
        f"{part}, unanimous clients",
        f"the class they agree on {agreed.tolist()}",
        found.squeeze(axis=1).tolist() if found.shape[1] == 1 else found.tolist(),
    )

    muted = case | {"weights": np.array([1.0, 0.0, 0.5])}
    lied = muted | {name: muted[name].copy() for name in ("logits", "familiarity", "sizes")}
    lied["logits"][1] = -lied["logits"][1]
    lied["familiarity"][1] += 1.0
    lied["sizes"][1] *= 4
    alone = f"{part}, a client of weight zero"
    same(_probs(make(), lied, part), _probs(make(), muted, part), alone)

    silent = case | {"weights": np.tile(case["weights"][:, None], ROWS)}
    silent["weights"][:, 2] = 0.0
    _probs(make(), silent, f"{part}, a row without weights", unanswered=2)

    _check_reading(make, case, usual, part)
    if hasattr(make(), "state_dict"):
        _check_memory(make, case, part)


def _maker(rule: Rule | str) -> Callable[[], Rule]:
    """Makes the rule as it is before its first round, so that no property sees another's."""
    first = configure(rule)
    if hasattr(first, "state_dict"):
        return lambda: copy.deepcopy(first)
    return lambda: first


def _check_memory(make: Callable[[], Any], case: Mapping[str, FloatArray], part: str) -> None:
    """What a rule remembers is written between rounds, and a resumed run goes on from it."""
    rule, resumed = make(), make()
    _probs(rule, case, part)
    try:
        state = json.loads(json.dumps(rule.state_dict(), allow_nan=False))
    except (TypeError, ValueError) as problem:
        raise CheckFailed(f"{part}, state: expected what JSON can say, found {problem}") from None
    resumed.load_state_dict(state)
    went_on = _probs(rule, case, f"{part}, second round")
    same(_probs(resumed, case, part), went_on, f"{part}, second round after restoring")


def _check_reading(
    make: Callable[[], Rule], case: Mapping[str, Any], usual: Probs, part: str
) -> None:
    """Prove what a rule declares: some rows alone, or predictions that are read in parts."""
    if reads(make()) == "rows":
        title = f"{part}, declared row-wise, some rows alone"
        for rows in (slice(0, 3), slice(3, ROWS)):
            some = {n: case[n][:, rows] for n in ("logits", "familiarity")}
            some |= {"anchors": case["anchors"][rows]}
            same(_probs(make(), {**case, **some}, title), usual[rows], title, within=0.0)
    elif reads(make()) == "chunks":
        logits = case["logits"]
        read = Chunked(logits.shape, lambda rows: logits[:, rows].copy())
        title = f"{part}, declared chunkwise, predictions read in parts"
        same(_probs(make(), {**case, "logits": read}, title), usual, title, within=0.0)


def _case(
    clients: int = 3, rows: int = ROWS, classes: int = CLASSES, scale: float = 2.0
) -> dict[str, Any]:
    """Arguments of a rule, by name; the first axis of each is the clients, but for anchors."""
    random = generator("check-rule", clients, rows, classes)
    seen = random.random((clients, classes)) < 0.7
    seen[0] = True
    number = np.arange(rows)
    return {
        "logits": scale * random.normal(size=(clients, rows, classes)),
        "weights": np.resize([1.0, 0.5, 1.0], clients),
        "seen": seen,
        "familiarity": random.normal(size=(clients, rows)),
        "sizes": 2.0 ** random.integers(0, 10, clients),
        "clients": np.array([f"site-{k}" for k in range(clients)]),
        "anchors": np.where(number % 2, -1, number // 2 % classes),
    }


def _hard_cases() -> Sequence[tuple[str, dict[str, Any]]]:
    usual = _case()
    return [
        ("one client", _case(clients=1)),
        ("one class", _case(classes=1)),
        ("one row", _case(rows=1)),
        ("extreme logits", _case(scale=1e4)),
        ("extreme familiarity", usual | {"familiarity": 1e3 * usual["familiarity"]}),
        ("weights by row", usual | {"weights": np.tile(usual["weights"][:, None], ROWS)}),
        ("clients that have seen nothing", usual | {"seen": np.zeros_like(usual["seen"])}),
        ("clients without rows", usual | {"sizes": np.zeros_like(usual["sizes"])}),
        ("no label known", usual | {"anchors": np.full(ROWS, -1)}),
    ]


def _probs(rule: Rule, case: Mapping[str, Any], part: str, unanswered: int | None = None) -> Probs:
    """What the rule says, once it is proved to be probabilities."""
    extras = {name: case[name] for name in takes(rule) & case.keys()}
    if "clients" in extras:
        extras["clients"] = extras["clients"].tolist()
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.asarray(rule(case["logits"], case["weights"], **extras))
    shape = case["logits"].shape[1:]
    several = found.ndim == 3 and found.size and (len(found), found.shape[2]) == shape
    expect(
        found.shape == shape or bool(several),
        part,
        f"[rows, classes] = {list(shape)}",
        list(found.shape),
    )
    rows = found
    if unanswered is not None and np.isnan(found[unanswered]).all():
        rows = np.delete(found, unanswered, axis=0)
    wanted = "finite probabilities"
    if unanswered is not None:
        wanted += " or, without any weight, NaN; never 0"
    expect(bool(np.isfinite(rows).all()), part, wanted, "NaN or infinity")
    expect(bool((rows >= 0).all()), part, f"{wanted}, at least 0", rows.min())
    sums = rows.sum(axis=-1).ravel()
    worst = sums[np.abs(sums - 1).argmax()]
    expect(abs(worst - 1) < 1e-6, part, f"{wanted} that sum to 1", f"a row with sum {worst:.7g}")
    return found


def same(found: FloatArray, wanted: FloatArray, part: str, within: float = 1e-9) -> None:
    """Raise unless two arrays are alike."""
    told = f"the same result (within {within:g})"
    expect(found.shape == wanted.shape, part, told, f"shape {list(found.shape)}")
    gap = float(np.abs(found - wanted).max(initial=0.0))
    expect(gap <= within, part, told, f"a gap of {gap:.3g}")


# --- codecs ------------------------------------------------------------------------------------


def check_codec(codec: Codec | str, loss: float | None = None) -> None:
    """Prove that what a codec decodes is what was encoded, but for ``loss`` nats a row.

    Tried on random rows, ties, constants, certainty, zeros, one class and no rows: the bytes are
    as many as the header promises, decoded rows are float32 probabilities, ties stay ties, the
    top class of a certain row stays on top, equal input gives equal bytes, input stays as it is.

    Args:
        codec: the codec, or the name of one.
        loss: largest mean KL(sent || decoded), in nats; None: what the codec says of itself. One
            that may lose more than 0.01 may break ties, too.

    >>> check_codec("u8")
    >>> check_codec("u8", loss=1e-6)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fedistill.testing.parts.CheckFailed: codec u8, random rows: expected a loss of at most 1e-06 ...
    """
    name = codec if isinstance(codec, str) else codec.summary
    codec = CODECS[codec] if isinstance(codec, str) else codec
    loss = codec.loss if loss is None else loss
    for title, probs in _codec_cases().items():
        part = f"codec {name}, {title}"
        before = probs.copy()
        data = codec.encode(probs)
        size = codec.size(*probs.shape)
        expect(isinstance(data, bytes), part, "bytes", type(data).__name__)
        expect(len(data) == size, part, f"{size} bytes, as the header promises", len(data))
        expect(np.array_equal(probs, before), part, "its input left as it is", "it changed")
        expect(codec.encode(probs) == data, part, "equal bytes for equal rows", "other bytes")
        found = codec.decode(data, *probs.shape)
        expect(found.shape == probs.shape, part, f"shape {probs.shape}", found.shape)
        expect(found.dtype == np.float32, part, "float32", found.dtype)
        good = np.isfinite(found).all() and found.min(initial=0) >= 0
        expect(bool(good), part, "finite numbers of at least 0", found.min(initial=0))
        sums = np.abs(found.sum(axis=1) - 1).max(initial=0)
        expect(sums < 1e-2, part, "rows that sum to 1", f"a sum that is off by {sums:.3g}")
        if not len(probs):
            continue
        lost = kl(probs, found)
        expect(lost <= loss, part, f"a loss of at most {loss:g} nats", f"{lost:.3g}")
        if codec.draws:
            continue
        tied = bool((found[probs == probs.max(axis=1, keepdims=True)] > 0).all())
        expect(tied, part, "top classes kept", "a top class of probability 0")
        if title == "ties" and loss <= LOSS:
            expect(bool((found[:, 0] == found[:, 1]).all()), part, "ties kept", "a tie broken")


def _codec_cases() -> dict[str, Probs]:
    random = generator("check-codec")
    return {
        "random rows": softmax(2 * random.normal(size=(ROWS, 10))),
        "float32 rows": softmax(random.normal(size=(ROWS, 4))).astype(np.float32),
        "extreme rows": softmax(100 * random.normal(size=(ROWS, CLASSES))),
        "ties": np.tile([0.4, 0.4, 0.2], (ROWS, 1)),
        "constants": np.full((ROWS, CLASSES), 1 / CLASSES),
        "certainty and zeros": np.eye(CLASSES)[np.arange(ROWS) % CLASSES],
        "one class": np.ones((ROWS, 1)),
        "no rows": np.empty((0, CLASSES)),
    }


# --- learners ----------------------------------------------------------------------------------


def check_learner(
    build: Callable[[], Any], *, shape: Sequence[int] = (4,), classes: int = CLASSES
) -> None:
    """Prove that what a factory makes can take part: it learns, repeats itself and comes back.

    Predictions are finite logits ``[rows, classes]``, the same when asked again and when asked
    row by row; equal seeds give equal training; absorbed soft targets matter; familiarity, where
    it is offered, is a finite number for each row; no rows are fine; a state restored in a fresh
    learner predicts and trains on alike, and does not change when its owner learns on;
    arguments stay as they are.

    Args:
        build: what a client is given: a factory of torch modules, of scikit-learn classifiers
            with ``predict_proba`` or of learners.
        shape: of one input row.
        classes: number of classes.

    >>> from functools import partial
    >>> from fedistill.models import MLP
    >>> check_learner(partial(MLP, 4, 3, width=8))
    """
    part = f"learner {_name(build)}"
    random = generator("check-learner", *shape, classes)
    labels = np.arange(24, dtype=np.int64) % classes
    own = Rows(random.normal(size=(24, *shape)).astype(np.float32), labels)
    public = random.normal(size=(16, *shape)).astype(np.float32)
    targets = softmax(3 * random.normal(size=(16, classes))).astype(np.float32)
    before = [array.copy() for array in (own.inputs, own.labels, public, targets)]

    def make() -> Learner:
        return build_learner(
            build,
            Recipe(epochs=2, batch_size=8, familiarity=True),
            classes=classes,
            seed=1,
            background=public,
        )

    def teach(learner: Learner, number: int) -> FloatArray:
        learner.absorb(public, targets, seed=10 + number)
        learner.fit(own, seed=20 + number)
        return _logits(learner, public, classes, f"{part}, trained")

    first = make()
    expect(isinstance(first, Learner), part, "the methods of a Learner", type(first).__name__)
    _logits(first, public, classes, f"{part}, fresh")
    said = teach(first, 1)
    same(_logits(first, public, classes, part), said, f"{part}, asked twice", within=0.0)
    alone = np.concatenate([_logits(first, public[k : k + 1], classes, part) for k in range(4)])
    same(alone, said[:4], f"{part}, asked row by row", within=1e-4)
    _logits(first, public[:0], classes, f"{part}, no rows to predict")
    same(teach(make(), 1), said, f"{part}, equal seeds", within=0.0)

    if isinstance(first, Familiar):
        ratios = np.asarray(first.familiarity(public))
        good = ratios.shape == (len(public),) and bool(np.isfinite(ratios).all())
        expect(good, f"{part}, familiarity", "a finite number for each row", ratios.shape)

    untaught = make()
    untaught.fit(own, seed=21)
    heard = bool(np.abs(untaught.predict(public) - said).max() > 1e-6)
    expect(heard, f"{part}, soft targets", "other predictions than without", "the same")

    state = first.state_dict()
    odd = [
        key
        for key, value in state.items()
        if not isinstance(value, np.ndarray) or value.dtype.hasobject
    ]
    expect(not odd, f"{part}, state", "arrays without objects", ", ".join(odd))
    saved = {key: value.copy() for key, value in state.items()}
    second = make()
    second.load_state_dict(state, own)
    again = _logits(second, public, classes, f"{part}, restored")
    same(again, said, f"{part}, restored", within=0.0)
    same(teach(second, 2), teach(first, 2), f"{part}, trained on after restoring", within=0.0)
    moved = [key for key in saved if not np.array_equal(state[key], saved[key])]
    expect(not moved, f"{part}, state", "a copy", f"{', '.join(moved)} changed by training on")

    empty = make()
    empty.absorb(public[:0], targets[:0], seed=1)
    empty.fit(own.take([]), seed=2)
    _logits(empty, public, classes, f"{part}, without rows")
    after = (own.inputs, own.labels, public, targets)
    kept = all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    expect(kept, part, "its arguments left as they are", "a changed one")


def _logits(learner: Learner, inputs: FloatArray, classes: int, part: str) -> FloatArray:
    found = learner.predict(inputs)
    wanted = (len(inputs), classes)
    expect(found.shape == wanted, part, f"logits [rows, classes] = {wanted}", found.shape)
    expect(bool(np.isfinite(found).all()), part, "finite logits", "NaN or infinity")
    return np.array(found)
