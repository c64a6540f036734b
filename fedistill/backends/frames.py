"""What crosses the pipe between a run and its workers: a JSON header and bytes behind it."""

from __future__ import annotations

import builtins
import json
import traceback
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np

from fedistill import errors
from fedistill.types import FloatArray

LENGTH = 4

Header = dict[str, Any]


def frame(header: Header, body: bytes = b"") -> bytes:
    """A header and what it speaks of.

    >>> unframe(frame({"do": "measure"}, b"rows"))
    ({'do': 'measure'}, b'rows')
    """
    text = json.dumps(header).encode()
    return b"".join([len(text).to_bytes(LENGTH, "little"), text, body])


def unframe(data: bytes) -> tuple[Header, bytes]:
    """What :func:`frame` joined."""
    end = LENGTH + int.from_bytes(data[:LENGTH], "little")
    header: Header = json.loads(data[LENGTH:end])
    return header, data[end:]


@dataclass(frozen=True)
class Shared:
    """An array that several processes look at; there is one copy of it, in memory without a name.

    Attributes:
        memory: of the array; it travels when a process is started, and only then.
        shape: of the array.
    """

    memory: Any
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: FloatArray, context: BaseContext) -> Shared:
        """A copy that can be shared."""
        memory = context.RawArray("B", max(array.nbytes, 1))
        np.frombuffer(memory, np.uint8)[: array.nbytes] = array.reshape(-1).view(np.uint8)
        return cls(memory, array.shape)

    def array(self) -> FloatArray:
        """The array, not to be changed."""
        size = int(np.prod(self.shape))
        return np.frombuffer(self.memory, np.float32, size).reshape(self.shape)


# --- errors --------------------------------------------------------------------------------------


def told(error: BaseException) -> Header:
    """An error in words."""
    return {
        "kind": type(error).__name__,
        "module": type(error).__module__,
        "text": str(error),
        "trace": "".join(traceback.format_exception(error)),
    }


def as_it_was(error: Header, where: str) -> Exception:
    """The error of another process, of its own class where that is ours or Python's.

    Args:
        error: what :func:`told` gave.
        where: what to call that process.
    """
    homes = {"builtins": builtins, errors.__name__: errors}
    kind = getattr(homes.get(error["module"]), error["kind"], None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        made = kind.__new__(kind)
        made.args = (error["text"],)
    else:
        made = RuntimeError(f"{error['kind']}: {error['text']}")
    made.add_note(f"in {where}:\n{error['trace']}")
    return made
