"""The client's step: asked twice it answers alike, and nothing private gets out."""

from __future__ import annotations

import dataclasses
import json
import lzma
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    INPUTS,
    Saying,
    federation,
    gaussian,
    participants,
    plain,
    probabilities,
    reseal,
    saying,
    tampered,
)

from fedistill.backends import Reply
from fedistill.client import Client, Site
from fedistill.distill.density import DENSITIES
from fedistill.errors import DataError, Rejected
from fedistill.presets import METHODS
from fedistill.types import Rows
from fedistill.wire import codec, entropy
from fedistill.wire.envelope import unseal
from fedistill.wire.messages import Plan, Upload

SHARING = [name for name, entry in METHODS.items() if entry.exchange == "predictions"]


def begun(tmp_path: Path | None = None, **options: Any) -> Any:
    fed = federation(**options)
    next(iter(fed.run(1, out=tmp_path)))
    return fed


# --- asked twice ---------------------------------------------------------------------------------


def test_the_same_plan_twice_gives_the_same_bytes_and_trains_once() -> None:
    logits = probabilities(40, 3).astype(np.float32)
    fed = begun(clients=[*participants(3), saying("site-9", logits)])
    plan = fed.server.plan(2)
    for name, site in fed.sites.items():
        site.answer(plan.message(name))
    states = {name: site.learner.state_dict() for name, site in fed.sites.items()}
    first = {name: site.answer(plan.message(name)) for name, site in fed.sites.items()}
    for _ in range(3):
        assert {n: site.answer(plan.message(n)) for n, site in fed.sites.items()} == first
    assert fed.sites["site-9"].learner.fitted == 2
    for name, site in fed.sites.items():
        for key, value in site.learner.state_dict().items():
            np.testing.assert_array_equal(value, states[name][key])


def test_after_a_restart_the_stored_bytes_are_sent_again(tmp_path: Path) -> None:
    fed = begun(tmp_path)
    plan = fed.server.plan(2)
    first = {name: site.answer(plan.message(name)) for name, site in fed.sites.items()}
    again = federation()
    sites = again._sites(tmp_path)
    for name, site in sites.items():
        assert site.restore(plan.run, 2) is None
        site.learner.fit = lambda *a, **k: pytest.fail("it trained a second time")
        assert site.answer(plan.message(name)) == first[name]


def test_a_refusal_is_remembered_like_an_answer(tmp_path: Path) -> None:
    people = [*participants(3), saying("site-9", lambda s, x: np.full((len(x), 3), np.nan))]
    fed = begun(tmp_path, clients=people)
    message = fed.server.plan(2).message("site-9")
    site = fed.sites["site-9"]
    for _ in range(3):
        with pytest.raises(Rejected, match="nonfinite"):
            site.answer(message)
    assert site.learner.fitted == 2
    restored = federation(people)._sites(tmp_path)["site-9"]
    restored.restore(fed.server.run, 3)
    with pytest.raises(Rejected, match="nonfinite"):
        restored.answer(message)
    assert restored.learner.fitted == 2


def test_a_plan_of_a_round_that_is_over_is_refused() -> None:
    fed = begun()
    site = fed.sites["site-0"]
    old = fed.server.plan(1)
    site.answer(fed.server.plan(2).message("site-0"))
    with pytest.raises(Rejected) as caught:
        site.answer(dataclasses.replace(old, targets=None, own={}).to_bytes())
    assert caught.value.reason == "stale_round"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda told: {"codec": "zip"}, "codec"),
        (lambda told: {"classes": 4}, "shape"),
        (lambda told: {"missing": [0]}, "fields"),
        (lambda told: {"choices": 2}, "shape"),
        (lambda told: {"choices": 0}, "shape"),
        (lambda told: {"mark": "0" * 16}, "reference"),
        (lambda told: {"spec": told["spec"] | {"total": 41}}, "shape"),
        (lambda told: {"spec": told["spec"] | {"count": 10**12}}, "shape"),
        (lambda told: {"spec": told["spec"] | {"count": 39}}, "shape"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_learned(
    change: Any, reason: str
) -> None:
    fed = begun()
    site = fed.sites["site-1"]
    before = site.learner.state_dict()
    message = fed.server.plan(2).message("site-1")
    told = unseal(message, 1 << 20)[0]["targets"]
    with pytest.raises(Rejected) as caught:
        site.answer(reseal(message, targets=told | change(told)))
    assert caught.value.reason == reason
    for key, value in site.learner.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    assert site.answer(message)


def test_soft_targets_that_are_no_numbers_are_refused() -> None:
    fed = begun(method="ds-fl")
    plan = fed.server.plan(2)
    bad = plain(np.full((40, 3), np.nan))
    broken = dataclasses.replace(plan, targets=dataclasses.replace(plan.targets, payload=bad))
    with pytest.raises(Rejected, match="nonfinite"):
        fed.sites["site-0"].answer(broken.to_bytes())
    assert fed.sites["site-0"].answer(plan.to_bytes())


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a b", "ä", "x" * 65, "-x", "a\n"])
def test_a_client_id_that_is_no_plain_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="client id"):
        Client(name, lambda: None, gaussian(3, 1))


# --- nothing private gets out --------------------------------------------------------------------


def marked(count: int, seed: int) -> tuple[Rows, list[bytes]]:
    """Rows whose every value is a float that occurs nowhere else, and the bytes to look for."""
    random = np.random.default_rng(seed)
    inputs = (random.random((count, INPUTS)) * 3 - 1).astype(np.float32)
    labels = random.permutation(np.arange(count) % 3).astype(np.int64)
    # An outlier that any learner memorises, and that no mean of others resembles.
    inputs[0] = [31.415926, -27.182818, 16.180339, 14.142135]
    patterns = []
    for row in inputs:
        for kind in ("<f4", ">f4", "<f8", ">f8", "<f2"):
            patterns.append(np.asarray(row, kind).tobytes())
        patterns += [np.asarray(value, kind).tobytes() for value in row for kind in ("<f8", ">f8")]
        patterns += [np.asarray(value, "<f4").tobytes() for value in row]
        patterns += [repr(float(value)).encode() for value in row]
        patterns += [f"{value:.6g}".encode() for value in row if abs(value) > 10]
    for kind in ("<i8", ">i8", "<i4", "|u1", "<f4"):
        patterns.append(labels.astype(kind).tobytes())
    patterns += [
        str(labels.tolist()).encode(),
        "".join(map(str, labels)).encode(),
        json.dumps(labels.tolist(), separators=(",", ":")).encode(),
    ]
    return Rows(inputs, labels), patterns


def unpacked(data: bytes) -> bytes:
    """Packed content in any of its forms, whatever its size."""
    if data[:1] == entropy.RANGE_CODED:
        stream = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=entropy.FILTERS)
        return stream.decompress(data[1:])
    if data[:1] != entropy.SPLIT:
        return zlib.decompress(data)
    split = 5 + int.from_bytes(data[1:5], "little")
    values = np.frombuffer(unpacked(data[split:]), dtype=np.uint8)
    places = np.unpackbits(np.frombuffer(unpacked(data[5:split]), dtype=np.uint8)).astype(bool)
    places = places[: len(places) - (int(places.sum()) - len(values))]
    content = np.zeros(len(places), dtype=np.uint8)
    content[places] = values
    return content.tobytes()


def undone(payload: bytes) -> bytes:
    """What coded predictions unfold to: as they are, or their changes."""
    start = {0: 1, 1: None}.get(payload[0], 5)
    return b"" if start is None else unpacked(payload[start:])


def unfolded(message: bytes) -> list[bytes]:
    """A message as it travels and as it reads: header, payload, payload unfolded."""
    header, payload = unseal(message, 1 << 26)
    parts = [message, json.dumps(header).encode(), payload]
    if header["kind"] == "upload":
        upload = Upload.from_bytes(message)
        parts += [undone(upload.payload), unpacked(upload.ratios) if upload.ratios else b""]
    elif (targets := Plan.from_bytes(message).targets) is not None:
        parts.append(undone(targets.payload))
    return parts


def test_what_a_message_hides_is_unfolded() -> None:
    random = np.random.default_rng(0)
    drawn = random.integers(0, 256, 3000, dtype=np.uint8)
    dense = (np.arange(3000, dtype=np.uint16) ** 2 // 700 + drawn // 64).astype(np.uint8).tobytes()
    sparse = np.where(drawn < 20, drawn, 0).astype(np.uint8).tobytes()
    forms = set()
    for content in (drawn.tobytes(), dense, sparse):
        packed = codec.pack(content, hard=True)
        forms.add(packed[:1])
        assert unpacked(packed) == content
    assert forms == {b"x", entropy.RANGE_CODED, entropy.SPLIT}


@pytest.mark.parametrize("name", SHARING)
def test_no_private_row_and_no_label_is_in_anything_that_travels_or_is_logged(
    name: str, tmp_path: Path
) -> None:
    people, patterns = [], []
    for k, client in enumerate(participants(4)):
        rows, found = marked(22 + k, 50 + k)
        people.append(dataclasses.replace(client, data=rows))
        patterns += found
    travelled: list[bytes] = []

    def listen(sender: str, data: bytes, plan: Plan) -> Reply:
        travelled.extend(unfolded(data))
        travelled.extend(unfolded(plan.message(sender)))
        return Reply(sender, data)

    fed = federation(people, method=name)
    list(fed.run(4, gaussian(20, 3), out=tmp_path, backend=tampered(listen)))
    travelled += [
        (tmp_path / "rounds.jsonl").read_bytes(),
        json.dumps(fed.summary()).encode(),
        (tmp_path / "checkpoint" / "server").read_bytes(),
    ]
    assert len(travelled) > 4 * 4 * 6
    everything = b"\0\0\0\0\0\0\0\0".join(travelled)
    found = [pattern for pattern in patterns if len(pattern) > 3 and pattern in everything]
    assert found == []


def test_the_search_for_private_rows_would_find_one() -> None:
    rows, patterns = marked(22, 50)
    upload = codec.pack(b"head" + rows.inputs[7].tobytes() + rows.labels.tobytes())
    assert sum(pattern in zlib.decompress(upload) for pattern in patterns) >= 3


def said_of_rows(name: str, rows: Rows) -> Upload:
    """What a site says that has a given model and these rows."""
    weights = probabilities(INPUTS, 1).astype("f4")
    client = Client("site-0", lambda: Saying(lambda self, inputs: inputs @ weights), rows)
    fed = federation([client, *participants(4)[1:]], method=name)
    plan = fed.server.plan(1)
    fed.sites = fed._sites(None)
    message = dataclasses.replace(plan, run="r").message("site-0")
    return Upload.from_bytes(fed.sites["site-0"].answer(message))


@pytest.mark.parametrize("name", SHARING)
def test_what_a_site_says_about_its_rows_is_rounded(name: str) -> None:
    """Two sites with other numbers of rows and the same model say the same but for the mask.

    Where familiarity is estimated from the rows alone it is what the method shares: as a number
    for each row, or as which rows are answered. All else must be the same there too.
    """
    one, two = (said_of_rows(name, rows) for rows in (gaussian(18, 1), gaussian(22, 2)))
    method = METHODS[name]
    if method.density() not in DENSITIES:
        assert one.to_bytes() == two.to_bytes()
        return
    assert one.ratios != two.ratios or one.declined != two.declined
    shared = {"ratios": b""} if method.tells_familiarity() else {}
    if method.accept:
        rows = np.arange(40)
        _, here, there = np.intersect1d(
            rows[one.answered(40)], rows[two.answered(40)], return_indices=True
        )
        np.testing.assert_array_equal(one.codes()[here], two.codes()[there])
        shared |= {"declined": b"", "payload": b"", "shape": (0, 3)}
    bare = [dataclasses.replace(said, **shared).to_bytes() for said in (one, two)]
    assert bare[0] == bare[1]


def test_only_what_was_asked_is_predicted() -> None:
    fed = federation(per_round=7)
    for row in fed.run(3):
        assert row["clients_ok"] == 4
    plan = fed.server.plan(4)
    said = fed.sites["site-0"].answer(plan.message("site-0"))
    answer = fed.server.check(said, plan, "site-0", set())
    assert answer.probs.shape == (7, 3)


def test_the_bytes_reported_are_the_bytes_sent() -> None:
    up, down = [0], [0]

    def weigh(sender: str, data: bytes, plan: Plan) -> Reply:
        up[0] += len(data)
        down[0] += len(plan.message(sender))
        return Reply(sender, data)

    fed = federation()
    for row in fed.run(3, backend=tampered(weigh)):
        assert (row["bytes_up"], row["bytes_down"]) == (up[0], down[0])
        up[0] = down[0] = 0
    assert fed.summary()["bytes_up_per_client_round"] > 0


def test_refused_bytes_are_counted_too() -> None:
    sent = [0]

    def spoil(sender: str, data: bytes, plan: Plan) -> Reply:
        said = b"x" * 1000 if sender == "site-3" else data
        sent[0] += len(said)
        return Reply(sender, said)

    row = next(iter(federation().run(1, backend=tampered(spoil))))
    assert row["clients_failed"] == 1
    assert row["bytes_up"] == sent[0]


def test_torch_random_state_is_left_alone_by_a_client_step() -> None:
    fed = begun()
    before = torch.random.get_rng_state()
    fed.sites["site-0"].answer(fed.server.plan(2).message("site-0"))
    assert torch.equal(torch.random.get_rng_state(), before)


# --- a real site outlives a run ------------------------------------------------------------------


def at_home(folder: Path, logits: Any = None) -> Site:
    """A site as a process of its own builds it; with its state in a folder for every run."""
    said = probabilities(40, 3).astype(np.float32) if logits is None else logits
    made = federation([*participants(3), saying("site-9", said)])
    site = made._sites(None)["site-9"]
    site.keep_runs_in(folder)
    return site


def plans_of(run: str, count: int = 3) -> list[Plan]:
    server = federation([*participants(3), saying("site-9", None)]).server
    server.run = run
    return [server.plan(number) for number in range(1, count + 1)]


def test_a_run_that_the_site_has_not_met_starts_with_the_student_as_it_was_built(
    tmp_path: Path,
) -> None:
    site = at_home(tmp_path)
    for plan in plans_of("first"):
        assert site.recall(plan) is None
        site.answer(plan.to_bytes())
    assert site.learner.fitted == 3  # type: ignore[attr-defined]
    other = plans_of("second")[0]
    assert site.recall(other) is None
    assert (site.run, site.round, site.upload) == ("", 0, b"")
    assert not site.stamp.any()
    assert site.learner.fitted == 0  # type: ignore[attr-defined]
    site.answer(other.to_bytes())
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    later = plans_of("first", 4)[3]
    assert site.recall(later) is None
    assert (site.run, site.round) == ("first", 3)
    assert site.learner.fitted == 3  # type: ignore[attr-defined]


def test_a_damaged_state_is_noted_when_the_one_before_it_is_used(tmp_path: Path) -> None:
    site = at_home(tmp_path)
    first, second, third = plans_of("run")
    for plan in (first, second):
        site.recall(plan)
        site.answer(plan.to_bytes())
    (tmp_path / "run" / "state").write_bytes(b"FDstate\n")
    again = at_home(tmp_path)
    note = again.recall(third)
    assert note is not None
    assert "the generation before it was used" in note
    assert again.round == 1


def test_a_refusal_is_remembered_by_a_new_process_too(tmp_path: Path) -> None:
    nan = np.full((40, 3), np.nan, np.float32)
    (plan,) = plans_of("run", 1)
    for _ in range(2):
        site = at_home(tmp_path, nan)
        site.recall(plan)
        with pytest.raises(Rejected, match="nonfinite"):
            site.answer(plan.to_bytes())
        assert site.learner.fitted == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("run", ["..", "a/b", "", "x" * 65, "\x00"])
def test_a_run_cannot_choose_a_folder_outside(run: str, tmp_path: Path) -> None:
    site = at_home(tmp_path)
    with pytest.raises(Rejected) as caught:
        site.recall(plans_of(run, 1)[0])
    assert caught.value.reason == "run"
    assert list(tmp_path.iterdir()) == []
