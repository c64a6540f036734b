"""The largest key that ever left a buffer: what comes with a smaller one is refused.

A buffer with keys for life holds rows above its threshold only. That is what makes the merge of
two buffers, or a smaller buffer, the same as one that had seen the stream alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedistill.types import FloatArray, IntArray


class Thresholds:
    """One threshold for each group (class, or 0 for all); equal keys are told apart by ``uniform``.

    Attributes:
        groups: ``[g]`` int64, ascending.
        keys: ``[g]`` float64.
        uniform: ``[g]`` float64.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Admit everything again."""
        self.groups: IntArray = np.empty(0, dtype=np.int64)
        self.keys: FloatArray = np.empty(0)
        self.uniform: FloatArray = np.empty(0)

    def __len__(self) -> int:
        return len(self.groups)

    def admit(
        self, groups: IntArray, keys: FloatArray, uniform: FloatArray
    ) -> npt.NDArray[np.bool_]:
        """``[n]`` whether a row is above the threshold of its group."""
        if not len(self):
            return np.ones(len(groups), dtype=bool)
        place = np.minimum(np.searchsorted(self.groups, groups), len(self) - 1)
        key, tie = self.keys[place], self.uniform[place]
        above: npt.NDArray[np.bool_] = (keys > key) | ((keys == key) & (uniform > tie))
        above |= self.groups[place] != groups
        return above

    def lift(self, groups: IntArray, keys: FloatArray, uniform: FloatArray) -> None:
        """Rows leave: thresholds rise to the largest of each group."""
        if not len(groups):
            return
        groups = np.concatenate([self.groups, groups])
        keys = np.concatenate([self.keys, keys])
        uniform = np.concatenate([self.uniform, uniform])
        order = np.lexsort((uniform, keys, groups))
        ordered = groups[order]
        largest = np.ones(len(order), dtype=bool)
        np.not_equal(ordered[1:], ordered[:-1], out=largest[:-1])
        last = order[largest]
        self.groups, self.keys, self.uniform = groups[last], keys[last], uniform[last]
