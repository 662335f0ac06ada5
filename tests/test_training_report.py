"""The report at start: numbers for people, and totals that add up."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import training_report
from configurator import Settings
from model_builder import ConfigurableGPT
from model_flops import HardwarePeak, flops_per_token
from training_config import TrainConfig
from training_place import Place
from training_report import architecture_tree, human_bytes, human_count, human_seconds, startup_report


@pytest.mark.parametrize("n, text", [
    (0, "0"), (7, "7"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (999_499, "999k"), (1_234_567, "1.23M"),
    (124_439_808, "124M"), (1.5e9, "1.5G"), (3e12, "3T"), (6.02e15, "6.02P"), (0.5, "0.5"), (999_999, "1M"),
    (-1500, "-1.5k"), (2.5e19, "25E"), (3e21, "3Z"),
])  # fmt: skip
def test_counts(n, text):
    assert human_count(n) == text


@pytest.mark.parametrize("n, text", [
    (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (1023 * 2**20, "1023 MiB"),
    (999.7 * 1024, "1000 KiB"), (5.5 * 2**30, "5.5 GiB"), (2**40, "1 TiB"),
])  # fmt: skip
def test_bytes(n, text):
    assert human_bytes(n) == text


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (192, "3m12s"), (3599.7, "1h00m"),
    (7500, "2h05m"), (4 * 86400 + 7 * 3600, "4d07h"),
])  # fmt: skip
def test_seconds(seconds, text):
    assert human_seconds(seconds) == text


def number(text):
    """What `human_count` wrote, roughly."""
    return 0.0 if text == "-" else float(text.rstrip("kMGTP")) * {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1)


@pytest.mark.parametrize("head_fraction", [1.0, 0.125])
@pytest.mark.parametrize("changes", [
    {},
    {"arch_preset": "llama", "n_kv_head": 2},
    {"arch_preset": "gpt2"},
    {"arch_preset": "gpt2_postnorm"},
    {"weight_tying": False, "norm_position": "sandwich", "bias": True, "normalization": "layernorm"},
    {"parallel_blocks": True},
    {"residual_scaling": "learned"},
    {"arch_preset": "bert"},
    {"head_transform": True, "weight_tying": False},
    {"block_pattern": "attention,attention/none", "n_layer": 5},
    {"block_pattern": "attention/swiglu,attention/standard", "n_layer": 3, "position_encoding": "alibi"},
    {"qk_norm": True, "position_encoding": "rope"},
], ids=str)  # fmt: skip
def test_the_lines_of_the_tree_add_up(tiny, changes, head_fraction):
    model = ConfigurableGPT(tiny(**changes), heads={"win": 1, "way": 3})
    flops = flops_per_token(model, head_fraction=head_fraction)
    lines = architecture_tree(model, flops)
    assert any("head for way  3 x 16" in line for line in lines)
    layers, parameters, cost = 1, 0, 0.0
    for line in lines[1:-1]:
        inside = line.startswith("│")
        if match := re.search(r"(\d+) x block, each", line):
            layers = int(match[1])
            continue
        *_, count, forward = line.split()
        parameters += (layers if inside else 1) * int(count.replace(",", ""))
        cost += (layers if inside else 1) * number(forward)
    total, forward = lines[-1].split()[-2:]
    assert int(total.replace(",", "")) == parameters == sum(p.numel() for p in model.parameters())
    assert cost == pytest.approx(flops.forward, rel=0.01) and number(forward) == pytest.approx(flops.forward, rel=0.01)


def report(tiny, notes=(), tokenizer="byte", model=None, resolved=None, matched=None, counts=(), **train):
    settings = Settings(
        tiny(**(model or {})), TrainConfig(**{"max_iters": 10, "warmup_iters": 2, "batch_size": 4, **train}), [], {}
    )
    network = ConfigurableGPT(settings.model)
    dataset = SimpleNamespace(
        name="book", train=np.zeros(5000), val=np.zeros(500), vocab_size=29, tokenizer_name=tokenizer
    )
    resolved = {
        "max_iters": 10,
        "tokens_per_step": 64,
        "tokens_per_epoch": 4992,
        "compile": "off",
        "device_name": "Abacus",
        "kernels": {"attention": "sdpa"},
        "matching": matched,
        "checkpoint_schedule": counts,
        **(resolved or {}),
    }
    place = Place(torch.device("cpu"), "float32", tf32=False)
    peak = HardwarePeak(1e9, "counted on fingers")
    return startup_report(network, flops_per_token(network), peak, place, settings, dataset, resolved, notes)


def test_padding_is_no_surprise(tiny):
    text = report(tiny, resolved={"tokens_per_epoch": 16_000})
    assert "10 steps, 640 tokens, 0.04 epochs" in text
    assert "padding      69% of what is processed, never supervised" in text and "padding" not in report(tiny)


def test_it_says_what_is_about_to_happen(tiny):
    text = report(tiny)
    for words in (
        "model        2L-4H-16D-Learned-LNnb-GELU-PreNorm", "for training at 16 tokens", "causal half",
        "book: 5k training, 500 validation tokens", "byte, vocabulary 29", "64 tokens: 4 x 16 x 1",
        "10 steps, 640 tokens, 0.13 epochs", "1 x Abacus, float32, compile off, attention sdpa",
        "1GFLOP/s, counted on fingers", "memory       about", "optimizer", "to generate at 16 tokens",
    ):  # fmt: skip
        assert words in text
    assert "note" not in text


def test_it_says_why_a_kernel_is_not_used(tiny):
    reasons = {"mamba": {"mamba_ssm": "is not installed (pip install mamba-ssm)", "triton": "needs CUDA"}}
    text = report(tiny, resolved={"kernels": {"mamba": "plain", "linear": "onednn"}, "kernels_not_taken": reasons})
    assert "compile off, mamba plain, linear onednn" in text
    line = "kernels      mamba plain: mamba_ssm is not installed (pip install mamba-ssm); triton needs CUDA"
    assert line in text.splitlines()


def test_it_says_what_was_solved_and_when_it_saves(tiny):
    miss = {"match": "params", "match_to": "9k", "target": 9000, "value": 8955,
            "miss_percent": -0.5, "is_matched": True}  # fmt: skip
    text = report(tiny, matched=miss, counts=[1000, 20_000, 3_000_000])
    assert "matching     params 8,955 for 9,000 (-0.50%): matched" in text
    assert "checkpoints  at 3 token counts, 1k to 3M" in text
    assert "matched" not in report(tiny, matched={**miss, "is_matched": False})
    assert not {"matching", "checkpoints"} & {line.split(" ")[0] for line in report(tiny).splitlines()}


def test_it_mentions_what_has_no_effect(tiny):
    text = report(tiny, notes=["rope_theta=5.0 is read by no chosen part"], warmup_iters=10)
    assert "note         rope_theta=5.0 is read by no chosen part" in text
    assert "note         warmup_iters=10 outlasts the run" in text


def test_an_unknown_tokenizer_has_words_for_it(tiny):
    assert "unknown tokenizer, vocabulary 29" in report(tiny, tokenizer="unknown tokenizer")


def test_memory_that_cannot_be_counted_costs_no_run(tiny, monkeypatch):
    def asks_for_values(settings, place):
        raise TypeError("\n  a tensor without data has no values\nmore")

    monkeypatch.setattr(training_report, "step_memory", asks_for_values)
    assert "memory       cannot be counted ahead: a tensor without data has no values" in report(tiny).splitlines()
