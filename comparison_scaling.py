"""Scaling: power laws with bootstrap intervals, iso-FLOP curves, Pareto fronts. NumPy only.

    fit = fit_power_law(n, losses)                 # L = E + A n^-alpha, or without E where there are few sizes
    for family in families(configurations): ...    # one architecture at several sizes

N counts all parameters, embeddings included (as in Hoffmann et al. 2022, arXiv:2203.15556); C is the training FLOPs
that a run's config.json counted. L(N) is fitted to final losses. L(C) is fitted to the lower envelope of the learning
curves over sizes, their approach 1: the lowest loss that any size reached for C FLOPs.
"""

import itertools
import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from comparison_curves import curve
from comparison_ranking import SAME_SIZE
from comparison_settings import key_of, number
from comparison_stats import kendall_tau

SIZE_FIELDS = {"n_layer", "n_head", "n_embd", "n_kv_head"}
MIN_SIZES = 3
SIZES_FOR_FLOOR = 4  # points below which E cannot be told from the rest
EXPONENTS = np.geomspace(0.005, 3, 800)
RESAMPLES = 400


# -- Pareto


def pareto_front(costs, losses):
    """Indices, by rising cost, of the points that no other beats in both cost and loss; None is never on it."""
    points = [(cost, loss, index) for index, (cost, loss) in enumerate(zip(costs, losses, strict=True))
              if cost is not None and loss is not None]  # fmt: skip
    front, lowest = [], np.inf
    for _, loss, index in sorted(points):
        if loss < lowest:
            front.append(index)
            lowest = loss
    return front


# -- power laws


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = floor + coefficient x^-exponent, with the bootstrap's 95% interval of the exponent."""

    exponent: float
    coefficient: float
    floor: float
    has_floor: bool  # whether the floor was fitted; else it is 0
    low: float | None = None
    high: float | None = None

    def __call__(self, x):
        return self.floor + self.coefficient * np.asarray(x, dtype=float) ** -self.exponent


def fit_power_law(x, losses, has_floor=None):
    """Least squares in the loss. For each exponent the rest is linear; the exponent is searched on a grid, and refined.

    Args:
        has_floor: whether E is fitted; None fits it from SIZES_FOR_FLOOR distinct x on.
    """
    x, losses = np.asarray(x, dtype=float), np.asarray(losses, dtype=float)
    if has_floor is None:
        has_floor = len(np.unique(x)) >= SIZES_FOR_FLOOR
    grid, weights = EXPONENTS, np.ones((1, len(x)))
    for _ in range(4):  # each round looks between the neighbours of the best, 400 times finer
        best = best_exponents(x, losses[None], weights, grid, has_floor)[0]
        place = int(np.searchsorted(grid, best))
        grid = np.linspace(grid[max(0, place - 1)], grid[min(len(grid) - 1, place + 1)], len(EXPONENTS))
    coefficient, floor, _ = linear_part(x, losses[None], weights, np.array([best]), has_floor)
    scale = np.exp(np.log(x).mean()) ** best
    return PowerLaw(float(best), float(coefficient[0, 0] * scale), float(floor[0, 0]), has_floor)


def best_exponents(x, losses, weights, grid, has_floor):
    """(R,) the exponent of least squared error for each of R weighted samples (R, n) over the same x."""
    return grid[linear_part(x, losses, weights, grid, has_floor)[2].argmin(axis=1)]


def linear_part(x, losses, weights, grid, has_floor):
    """(coefficient, floor, squared error), each (R, len(grid)): the linear fit of E + A u with u = (x / middle)^-a.

    A loss has no negative floor: where the free fit has one, E is 0.
    """
    u = (x / np.exp(np.log(x).mean()))[:, None] ** -grid  # (n, G)
    w = weights.sum(axis=1, keepdims=True)
    wy = (weights * losses).sum(axis=1, keepdims=True)
    wu, wuu, wuy = weights @ u, weights @ u**2, (weights * losses) @ u
    slope_alone = wuy / wuu
    slope, floor = slope_alone, np.zeros_like(wu)
    if has_floor:
        with np.errstate(divide="ignore", invalid="ignore"):
            free = (w * wuy - wu * wy) / (w * wuu - wu**2)
        free_floor = (wy - free * wu) / w
        is_free = np.isfinite(free) & (free_floor > 0)
        slope, floor = np.where(is_free, free, slope_alone), np.where(is_free, free_floor, 0.0)
    wyy = (weights * losses**2).sum(axis=1, keepdims=True)
    error = wyy - 2 * floor * wy - 2 * slope * wuy + floor**2 * w + 2 * floor * slope * wu + slope**2 * wuu
    return slope, floor, error


def with_interval(fit, exponents):
    """The fit with the 2.5% and 97.5% quantiles of its bootstrapped exponents."""
    low, high = np.quantile(exponents, [0.025, 0.975])
    return PowerLaw(fit.exponent, fit.coefficient, fit.floor, fit.has_floor, float(low), float(high))


# -- one architecture at several sizes


@dataclass(eq=False)
class Family:
    """Configurations of one architecture, smallest first; at each size the best one."""

    label: str
    members: list

    @property
    def sizes(self):
        return [parameters_of(each) for each in self.members]


def families(configurations):
    """[Family, ...] of configurations that have a loss and a size, one-size families included."""
    groups = defaultdict(dict)
    for each in configurations:  # in the order of the ranking, so that the first at a size is its best
        model = each.runs[0].model
        if parameters_of(each):
            rest = key_of({name: value for name, value in model.items() if name not in SIZE_FIELDS})
            groups[rest].setdefault(parameters_of(each), each)
    found = [Family("", [each for _, each in sorted(group.items(), key=lambda item: item[0])])
             for group in groups.values()]  # fmt: skip
    labels = [family_label(family, "arch_preset") for family in found]
    for family, label in zip(found, labels, strict=True):
        is_clear = label != "custom" and labels.count(label) == 1
        family.label = label if is_clear else family_label(family, None)
    return found


def family_label(family, field):
    """The preset's name, or the architecture's name without its size."""
    run = family.members[0].runs[0]
    if field is not None:
        return str(run.get("model_config", field, default="custom"))
    return re.sub(r"^(\d+[LHD]-)+", "", str(run.values["architecture"])) or family.members[0].label


def parameters_of(configuration):
    return configuration.runs[0].values["parameters"]


def loss_by_size(family, column, rng):
    """PowerLaw of the final loss against parameters, bootstrapped over seeds, or over sizes where seeds are single."""
    samples = [[value for value in each.by_seed(column).values() if value is not None] for each in family.members]
    x, y = np.array(family.sizes, dtype=float), np.array([np.mean(values) for values in samples])
    fit = fit_power_law(x, y)
    if min(map(len, samples)) > 1:
        draws = np.stack([resampled_means(values, rng) for values in samples], axis=1)
        weights = np.ones_like(draws)
    else:
        weights = resampled_sizes(len(x), 3 if fit.has_floor else 2, rng)
        draws = np.broadcast_to(y, weights.shape)
    return with_interval(fit, best_exponents(x, draws, weights, EXPONENTS, fit.has_floor))


def resampled_means(values, rng):
    values = np.array(values)
    return widened(values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1), values)


def widened(means, values):
    """Means of resamples, as far from the mean of the n values (n, ...) as those of new ones would be.

    A resample of n spreads by (n - 1) / n of the variance, which with three seeds is a third too little: intervals that
    say 95% would hold 88% of the time.
    """
    n, middle = len(values), values.mean(axis=0)
    return middle + math.sqrt(n / (n - 1)) * (means - middle)


def resampled_sizes(n, least, rng):
    """(RESAMPLES, n) counts of n sizes drawn with replacement, each draw with at least `least` different ones."""
    kept = np.empty((0, n))
    while len(kept) < RESAMPLES:
        counts = rng.multinomial(n, [1 / n] * n, size=RESAMPLES).astype(float)
        kept = np.concatenate([kept, counts[(counts > 0).sum(axis=1) >= least]])
    return kept[:RESAMPLES]


# -- against FLOPs


def loss_at_flops(run, column, flops):
    """The run's loss at each of these FLOPs, straight in the logarithms of both; NaN outside its curve."""
    points = curve(run, column)
    pairs = [(cost, loss) for cost, loss in zip(points["FLOPs"], points["loss"], strict=True) if cost and loss > 0]
    if len(pairs) < 2:
        return np.full(len(flops), np.nan)
    x, y = np.log(np.array(pairs)).T
    at = np.log(flops)
    inside = (at >= x[0] - 1e-9) & (at <= x[-1] + 1e-9)
    return np.where(inside, np.exp(np.interp(at, x, y)), np.nan)


def flops_range(family, column):
    """(lowest, highest) FLOPs that at least MIN_SIZES sizes have passed; None where there is no such stretch.

    The first fiftieth of each run is left out: there the loss falls from ln(vocabulary) and not by a power law.
    """
    spans = []
    for each in family.members:
        ends = [[cost for cost in curve(run, column)["FLOPs"] if cost] for run in each.runs]
        if all(len(costs) > 1 for costs in ends):
            last = min(costs[-1] for costs in ends)
            spans.append((max(last / 50, *(costs[0] for costs in ends)), last))
    if len(spans) < MIN_SIZES:
        return None
    lowest = sorted(first for first, _ in spans)[MIN_SIZES - 1]
    highest = sorted((last for _, last in spans), reverse=True)[MIN_SIZES - 1]
    return (lowest, highest) if highest > lowest else None


def loss_by_flops(family, column, rng):
    """(PowerLaw, FLOPs, envelope, sizes that are lowest somewhere); None where the curves do not overlap."""
    span = flops_range(family, column)
    if span is None:
        return None
    flops = np.geomspace(*span, 24)
    curves = [np.stack([loss_at_flops(run, column, flops) for run in each.runs]) for each in family.members]
    means = np.stack([each.mean(axis=0) for each in curves])
    if not np.isfinite(means).any(axis=0).all():
        return None
    envelope = np.nanmin(means, axis=0)
    fit = fit_power_law(flops, envelope)
    drawn = np.stack(list(resampled_envelopes(curves, rng)))
    exponents = best_exponents(flops, drawn, np.ones_like(drawn), EXPONENTS, fit.has_floor)
    return with_interval(fit, exponents), flops, envelope, len(set(np.nanargmin(means, axis=0)))


def resampled_envelopes(curves, rng):
    """Envelopes over curves whose seeds were drawn again, or whose sizes were where seeds are single."""
    has_seeds = min(map(len, curves)) > 1
    n_drawn = 0
    while n_drawn < RESAMPLES:
        if has_seeds:
            drawn = [widened(each[rng.integers(len(each), size=len(each))].mean(axis=0), each) for each in curves]
        else:
            drawn = [curves[index].mean(axis=0) for index in rng.integers(len(curves), size=len(curves))]
        drawn = np.stack(drawn)
        if np.isfinite(drawn).any(axis=0).all():
            n_drawn += 1
            yield np.nanmin(drawn, axis=0)


@dataclass(frozen=True)
class IsoFlop:
    """The losses of several sizes for the same FLOPs, and the size at the lowest point of the parabola through them."""

    flops: float
    sizes: list
    losses: list
    best_size: float | None  # None where the parabola has its lowest point outside the sizes tried


def iso_flops(family, column, n_budgets=4):
    """[IsoFlop, ...] at budgets that at least three sizes have passed (Hoffmann et al. 2022, approach 2)."""
    span = flops_range(family, column)
    if span is None:
        return []
    budgets = np.geomspace(*span, n_budgets)
    means = [np.mean([loss_at_flops(run, column, budgets) for run in each.runs], axis=0) for each in family.members]
    found = []
    for index, flops in enumerate(budgets):
        points = [(size, float(mean[index])) for size, mean in zip(family.sizes, means, strict=True)
                  if np.isfinite(mean[index])]  # fmt: skip
        if len(points) >= MIN_SIZES:
            sizes, losses = map(list, zip(*points, strict=True))
            found.append(IsoFlop(float(flops), sizes, losses, lowest_size(sizes, losses)))
    return found


def lowest_size(sizes, losses):
    """Where the parabola through (log size, loss) is lowest, when that is inside the sizes; else None."""
    logs = np.log(sizes)
    middle = logs.mean()
    square, slope, _ = np.polyfit(logs - middle, losses, 2)
    lowest = middle - slope / (2 * square) if square > 0 else np.inf
    return float(np.exp(lowest)) if logs.min() <= lowest <= logs.max() else None


# -- does an order hold from one size to the next


def tiers(found):
    """[{family: configuration}, ...] by size: a tier ends where the next configuration is a quarter larger."""
    members = [(parameters_of(each), family, each) for family in found for each in family.members]
    members.sort(key=lambda member: number(member[0]))
    result, before = [], None
    for size, family, each in members:
        if before is None or size > before * SAME_SIZE:
            result.append({})
        result[-1].setdefault(family, each)
        before = size
    return result


def order_across_sizes(configurations, column):
    """[(smaller tier, larger tier, families in both, tau), ...] for neighbouring tiers that share two families."""
    found = []
    levels = tiers(families(configurations))
    for small, large in itertools.pairwise(levels):
        shared = [family for family in small if family in large]
        if len(shared) > 1:
            scores = [[level[family].estimate(column).mean for family in shared] for level in (small, large)]
            found.append((small, large, shared, kendall_tau(*scores)))
    return found
