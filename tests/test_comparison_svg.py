"""Charts: scales, ticks, labels that do not meet, and what is drawn."""

import xml.etree.ElementTree as ElementTree

import pytest

from comparison_svg import (
    HEIGHT,
    LETTER,
    WIDTH,
    Scale,
    Series,
    color_class,
    cut,
    even_ticks,
    interval_chart,
    line_chart,
    log_ticks,
    overlap,
    plain_number,
    point_labels,
    scatter_chart,
    spread_out,
)


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0, 10, [0, 2, 4, 6, 8, 10]), (1.8, 2.6, [1.8, 2.0, 2.2, 2.4, 2.6]), (3, 3, [3]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_even_ticks_are_round(low, high, ticks):
    assert even_ticks(low, high) == pytest.approx(ticks)


def test_log_ticks_are_powers_of_ten_or_between_them():
    assert log_ticks(1, 1e4) == pytest.approx([1, 10, 100, 1000, 10_000])
    assert log_ticks(1e6, 9e6) == pytest.approx([1e6, 2e6, 5e6])


def test_scales_map_ends_to_ends():
    straight, log = Scale(0, 10, 50, 150), Scale(1, 100, 50, 150, True)
    assert (straight(0), straight(5), straight(10)) == (50, 100, 150)
    assert (log(1), log(10), log(100)) == (50, 100, 150)


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.05, "0.05"),
        (2.25, "2.25"),
        (5000, "5000"),
        (10_000, "10k"),
        (1.5e6, "1.5M"),
        (2e9, "2G"),
        (3e18, "3E"),
    ],
)
def test_tick_text(value, text):
    assert plain_number(value) == text


def test_labels_are_moved_apart_and_keep_their_order():
    places = spread_out([100, 101, 102, 20])
    assert places[3] == 20
    gaps = [after - before for before, after in zip(sorted(places), sorted(places)[1:], strict=False)]
    assert min(gaps) >= 13 and places[0] < places[1] < places[2]


def test_labels_at_the_bottom_go_up():
    assert max(spread_out([226, 227, 228])) <= HEIGHT - 40


def test_long_names_are_cut_in_the_middle():
    assert cut("short", 100) == "short"
    name = cut("mamba2-with-a-long-name-60M", 100)
    assert len(name) * LETTER <= 100 and name.startswith("mamba2") and name.endswith("60M")


def parsed(svg):
    return ElementTree.fromstring(svg)


def test_a_line_chart_names_its_lines_and_draws_bands_where_seeds_differ():
    x, y = [0, 1, 2], [3.0, 2.0, 1.5]
    banded = Series("one & only", 0, x, y, [2.9, 1.9, 1.4], [3.1, 2.1, 1.6])
    plain = Series("other", 8, x, [3.0, 2.5, 2.0], [3.0, 2.5, 2.0], [3.0, 2.5, 2.0])
    root = parsed(line_chart([banded, plain], "tokens", "loss", (1, 3), "A <title>", marker=2.0))
    classes = [each.get("class") or "" for each in root.iter()]
    assert sum(each.startswith("b ") for each in classes) == 1
    assert sum(each.startswith("l ") for each in classes) == 2
    assert "l c1 d1" in classes and "m" in classes
    texts = [each.text for each in root.iter("text")]
    assert {"one & only", "other", "tokens", "loss"} <= set(texts)
    assert root.get("aria-label") == "A <title>"


def test_a_log_axis_leaves_zero_out():
    svg = line_chart([Series("a", 0, [0, 10, 1000], [3, 2, 1])], "tokens", "loss", (1, 3), "t", is_log=True)
    assert "nan" not in svg and "inf" not in svg and parsed(svg) is not None


def test_one_point_and_equal_values_are_drawn():
    assert parsed(line_chart([Series("a", 0, [5], [2])], "tokens", "loss", (2, 2), "t")) is not None
    assert parsed(scatter_chart([(5, 2.0, "a", 0), (5, 2.0, "b", 1)], [0], "FLOPs", "loss", "t")) is not None
    assert parsed(interval_chart([("a", 0.0, None, 0)], "loss", "t")) is not None


def test_the_front_is_filled_and_joined():
    points = [(1, 3.0, "a", 0), (10, 2.0, "b", 1), (100, 2.5, "c", 2)]
    root = parsed(scatter_chart(points, [0, 1], "FLOPs", "loss", "t"))
    circles = [each.get("class") for each in root.iter("circle")]
    assert circles == ["p c2 d0", "p on c0 d0", "p on c1 d0"]  # the front last, on top
    assert sum(each.get("class") == "f" for each in root.iter("path")) == 1


def test_names_of_points_lie_on_nobody():
    points = [(x, 2.0 + x / 1000, f"name{x}", 0) for x in (10, 11, 12, 13, 50)]
    svg = point_labels(points, Scale(5, 60, 54, 366), Scale(1.9, 2.2, 226, 12))
    labels = list(parsed(f"<svg>{svg}</svg>").iter("text"))
    boxes = [
        (float(each.get("x")), float(each.get("y")) - 10, float(each.get("x")) + 39, float(each.get("y")))
        for each in labels
    ]
    assert len(boxes) >= 2
    assert not any(overlap(one, other) for one in boxes for other in boxes if one is not other)


def test_every_drawn_place_is_inside_the_picture():
    root = parsed(scatter_chart([(1, 3.0, "a" * 40, 0), (1e6, 2.0, "b" * 40, 1)], [0], "FLOPs", "loss", "t"))
    for each in root.iter("circle"):
        assert 0 <= float(each.get("cx")) <= WIDTH and 0 <= float(each.get("cy")) <= HEIGHT


def test_colours_come_again_dashed():
    assert [color_class(index) for index in (0, 6, 7, 14)] == ["c0 d0", "c6 d0", "c0 d1", "c0 d2"]


def test_a_line_of_one_point_is_a_dot():
    svg = line_chart([Series("a", 0, [3], [1.0])], "tokens", "loss", (0, 2), "title")
    assert svg.count("<circle") == 1
    assert "<circle" not in line_chart([Series("a", 0, [3, 4], [1.0, 0.5])], "tokens", "loss", (0, 2), "title")
