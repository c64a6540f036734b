"""Progress: plain lines off a terminal, a sane terminal after any end."""

import io
import json

import pytest
from rich.console import Console

from fedistill.report import RoundTable

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def rows(make_run):
    folder = make_run(rounds=4, names=["a", "b", "c"], baselines=())
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def console(terminal, width=100):
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=width,
        legacy_windows=False,
        _environ={"TERM": "xterm-256color"} if terminal else {},
    )


def test_plain_lines_off_a_terminal(rows):
    out = console(False, width=40)
    with RoundTable("digits, 3 sites", 4, out, fedavg_bytes=85_544) as table:
        for row in rows:
            table.advance("client", 1, 3)
            table.add(row)
    text = out.file.getvalue()
    lines = text.splitlines()
    assert "\x1b" not in text
    assert "\r" not in text
    assert len(lines) == 2 + 4 + 1
    assert lines[1].split() == [
        "round",
        "student",
        "clients",
        "least",
        "agree",
        "up",
        "down",
        "ok",
        "time",
        "left",
    ]
    assert lines[4].split()[0] == "3/4"
    assert "2/3" in lines[4]
    assert lines[-1].startswith("4 rounds in")
    assert "FedAvg would send 1.97 MB: 82.5× fewer bytes than FedAvg" in lines[-1]


def test_columns_stand_under_their_heads(rows):
    out = console(False)
    with RoundTable("t", 4, out) as table:
        for row in rows:
            table.add(row)
    lines = out.file.getvalue().splitlines()[1:-1]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_cursor_comes_back_after_any_end(rows, error):
    out = console(True)
    table = RoundTable("t", 4, out)

    def cut_short():
        with table:
            table.add(rows[0])
            table.advance("client", 1, 3)
            raise error

    with pytest.raises(error):
        cut_short()
    text = out.file.getvalue()
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert "stopped after 1 round" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_lines_fit_the_terminal(rows, width):
    out = console(True, width=width)
    table = RoundTable("t", 4, out)
    with table:
        table.add(rows[0])
    if width >= 60:
        assert len(table.line(rows[0])) <= width


def test_refreshing_is_rare(rows):
    out = console(True)
    with RoundTable("t", 1, out) as table:
        before = len(out.file.getvalue())
        for _ in range(10_000):
            table.advance("client", 1, 3)
        assert len(out.file.getvalue()) - before < 1000


def test_missing_figures_are_dashes_and_names_are_harmless():
    out = console(False)
    with RoundTable("[bold]x\x1b[2J", 2, out) as table:
        table.advance("client\x1b", 0, 0)
        table.add({"round": 1, "student_accuracy": None})
    text = out.file.getvalue()
    assert "\x1b" not in text
    assert "[bold]x" in text
    assert text.splitlines()[2].split().count("–") >= 6


def test_more_bytes_than_fedavg_is_said(rows):
    out = console(False)
    with RoundTable("t", 4, out) as table:
        table.add(rows[0] | {"fedavg_bytes_per_client_round": 500})
    assert "2.0× more bytes than FedAvg" in out.file.getvalue()


def test_characters_that_the_output_cannot_carry_are_replaced(rows):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with RoundTable("tür", 4, Console(file=file)) as table:
        table.add(rows[0] | {"student_accuracy": None})
    file.flush()
    assert b"t?r" in file.buffer.getvalue()


def test_nothing_finished_nothing_summed_up():
    out = console(False)
    with RoundTable("t", 3, out):
        pass
    assert len(out.file.getvalue().splitlines()) == 2


def test_a_private_run_has_a_column_of_epsilon_and_others_have_not(rows):
    out = console(False)
    with RoundTable("t", 4, out, private=True) as table:
        for row in rows[:2]:
            table.add(row | {"epsilon_max": 1.2301 * row["round"]})
    lines = out.file.getvalue().splitlines()
    heads = lines[1].split()
    assert heads[heads.index("agree") + 1] == "epsilon"
    assert lines[3].split()[heads.index("epsilon")] == "2.47"
    assert len({len(line) for line in lines[1:4]}) == 1
    assert " · epsilon 2.47 · sent" in lines[-1]
    out = console(False)
    with RoundTable("t", 4, out) as table:
        table.add(rows[0])
    assert "epsilon" not in out.file.getvalue()


def test_a_loss_that_is_not_known_is_a_dash(rows):
    out = console(False)
    with RoundTable("t", 4, out, private=True) as table:
        table.add(rows[0] | {"epsilon_max": None})
    heads, line = (text.split() for text in out.file.getvalue().splitlines()[1:3])
    assert line[heads.index("epsilon")] == "–"


def test_a_narrow_terminal_keeps_the_column_of_epsilon(rows):
    table = RoundTable("t", 4, console(True, width=60), private=True)
    with table:
        assert len(table.line(rows[0])) <= 60
        assert "epsilon" in [column.head for column in table._columns]
