"""`fedistill run` on Flower: submit, follow, and say how it ended, whatever happens to it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import stat
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import write_settings

from fedistill import config
from fedistill.cli import main
from fedistill.errors import BudgetExhausted, FedistillError, MissingExtra, QuorumError, RunError
from fedistill.flower import jobs, launch, outcome
from fedistill.flower.bundle import APP, write_app
from fedistill.flower.launch import Job, Submission

SETTINGS = config.parse("rounds = 3\nseed = 4\n")


class Hand:
    """Time that passes while somebody sleeps, and things that happen meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: dict[int, Callable[[], object]] = {}
        self.sleeps = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        self.steps.get(self.sleeps, lambda: None)()


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    made = Hand()
    monkeypatch.setattr(launch, "time", made)
    return made


class Shown:
    """What was shown, by title."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}
        self.progress: list[tuple[int, int]] = []
        self.title = ""

    @contextlib.contextmanager
    def __call__(self, title: str, rounds: int) -> Iterator[Shown]:
        self.title = title
        self.rows[title] = []
        yield self

    def add(self, row: Any) -> None:
        self.rows[self.title].append(row["round"])

    def advance(self, label: str, done: int, total: int) -> None:
        self.progress.append((done, total))


def job(folder: Path, *, resume: bool = False, repeats: int = 1) -> Job:
    scratch, run = folder / "scratch", folder / "run"
    scratch.mkdir(exist_ok=True)
    run.mkdir(exist_ok=True)
    settings = config.parse(f"rounds = 3\nseed = 4\n[evaluation]\nrepeats = {repeats}\n")
    return Job(settings, "mine", run, folder, resume, scratch, 3, None)


def rows(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"round": number + 1}) + "\n" for number in range(count)]
    (folder / "rounds.jsonl").write_text("".join(lines))


def ended(where: Job, code: int = 0, text: str = "", kind: str = "") -> None:
    where.outcome.write_text(json.dumps({"code": code, "text": text, "kind": kind}))


def submission(**changes: Any) -> Submission:
    told: dict[str, Any] = {
        "number": 77,
        "stop": lambda: None,
        "alive": lambda: True,
        "log": "logs/superlink.log",
    }
    return Submission(**(told | changes))


# --- following -----------------------------------------------------------------------------------


def test_rounds_are_shown_as_they_come_and_the_end_is_waited_for(
    tmp_path: Path, hand: Hand
) -> None:
    where, shown = job(tmp_path), Shown()
    hand.steps = {
        2: lambda: rows(where.folder, 1),
        4: lambda: rows(where.folder, 3),
        9: lambda: ended(where),
    }
    launch.follow(where, submission(), shown)
    assert shown.rows == {"mine": [1, 2, 3]}
    assert hand.sleeps == 9


def test_a_run_that_ends_before_the_first_look_is_shown_whole(tmp_path: Path, hand: Hand) -> None:
    where, shown = job(tmp_path), Shown()
    rows(where.folder, 3)
    ended(where)
    launch.follow(where, submission(), shown)
    assert shown.rows == {"mine": [1, 2, 3]}


def test_of_a_resumed_run_only_what_is_new_is_shown(tmp_path: Path, hand: Hand) -> None:
    where, shown = job(tmp_path, resume=True), Shown()
    rows(where.folder, 2)
    hand.steps = {3: lambda: rows(where.folder, 3), 5: lambda: ended(where)}
    launch.follow(where, submission(), shown)
    assert shown.rows == {"mine": [3]}


def test_repeats_are_shown_one_after_the_other(tmp_path: Path, hand: Hand) -> None:
    where, shown = job(tmp_path, repeats=2), Shown()
    hand.steps = {
        2: lambda: rows(where.folder / "seed-4", 3),
        4: lambda: rows(where.folder / "seed-5", 3),
        6: lambda: ended(where),
    }
    launch.follow(where, submission(), shown)
    assert shown.rows == {"mine, seed 4": [1, 2, 3], "mine, seed 5": [1, 2, 3]}


def test_who_was_heard_in_the_present_round_is_shown(tmp_path: Path, hand: Hand) -> None:
    where, shown = job(tmp_path), Shown()
    told = [
        {"event": "round_started", "asked": ["a", "b"]},
        {"event": "answered", "site": "a"},
        {"event": "answered", "site": "b"},
        {"event": "round_started", "asked": ["a", "b", "c"]},
        {"event": "dropped", "site": "b"},
    ]
    lines = [json.dumps({"time": "2026-01-01T00:00:00Z"} | entry) for entry in told]
    (where.folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    hand.steps = {1: lambda: ended(where)}
    launch.follow(where, submission(), shown)
    assert shown.progress == [(1, 3)]


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (3, "round 4: 1 usable uploads, the quorum is 3", QuorumError),
        (2, "settings: 3 problems", RunError),
        (4, "round 9: 3 of 3 clients have spent their privacy budget", BudgetExhausted),
        (3, "the server broke off (MemoryError): see the log", RunError),
    ],
)
def test_the_servers_error_is_raised_here_with_its_code(
    code: int, text: str, kind: type[FedistillError], tmp_path: Path, hand: Hand
) -> None:
    where = job(tmp_path)
    ended(where, code, text, kind.__name__)
    with pytest.raises(kind) as caught:
        launch.follow(where, submission(), Shown())
    assert (caught.value.exit_code, str(caught.value)) == (code, text)


def test_a_superlink_that_is_gone_ends_the_waiting_with_what_to_do(
    tmp_path: Path, hand: Hand
) -> None:
    with pytest.raises(RunError) as caught:
        launch.follow(job(tmp_path), submission(alive=lambda: False), Shown())
    for words in ("number 77", "logs/superlink.log", "--resume"):
        assert words in str(caught.value)
    assert hand.now < 2


def test_a_run_that_never_begins_ends_the_waiting(tmp_path: Path, hand: Hand) -> None:
    with pytest.raises(RunError, match="broke off without a word"):
        launch.follow(job(tmp_path), submission(), Shown())
    assert launch.SILENCE < hand.now < launch.SILENCE + 5


def test_a_server_that_is_killed_ends_the_waiting(tmp_path: Path, hand: Hand) -> None:
    """Its lock falls with it, also where nobody has asked for its exit code yet."""
    where = job(tmp_path)
    lock = where.outcome.with_suffix(".lock").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    hand.steps = {2000: lock.close}
    with pytest.raises(RunError, match="broke off without a word"):
        launch.follow(where, submission(), Shown())
    assert 2000 * launch.LOOK < hand.now < 2000 * launch.LOOK + 15


def test_a_server_that_says_how_it_ended_in_its_last_moment_is_heard(
    tmp_path: Path, hand: Hand
) -> None:
    where = job(tmp_path)
    hand.steps = {2: lambda: ended(where, 3, "disk full")}
    with pytest.raises(RunError, match="disk full"):
        launch.follow(where, submission(alive=lambda: hand.sleeps < 1), Shown())


def test_an_interrupt_stops_the_run_at_the_superlink(tmp_path: Path, hand: Hand) -> None:
    stopped: list[int] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    hand.steps = {2: interrupt}
    with pytest.raises(KeyboardInterrupt):
        launch.follow(job(tmp_path), submission(stop=lambda: stopped.append(1)), Shown())
    assert stopped == [1]


# --- the server's last word ----------------------------------------------------------------------


def test_the_outcome_tells_an_exit_code_and_a_text(tmp_path: Path) -> None:
    told = tmp_path / "outcome.json"
    assert outcome.outcome(told) is None
    assert not outcome.at_work(told)
    with outcome.outcome_in(told):
        assert outcome.outcome(told) is None
        assert outcome.at_work(told)
    assert outcome.outcome(told) == outcome.Outcome()
    assert not outcome.at_work(told)


def test_an_error_of_ours_is_told_and_not_raised_into_flower(tmp_path: Path) -> None:
    with outcome.outcome_in(tmp_path / "outcome.json"):
        raise QuorumError("the quorum is 3")
    told = outcome.Outcome(3, "QuorumError", "the quorum is 3")
    assert outcome.outcome(tmp_path / "outcome.json") == told


@pytest.mark.parametrize("error", [ValueError("row 17: 4711"), KeyboardInterrupt(), MemoryError()])
def test_any_other_error_is_told_by_its_kind_and_raised(
    error: BaseException, tmp_path: Path
) -> None:
    with (
        pytest.raises(type(error)),
        outcome.outcome_in(tmp_path / "outcome.json"),
    ):
        raise error
    told = outcome.outcome(tmp_path / "outcome.json")
    assert told is not None
    assert told.code == 3
    assert type(error).__name__ in told.text
    assert "4711" not in told.text


@pytest.mark.parametrize("content", ["", "{", '{"code": 0'])
def test_an_outcome_that_is_not_whole_is_none_yet(content: str, tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(content)
    assert outcome.outcome(tmp_path / "outcome.json") is None


# --- submitting ----------------------------------------------------------------------------------


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """A program in place of Flower's, that prints a text and ends with a code."""

    def put(text: str, code: int = 0) -> Path:
        program = tmp_path / "flwr"
        said = tmp_path / "said.txt"
        said.write_text(text)
        program.write_text(
            f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\ncat "{said}"\nexit {code}\n'
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(launch, "flwr", lambda: str(program))
        return tmp_path / "asked"

    return put


def test_a_run_is_submitted_by_the_name_of_a_job_and_no_path_goes_to_the_sites(
    tmp_path: Path, flwr: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = flwr('loading\n{"success": true, "run-id": "123"}\n')
    where = job(tmp_path)
    app = write_app(tmp_path / "app")
    assert launch.submit(where, app, {}, "--more", "x") == 123
    name = where.scratch.name
    line = f'run {app} superlink -c job="{name}" --format json --more x\n'
    assert asked.read_text() == line
    # Flower takes only keys that the app names.
    assert set(tomllib.loads(APP["pyproject.toml"])["tool"]["flwr"]["app"]["config"]) == {"job"}
    monkeypatch.setenv(jobs.FOLDER, str(where.scratch.parent))
    told = jobs.pick_up(name)
    assert config.load(told["settings"]) == where.settings
    assert (told["out"], told["resume"]) == (str(where.folder), False)
    for other in ("../" + name, "absent", ""):
        with pytest.raises(RunError, match="expected a job"):
            jobs.pick_up(other)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ('{"success": false, "error-message": "No SuperLink at 127.0.0.1"}', 1, "No SuperLink at"),
        ("Traceback\nConnectionError: refused", 1, "ConnectionError: refused"),
        ("", 1, "no answer"),
        ('{"success": true}', 0, "success"),
        ("{}", 0, "{}"),
        ("[1, 2]", 0, "1, 2"),
    ],
)
def test_a_superlink_that_refuses_is_said_with_its_reason(
    text: str, code: int, words: str, tmp_path: Path, flwr: Callable[..., Path]
) -> None:
    flwr(text, code)
    with pytest.raises(RunError, match=r"did not take the run .*deployment\.superlink") as caught:
        launch.submit(job(tmp_path), tmp_path, {})
    assert words in str(caught.value)


FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ('{"run-id": "5"}', {"run-id": "5"}),
    "on several lines": ('{\n  "run-id": "5"\n}\n', {"run-id": "5"}),
    "a warning before": ('Warning: x\n{"run-id": "5"}', {"run-id": "5"}),
    "a warning after": ('{"run-id": "5"}\nWarning: x', {"run-id": "5"}),
    "nothing": ("", {}),
    "no object": ("[1]", {}),
    "cut short": ('{"run-id": "5"', {}),
}


@pytest.mark.parametrize(("text", "found"), FOUND.values(), ids=FOUND)
def test_the_answer_is_found_in_what_a_program_printed(text: str, found: dict[str, Any]) -> None:
    assert launch._json_in(text) == found


def test_braces_in_a_warning_do_not_hide_the_answer() -> None:
    text = 'Warning: {certificate} expires\n{"run-id": "5"}\nsee {docs}'
    assert launch._json_in(text) == {"run-id": "5"}


def test_the_connection_is_the_only_one_and_trusts_the_given_authority(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("")
    launch.write_connection(tmp_path / "home", "host:8443", ca=tmp_path / "ca.crt")
    told = tomllib.loads((tmp_path / "home" / "config.toml").read_text())
    ours = {"address": "host:8443", "root-certificates": str(tmp_path / "ca.crt")}
    assert told == {"superlink": {"default": "superlink", "superlink": ours}}
    launch.write_connection(tmp_path / "other", "127.0.0.1:1")
    told = tomllib.loads((tmp_path / "other" / "config.toml").read_text())
    assert told["superlink"]["superlink"] == {"address": "127.0.0.1:1", "insecure": True}


def test_an_authority_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no\.crt: expected the certificate .*deployment\.ca"):
        launch.write_connection(tmp_path, "host:1", ca=tmp_path / "no.crt")


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        'a"quote',
        "back\\slash",
        "é",
        "\U0001f600",
    ],
)
def test_paths_of_any_name_reach_flower(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "ca.crt").write_text("")
    launch.write_connection(folder / "home", "host:1", ca=folder / "ca.crt")
    told = tomllib.loads((folder / "home" / "config.toml").read_text())
    assert told["superlink"]["superlink"]["root-certificates"] == str(folder / "ca.crt")


def test_the_bundle_is_small_has_no_dependencies_and_names_the_installed_apps(
    tmp_path: Path,
) -> None:
    folder = write_app(tmp_path / "app")
    told = tomllib.loads((folder / "pyproject.toml").read_text())
    assert told["project"]["dependencies"] == []
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4096
    assert {path.name for path in folder.rglob("*.py")} == {"__init__.py", "apps.py"}
    components = told["tool"]["flwr"]["app"]["components"]
    assert set(components.values()) == {"fdapp.apps:server", "fdapp.apps:client"}
    text = (folder / "fdapp" / "apps.py").read_text()
    scope: dict[str, Any] = {}
    exec(compile(text, "apps.py", "exec"), scope)
    assert type(scope["client"]).__name__ == "ClientApp"
    assert type(scope["server"]).__name__ == "ServerApp"


# --- the command line ----------------------------------------------------------------------------


def test_without_ray_the_command_says_what_to_install_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else real(name, *a)
    )
    file, out = write_settings(tmp_path), tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        main(["run", str(file), "--backend", "flower", "--out", str(out)])
    assert left.value.code == 2
    assert "pip install 'fedistill[ray]'" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(MissingExtra), launch.engine(job(tmp_path)):
        pytest.fail("it began without Ray")


def test_a_run_folder_that_is_taken_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "engine", lambda job: pytest.fail("it began"))
    file, out = write_settings(tmp_path), tmp_path / "run"
    out.mkdir()
    (out / "config.toml").write_text("")
    with pytest.raises(SystemExit) as left:
        main(["run", str(file), "--backend", "flower", "--out", str(out)])
    assert left.value.code == 3
    assert "holds a run already: add --resume" in capsys.readouterr().err


def test_an_unknown_backend_is_said_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["run", str(write_settings(tmp_path)), "--backend", "flowr"])
    assert left.value.code == 2
    assert 'did you mean "flower"?' in capsys.readouterr().err


REAL = """
rounds = 2
[proxy]
path = "npz:proxy.npz"
[backend]
name = "flower"
[deployment]
sites = ["a", "b"]
classes = ["x", "y"]
"""


def test_a_real_run_without_a_superlink_is_said_with_where_to_look(
    tmp_path: Path, flwr: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "federation.toml"
    file.write_text(REAL)
    (tmp_path / "ca.crt").write_text("")
    flwr('{"success": false, "error-message": "Connection refused"}', 1)
    with pytest.raises(SystemExit) as left:
        main(["run", str(file), "--out", str(tmp_path / "run")])
    assert left.value.code == 3
    assert "did not take the run (Connection refused)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_real_run_without_the_authoritys_certificate_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "federation.toml"
    file.write_text(REAL)
    with pytest.raises(SystemExit) as left:
        main(["run", str(file), "--out", str(tmp_path / "run")])
    assert left.value.code == 3
    assert "set deployment.ca" in capsys.readouterr().err


def test_who_merely_waits_for_real_sites_needs_no_torch() -> None:
    code = "import sys, fedistill.flower.launch; sys.exit('torch' in sys.modules)"
    assert launch.processes.output_of([sys.executable, "-c", code], env={}) == (0, "")
