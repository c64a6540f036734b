"""Streams: each row once, the same domains for every owner, and the seed decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill import catalog
from fedistill.config import ClientsSettings, DataSettings, ProxySettings
from fedistill.data import experiences, iid, prepare, streams
from fedistill.data.shifts import angles, rotate, scaled
from fedistill.data.stream import SHIFTS, gradual, recurring
from fedistill.errors import DataError
from fedistill.settings import StreamSettings
from fedistill.types import Rows

quick = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**32)
DEALING = tuple(SHIFTS)


def how(shift: str = "time", count: int = 4, **more: object) -> StreamSettings:
    return StreamSettings(shift=shift, experiences=count, **more)


def pictures(count: int, start: int = 0, seed: int = 0) -> Rows:
    """Small images of four classes and four sites, with everything a shift may ask for."""
    random = np.random.default_rng(seed)
    return Rows(
        random.random((count, 1, 5, 5)).astype(np.float32),
        np.arange(count) % 4,
        np.arange(start, start + count),
        np.array(["bern", "lyon", "ulm", "wien"])[np.arange(count) // 4 % 4],
        np.array([f"person {row}" for row in range(count)]),
    )


def ids(parts: list[Rows] | tuple[Rows, ...]) -> list[int]:
    return sorted(int(row) for part in parts for row in part.ids)


def bell(count: int, columns: int = 3, seed: int = 0) -> Rows:
    random = np.random.default_rng(seed)
    return Rows(random.normal(size=(count, columns)), np.arange(count) % 2, np.arange(count))


# --- every shift ---------------------------------------------------------------------------------


def test_the_table_names_every_shift_with_a_summary():
    assert tuple(SHIFTS) == (
        "rotation",
        "permutation",
        "class-incremental",
        "domain-incremental",
        "label-prior",
        "covariate",
        "time",
    )
    for name in SHIFTS:
        assert len(catalog.summary("shifts", name)) > 20


@pytest.mark.parametrize("name", DEALING)
@given(st.integers(16, 60), st.integers(1, 4), SEEDS)
@quick
def test_each_row_goes_to_one_experience_with_all_that_belongs_to_it(name, count, parts, seed):
    rows = pictures(count)
    made = SHIFTS[name](rows, how(name, parts), seed)
    assert len(made) == parts
    assert ids(made) == list(range(count))
    for part in made:
        np.testing.assert_array_equal(part.labels, rows.labels[part.ids])
        np.testing.assert_array_equal(part.site, rows.site[part.ids])
        np.testing.assert_array_equal(part.subject, rows.subject[part.ids])


@pytest.mark.parametrize("name", DEALING)
def test_the_same_seed_gives_the_same_bytes_and_leaves_the_rows_alone(name):
    rows = pictures(40)
    before = rows.inputs.tobytes()
    first, again, other = (
        [
            (part.ids.tobytes(), part.inputs.tobytes())
            for part in SHIFTS[name](rows, how(name), seed)
        ]
        for seed in (3, 3, 4)
    )
    assert first == again
    assert (first == other) == (name in {"domain-incremental", "time"}), "these draw nothing"
    assert rows.inputs.tobytes() == before


@pytest.mark.parametrize("name", DEALING)
def test_more_experiences_than_rows_classes_or_sites_are_refused(name):
    with pytest.raises(DataError, match=r"as many (rows|classes|sites) as the 9"):
        SHIFTS[name](pictures(8), how(name, 9), 0)
    with pytest.raises(DataError, match="at least one experience"):
        SHIFTS[name](pictures(8), how(name, 0), 0)


# --- rotation and permutation --------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 3), (4, 4)])
@pytest.mark.parametrize("turns", range(5))
def test_quarter_turns_are_exact(size, turns):
    images = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(np.float32)
    wanted = np.rot90(images, turns, axes=(2, 3))
    np.testing.assert_array_equal(rotate(images, 90 * turns), wanted)


def test_a_turned_corner_holds_the_background_whatever_the_scale():
    image = np.zeros((1, 1, 9, 9), np.float32)
    image[..., 3:6, 3:6] = 1.0
    turned = rotate(image, 45.0)
    assert turned[0, 0, 0, 0] == 0.0
    assert turned.sum() == pytest.approx(9.0, abs=0.4)
    np.testing.assert_allclose(rotate(2 * image - 1, 45.0), 2 * turned - 1, atol=1e-6)


def test_half_a_pixel_is_the_mean_of_its_neighbours():
    row = np.array([[[[0.0, 4.0]]]], np.float32)
    # A quarter turn of a 1 x 2 image puts its one row on the column between the two pixels.
    np.testing.assert_allclose(rotate(row, 90.0)[0, 0], [[1.0, 1.0]])


def test_train_and_test_are_turned_by_the_same_angles():
    one, other = pictures(24, seed=1), pictures(31, start=50, seed=2)
    drawn = angles(how("rotation"), 7)
    assert all(0 <= angle <= 180 for angle in drawn)
    assert len(set(drawn)) == 4
    for rows in (one, other):
        for part, angle in zip(SHIFTS["rotation"](rows, how("rotation"), 7), drawn, strict=True):
            at = part.ids - rows.ids[0]
            np.testing.assert_array_equal(part.inputs, rotate(rows.inputs[at], angle))


def test_a_permutation_is_a_bijection_and_the_same_for_other_rows():
    numbered = Rows(np.tile(np.arange(25.0), (9, 1)).reshape(9, 1, 5, 5), np.zeros(9, int))
    parts = SHIFTS["permutation"](numbered, how("permutation"), 5, whole=True)
    orders = [part.inputs[0].ravel().astype(int) for part in parts]
    assert [len(part) for part in parts] == [9] * 4
    assert all(sorted(order) == list(range(25)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 4
    flat = pictures(8).inputs.reshape(8, 25)
    other = SHIFTS["permutation"](Rows(flat, np.zeros(8, int)), how("permutation"), 5, whole=True)
    for part, order in zip(other, orders, strict=True):
        np.testing.assert_array_equal(part.inputs, flat[:, order])


def test_whole_gives_every_experience_all_rows():
    rows = pictures(3)
    assert [ids([part]) for part in SHIFTS["rotation"](rows, how("rotation"), 0, whole=True)] == [
        [0, 1, 2]
    ] * 4


def test_rotation_needs_images():
    with pytest.raises(DataError, match=r"expected images .* found \[8, 3\]"):
        SHIFTS["rotation"](bell(8), how("rotation"), 0)


# --- classes, sites, priors ----------------------------------------------------------------------


@given(st.integers(1, 10), st.integers(1, 12), SEEDS)
@quick
def test_classes_are_partitioned(parts, classes, seed):
    classes = max(classes, parts)
    rows = Rows(np.zeros((3 * classes, 1)), np.arange(3 * classes) % classes)
    made = SHIFTS["class-incremental"](rows, how("class-incremental", parts), seed)
    groups = [set(part.labels.tolist()) for part in made]
    assert sum(map(len, groups)) == classes == len(set().union(*groups))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_unshuffled_classes_come_by_number():
    parts = experiences("class-incremental", pictures(8), count=2, shuffle=False)
    assert [part.name for part in parts] == ["classes 0 1", "classes 2 3"]
    assert [sorted(set(part.train.labels.tolist())) for part in parts] == [[0, 1], [2, 3]]


def test_an_owner_without_some_classes_meets_the_same_domains():
    every, few = pictures(40), pictures(40).take(np.arange(0, 40, 4))
    wanted = SHIFTS["class-incremental"](every, how("class-incremental"), 3)
    made = SHIFTS["class-incremental"](few, how("class-incremental"), 3, like=every)
    (only,) = [at for at, part in enumerate(made) if len(part)]
    assert set(wanted[only].labels.tolist()) == {0}
    with pytest.raises(DataError, match="found none for 1"):
        SHIFTS["class-incremental"](every, how("class-incremental", 1), 3, like=few)


@pytest.mark.parametrize("name", ["class-incremental", "label-prior"])
def test_unknown_labels_are_refused(name):
    with pytest.raises(DataError, match="expected known labels, found 2"):
        SHIFTS[name](Rows(np.zeros((4, 1)), [-1, 0, 1, -1]), how(name, 2), 0)


def test_sites_come_by_name_and_neighbours_share():
    parts = experiences("domain-incremental", pictures(32), count=3)
    assert [part.name for part in parts] == ["sites bern lyon", "site ulm", "site wien"]
    assert [sorted(set(part.train.site)) for part in parts] == [["bern", "lyon"], ["ulm"], ["wien"]]
    with pytest.raises(DataError, match="expected rows with sites"):
        experiences("domain-incremental", bell(8), count=2)


def test_scaled_shares_meet_both_sizes():
    table = scaled(np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]), np.array([60, 30]))
    np.testing.assert_allclose(table.sum(axis=0), [60, 30])
    np.testing.assert_allclose(table.sum(axis=1), [30, 30, 30], rtol=1e-6)
    assert table[0, 0] * table[1, 1] / (table[0, 1] * table[1, 0]) == pytest.approx(36.0)


def test_a_smaller_alpha_moves_the_class_shares_more_and_sizes_stay():
    rows = Rows(np.zeros((4000, 1)), np.arange(4000) % 4, np.arange(4000))

    def spread(alpha: float) -> float:
        parts = SHIFTS["label-prior"](rows, how("label-prior", alpha=alpha), 7)
        assert all(abs(len(part) - 1000) <= 40 for part in parts)
        shares = [np.bincount(part.labels, minlength=4) / len(part) for part in parts]
        return float(np.std(shares, axis=0).mean())

    assert spread(0.1) > 0.2
    assert spread(0.1) > 2 * spread(5.0)
    assert spread(1000.0) < 0.03


@pytest.mark.parametrize("alpha", [1e-4, 1e6])
def test_extreme_alphas_still_deal_every_row(alpha):
    assert ids(SHIFTS["label-prior"](pictures(40), how("label-prior", alpha=alpha), 1)) == list(
        range(40)
    )


def test_two_owners_of_one_mix_get_the_same_priors():
    one = Rows(np.zeros((1000, 1)), np.arange(1000) % 4, np.arange(1000))
    other = Rows(np.zeros((400, 1)), np.arange(400)[::-1] % 4, np.arange(400))
    for left, right in zip(
        *(SHIFTS["label-prior"](rows, how("label-prior"), 5) for rows in (one, other)), strict=True
    ):
        shares = [np.bincount(part.labels, minlength=4) / len(part) for part in (left, right)]
        np.testing.assert_allclose(*shares, atol=0.03)


# --- covariate and time --------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "wanted"), [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (9.0, 2.54)])
def test_inputs_move_by_the_strength(strength, wanted):
    rows = bell(20_000)
    parts = SHIFTS["covariate"](rows, how("covariate", strength=strength), 2)
    assert {len(part) for part in parts} == {5000}
    apart = parts[-1].inputs.mean(axis=0) - parts[0].inputs.mean(axis=0)
    assert np.linalg.norm(apart) == pytest.approx(wanted, abs=0.06)


def test_the_direction_is_the_same_for_other_rows():
    moved = []
    for seed in (1, 2):
        parts = SHIFTS["covariate"](bell(20_000, seed=seed), how("covariate", strength=2.0), 9)
        apart = parts[-1].inputs.mean(axis=0) - parts[0].inputs.mean(axis=0)
        moved.append(apart / np.linalg.norm(apart))
    assert moved[0] @ moved[1] > 0.99


def test_inputs_that_are_not_finite_have_no_place():
    inputs = np.zeros((6, 2))
    inputs[4, 1] = np.nan
    with pytest.raises(DataError, match="others in row 4"):
        SHIFTS["covariate"](Rows(inputs, np.zeros(6, int)), how("covariate", 2), 0)


def test_time_follows_the_ids_and_the_first_block_may_be_larger():
    rows = bell(12).take([11, 3, 7, 0, 5, 1, 2, 4, 6, 8, 10, 9])
    even = SHIFTS["time"](rows, how("time", 3), 0)
    assert [part.ids.tolist() for part in even] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    half = SHIFTS["time"](rows, how("time", 4, first=0.5), 0)
    assert [len(part) for part in half] == [6, 2, 2, 2]
    assert [part.ids.tolist() for part in half][1] == [6, 7]
    with pytest.raises(DataError, match=r"stream\.first: expected less than 1"):
        SHIFTS["time"](rows, how("time", 4, first=1.0), 0)


def test_blocks_end_at_the_same_time_for_every_owner_and_the_tests():
    every = bell(100)
    parts = dict(zip("ab", iid(every.take(np.arange(0, 100, 2)), 2, 3), strict=True))
    made = streams(parts, every.take(np.arange(1, 100, 2)), how("time", 5), 0)
    for at in range(5):
        held = [made.tests[at], *(train[at] for train in made.train.values())]
        assert ids(held) == list(range(20 * at, 20 * at + 20))


def test_each_site_has_a_time_of_its_own():
    site = np.repeat(["bern", "ulm"], [4, 8])
    rows = Rows(np.zeros((12, 1)), np.zeros(12, int), np.arange(12), site)
    parts = SHIFTS["time"](rows, how("time", 2), 0)
    assert [part.ids.tolist() for part in parts] == [[0, 1, 4, 5, 6, 7], [2, 3, 8, 9, 10, 11]]


def test_rows_of_two_sources_have_no_common_time():
    parts = experiences("time", bell(12), bell(6, seed=1), 3)
    assert [part.test.ids.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    bare = experiences("time", Rows(np.arange(6.0)[:, None], np.zeros(6, int)), count=2)
    assert [part.train.inputs[:, 0].tolist() for part in bare] == [[0, 1, 2], [3, 4, 5]]


# --- courses -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.floats(0, 0.5), SEEDS)
@quick
def test_gradual_keeps_sizes_and_rows(sizes, overlap, seed):
    ends = np.cumsum([0, *sizes])
    parts = [pictures(size, start=int(at)) for size, at in zip(sizes, ends, strict=False)]
    mixed = gradual(parts, overlap, seed)
    assert [len(part) for part in mixed] == sizes
    assert ids(mixed) == list(range(sum(sizes)))


def test_gradual_brings_ever_more_of_the_next():
    parts = [bell(4000), bell(4000)]
    parts[1] = Rows(parts[1].inputs, parts[1].labels, parts[1].ids + 4000)
    one, other = gradual(parts, 0.5, 1)
    foreign = one.ids >= 4000
    early, late = foreign[2000:3000].mean(), foreign[3000:].mean()
    assert not foreign[:2000].any()
    assert early == pytest.approx(0.125, abs=0.03)
    assert late == pytest.approx(0.375, abs=0.03)
    assert not (other.ids[2000:] < 4000).any()
    assert [part.ids.tolist() for part in gradual(parts, 0.0, 3)] == [
        part.ids.tolist() for part in parts
    ]
    assert gradual([], 0.2, 3) == []


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 4))
@quick
def test_recurring_loses_nothing(sizes, times):
    ends = np.cumsum([0, *sizes])
    parts = [pictures(size, start=int(at)) for size, at in zip(sizes, ends, strict=False)]
    again = recurring(parts, times)
    assert len(again) == times * len(parts)
    assert ids(again) == list(range(sum(sizes)))
    for at, part in enumerate(parts):
        assert ids(again[at :: len(parts)]) == ids([part])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: gradual([], 0.6, 0), "overlap of 0 to 0.5, found 0.6"),
        (lambda: recurring([], 0), "at least 1 time"),
        (lambda: experiences("rotate", pictures(8)), 'did you mean "rotation"'),
        (lambda: experiences("time", pictures(8), whole=True), 'time: unknown option "whole"'),
        (lambda: experiences("rotation", pictures(8), degree=9), 'did you mean "degrees"'),
        (lambda: experiences("label-prior", pictures(8), alpha=0.0), "alpha: expected a number"),
        (lambda: experiences("time", pictures(8), count=0), "raise count"),
        (lambda: experiences("time", pictures(8), course="gradul"), 'did you mean "gradual"'),
        (lambda: experiences("time", pictures(9), count=3, course="recurring"), "even number"),
        (lambda: experiences("time", pictures(2), pictures(9, 9), 3), "rows to learn .* block 2"),
        (lambda: experiences("time", pictures(9), pictures(2, 20), 3), "test rows .* block 1"),
        (
            lambda: streams({"a": pictures(9)}, pictures(9, 9), how("time", 2, order="own"), 0),
            "runs one way",
        ),
        (
            lambda: streams({"a": pictures(2)}, pictures(8, 8), how("rotation", 4), 0),
            "rows of a client in each experience",
        ),
    ],
)
def test_impossible_wishes_are_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        call()


# --- streams -------------------------------------------------------------------------------------


EVERY = pictures(144)
HELD = EVERY.take(np.arange(2, 144, 3))


def clients() -> dict[str, Rows]:
    return {"a": EVERY.take(np.arange(0, 144, 3)), "b": EVERY.take(np.arange(1, 144, 3))}


@pytest.mark.parametrize("course", ["abrupt", "gradual", "recurring"])
@pytest.mark.parametrize("name", SHIFTS)
def test_a_federation_meets_each_row_once(name, course):
    made = streams(clients(), HELD, how(name, course=course), 1)
    assert len(made.names) == len(made.tests) == 4
    for client, rows in clients().items():
        assert made.order[client] == (0, 1, 2, 3)
        assert ids(made.train[client]) == ids([rows])
    assert all(map(len, made.tests))


def test_each_in_its_own_order_meets_the_same_experiences():
    same, own = (
        streams(clients(), HELD, how("class-incremental", order=order), 4)
        for order in ("same", "own")
    )
    assert same.names == own.names
    assert own.order["a"] != own.order["b"]
    for client, order in own.order.items():
        assert sorted(order) == [0, 1, 2, 3]
        for at, number in enumerate(order):
            assert ids([own.train[client][at]]) == ids([same.train[client][number]])
            held = set(own.train[client][at].labels.tolist())
            assert held == set(own.tests[number].labels.tolist())


def test_what_comes_back_has_the_same_tests_and_other_rows():
    settings_ = how("class-incremental", course="recurring", order="own")
    made = streams(clients(), HELD, settings_, 4)
    assert made.names[2:] == tuple(f"{name} again" for name in made.names[:2])
    assert made.tests[0] is made.tests[2]
    for client, order in made.order.items():
        assert order[2:] == tuple(number + 2 for number in order[:2])
        first, *_ = made.train[client]
        assert set(first.labels.tolist()) == set(made.tests[order[0]].labels.tolist())


def test_all_test_rows_are_turned_for_every_experience():
    made = streams(clients(), HELD.take(range(10)), how("rotation"), 4)
    assert [len(part) for part in made.tests] == [10] * 4
    assert made.names[0] == f"rotation {angles(how('rotation'), 4)[0]:.0f}°"


def test_a_client_may_have_no_row_at_all():
    parts = clients() | {"c": pictures(0)}
    for name in SHIFTS:
        made = streams(parts, HELD, how(name, course="gradual"), 4)
        assert [len(part) for part in made.train["c"]] == [0] * 4, name


# --- real streams --------------------------------------------------------------------------------

REAL = {
    "csv:drift_elec/elec2_full.csv.gz": ({"label": "class", "drop": ("date",)}, (45312, 7), 2),
    "csv:drift_weather/weather.csv.gz": ({"label": "target"}, (18159, 8), 2),
    "npz:drift_outdoor/outdoor.npz": ({}, (4000, 21), 40),
}


@pytest.mark.parametrize("source", REAL)
def test_real_drifting_data_are_read_in_the_order_of_time(
    real: Callable[[str], Path], source: str
) -> None:
    options, shape, classes = REAL[source]
    real(source.partition(":")[2])
    data = DataSettings(source=source, test_rows=0.2, **options)
    held = prepare(data, ProxySettings(rows=400), ClientsSettings(count=4), 7)
    assert held.dataset.train.inputs.shape[1:] == shape[1:]
    assert len(held.dataset.classes) == classes
    made = streams(held.parts, held.dataset.test, how("time", 10, first=0.5), 7)
    assert sum(map(len, made.tests)) == round(0.2 * shape[0])
    before = -1
    for at in range(10):
        block = ids([made.tests[at], *(train[at] for train in made.train.values())])
        assert block[0] > before
        before = block[-1]
