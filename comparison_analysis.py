"""Work out everything about one ranking that its learning curves and sizes tell.

    analysis = analyse(ranking, to_loss=3.5)

What is in it is said by comparison_words.py and drawn by comparison_html.py.
"""

from dataclasses import dataclass

import numpy as np

from comparison_audit import LOSS, SPEED
from comparison_configurations import shared_seeds
from comparison_curves import AXES, costs_to_reach, order_over_training, worst_final_loss
from comparison_ranking import value_of
from comparison_scaling import (
    MIN_SIZES,
    Family,
    families,
    iso_flops,
    loss_by_flops,
    loss_by_size,
    order_across_sizes,
    pareto_front,
)
from comparison_stats import paired_ratio

# What a loss can be bought with: title, column of the runs, and whether machines decide it.
PARETO_AXES = (
    ("training FLOPs", "total_flops", False),
    ("training hours", "hours", True),
    ("peak memory", "peak_memory_bytes", True),
    ("state bytes", "state_bytes", False),
)


@dataclass(eq=False)
class Front:
    """One Pareto front: every point, and who is on it; or the reason why it cannot be drawn."""

    title: str
    column: str
    points: list  # [(cost, loss, configuration), ...]
    members: list
    why_not: str = ""


@dataclass(eq=False)
class Laws:
    """What the sizes of one family tell."""

    family: Family
    by_size: object  # PowerLaw
    by_flops: tuple | None  # as loss_by_flops returns it
    iso_flops: list
    losses: list  # of the members, in the order of their sizes


@dataclass(eq=False)
class Analysis:
    """The costs, orders, fronts and laws of one ranking."""

    target: float | None  # the loss that costs are about
    target_reason: str
    costs: list  # [Costs, ...] in the order of the ranking
    axes: list  # those of AXES that some run records
    order: object  # OrderOverTraining or None
    size_orders: list
    fronts: list
    laws: list
    reference: object = None  # the Costs of the best


def analyse(ranking, to_loss=None):
    """Analysis of one ranking. `to_loss` defaults to a loss that every run reached."""
    column, ranked = ranking.loss_column, ranking.ranked
    target = worst_final_loss(ranked, column) if to_loss is None else to_loss
    reason = "the highest final loss of any run" if to_loss is None else "as asked for"
    costs = costs_to_reach(ranked, column, target) if target is not None else []
    axes = [axis for axis in AXES if any(each.estimate(axis).n for each in costs)]
    reference = next((each for each in costs if each.configuration is ranking.best), None)
    order, fronts = order_over_training(ranked, column), pareto_fronts(ranking)
    size_orders = order_across_sizes(ranked, column)
    return Analysis(target, reason, costs, axes, order, size_orders, fronts, scaling_laws(ranked, column), reference)


def ratio_to(ranking, costs, reference, axis):
    """(Estimate of the log ratio of costs to those of `reference`, ''), or (None, why there is none)."""
    one, other = costs.configuration, reference.configuration
    claims = (LOSS, SPEED) if axis in ("hours", "joules") else (LOSS,)
    reasons = dict.fromkeys(why for claim in claims for why in ranking.voids.between(one.runs, other.runs, claim))
    if reasons:
        return None, f"no ratio: {', '.join(reasons)}"
    if not all(each.n_reached == len(each.configuration.seeds) for each in (costs, reference)):
        return None, "no ratio: not every seed reached it"  # those that did are the lucky ones
    seeds = shared_seeds(one, other)
    first = {seed: value for seed, value in reference.by_axis[axis].items() if seed in seeds}
    ratio = paired_ratio(first, costs.by_axis[axis])
    return (ratio, "") if ratio.n else (None, "")


def pareto_fronts(ranking):
    """[Front, ...] of the loss against each cost that is recorded for at least two configurations."""
    fronts = []
    for title, column, is_of_machine in PARETO_AXES:
        points = [(mean_of(each, column), value_of(each, ranking.loss_column), each) for each in ranking.ranked]
        points = [point for point in points if point[0] is not None and point[1] is not None]
        if len(points) < 2:
            continue
        why_not = machine_differences(ranking) if is_of_machine else ""
        on_it = [] if why_not else pareto_front([cost for cost, _, _ in points], [loss for _, loss, _ in points])
        fronts.append(Front(title, column, points, [points[index][2] for index in on_it], why_not))
    return fronts


def mean_of(configuration, column):
    return configuration.estimate(column).mean


def machine_differences(ranking):
    """Why hours and memory cannot be held against each other in this ranking; '' when they can."""
    others = [each for each in ranking.ranked if each is not ranking.best]
    reasons = {why: None for each in others for why in ranking.voids.between(ranking.best.runs, each.runs, SPEED)}
    return f"not comparable: {', '.join(reasons)}" if reasons else ""


def scaling_laws(ranked, column):
    """[Laws, ...] of the families with at least MIN_SIZES sizes. The bootstrap repeats exactly: its seed is fixed."""
    laws = []
    for family in families(ranked):
        if len(family.members) >= MIN_SIZES:
            rng = np.random.default_rng(0)
            by_size, by_flops = loss_by_size(family, column, rng), loss_by_flops(family, column, rng)
            losses = [value_of(each, column) for each in family.members]
            laws.append(Laws(family, by_size, by_flops, iso_flops(family, column), losses))
    return laws
