"""The laws of the replay buffer: who stays, what merging and erasing leave, and exact resuming."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.policies import Policy
from fedistill.errors import CheckpointError, DataError, FedistillError
from fedistill.store import load_state, save_state

LIFELONG = ["reservoir", "class-balanced", "recent", "hardest"]
ALL = [*LIFELONG, "herding"]


def stream(count, start=0, classes=3):
    """Rows whose every part says which row it is."""
    n = np.arange(start, start + count)
    random = np.random.default_rng(5)
    return {
        "inputs": np.stack([n, n + 0.5], axis=1).astype(np.float32),
        "labels": random.integers(0, classes, 10_000)[n] if count else n,
        "logits": np.stack([n, -n], axis=1).astype(np.float32),
        "ids": n + 1000,
        "scores": random.normal(size=10_000)[n],
        "features": random.normal(size=(10_000, 4))[n],
    }


def feed(buffer, rows, cuts=()):
    for part in np.split(np.arange(len(rows["labels"])), list(cuts)):
        buffer.add(**{name: column[part] for name, column in rows.items()})
    return buffer


def made(policy, capacity=7, count=40, seed=0, start=0, **extras):
    return feed(ReplayBuffer(capacity, policy, seed=seed, **extras), stream(count, start))


def same(first, second):
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and np.array_equal(first[k], second[k]) for k in first
    )


def held(state):
    """The rows and thresholds of a state: all but counters and generators."""
    return {k: v for k, v in state.items() if k.startswith(("rows.", "thresholds."))}


def together(buffer):
    """Rows and what lies beside them are still of one row."""
    rows = buffer.rows()
    number = rows.inputs[:, 0]
    assert np.array_equal(rows.inputs[:, 1], number + 0.5)
    assert np.array_equal(
        rows.logits, np.stack([number, -number], axis=1)[:, : 2 * bool(len(rows))]
    )
    assert np.array_equal(rows.ids, number + 1000)
    assert np.array_equal(rows.labels, stream(10_000)["labels"][number.astype(int)])


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("capacity", [0, 1, 7, 100])
def test_never_above_capacity_and_rows_stay_together(policy, capacity):
    rows = stream(40)
    before = {name: column.copy() for name, column in rows.items()}
    buffer = feed(ReplayBuffer(capacity, policy), rows, cuts=(1, 2, 20))
    assert len(buffer) == min(capacity, 40)
    together(buffer)
    assert same(rows, before)
    assert len(buffer.draw(5)) == min(capacity, 5)
    buffer.resize(3)
    together(buffer)
    assert len(buffer) == min(capacity, 3)


@pytest.mark.parametrize(("count", "capacity"), [(2, 1), (6, 5), (10, 5), (250, 5)])
def test_every_row_is_there_with_probability_capacity_over_n(count, capacity):
    trials, hits = 2000, np.zeros(count)
    for seed in range(trials):
        buffer = ReplayBuffer(capacity, seed=seed)
        buffer.add(np.zeros((count, 1)), ids=np.arange(count))
        hits[buffer.rows().ids] += 1
    share = capacity / count
    # Rows of one buffer are drawn without replacement: the statistic is (n - 1) / n too large.
    statistic = ((hits - trials * share) ** 2 / (trials * share * (1 - share))).sum()
    degrees = count - 1
    assert statistic * degrees / count < degrees + 3.5 * np.sqrt(2 * degrees) + 5


def test_class_balanced_is_uniform_within_a_class_and_shares_the_room():
    labels = np.array([0] * 26 + [1] * 20 + [2] * 3)
    hits, trials = np.zeros(49), 2000
    for seed in range(trials):
        buffer = ReplayBuffer(7, "class-balanced", seed=seed)
        order = np.random.default_rng(3).permutation(49)
        buffer.add(order[:, None], labels[order])
        rows = buffer.rows()
        assert np.bincount(rows.labels).tolist() == [3, 2, 2]
        hits[rows.inputs[:, 0]] += 1
    for label, share in [(0, 3 / 26), (1, 2 / 20), (2, 2 / 3)]:
        found = hits[labels == label] / trials
        assert np.abs(found - share).max() < 4 * np.sqrt(share * (1 - share) / trials)


def test_recent_is_the_last_rows_and_hardest_the_largest_scores():
    assert made("recent").rows().inputs[:, 0].tolist() == list(range(33, 40))
    scores = stream(40)["scores"]
    wanted = np.sort(np.argsort(scores)[-7:])
    assert made("hardest").rows().inputs[:, 0].tolist() == wanted.tolist()


def test_herding_keeps_the_mean_and_its_shares_and_the_first_on_shrinking():
    buffer = made("herding", capacity=12, count=300)
    rows = buffer.rows()
    assert np.bincount(rows.labels).tolist() == [4, 4, 4]
    features = stream(300)["features"]
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    labels = stream(300)["labels"]
    for label in range(3):
        mean = features[labels == label].mean(axis=0)
        kept = features[rows.inputs[rows.labels == label, 0].astype(int)].mean(axis=0)
        assert np.linalg.norm(kept - mean) < 0.2
    small, larger = made("herding", 6, 300), made("herding", 12, 300)
    larger.resize(6)
    assert np.array_equal(small.rows().ids, larger.rows().ids)


@pytest.mark.parametrize("policy", LIFELONG)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=8).map(sorted), st.integers(0, 20))
def test_the_cut_of_a_stream_makes_no_difference(policy, cuts, capacity):
    whole = feed(ReplayBuffer(capacity, policy), stream(60))
    parts = feed(ReplayBuffer(capacity, policy), stream(60), cuts)
    assert same(whole.state_dict(), parts.state_dict())
    assert np.array_equal(whole.draw(5).ids, parts.draw(5).ids)


@pytest.mark.parametrize("policy", LIFELONG)
def test_shrinking_is_having_been_small_from_the_start(policy):
    large, small = made(policy, 20), made(policy, 6)
    large.resize(6)
    assert same(large.state_dict(), small.state_dict())
    feed(large, stream(30, 40)), feed(small, stream(30, 40))
    assert same(large.state_dict(), small.state_dict())


@pytest.mark.parametrize("policy", LIFELONG)
def test_merging_is_commutative_and_associative_and_leaves_the_other(policy):
    def buffers():
        return [made(policy, 6, 30, seed, start=100 * seed) for seed in range(3)]

    a, b, c = buffers()
    before = b.state_dict()
    a.merge(b)
    assert same(before, b.state_dict())
    a.merge(c)
    together(a)
    d, e, f = buffers()
    f.merge(e)
    f.merge(d)
    assert same(held(a.state_dict()), held(f.state_dict()))
    assert a.seen == f.seen == 90


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced"])
def test_merging_has_the_law_of_one_stream(policy):
    """With the keys of two streams in one: the very same rows."""
    first, second = made(policy, 8, 50, seed=1), made(policy, 8, 70, seed=2, start=50)
    keys = np.concatenate(
        [made(policy, 70, n, seed=s).state_dict()["rows.uniform"] for n, s in ((50, 1), (70, 2))]
    )
    one = ReplayBuffer(8, Policy(lambda rows: keys[rows.numbers], policy == "class-balanced"))
    rows = stream(120)
    one.add(rows["inputs"], rows["labels"])
    first.merge(second)
    assert np.array_equal(np.sort(first.rows().inputs[:, 0]), one.rows().inputs[:, 0])


def test_merging_refuses_what_has_no_law():
    buffer = made("reservoir", seed=1)
    with pytest.raises(FedistillError, match="policy reservoir, found recent: merge buffers of"):
        buffer.merge(made("recent", seed=2))
    with pytest.raises(FedistillError, match="other keys, found seed 1"):
        buffer.merge(made("reservoir", seed=1))
    other = made("reservoir", seed=2)
    wide = ReplayBuffer(3, seed=3)
    wide.add(np.zeros((2, 5), np.float32))
    with pytest.raises(FedistillError, match="inputs of float32"):
        buffer.merge(wide)
    buffer.resize(100)
    free = ReplayBuffer(100, seed=9)
    free.merge(other)
    with pytest.raises(FedistillError, match="merge it once"):
        free.merge(other)


def test_logits_and_soft_targets_may_grow_by_classes():
    buffer = ReplayBuffer(6)
    buffer.add(np.zeros((2, 1)))
    buffer.add(np.ones((2, 1)), logits=[[1, 2], [3, 4]], soft=[[0.5, 0.5], [1, 0]])
    buffer.add(2 * np.ones((2, 1)), logits=[[5, 6, 7], [8, 9, 10]])
    again = ReplayBuffer(6)
    again.load_state_dict(buffer.state_dict())
    rows = again.rows()
    assert rows.logits_classes.tolist() == [0, 0, 2, 2, 3, 3]
    assert rows.logits[2].tolist() == [1, 2, 0]
    assert rows.logits_known.sum() == 10
    assert rows.soft.shape == (6, 2)
    assert rows.soft_known.sum(axis=1).tolist() == [0, 0, 2, 2, 0, 0]
    narrow = ReplayBuffer(1, "recent")
    narrow.add(np.zeros((1, 1)), logits=[[5, 6, 7]])
    narrow.add(np.zeros((1, 1)), logits=[[1, 2]])
    assert narrow.rows().logits.tolist() == [[1, 2]]


def memory(buffer):
    """All bytes that a buffer holds in arrays, free slots as well."""
    parts = [column.tobytes() for column in buffer._table.columns.values()]
    means = buffer._means
    return b"".join([*parts, means.sums.tobytes(), repr(buffer.tombstones).encode()])


@pytest.mark.parametrize("policy", ALL)
def test_erasing_leaves_nothing(policy, tmp_path):
    canary, name = np.float32(123.456789), "canary-4711"
    buffer = ReplayBuffer(50, policy)
    rows = stream(20) | {"subject": [f"p{k % 4}" for k in range(20)]}
    buffer.add(**rows)
    person = {
        "inputs": np.full((5, 2), canary),
        "logits": np.full((5, 3), canary),
        "soft": np.full((5, 3), canary),
        "labels": np.full(5, 9),
        "scores": np.full(5, canary),
        "features": np.tile([[3.0, 1.0, 4.0, 1.5]], (5, 1)),
    }
    feature = (np.array([3.0, 1, 4, 1.5]) / np.linalg.norm([3.0, 1, 4, 1.5]))[1]
    needles = [canary.tobytes(), np.float64(canary).tobytes(), np.float64(feature).tobytes()]
    needles += [name.encode(), name.encode("utf-32-le")]
    buffer.add(**person, subject=name)
    before = buffer.state_dict()
    buffer.add(**rows)
    receipt = buffer.erase(name)
    assert receipt.rows == 5
    assert receipt.tombstone.marks(name)
    assert buffer.erase(name).rows == 0

    save_state(tmp_path / "buffer.state", buffer.state_dict(), {})
    arrays, _, _ = load_state(tmp_path / "buffer.state")
    found = memory(buffer) + (tmp_path / "buffer.state").read_bytes()
    assert not [needle for needle in needles if needle in found]
    old = b"".join(value.tobytes() for value in before.values())
    assert all(needle in old for needle in (needles[0], needles[2], needles[4]))

    assert buffer.add(**person, subject=name) == 0
    other = ReplayBuffer(50, policy, seed=8)
    other.add(**person, subject=name)
    buffer.merge(other)
    assert name not in buffer.rows().subjects
    other.merge(buffer)
    assert name not in other.rows().subjects
    buffer.load_state_dict(before)  # written before the erasure
    assert name not in buffer.rows().subjects
    fresh = ReplayBuffer(50, policy)
    fresh.load_state_dict(before)
    assert fresh.bury(receipt and [receipt.tombstone]) == 5
    resumed = ReplayBuffer(50, policy)
    resumed.load_state_dict(arrays)
    assert resumed.add(**person, subject=name) == 0


def test_the_receipt_names_soft_targets_to_make_anew():
    buffer = ReplayBuffer(9)
    buffer.add(np.zeros((2, 1)), soft=[[1, 0], [0, 1]], ids=[70, 71])
    buffer.add(np.zeros((2, 1)), subject="ann", soft=[[1, 0], [0, 1]])
    buffer.add(np.zeros((1, 1)), subject="bob")
    assert buffer.erase("ann").recompute == (70, 71)
    assert buffer.erase("nobody").rows == 0
    with pytest.raises(FedistillError, match="the empty one: name the person"):
        buffer.erase("")


def test_subjects_are_numbers_or_texts_and_none_is_nobody():
    buffer = ReplayBuffer(9)
    buffer.add(np.zeros((3, 1)), subject=[7, 8, 7])
    buffer.add(np.zeros((2, 1)), subject=[None, "a long name"])
    assert buffer.rows().subjects.tolist() == ["7", "8", "7", "", "a long name"]
    assert (buffer.erase(7).rows, buffer.erase("8").rows) == (2, 1)
    assert buffer.stats().subjects == 1


def test_a_hole_is_refilled_as_told():
    """M = 20, 120 rows, 100 erased, 80 more: the figures of keeping and clearing thresholds."""
    found = {}
    for refill in ("threshold", "shrink", "free"):
        kept = np.zeros(3)
        for seed in range(500):
            buffer = ReplayBuffer(20, refill=refill, seed=seed)
            buffer.add(np.zeros((120, 1)), subject=np.repeat(["gone", "stays"], [100, 20]))
            buffer.erase("gone")
            buffer.add(np.zeros((80, 1)), subject="later")
            names = buffer.rows().subjects
            kept += [(names == "stays").sum() / 20, (names == "later").sum() / 80, len(names)]
        found[refill] = kept / 500
    assert np.abs(found["threshold"] - [0.160, 0.165, 16.4]).max(where=[1, 1, 0], initial=0) < 0.02
    assert abs(found["threshold"][2] - 16.4) < 0.8
    assert found["free"][2] == 20
    assert abs(found["free"][1] - 0.21) < 0.01
    assert abs(found["shrink"][0] - found["shrink"][1]) < 0.015


def test_rows_expire_and_retire():
    buffer = ReplayBuffer(4, ttl=10.0, max_uses=3)
    buffer.add([[0], [1]], time=0.0)
    buffer.add([[2]], time=[5.0])
    assert len(buffer.draw(0, now=9.9)) == 0
    assert len(buffer) == 3
    assert sorted(buffer.draw(9, now=10.0).inputs[:, 0]) == [2]
    assert buffer.stats().expired == 2
    assert buffer.draw(1).uses.tolist() == [3]
    assert len(buffer) == 0
    assert buffer.stats().retired == 1


def test_mir_replays_what_suffers_most():
    buffer = ReplayBuffer(30, draw="mir", seed=3)
    buffer.add(np.arange(30)[:, None])
    drawn = buffer.draw(3, score=lambda rows: rows.inputs[:, 0], candidates=30)
    assert drawn.inputs[:, 0].tolist() == [29, 28, 27]
    assert buffer.rows().uses.sum() == 33
    with pytest.raises(FedistillError, match="a function that scores rows, found none"):
        buffer.draw(3)
    with pytest.raises(FedistillError, match="expected 30 finite scores"):
        buffer.draw(3, score=lambda rows: rows.inputs[:, 0] * np.nan)


@pytest.mark.parametrize("policy", ALL)
def test_resuming_is_exact(policy, tmp_path):
    extras = {"max_uses": 4, "ttl": 60.0}
    straight = made(policy, **extras)
    straight.draw(3, "balanced")
    straight.erase("x")
    save_state(tmp_path / "buffer.state", straight.state_dict(), {})
    resumed = ReplayBuffer(99, policy, seed=77, **extras)
    resumed.load_state_dict(load_state(tmp_path / "buffer.state")[0])
    for buffer in (straight, resumed):
        feed(buffer, stream(30, 40))
    for how in ("uniform", "balanced"):
        assert np.array_equal(straight.draw(4, how).ids, resumed.draw(4, how).ids)
    assert same(straight.state_dict(), resumed.state_dict())
    assert straight.stats() == resumed.stats()
    assert not same(straight.state_dict(), made(policy, seed=1).state_dict())


def test_an_empty_buffer_is_whole():
    buffer = ReplayBuffer(3)
    assert buffer.add(np.empty((0, 2)), np.empty(0)) == 0
    assert len(buffer.draw(5)) == len(buffer.rows()) == 0
    assert buffer.erase("x").rows == 0
    buffer.merge(ReplayBuffer(3, seed=1))
    again = ReplayBuffer(3)
    again.load_state_dict(buffer.state_dict())
    assert same(buffer.state_dict(), again.state_dict())
    assert buffer.stats().fill == 0


def test_stats():
    buffer = ReplayBuffer(4, "recent")
    buffer.add(np.zeros((6, 2), np.float32), [0, 0, 1, 1, 1, 0], subject=[*"aabbc", ""])
    buffer.draw(4)
    stats = buffer.stats()
    assert (stats.rows, stats.capacity, stats.fill, stats.seen) == (4, 4, 1.0, 6)
    assert (stats.classes, stats.subjects) == ({0: 1, 1: 3}, 2)
    assert (stats.age, stats.uses) == ((1.5, 3.0), (2.0, 2.0))


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({"inputs": [[np.nan, 1.0]]}, "inputs must be finite, row 0 is not: clean or impute"),
        ({"inputs": [["a", "b"]]}, "encode texts first"),
        ({"inputs": [[1.0]]}, r"expected inputs of shape \[2\] a row as the buffer holds"),
        ({"inputs": [[1, 2]]}, "expected inputs of float32 as the buffer holds, found int64"),
        ({"labels": [0, 1]}, r"expected 1 labels, found shape \[2\]"),
        ({"labels": [0.5]}, "labels must be whole numbers, found float64"),
        ({"labels": [-2]}, "labels must be at least -1, found -2"),
        ({"logits": [1.0]}, r"expected logits \[1, columns\], found \[1\]"),
        ({"logits": [[np.inf]]}, "logits must be finite"),
        ({"logits": [["a"]]}, "logits must be numbers"),
        ({"scores": None}, "expected scores for this policy, found none"),
        ({"subject": ["a", "b"]}, "one subject or one for each of 1 rows"),
        ({"subject": [7.0]}, "subjects as texts or whole numbers, found float64"),
        ({"subject": [b"x"]}, "subjects as texts or whole numbers"),
        ({"time": np.nan}, "one finite time"),
    ],
)
def test_bad_rows_are_refused_whole(rows, text):
    buffer = made("hardest")
    before = buffer.state_dict()
    with pytest.raises(DataError, match=text):
        buffer.add(**({"inputs": [[1.0, 2.0]], "labels": [0], "scores": [1.0]} | rows))
    assert same(before, buffer.state_dict())


def test_bad_arguments_are_told():
    for extras, text in [
        ({"ttl": 0.0}, "a ttl above 0, found 0.0"),
        ({"max_uses": 0}, "max_uses of at least 1, found 0"),
        ({"refill": "maybe"}, 'refill of threshold, shrink, free, found "maybe"'),
        ({"refill": "shrink", "ttl": 1.0}, "would shrink it to nothing"),
        ({"capacity": -1}, "capacity of at least 0, found -1"),
    ]:
        with pytest.raises(FedistillError, match=text):
            ReplayBuffer(**({"capacity": 3} | extras))
    with pytest.raises(FedistillError, match="a count from 0, found -1"):
        ReplayBuffer(3).draw(-1)
    odd = ReplayBuffer(3, lambda rows: rows.uniform[:1] * np.nan)
    with pytest.raises(FedistillError, match="expected 4 finite keys"):
        odd.add(np.zeros((4, 1)))
    assert odd.seen == len(odd) == 0


def test_a_state_of_another_policy_or_damaged_is_refused():
    state, buffer = made("recent").state_dict(), ReplayBuffer(3)
    with pytest.raises(CheckpointError, match="has policy recent, this one reservoir: resume"):
        buffer.load_state_dict(state)
    recent = made("recent", 5)
    before = recent.state_dict()
    for name in ("rows.inputs", "random.keys"):
        with pytest.raises(CheckpointError, match="damaged"):
            recent.load_state_dict(state | {name: state[name][:2]})
    with pytest.raises(CheckpointError, match="damaged"):
        recent.load_state_dict({k: v for k, v in state.items() if k != "now"})
    assert same(before, recent.state_dict())


def test_class_means_forget_whom_the_other_buffer_had_to_forget():
    """Rows that are long gone are in the means only: whoever knows of the erasure clears them."""
    pure, met = ReplayBuffer(2, "herding", seed=1), ReplayBuffer(2, "herding", seed=2)
    met.add([[0.0]], [5], features=[[1.0, 0.0]], subject="ann")
    met.add([[1.0]] * 9, [6] * 9, features=[[0.0, 1.0]] * 9)
    assert 5 in met.state_dict()["means.labels"]
    pure.erase("ann")
    pure.merge(met)
    held = np.unique(pure.rows().labels)
    assert np.array_equal(pure.state_dict()["means.labels"], held)
    old = met.state_dict()
    pure.load_state_dict(old)
    assert pure.state_dict()["means.counts"].sum() == len(pure)
    assert "ann" not in pure.rows().subjects


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced", "recent", "herding"])
def test_a_dropped_memory_begins_anew_and_nothing_of_it_is_left(policy):
    buffer = ReplayBuffer(20, policy, seed=3)
    features = np.eye(4)[np.arange(200) % 4]
    old = np.full((200, 2), 77.25, dtype=np.float32)
    buffer.add(old, np.arange(200) % 4, features=features, logits=old)
    assert buffer.drop() == 20
    assert len(buffer) == 0
    assert buffer.stats().dropped == 20
    content = b"".join(value.tobytes() for value in buffer.state_dict().values())
    assert np.float32(77.25).tobytes() not in content
    new = np.zeros((15, 2), dtype=np.float32)
    assert buffer.add(new, np.zeros(15, int), features=features[:15], logits=new) == 15
    assert buffer.seen == 215
    again = ReplayBuffer(20, policy, seed=3)
    again.load_state_dict(buffer.state_dict())
    assert again.stats() == buffer.stats()
