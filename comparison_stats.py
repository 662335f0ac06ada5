"""Statistics of a comparison: intervals over seeds, differences paired by seed, ties called ties. NumPy only.

Pure functions. A configuration is everything but the seed; its runs are one sample. Intervals are Student's t at 95%,
because seeds are few: with two seeds the factor is 12.7, with three 4.3, with five 2.8. Where several differences are
judged at once, their p-values are corrected with Holm's method, and a tie is what does not survive it.
"""

import functools
import math
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

    @property
    def p_value(self):
        """Two-sided, of the hypothesis that the mean is zero; None below two seeds."""
        if self.half_width is None:
            return None
        if not self.spread:
            return 1.0 if self.mean == 0 else 0.0
        return 1 - t_probability_within(abs(self.mean) * math.sqrt(self.n) / self.spread, self.n - 1)


def estimate(values, confidence=CONFIDENCE):
    """Mean, t interval and standard deviation of the values that are there (None and NaN are not)."""
    kept = [value for value in values if value is not None and math.isfinite(value)]
    n = len(kept)
    if n == 0:
        return Estimate(mean=None)
    mean = math.fsum(kept) / n
    if n == 1:
        return Estimate(mean=mean, n=1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in kept) / (n - 1))
    return Estimate(mean, t_quantile(n - 1, confidence) * spread / math.sqrt(n), spread, n)


def paired_difference(first, second, confidence=CONFIDENCE):
    """Estimate of second - first from two dicts {seed: value}, over the seeds that both have."""
    seeds = [seed for seed in first if seed in second]
    return estimate([difference(first[seed], second[seed]) for seed in seeds], confidence)


def difference(first, second):
    return None if first is None or second is None else second - first


def paired_ratio(first, second):
    """Estimate of log(second / first) from two dicts {seed: positive value}, over the seeds that both have.

    Ratios of costs are averaged as logarithms, so that 2x and 0.5x cancel; `math.exp` of the mean is the ratio.
    """
    seeds = [seed for seed in first if seed in second and first[seed] and second[seed]]
    return estimate([math.log(second[seed] / first[seed]) for seed in seeds])


# -- many comparisons, and orders


def holm(p_values):
    """Holm's step-down adjustment (Holm 1979, Scandinavian Journal of Statistics 6:65): adjusted p-values, in order.

    The smallest of m is multiplied by m, the next by m - 1, and so on, never falling below the one before. Rejecting
    what stays under 0.05 keeps the chance of any false claim among all m under 5%.
    """
    m, adjusted, before = len(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(m), key=p_values.__getitem__)):
        before = max(before, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = before
    return adjusted


def kendall_tau(first, second):
    """Kendall's tau-b between two lists of scores of the same things: 1 the same order, -1 reversed, None undefined.

    Kendall 1945, The treatment of ties in ranking problems: (concordant - discordant) / sqrt(untied x untied).
    """
    signs = [np.sign(np.subtract.outer(scores, scores)) for scores in (np.asarray(first), np.asarray(second))]
    untied = [np.abs(each).sum() for each in signs]
    return float((signs[0] * signs[1]).sum() / math.sqrt(untied[0] * untied[1])) if all(untied) else None


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
