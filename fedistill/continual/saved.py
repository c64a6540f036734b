"""A buffer as flat names to arrays of numbers, and back: nothing that could carry code."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.continual.storage import Columns, numbers_to_texts, texts_to_numbers
from fedistill.errors import CheckpointError
from fedistill.types import State


def generator_to_words(random: np.random.Generator) -> npt.NDArray[np.uint64]:
    """``[13]`` where a Philox generator stands."""
    state: Any = random.bit_generator.state
    rest = [state["buffer_pos"], state["has_uint32"], state["uinteger"]]
    parts = [state["state"]["counter"], state["state"]["key"], state["buffer"], rest]
    return np.concatenate([np.asarray(part, dtype=np.uint64) for part in parts])


def generator_from_words(words: npt.NDArray[Any]) -> np.random.Generator:
    """A generator that stands where :func:`generator_to_words` was called."""
    philox = np.random.Philox()
    words = np.asarray(words, dtype=np.uint64)
    philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": words[:4].copy(), "key": words[4:6].copy()},
        "buffer": words[6:10].copy(),
        "buffer_pos": int(words[10]),
        "has_uint32": int(words[11]),
        "uinteger": int(words[12]),
    }
    return np.random.Generator(philox)


def rows_to_state(rows: Columns) -> dict[str, npt.NDArray[Any]]:
    """Columns under ``rows.``, texts as code points."""
    return {
        f"rows.{name}": texts_to_numbers(column) if column.dtype.kind == "U" else column
        for name, column in rows.items()
    }


def rows_from_state(state: State) -> Columns:
    """What :func:`rows_to_state` was given.

    Raises:
        CheckpointError: columns of different lengths.
    """
    rows = {
        name.removeprefix("rows."): np.array(column)
        for name, column in state.items()
        if name.startswith("rows.")
    }
    if "subject" in rows:
        rows["subject"] = numbers_to_texts(rows["subject"])
    if len({len(column) for column in rows.values()}) > 1:
        raise CheckpointError(
            "the saved buffer has columns of different lengths: it is damaged, put a copy back"
        )
    return rows
