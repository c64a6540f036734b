"""The seam of drift detectors, and what ours share: they count rows, check values and save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from fedistill.continual.watch import VALUES, known, values
from fedistill.errors import FedistillError
from fedistill.types import FloatArray, Probs


class DriftState(IntEnum):
    """What a detector says of a block of values: the worst that it met there."""

    OK = 0
    WARN = 1
    DRIFT = 2


class Detector(Protocol):
    """Has the world moved? The seam: any object with these will do.

    Attributes:
        on: what it watches, a name of :data:`~fedistill.continual.watch.VALUES`.
        alarms: where the last :meth:`update` found drift, in rows since the first ever seen.
    """

    on: str
    alarms: tuple[int, ...]

    def update(self, values: npt.ArrayLike) -> DriftState:
        """Take the next values, in order; how they are cut into blocks changes no alarm."""
        ...

    def reset(self) -> None:
        """Forget what was seen; a model that was just replaced starts a new world."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, fit for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


def observe(detector: Detector, probs: Probs, labels: npt.ArrayLike | None = None) -> DriftState:
    """Show a detector a batch of predictions, as the values that it watches."""
    return detector.update(values(detector.on, probs, labels))


class Watcher(ABC):
    """Counts rows, checks values and saves; a detector adds ``_run`` and its own state."""

    name: ClassVar[str]
    columns: ClassVar[bool] = False

    def __init__(self, on: str, **options: Any) -> None:
        names = VALUES if self.columns else [name for name in VALUES if name != "predictions"]
        self.on = known(on, names)
        self.options = options
        self.seen = 0
        self.alarms: tuple[int, ...] = ()
        self.reset()

    def update(self, values: npt.ArrayLike) -> DriftState:
        """Take the next values, in order.

        Args:
            values: ``[rows]`` finite numbers, or one number; none changes nothing.

        Returns:
            The worst state met; where, if it is DRIFT, is in ``alarms``.

        Raises:
            FedistillError: values are not finite numbers of that shape; nothing has changed then.
        """
        block = self._block(values)
        state, found = self._run(block)
        self.alarms = tuple(self.seen + row for row in found)
        self.seen += len(block)
        return state

    @abstractmethod
    def reset(self) -> None:
        """Forget the values seen; the count of rows goes on."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly, fit for JSON.

        It holds values of single rows: after erasing a person's rows call :meth:`reset`.
        """
        return {
            "detector": self.name,
            "on": self.on,
            "options": dict(self.options),
            "seen": self.seen,
            "alarms": list(self.alarms),
            "held": self._save(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            FedistillError: it is the state of another detector, or of other options.
        """
        mine = {"detector": self.name, "on": self.on, "options": self.options}
        wrote = {key: state.get(key) for key in mine}
        if wrote != mine:
            raise FedistillError(
                f"drift: expected the state of {mine}, found that of {wrote}: resume with the "
                "detector and the options that wrote it"
            )
        self._load(state["held"])
        self.seen = int(state["seen"])
        self.alarms = tuple(int(row) for row in state["alarms"])

    @abstractmethod
    def _run(self, block: FloatArray) -> tuple[DriftState, list[int]]:
        """The worst state met in a block, and its rows with an alarm."""

    @abstractmethod
    def _save(self) -> dict[str, Any]:
        """What a detector holds, fit for JSON."""

    @abstractmethod
    def _load(self, held: Mapping[str, Any]) -> None:
        """Restore what :meth:`_save` gave."""

    def _block(self, values: npt.ArrayLike) -> FloatArray:
        try:
            block = np.atleast_1d(np.asarray(values, dtype=np.float64))
        except (TypeError, ValueError):
            block = np.empty((0, 0, 0))
        if block.ndim != 1 and not (self.columns and block.ndim == 2):
            shape = "[rows, columns]" if self.columns else "[rows]"
            raise FedistillError(
                f"{self.name}: expected numbers of shape {shape}, found "
                f"{type(values).__name__} {list(np.shape(block))}: give one value for each row"
            )
        finite = np.isfinite(block)
        if not finite.all():
            row = int(np.argwhere(~finite)[0, 0])
            raise FedistillError(
                f"{self.name}: expected finite values, row {row} is {block[row]}: leave out rows "
                "that cannot be predicted"
            )
        return block


def need(name: str, holds: bool, text: str) -> None:
    """Refuse an option.

    Raises:
        FedistillError: it does not hold; the text says what was expected and found.
    """
    if not holds:
        raise FedistillError(f"{name}: expected {text}")
