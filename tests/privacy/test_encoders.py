"""Encoders: frozen, deterministic, of length 1, and from public rows alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fedistill as fd
from fedistill.catalog import ENCODERS
from fedistill.distill.recipe import Recipe
from fedistill.errors import DataError, SettingsError
from fedistill.privacy.encoders import (
    BUILDERS,
    HEAD_RATE,
    Remembered,
    _built,
    encoder,
    head_recipe,
    with_head,
)
from fedistill.privacy.features import Components, Graph, Kernel, Patches, Unit

FLAT = ("auto", "none", "components", "kernel", "graph", "mixed")


def table(rows: int = 60, numbers: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, numbers)).astype(np.float32)


def pictures(rows: int = 40, channels: int = 1, seed: int = 0) -> np.ndarray:
    rough = np.random.default_rng(seed).normal(size=(rows, channels, 8, 8))
    return rough.repeat(2, axis=2).repeat(2, axis=3).astype(np.float32)


def clusters(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three far clusters of ten numbers."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    return (8 * np.eye(10)[labels] + rng.normal(size=(rows, 10))).astype(np.float32), labels


def test_every_name_of_the_catalogue_is_built() -> None:
    assert set(BUILDERS) == set(ENCODERS)


@pytest.mark.parametrize("name", FLAT)
def test_features_of_a_table_have_length_1(name: str) -> None:
    features = encoder(name, table())(torch.from_numpy(table(30, seed=1)))

    assert features.dtype == torch.float32
    assert features.shape == (30, encoder(name, table()).width)
    assert torch.allclose(features.norm(dim=1), torch.ones(30), atol=1e-5)


@pytest.mark.parametrize("name", ["auto", "patches", "components", "mixed"])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_pictures_have_length_1(name: str, channels: int) -> None:
    made = encoder(name, pictures(channels=channels))
    features = made(torch.from_numpy(pictures(5, channels, seed=1)))

    assert torch.allclose(features.norm(dim=1), torch.ones(5), atol=1e-5)


@pytest.mark.parametrize("name", FLAT)
def test_rows_however_wild_stay_of_length_1(name: str) -> None:
    wild = np.stack([np.zeros(7), np.full(7, 1e6), table()[0]]).astype(np.float32)

    features = encoder(name, table())(torch.from_numpy(wild))

    assert torch.isfinite(features).all()
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-4)


@pytest.mark.parametrize("name", FLAT)
def test_equal_public_rows_give_equal_features_in_another_process_too(name: str) -> None:
    rows = torch.from_numpy(table(20, seed=1))
    first = encoder(name, table())(rows).numpy()
    _built.cache_clear()

    assert np.array_equal(encoder(name, table())(rows).numpy(), first)


def test_all_clients_share_one_encoder() -> None:
    assert encoder("mixed", table()) is encoder("mixed", table().copy())
    assert encoder("mixed", table()) is not encoder("mixed", table(seed=1))
    assert encoder("mixed", table()) is not encoder("kernel", table())


@pytest.mark.parametrize("name", [*FLAT, "patches"])
def test_an_encoder_is_frozen_and_leaves_no_state(name: str) -> None:
    made = encoder(name, pictures() if name == "patches" else table())

    assert not list(made.parameters())
    assert not made.state_dict()


def test_what_is_trained_and_saved_is_the_head_alone() -> None:
    module = with_head(encoder("mixed", table()), 3)

    assert list(module.state_dict()) == ["1.weight"]
    assert module.state_dict()["1.weight"].shape == (3, encoder("mixed", table()).width)
    assert not module(torch.from_numpy(table(4))).any()


def test_a_head_has_a_recipe_of_its_own() -> None:
    given = Recipe(epochs=7, batch_size=20, optimizer="adam", average=0.9, momentum=0.9)

    made = head_recipe(given, 40.0)

    assert (made.epochs, made.lr, made.optimizer, made.momentum) == (7, 40.0, "sgd", 0.0)
    assert (made.distil, made.average, made.batch_size) == ("phase", 0.0, 50)
    assert head_recipe(given).lr == HEAD_RATE
    assert head_recipe(replace(given, distil="never")).distil == "never"


def test_the_head_learns_and_the_features_do_not_move() -> None:
    rows, labels = clusters(120, 0)
    made = encoder("mixed", clusters(100, 1)[0])
    module = with_head(made, 3)
    before = made(torch.from_numpy(rows)).clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=25.0)
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(torch.from_numpy(rows)), torch.from_numpy(labels))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    others, wanted = clusters(200, 2)
    assert (module(torch.from_numpy(others)).argmax(1).numpy() == wanted).mean() > 0.98
    assert torch.equal(made(torch.from_numpy(rows)), before)


def test_features_seen_in_inference_mode_can_be_learned_from() -> None:
    module = with_head(encoder("kernel", table(seed=5)), 2)
    rows = torch.from_numpy(table(10, seed=6))
    with torch.inference_mode():
        module(rows)

    loss = module(rows).sum()
    loss.backward()

    assert all(weight.grad is not None for weight in module.parameters())


def test_a_row_that_was_seen_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Counting(Unit):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            asked.append(len(inputs))
            return super().forward(inputs)

    made = Remembered(Counting(), torch.from_numpy(table(2)))
    asked.clear()
    rows = torch.from_numpy(table(6, seed=1))
    first = made(rows[:4])
    again = made(rows[[1, 5, 0, 5]])

    assert asked == [4, 1]
    assert torch.equal(again[0], first[1])
    assert torch.equal(again[1], again[3])
    assert torch.equal(made(rows), Unit()(rows))

    monkeypatch.setattr("fedistill.privacy.encoders.REMEMBERED", 7)
    more = torch.from_numpy(table(6, seed=2))
    assert torch.equal(made(more), Unit()(more))
    assert len(made._places) == 6


def test_no_rows_have_no_features() -> None:
    made = encoder("mixed", table())

    assert made(torch.zeros(0, 7)).shape == (0, made.width)


def test_a_unit_row_by_hand() -> None:
    row = Unit()(torch.tensor([[3.0, 4.0]]))

    expected = np.array([0.6, 0.8, 0.1]) / np.sqrt(1.01)
    assert np.allclose(row.numpy(), expected)


def test_components_are_half_whitened() -> None:
    rows = (table(5000, 3) * [4.0, 1.0, 0.25]).astype(np.float32)
    features = Components(rows, 2)(torch.from_numpy(rows)).numpy()

    # Divided by the root of the deviation, a deviation of 4 becomes 2, one of 1 stays.
    assert np.allclose(features.std(axis=0), [2.0, 1.0], rtol=0.05)


def test_components_of_fewer_rows_than_numbers_are_the_same() -> None:
    rows = table(30, 40)
    wide = Components(rows, 5)(torch.from_numpy(rows)).numpy()
    # As many rows as numbers and more, by repeating them, take the other way.
    narrow = Components(np.concatenate([rows, rows]), 5)(torch.from_numpy(rows)).numpy()

    assert np.allclose(wide, narrow, atol=1e-3)


def test_products_of_kernel_features_are_the_kernel() -> None:
    rows = table(50)
    made = Kernel(rows)
    points = made(torch.from_numpy(rows)).double()

    assert torch.allclose((points @ points.T).diagonal(), torch.ones(50).double(), atol=1e-3)


def test_rows_of_a_cluster_lie_together_in_the_graph() -> None:
    rows, _ = clusters(90, 0)
    others, labels = clusters(60, 1)
    places = Graph(rows)(torch.from_numpy(others)).numpy()[:, :3]
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    alike = places @ places.T
    same = labels[:, None] == labels

    assert np.median(alike[same]) > 0.95
    assert np.median(np.abs(alike[~same])) < 0.3


def test_a_patch_brighter_or_of_more_contrast_is_the_same_patch() -> None:
    rows = pictures(60)
    made = Patches(rows)
    some = torch.from_numpy(rows[:3])

    assert torch.allclose(made(some), made(some + 3), atol=1e-2)


@pytest.mark.parametrize("name", FLAT)
def test_public_rows_that_are_all_alike_are_no_error(name: str) -> None:
    made = encoder(name, np.ones((12, 7), dtype=np.float32))

    assert torch.isfinite(made(torch.from_numpy(table(3)))).all()


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("name", FLAT)
def test_few_public_rows_are_enough(name: str, rows: int) -> None:
    made = encoder(name, table(rows))

    assert torch.isfinite(made(torch.from_numpy(table(3, seed=1)))).all()


def test_what_cannot_be_encoded_is_said() -> None:
    with pytest.raises(DataError, match="expected public rows, found none"):
        encoder("none", table(0))
    with pytest.raises(SettingsError, match='unknown encoder "kernels"; did you mean "kernel"'):
        encoder("kernels", table())
    with pytest.raises(SettingsError, match="the rows are 7: take mixed or components"):
        encoder("patches", table())


@pytest.mark.slow
def test_noise_that_ruins_plain_numbers_leaves_digits_readable() -> None:
    """One noisy gradient of all of 130 rows at epsilon 3 for each of eight clients, averaged."""
    digits = fd.data.digits(seed=0)
    rng = np.random.default_rng(0)
    found = {}
    for name in ("none", "mixed"):
        made = encoder(name, digits.public.inputs)
        rows = made(torch.from_numpy(digits.train.inputs)).numpy()
        wanted = np.eye(10)[digits.train.labels] - 0.1
        noise = 1.4 * np.sqrt(8) * rng.normal(size=(rows.shape[1], 10))
        weights = rows.T @ wanted + noise
        seen = made(torch.from_numpy(digits.test.inputs)).numpy()
        found[name] = ((seen @ weights).argmax(1) == digits.test.labels).mean()

    assert found["mixed"] > 0.88
    assert found["mixed"] > found["none"] + 0.05
