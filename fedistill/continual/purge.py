"""A saved learner without a person: whatever holds rows in its arrays is washed, model unseen.

A site's state is a flat list of named arrays. Memories, rows that a refit needs beside them and
what a detector holds are found by their names, so that this works for every learner that remembers,
without building it: whoever erases needs neither the model nor the rows that it learns from.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.detectors import detector
from fedistill.continual.storage import numbers_to_texts, texts_to_numbers
from fedistill.data.erased import fingerprint, known_as, read_tombstones
from fedistill.types import Rows, State

Arrays = dict[str, npt.NDArray[Any]]


def purge(arrays: State, subjects: Sequence[str]) -> tuple[Arrays, int]:
    """The arrays of a saved learner without these people.

    Each memory is erased from as :meth:`ReplayBuffer.erase` does, and keeps a tombstone for each
    person; detectors begin anew, for they hold values of single rows.

    Args:
        arrays: flat names to arrays; those that hold no rows of people are passed on as they are.
        subjects: names, as the rows had them.

    Returns:
        The arrays, and how many rows were taken out of memories.

    Raises:
        FedistillError: a memory has a policy of its own, which is no name.
        CheckpointError: a memory cannot be read.
    """
    washed, removed = dict(arrays), 0
    for prefix in _before(arrays, "tombstones.words"):
        held = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
        clean, count = _without(held, subjects)
        for name in held:
            del washed[prefix + name]
        washed |= {prefix + name: array for name, array in clean.items()}
        removed += count
    for prefix in _before(arrays, "beside.subject"):
        names = numbers_to_texts(arrays[f"{prefix}beside.subject"])
        stays = ~np.isin(names, subjects)
        for part in ("inputs", "labels"):
            washed[f"{prefix}beside.{part}"] = arrays[f"{prefix}beside.{part}"][stays]
        washed[f"{prefix}beside.subject"] = texts_to_numbers(names[stays])
    for name, facts in _facts(arrays):
        if facts.get("drift"):
            washed[name] = _written(facts | {"drift": _begun_anew(facts["drift"])})
    return washed, removed


def heed(learner: State, rows: Rows, folder: Path) -> State:
    """A saved learner, as a site may go on with it after people were forgotten.

    An older file that was put back brings nobody back: whom it remembers in spite of a tombstone is
    taken out. And rows of the day that lack a person's are the ones that were met with them.

    Args:
        learner: flat names to arrays.
        rows: of the day, without those of the forgotten.
        folder: where the tombstones of the site lie.

    Raises:
        CheckpointError: the tombstones or a memory cannot be read.
    """
    stones = read_tombstones(folder)
    if stones is None:
        return learner
    names = people_in(learner)
    gone = names[stones.places(names) >= 0].tolist()
    if gone:
        learner = purge(learner, gone)[0]
    before = known_as(rows, folder)
    return remarked(learner, before, fingerprint(rows)) if before else learner


def people_in(arrays: State) -> npt.NDArray[np.str_]:
    """Names of all whose rows a saved learner holds, each once."""
    held = [
        numbers_to_texts(array)
        for name, array in arrays.items()
        if name.endswith(("rows.subject", "beside.subject"))
    ]
    return np.unique(np.concatenate([np.empty(0, dtype=np.str_), *held]))


def remarked(arrays: State, before: Collection[str], after: str) -> Arrays:
    """A saved learner that knows the rows it has learned by another mark.

    Without it, rows of the day that lack a person's would be new ones, and be remembered twice.

    Args:
        arrays: flat names to arrays.
        before: marks of the rows with that person's; see :func:`fedistill.data.erased.known_as`.
        after: mark of those that are left.
    """
    told = dict(arrays)
    for name, facts in _facts(arrays):
        if facts.get("mark") in before:
            told[name] = _written(facts | {"mark": after})
    return told


def _before(arrays: State, ending: str) -> list[str]:
    return [name.removesuffix(ending) for name in arrays if name.endswith(ending)]


def _without(held: State, subjects: Sequence[str]) -> tuple[Arrays, int]:
    """A saved memory without these people, and how many rows left."""
    memory = ReplayBuffer(0, bytes(held["policy"]).decode())
    memory.load_state_dict(held)
    left = [memory.erase(subject).rows for subject in subjects]
    return memory.state_dict(), sum(left)


def _facts(arrays: State) -> Iterator[tuple[str, dict[str, Any]]]:
    """What learners note of themselves as JSON."""
    for name, array in arrays.items():
        if name.split(".")[-1] == "facts" and array.dtype == np.uint8:
            found = json.loads(bytes(array))
            if isinstance(found, dict):
                yield name, found


def _written(facts: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8).copy()


def _begun_anew(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a detector that has just been reset."""
    watcher = detector(saved["detector"], on=saved["on"], **saved["options"])
    watcher.load_state_dict(saved)
    watcher.reset()
    return watcher.state_dict()
