"""comparison_groups.py: panels and groups in order, a gap where a number is missing, none where a run has no group."""

import math

from matplotlib import pyplot as plt

from comparison_groups import draw_groups, draw_panel


def test_groups_stand_in_order_and_a_missing_number_is_a_gap():
    figure, axis = plt.subplots()
    handles = draw_panel(axis, {"a": {"1x": 3.0, "2x": 2.0}, "b": {"1x": 4.0, "2x": None, "8x": 1.0}})
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1x", "2x", "8x"]
    first, second = (handle.get_ydata() for handle in handles)
    assert list(first) == [3.0, 2.0]
    assert (second[0], second[2]) == (4.0, 1.0) and math.isnan(second[1])
    assert handles[0].get_color() != handles[1].get_color()
    plt.close(figure)


def test_a_figure_of_many_runs_with_unlike_panels(tmp_path):
    values = {f"run{index}": {"recall": {"seen": index, "new": 2.0}} for index in range(14)}
    values["run1"]["context"] = {"1x": 3.0}
    draw_groups(values, "nats", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
