"""Randomness that nobody can repeat."""

from __future__ import annotations

import numpy as np
import torch

from fedistill.privacy import entropy


def test_two_generators_differ_under_one_global_seed():
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(torch.randn(8, generator=entropy.generator()))
    assert not torch.equal(*drawn)


def test_a_numpy_generator_is_of_its_own_too():
    first, second = (entropy.numpy_generator().random(8) for _ in range(2))
    assert not np.array_equal(first, second)


def test_more_than_32_bits_of_a_seed_count(monkeypatch):
    """PyTorch's own seeding of the CPU generator forgets the upper half of a seed."""
    plain = [torch.Generator().manual_seed(5 + (high << 32)) for high in (0, 1)]
    assert torch.equal(*(torch.randn(8, generator=one) for one in plain))
    monkeypatch.setattr(entropy.secrets, "randbits", lambda bits: 5)
    first, second = (torch.randn(8, generator=entropy.generator()) for _ in range(2))
    assert not torch.equal(first, second)


def test_the_whole_state_comes_from_the_system(monkeypatch):
    words = np.arange(624, dtype=np.uint32)
    monkeypatch.setattr(entropy.secrets, "token_bytes", lambda count: words.tobytes()[:count])
    state = entropy.generator().get_state().numpy()
    np.testing.assert_array_equal(state[24 : 24 + 8 * 624].view(np.uint64), words)


def test_a_generator_is_fair():
    drawn = torch.randn(200_000, generator=entropy.generator())
    assert abs(float(drawn.mean())) < 6 / 200_000**0.5
    assert abs(float(drawn.std()) - 1) < 0.02
    coins = torch.rand(200_000, generator=entropy.generator())
    assert abs(float((coins < 0.3).float().mean()) - 0.3) < 0.01


def test_a_block_draws_otherwise_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    drawn = []
    for _ in range(2):
        with entropy.unrepeatable():
            drawn.append(torch.rand(4))
    assert not torch.equal(*drawn)
    assert torch.equal(torch.rand(4), expected)
