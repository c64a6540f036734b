"""Numbers and names as people read them."""

import math

import pytest

from fedistill.report import words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (85_544, "85.5 kB"),
        (999_600, "1.00 MB"),
        (2.5e9, "2.50 GB"),
        (7e15, "7000 TB"),
        (None, "–"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(value, text):
    assert words.human_bytes(value) == text


@pytest.mark.parametrize(
    ("saving", "text"),
    [
        (214.2, "214× fewer bytes than FedAvg"),
        (84.6, "84.6× fewer bytes than FedAvg"),
        (1.001, "as many bytes as FedAvg"),
        (0.5, "2.0× more bytes than FedAvg"),
        (0, "bytes against FedAvg unknown"),
        (None, "bytes against FedAvg unknown"),
    ],
)
def test_a_saving_below_one_is_called_more(saving, text):
    assert words.against_fedavg(saving) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.001, "<0.01 s"),
        (0.42, "0.42 s"),
        (34, "34 s"),
        (59.7, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3720, "1 h 02 min"),
    ],
)
def test_durations(seconds, text):
    assert words.duration(seconds) == text


def test_differences_carry_their_sign_and_nothing_is_nothing():
    assert [words.signed(v, 1) for v in (2.13, -0.4, 0.04, -0.04)] == ["+2.1", "−0.4", "±0", "±0"]


def test_rounds_are_written_as_ranges():
    assert words.ranges([7, 1, 2, 3, 3]) == "1–3, 7"
    assert words.ranges([]) == ""


def test_cleaning_removes_control_and_direction_characters_and_caps():
    assert "\x1b" not in words.clean("a\x1b[2Jb\n\u202ec")
    assert len(words.clean("x" * 10_000, 40)) == 40


def test_only_finite_numbers_count():
    assert [words.number(v) for v in (1, 0.5, True, "1", None, math.nan, math.inf)] == [
        1.0,
        0.5,
        None,
        None,
        None,
        None,
        None,
    ]
