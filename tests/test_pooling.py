"""Pooling in oneDNN's layout: the bits of PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedistill.models import CNN, LeNet
from fedistill.pooling import MaxPool, convolve_and_pool

CONVOLUTIONS = {
    "first of lenet": (1, 6, 5, 2, 28),
    "second of lenet": (6, 16, 5, 0, 14),
    "3x3": (3, 8, 3, 1, 8),
    "odd": (2, 5, 5, 1, 9),
    "4x4": (2, 4, 4, 1, 8),
}
"""Channels in and out, kernel, padding, and the side of an image."""
IMAGES = ("random", "constant", "zero", "background", "negative", "nan", "infinite", "huge")


def images(kind, *shape, seed=0):
    torch.manual_seed(seed)
    made = torch.rand(shape)
    if kind == "constant":
        made[:] = 0.3
    elif kind == "zero":
        made[:] = 0.0
    elif kind == "background":
        made[..., : shape[-1] // 3] = 0.0
        made[..., shape[-1] // 2 :, :] = 1.0
    elif kind == "negative":
        made -= 2.0
    elif kind in ("nan", "infinite", "huge"):
        made[0, 0, 1, 2:4] = {"nan": math.nan, "infinite": -math.inf, "huge": 3e38}[kind]
    return made


def found(function, module, inputs, incoming):
    """Values, the gradient of the inputs and those of the weights."""
    module.zero_grad()
    inputs = inputs.clone().requires_grad_()
    values = function(inputs)
    values.backward(incoming)
    return [values.detach(), inputs.grad, *(weight.grad for weight in module.parameters())]


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_pool_have_the_bits_of_both_apart(name, rows, kind):
    before, after, kernel, padding, side = CONVOLUTIONS[name]
    inputs = images(kind, rows, before, side, side)
    layer = nn.Conv2d(before, after, kernel, padding=padding)
    plain = F.max_pool2d(layer(inputs), 2)
    incoming = torch.randn(plain.shape)
    ours = found(lambda x: convolve_and_pool(layer, x), layer, inputs, incoming)
    theirs = found(lambda x: F.max_pool2d(layer(x), 2), layer, inputs, incoming)
    assert_same(ours, theirs)
    with torch.inference_mode():
        assert_same([convolve_and_pool(layer, inputs)], [plain])


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 2, 2), (4, 16, 9, 7), (3, 6, 28, 28)])
def test_a_pool_has_the_bits_of_max_pool2d(shape, kind):
    inputs = images(kind, *shape[:3], max(shape[3], 4))[..., : shape[3]]
    incoming = torch.randn(F.max_pool2d(inputs, 2).shape)
    pool = MaxPool()
    ours = found(pool, pool, inputs, incoming)
    assert_same(ours, found(lambda x: F.max_pool2d(x, 2), pool, inputs, incoming))


def test_a_tied_window_gives_its_gradient_to_the_first_of_its_largest():
    inputs = torch.tensor([[1.0, 1.0, 0.0, 2.0], [1.0, 1.0, 2.0, 2.0]]).reshape(1, 1, 2, 4)
    pool = MaxPool()
    _, gradient = found(pool, pool, inputs, torch.tensor([[[[5.0, 7.0]]]]))
    assert gradient.reshape(2, 4).tolist() == [[5, 0, 0, 7], [0, 0, 0, 0]]


def test_windows_of_minus_infinity_or_nan_stay_what_they_are():
    inputs = torch.zeros(1, 1, 2, 4)
    inputs[..., :2] = -math.inf
    inputs[..., 0, 2] = math.nan
    assert MaxPool()(inputs).flatten()[0] == -math.inf
    assert MaxPool()(inputs).flatten()[1].isnan()


@pytest.mark.parametrize("kind", ["random", "background"])
def test_lenet_trains_and_predicts_with_the_bits_of_its_plain_layers(kind):
    inputs = images(kind, 30, 1, 28, 28)
    model = LeNet()

    def plain(rows):
        hidden = F.relu(F.max_pool2d(model.conv1(rows), 2))
        hidden = F.relu(F.max_pool2d(model.conv2(hidden), 2)).flatten(1)
        return model.head(F.relu(model.fc2(F.relu(model.fc1(hidden)))))

    incoming = torch.randn(30, 10)
    assert_same(found(model, model, inputs, incoming), found(plain, model, inputs, incoming))
    with torch.inference_mode():
        assert torch.equal(model(inputs), plain(inputs))


@pytest.mark.parametrize("kind", ["random", "background"])
def test_the_cnn_has_the_bits_of_relu_before_pool(kind):
    inputs = images(kind, 6, 3, 16, 16)
    model = CNN(3, 4, width=8)
    layers = list(model.trunk)
    for index, layer in enumerate(layers):
        if isinstance(layer, MaxPool):
            layers[index : index + 2] = [nn.ReLU(), nn.MaxPool2d(2)]
    trunk = nn.Sequential(*layers)
    assert any(isinstance(layer, nn.MaxPool2d) for layer in trunk)
    incoming = torch.randn(6, 4)
    theirs = found(lambda x: model.head(trunk(x).mean(dim=(2, 3))), model, inputs, incoming)
    assert_same(found(model, model, inputs, incoming), theirs)


def test_float64_takes_the_plain_way_and_its_gradient_is_right():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 5, padding=2).double()
    inputs = torch.rand(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: convolve_and_pool(layer, x), inputs)
    assert torch.autograd.gradcheck(MaxPool(), inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same"},
        {"padding": 3, "padding_mode": "circular"},
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"bias": False},
    ],
    ids=str,
)
def test_any_convolution_may_feed_a_pool(options):
    torch.manual_seed(0)
    layer, inputs = nn.Conv2d(2, 4, 5, **options), torch.rand(3, 2, 12, 12)
    plain = F.max_pool2d(layer(inputs), 2)
    ours = found(lambda x: convolve_and_pool(layer, x), layer, inputs, torch.ones_like(plain))
    theirs = found(lambda x: F.max_pool2d(layer(x), 2), layer, inputs, torch.ones_like(plain))
    assert_same(ours, theirs)


def test_no_rows_are_no_rows():
    layer = nn.Conv2d(1, 2, 5, padding=2)
    assert convolve_and_pool(layer, torch.zeros(0, 1, 4, 4)).shape == (0, 2, 2, 2)
    assert MaxPool()(torch.zeros(0, 2, 4, 4)).shape == (0, 2, 2, 2)


def test_a_hook_of_the_convolution_sees_an_ordinary_tensor():
    seen = []
    layer = nn.Conv2d(1, 2, 5, padding=2)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pooled = convolve_and_pool(layer, torch.rand(3, 1, 4, 4))
    assert torch.equal(F.max_pool2d(seen[0], 2), pooled)
    assert not seen[0].is_mkldnn


def test_per_row_gradients_by_torch_func():
    torch.manual_seed(0)
    model = CNN(1, 3, width=4)
    lenet = LeNet(3)
    for module, side in ((model, 8), (lenet, 28)):
        rows = torch.rand(3, 1, side, side)
        weights = {name: weight.detach() for name, weight in module.named_parameters()}

        def loss(weights, row, module=module):
            return torch.func.functional_call(module, weights, (row[None],)).square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, rows)
        module.zero_grad()
        module(rows).square().sum().backward()
        for name, weight in module.named_parameters():
            torch.testing.assert_close(gradients[name].sum(0), weight.grad, rtol=1e-3, atol=1e-5)


def test_autocast_and_a_switched_off_onednn_take_the_plain_way():
    layer, inputs = nn.Conv2d(1, 2, 5, padding=2), torch.rand(2, 1, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolve_and_pool(layer, inputs).dtype == torch.bfloat16
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        torch.testing.assert_close(convolve_and_pool(layer, inputs), F.max_pool2d(layer(inputs), 2))
    finally:
        torch.backends.mkldnn.enabled = before
