"""Statistics against published tables and numbers worked out by hand."""

import math

import pytest

from comparison_stats import (
    Estimate,
    estimate,
    first_crossing,
    holm,
    kendall_tau,
    paired_difference,
    paired_ratio,
    smooth,
    t_probability_within,
    t_quantile,
)

# Two-sided critical values of Student's t, as printed in every textbook: degrees, 90%, 95%, 99%.
T_TABLE = [
    (1, 6.314, 12.706, 63.657),
    (2, 2.920, 4.303, 9.925),
    (3, 2.353, 3.182, 5.841),
    (4, 2.132, 2.776, 4.604),
    (5, 2.015, 2.571, 4.032),
    (9, 1.833, 2.262, 3.250),
    (10, 1.812, 2.228, 3.169),
    (29, 1.699, 2.045, 2.756),
    (120, 1.658, 1.980, 2.617),
]


@pytest.mark.parametrize("row", T_TABLE, ids=lambda row: f"df{row[0]}")
def test_t_quantiles_equal_the_published_table(row):
    degrees, *published = row
    for confidence, value in zip((0.90, 0.95, 0.99), published, strict=True):
        assert t_quantile(degrees, confidence) == pytest.approx(value, abs=6e-4)


def test_t_probability_in_closed_form():
    assert t_probability_within(1, 1) == pytest.approx(0.5)  # Cauchy: 2/pi atan(1)
    assert t_probability_within(2, 2) == pytest.approx(2 / math.sqrt(6))  # t / sqrt(2 + t^2)
    assert t_probability_within(0, 7) == 0
    assert t_quantile(10_000) == pytest.approx(1.96, abs=1e-3)  # the normal distribution


def test_t_quantile_refuses_a_sample_of_one():
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile(0)


def test_estimate_by_hand():
    result = estimate([1.0, 2.0, 3.0])  # standard deviation 1, so 4.303 / sqrt(3)
    assert (result.mean, result.spread, result.n) == (2.0, 1.0, 3)
    assert result.half_width == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)


def test_estimate_passes_over_what_is_missing():
    assert estimate([None, 2.0, math.nan]) == Estimate(mean=2.0, n=1)
    assert estimate([]) == Estimate(mean=None, n=0)


def test_paired_difference_uses_only_seeds_that_both_have():
    result = paired_difference({1: 2.0, 2: 3.0, 3: 9.0}, {1: 2.5, 2: 3.7, 4: 0.0})
    assert result.mean == pytest.approx(0.6)
    assert result.n == 2
    assert result.half_width == pytest.approx(12.706 * 0.1, abs=1e-3)  # differences 0.5 and 0.7


@pytest.mark.parametrize(
    "values, verdict",
    [([0.5, 0.7], "not separable"), ([0.5, 0.5001], "separable"), ([0.5], "one seed"), ([], "not paired"),
     ([0.0, 0.0], "not separable")],
    ids=["wide", "narrow", "one", "none", "no difference at all"],
)  # fmt: skip
def test_verdict(values, verdict):
    assert estimate(values).verdict == verdict


def test_first_crossing_interpolates():
    assert first_crossing([0, 100, 200], [4.0, 3.0, 2.0], 2.5) == 150
    assert first_crossing([0, 100, 200], [4.0, None, 2.0], 3.0) == 100
    assert first_crossing([10, 20], [1.0, 0.5], 2.0) == 10
    assert first_crossing([10, 20], [3.0, 2.5], 2.0) is None


def test_smooth_keeps_a_constant_and_passes_over_gaps():
    smoothed = smooth([2.0, None, 2.0, 2.0], span=10)
    assert smoothed[[0, 2, 3]] == pytest.approx([2.0, 2.0, 2.0])
    assert math.isnan(smoothed[1])
    assert smooth([4.0, 2.0], span=2)[1] == pytest.approx((4 * 0.25 + 2 * 0.5) / 0.75)


# -- many comparisons, and orders


@pytest.mark.parametrize("row", T_TABLE[:5], ids=lambda row: f"df{row[0]}")
def test_p_value_is_five_percent_at_the_published_quantile(row):
    degrees, _, t, _ = row
    n = degrees + 1
    values = [math.sqrt(n / 2) * sign for sign in (-1, 1)] + [0.0] * (n - 2)
    spread = estimate(values).spread
    shifted = estimate([value + t * spread / math.sqrt(n) for value in values])
    assert shifted.p_value == pytest.approx(0.05, abs=3e-5)


def test_p_value_of_the_extremes():
    assert estimate([0.0, 0.0]).p_value == 1
    assert estimate([0.1, 0.1]).p_value == 0
    assert estimate([0.1]).p_value is None


def test_holm_by_hand():
    # in order 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which may not fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_takes_back_a_difference_that_stands_alone():
    alone = estimate([0.010, 0.012, 0.015]).p_value
    assert alone < 0.05 < holm([alone, 0.2, 0.3, 0.4])[0]


def test_kendall_tau_by_hand():
    assert kendall_tau([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4, 5], [3, 4, 1, 2, 5]) == pytest.approx(0.2)  # 4 of 10 pairs disagree
    assert kendall_tau([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))  # tau-b: one tie in five
    assert kendall_tau([1, 1], [1, 2]) is None


def test_paired_ratio_averages_logarithms():
    ratio = paired_ratio({1: 1.0, 2: 4.0, 3: 9.0}, {1: 2.0, 2: 2.0, 4: 1.0})  # 2x and 0.5x cancel
    assert (ratio.n, ratio.mean) == (2, pytest.approx(0))
    assert paired_ratio({1: 2.0}, {1: None}).n == 0


def test_against_scipy():
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = [0.3, -0.1, 0.25, 0.4]
    assert estimate(values).p_value == pytest.approx(scipy.ttest_1samp(values, 0).pvalue)
    first, second = [3, 1, 2, 2, 5], [2, 1, 3, 4, 4]
    assert kendall_tau(first, second) == pytest.approx(scipy.kendalltau(first, second).statistic)
