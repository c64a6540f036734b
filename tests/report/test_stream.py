"""The part of the report on a stream: every chart, whatever is missing, however many there are."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as Tree
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from fedistill.errors import RunError
from fedistill.report import (
    bars,
    compare,
    heat,
    prequential,
    stream,
    write_comparison,
    write_report,
)
from fedistill.report.experiences import Experience, experiences
from fedistill.report.folder import Point, read_run
from fedistill.report.heat import LEVELS

SUMMARY = {
    "average_accuracy": 0.7512,
    "anytime_accuracy": 0.8123,
    "forgetting": 0.143,
    "backward_transfer": -0.121,
    "forward_transfer": 0.021,
    "prequential": 0.712,
}


def line(number, amount=3, clients=3, **more):
    """One line of stream.jsonl; all clients have 400 rows in each experience."""
    before = 400 * (number - 1)
    names = [f"site-{k}" for k in range(clients)]
    held = {str(label): 400 // (2 * number) for label in range(2 * number)}
    return {
        "experience": number,
        "name": f"classes {2 * number - 2} {2 * number - 1}",
        "round": 2 * number,
        "rows": 400 * clients,
        "student": [
            round(0.9 - 0.1 * (number - k), 3) if k <= number else 0.1 for k in range(1, amount + 1)
        ],
        "clients": [0.5] * amount,
        "prequential": 0.7,
        "prequential_by_client": dict.fromkeys(names, 0.7),
        "curve": {
            name: [[before + row, 0.4 + row / 1000] for row in range(100, 401, 100)]
            for name in names
        },
        "alarms": {"site-0": [before + 50]} if number > 1 else {},
        "consolidated": number == 2,
        "buffer": {"rows": sum(held.values()), "capacity": 400, "classes": held},
        "seconds": 1.2,
        "rows_trained": 1000,
        "rows_retrain": 4000 * number,
    } | more


@pytest.fixture
def make_stream(make_run):
    """A run folder with a stream; ``lines`` replaces what is in it."""

    def build(folder="run", lines=None, amount=3, clients=3, each=None, **summary):
        path = make_run(
            folder,
            rounds=4,
            baselines=(),
            binary=False,
            **{"stream": SUMMARY, "classes": None} | summary,
        )
        written = lines or [line(k, amount, clients) | (each or {}) for k in range(1, amount + 1)]
        (path / "stream.jsonl").write_text("".join(json.dumps(one) + "\n" for one in written))
        return path

    return build


class Balanced(HTMLParser):
    """Fails on tags that do not match."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report(folder):
    """The page, after what every page must be."""
    text = write_report(folder).read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    for one in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = Tree.fromstring(one)
        assert root.get("aria-label") or (root.find("title").text and root.find("desc").text)
        assert "nan" not in one
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert not re.search(r"https?://|<script|\bsrc=|@import|url\(|\son\w+=", text)
    return text


def plain(text):
    return " ".join(
        re.sub(r"<[^>]+>", " ", text[text.index("<main>") :]).replace("&#39;", "'").split()
    )


def test_without_a_stream_nothing_is_shown(make_run):
    folder = make_run()
    assert stream.section(read_run(folder)) is None
    seen = plain(report(folder))
    assert "stream" not in seen
    assert "experience" not in seen
    (folder / "stream.jsonl").write_text("")
    assert "experience" not in plain(report(folder))


def test_every_part_is_there(make_stream):
    text = report(make_stream())
    assert "<h2>A stream of 3 experiences</h2>" in text
    seen = plain(text)
    for words in (
        "The 3,600 rows came in 3 portions, called experiences, one after the other: classes 0 1; "
        "classes 2 3; classes 4 5.",
        "Drift detectors alarmed twice, at 1 site; enough sites at once brought an extra round of "
        "distillation in experience 2.",
        "New rows, tested before they were learned",
        "What is known after each experience",
        "What the buffers hold",
        "Updating trained on about 1/8 of the rows that training anew on everything so far after "
        "each experience would have. All updates took 3.6 s.",
        "Each experience in numbers",
        "drift alarm",
    ):
        assert words in seen


def test_the_tiles_say_what_each_figure_means(make_stream):
    folder = make_stream()
    told = {tile.name: tile for tile in stream.tiles(read_run(folder))}
    assert [tile.value for tile in told.values()] == [
        "75.1%", "81.2%", "14.3", "71.2%", "−12.1", "+2.1",
    ]  # fmt: skip
    assert all(tile.context for tile in told.values())
    assert "untrained model" in told["Forward transfer"].context
    some = make_stream("some", stream={"average_accuracy": 0.5, "forgetting": None, "x": "y"})
    assert [tile.name for tile in stream.tiles(read_run(some))] == ["Average accuracy"]


# --- accuracy before learning --------------------------------------------------------------------


def drawn(folder):
    return prequential.figure(experiences(read_run(folder)))


def test_few_sites_have_a_line_each_over_the_rows_they_saw(make_stream):
    figure = drawn(make_stream())
    assert figure.wide.count('<polyline class="line') == 3
    assert "rows seen so far" in figure.wide
    assert figure.wide.count('class="shift"') == 3  # one is in the legend
    assert figure.wide.count("site-0: drift alarm") == 2
    assert "a new experience begins" in figure.narrow
    assert "site-2, 1,200: 80.0%" in figure.wide


def test_sites_that_differ_in_rows_are_laid_along_the_experiences(make_stream):
    lines = [line(k) for k in (1, 2, 3)]
    for one in lines:
        one["curve"]["site-1"] = [[10 * x, y] for x, y in one["curve"]["site-1"]]
    figure = drawn(make_stream(lines=lines))
    assert "rows seen so far" not in figure.wide
    assert "Experiences are drawn equally wide" in figure.caption
    sites = prequential.tracks(experiences(read_run(make_stream("b", lines=lines))))
    assert [p.x for p in sites[0].points] == [p.x for p in sites[1].points]
    assert sites[0].points[-1].x == 3.5
    assert sites[0].alarms == (1.625, 2.625)


def test_a_sign_stands_on_its_site_s_line():
    points = [Point(1, 0.2), Point(3, 0.6)]
    assert [prequential.level(points, x) for x in (0, 1, 2, 3, 9)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 0.6]
    )
    assert prequential.level(points[:1], 5) == 0.2


def test_many_sites_are_a_mean_with_its_band(make_stream):
    lines = [line(k, clients=9) for k in (1, 2, 3)]
    for one in lines:
        one["curve"]["site-8"] = [[x, y - 0.3] for x, y in one["curve"]["site-8"]]
    figure = drawn(make_stream(lines=lines))
    assert figure.wide.count('<polyline class="line') == 1
    assert 'class="band' in figure.wide
    assert "mean of 9 sites" in figure.wide
    assert "drift alarm at 1 of 9 sites" in figure.wide
    found = experiences(read_run(make_stream("b", lines=lines)))
    (((x, y, sd), *_),) = [
        prequential.averaged(prequential.tracks(found), prequential.Ruler(), 3).points
    ]
    assert 0.5 < x < 0.6
    assert y == pytest.approx((8 * 0.5 + 0.2) / 9)
    assert sd == pytest.approx(0.3 * math.sqrt(8) / 9)


def test_a_site_away_in_an_experience_has_a_gap_there(make_stream):
    lines = [line(k) for k in (1, 2, 3)]
    del lines[1]["curve"]["site-1"]
    found = experiences(read_run(make_stream(lines=lines)))
    assert list(prequential.tracks(found)[1].pieces) == [0, 2]
    assert prequential.figure(found)


def test_without_curves_there_is_a_point_per_experience(make_stream):
    sites = drawn(make_stream("a", each={"curve": {}}))
    assert sites.wide.count('<polyline class="line') == 3
    assert "Each point is the mean of one experience." in sites.caption
    mean = drawn(make_stream("b", each={"curve": None, "prequential_by_client": None}))
    assert mean.wide.count('<polyline class="line') == 1
    nothing = {"curve": None, "prequential_by_client": None, "prequential": None}
    assert drawn(make_stream("c", each=nothing)) is None


def test_no_alarms_no_signs(make_stream):
    folder = make_stream(each={"alarms": {}, "consolidated": False})
    assert "drift alarm" not in drawn(folder).wide
    assert "larm" not in " ".join(stream.section(read_run(folder)).sentences)
    with (folder / "config.toml").open("a") as file:
        file.write('\n[continual]\ndrift = "adwin"\n')
    assert "No site's drift detector alarmed." in plain(report(folder))


# --- the map -------------------------------------------------------------------------------------


def test_the_map_is_a_table_with_a_number_in_each_cell(make_stream):
    found = heat.matrix(experiences(read_run(make_stream())))
    assert (found.who, found.low, found.high) == ("student", "10%", "90%")
    assert [[cell.text for cell in row.cells] for row in found.rows] == [
        ["90.0%", "10.0%", "10.0%"],
        ["80.0%", "90.0%", "10.0%"],
        ["70.0%", "80.0%", "90.0%"],
    ]
    assert [cell.own for cell in found.rows[1].cells] == [False, True, False]
    assert [row.average for row in found.rows] == ["90.0%", "85.0%", "80.0%"]
    assert found.columns[1] == (2, "classes 2 3")
    assert not found.wide
    seen = plain(report(make_stream("b")))
    assert (
        "after 1 classes 0 1 2 classes 2 3 3 classes 4 5 so far mean of those met 1 90.0%" in seen
    )


def test_without_a_student_the_clients_are_shown(make_stream):
    folder = make_stream(each={"student": None, "clients": [0.4, None, 0.6]})
    found = heat.matrix(experiences(read_run(folder)))
    assert found.who == "clients, on average"
    assert [cell.text for cell in found.rows[0].cells] == ["40.0%", "–", "60.0%"]
    assert found.rows[0].cells[1].shade == ""
    assert found.rows[1].average == "–"
    assert (
        heat.matrix(
            experiences(read_run(make_stream("b", each={"student": [None] * 3, "clients": None})))
        )
        is None
    )


def test_many_experiences_are_a_picture_with_a_table_beside_it(make_stream):
    folder = make_stream(amount=13)
    found = heat.matrix(experiences(read_run(folder)))
    assert found.rows[-1].cells[-1].text == "90"
    for one in (found.wide, found.narrow):
        assert 'class="h9"' in one
        assert "After 13: 1 -30" in one
    assert "These accuracies as a table, in per cent" in report(folder)


def test_more_than_a_hundred_are_thinned_and_the_last_is_kept():
    found = [Experience(k, student=(0.5,) * 250) for k in range(1, 251)]
    shown = heat.matrix(found)
    assert (len(shown.rows), len(shown.columns), shown.skipped) == (84, 84, 3)
    assert shown.rows[-1].number == shown.columns[-1][0] == 250
    assert shown.rows[-1].cells[-1].own


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([0.5], (0.5, 0.6)),
        ([1.0], (0.9, 1.0)),
        ([0.0, None], (0.0, 0.1)),
        ([0.13, 0.91], (0.1, 1.0)),
    ],
)
def test_the_colours_span_tens_of_per_cent(values, scale):
    assert heat.ends(values) == pytest.approx(scale)
    shades = [heat.shade(value, *scale) for value in values if value is not None]
    assert all(re.fullmatch(r"h\d", one) for one in shades)


def test_cells_can_be_read_in_light_and_in_dark():
    """Every shade and the ink on it differ by 4.5 to 1, as WCAG AA asks of text."""
    style = files("fedistill.report").joinpath("style.css").read_text("utf-8")
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        assert {f"c{k}" for k in range(13)} <= set(colours)
        for level in range(LEVELS):
            ink = colours["on-high" if level > 5 else "on-low"]
            assert contrast(colours[f"h{level}"], ink) >= 4.5
        lights = [luminance(colours[f"h{level}"]) for level in range(LEVELS)]
        assert lights in (sorted(lights), sorted(lights, reverse=True))


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# --- buffers and cost ----------------------------------------------------------------------------


def test_the_buffer_is_stacked_by_class(make_stream):
    figure = stream.section(read_run(make_stream())).buffer
    assert "At the end 396 of at most 400, of 6 classes." in figure.caption
    assert re.findall(r">(class \d+|\d+ others)</text>", figure.wide) == [
        f"class {k}" for k in range(6)
    ]
    assert "After experience 3: class 0 66, class 1 66" in figure.wide


def test_of_many_classes_the_rest_are_others(make_stream):
    figure = stream.section(read_run(make_stream(amount=10))).buffer
    assert "class 11" in figure.wide
    assert "class 12" not in figure.wide
    assert "8 others" in figure.wide
    assert "f12" in figure.wide


def test_classes_have_their_names_where_the_run_has_them(make_stream):
    figure = stream.section(read_run(make_stream(classes=["healthy", "ill"]))).buffer
    assert ">healthy<" in figure.wide
    assert ">class 2<" in figure.wide


@pytest.mark.parametrize("held", [None, {}, {"rows": 0, "capacity": 9, "classes": {}}, 7])
def test_without_replay_there_is_no_buffer(make_stream, held):
    folder = make_stream(each={"buffer": held})
    assert stream.section(read_run(folder)).buffer is None
    assert "What the buffers hold" not in report(folder)


@pytest.mark.parametrize(
    ("trained", "anew", "words"),
    [
        (1000, 100_000, "100× fewer rows than training anew"),
        (1000, 8000, "about 1/8 of the rows that training anew"),
        (1000, 1250, "80% of the rows that training anew"),
        (1000, 500, "2.0× as many rows as training anew"),
    ],
)
def test_the_cost_in_one_sentence(trained, anew, words):
    said = stream.cost_sentence([Experience(1, trained=trained, retrain=anew)])
    assert said == f"Updating trained on {words} on everything so far would have."


def test_the_cost_is_drawn_from_zero(make_stream):
    rows, time = stream.section(read_run(make_stream())).cost
    assert "this update ends at 1,000; training anew ends at 12,000" in rows.wide
    assert ">0 s</text>" in time.wide
    folder = make_stream("b", each={"rows_trained": None, "rows_retrain": None, "seconds": None})
    section = stream.section(read_run(folder))
    assert (section.cost, section.cost_sentence) == ((), "")
    assert "What the updates cost" not in report(folder)


def test_the_numbers_are_a_table_too(make_stream):
    found = stream.section(read_run(make_stream())).numbers
    assert found.rows[1][:2] == ("2", "classes 2 3")
    assert dict(zip(found.columns, found.rows[1][2], strict=True)) == {
        "round": "4",
        "new rows": "1,200",
        "correct before training": "70.0%",
        "drift alarms": "1 + extra round",
        "rows kept for replay": "400",
        "rows trained on": "1,000",
        "training anew": "8,000",
        "time": "1.2 s",
    }


# --- whatever comes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "clients"), [(1, 1), (1, 9), (2, 1), (12, 8), (13, 2), (31, 3), (100, 20), (3, 200)]
)
def test_few_or_many_of_everything(make_stream, amount, clients):
    text = report(make_stream(amount=amount, clients=clients))
    assert "New rows, tested before they were learned" in text
    assert len(text) < 800_000


def test_one_experience_is_no_stream_of_portions(make_stream):
    seen = plain(report(make_stream(amount=1)))
    assert "A stream of 1 experience " in seen
    assert "All 1,200 rows came at once: classes 0 1." in seen
    assert "Framed" not in seen


def test_hardly_anything_is_still_a_page(make_stream):
    folder = make_stream(lines=[{"experience": 1}, {"experience": 2}], stream=None)
    seen = plain(report(folder))
    assert "A stream of 2 experiences The rows came in 2 portions" in seen
    assert "in numbers" not in seen


@pytest.mark.parametrize(
    "junk", [1, "x", [], {}, None, True, [[1]], {"a": 1}, {"a": [["x", 1], [1], 3]}, [1e400, "<b>"]]
)
def test_junk_is_left_out(make_stream, junk):
    keys = [key for key in line(1) if key != "experience"]
    folder = make_stream(each=dict.fromkeys(keys, junk), stream=junk)
    assert "<b>" not in report(folder)
    for key in keys:
        assert stream.section(read_run(make_stream(each={key: junk})))


def test_names_are_escaped_and_capped(make_stream):
    bad = "<script>alert(1)</script>" + "x" * 500
    one = line(1, 1, 1, name=bad, alarms={bad: [9]}, buffer={"rows": 3, "classes": {bad: 3}})
    one["curve"] = {bad: [[100, 0.5], [200, 0.6]]}
    text = report(make_stream(lines=[one]))
    assert "&lt;script" in text
    assert "x" * 60 not in text


def test_a_line_cut_short_is_a_remark_and_a_broken_one_is_refused(make_stream):
    folder = make_stream()
    with (folder / "stream.jsonl").open("a") as file:
        file.write('{"experience": 4, "na')
    run = read_run(folder)
    assert len(run.stream) == 3
    assert "The last line of stream.jsonl was cut short and is left out." in run.remarks
    (folder / "stream.jsonl").write_text('{"round": 1}\n')
    with pytest.raises(
        RunError, match=r"stream\.jsonl line 1: expected a whole number 'experience'"
    ):
        read_run(folder)


def test_axes_go_from_the_first_to_the_last_experience():
    found = [Experience(k, prequential=0.5) for k in range(1, 41)]
    labels = re.findall(r">(\d+)</text>", prequential.figure(found).wide)
    assert (labels[0], labels[-1]) == ("1", "40")
    assert all(int(a) < int(b) for a, b in itertools.pairwise(labels))


def test_the_layers_of_a_step_chart_are_escaped():
    layers = [("<a>", 0, [Point(1, 2)])]
    chart = bars.step_chart(layers, ident="s", title="T", x_label="", y_label="", spoken="two")
    assert Tree.fromstring(chart).find("desc").text == "two"


# --- side by side --------------------------------------------------------------------------------


def test_runs_on_streams_are_compared(make_stream, make_run, tmp_path):
    paths = [
        make_stream("a"),
        make_stream("b", stream={"average_accuracy": 0.9, "prequential": None}),
        make_run("c"),
    ]
    lines = {line.name: line.entries for line in compare(paths).lines}
    assert [(e.text, e.best) for e in lines["stream average"]] == [
        ("75.1%", False), ("90.0%", True), ("–", False),
    ]  # fmt: skip
    assert [e.text for e in lines["prequential"]] == ["71.2%", "–", "–"]
    page = write_comparison(paths, tmp_path / "p.html").read_text()
    assert "Stream average: accuracy after the last experience" in page
    other = compare(paths[2:])
    assert not {"stream average", "prequential"} & {line.name for line in other.lines}
    assert "Stream average" not in write_comparison(paths[2:], tmp_path / "q.html").read_text()
