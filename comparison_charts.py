"""The charts of report.html: what is drawn of one ranking, as SVG texts.

    svgs, absent = curve_charts(ranking, analysis)     # one for each axis that is recorded, and the axes that are not

comparison_svg.py knows how to draw; this file knows what.
"""

import math
import re

import numpy as np

from comparison_curves import AXES, curve
from comparison_evals import any_number, groups_of, means_and_range
from comparison_plots import loss_limits
from comparison_ranking import WHAT
from comparison_svg import (
    Series,
    group_chart,
    interval_chart,
    line_chart,
    padded,
    plain_number,
    scatter_chart,
    tokens_number,
)

MAX_LINES = 10  # configurations in one chart
MAX_POINTS = 40
FINAL = "final_val_loss"
AXIS_TEXT = {"tokens": tokens_number}
UNITS = ("bytes", "KiB", "MiB", "GiB")


def short_names(configurations):
    """{configuration: label}, without the words that all labels begin or end with.

    The '-1.1M' of a single size says nothing, and takes the room of what tells the labels apart.
    """
    words = [re.split(r"(?<=[-_/])(?=.)", each.label) for each in configurations]
    kept = [[re.sub(r"[-_/]$", "", word) for word in each] for each in words]
    first = shared_start(kept)
    last = shared_start([each[first:][::-1] for each in kept])
    return {each: "".join(pieces[first : len(pieces) - last]).rstrip("-_/") or each.label
            for each, pieces in zip(configurations, words, strict=True)}  # fmt: skip


def shared_start(lists):
    """How many items all lists begin with, at least one item of each left over."""
    if len(lists) < 2:
        return 0
    most = min(map(len, lists)) - 1
    return next((index for index in range(most) if len({each[index] for each in lists}) > 1), max(0, most))


def chart_names(ranking):
    """{configuration: '1 llama'}: the number that it has in the table, and its short name."""
    short = short_names(ranking.configurations)
    return {each: f"{ranking.numbers[each].lstrip('#')} {short[each]}" if each in ranking.ranked else short[each]
            for each in ranking.configurations}  # fmt: skip


def loss_name(ranking, column=None):
    """'validation loss', of a point on a curve."""
    return WHAT[column or ranking.loss_column].replace("final ", "").replace("best ", "")


def drawn_column(ranking):
    """The loss to draw curves of: the ranking's, or the validation loss where that was scored at the end alone."""
    runs = [run for each in ranking.configurations[:MAX_LINES] for run in each.runs]
    lengths = {name: max(len(curve(run, name)["loss"]) for run in runs) for name in (ranking.loss_column, FINAL)}
    return FINAL if lengths[ranking.loss_column] < 2 <= lengths[FINAL] else ranking.loss_column


# -- learning curves


def curve_charts(ranking, analysis, log_x=False):
    """([svg, ...], [axis that no run records, ...]); ([], []) when there are no curves."""
    configurations, column = ranking.configurations[:MAX_LINES], drawn_column(ranking)
    target = analysis.target if column == ranking.loss_column else None
    curves = {run: curve(run, column) for each in configurations for run in each.runs}
    if not any(points["loss"] for points in curves.values()):
        return [], []
    limits, charts, absent, names = limits_of(curves, target), [], [], chart_names(ranking)
    for axis in AXES:
        lines = [line_of(names[each], each, index, curves, axis) for index, each in enumerate(configurations)]
        lines = [line for line in lines if line.x]
        if not lines:
            absent.append(axis)
            continue
        x_label = axis if axis == "tokens" else f"training {axis}"
        title = f"{loss_name(ranking, column)} against {axis}".capitalize()
        x_text = AXIS_TEXT.get(axis, plain_number)
        charts.append(line_chart(lines, x_label, loss_name(ranking, column), limits, title, log_x, x_text, target))
    return charts, absent


def limits_of(curves, target):
    """The y limits of all curves, with the target inside."""
    arrays = [{name: np.array(points[name], dtype=float) for name in ("loss", "tokens")} for points in curves.values()]
    low, high = loss_limits(arrays)
    return (low, high) if target is None else (min(low, target), max(high, target))


def line_of(name, configuration, index, curves, axis):
    """The mean over a configuration's runs at the token counts that all of them were evaluated at, and their range."""
    tables = [{tokens: (x, loss) for tokens, x, loss in zip(points["tokens"], points[axis], points["loss"], strict=True)
               if x is not None} for points in (curves[run] for run in configuration.runs)]  # fmt: skip
    line = Series(name, index, [], [])
    for tokens in sorted(set.intersection(*map(set, tables))):
        xs, losses = zip(*(each[tokens] for each in tables), strict=True)
        line.x.append(math.fsum(xs) / len(xs))
        line.y.append(math.fsum(losses) / len(losses))
        line.low.append(min(losses))
        line.high.append(max(losses))
    return line


# -- what evaluate.py found


def eval_charts(ranking, found):
    """[svg, ...], one for each panel of an EvalFindings: a line for each configuration over the panel's groups."""
    return [eval_chart(ranking, found, name, panel) for name, panel in found.panels.items()]


def eval_chart(ranking, found, name, panel):
    groups, lines, names = groups_of(panel), [], chart_names(ranking)
    for index, each in enumerate(ranking.configurations[:MAX_LINES]):
        there = {group: values for group, values in panel.get(each, {}).items() if any_number(values)}
        line = Series(names[each], index, [], [])
        for group in (group for group in groups if group in there):
            mean, low, high = means_and_range(there[group])
            line.x.append(groups.index(group))
            line.y.append(mean)
            line.low.append(low)
            line.high.append(high)
        line.dots = list(zip(line.x, line.y, strict=True))
        lines += [line] if there else []
    low, high = padded([value for line in lines for value in (*line.low, *line.high)])
    if found.unit == "share":
        low, high = max(0.0, low), min(1.0, high)
    return group_chart(lines, groups, name, found.unit, (low, high), f"{found.title}: {name}")


# -- differences, orders, fronts


def difference_charts(ranking):
    """[svg] of the intervals against the best, of the rows that a claim can be made about."""
    best, rows, names = ranking.best, [], chart_names(ranking)
    for color, each in enumerate(ranking.ranked[: MAX_LINES + 1]):
        pair = ranking.pair(best, each) if each is not best else None
        if pair is not None and pair.difference.n and not pair.voids:
            pair = pair if pair.second is each else pair.reversed()
            rows.append((names[each], pair.difference.mean, pair.difference.half_width, color))
    title = f"Difference from {ranking.numbers[best]} {best.label}"
    x_label = f"{WHAT[ranking.loss_column]}, minus that of {ranking.numbers[best]}"
    return [interval_chart(rows, x_label, title)] if rows else []


def order_charts(order):
    """[svg] of Kendall's tau over training."""
    known = [(tokens, tau) for tokens, tau in zip(order.tokens, order.taus, strict=True) if tau is not None]
    line = Series("agreement", 0, [tokens for tokens, _ in known], [tau for _, tau in known])
    title = "Kendall's tau with the final order"
    return [line_chart([line], "tokens", title, (-1.05, 1.05), title, x_text=tokens_number)] if known else []


def pareto_charts(ranking, analysis):
    """[svg, ...], one for each cost that can be held against each other."""
    charts, color, names = [], {each: index for index, each in enumerate(ranking.ranked)}, chart_names(ranking)
    for front in analysis.fronts:
        drawn = [point for point in front.points if point[0] > 0][:MAX_POINTS]
        if front.why_not or not drawn:
            continue
        unit, size = unit_of(front.column, [cost for cost, _, _ in drawn])
        points = [(cost / size, loss, names[each], color[each]) for cost, loss, each in drawn]
        on_it = [index for index, (_, _, each) in enumerate(drawn) if each in front.members]
        on_it.sort(key=lambda index: points[index][0])
        title = f"{loss_name(ranking)} against {front.title}".capitalize()
        charts.append(scatter_chart(points, on_it, front.title + unit, loss_name(ranking), title))
    return charts


def unit_of(column, values):
    """(', MiB', 2**20) for bytes, in the largest unit that leaves the largest value above one; ('', 1) for the rest."""
    if not column.endswith("_bytes"):
        return "", 1
    power = min(3, max(0, int(math.log2(max(values))) // 10))
    return f", {UNITS[power]}", 2 ** (10 * power)


# -- scaling


def scaling_charts(laws):
    """[svg, ...]: the fitted laws of all families, then the iso-FLOP curves of each."""
    return [law_chart(laws)] + [iso_chart(each) for each in laws if each.iso_flops]


def law_chart(laws):
    """Losses by size as dots, each family with its fitted line."""
    lines = []
    for index, each in enumerate(laws):
        x = np.geomspace(each.family.sizes[0], each.family.sizes[-1], 30)
        line = Series(each.family.label, index, x.tolist(), each.by_size(x).tolist())
        line.dots = list(zip(each.family.sizes, each.losses, strict=True))
        lines.append(line)
    values = [value for line in lines for value in line.y] + [loss for each in laws for loss in each.losses]
    title = "Loss by parameters, fitted"
    return line_chart(lines, "parameters", "final loss", padded(values), title, True, tokens_number)


def iso_chart(laws):
    """The losses of several sizes, a line for each FLOPs budget."""
    lines = []
    for index, iso in enumerate(laws.iso_flops):
        dots = list(zip(iso.sizes, iso.losses, strict=True))
        lines.append(Series(f"{plain_number(iso.flops)} FLOPs", index, iso.sizes, iso.losses, dots=dots))
    values = [loss for line in lines for loss in line.y]
    title = f"{laws.family.label}: same FLOPs, other sizes"
    return line_chart(lines, "parameters", "loss", padded(values), title, True, tokens_number)
