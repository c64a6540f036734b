"""The command line: exit codes, and one sentence for bad input."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings

import pytest
from builders import write_settings

from fedistill import catalog, config, starters

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer's, about click
    from fedistill import cli


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command in this process: exit code, stdout, stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return leaving.value.code, told.out, told.err

    yield run
    signal.signal(signal.SIGTERM, before)


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "fedistill", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


BAD = {
    "absent": (None, "expected a settings file, found none"),
    "broken": ("rounds = = 3", "line 1: TOML: cannot be read"),
    "bad key": ("rouns = 3", 'line 1: rouns: unknown key; did you mean "rounds"?'),
    "bad type": ("rounds = 'x'", "line 1: rounds: expected a whole number"),
    "bad source": ('[data]\nsource = "digit"', 'unknown source "digit"; did you mean "digits"?'),
    "bad path": ('[data]\nsource = "csv:nowhere.csv"', "nowhere.csv"),
    "bad model": ('[clients]\nmodel = "lenet"', "lenet takes images of 1x28x28"),
    "too many proxy rows": ("[proxy]\nrows = 5000", "proxy.rows: expected fewer than"),
}


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence_and_never_a_traceback(name, verb, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, told = BAD[name]
    path = tmp_path / "x.toml"
    if text is not None:
        path.write_text(text)
    code, out, err = call(verb, path)
    assert code == (3 if name in {"bad path", "too many proxy rows"} else 2)
    assert told in err
    assert err.startswith("fedistill: ")
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check"], "Missing argument"),
        (["frobnicate"], "No such command"),
        (["run", "x.toml", "--no-such-option"], "No such option"),
        (["run", "x.toml", "--rounds", "many"], "not a valid int"),
        (["list", "rulez"], 'did you mean "rules"?'),
        (["new", "x.toml", "--example", "digit"], 'did you mean "digits"?'),
        (["new", "no/such/folder/x.toml"], "no such folder"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, told, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*arguments)
    assert code == 2
    assert told in err


def test_a_real_process_exits_with_2_and_without_a_traceback(tmp_path):
    done = command("check", tmp_path / "no.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("fedistill: ")
    assert "Traceback" not in done.stderr


def test_help_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    for name in ("run", "check", "list", "report", "compare", "new"):
        assert f" {name} " in out


# --- list ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", catalog.TABLES)
def test_list_shows_every_name_of_a_kind_with_a_line(kind, call):
    code, out, _ = call("list", kind)
    assert code == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1:] for line in out.splitlines()}
    assert list(lines) == list(catalog.known(kind))
    assert all(text and text[0] for text in lines.values()), lines


def test_list_alone_shows_every_kind(call):
    code, out, _ = call("list")
    assert code == 0
    for kind in catalog.TABLES:
        assert f"\n{kind}\n" in f"\n{out}"


# --- new, check, run -----------------------------------------------------------------------------


def test_new_writes_what_check_accepts(call, tmp_path):
    path = tmp_path / "mine.toml"
    code, out, _ = call("new", path)
    assert code == 0
    assert f"fedistill run {path}" in out
    code, out, err = call("check", path)
    assert (code, err) == (0, "")
    assert "clients   8, participation 1" in out
    assert "no differential privacy" in out


def test_new_leaves_an_existing_file_alone(call, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("seed = 1")
    code, _, err = call("new", path)
    assert code == 2
    assert "exists already" in err
    assert path.read_text() == "seed = 1"


@pytest.mark.parametrize("example", starters.EXAMPLES)
def test_every_example_is_commented_and_reads_back(example, call, tmp_path):
    path = tmp_path / "x.toml"
    assert call("new", path, "--example", example)[0] == 0
    text = path.read_text()
    assert text.startswith("# ")
    assert config.parse(text) == config.parse(starters.EXAMPLES[example])
    assert "# everything random is derived from it" in text


def test_check_prints_the_plan_and_warns_when_weights_would_be_cheaper(call, tmp_path):
    path = write_settings(tmp_path)
    code, out, _ = call("check", path, "--set", "student.width=2")
    assert code == 0
    for word in ("data", "clients", "proxy", "test", "method", "rounds", "bytes", "privacy"):
        assert f"\n{word} " in f"\n{out}"
    assert "WARNING: predictions cost more than weights" in out
    code, out, _ = call("check", path, "--set", "student.width=4000")
    assert "WARNING" not in out


def test_run_writes_the_folder_and_resume_goes_on(call, tmp_path):
    path = write_settings(tmp_path, rounds=1)
    out = tmp_path / "run"
    code, told, err = call("run", path, "--out", out, "--set", "clients.epochs=1")
    assert code == 0, err
    assert f"report: {out / 'report.html'}" in told
    code, *_ = call(
        "run", path, "--out", out, "--set", "clients.epochs=1", "--resume", "--rounds", "2"
    )
    assert code == 0
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 2
    code, _, err = call("run", path, "--out", out, "--resume", "--seed", "9")
    assert code == 3
    assert "holds a run with other settings" in err
    assert call("report", out)[0] == 0
    code, told, _ = call("compare", out, out, "--out", tmp_path / "c.html")
    assert code == 0
    assert (tmp_path / "c.html").exists()


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_a_folder_without_a_run_is_told(verb, call, tmp_path):
    code, _, err = call(verb, tmp_path / "none")
    assert code in {2, 3}
    assert err.startswith("fedistill: ")
    assert "Traceback" not in err


def test_a_surprise_keeps_its_traceback(monkeypatch, call):
    """Only what we foresee becomes a sentence; a bug of ours must not hide."""

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(config, "load", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "x.toml"])
