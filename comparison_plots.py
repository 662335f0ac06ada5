"""Draw a comparison: the loss curves against tokens, FLOPs and seconds.

    paths, problems = draw_curves(ranking, folder)     # matplotlib is imported here, and only when needed

The only reader of whole metrics.jsonl files, and only of the runs that are drawn.
"""

import math
import warnings
from pathlib import Path

import numpy as np

from comparison_logs import read_metrics, series
from comparison_ranking import cell, name_of, si
from comparison_stats import smooth

# Okabe and Ito's palette, which the colour-blind can tell apart; yellow is left out because it vanishes on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", (0, (5, 2)), (0, (1.2, 1.5)))
MAX_CURVES = 12
Y_AXES = (("validation_loss", "validation loss"), ("training_loss", "training loss, smoothed"))


def draw_curves(ranking, folder, prefix="", log_x=False):
    """Write validation_loss.png and training_loss.png, each against tokens, FLOPs and seconds.

    Returns:
        (paths, problems): what was written, and one line for each metrics.jsonl that could not be read in full.
    """
    curves, problems = {}, []
    for configuration in ranking.configurations[:MAX_CURVES]:
        for run in configuration.runs:
            rows, troubles = read_metrics(run.folder)
            problems += [f"{run.name}: {trouble}" for trouble in troubles]
            curves[run.name] = curves_of(run, rows)
    paths = []
    for quantity, label in Y_AXES:
        if any(curve[quantity]["loss"].size for curve in curves.values()):
            path = Path(folder) / f"{prefix}{quantity}.png"
            draw_figure(ranking, curves, quantity, label, path, log_x)
            paths.append(path)
    return paths, problems


def curves_of(run, rows):
    """{'validation_loss' | 'training_loss': {'loss', 'tokens', 'FLOPs', 'seconds'}} as arrays of equal length."""
    curves = {}
    for quantity, kind, column in (("validation_loss", "eval", "val_loss"), ("training_loss", "train", "loss")):
        values = series(rows, kind, column)
        tokens = as_array(series(rows, kind, "tokens_processed"))
        y = smooth(values) if kind == "train" else as_array(values)
        flops = tokens * (run.values["flops_per_token"] or np.nan)
        curves[quantity] = {
            "loss": y, "tokens": tokens, "FLOPs": flops, "seconds": as_array(series(rows, kind, "train_seconds")),
        }  # fmt: skip
    return curves


def as_array(values):
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def draw_figure(ranking, curves, quantity, label, path, log_x):
    """Three panels that share the loss axis, and one legend in the order of the ranking."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    places = ranking.places()[:MAX_CURVES]
    labels = [legend_label(ranking, *place) for place in places]
    columns = max(1, min(3, len(labels), 165 // (max(map(len, labels)) + 5)))
    height = 4.2 + 0.21 * math.ceil(len(labels) / columns)
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may hold letters that the font lacks
        figure, axes = plt.subplots(1, 3, figsize=(12, height), sharey=True, layout="constrained")
        figure.get_layout_engine().set(wspace=0.05)
        handles = draw_lines(axes, [each for _, each in places], curves, quantity)
        for axis, x_label in zip(axes, ("tokens", "FLOPs", time_unit(curves, quantity)[0]), strict=True):
            dress(axis, x_label, log_x)
        axes[0].set_ylabel(label)
        axes[0].set_ylim(*loss_limits([curve[quantity] for curve in curves.values()]))
        legend = figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
        for line in legend.get_lines():
            line.set(linewidth=2, alpha=1)
        figure.suptitle(title_of(ranking, label), x=0.01, ha="left", fontsize=12)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def title_of(ranking, label):
    hidden = len(ranking.configurations) > MAX_CURVES
    more = f", the best {MAX_CURVES} of {len(ranking.configurations)}" if hidden else ""
    return plain_text(f"{label.capitalize()}: {ranking.title}{more}")


STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333", "xtick.color": "#666666", "ytick.color": "#666666", "axes.grid": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "axes.axisbelow": True, "figure.facecolor": "white",
}  # fmt: skip


def draw_lines(axes, configurations, curves, quantity):
    """Every run on every axis. Returns one line for each configuration, for the legend."""
    divisor = time_unit(curves, quantity)[1]
    handles = []
    for index, configuration in enumerate(configurations):
        for run in configuration.runs:
            curve = curves[run.name][quantity]
            for axis, x_name, scale in zip(axes, ("tokens", "FLOPs", "seconds"), (1, 1, divisor), strict=True):
                line = draw_line(axis, curve[x_name] / scale, curve["loss"], index, len(configuration.runs) > 1)
        handles.append(line)
    return handles


def draw_line(axis, x, y, index, thin):
    """One run's curve; the seeds of a configuration share a colour and are drawn thinner."""
    color = PALETTE[index % len(PALETTE)]
    style = LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)]
    marker = "o" if len(y) <= 12 else None
    width, alpha = (1.1, 0.75) if thin else (1.8, 1.0)
    (line,) = axis.plot(x, y, color=color, linestyle=style, marker=marker, markersize=3, linewidth=width, alpha=alpha)
    return line


def dress(axis, x_label, log_x):
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_xlabel(x_label if x_label == "tokens" else f"training {x_label}")
    if log_x:
        axis.set_xscale("log")
    else:
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, x_label)))
    if not any(line.get_xydata().size and math.isfinite(line.get_xydata()[:, 0].max()) for line in axis.lines):
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="#666666")


def tick(value, x_label):
    """Tokens as 1.5M, FLOPs as 20T, times as they are."""
    text = f"{value:g}" if value < 1000 else si(value)
    if "." in text and text[-1].isalpha():
        text = text[:-1].rstrip("0").rstrip(".") + text[-1]
    return text.replace("G", "B") if x_label == "tokens" else text


def time_unit(curves, quantity):
    """Seconds up to ten minutes, minutes up to three hours, then hours."""
    last = [values[-1] for values in (curve[quantity]["seconds"] for curve in curves.values()) if values.size]
    longest = max((value for value in last if math.isfinite(value)), default=0)
    return ("hours", 3600) if longest > 3 * 3600 else ("minutes", 60) if longest > 600 else ("seconds", 1)


def loss_limits(curves):
    """From just below the lowest loss to where the typical run stood after a seventh of its tokens.

    The first steps fall from ln(vocabulary) and would squeeze what the comparison is about into a few pixels.
    """
    lows, early = [], []
    for curve in curves:
        there = np.isfinite(curve["loss"]) & np.isfinite(curve["tokens"])
        loss_values, tokens = curve["loss"][there], curve["tokens"][there]
        if loss_values.size:
            lows.append(loss_values.min())
            early.append(np.interp(tokens[-1] / 7, tokens, loss_values))
    if not lows:
        return None, None
    bottom, top = min(lows), max(float(np.median(early)), max(lows))
    margin = 0.05 * (top - bottom) or 0.1
    return bottom - margin, top + margin


def legend_label(ranking, place, configuration):
    name = name_of(configuration)
    name = name if len(name) <= 60 else f"{name[:34]}...{name[-23:]}"
    return plain_text(f"{place}  {name}  {cell(configuration, ranking.loss_column)}")


def plain_text(text):
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
