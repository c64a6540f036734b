"""A real site from its folder: what fits is opened, what does not is said in one sentence."""

from __future__ import annotations

import contextlib
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import gaussian, proxy

from fedistill import config, deployment, experiment
from fedistill.client import Client
from fedistill.deployment import open_site, site_id, site_training
from fedistill.errors import DataError, SettingsError
from fedistill.federation import Federation
from fedistill.types import ProxySet

PUBLIC = "age,dose\n" + "\n".join(f"{20 + k},{k % 7}" for k in range(30))
OWN = "dose,diagnosis,age\n" + "\n".join(
    f"{k % 5},{('healthy', 'ill')[k % 2]},{30 + k}" for k in range(24)
)
AGREED = """
seed = 3
[data]
label = "diagnosis"
[proxy]
path = "csv:public.csv"
rows = 30
[clients]
count = 3
quorum = 2
model = "mlp"
width = 8
epochs = 2
[backend]
name = "flower"
device = "cpu"
[deployment]
sites = ["north", "south", "west"]
classes = ["healthy", "ill"]
proxy_sha256 = "FINGERPRINT"
"""
SITE = """
id = "north"
[data]
source = "csv:own.csv"
path = "."
label = "diagnosis"
test_rows = 0.25
"""


def fingerprint(folder: Path) -> str:
    agreed = config.parse(AGREED.replace("FINGERPRINT", ""))
    with contextlib.chdir(folder):
        return deployment.public_rows(agreed).proxy.fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site as its administrator has it."""
    (tmp_path / "public.csv").write_text(PUBLIC)
    (tmp_path / "own.csv").write_text(OWN)
    (tmp_path / "site.toml").write_text(SITE)
    told = AGREED.replace('label = "diagnosis"', 'label = "diagnosis"\npath = "."')
    (tmp_path / "federation.toml").write_text(told.replace("FINGERPRINT", fingerprint(tmp_path)))
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDISTILL_DATA", raising=False)


def change(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


# --- opened --------------------------------------------------------------------------------------


def test_a_site_is_opened_from_its_folder_wherever_the_process_is(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    place = open_site(folder)
    client = place.site.client
    assert client.id == site_id(folder) == "north"
    assert client.test is not None
    assert (len(client.data), len(client.test)) == (18, 6)
    assert place.site.classes == ("healthy", "ill")
    assert place.site.proxy.fingerprint == place.agreed.deployment.proxy_sha256
    assert place.state == folder / "state"
    assert list(Path.cwd().iterdir()) == []


def test_a_site_without_rows_learns_and_does_not_teach(folder: Path) -> None:
    change(folder, "site.toml", 'source = "csv:own.csv"', 'source = ""')
    client = open_site(folder).site.client
    assert len(client.data) == 0
    assert client.test is None


def test_a_sites_own_test_file_is_used_whole(folder: Path) -> None:
    (folder / "held.csv").write_text(OWN)
    change(folder, "site.toml", "test_rows = 0.25", 'test = "csv:held.csv"')
    client = open_site(folder).site.client
    assert client.test is not None
    assert (len(client.data), len(client.test)) == (24, 24)


def test_what_a_site_sets_of_its_training_wins_and_the_rest_is_agreed(folder: Path) -> None:
    (folder / "site.toml").write_text(SITE + '[training]\nmodel = "linear"\nlr = 0.5\n')
    place = open_site(folder)
    training = site_training(place.settings, place.agreed)
    assert (training.model, training.lr) == ("linear", 0.5)
    assert (training.width, training.epochs) == (8, 2)
    assert type(place.site.learner.module).__name__ == "Linear"  # type: ignore[attr-defined]


def test_a_training_value_of_zero_is_a_value(folder: Path) -> None:
    (folder / "site.toml").write_text(SITE + "[training]\nweight_decay = 0.0\n")
    change(folder, "federation.toml", "epochs = 2", "epochs = 2\nweight_decay = 0.1")
    place = open_site(folder)
    assert site_training(place.settings, place.agreed).weight_decay == 0.0


def test_the_coordinator_holds_public_rows_and_nobodys_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    held = experiment.rows_of(config.load("federation.toml"))
    assert held.parts == {}
    assert (len(held.dataset.public), len(held.dataset.test), len(held.dataset.train)) == (30, 0, 0)
    assert set(held.dataset.public.labels.tolist()) == {-1}
    assert held.dataset.classes == ("healthy", "ill")


def test_the_coordinator_may_have_test_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    change(folder, "federation.toml", 'path = "."', 'path = "."\ntest = "csv:own.csv"')
    held = experiment.rows_of(config.load("federation.toml"))
    assert len(held.dataset.test) == 24


# --- does not fit --------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, str, str, type[Exception], str]] = {
    "a typo in its id": (
        "site.toml",
        '"north"',
        '"nort"',
        SettingsError,
        r'site.toml, id: "nort" is no site of the federation; did you mean "north"\?',
    ),
    "a stranger": (
        "site.toml",
        '"north"',
        '"xyz"',
        SettingsError,
        r'"xyz" is no site of the federation; known: north, south, west',
    ),
    "no id": (
        "site.toml",
        'id = "north"',
        "",
        SettingsError,
        r"id: a client id must be .*found ''",
    ),
    "another fingerprint": (
        "public.csv",
        "21,1",
        "21,2",
        DataError,
        r"public.csv: expected proxy rows with the fingerprint .*: fetch the file again",
    ),
    "no rows where they should be": (
        "site.toml",
        "csv:own.csv",
        "csv:mine.csv",
        DataError,
        r"mine.csv",
    ),
    "a column less": ("own.csv", "dose,diagnosis,age", "d,diagnosis,age", DataError, '"dose"'),
    "an unknown class": ("own.csv", "0,healthy,30", "0,unclear,30", DataError, "2 classes"),
    "no federation": (
        "site.toml",
        'id = "north"',
        'id = "north"\nfederation = "no.toml"',
        SettingsError,
        r"no.toml: expected a settings file, found none",
    ),
    "a simulation": ("federation.toml", "[deployment]", "[evaluation]", SettingsError, "unknown"),
}


@pytest.mark.parametrize(("file", "old", "new", "kind", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_said_in_one_sentence(
    file: str, old: str, new: str, kind: type[Exception], words: str, folder: Path
) -> None:
    change(folder, file, old, new)
    with pytest.raises(kind, match=words):
        open_site(folder)


def test_every_problem_of_a_site_file_is_told_at_once(folder: Path) -> None:
    (folder / "site.toml").write_text(
        'id = "a/b"\nfedration = "x"\n[data]\nsource = "cvs:own.csv"\n[policy]\nrouds = 3\n'
        'rows = -1\nseconds = "long"\n[training]\nmodel = "mpl"\n'
    )
    with pytest.raises(SettingsError) as caught:
        open_site(folder)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "site.toml: 7 problems" in text
    for words in (
        "line 1: id:",
        'line 2: fedration: unknown key; did you mean "federation"?',
        'line 4: data.source: unknown source "cvs"; did you mean "csv"?',
        'line 6: policy.rouds: unknown key; did you mean "rounds"?',
        "line 7: policy.rows: expected a number at least 0, found -1",
        "line 8: policy.seconds: expected a number, found a text",
        'line 10: training.model: unknown value "mpl"; did you mean "mlp"?',
    ):
        assert words in text


def test_a_site_file_that_is_no_toml_is_said_with_its_line(folder: Path) -> None:
    (folder / "site.toml").write_text('id = "north"\n[data\n')
    with pytest.raises(SettingsError, match=r"site\.toml, line 2: TOML: cannot be read"):
        open_site(folder)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 65, "a\nb", ".x", "é"])
def test_an_id_that_could_not_be_a_folder_is_refused(folder: Path, name: str) -> None:
    text = config.to_value(name)
    change(folder, "site.toml", '"north"', text)
    with pytest.raises(SettingsError, match="id: "):
        open_site(folder)


# --- rows that were read once --------------------------------------------------------------------


def cached(folder: Path) -> list[Path]:
    place = folder / "state" / "cache"
    return sorted(place.iterdir()) if place.exists() else []


def test_rows_are_read_once_and_kept_for_the_owners_eyes_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_site(folder, cache=True).site.client
    (kept,) = cached(folder)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(
        deployment.Public, "own", lambda *a: pytest.fail("it read the file a second time")
    )
    again = open_site(folder, cache=True).site.client
    assert again.test is not None
    assert first.test is not None
    for found, wanted in ((again.data, first.data), (again.test, first.test)):
        np.testing.assert_array_equal(found.inputs, wanted.inputs)
        np.testing.assert_array_equal(found.labels, wanted.labels)
        assert (found.inputs.dtype, found.labels.dtype) == (np.float32, np.int64)


CHANGED: dict[str, tuple[str, str, str]] = {
    "its rows": ("own.csv", "0,healthy,30", "6,healthy,30"),
    "how many it tests on": ("site.toml", "0.25", "0.5"),
    "the seed": ("federation.toml", "seed = 3", "seed = 4"),
}


@pytest.mark.parametrize(("file", "old", "new"), CHANGED.values(), ids=CHANGED)
def test_what_was_kept_falls_with_what_it_was_made_from(
    file: str, old: str, new: str, folder: Path
) -> None:
    before = open_site(folder, cache=True).site.client
    (old_kept,) = cached(folder)
    change(folder, file, old, new)
    after = open_site(folder, cache=True).site.client
    (kept,) = cached(folder)
    assert kept != old_kept
    assert rows_of(before) != rows_of(after)


def rows_of(client: Client) -> list[Any]:
    assert client.test is not None
    return [client.data.inputs.tolist(), client.test.inputs.tolist()]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no more", b"garbage" * 100])
def test_what_was_kept_and_is_damaged_is_read_afresh(folder: Path, content: bytes) -> None:
    first = open_site(folder, cache=True).site.client
    (kept,) = cached(folder)
    kept.write_bytes(content)
    again = open_site(folder, cache=True).site.client
    np.testing.assert_array_equal(first.data.inputs, again.data.inputs)


def test_nothing_is_kept_of_rows_that_load_at_once(folder: Path) -> None:
    np.savez(folder / "own.npz", inputs=gaussian(24, 1).inputs[:, :2], labels=[0, 1] * 12)
    np.savez(folder / "public.npz", inputs=proxy(30).inputs[:, :2])
    change(folder, "site.toml", "csv:own.csv", "npz:own.npz")
    change(folder, "federation.toml", "csv:public.csv", "npz:public.npz")
    told = re.sub("proxy_sha256 = .*", "", (folder / "federation.toml").read_text())
    (folder / "federation.toml").write_text(told)
    assert len(open_site(folder, cache=True).site.client.data) == 18
    assert cached(folder) == []


def test_how_files_are_read_is_as_agreed_where_the_site_does_not_say(folder: Path) -> None:
    (folder / "site.toml").write_text('id = "north"\n[data]\nsource = "csv:own.csv"\n')
    place = open_site(folder, cache=True)
    assert len(place.site.client.data) == 19
    again = open_site(folder, cache=True).site.client
    assert len(again.data) == 19
    assert len(cached(folder)) == 1


def test_a_full_disk_keeps_nothing_and_opens_the_site_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(open_site(folder, cache=True).site.client.data) == 18
    assert cached(folder) == []


# --- settings of a federation of real sites ------------------------------------------------------

IMPOSSIBLE: dict[str, tuple[str, str, str]] = {
    "another backend": ('name = "flower"', 'name = "serial"', 'backend.name: .*"flower", found'),
    "an id that is no folder": ('"west"', '"we/st"', "deployment.sites: .*found 'we/st'"),
    "an id twice": ('"west"', '"south"', "deployment.sites: expected ids that differ"),
    "one class": ('["healthy", "ill"]', '["ill"]', "deployment.classes: .* two classes or more"),
    "no proxy rows": ('path = "csv:public.csv"', "", "proxy.path: real sites need a file"),
    "a quorum above the sites": ("quorum = 2", "quorum = 4", "clients.quorum: .*found 4"),
    "groups": (
        "[backend]",
        '[[clients.group]]\nsites = ["west"]\nmodel = "linear"\n[backend]',
        "clients.group: a real site names its own model in its site.toml",
    ),
    "baselines": (
        "[backend]",
        '[evaluation]\nbaselines = ["local"]\n[backend]',
        "evaluation.baselines: real sites cannot be compared",
    ),
    "leave one out": (
        "[backend]",
        "[evaluation]\nleave_one_out = true\n[backend]",
        "evaluation.baselines: real sites cannot be compared",
    ),
    "repeats": (
        "[backend]",
        "[evaluation]\nrepeats = 2\n[backend]",
        "evaluation.repeats: real sites train with the one agreed seed",
    ),
    "a method that shares weights": (
        "[backend]",
        '[method]\npreset = "fedavg"\n[backend]',
        'method.preset: .*found the baseline "fedavg"',
    ),
}


@pytest.mark.parametrize(("old", "new", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_settings_that_real_sites_cannot_have_are_refused(old: str, new: str, words: str) -> None:
    assert old in AGREED
    with pytest.raises(SettingsError, match=words):
        config.parse(AGREED.replace(old, new))


def test_a_class_named_twice_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"deployment\.classes"):
        config.parse(AGREED.replace('["healthy", "ill"]', '["ill", "ill"]'))


def test_all_that_is_impossible_is_told_at_once() -> None:
    text = AGREED.replace('name = "flower"', 'name = "serial"').replace("quorum = 2", "quorum = 9")
    with pytest.raises(SettingsError) as caught:
        config.parse(text)
    assert {problem.key for problem in caught.value.problems} >= {"backend.name", "clients.quorum"}


def test_a_deployment_survives_being_written_and_read() -> None:
    settings = config.parse(AGREED)
    assert config.parse(config.to_toml(settings)) == settings
    assert config.parse(config.to_toml(settings, config.comment)) == settings
    site = config.parse_site(SITE + "[training]\nlr = 0.25\n[policy]\nrounds = 3\n")
    assert config.parse_site(config.to_toml(site, config.comment)) == site


def test_members_need_a_method_that_shares_predictions_or_a_table() -> None:
    from fedistill.client import Member

    assert isinstance(
        Federation([Member("a"), Member("b")], ProxySet(proxy().inputs), classes=["x", "y"]),
        Federation,
    )
    for method in ("fd", "fedproto", "fedhenn"):  # what a site's own policy must allow
        Federation([Member("a")], proxy(), method=method, classes=["x", "y"])
    told = r"real sites \(Member\) share predictions, or what their policy allows, found a method"
    for method in ("fedavg", "local", "centralised"):
        with pytest.raises(DataError, match=told):
            Federation([Member("a")], proxy(), method=method, classes=["x", "y"])
    with pytest.raises(DataError, match='"a" stands twice'):
        Federation([Member("a"), Member("a")], proxy(), classes=["x", "y"])
    with pytest.raises(DataError, match="rename the client"):
        Member("../a")


def test_rows_at_an_absolute_path_are_cached_too(folder: Path) -> None:
    text = (folder / "site.toml").read_text()
    name = text.partition('source = "csv:')[2].partition('"')[0]
    place = folder / "elsewhere" / name
    place.parent.mkdir()
    (folder / name).rename(place)
    (folder / "site.toml").write_text(text.replace(f"csv:{name}", f"csv:{place}"))
    first = open_site(folder, cache=True).site.client
    assert len(cached(folder)) == 1
    assert len(open_site(folder, cache=True).site.client.data) == len(first.data)
