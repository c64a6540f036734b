"""The lines of stream.jsonl as values: what each experience of a stream brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedistill.report.folder import Point, Run
from fedistill.report.words import clean, number

Accuracies = tuple[float | None, ...]


@dataclass(frozen=True)
class Buffer:
    """What the replay buffers of all clients hold, together."""

    rows: float
    capacity: float | None
    classes: Mapping[str, float]


@dataclass(frozen=True)
class Experience:
    """One portion of rows that came together, and what learning it did.

    Attributes:
        number: its place in time, from 1.
        name: what it calls itself, or an empty text.
        round: the round in which it was learned.
        rows: how many new rows it brought.
        student: the student's accuracy on the test rows of each experience, afterwards.
        clients: the same of the clients' own models, their mean.
        prequential: accuracy on its rows before they were learned, mean over clients.
        by_client: the same of each client.
        curves: of each client, windowed accuracy by the rows of its stream so far.
        alarms: of each client, the rows so far at which its drift detector alarmed.
        consolidated: whether alarms led to an extra round of distillation.
        buffer: what the buffers hold afterwards; None without replay.
        seconds: time of the update.
        trained: rows the update trained on, each as often as it was.
        retrain: rows that training anew on everything so far would train on.
    """

    number: int
    name: str = ""
    round: float | None = None
    rows: float | None = None
    student: Accuracies = ()
    clients: Accuracies = ()
    prequential: float | None = None
    by_client: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    alarms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    consolidated: bool = False
    buffer: Buffer | None = None
    seconds: float | None = None
    trained: float | None = None
    retrain: float | None = None


def experiences(run: Run) -> tuple[Experience, ...]:
    """The experiences of a run, in order; what cannot be read in one of them is left out."""
    return tuple(_experience(line) for line in run.stream)


def _experience(line: Mapping[str, Any]) -> Experience:
    count, name = line["experience"], line.get("name")
    told = clean(name, 40) if isinstance(name, str) else ""
    return Experience(
        number=count,
        name="" if told in {str(count), f"experience {count}"} else told,
        round=number(line.get("round")),
        rows=number(line.get("rows")),
        student=_accuracies(line.get("student")),
        clients=_accuracies(line.get("clients")),
        prequential=number(line.get("prequential")),
        by_client=_numbers(line.get("prequential_by_client")),
        curves={name: points for name, value in _items(line, "curve") if (points := _curve(value))},
        alarms={name: rows for name, value in _items(line, "alarms") if (rows := _rows(value))},
        consolidated=line.get("consolidated") is True,
        buffer=_buffer(line.get("buffer")),
        seconds=number(line.get("seconds")),
        trained=number(line.get("rows_trained")),
        retrain=number(line.get("rows_retrain")),
    )


def _items(line: Mapping[str, Any], key: str) -> Sequence[tuple[str, object]]:
    table = line.get(key)
    return [(str(k), v) for k, v in table.items()] if isinstance(table, Mapping) else []


def _accuracies(value: object) -> Accuracies:
    """A list of accuracies with its gaps; empty where all of it is missing."""
    found = tuple(map(number, value)) if isinstance(value, list) else ()
    return found if any(one is not None for one in found) else ()


def _numbers(value: object) -> dict[str, float]:
    table = value if isinstance(value, Mapping) else {}
    return {str(k): found for k, v in table.items() if (found := number(v)) is not None}


def _curve(value: object) -> tuple[Point, ...]:
    pairs = [pair for pair in value if isinstance(pair, list)] if isinstance(value, list) else []
    numbers = [tuple(map(number, pair)) for pair in pairs if len(pair) == 2]
    return tuple(sorted(Point(x, y) for x, y in numbers if x is not None and y is not None))


def _rows(value: object) -> tuple[float, ...]:
    found = map(number, value) if isinstance(value, list) else ()
    return tuple(sorted(row for row in found if row is not None))


def _buffer(value: object) -> Buffer | None:
    if not isinstance(value, Mapping):
        return None
    classes = {k: v for k, v in _numbers(value.get("classes")).items() if v > 0}
    rows = number(value.get("rows"))
    held = sum(classes.values()) if rows is None else rows
    return Buffer(held, number(value.get("capacity")), classes)
