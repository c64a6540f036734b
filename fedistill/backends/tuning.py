"""How many clients side by side, and how many rows at once: by what a machine is."""

from __future__ import annotations

import functools
import re
from pathlib import Path

CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
CACHED_BYTES = (4 << 20, 16 << 20)
"""Of weights and momentum of a block, at least and at most."""
LARGEST_BLOCK = 25
"""Clients side by side; beyond this the stacks grow and nothing is gained."""
PREDICT_ROWS = 500
"""Rows of one product when predicting."""


def block_of(weights: int) -> int:
    """How many clients with this many weights to train side by side.

    Their weights and momentum fill an eighth of the processor's last cache, which others share.
    """
    least, most = CACHED_BYTES
    room = min(max(last_cache() // 8, least), most)
    return min(max(room // (8 * weights), 1), LARGEST_BLOCK)


@functools.cache
def last_cache() -> int:
    """Bytes of the processor's largest cache; 0 where the system does not say."""
    said = [path.read_text().strip() for path in CACHE.glob("index*/size")]
    sizes = [re.fullmatch(r"(\d+)([KM])", size) for size in said]
    return max((int(size[1]) << {"K": 10, "M": 20}[size[2]] for size in sizes if size), default=0)
