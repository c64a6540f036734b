"""Norms and clipped sums against Opacus's gradients of single rows."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedistill import models
from fedistill.privacy import gram
from fedistill.privacy.by_gram import ByGram, gram_engine
from fedistill.privacy.quiet import import_opacus
from fedistill.privacy.rowwise import cross_entropy, factors_of

ROWS, CLIP = 7, 0.3
TOLERANCE = 4e-5
"""What may be lost to rounding is added to norms."""
RANDOM = torch.Generator().manual_seed(2)
FLAT = torch.randn(ROWS, 6, generator=RANDOM)
SERIES = torch.randn(ROWS, 5, 6, generator=RANDOM)
IMAGES = torch.randn(ROWS, 4, 9, 9, generator=RANDOM)
DIGITS = torch.rand(ROWS, 1, 28, 28, generator=RANDOM)
WORDS = torch.randint(0, 9, (ROWS, 5), generator=RANDOM)
LABELS = torch.arange(ROWS) % 3


class At(nn.Module):
    """Layers, then the mean over all that is left of places, then a head."""

    def __init__(self, *layers, width):
        super().__init__()
        self.trunk, self.head = nn.Sequential(*layers), nn.Linear(width, 3)

    def forward(self, inputs):
        hidden = self.trunk(inputs)
        if hidden.dim() == 4:
            return self.head(torch.tanh(hidden).mean((2, 3)))
        return self.head(torch.tanh(hidden).mean(1) if hidden.dim() == 3 else torch.tanh(hidden))


def frozen_bias():
    module = models.MLP(6, 3, width=8)
    module.trunk[0].bias.requires_grad_(False)
    return module


def frozen_weight():
    module = models.MLP(6, 3, width=8)
    module.trunk[0].weight.requires_grad_(False)
    return module


CASES = {
    "linear": (partial(models.Linear, 6, 3), FLAT),
    "mlp": (partial(models.MLP, 6, 3, width=8, depth=2), FLAT),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 3, bias=False)), FLAT),
    "frozen bias": (frozen_bias, FLAT),
    "frozen weight": (frozen_weight, FLAT),
    "few positions": (lambda: At(nn.Linear(6, 16), width=16), SERIES),
    "many positions": (lambda: At(nn.Linear(6, 3), width=3), SERIES),
    "two dimensions of positions": (
        lambda: At(nn.Unflatten(1, (1, 5)), nn.Linear(6, 16), nn.Flatten(1, 2), width=16),
        SERIES,
    ),
    "lenet": (partial(models.LeNet, 3), DIGITS),
    "cnn": (partial(models.CNN, 4, 3, width=4), IMAGES),
    "few places": (lambda: At(nn.Conv2d(4, 32, 5, stride=3), width=32), IMAGES),
    "strides": (lambda: At(nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 2), (2, 1)), width=6), IMAGES),
    "groups": (lambda: At(nn.Conv2d(4, 8, 3, groups=2, padding=1), width=8), IMAGES),
    "groups, few places": (lambda: At(nn.Conv2d(4, 64, 5, stride=3, groups=2), width=64), IMAGES),
    "one by one": (lambda: At(nn.Conv2d(4, 8, 1, bias=False), width=8), IMAGES),
    "group norm": (lambda: At(nn.GroupNorm(2, 4), width=4), IMAGES),
    "group norm of features": (lambda: At(nn.Linear(6, 8), nn.GroupNorm(2, 8), width=8), FLAT),
    "layer norm": (lambda: At(nn.LayerNorm(6), width=6), SERIES),
    "layer norm of pictures": (lambda: At(nn.LayerNorm((4, 9, 9)), width=4), IMAGES),
    "words": (lambda: At(nn.Embedding(9, 8), nn.Linear(8, 8), width=8), WORDS),
}


def made(build):
    torch.manual_seed(0)
    return build().train()


def by_opacus(module, inputs, labels, clip=CLIP):
    """Norms and clipped sums from a gradient for every row."""
    import_opacus()
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(module, loss_reduction="sum")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        F.cross_entropy(wrapped(inputs), labels, reduction="sum").backward()
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    rows = [weight.grad_sample for weight in weights]
    norms = torch.stack([part.flatten(1).norm(dim=1) for part in rows]).norm(dim=0)
    factors = (clip / (norms + 1e-6)).clamp(max=1.0)
    sums = [torch.einsum("n,n...->...", factors, part) for part in rows]
    wrapped.cleanup()
    for weight in weights:
        weight.grad = weight.grad_sample = None
    return norms, sums


def by_gram(module, inputs, labels, clip=CLIP, loss=cross_entropy):
    """The same, by autograd and hooks or by hand."""
    engine = gram_engine(module, loss, clip)
    engine.open()
    part = inputs, labels, None
    sums = [
        torch.zeros_like(w, requires_grad=False) for w in module.parameters() if w.requires_grad
    ]
    norms = engine.norms(part)
    engine.add(part, sums, 1.0)
    engine.close()
    return norms, sums


def listening(module, inputs, labels, clip=CLIP):
    """By autograd and hooks, also where a pass by hand would do."""
    return by_gram(module, inputs, labels, clip, lambda *args: cross_entropy(*args))


def assert_equal(found, wanted, tolerance=TOLERANCE):
    """Relative to the largest value of each tensor; norms may be too long and not too short."""
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=0)
    assert bool((found[0] >= wanted[0] * (1 - 2e-6)).all())
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def length(sums):
    return float(torch.cat([tensor.flatten().double() for tensor in sums]).norm())


@pytest.mark.parametrize("clip", [CLIP, 1e3])
@pytest.mark.parametrize("name", CASES)
def test_norms_and_sums_are_those_of_opacus(name, clip):
    build, inputs = CASES[name]
    module = made(build)
    wanted = by_opacus(module, inputs, LABELS, clip)
    assert_equal(listening(module, inputs, LABELS, clip), wanted)
    assert_equal(by_gram(module, inputs, LABELS, clip), wanted)


@pytest.mark.parametrize(("chunk", "kept"), [(1, 1 << 20), (1, 0), (700, 0), (1 << 20, 0)])
@pytest.mark.parametrize("name", ["few positions", "many positions", "lenet", "groups", "words"])
def test_some_rows_at_a_time_is_the_same(monkeypatch, name, chunk, kept):
    build, inputs = CASES[name]
    module = made(build)
    wanted = by_opacus(module, inputs, LABELS)
    monkeypatch.setattr(gram, "CHUNK_VALUES", chunk)
    monkeypatch.setattr(gram, "KEPT_VALUES", kept)
    assert_equal(by_gram(module, inputs, LABELS), wanted)


@pytest.mark.parametrize(
    ("name", "formed"),
    [
        ("few positions", False),
        ("many positions", True),
        ("few places", False),
        ("groups, few places", False),
        ("groups", True),
        ("lenet", True),
    ],
)
def test_gradients_of_rows_are_formed_only_where_they_are_small(monkeypatch, name, formed):
    build, inputs = CASES[name]
    plain, calls = gram._gram, []
    monkeypatch.setattr(gram, "_gram", lambda *args: (calls.append(1), plain(*args))[1])
    by_gram(made(build), inputs, LABELS)
    assert bool(calls) is not formed


@pytest.mark.parametrize("name", ["mlp", "cnn", "few positions", "words"])
def test_a_single_row(name):
    build, inputs = CASES[name]
    module = made(build)
    assert_equal(by_gram(module, inputs[:1], LABELS[:1]), by_opacus(module, inputs[:1], LABELS[:1]))


@pytest.mark.parametrize("run", [by_gram, listening])
def test_rows_without_a_gradient(run):
    """Inputs of zero leave the bias; a row that is certain has no gradient at all."""
    module, inputs = made(CASES["mlp"][0]), FLAT.clone()
    inputs[0] = 0.0
    assert_equal(run(module, inputs, LABELS), by_opacus(module, inputs, LABELS))
    with torch.no_grad():
        module.head.bias.copy_(torch.tensor([500.0, 0.0, 0.0]))
    certain = torch.zeros(ROWS, dtype=torch.long)
    norms, sums = run(module, inputs, certain)
    assert float(norms.max()) < 1e-15
    assert length(sums) == 0


@pytest.mark.parametrize("run", [by_gram, listening])
def test_huge_gradients(run):
    module, inputs = made(CASES["mlp"][0]), FLAT.clone()
    inputs[2] *= 1e12
    wanted = by_opacus(module, inputs, LABELS)
    assert float(wanted[0].max()) > 1e8
    assert_equal(run(module, inputs, LABELS), wanted)


@pytest.mark.parametrize("run", [by_gram, listening])
def test_a_gradient_that_is_too_long_to_be_measured_adds_nothing(run):
    """Finite, with a norm beyond float32, as with Opacus; the others count."""
    module, inputs = made(CASES["linear"][0]), FLAT.clone()
    inputs[2] = 1e25
    others = torch.arange(ROWS) != 2
    norms, sums = run(module, inputs, LABELS)
    assert norms[2] == torch.inf
    assert_equal((norms[others], sums), run(module, inputs[others], LABELS[others]))


@pytest.mark.parametrize(("seen", "delta"), [(1e19, 1e-23), (1e-23, 1e19), (1e18, 1e-24)])
def test_what_float32_loses_does_not_make_a_gradient_short(seen, delta):
    """The square of 1e-23 is 0."""
    found = gram.squared_lengths(torch.full((1, 1), seen), torch.full((1, 1), delta), bias=False)
    assert float(found.sqrt()) >= 0.999 * seen * delta


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["linear", "mlp", "cnn", "few positions", "few places", "words"]),
    power=st.integers(-20, 24),
    clip=st.sampled_from([1e-4, 1.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_no_row_moves_the_sum_by_more_than_the_norm(name, power, clip, seed):
    """Inputs of any size, and weights that make up for it."""
    build, _ = CASES[name]
    module, random = made(build), torch.Generator().manual_seed(seed)
    inputs = CASES[name][1][seed % ROWS][None]
    if inputs.is_floating_point():
        inputs = inputs * torch.randn(inputs.shape, generator=random) * 10.0**power
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(10.0 ** float(torch.randint(-3, 4, (), generator=random)))
    for run in (by_gram, listening):
        sums = run(module, inputs, LABELS[:1], clip)[1]
        assert not length(sums) > clip * (1 + 1e-3)


class Alternating(nn.Module):
    """Places count with alternating signs: of equal ones nothing is left."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.mix = layer, layer.weight.new_ones(3, len(layer.weight))
        self.mix.normal_(generator=torch.Generator().manual_seed(0))

    def forward(self, inputs):
        hidden = self.layer(inputs)
        places = hidden.transpose(1, 2) if hidden.dim() == 3 else hidden.flatten(2)
        signs = 1.0 - 2.0 * (torch.arange(places.shape[2]) % 2)
        return (places * signs).sum(2) @ self.mix.T


@pytest.mark.parametrize("kept", [1 << 24, 0])
@pytest.mark.parametrize(
    ("layer", "steady", "shape"),
    [
        (lambda: nn.Linear(6, 64, bias=False), (1, 6), (8, 6)),
        (lambda: nn.Linear(6, 4, bias=False), (1, 6), (8, 6)),
        (lambda: nn.Conv2d(3, 64, 3, bias=False), (3, 1, 1), (3, 4, 4)),
        (lambda: nn.Conv2d(3, 5, 3, bias=False), (3, 1, 1), (3, 4, 4)),
    ],
)
def test_positions_that_cancel_do_not_hide_a_long_gradient(monkeypatch, layer, steady, shape, kept):
    """Terms of 1e9 of which rounding may leave anything: what is added is short all the same."""
    monkeypatch.setattr(gram, "KEPT_VALUES", kept)
    module, longest = made(lambda: Alternating(layer())), 0.0
    for seed in range(40):
        random = torch.Generator().manual_seed(seed)
        inputs = 1e9 * torch.randn(steady, generator=random).expand(shape)
        inputs = inputs + 1e2 * torch.randn(shape, generator=random)
        sums = listening(module, inputs[None], LABELS[:1], 1.0)[1]
        longest = max(longest, length(sums[:1]))
    assert 0 < longest <= 1 + 1e-3


def contribution(layer, seen, delta, clip):
    """Of each row by itself, in clipping norms, from exact sums of what is released."""
    with torch.no_grad():
        found = gram.measure(layer, seen, delta)
        factors = factors_of(found.squares.sqrt(), clip)
        each = [found.summed(factors * row).values() for row in torch.eye(len(seen))]
    return max(length(sums) for sums in each) / clip


def absorbed(values, lead=16):
    """Two vectors whose product loses its small terms to the large first ones."""
    first = torch.full((values,), 2.0**-12.6)
    second = first.clone()
    first[:lead], second[:lead] = 1.0, -1.0
    return torch.stack([first, second])[None]


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("count", [128, 2048])
@pytest.mark.parametrize("kind", ["outputs", "inputs", "words"])
def test_small_terms_of_long_products_are_not_lost(kind, count, size):
    """Up to 15 clipping norms, where each product rounds but once."""
    far, near = size * absorbed(count), torch.zeros(1, 2, 64)
    if kind == "outputs":
        near[..., 0] = 1.0
        found = contribution(nn.Linear(64, count, bias=False), near, far, 1.0)
    elif kind == "inputs":
        near[0, :, 0] = torch.tensor([1.0, -1.0])
        far[0, 1] = -far[0, 1]
        found = contribution(nn.Linear(count, 64, bias=False), far, near, 1.0)
    else:
        words = torch.zeros(1, 2, dtype=torch.long)
        found = contribution(nn.Embedding(10, count), words, far, 1.0)
    assert 0 < found <= 1 + 1e-3


@pytest.mark.parametrize(("seen", "delta"), [(1e17, 2.5e-23), (2.5e-23, 1e17)])
@pytest.mark.parametrize("shape", [(30, 1000, 2000), (4, 64, 64)])
def test_small_numbers_at_many_positions_are_not_lost(shape, seen, delta):
    """Each of their products is 0 in float32."""
    places, inputs, outputs = shape
    given = torch.full((1, places, inputs), seen), torch.full((1, places, outputs), delta)
    assert contribution(nn.Linear(inputs, outputs, bias=False), *given, 1e-3) <= 1 + 1e-3


def test_the_length_of_a_million_values():
    """Added up in float32, 0.17 % of the square would be missing."""
    values = torch.full((1, 10**6), 2.0**-12.55)
    values[:, :16] = 1.0
    assert float(gram._square(values)) == pytest.approx(float(values.double().square().sum()), 1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3), nn.Embedding(4, 4)])
def test_half_precision_is_not_measured(layer):
    assert gram.known(layer.double())
    for dtype in (torch.bfloat16, torch.float16):
        assert not gram.known(layer.to(dtype))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv1d(4, 4, 3),
        nn.Embedding(4, 4, padding_idx=0),
        nn.Embedding(4, 4, max_norm=1.0),
        nn.Embedding(4, 4, sparse=True),
        nn.Embedding(4, 4, scale_grad_by_freq=True),
        nn.Bilinear(2, 2, 2),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ],
    ids=str,
)
def test_layers_that_are_left_to_opacus(layer):
    assert not gram.known(layer)


def test_a_layer_that_somebody_changed_is_left_to_opacus():
    heard, replaced, more = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    heard.register_forward_hook(lambda layer, given, gave: 2 * gave)
    replaced.forward = lambda inputs: F.linear(inputs, 2 * replaced.weight)
    more.scale = nn.Parameter(torch.ones(1))
    for layer in (heard, replaced, more):
        assert not gram.known(layer)
    assert gram.known(nn.Linear(4, 4))


def test_engines_by_module_and_loss():
    module = made(CASES["mlp"][0])
    assert not isinstance(gram_engine(module, cross_entropy, 1.0), ByGram)
    assert isinstance(gram_engine(module, lambda *args: cross_entropy(*args), 1.0), ByGram)
    assert isinstance(gram_engine(made(CASES["cnn"][0]), cross_entropy, 1.0), ByGram)
