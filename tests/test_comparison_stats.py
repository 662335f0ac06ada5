"""Statistics against published tables and numbers worked out by hand."""

import math

import pytest

from comparison_helpers import make_run
from comparison_runs import find_runs
from comparison_stats import (
    Configuration,
    Estimate,
    estimate,
    first_crossing,
    group_configurations,
    paired,
    paired_difference,
    smooth,
    t_probability_within,
    t_quantile,
    without_seed,
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


@pytest.mark.parametrize(
    "name, seed, expected",
    [
        ("llama-s1338", 1338, "llama"),
        ("llama_seed=1338", 1338, "llama"),
        ("llama-1338-small", 1338, "llama-small"),
        ("4L-llama-4", 4, "4L-llama"),
        ("llama-13", 1338, "llama-13"),
        ("1338", 1338, "1338"),
    ],
)
def test_without_seed(name, seed, expected):
    assert without_seed(name, seed) == expected


def runs_in(folder):
    return find_runs(folder)[0]


def test_runs_that_differ_in_their_seed_are_one_configuration(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, f"llama-s{seed}", {"final_val_loss": 2.0 + seed / 10}, seed=seed, log_interval=seed)
    make_run(tmp_path, "gpt2", seed=1, normalization="layernorm")
    configurations = group_configurations(runs_in(tmp_path))
    assert sorted((each.label, len(each.runs)) for each in configurations) == [("gpt2", 1), ("llama", 3)]
    llama = next(each for each in configurations if each.label == "llama")
    assert llama.estimate("final_val_loss").mean == pytest.approx(2.2)


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 3e-4}, {"n_layer": 3}, {"resolved__max_iters": 200}, {"resolved__dtype": "bfloat16"},
     {"model_config__part_options": {"rope_theta": 5e5}}, {"dataset__fingerprint": "other"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_whatever_else_differs_makes_another_configuration(tmp_path, change):
    make_run(tmp_path, "a", seed=1)
    make_run(tmp_path, "b", seed=2, **change)
    assert len(group_configurations(runs_in(tmp_path))) == 2


def test_a_run_that_did_not_finish_is_not_averaged_in(tmp_path):
    make_run(tmp_path, "a", seed=1)
    make_run(tmp_path, "b", {"status": "interrupted"}, seed=2)
    assert len(group_configurations(runs_in(tmp_path))) == 2


def test_one_seed_run_twice_counts_once(tmp_path):
    for name, loss, seed in (("a", 2.0, 1), ("b", 2.2, 1), ("c", 3.0, 2)):
        make_run(tmp_path, name, {"final_val_loss": loss}, seed=seed)
    (configuration,) = group_configurations(runs_in(tmp_path))
    result = configuration.estimate("final_val_loss")
    assert (result.n, result.mean) == (2, pytest.approx((2.1 + 3.0) / 2))
    assert configuration.label == "a +2"


def test_runs_are_paired_only_when_their_streams_are_equal(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, f"a{seed}", {"final_val_loss": 2.0}, seed=seed)
        stream = {"stream_hash": "other"} if seed == 2 else {}
        make_run(tmp_path, f"b{seed}", {"final_val_loss": 2.5, **stream}, seed=seed, n_layer=3)
    runs = {run.name: run for run in runs_in(tmp_path)}
    first = Configuration("a", [runs["a1"], runs["a2"]])
    second = Configuration("b", [runs["b1"], runs["b2"]])
    assert paired(first, second, "final_val_loss") == Estimate(mean=0.5, n=1)


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
