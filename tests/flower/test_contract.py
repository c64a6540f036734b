"""One experiment, one result: whatever runs the clients, and however their answers travel."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from builders import read_lines, timeless
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedistill import config, experiment
from fedistill.assembly import assemble, method_of
from fedistill.backends.serial import Serial
from fedistill.client import Client, Member, Site
from fedistill.federation import Federation
from fedistill.flower import backend, client_app, convert, jobs, outcome, server_app, simulated
from fedistill.flower.roster import by_asking
from fedistill.wire.messages import Failure, Plan

from .grid import DROP, FIRST, LOST, Clock, InProcessGrid, over

ROUNDS = 3
SETTINGS = config.parse("""
seed = 5
rounds = 3
[data]
source = "digits"
test_rows = 200
[proxy]
rows = 120
per_round = 80
[clients]
count = 3
width = 8
epochs = 2
labelled = 40
[[clients.group]]
count = 1
model = "linear"
[student]
width = 16
epochs = 2
[backend]
device = "cpu"
""")
NAMES = ("site-0", "site-1", "site-2")
MEASURED = {
    "client_accuracy",
    "client_accuracy_mean",
    "client_accuracy_min",
    "client_auc",
    "client_auc_mean",
}
"""What only a simulation can know of its clients."""


@pytest.fixture(scope="module")
def rows() -> Any:
    return experiment.rows_of(SETTINGS)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the serial backend."""
    folder = tmp_path_factory.mktemp("serial") / "run"
    experiment.run(SETTINGS, name="serial", out=folder)
    return folder


def digest(folder: Path) -> str:
    told: str = json.loads((folder / "summary.json").read_text())["soft_targets_sha256"]
    return told


def unmeasured(rows: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in timeless(rows)]


def whole(rows: Any) -> Federation:
    return assemble(SETTINGS, rows, method_of(SETTINGS))


def of_members(rows: Any) -> Federation:
    """The coordinator's half: everything but the clients' rows."""
    real = dataclasses.replace(
        SETTINGS,
        clients=dataclasses.replace(SETTINGS.clients, group=()),
        deployment=dataclasses.replace(SETTINGS.deployment, sites=NAMES),
    )
    return assemble(real, dataclasses.replace(rows, parts={}), method_of(SETTINGS))


def a_site(rows: Any, name: str, folder: Path, kind: type[Site] = Site) -> Site:
    """One client at work as a node builds it: from nothing, with its state on disk."""
    fed = whole(rows)
    client: Client = next(client for client in fed.clients if client.id == name)
    site = kind.open(client, fed.proxy, fed.classes, fed.method, seed=fed.seed, device=fed.device)
    site.keep_runs_in(folder / name)
    return site


def app_of(rows: Any, folder: Path, *, lives_on: bool = False) -> ClientApp:
    """The user's own client app; its sites are built for every message, or live on."""
    kept: dict[str, Site] = {}

    def site(node: Any, run: Any) -> Site:
        name = str(node["site-id"])
        if not lives_on:
            return a_site(rows, name, folder)
        return kept.setdefault(name, kept.get(name) or a_site(rows, name, folder))

    return client_app(site)


def grid_of(app: ClientApp, **options: Any) -> InProcessGrid:
    return InProcessGrid(app, [{"site-id": name} for name in NAMES], **options)


@pytest.mark.parametrize("lives_on", [True, False], ids=["one process", "a process per message"])
@pytest.mark.parametrize("shuffle", [None, 1], ids=["in order", "shuffled and delayed"])
def test_sites_over_a_grid_give_the_bytes_and_the_rows_of_the_serial_backend(
    rows: Any, serial: Path, tmp_path: Path, lives_on: bool, shuffle: int | None
) -> None:
    late = (lambda node, group, attempt: (node * 7 + int(group) * 5) % 11) if shuffle else None
    app = app_of(rows, tmp_path, lives_on=lives_on)
    grid = grid_of(app, shuffle=shuffle)
    if late is not None:
        grid.fate = lambda node, group, n: late(node, group, n) if group.isdigit() else "deliver"
    fed = of_members(rows)
    done = list(fed.run(ROUNDS, rows.dataset.test, backend=over(grid, NAMES)))
    assert fed.server.digest() == digest(serial)
    assert unmeasured(done) == unmeasured(read_lines(serial / "rounds.jsonl"))
    assert all(row["clients_ok"] == 3 and not row["dropped"] for row in done)


def test_the_two_apps_of_a_user_give_the_same_too(rows: Any, serial: Path, tmp_path: Path) -> None:
    made: list[Federation] = []

    def federation(run_config: Any) -> Federation:
        assert run_config == {"mine": "yes"}
        made.append(of_members(rows))
        return made[0]

    told = {"mine": "yes"}
    grid = grid_of(app_of(rows, tmp_path / "sites"), run_config=told)
    app = server_app(federation, rounds=ROUNDS, test=rows.dataset.test, out=tmp_path / "run")
    app(grid, Context(1, 1, {}, RecordDict(), dict(told)))
    assert made[0].server.digest() == digest(serial)
    lines = read_lines(tmp_path / "run" / "rounds.jsonl")
    assert unmeasured(lines) == unmeasured(read_lines(serial / "rounds.jsonl"))


# --- `fedistill run --backend flower`, without Ray and without a SuperLink -----------------------


def told_to_serve(folder: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    settings = folder / "settings.toml"
    settings.write_text(config.to_toml(dataclasses.replace(SETTINGS, **changes)))
    job = {
        "settings": str(settings),
        "folder": str(folder),
        "out": str(folder / "run"),
        "name": "over a grid",
        "resume": resume,
        "outcome": str(folder / "outcome.json"),
    }
    (folder / "job").mkdir(exist_ok=True)
    jobs.lay_down(folder / "job", job)
    return job


def simulation(folder: Path, *, resume: bool = False, **changes: Any) -> tuple[int, str]:
    """The server app as `fedistill run` starts it, over nodes as Ray's; how it ended."""
    simulated.federation.cache_clear()
    simulated._site.cache_clear()
    told = told_to_serve(folder, resume=resume, **changes)
    nodes = [{"partition-id": number, "num-partitions": 3} for number in range(3)]
    serve_over(InProcessGrid(client_app(), nodes), folder)
    ended = outcome.outcome(Path(told["outcome"]))
    assert ended is not None
    return ended.code, ended.text


def serve_over(grid: InProcessGrid, folder: Path) -> None:
    with mock.patch.dict(os.environ, {jobs.FOLDER: str(folder)}):
        server_app()(grid, Context(1, 1, {}, RecordDict(), {"job": "job"}))


def test_a_simulation_on_flower_gives_every_figure_of_the_serial_backend(
    serial: Path, tmp_path: Path
) -> None:
    assert simulation(tmp_path) == (0, "")
    run = tmp_path / "run"
    assert digest(run) == digest(serial)
    assert read_lines(run / "rounds.jsonl") == read_lines(serial / "rounds.jsonl")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, serial)]
    for summary in summaries:
        del summary["name"], summary["seconds"]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("name", ["scarlet", "cfd", "selective-fd", "comet", "fedmd", "fd"])
def test_whatever_a_method_exchanges_comes_over_flower_as_it_is(name: str, tmp_path: Path) -> None:
    """Deltas, held and declined rows, several targets a row, logits, tables."""
    method = config.MethodSettings(preset=name)
    told = experiment.run(dataclasses.replace(SETTINGS, method=method), out=tmp_path / "serial")
    assert simulation(tmp_path, method=method) == (0, "")
    assert digest(tmp_path / "run") == told["soft_targets_sha256"]
    lines = read_lines(tmp_path / "run" / "rounds.jsonl")
    assert lines == read_lines(tmp_path / "serial" / "rounds.jsonl")
    assert all(row["clients_ok"] == 3 and not row["dropped"] for row in lines)


@pytest.mark.parametrize("fate", [DROP, LOST])
@pytest.mark.parametrize("name", ["scarlet", "cfd", "fedmd"])
def test_a_site_that_misses_two_rounds_comes_back_to_the_same_bytes(
    rows: Any, tmp_path: Path, name: str, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it never got the plan or nobody got its answer: it is told again what it lacks."""
    away = ("2", "3")
    people = dataclasses.replace(SETTINGS.clients, quorum=2)
    chosen = config.MethodSettings(preset=name, cache_rounds=3 if name == "scarlet" else None)
    settings = dataclasses.replace(SETTINGS, clients=people, method=chosen)

    class Absent(Serial):
        def run(self, plan: Plan) -> Any:
            there = [n for n in plan.clients if n != "site-2" or str(plan.round) not in away]
            heard = dataclasses.replace(plan, clients=tuple(there))
            for reply in super().run(heard if fate == DROP else plan):
                if reply.client in there:
                    yield reply
            for name in sorted({*plan.clients} - {*there}):
                yield Failure(name, plan.round, "away")

    alone = assemble(settings, rows, method_of(settings))
    expected = list(alone.run(6, rows.dataset.test, backend=Absent))

    def open_site(node: Any, run: Any) -> Site:
        fed = assemble(settings, rows, method_of(settings))
        site = fed.site(next(one for one in fed.clients if one.id == node["site-id"]))
        site.keep_runs_in(tmp_path / str(node["site-id"]))
        return site

    grid = grid_of(client_app(open_site))
    grid.fate = lambda node, group, n: fate if node == FIRST + 2 and group in away else "deliver"
    real = dataclasses.replace(
        settings,
        clients=dataclasses.replace(people, group=()),
        deployment=dataclasses.replace(settings.deployment, sites=NAMES),
    )
    fed = assemble(real, dataclasses.replace(rows, parts={}), method_of(settings))
    monkeypatch.setattr(backend, "time", Clock(grid))
    done = list(fed.run(6, rows.dataset.test, backend=over(grid, NAMES, grace=20.0)))
    assert [row["clients_ok"] for row in done] == [3, 2, 2, 3, 3, 3]
    assert [row["clients_ok"] for row in expected] == [3, 2, 2, 3, 3, 3]
    assert fed.server.digest() == alone.server.digest()
    assert [row["student_accuracy"] for row in done] == [
        row["student_accuracy"] for row in expected
    ]


def test_a_simulation_on_flower_resumes_as_another_run_of_flowers(
    serial: Path, tmp_path: Path
) -> None:
    assert simulation(tmp_path, rounds=1) == (0, "")
    assert simulation(tmp_path, resume=True) == (0, "")
    assert digest(tmp_path / "run") == digest(serial)
    lines = read_lines(tmp_path / "run" / "rounds.jsonl")
    assert lines == read_lines(serial / "rounds.jsonl")


def test_a_simulation_whose_settings_are_wrong_says_so_and_how_to_mend_them(
    tmp_path: Path,
) -> None:
    wrong = dataclasses.replace(SETTINGS.proxy, rows=100_000, per_round=0)
    code, text = simulation(tmp_path, proxy=wrong)
    assert code == 3
    assert "proxy.rows" in text
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_node_too_many_is_left_out(tmp_path: Path, serial: Path) -> None:
    told = told_to_serve(tmp_path)
    nodes = [{"partition-id": number} for number in range(4)]
    serve_over(InProcessGrid(client_app(), nodes), tmp_path)
    assert outcome.outcome(Path(told["outcome"])) == outcome.Outcome()
    assert digest(tmp_path / "run") == digest(serial)


# --- the converter -------------------------------------------------------------------------------


def sent(fields: dict[str, Any]) -> Message:
    grid_of(ClientApp())  # Flower builds no message without a task
    return convert.request(convert.ROUND, 5, fields, group="3", ttl=9.0)


def test_a_plan_and_an_upload_travel_as_one_record_with_their_very_bytes() -> None:
    plan = bytes(range(256)) * 300
    message = sent({"plan": plan, "home": "/runs/x"})
    assert (message.metadata.message_type, message.metadata.group_id) == ("train.round", "3")
    assert message.metadata.ttl == 9.0
    assert convert.plan_of(message) == plan
    assert convert.text_of(message, "home") == "/runs/x"
    assert convert.text_of(message, "nothing") == ""
    answer = convert.response(message, {"upload": plan})
    heard = convert.heard("a", 3, answer)
    assert (heard.client, heard.data) == ("a", plan)  # type: ignore[union-attr]
    assert len(message.content) == len(answer.content) == 1


def test_a_roster_by_asking_takes_the_ids_of_members_and_clients_alike(rows: Any) -> None:
    fed = of_members(rows)
    assert {type(member) for member in fed.members} == {Member}
    grid = grid_of(client_app(lambda node, run: a_site_called(str(node["site-id"]))))
    assert by_asking(NAMES, pause=0.002)(grid) == {"site-0": 1000, "site-1": 1001, "site-2": 1002}


def a_site_called(name: str) -> Any:
    class Named:
        client = Member(name)

    return Named()
