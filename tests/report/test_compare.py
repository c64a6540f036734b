"""Runs side by side."""

import io

import pytest
from rich.console import Console

from fedistill.errors import RunError
from fedistill.report import compare, write_comparison


def printed(comparison, width=120):
    out = io.StringIO()
    Console(file=out, width=width).print(comparison.render())
    return out.getvalue()


def entries(comparison, name):
    line = next(line for line in comparison.lines if line.name == name)
    return [(entry.text, entry.best) for entry in line.entries]


def test_runs_of_different_length(make_run, tmp_path):
    paths = [
        make_run("a", rounds=4, name="short"),
        make_run("b", rounds=30, name="long", student=0.95, method="fedmd"),
    ]
    comparison = compare(paths)
    assert entries(comparison, "rounds") == [("4", False), ("30", False)]
    assert [best for _, best in entries(comparison, "student")] == [False, True]
    assert [best for _, best in entries(comparison, "time")] == [True, False]
    shown = printed(comparison)
    assert "short" in shown
    assert "● 9" in shown
    page = write_comparison(paths, tmp_path / "page.html").read_text()
    assert page.count("<svg") == 4
    assert "Accuracy by bytes sent" in page
    assert "http:" not in page
    assert "https:" not in page


def test_equal_values_are_not_marked(make_run):
    comparison = compare([make_run("a"), make_run("b")])
    assert [best for _, best in entries(comparison, "student")] == [False, False]
    assert comparison.labels == ("heart-four-hospitals (a)", "heart-four-hospitals (b)")


def test_having_sent_nothing_is_not_the_fewest_bytes(make_run):
    paths = [make_run(f"r{k}", bytes_up_per_client_round=k * 100) for k in range(3)]
    assert entries(compare(paths), "up, client-round") == [
        ("0 B", False),
        ("100 B", True),
        ("200 B", False),
    ]


def test_the_same_folder_twice_has_two_labels(make_run):
    folder = make_run("a")
    labels = compare([folder, folder]).labels
    assert len(set(labels)) == 2


def test_unfair_comparisons_are_cautioned(make_run):
    a = make_run("a", partition="iid")
    b = make_run("b", partition="dirichlet", proxy_sha256="00", seed=8)
    assert (
        compare([a, b])
        .cautions[0]
        .startswith(
            "The runs differ in more than the method: how rows were dealt to sites, proxy rows, "
            "seed."
        )
    )
    assert not compare([a, a]).cautions
    assert entries(compare([a, b]), "split") == [("iid", False), ("dirichlet α=0.3", False)]


def test_many_runs_stand_as_rows_and_share_what_is_the_same(make_run):
    paths = [
        make_run(f"r{k}", name=f"run-{k}", student=0.8 + 0.02 * k, rounds=3, baselines=())
        for k in range(6)
    ]
    comparison = compare(paths)
    assert comparison.wide
    assert "up, client-round 412 B" in comparison.shared
    shown = printed(comparison, width=100)
    assert len([line for line in shown.splitlines() if line.startswith("run-")]) == 6


def test_missing_figures_and_repeats(make_run):
    bare = make_run("bare", baselines=())
    (bare / "summary.json").unlink()
    (bare / "config.toml").unlink()
    comparison = compare([bare, make_run("b", seeds=2)])
    assert entries(comparison, "method")[0] == ("–", False)
    assert "± 1.8" in entries(comparison, "student")[1][0]
    assert entries(comparison, "seed") == [("–", False), ("2 seeds", False)]


def test_names_cannot_style_the_terminal_or_the_page(make_run, tmp_path):
    folder = make_run("a", name="[red]x[/red]<script>\x1b[2J")
    assert "[red]x[/red]<script>" in printed(compare([folder]))
    assert "\x1b" not in printed(compare([folder]))
    assert "<script" not in write_comparison([folder], tmp_path / "p.html").read_text()


def test_no_runs_and_no_run_are_refused(tmp_path):
    with pytest.raises(RunError, match="expected at least one run folder, found none"):
        compare([])
    with pytest.raises(RunError, match=r"expected rounds\.jsonl"):
        write_comparison([tmp_path], tmp_path / "p.html")
