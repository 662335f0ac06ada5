"""TrainConfig: defaults that run, contradictions refused with both values, derived numbers."""

import dataclasses
import json

import pytest

from training_config import TrainConfig, read_count
from user_errors import UserError

REFUSED = [
    ("batch_size", 0, "must be at least 1"),
    ("gradient_accumulation_steps", 0, "must be at least 1"),
    ("eval_interval", 0, "must be at least 1"),
    ("log_interval", 0, "must be at least 1"),
    ("eval_iters", -1, "must be at least 0"),
    ("keep_checkpoints", -1, "must be at least 0"),
    ("prefetch_batches", -1, "must be at least 0"),
    ("warmup_iters", -1, "must be at least 0"),
    ("sample_tokens", -1, "must be at least 0"),
    ("layer_stats_interval", -1, "must be at least 0"),
    ("max_non_finite_steps", 0, "must be at least 1"),
    ("threads", -1, "must be at least 0"),
    ("loss_chunk_elements", 0, "must be at least 1"),
    ("seed", -1, "must be at least 0"),
    ("weight_decay", -0.1, "must be at least 0"),
    ("weight_decay", float("nan"), "must be at least 0"),
    ("grad_clip", -1.0, "must be at least 0"),
    ("z_loss", -1.0, "must be at least 0"),
    ("learning_rate", 0.0, "must be above 0"),
    ("learning_rate", float("nan"), "must be above 0"),
    ("adam_eps", 0.0, "must be above 0"),
    ("beta1", 1.0, r"must lie in \[0, 1\)"),
    ("beta2", -0.1, r"must lie in \[0, 1\)"),
    ("max_iters", 0, "must be above 0, or None"),
    ("max_tokens", 0, "must be above 0, or None"),
    ("epochs", 0.0, "must be above 0, or None"),
    ("lr_decay_iters", 0, "must be above 0, or None"),
    ("checkpoint_interval", -1, "must be 0 or more, or None"),
    ("dtype", "float8", "must be one of auto, float32, bfloat16, float16"),
    ("compile", "yes", "must be one of True, False, auto"),
    ("init_from", "resum", "must be one of scratch, resume, hf:NAME, nanogpt:FILE; did you mean 'resume'"),
    ("z_loss", float("inf"), "must be a finite number"),
    ("learning_rate", float("inf"), "must be a finite number"),
    ("first_epoch_checkpoints", 0, "must be at least 1, or None"),
    ("min_checkpoints_per_epoch", 0, "must be at least 1"),
    ("subsequent_epochs_spacing", "lin", "must be one of log, linear; did you mean 'linear'"),
    ("eval_schedule", "tokens", "must be one of interval, checkpoints"),
    ("eval_schedule", "checkpoints", "needs a schedule: set checkpoint_tokens"),
    ("checkpoint_tokens", "1M,lots", "is no count; write it as 5400000 or 5.4M"),
    ("checkpoint_tokens", "-5", "is no count"),
    ("checkpoint_tokens", (), "names no tokens"),
    ("checkpoint_tokens", (0.5,), "names no tokens"),
    ("match", "params", "needs match_to beside it, such as --match_to=5.4M or --match_to=llama@5M"),
    ("match_to", "5M", "needs match beside it, such as --match=params"),
    ("run_name", "a/b", "must be a plain folder name"),
    ("run_name", " ", "must be a plain folder name"),
]


@pytest.mark.parametrize("name, value, sentence", REFUSED, ids=[f"{name}={value}" for name, value, _ in REFUSED])
def test_values_that_cannot_be_meant_are_refused_by_name(name, value, sentence):
    with pytest.raises(UserError, match=rf"^{name}=.*{sentence}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("changes, words", [
    ({"min_lr": 1e-2}, ["min_lr=0.01", "learning_rate=0.001"]),
    ({"max_tokens": 100, "epochs": 1.0}, ["max_tokens=100", "epochs=1.0"]),
    ({"max_iters": None}, ["max_iters", "max_tokens", "epochs"]),
    ({"lr_decay_iters": 50, "warmup_iters": 60}, ["lr_decay_iters=50", "warmup_iters=60"]),
    ({"init_from": "resume"}, ["init_from=resume", "run_name"]),
    ({"checkpoint_tokens": "1M", "first_epoch_checkpoints": 3}, ["checkpoint_tokens='1M'", "_checkpoints=3"]),
    ({"match": "parms", "match_to": "5M"}, ["match='parms'", "did you mean 'params'", "flops", "state"]),
    ({"match": "params", "match_to": "lama@5M"}, ["match_to='lama@5M'", "'lama'", "did you mean 'llama'"]),
    ({"match": "params", "match_to": "llama@6M"}, ["match_to='llama@6M'", "names no size", "5M", "124M"]),
    ({"match": "params", "match_to": "llama"}, ["match_to='llama'", "llama@5M"]),
    ({"match": "params", "match_to": "big"}, ["match_to='big'", "5.4M"]),
    ({"match": "params", "match_to": -3}, ["match_to=-3"]),
], ids=lambda value: "+".join(value) if isinstance(value, dict) else "")  # fmt: skip
def test_contradictions_name_both_settings(changes, words):
    with pytest.raises(UserError) as refusal:
        TrainConfig(**changes)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("changes, steps", [
    ({"max_iters": 70}, 70),
    ({"max_tokens": 1001}, 11),  # rounded up to whole steps of 100 tokens
    ({"max_tokens": 1000}, 10),
    ({"max_tokens": 1000, "max_iters": 3}, 10),  # takes the place of max_iters
    ({"epochs": 2.0}, 80),
    ({"epochs": 0.51}, 21),
    ({"epochs": 0.001, "max_iters": None}, 1),
])  # fmt: skip
def test_length_of_a_run(changes, steps):
    assert TrainConfig(**changes).total_steps(tokens_per_step=100, steps_per_epoch=40) == steps


@pytest.mark.parametrize("changes, tokens", [
    ({"max_iters": 70}, 7000), ({"max_tokens": 1001}, 1001), ({"epochs": 0.5}, 2000),
])  # fmt: skip
def test_length_in_tokens_as_asked_for(changes, tokens):
    assert TrainConfig(**changes).total_tokens(tokens_per_step=100, tokens_per_epoch=4000) == tokens


@pytest.mark.parametrize("text, count", [
    ("5.4M", 5_400_000), (" 1_000k", 10**6), ("2B", 2 * 10**9), ("2G", 2 * 10**9), ("1t", 10**12), ("5e6", 5 * 10**6),
    (12, 12), (0.25, 0.25),
])  # fmt: skip
def test_counts_as_people_write_them(text, count):
    assert read_count("max", text) == count


@pytest.mark.parametrize("text", ["", "M", "1.2.3M", "inf", "nan", "0", "-1k", "1e999", "5 apples", None])
def test_what_is_no_count(text):
    with pytest.raises(UserError, match=r"^size=.* is no count"):
        read_count("size", text)


def test_derived_numbers():
    config = TrainConfig(batch_size=3, gradient_accumulation_steps=5, learning_rate=2e-3, eval_interval=70)
    assert config.sequences_per_step == 15
    assert config.min_learning_rate == pytest.approx(2e-4)
    assert config.replace(min_lr=0.0).min_learning_rate == 0.0
    assert config.save_interval == 70
    assert config.replace(checkpoint_interval=0).save_interval == 0
    assert config.replace(checkpoint_interval=9).save_interval == 9
    scheduled = config.replace(checkpoint_tokens="1M")
    assert scheduled.save_interval == 0  # the schedule alone
    assert scheduled.replace(checkpoint_interval=9).save_interval == 9


def test_it_is_frozen_and_survives_a_dictionary():
    config = TrainConfig(learning_rate=3e-4, part_options={"muon_momentum": 0.9})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.learning_rate = 1.0
    assert TrainConfig.from_dict(config.to_dict()) == config
    scheduled = TrainConfig(checkpoint_tokens=(100, 200))
    assert TrainConfig.from_dict(json.loads(json.dumps(scheduled.to_dict()))) == scheduled


def test_options_for_a_part_are_its_defaults_under_what_was_set():
    class Part:
        class Options:
            momentum: float = 0.5
            steps: int = 3

    config = TrainConfig(part_options={"momentum": 0.1, "other": 1})
    assert vars(config.options_for(Part)) == {"momentum": 0.1, "steps": 3}
