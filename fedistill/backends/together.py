"""Students of one kind side by side: gathered into stacks, trained and asked together, put back."""

from __future__ import annotations

CACHED_BYTES = 4 << 20
"""Of weights and momentum of a block: well inside the cache of one core and its neighbours."""
LARGEST_BLOCK = 25
"""Clients side by side; beyond this the stacks grow and nothing is gained."""


def block_of(weights: int) -> int:
    """How many clients with this many weights to train side by side."""
    return min(max(CACHED_BYTES // (8 * weights), 1), LARGEST_BLOCK)
