"""A person is forgotten: found nowhere on disk, left out from then on, and a receipt says what."""

from __future__ import annotations

import contextlib
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import INPUTS, gaussian

import fedistill as fd
from fedistill import config, store
from fedistill.assembly import method_of
from fedistill.client import Site
from fedistill.deployment import Workplace, open_site, public_rows
from fedistill.distill.rehearsal import continual_learner
from fedistill.errors import CheckpointError, DataError, FedistillError, RunError
from fedistill.federation import Federation
from fedistill.forget import BOUNDED, REFITTED, RESTARTED, UNBOUNDED, forget
from fedistill.receipts import RECEIPTS
from fedistill.server import Server
from fedistill.settings import ContinualSettings
from fedistill.types import Rows

CANARY = np.float32(7.7112345)
NAME = "patient-Ω-4711"
MARKS = [CANARY.tobytes(), NAME.encode(), NAME.encode("utf-32-le"), NAME.encode("utf-16-le")]
MARKS += [str(CANARY).encode(), json.dumps(NAME).strip('"').encode()]


def traces(folder: Path) -> list[str]:
    """Files below a folder that hold the canary or the name, however texts are kept."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and any(mark in path.read_bytes() for mark in MARKS)
    )


def silent(text: str) -> None:
    assert NAME not in text


quietly = partial(forget, say=silent)


# --- a simulated run ---------------------------------------------------------------------------


def planted(rows: Rows) -> Rows:
    inputs, subject = rows.inputs.copy(), np.full(len(rows), "someone", dtype="<U20")
    inputs[:5, 0], subject[:5] = CANARY, NAME
    return Rows(inputs, rows.labels, subject=subject)


def build(kind: str) -> Any:
    from sklearn.linear_model import LogisticRegression

    return partial(fd.models.MLP, INPUTS, 3) if kind == "torch" else LogisticRegression


def remembering(kind: str = "torch", **how: Any) -> Federation:
    """Three clients that remember; at the first, rows of one person carry the canary."""
    objective = "der++" if kind == "torch" else "er"
    settings = ContinualSettings(buffer=1000, objective=objective, **how)
    clients = []
    for k in range(3):
        rows = gaussian(30, k) if k else planted(gaussian(30, 0))
        make = partial(continual_learner, settings, k)
        training = fd.Recipe(epochs=1)
        clients.append(fd.Client(f"site-{k}", build(kind), rows, None, training, make=make))
    proxy = fd.ProxySet(gaussian(40, 9).inputs)
    return Federation(clients, proxy, partial(fd.models.MLP, INPUTS, 3), seed=1)


@pytest.fixture(params=["torch", "sklearn"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ran(folder: Path, kind: str = "torch", rounds: int = 2, **how: Any) -> Federation:
    made = remembering(kind, **how)
    list(made.run(rounds, out=folder, resume=True))
    return made


@pytest.mark.parametrize("place", ["", "sites/site-0"])
def test_nothing_is_left_on_disk_and_nobody_comes_back(
    kind: str, place: str, tmp_path: Path
) -> None:
    ran(tmp_path, kind)
    assert traces(tmp_path) == ["sites/site-0/state", "sites/site-0/state.previous"]
    receipts = quietly(tmp_path / place, [NAME])
    assert [one.site for one in receipts] == (
        ["site-0"] if place else [f"site-{k}" for k in (0, 1, 2)]
    )
    assert [one.rows for one in receipts] == [5, 0, 0][: len(receipts)]
    assert receipts[0].written == ("sites/site-0/state.previous", "sites/site-0/state")
    assert traces(tmp_path) == []

    again = ran(tmp_path, kind, rounds=3)
    site = again.sites["site-0"]
    assert len(site.data) == 25
    assert set(site.data.subject) == {"someone"}
    held = site.learner.replay.rows()
    assert (len(held.labels), set(held.subjects)) == (25, {"someone"})  # none is held twice
    assert traces(tmp_path) == []


def test_two_are_forgotten_one_after_another_and_the_others_stay_known(tmp_path: Path) -> None:
    made = remembering()
    data = made.clients[0].data
    data.subject[5:8] = "another"
    list(made.run(2, out=tmp_path))
    for name, left in ((NAME, 25), ("another", 22)):
        quietly(tmp_path, [name])
        again = remembering()
        again.clients[0].data.subject[5:8] = "another"
        list(again.run(3, out=tmp_path, resume=True))
        held = again.sites["site-0"].learner.replay.rows()
        assert len(held.labels) == len(again.sites["site-0"].data) == left


def test_in_the_same_process_rows_are_left_out_as_well(tmp_path: Path) -> None:
    made = ran(tmp_path)
    site = made.sites["site-0"]
    assert site.erase(NAME).rows == 5
    assert traces(tmp_path) == []
    list(made.run(3, out=tmp_path))
    assert len(site.data) == len(site.learner.replay.rows().labels) == 25


@pytest.mark.parametrize("drift", ["adwin", "page-hinkley", "mmd"])
def test_detectors_begin_anew_and_can_go_on(kind: str, drift: str, tmp_path: Path) -> None:
    ran(tmp_path, kind, drift=drift)
    quietly(tmp_path, [NAME])
    ran(tmp_path, kind, rounds=3, drift=drift)


def test_forgetting_is_the_same_as_erasing_in_the_process(kind: str, tmp_path: Path) -> None:
    erased, forgotten = tmp_path / "a", tmp_path / "b"
    ran(erased, kind).sites["site-0"].erase(NAME)
    ran(forgotten, kind)
    quietly(forgotten, [NAME])
    mine, theirs = (store.load_state(one / "sites/site-0/state")[0] for one in (erased, forgotten))
    memory = sorted(name for name in mine if ".replay." in name)
    assert memory == sorted(name for name in theirs if ".replay." in name)
    for name in memory:
        np.testing.assert_array_equal(mine[name], theirs[name])


# --- what is said of weights ---------------------------------------------------------------------


def test_the_receipt_says_what_the_model_keeps(kind: str, tmp_path: Path) -> None:
    made = ran(tmp_path, kind)
    (receipt,) = quietly(tmp_path / "sites/site-0", [NAME])
    said = {"torch": UNBOUNDED, "sklearn": REFITTED}[kind]
    assert receipt.weights == {made.server.run: said}
    assert (receipt.epsilon, receipt.ledger) == (None, "")


def test_restarted_a_site_is_one_that_never_saw_the_person(tmp_path: Path) -> None:
    ran(tmp_path)
    built = remembering()
    upload = store.load_state(tmp_path / "sites/site-0/state")[0]["upload"]
    receipts = quietly(tmp_path, [NAME], restart=True)
    assert {words for one in receipts for words in one.weights.values()} == {RESTARTED}
    arrays, facts, _ = store.load_state(tmp_path / "sites/site-0/state")
    assert (facts["round"], arrays["upload"].tobytes()) == (2, upload.tobytes())
    assert not arrays["stamp"].any()
    # As it was built, whatever it had learned.
    again = built.site(built.clients[0], tmp_path)
    fresh = {k: v for k, v in again.learner.state_dict().items() if not k.endswith("facts")}
    again.restore(facts["run"], 3)
    for name, array in fresh.items():
        np.testing.assert_array_equal(again.learner.state_dict()[name], array)
    assert again.round == 2
    # A second time it is still so, and the run goes on.
    (receipt, *_) = quietly(tmp_path, ["another"])
    assert set(receipt.weights.values()) == {RESTARTED}
    assert len(ran(tmp_path, rounds=3).sites["site-0"].learner.replay.rows().labels) == 25


def test_with_a_ledger_the_influence_is_bounded_and_the_erasure_is_in_the_chain(
    tmp_path: Path,
) -> None:
    from fedistill.privacy.events import Gaussian, Spending
    from fedistill.privacy.ledger import Ledger

    made = ran(tmp_path)
    place = tmp_path / "sites/site-0"
    ledger = Ledger(place / "ledger.sqlite")
    ledger.reserve(
        run=made.server.run,
        round=1,
        mechanism="dpsgd",
        spending=Spending.of(Gaussian(4.0)),
        unit="record",
        relation="add-remove",
        units=[b"a" * 32, b"b" * 32],
        epsilon=8.0,
        delta=1e-6,
    )
    spent, head = ledger.spent(1e-6), ledger.head
    ledger.close()
    (receipt,) = quietly(place, [NAME])
    assert receipt.weights == {made.server.run: BOUNDED}
    assert (receipt.epsilon, receipt.delta, receipt.unit) == (spent, 1e-6, "record")
    ledger = Ledger(place / "ledger.sqlite")
    ledger.verify()
    assert receipt.ledger == ledger.head != head
    assert ledger.entries()[-1].kind == "erase"
    ledger.close()
    assert any("refunds no epsilon" in note for note in receipt.notes)
    assert any("that of one record" in note for note in receipt.notes)

    (place / "ledger.sqlite").write_bytes(b"not a ledger")
    (receipt,) = quietly(place, [NAME])
    assert receipt.weights == {made.server.run: UNBOUNDED}
    assert receipt.epsilon is None
    assert any("cannot be trusted" in note for note in receipt.notes)


def test_the_audit_log_holds_the_digest_of_the_receipt(tmp_path: Path) -> None:
    from fedistill.privacy import audit_log

    ran(tmp_path)
    place = tmp_path / "sites/site-0"
    quietly(place, [NAME])
    assert not (place / audit_log.NAME).exists()
    log = audit_log.AuditLog(place / audit_log.NAME)
    log.append("run_begun", run="r", site="site-0")
    quietly(place, ["another"])
    entry = json.loads((place / audit_log.NAME).read_text().splitlines()[-1])
    files = [path.read_bytes() for path in (place / RECEIPTS).glob("*.json")]
    assert entry["event"] == "forgotten"
    assert entry["sha256"] in {hashlib.sha256(content).hexdigest() for content in files}
    (place / audit_log.NAME).write_text("broken")
    assert quietly(place, ["somebody"])[0].rows == 0


# --- receipts ------------------------------------------------------------------------------------


def test_receipts_are_read_by_people_and_by_programs_and_name_nobody(tmp_path: Path) -> None:
    ran(tmp_path)
    told: list[str] = []
    first, second = (
        forget(tmp_path / "sites/site-0", [NAME, "nobody", NAME], say=told.append)[0]
        for _ in range(2)
    )
    place = tmp_path / "sites/site-0" / RECEIPTS
    assert len(list(place.glob("forget-*.json"))) == len(list(place.glob("forget-*.txt"))) == 2
    saved = [json.loads(path.read_text()) for path in place.glob("*.json")]
    assert sorted(one["rows"] for one in saved) == [0, 5]
    assert (first.rows, second.rows) == (5, 0)
    assert first.subjects == second.subjects
    assert len(set(first.subjects)) == 2
    assert all(len(mark) == 64 for mark in first.subjects)
    assert told == [first.text(), second.text()]
    assert "rows taken out of memories: 5" in told[0]
    assert "left to do: the source files" in told[0]
    assert "nobody" not in "".join(path.read_text() for path in place.iterdir())
    assert traces(tmp_path) == []


def test_somebody_unknown_is_no_error(tmp_path: Path) -> None:
    ran(tmp_path)
    before = (tmp_path / "sites/site-1/state").read_bytes()
    receipts = quietly(tmp_path, ["nobody"])
    assert [one.rows for one in receipts] == [0, 0, 0]
    assert len((tmp_path / "sites/site-1/state").read_bytes()) >= len(before)


# --- what can be wrong ---------------------------------------------------------------------------


def test_a_damaged_generation_is_taken_away(tmp_path: Path) -> None:
    ran(tmp_path)
    state = tmp_path / "sites/site-0/state"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1])
    (receipt,) = quietly(state.parent, [NAME])
    assert (receipt.removed, receipt.rows) == (("sites/site-0/state",), 5)
    assert receipt.written == ("sites/site-0/state.previous",)
    assert traces(tmp_path) == []


@pytest.mark.parametrize("kind", ["torch", "sklearn"])
def test_an_older_state_that_is_put_back_brings_nobody_back(kind: str, tmp_path: Path) -> None:
    """Fault 50: the memory holds somebody who was erased."""
    ran(tmp_path, kind)
    state = tmp_path / "sites/site-0/state"
    older = state.read_bytes()
    quietly(tmp_path, [NAME])
    state.write_bytes(older)
    held = ran(tmp_path, kind, rounds=3).sites["site-0"].learner.replay.rows()
    assert (len(held.labels), set(held.subjects)) == (25, {"someone"})
    ran(tmp_path, kind, rounds=4)
    assert traces(tmp_path) == []


def test_both_generations_damaged_is_said_and_the_tombstone_stands(tmp_path: Path) -> None:
    ran(tmp_path)
    state = tmp_path / "sites/site-0/state"
    for path in (state, store.previous(state)):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        quietly(state.parent, [NAME])
    assert (state.parent / "tombstones.json").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    ran(tmp_path)
    before = traces(tmp_path)
    with store.held(tmp_path / "checkpoint"), pytest.raises(RunError, match="is in use"):
        quietly(tmp_path, [NAME])
    assert traces(tmp_path) == before


def test_other_folders_and_no_names_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=r"expected a site's folder .*, found none of them"):
            quietly(path, [NAME])
    for names in ([], [""], ["x", ""]):
        with pytest.raises(FedistillError, match="expected a subject, found none"):
            quietly(tmp_path, names)
    assert list(tmp_path.iterdir()) == []


def test_without_a_column_nobody_can_be_told_from_another(tmp_path: Path) -> None:
    ran(tmp_path)
    (tmp_path / "config.toml").write_text('[data]\nsource = "digits"\n')
    with pytest.raises(DataError, match=r"site-0: expected data\.subject to name the column"):
        quietly(tmp_path, [NAME])
    (tmp_path / "config.toml").write_text('[data]\nsource = "csv:x.csv"\nsubject = "who"\n')
    assert quietly(tmp_path, [NAME])[0].rows == 5


# --- a real site -----------------------------------------------------------------------------

PUBLIC = "age,dose\n" + "\n".join(f"{20 + k},{k % 7}" for k in range(30))
OWN = "who,dose,diagnosis,age\n" + "\n".join(
    f"{NAME if k % 6 == 0 else f'p{k}'},{k % 5},{('healthy', 'ill')[k % 2]},{30 + k}"
    for k in range(24)
)
AGREED = """
seed = 3
[data]
label = "diagnosis"
subject = "who"
path = "."
[proxy]
path = "csv:public.csv"
rows = 30
[clients]
count = 3
quorum = 1
model = "mlp"
width = 8
epochs = 2
[continual]
buffer = 100
[backend]
name = "flower"
device = "cpu"
[deployment]
sites = ["north", "south", "west"]
classes = ["healthy", "ill"]
proxy_sha256 = "FINGERPRINT"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real site; its source file lies elsewhere, for it is its owner's affair."""
    monkeypatch.delenv("FEDISTILL_DATA", raising=False)
    site, data = tmp_path / "site", tmp_path / "data"
    for place in (site, data):
        place.mkdir()
    (data / "own.csv").write_text(OWN)
    (site / "public.csv").write_text(PUBLIC)
    (site / "site.toml").write_text(
        f'id = "north"\n[data]\nsource = "csv:own.csv"\npath = "{data}"\ntest_rows = 0.25\n'
    )
    with contextlib.chdir(site):
        found = public_rows(config.parse(AGREED.replace("FINGERPRINT", ""))).proxy.fingerprint
    (site / "federation.toml").write_text(AGREED.replace("FINGERPRINT", found))
    return site


def answering(folder: Path, server: Server, number: int) -> Workplace:
    """The site after one more round, in a process that might be new."""
    place = open_site(folder, cache=True)
    plan = server.plan(number)
    place.answer(plan.message("north"))
    server.close(plan, ["north"])
    return place


def coordinator(folder: Path) -> Server:
    place = open_site(folder)
    names = dict.fromkeys(place.agreed.deployment.sites)
    method = method_of(place.agreed)
    site = place.site
    return Server(site.proxy, site.classes, None, method, names, seed=3, quorum=1)


def test_a_real_site_forgets_and_goes_on_without_the_person(folder: Path) -> None:
    server = coordinator(folder)
    first = answering(folder, server, 1)
    second = answering(folder, server, 2)
    held = second.site.learner.replay.rows()
    theirs = int((held.subjects == NAME).sum())
    assert theirs > 0
    run = f"state/runs/{server.run}/state"
    cache = [path for path in traces(folder) if path.startswith("state/cache/rows-")]
    assert traces(folder) == [*cache, run, f"{run}.previous"]

    (receipt,) = quietly(folder, [NAME])
    assert traces(folder) == []
    assert (receipt.site, receipt.rows) == ("north", theirs)
    assert receipt.written == (f"{run}.previous", run)
    assert receipt.removed == tuple(cache)
    assert receipt.weights == {server.run: UNBOUNDED}
    assert list((folder / "state" / RECEIPTS).glob("forget-*.txt"))

    # Twice, for the second time the rows come from the cache.
    for number in (3, 4):
        place = answering(folder, server, number)
        site = place.site
        assert isinstance(site, Site)
        for rows in (site.data, site.client.data, site.client.test):
            assert rows is not None
            assert NAME not in set(rows.subject)
        assert len(site.data) == len(first.site.data) - theirs
        assert len(site.learner.replay.rows().labels) == len(held.labels) - theirs
    assert traces(folder) == []


def test_a_site_that_took_no_part_yet_can_forget_somebody(folder: Path) -> None:
    (receipt,) = quietly(folder, [NAME])
    assert (receipt.rows, receipt.written, receipt.weights) == (0, (), {})
    data = open_site(folder).site.client.data
    assert NAME not in set(data.subject)


def test_a_restarted_real_site_begins_as_it_was_built(folder: Path) -> None:
    server = coordinator(folder)
    built = {k: v.copy() for k, v in open_site(folder).site.learner.state_dict().items()}
    for number in (1, 2):
        answering(folder, server, number)
    (receipt,) = quietly(folder, [NAME], restart=True)
    assert receipt.weights == {server.run: RESTARTED}
    site = open_site(folder).site
    plan = server.plan(3)
    assert site.recall(plan) is None
    assert site.round == 2
    weights = [name for name in built if not name.startswith("replay.") and name != "facts"]
    for name in weights:
        np.testing.assert_array_equal(site.learner.state_dict()[name], built[name])
    assert answering(folder, server, 3).site.round == 3


def test_a_real_site_in_use_is_left_alone(folder: Path) -> None:
    answering(folder, coordinator(folder), 1)
    with store.held(folder / "state"), pytest.raises(RunError, match="is in use"):
        quietly(folder, [NAME])
    assert traces(folder)
