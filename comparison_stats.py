"""Statistics of a comparison: intervals over seeds, differences paired by seed, ties called ties. NumPy only.

Pure functions. A configuration is everything but the seed; its runs are one sample. Intervals are Student's t at 95%,
because seeds are few: with two seeds the factor is 12.7, with three 4.3, with five 2.8.
"""

import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


# -- Student's t, exactly


def t_probability_within(t, degrees):
    """P(|T| < t) for Student's t with a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even): exact, and no special functions.
    """
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    is_odd = degrees % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for k in range(degrees // 2):
        total += term
        # odd: cos, then x 2/3 cos^2, 4/5 cos^2, ...; even: 1, then x 1/2 cos^2, 3/4 cos^2, ...
        term *= cosine**2 * (2 * k + 1 + is_odd) / (2 * k + 2 + is_odd)
    return 2 / math.pi * (theta + sine * total) if is_odd else sine * total


@functools.cache
def t_quantile(degrees, confidence=CONFIDENCE):
    """The t for which |T| < t with this probability, e.g. 12.706 for one degree of freedom and 95%."""
    if degrees < 1:
        raise ValueError(f"degrees={degrees} must be at least 1")
    low, high = 0.0, 1.0
    while t_probability_within(high, degrees) < confidence:
        low, high = high, high * 2
    for _ in range(60):  # halving 60 times is past the last bit of a float
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability_within(middle, degrees) < confidence else (low, middle)
    return high


# -- samples over seeds


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds. `half_width` of its 95% interval and `spread` (standard deviation) need two of them."""

    mean: float | None
    half_width: float | None = None
    spread: float | None = None
    n: int = 0

    @property
    def verdict(self):
        """Whether zero is ruled out, when this is the estimate of a difference."""
        if self.n == 0:
            return "not paired"
        if self.half_width is None:
            return "one seed"
        return "separable" if abs(self.mean) > self.half_width else "not separable"


def estimate(values, confidence=CONFIDENCE):
    """Mean, t interval and standard deviation of the values that are there (None and NaN are not)."""
    kept = np.array([value for value in values if value is not None and math.isfinite(value)], dtype=float)
    n = len(kept)
    if n < 2:
        return Estimate(mean=float(kept[0]) if n else None, n=n)
    spread = float(kept.std(ddof=1))
    return Estimate(float(kept.mean()), t_quantile(n - 1, confidence) * spread / math.sqrt(n), spread, n)


def paired_difference(first, second, confidence=CONFIDENCE):
    """Estimate of second - first from two dicts {seed: value}, over the seeds that both have."""
    seeds = [seed for seed in first if seed in second]
    return estimate([difference(first[seed], second[seed]) for seed in seeds], confidence)


def difference(first, second):
    return None if first is None or second is None else second - first


# -- configurations


@dataclass(eq=False)
class Configuration:
    """Runs that differ in their seed alone. One run is a configuration too."""

    label: str
    runs: list

    @property
    def is_finished(self):
        return self.runs[0].is_finished  # a run that did not finish stands by itself

    @property
    def seeds(self):
        """[seed, ...] in the order of the runs, each once."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def by_seed(self, column):
        """{seed: value}; a seed that was run twice counts once, by its mean."""
        values = defaultdict(list)
        for run in self.runs:
            values[run.seed].append(run.values.get(column))
        return {seed: estimate(each).mean for seed, each in values.items()}

    def estimate(self, column):
        return estimate(self.by_seed(column).values())

    def stream(self):
        """{seed: stream hash, or None where runs of the seed disagree}: only equal hashes are paired."""
        hashes = defaultdict(set)
        for run in self.runs:
            hashes[run.seed].add(run.values.get("stream_hash"))
        return {seed: each.copy().pop() if len(each) == 1 else None for seed, each in hashes.items()}


def group_configurations(runs):
    """[Configuration, ...] in the order in which each first appears."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.configuration_key].append(run)
    configurations = [Configuration(label_of(group), group) for group in groups.values()]
    taken = defaultdict(list)
    for configuration in configurations:
        taken[configuration.label].append(configuration)
    for same in taken.values():
        for configuration in same if len(same) > 1 else []:
            configuration.label = plain_label(configuration.runs)
    return configurations


def label_of(runs):
    """The name that the runs share once their seeds are cut out of it, else the first name and how many more."""
    if len(runs) == 1:
        return runs[0].name
    names = {without_seed(run.name, run.seed) for run in runs}
    return names.pop() if len(names) == 1 else plain_label(runs)


def plain_label(runs):
    return runs[0].name + (f" +{len(runs) - 1}" if len(runs) > 1 else "")


def without_seed(name, seed):
    """'llama-s1338' -> 'llama' when the seed is 1338; llama_seed=1338 and llama-1338-small lose theirs too."""
    return re.sub(rf"(^|[-_.])(s|seed)?[-_=]?{seed}(?=$|[-_.])", "", name, count=1).strip("-_.") or name


def paired(first, second, column):
    """Estimate of second - first for two configurations, over seeds whose batch streams were the same."""
    streams, others = first.stream(), second.stream()
    same = {seed for seed in streams if streams[seed] is not None and streams[seed] == others.get(seed)}
    values = {seed: value for seed, value in first.by_seed(column).items() if seed in same}
    return paired_difference(values, second.by_seed(column))


# -- curves


def first_crossing(x, loss, target):
    """The x at which a curve first reaches `target` from above, between two points on the straight line; else None."""
    points = [(a, b) for a, b in zip(x, loss, strict=True) if a is not None and b is not None]
    for index, (here, value) in enumerate(points):
        if value <= target:
            if index == 0:
                return here
            before, above = points[index - 1]
            return before + (here - before) * (above - target) / (above - value)
    return None


def smooth(values, span=None):
    """Exponential moving average with bias correction; `span` is its length in points (a fiftieth of them).

    Missing values stay missing and are passed over, so that one skipped step does not erase the rest of a curve.
    """
    decay = 1 - 1 / max(1.0, len(values) / 50 if span is None else span)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if value is None or not math.isfinite(value):
            smoothed.append(math.nan)
            continue
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return np.array(smoothed)
