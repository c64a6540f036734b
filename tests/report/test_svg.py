"""Charts are well-formed, spoken, and drawn within their frame."""

import itertools
import re
import xml.etree.ElementTree as Tree

import pytest

from fedistill.report import bars, scale, svg, words
from fedistill.report.folder import Point


def chart(series, **more):
    settings = {
        "ident": "c",
        "title": "T",
        "x_label": "round",
        "y_label": "y",
        "x_format": "{:g}".format,
        "y_format": words.percent,
    } | more
    return svg.line_chart(series, **settings)


def course(*values, sd=None):
    return tuple(Point(k, v, sd) for k, v in enumerate(values, start=1))


def test_a_chart_is_xml_with_title_and_description():
    drawn = chart([svg.Series("student <1>", course(0.2, 0.5, 0.9))])
    root = Tree.fromstring(drawn)
    assert root.get("role") == "img"
    assert root.find("title").text == "T"
    assert root.find("desc").text == "student <1> ends at 90.0%"


def test_no_points_no_chart():
    assert chart([svg.Series("a", ())]) == ""
    assert bars.bar_chart([bars.Bar("a", 0)], ident="b", title="T", value_format=str) == ""
    assert bars.step_chart([], ident="s", title="T", x_label="", y_label="") == ""


@pytest.mark.parametrize(
    "values", [(0.5,), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0, 1), (0.3, 0.301)]
)
@pytest.mark.parametrize("log_x", [False, True])
def test_every_point_lies_in_the_frame(values, log_x):
    drawn = chart([svg.Series("a", course(*values, sd=0.1))], log_x=log_x, least=0, most=1)
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', drawn):
        assert 0 <= float(x) <= 900
        assert 0 <= float(y) <= 320
    assert "nan" not in drawn


def test_repeats_draw_a_band():
    assert 'class="band' in chart([svg.Series("a", course(0.1, 0.5, sd=0.05))])
    assert 'class="band' not in chart([svg.Series("a", course(0.1, 0.5))])


def test_labels_are_moved_apart_and_keep_their_order():
    placed = svg.spread_out([100, 101, 50, 100], gap=15, low=0, high=200)
    ordered = sorted(placed)
    assert all(b - a >= 14.999 for a, b in itertools.pairwise(ordered))
    assert placed[2] == 50
    assert placed[1] == max(placed)
    assert svg.spread_out([199, 200], gap=15, low=0, high=200) == [185, 200]
    assert len(svg.spread_out([5.0] * 40, gap=15, low=0, high=100)) == 40


def test_ticks_drop_decimals_that_are_all_zero():
    assert svg.ticks(scale.linear([0.4, 1.0]), words.percent) == [
        "40%",
        "50%",
        "60%",
        "70%",
        "80%",
        "90%",
        "100%",
    ]
    assert svg.ticks(scale.linear([0.90, 0.91]), words.percent)[0] == "90.0%"


def test_the_first_and_last_round_are_on_the_axis():
    axis = scale.linear([1, 40], count=10, whole=True, tight=True)
    assert (axis.ticks[0], axis.ticks[-1]) == (1, 40)
    assert all(tick == int(tick) for tick in axis.ticks)


def test_far_apart_bars_are_logarithmic_and_say_so():
    def bar(low):
        return bars.bar_chart(
            [bars.Bar("a", low), bars.Bar("b", 1e6)],
            ident="b",
            title="T",
            value_format=words.human_bytes,
        )

    assert "logarithmic" in bar(10)
    assert "logarithmic" not in bar(1e5)


def test_all_bars_have_a_length():
    drawn = bars.bar_chart(
        [bars.Bar("a", 1), bars.Bar("b", 1e9)], ident="b", title="T", value_format=words.human_bytes
    )
    assert all(float(width) >= 1 for width in re.findall(r'<rect[^>]* width="([\d.-]+)"', drawn))
