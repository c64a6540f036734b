"""Units dealt out by largest remainder: by hand, by properties, and on predictions of a model."""

from __future__ import annotations

import functools
import zlib

import numpy as np
import pytest
import torch
from builders import probabilities
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fedistill.wire import codec
from fedistill.wire.codec import CODECS
from fedistill.wire.simplex import FLOOR, deal, draw, floor_of, simplex, top_class


@pytest.mark.parametrize(
    ("bits", "probs", "units"),
    [
        # 3 units: shares 1.5 .9 .6, whole 1 0 0, two left over: to .9 and .6.
        (2, [0.5, 0.3, 0.2], [1, 1, 1]),
        # 2.7 .24 .06: one left over, to .7.
        (2, [0.9, 0.08, 0.02], [3, 0, 0]),
        # 7 units: 2.8 2.8 1.4: two left over, to both .8.
        (3, [0.4, 0.4, 0.2], [3, 3, 1]),
        # 15 units: 3.75 each: three left over, to the lower classes.
        (4, [0.25, 0.25, 0.25, 0.25], [4, 4, 4, 3]),
        (8, [0.4, 0.4, 0.2], [102, 102, 51]),
        (8, [1.0, 0.0, 0.0], [255, 0, 0]),
        # Rows that do not sum to 1 are shared out by their sum: 255 * 3 / 4 is 191.25.
        (8, [3.0, 1.0], [191, 64]),
    ],
)
def test_units_by_hand(bits: int, probs: list[float], units: list[int]) -> None:
    assert simplex(bits).quantise(np.array([probs])).tolist() == [units]


def test_one_bit_is_the_top_class_the_lowest_of_equals() -> None:
    probs = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    assert simplex(1).quantise(probs).tolist() == [[1], [0], [0]]
    assert deal(probs, 1).argmax(axis=1).tolist() == [1, 0, 0]
    assert codec.encode("simplex-1", probs) == codec.encode("label", probs) == b"\1\0\0"


def test_decoded_by_hand() -> None:
    decoded = CODECS["simplex-2"].decode(codec.encode("simplex-2", np.array([[0.9, 0.1]])), 1, 2)
    np.testing.assert_allclose(decoded, [[1 / (1 + FLOOR), FLOOR / (1 + FLOOR)]], rtol=1e-6)
    decoded = CODECS["label"].decode(b"\2", 1, 3)
    whole = 1 + 2 * FLOOR
    np.testing.assert_allclose(decoded, [[FLOOR / whole, FLOOR / whole, 1 / whole]], rtol=1e-6)


def test_class_numbers_take_the_bytes_they_need() -> None:
    assert [codec.expected_size("label", 1, c) for c in (2, 256, 257, 65_536, 65_537)] == [
        *(1, 1, 2, 2, 4)
    ]
    assert codec.encode("label", np.eye(300)[[299]]) == (299).to_bytes(2, "little")


cases = given(
    st.integers(0, 2**32),
    st.integers(0, 30),
    st.integers(1, 300),
    st.floats(0, 60),
    st.integers(1, 8),
)


@cases
@settings(deadline=None, max_examples=150)
def test_units_are_all_dealt_and_within_one_of_the_share(
    seed: int, rows: int, classes: int, scale: float, bits: int
) -> None:
    probs = probabilities(rows, seed, classes, scale)
    units = (1 << bits) - 1
    codes = deal(probs, units)
    assert codes.dtype == np.uint8
    assert (codes.sum(axis=1, dtype=np.int64) == units).all()
    assert (np.abs(codes - units * probs) < 1 + 1e-6).all()
    order = np.argsort(-probs, axis=1, kind="stable")
    steps = (np.take_along_axis(p, order, axis=1) for p in (probs, codes.astype(int)))
    fell, rose = (np.diff(ranked, axis=1) for ranked in steps)
    assert (rose[fell < -1e-6] <= 0).all()  # what was larger is not smaller now


@cases
@settings(deadline=None, max_examples=100)
def test_bytes_bring_back_the_codes_and_coding_again_changes_nothing(
    seed: int, rows: int, classes: int, scale: float, bits: int
) -> None:
    grid = simplex(bits)
    codes = grid.quantise(probabilities(rows, seed, classes, scale))
    data = grid.dump(codes)
    assert len(data) == rows * grid.row_bytes(classes)
    np.testing.assert_array_equal(grid.load(data, rows, classes), codes)
    np.testing.assert_array_equal(grid.quantise(grid.restore(codes, classes)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("classes", [2, 10, 1000, 100_000])
def test_floors_of_a_row_weigh_little(bits: int, classes: int) -> None:
    units = (1 << bits) - 1
    assert floor_of(units, classes) * classes <= min(0.01, 0.4 / units) + 1e-12


def test_rounding_errors_of_the_input_do_not_break_ties_otherwise() -> None:
    """The same row in float32, scaled, or summed in another order gives the same bytes."""
    row = np.array([[0.1, 0.3, 0.1, 0.1, 0.3, 0.1]])
    for bits in range(2, 9):
        codes = simplex(bits).quantise(row)
        for other in (row * 3, row / 7, row * (1 + 1e-12), row + 1e-14):
            np.testing.assert_array_equal(simplex(bits).quantise(other), codes)


# --- drawn labels --------------------------------------------------------------------------------


def test_a_drawn_label_is_right_on_average() -> None:
    """40,000 draws of each of 6 rows: every share within 5 standard deviations."""
    probs = np.concatenate(
        [probabilities(4, 1, 5, scale=1.5), [[0, 0.5, 0, 0.5, 0], [0, 0, 0, 0, 1]]]
    )
    times = 40_000
    codes = draw(np.tile(probs, (times, 1)), seed=11)
    one_hot = CODECS["sampled-label"].decode(codes.tobytes(), len(codes), 5)
    mean = one_hot.reshape(times, *probs.shape).mean(axis=0, dtype=np.float64)
    assert (np.abs(mean - probs) <= 5 * np.sqrt(probs * (1 - probs) / times) + 1e-12).all()


def test_seeds_draw_apart_from_one_another() -> None:
    """Over 4,000 seeds too: a client that draws anew each round is right on average."""
    probs = np.array([[0.1, 0.6, 0.3]])
    drawn = np.array([draw(probs, seed)[0, 0] for seed in range(4000)])
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert (np.abs(shares - probs[0]) <= 5 * np.sqrt(probs[0] * (1 - probs[0]) / 4000)).all()


def test_a_class_of_probability_zero_is_never_drawn() -> None:
    probs = np.zeros((20_000, 4))
    probs[:, 1:3] = 0.1, 0.2  # sums to .3, not exactly
    assert set(draw(probs, 2)[:, 0].tolist()) == {1, 2}


# --- predictions of a model ----------------------------------------------------------------------


@functools.cache
def digits_predictions() -> np.ndarray:
    """A linear model after some steps on half of the digits, asked about the other half."""
    inputs, labels = load_digits(return_X_y=True)
    x = torch.tensor(inputs / 16, dtype=torch.float32)
    y = torch.tensor(labels)
    weights = torch.zeros(65, 10, requires_grad=True)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return rows @ weights[:64] + weights[64]

    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(logits(x[:900]), y[:900])
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights -= 2.0 * gradient
    with torch.no_grad():
        return logits(x[900:]).double().softmax(dim=1).numpy()


LOST = {
    "float32": 1e-6,
    "float16": 1e-5,
    "u8": 1e-4,
    "simplex-8": 5e-3,
    "simplex-7": 0.012,
    "simplex-6": 0.03,
    "simplex-5": 0.08,
    "simplex-4": 0.2,
    "simplex-3": 0.4,
    "simplex-2": 0.9,
    "simplex-1": 2.5,
    "top-k": 1e-3,
    "label": 2.5,
}


def test_what_a_codec_loses_on_real_predictions() -> None:
    probs = digits_predictions()
    lost = {}
    for name, bound in LOST.items():
        decoded = CODECS[name].decode(codec.encode(name, probs), *probs.shape)
        lost[name] = codec.kl(probs, decoded)
        assert -1e-6 <= lost[name] <= bound, name
        top = decoded.argmax(axis=1)
        assert (top == top_class(probs)[:, 0]).mean() > 0.95, name
    falling = [lost[f"simplex-{bits}"] for bits in range(1, 9)]
    assert falling == sorted(falling, reverse=True)


def test_a_mean_of_drawn_labels_beats_one_of_top_classes() -> None:
    """Twenty clients that predict alike: their labels all err the same way, draws do not."""
    probs = digits_predictions()
    drawn = np.mean(
        [
            CODECS["sampled-label"].decode(
                codec.encode("sampled-label", probs, seed=seed), *probs.shape
            )
            for seed in range(20)
        ],
        axis=0,
    )
    voted = CODECS["label"].decode(codec.encode("label", probs), *probs.shape)
    assert np.abs(drawn - probs).sum() < 0.6 * np.abs(voted - probs).sum()


def test_sorted_codes_weigh_less_than_rows_of_codes() -> None:
    probs = digits_predictions()
    for bits, share in ((2, 0.75), (4, 0.8), (8, 0.9)):
        grid = simplex(bits)
        codes = grid.quantise(probs)
        assert len(codec.pack(grid.dump(codes))) < share * len(zlib.compress(codes.tobytes(), 6))
