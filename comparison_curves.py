"""Learning curves: runs held at a token count, what a loss costs, and whether an early order holds. NumPy only.

    runs, sentence = hold_at(runs, 100_000_000)        # every run at the same evaluation
    costs = costs_to_reach(configurations, target)     # tokens, FLOPs, hours and joules, by seed
    order = order_over_training(configurations)        # Kendall's tau against the final order

Everything here reads the evaluation rows of metrics.jsonl; training rows are noise of another kind.
"""

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np

from comparison_logs import OF_ONE_OBJECTIVE, prompt_score
from comparison_settings import number
from comparison_stats import estimate, first_crossing, kendall_tau

AXES = ("tokens", "FLOPs", "hours", "joules")  # what a curve can be drawn against and a loss can cost
# The column of an evaluation row that tells how a table's loss came about.
ROW_COLUMN = {
    "final_val_loss": "val_loss", "best_val_loss": "val_loss", "bits_per_byte": "bits_per_byte",
    "pseudo_perplexity": "pseudo_perplexity", "lm_loss": "lm_loss", "wp_loss": "wp_loss",
}  # fmt: skip


def curve(run, column):
    """{'loss', 'tokens', 'FLOPs', 'hours', 'joules': [...]}, a point for each evaluation with a finite loss.

    Args:
        column: a loss of the table, such as 'final_val_loss'. An axis that a row does not record is None there.
    """
    points = {name: [] for name in ("loss", *AXES)}
    flops_per_token = run.values["flops_per_token"]
    for row in run.evaluations:
        loss, tokens = number(row.get(ROW_COLUMN[column])), number(row.get("tokens_processed"))
        if loss is None or tokens is None:
            continue
        seconds = number(row.get("train_seconds"))
        points["loss"].append(loss)
        points["tokens"].append(tokens)
        points["FLOPs"].append(tokens * flops_per_token if flops_per_token else None)
        points["hours"].append(None if seconds is None else seconds / 3600)
        points["joules"].append(number(row.get("train_joules")))
    return points


# -- held at a token count


def hold_at(runs, tokens):
    """([Run, ...], sentence): the runs as they stood at the evaluation nearest to `tokens` that all of them have.

    A run that is still going counts where it has come that far, and stands by itself unranked where it has not.
    """
    counts = [evaluated_counts(run) for run in runs]
    finished = [each for run, each in zip(runs, counts, strict=True) if run.is_finished] or counts
    common = set.intersection(*finished)
    if not common:
        ends = "the final numbers stand instead"
        return runs, f"No evaluation at a token count that all runs share: {ends} of --at_tokens={tokens:,}."
    place = min(common, key=lambda count: (abs(count - tokens), count))
    held = [held_run(run, place) if place in each else run for run, each in zip(runs, counts, strict=True)]
    return held, held_sentence(tokens, place, runs, counts)


def evaluated_counts(run):
    """Token counts at which the run has the number that it is judged by."""
    column = ROW_COLUMN.get(run.ranked_by, "val_loss")
    rows = [row for row in run.evaluations if number(row.get(column)) is not None]
    return {number(row.get("tokens_processed")) for row in rows} - {None, 0}


def held_sentence(tokens, place, runs, counts):
    going = [run.name for run, each in zip(runs, counts, strict=True) if not run.is_finished and place in each]
    sentence = f"At {place:,} tokens"
    if place != tokens:
        sentence += f", the nearest count to the {tokens:,} asked for at which all runs were evaluated"
    return sentence + (f"; not finished yet: {', '.join(going)}." if going else ".")


def held_run(run, place):
    """A copy of the run that ends at the evaluation at `place` tokens."""
    rows = [row for row in run.evaluations if (number(row.get("tokens_processed")) or 0) <= place]
    row, seconds = rows[-1], number(rows[-1].get("train_seconds"))
    losses = [number(each.get("val_loss")) for each in rows]
    flops_per_token = run.values["flops_per_token"]
    names = ("bits_per_byte", "train_seconds", *OF_ONE_OBJECTIVE)
    values = run.values | {name: number(row.get(name)) for name in names} | {
        "final_val_loss": number(row.get("val_loss")),
        "stream_hash": row.get("stream_hash") or run.values["stream_hash"],  # older rows: that of the run's end
        "best_val_loss": min(loss for loss in losses if loss is not None),
        "tokens_processed": place,
        "steps": number(row.get("step")),
        "hours": None if seconds is None else seconds / 3600,
        "total_flops": place * flops_per_token if flops_per_token else None,
        "eval_seconds": None,
    }  # fmt: skip
    held = dataclasses.replace(run, values=values, status="finished", held_at=place)
    held.evaluations, held.log_disagreement = rows, run.log_disagreement
    held.prompts, values["prompt_score"] = prompt_score(run.folder, values["steps"])
    return held


# -- what a loss costs


@dataclass(eq=False)
class Costs:
    """What a configuration spent until it first reached a loss: {axis: {seed: amount}}, missing where it never did."""

    configuration: object
    by_axis: dict = field(default_factory=dict)

    def estimate(self, axis):
        return estimate(self.by_axis[axis].values())

    @property
    def n_reached(self):
        return sum(value is not None for value in self.by_axis["tokens"].values())


def worst_final_loss(configurations, column):
    """The highest final loss among all runs, rounded up to four digits: every curve gets there. None without curves."""
    finals = [curve(run, column)["loss"][-1:] for each in configurations for run in each.runs]
    finals = [final[0] for final in finals if final]
    return math.ceil(max(finals) * 1e4) / 1e4 if finals else None


def costs_to_reach(configurations, column, target):
    """[Costs, ...] of the configurations that have curves; one evaluation does not tell when a loss was reached."""
    found = []
    for each in configurations:
        curves = {run: curve(run, column) for run in each.runs}
        if not any(len(points["loss"]) > 1 for points in curves.values()):
            continue
        by_axis = {axis: each.over_seeds(lambda run, axis=axis, curves=curves: crossing(curves[run], axis, target))
                   for axis in AXES}  # fmt: skip
        found.append(Costs(each, by_axis))
    return found


def crossing(points, axis, target):
    return first_crossing(points[axis], points["loss"], target)


# -- does an early order hold


@dataclass(frozen=True)
class OrderOverTraining:
    """Kendall's tau of the order at each common evaluation against the last, and from where on it stays the same."""

    tokens: list
    taus: list  # None where everything ties
    settled_at: float  # the token count from which on every order is the final one

    def tau_after(self, part):
        """(tokens, tau) of the last evaluation within this part of the training, or the first one."""
        within = [pair for pair in zip(self.tokens, self.taus, strict=True) if pair[0] <= part * self.tokens[-1]]
        return within[-1] if within else (self.tokens[0], self.taus[0])


def order_over_training(configurations, column):
    """OrderOverTraining over the token counts at which all runs were evaluated; None with fewer than two of either."""
    curves = [[curve(run, column) for run in each.runs] for each in configurations]
    tables = [[dict(zip(each["tokens"], each["loss"], strict=True)) for each in runs] for runs in curves]
    if len(tables) < 2:
        return None
    common = set.intersection(*(set(table) for runs in tables for table in runs)) - {0}
    if len(common) < 2:
        return None
    tokens = sorted(common)
    scores = [np.array([np.mean([table[count] for table in runs]) for runs in tables]) for count in tokens]
    settled = tokens[-1]
    for count, each in zip(reversed(tokens), reversed(scores), strict=True):
        if not np.array_equal(np.argsort(each, kind="stable"), np.argsort(scores[-1], kind="stable")):
            break
        settled = count
    return OrderOverTraining(tokens, [kendall_tau(each, scores[-1]) for each in scores], settled)
