"""Pieces of a convolution: together against the convolution itself, each as a linear map."""

import pytest
import torch
from torch.nn import functional as F

from fedistill.byhand.patches import (
    Geometry,
    collect,
    gather,
    pool,
    scatter,
    seen,
    spread,
    unpool,
)

GEOMETRIES = {
    "first of lenet": Geometry(1, 6, 5, 2, 28, 28),
    "second of lenet": Geometry(6, 16, 5, 0, 14, 14),
    "odd image": Geometry(2, 3, 5, 1, 9, 8),
    "even kernel": Geometry(2, 3, 4, 1, 7, 9),
    "one window": Geometry(3, 2, 5, 0, 6, 6),
    "unread edge": Geometry(1, 2, 4, 0, 6, 8),
}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=GEOMETRIES, ids=str)
def at(request):
    return GEOMETRIES[request.param]


@pytest.mark.parametrize("rows", [1, 4])
def test_places_of_windows_are_those_of_the_convolution(at, rows):
    images = drawn(rows, at.before, at.height, at.width)
    kernel = drawn(at.after, at.before, at.kernel, at.kernel, seed=1)
    high, wide = at.windows
    stripes = gather(images.permute(2, 1, 3, 0), at)
    found = (spread(kernel, at) @ seen(stripes, at)).view(high, 2, 2, at.after, wide, rows)
    wanted = F.conv2d(images, kernel, padding=at.padding)
    for down in (0, 1):
        for right in (0, 1):
            place = wanted[:, :, down : 2 * high : 2, right : 2 * wide : 2]
            torch.testing.assert_close(found[:, down, right].permute(3, 1, 0, 2), place)


def test_scatter_is_the_transpose_of_gather(at):
    images = drawn(at.height, at.before, at.width, 3)
    stripes = drawn(*gather(images, at).shape, seed=1)
    one, other = (gather(images, at) * stripes).sum(), (images * scatter(stripes, at)).sum()
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_collect_is_the_transpose_of_spread(at):
    kernel = drawn(at.after, at.before, at.kernel, at.kernel)
    matrix = drawn(*spread(kernel, at).shape, seed=1)
    one, other = (spread(kernel, at) * matrix).sum(), (kernel * collect(matrix, at)).sum()
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_pool_by_hand_sends_gradients_to_the_first_largest_of_a_window():
    windows = [
        [0, 0, 0, 0],
        [1, 2, 2, 2],
        [1, 0, 3, 3],
        [-4, -5, -3, -9],
        [5, 5, 1, 6],
        [7, 7, 7, 1],
    ]
    places = torch.tensor(windows, dtype=torch.float32).view(2, -1, 2, 2).movedim(1, -1)
    largest, choice = pool(places.clone(), True)
    assert largest.tolist() == [[0, 2, 3], [-3, 6, 7]]
    assert torch.equal(pool(places, False)[0], largest)
    found = unpool(torch.arange(1.0, 7.0).view(2, 3), choice).movedim(-1, 1).reshape(-1, 4)
    first = [0, 1, 2, 2, 3, 0]
    assert found.tolist() == [
        [float(at + 1) if place == first[at] else 0.0 for place in range(4)] for at in range(6)
    ]
