"""One number in groups, a panel for each way of grouping and a line for each run, side by side.

draw_groups({'gpt2': {'recall': {'seen': 1.2, 'new': 3.4}}, 'mamba': ...}, 'loss, nats per token', path)
"""

import math
import warnings

from comparison_evals import any_number, findings_of, groups_of, means_and_range
from comparison_plots import LINE_STYLES, MAX_CURVES, PALETTE, STYLE


def draw_groups(values, y_label, path):
    """Write a figure of {label: {panel: {group: number or None}}}; the first 12 labels are drawn.

    Panels stand in the order in which they first appear, groups as in `groups_of`. A number that is None is a gap; a
    line goes past a group that its label has nothing of.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = list(values)[:MAX_CURVES]
    panels = list(dict.fromkeys(panel for label in labels for panel in values[label]))
    columns = max(1, min(len(labels), 160 // (max(map(len, labels)) + 5)))
    height = 4.4 + 0.21 * math.ceil(len(labels) / columns)
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may hold letters that the font lacks
        figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), height), squeeze=False, sharey=True,
                                    layout="constrained")  # fmt: skip
        for axis, panel in zip(axes[0], panels, strict=True):
            handles = draw_panel(axis, {label: values[label].get(panel, {}) for label in labels})
            axis.set_title(panel)
        axes[0][0].set_ylabel(y_label)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def draw_loss_parts(ranking, path):
    """Write the parts of the loss of a ranking's configurations, means over seeds; [path], or [] without any."""
    found = next((each for each in findings_of(ranking) if each.kind == "loss"), None)
    if found is None or not found.panels:
        return []
    values = {}
    for each, _ in found.rows:
        values[f"{ranking.numbers[each]} {each.label}"] = {
            name: {group: mean_of(panel[each][group]) for group in panel.get(each, {})}
            for name, panel in found.panels.items()
        }  # fmt: skip
    draw_groups(values, f"loss, {found.unit}", path)
    return [path]


def mean_of(numbers):
    return means_and_range(numbers)[0] if any_number(numbers) else None


def draw_panel(axis, values):
    """Lines of {label: {group: number or None}} over the groups; returns their handles."""
    groups, handles = groups_of(values), []
    for index, each in enumerate(values.values()):
        there = [place for place, group in enumerate(groups) if group in each]
        y = [math.nan if each[groups[place]] is None else each[groups[place]] for place in there]
        style = LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)]
        handles += axis.plot(there, y, marker="o", markersize=4, color=PALETTE[index % len(PALETTE)],
                             linestyle=style)  # fmt: skip
    axis.set_xticks(range(len(groups)), groups, rotation=45, ha="right")
    return handles
