"""`deploy init`: what it writes is one federation, and gives what the simulation gives."""

from __future__ import annotations

import faulthandler
import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import read_lines

from fedistill import config, experiment
from fedistill.config import Settings
from fedistill.deployment import open_site
from fedistill.errors import DataError, RunError, SettingsError
from fedistill.flower import client_app
from fedistill.flower.backend import FlowerBackend
from fedistill.flower.founding import SIMULATION, write_deployment
from fedistill.flower.roster import by_key, read_key

from .grid import InProcessGrid

SITES = ("north", "south", "west")
SMALL = """
seed = 5
rounds = 2
[data]
source = "digits"
test_rows = 100
[proxy]
rows = 100
[clients]
count = 8
labelled = 40
width = 8
epochs = 2
quorum = 2
[student]
width = 16
epochs = 2
[backend]
device = "cpu"
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A site changes its process, which elsewhere ends with the step; this one goes on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    faulthandler.cancel_dump_traceback_later()


def over_the_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """The federation over what `found` wrote: every site in its folder, known by its key."""
    monkeypatch.chdir(folder / "coordinator")
    settings = config.load("federation.toml")
    names = settings.deployment.sites
    # On the wire a node is a number and a key, and in another order than the sites.
    nodes = list(reversed(names))
    grid = InProcessGrid(
        client_app(),
        [{"site": str(folder / "sites" / name)} for name in nodes],
        keys=[read_key(folder / "sites" / name / "node.key.pub") for name in nodes],
    )
    roster = by_key(Path(settings.deployment.keys), names)
    backend = FlowerBackend(grid, roster, deadline=120, pause=0.002)
    out = folder / "run"
    experiment.run(settings, name="real", out=out, engine=lambda place: lambda sites: backend)
    return summary(out)


def summary(folder: Path) -> Mapping[str, Any]:
    told: Mapping[str, Any] = json.loads((folder / "summary.json").read_text())
    return told


def simulated(folder: Path) -> Mapping[str, Any]:
    experiment.run(folder / SIMULATION, name="alike", out=folder / "alike")
    return summary(folder / "alike")


def founded(folder: Path, text: str = SMALL, sites: tuple[str, ...] = SITES) -> Path:
    write_deployment(folder, sites, config.parse(text))
    return folder


def same_everywhere(folder: Path) -> Settings:
    told = {path.read_text() for path in folder.rglob("federation.toml")}
    assert len(told) == 1
    return config.load(folder / "coordinator" / "federation.toml")


# --- the real thing and the simulation -----------------------------------------------------------

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "as it comes": ("", SITES),
    "models of several kinds": (
        '[[clients.group]]\ncount = 1\nmodel = "linear"\nlr = 0.02\n'
        '[[clients.group]]\nsites = ["west"]\nwidth = 12\nepochs = 1\n',
        SITES,
    ),
    "rows asked in part": ("[method]\npreset = 'ds-fl'\n", SITES),
    "two sites": ("", ("a", "b")),
    "a baseline that is left out": ('[evaluation]\nbaselines = ["local"]\nrepeats = 2\n', SITES),
}


@pytest.mark.parametrize(("more", "sites"), CASES.values(), ids=CASES)
def test_real_sites_give_the_bytes_of_the_simulation(
    more: str, sites: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = founded(tmp_path / "d", SMALL + more, sites)
    settings = same_everywhere(folder)
    assert settings.deployment.sites == sites
    assert settings.clients.group == ()
    assert settings.evaluation == config.EvaluationSettings()
    real, alike = over_the_folders(folder, monkeypatch), simulated(folder)
    assert real["soft_targets_sha256"] == alike["soft_targets_sha256"]
    assert real["proxy_sha256"] == alike["proxy_sha256"] == settings.deployment.proxy_sha256
    keys = {"student_accuracy", "bytes_up", "bytes_down", "clients_ok", "dropped", "agreement"}
    rows = [read_lines(folder / run / "rounds.jsonl") for run in ("run", "alike")]
    assert [{k: row[k] for k in keys} for row in rows[0]] == [
        {k: row[k] for k in keys} for row in rows[1]
    ]
    assert all(row["clients_ok"] == len(sites) for row in rows[0])


@pytest.mark.parametrize("participation", [0.5])
def test_a_share_of_real_sites_is_drawn_as_the_simulation_draws_it(
    participation: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SMALL.replace("quorum = 2", f"quorum = 1\nparticipation = {participation}")
    folder = founded(tmp_path / "d", text, (*SITES, "east"))
    real, alike = over_the_folders(folder, monkeypatch), simulated(folder)
    assert real["soft_targets_sha256"] == alike["soft_targets_sha256"]
    assert {row["clients_ok"] for row in read_lines(folder / "run" / "rounds.jsonl")} == {2}


def test_a_site_that_gets_no_rows_learns_and_does_not_teach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = founded(tmp_path / "d")
    (folder / "sites" / "west" / "rows.npz").unlink()
    site = folder / "sites" / "west" / "site.toml"
    site.write_text(site.read_text().replace('"npz:rows.npz"', '""'))
    assert len(open_site(folder / "sites" / "west").site.client.data) == 0
    told = over_the_folders(folder, monkeypatch)
    assert told["clients_ok"] == 3
    assert told["dropped"] == {}


def test_the_default_is_an_experiment_on_digits(tmp_path: Path) -> None:
    write_deployment(tmp_path / "d", SITES)
    settings = same_everywhere(tmp_path / "d")
    assert settings.deployment.classes == tuple("0123456789")
    assert config.load(tmp_path / "d" / SIMULATION).data.source == "digits"
    for name in SITES:
        place = open_site(tmp_path / "d" / "sites" / name)
        assert place.site.client.id == name
        assert len(place.site.client.data) > 0


def test_a_site_holds_its_own_rows_and_nobody_elses(tmp_path: Path) -> None:
    folder = founded(tmp_path / "d")
    held = {
        name: np.load(folder / "sites" / name / "rows.npz")["inputs"].tobytes() for name in SITES
    }
    assert len(set(held.values())) == 3
    assert not list((folder / "coordinator").rglob("rows.npz"))
    assert (folder / "coordinator" / "test.npz").exists()
    assert not list((folder / "sites").rglob("test.npz"))


# --- sites that bring rows of their own ----------------------------------------------------------

OWN = """
seed = 5
rounds = 2
[data]
path = "."
label = "diagnosis"
[proxy]
path = "csv:public.csv"
rows = 40
[clients]
width = 8
epochs = 1
quorum = 3
[student]
width = 8
epochs = 1
[backend]
device = "cpu"
[deployment]
classes = ["ill", "healthy"]
"""


def table(seed: int, rows: int, *, labelled: bool) -> str:
    random = np.random.default_rng(seed)
    head = "x,y,ward" + (",diagnosis" if labelled else "")
    lines = [
        f"{random.normal():.3f},{random.normal():.3f},{'abc'[k % 3]}"
        + (f",{('ill', 'healthy')[k % 2]}" if labelled else "")
        for k in range(rows)
    ]
    return "\n".join([head, *lines]) + "\n"


def test_sites_put_in_their_own_rows_where_only_public_rows_and_classes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "public.csv").write_text(table(0, 50, labelled=False))
    folder = founded(tmp_path / "d", OWN)
    settings = same_everywhere(folder)
    assert settings.data.source == ""
    assert len(settings.deployment.proxy_sha256) == 64
    assert not (folder / SIMULATION).exists()
    for name in SITES:
        place = folder / "sites" / name
        assert (place / "public.csv").read_text() == (tmp_path / "public.csv").read_text()
        assert not (place / "rows.npz").exists()
        with pytest.raises(DataError, match=r"rows\.csv"):
            open_site(place)
        (place / "rows.csv").write_text(table(len(name), 30, labelled=True))
    told = over_the_folders(folder, monkeypatch)
    assert (told["clients_ok"], told["dropped"]) == (3, {})


@pytest.mark.parametrize("path", ["digits", "csv:a.csv#x", "csv:"])
def test_public_rows_that_are_no_single_file_are_refused(path: str, tmp_path: Path) -> None:
    text = OWN.replace("csv:public.csv", path)
    with pytest.raises((SettingsError, DataError), match=r"proxy\.path|data source"):
        founded(tmp_path / "d", text)
    assert not (tmp_path / "d").exists()


def test_public_rows_that_are_not_there_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"public\.csv"):
        founded(tmp_path / "d", OWN)
    assert not (tmp_path / "d").exists()


# --- sites that come from a column ---------------------------------------------------------------

BY_WARD = """
seed = 5
rounds = 2
[data]
source = "csv:all.csv"
path = "."
label = "diagnosis"
test_rows = 0.2
[proxy]
rows = 30
[clients]
partition = "by-column"
column = "ward"
width = 8
epochs = 1
quorum = 2
[student]
width = 8
epochs = 1
[backend]
device = "cpu"
"""


def test_sites_of_a_column_are_dealt_their_rows_and_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.csv").write_text(table(1, 150, labelled=True))
    folder = founded(tmp_path / "d", BY_WARD, ("a", "b", "c"))
    for name in ("a", "b", "c"):
        client = open_site(folder / "sites" / name).site.client
        assert client.test is not None
        assert len(client.test) > 0
    real = over_the_folders(folder, monkeypatch)
    monkeypatch.chdir(tmp_path)  # where the simulation finds the table
    assert real["soft_targets_sha256"] == simulated(folder)["soft_targets_sha256"]


def test_sites_that_the_column_does_not_have_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.csv").write_text(table(1, 150, labelled=True))
    with pytest.raises(
        SettingsError,
        match=r"--sites: expected the sites that the data has \(a, b, c\), found a, x",
    ):
        founded(tmp_path / "d", BY_WARD, ("a", "x"))
    assert not (tmp_path / "d").exists()


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [(), ("a", "a"), ("a", "A"), ("a/b", "c"), ("a b",)])
def test_sites_that_cannot_be_folders_are_refused_and_nothing_is_written(
    sites: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises((SettingsError, RunError, DataError)):
        write_deployment(
            tmp_path / "d", sites, config.parse(SMALL.replace("quorum = 2", "quorum = 1"))
        )
    assert not (tmp_path / "d").exists()


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="expected a new or empty folder"):
        founded(tmp_path / "d")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["mine.txt"]


def test_a_method_that_shares_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"method\.preset: real sites share predictions only"):
        founded(tmp_path / "d", SMALL + '[method]\npreset = "fedavg"\n')
    assert not (tmp_path / "d").exists()


def test_the_quorum_is_no_more_than_there_are_sites(tmp_path: Path) -> None:
    folder = founded(tmp_path / "d", SMALL.replace("quorum = 2", "quorum = 5"))
    assert same_everywhere(folder).clients.quorum == 3


def test_the_simulation_has_the_quorum_of_the_real_sites(tmp_path: Path) -> None:
    folder = founded(tmp_path / "d", SMALL.replace("quorum = 2", "quorum = 5"))
    assert config.load(folder / SIMULATION).clients.quorum == 3
