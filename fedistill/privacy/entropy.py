"""Randomness that nobody can repeat: from the operating system, never from a seed of the run.

Noise and the choice of the rows of a step have to be secret, or the guarantee is void: who knows
the seed subtracts the noise. Nothing here is derived from the experiment's seed, so that two
clients of one run, and two runs of one client, have noise of their own (fault 63). A private run is
therefore the only kind of run here that cannot be repeated to the byte.

What this is not: a cryptographic generator. PyTorch offers none (torchcsprng is dead), and normal
variates in floating point have gaps of their own (Mironov 2012). The report says so.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

RNG = "torch mt19937 (CPU) or philox (CUDA), OS-seeded, not a CSPRNG"
"""What a report says of it."""

_WORDS = 624
_HEADER = 24
"""Bytes of PyTorch's saved Mersenne twister before its words: seed, two counters, position."""


def generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on this device, from the operating system's entropy.

    On the CPU all 624 words of the twister are drawn: PyTorch would seed it from the low 32 bits of
    a seed, which can be tried out one by one.
    """
    made = torch.Generator(device=device)
    made.manual_seed(secrets.randbits(63))
    if made.device.type == "cpu":
        state = made.get_state().numpy()
        words = np.frombuffer(secrets.token_bytes(4 * _WORDS), dtype=np.uint32)
        state[_HEADER : _HEADER + 8 * _WORDS] = words.astype(np.uint64).view(np.uint8)
        made.set_state(torch.from_numpy(state))
    return made


def numpy_generator() -> np.random.Generator:
    """A NumPy generator from 256 bits of the operating system's entropy."""
    return np.random.Generator(np.random.PCG64DXSM(secrets.randbits(256)))


@contextmanager
def unrepeatable() -> Iterator[None]:
    """Run a block under global torch generators of its own (dropout draws from them).

    Dropout masks go to rows by their place in a batch, and one row less moves all that follow. Only
    masks that are drawn independently and not known leave the other rows' gradients as they are in
    law, as the analysis of DP-SGD needs it.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(secrets.randbits(63))
        torch.set_rng_state(generator().get_state())
        yield
