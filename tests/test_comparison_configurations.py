"""Which runs are one configuration, and which of their seeds are paired."""

import pytest

from comparison_configurations import Configuration, group_configurations, paired, without_seed
from comparison_helpers import make_run
from comparison_runs import find_runs
from comparison_stats import Estimate


@pytest.mark.parametrize(
    "name, seed, expected",
    [
        ("llama-s1338", 1338, "llama"),
        ("llama_seed=1338", 1338, "llama"),
        ("llama-1338-small", 1338, "llama-small"),
        ("4L-llama-4", 4, "4L-llama"),
        ("llama-1-s1", 1, "llama-1"),
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
