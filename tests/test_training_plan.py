"""Plans of runs elsewhere: arithmetic by hand, and nothing read or written."""

import json

import pytest
import torch

import train
import training_games
from eval_probes import make_probe
from model_builder import ConfigurableGPT
from model_flops import flops_per_token
from training_config import TrainConfig
from training_helpers import book, workshop  # noqa: F401
from training_place import Place
from training_plan import TARGETS, DataFacts, activations_sent, bytes_sent, length_of, place_of, step_time

SMALL = ("--arch_preset=llama", "--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=16", "--dry_run=True")


def ranks(n, replicas=1, tensor=1, expert=1):
    return Place(torch.device("cuda"), "bfloat16", True, 0, 0, n, replicas, tensor, expert)


@pytest.mark.parametrize("settings, n, sent", [
    ({}, 1, {}),
    ({}, 4, {"gradients": 1500}),  # 2 x 3/4
    ({"use_zero1": True}, 4, {"gradients": 1500, "weights": 750}),
    ({"use_fsdp": True}, 4, {"weights": 2 * 2 * 750, "gradients": 2 * 750}),  # two micro-batches on each
    ({"use_fsdp": True, "fsdp_reshard_after_forward": False}, 4, {"weights": 2 * 750, "gradients": 2 * 750}),
    ({"use_fsdp": True, "fsdp_dtype": "bfloat16"}, 4, {"weights": 2 * 750, "gradients": 2 * 750}),
    ({"use_fsdp": True, "fsdp_accumulate": "whole"}, 4, {"weights": 2 * 2 * 750, "gradients": 750}),
])  # fmt: skip
def test_what_each_rank_sends(settings, n, sent):
    assert bytes_sent(1000, TrainConfig(gradient_accumulation_steps=8, **settings), ranks(n)) == sent


def test_replicas_gather_within_and_sum_shards_without():
    config = TrainConfig(gradient_accumulation_steps=8, use_fsdp=True, fsdp_replicas=2)
    # two micro-batches on each of 4; half of 1000 goes to the other shard, and once 2 x 500 x 1/2 to the other replica
    sent = bytes_sent(1000, config, ranks(4, replicas=2))
    assert sent == {"weights": 2 * 2 * 500, "gradients": 2 * 500, "replicas": 500}
    assert "weights" not in bytes_sent(1000, config, ranks(2, replicas=2))  # each has them whole


def test_a_rank_gathers_its_own_experts_alone():
    config = TrainConfig(gradient_accumulation_steps=4, use_fsdp=True)
    # 200 of all weights from 3 of 4 ranks; of 800 of experts half, from the other of the two ranks that share that half
    sent = bytes_sent(1000, config, ranks(4, expert=2), experts=800)
    assert sent == {"weights": 2 * (150 + 200), "gradients": 150 + 200}
    assert bytes_sent(1000, config, ranks(4, expert=4), experts=800) == {"weights": 2 * 150, "gradients": 150}


def test_what_split_layers_send(tiny):
    config = TrainConfig(gradient_accumulation_steps=4, batch_size=3)
    width = 3 * 16 * 16 * 2  # tokens of a micro-batch x n_embd x bytes of bfloat16
    dense, mixture = (ConfigurableGPT(tiny(ffn_type=ffn)) for ffn in ("swiglu", "moe"))  # two blocks each
    assert activations_sent(dense, config, ranks(4)) == {}
    # 4 micro-batches, 4 parts that are split, forward and backward, and 2 (n - 1) / n for an all-reduce over 2
    assert activations_sent(dense, config, ranks(2, tensor=2)) == {"activations": 4 * 4 * 2 * width}
    # 2 micro-batches on each, 2 choices in 2 blocks, there and back in both passes, half of them to the other rank
    assert activations_sent(mixture, config, ranks(2, expert=2)) == {"experts": 2 * 4 * 4 * width / 2}


def test_the_time_of_a_step_is_the_longer_of_two(tiny):
    flops = flops_per_token(ConfigurableGPT(tiny()))
    config, target = TrainConfig(target_mfu=0.5), TARGETS["h100"]
    one = step_time(flops, 0, 2, 1000, {}, target, config, ranks(8))
    assert one.seconds == one.compute == pytest.approx(1000 * flops.training / (8 * 0.5 * 989e12))
    again = step_time(flops, 2, 2, 1000, {"gradients": 450e9}, target, config, ranks(8))
    blocks = flops.forward - flops.linear["head"]
    assert again.compute == pytest.approx(one.compute * (1 + blocks / flops.training))
    assert again.seconds == again.communication == 1.0
    assert step_time(flops, 0, 2, 1000, {"gradients": 450e9}, target, config, ranks(16)).seconds == 9.0  # the network


@pytest.mark.parametrize("n, shape, within", [
    (8, {}, {"weights", "gradients", "replicas", "activations", "experts"}),
    (16, {}, {"activations", "experts"}),
    (16, {"replicas": 2}, {"weights", "gradients", "activations", "experts"}),
    (32, {"replicas": 2}, {"activations", "experts"}),  # 16 shards
    (32, {"replicas": 8, "tensor": 2}, {"weights", "gradients", "activations", "experts"}),
    (32, {"tensor": 8, "expert": 2}, {"activations"}),  # 16 ranks in a row share experts
    (32, {"tensor": 16}, set()),
    (12, {"tensor": 3}, set()),  # ranks 6, 7 and 8 share a layer, over two nodes
])  # fmt: skip
def test_each_kind_of_traffic_has_the_link_of_its_own_ranks(tiny, n, shape, within):
    config, target = TrainConfig(), TARGETS["h100"]
    flops, place = flops_per_token(ConfigurableGPT(tiny())), ranks(n, **shape)
    for kind in ("weights", "gradients", "replicas", "activations", "experts"):
        time = step_time(flops, 0, 2, 1000, {kind: 450e9}, target, config, place)
        assert time.communication == (1.0 if kind in within else 9.0), kind
    both = step_time(flops, 0, 2, 1000, {"weights": 450e9, "replicas": 50e9}, target, config, ranks(16, replicas=2))
    assert both.communication == 1.0 + 1.0


@pytest.mark.parametrize("gpu, dtype, precision", [
    ("h100", "auto", "bfloat16"), ("v100", "auto", "float16"), ("h100", "float32", "tf32"),
    ("v100", "float32", "float32"),
])  # fmt: skip
def test_the_precision_is_what_the_device_has(gpu, dtype, precision):
    assert place_of(TrainConfig(dtype=dtype), TARGETS[gpu]).precision == precision


def rows_of(text):
    """{name: text} of the plan's lines; those without a name belong to the one before."""
    found, last = {}, None
    for line in text.partition("\n\n")[2].splitlines():
        last = line[:14].strip() or last
        found[last] = f"{found.get(last, '')} {line[15:]}".strip()
    return found


def plan(workshop, *arguments):  # noqa: F811
    train.main([*SMALL, f"--data_dir={workshop.folder / 'nowhere'}", *arguments])
    return rows_of(workshop.printed())


def test_a_plan_needs_no_data_and_leaves_nothing_behind(workshop):  # noqa: F811
    rows = plan(workshop, "--gradient_accumulation_steps=64", "--target_n_gpu=64", "--max_tokens=1000000")
    assert rows["dataset"].startswith("python_stdlib, not prepared; vocabulary of bytes")
    assert rows["devices"] == "64 x H100, bfloat16, DDP, gradient_checkpointing=none"
    assert "12.3k tokens: 12 x 16 x 64 micro-batch(es), 1 on each device" in rows["step"]
    assert rows["run"].startswith("82 steps, 1.01M tokens, ")
    assert "of 74.5 GiB on each device" in rows["memory"] and "optimizer" in rows["memory"]
    assert "40% of 989TFLOP/s" in rows["assumed"] and "GPU-hours" in rows["estimated"]
    assert "sending decides" in rows["step time"] and "gradients" in rows["communication"]
    assert [*workshop.folder.iterdir()] == []


def test_of_prepared_data_meta_json_is_enough(workshop):  # noqa: F811
    folder = workshop.folder / "nowhere" / "python_stdlib"
    folder.mkdir(parents=True)
    split = {"tokens": 16 * 1001, "sha256": ""}
    meta = {"format": 1, "fingerprint": "", "splits": {"train": split, "val": split}, "dtype": "uint16",
            "vocab_size": 99, "tokenizer": {"name": "byte"}, "token_bytes": None}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")  # and no train.bin beside it
    rows = plan(workshop, "--target_n_gpu=1", "--epochs=1", "--batch_size=10")
    assert rows["dataset"] == "python_stdlib: 16k training tokens; no token was read"
    assert rows["run"].startswith("100 steps, 16k tokens, 1.00 epochs")
    assert rows["communication"] == "none: one device"


def embedded(workshop, *arguments):  # noqa: F811
    """Rows of the token embedding in the plan's tree."""
    train.main([*SMALL, f"--data_dir={workshop.folder / 'nowhere'}", "--target_n_gpu=1", *arguments])
    return int(workshop.printed().split("token embedding ")[1].split(" x ")[0].replace(",", ""))


def test_the_vocabulary_of_what_needs_no_tokenizer(workshop):  # noqa: F811
    assert embedded(workshop, "--dataset=mqar", "--n_pairs=2") == make_probe("mqar", n_pairs=2).vocab_size
    assert embedded(workshop, "--dataset=games", "--objective=lm_plus_win") == training_games.VOCAB_SIZE
    assert embedded(workshop, "--dataset=games", "--input=mine.jsonl", "--tokenizer_vocab_size=500") == 500


def test_an_epoch_of_records_is_a_window_for_each():
    facts = DataFacts("", "", 9, has_outcomes=True, n_tokens=700, n_records=30)
    config = TrainConfig(batch_size=5, epochs=2.0)
    assert length_of(config, 16, facts) == (2 * 30 / 5, 5 * 16)


def test_what_does_not_fit_says_what_would_help(workshop):  # noqa: F811
    rows = plan(workshop, "--target_gpu=rtx4090", "--target_n_gpu=1", "--batch_size=65536", "--n_embd=512")
    assert "DOES NOT FIT a RTX 4090: activations are most of it: gradient_checkpointing=products, or " in rows["memory"]
    rows = plan(
        workshop, "--target_gpu=rtx4090", "--target_n_gpu=1", "--batch_size=1", "--n_embd=16384", "--n_head=128"
    )
    assert "use_fsdp=True shards" in rows["memory"]


def test_experts_and_encoders_have_plans(workshop):  # noqa: F811
    for preset, objective in (("moe", "causal_lm"), ("bert", "masked_lm"), ("lstm", "causal_lm")):
        rows = plan(workshop, f"--arch_preset={preset}", f"--objective={objective}", "--target_n_gpu=1")
        assert "in the forward and backward" in rows["memory"]


@pytest.mark.parametrize("arguments, sentence", [
    (["--target_gpu=h10"], "target_gpu='h10' is not known; did you mean 'h100'? (known: b200, h200, h100"),
    (["--epochs=2", "--target_n_gpu=1"], "epochs=2.0 of data that is not prepared is no length; set max_tokens"),
    (["--target_n_gpu=3"], "gradient_accumulation_steps=1 does not divide among 3 ranks"),
    (["--dataset=mqr", "--target_n_gpu=1"], "dataset='mqr' does not exist; did you mean 'mqar'?"),
    (["--dataset=mqar", "--n_pairs=9", "--target_n_gpu=1"], "block_size=16 is too short for dataset='mqar'"),
    (["--objective=lm_plus_win", "--target_n_gpu=1"], "objective='lm_plus_win' predicts an outcome, and "),
    (["--target_n_gpu=0"], "target_n_gpu=0 must be at least 1"),
    (["--target_mfu=1.5"], "target_mfu=1.5 must lie in (0, 1]"),
    (["--target_gpu=v100", "--dtype=bfloat16", "--target_n_gpu=1"], "is not a unit that a V100 has"),
    (["--dataset=games", "--vocab_size=4", "--target_n_gpu=1"], "vocab_size=4 is too small for "),
])  # fmt: skip
def test_mistakes_cost_a_sentence(workshop, arguments, sentence):  # noqa: F811
    assert sentence in workshop.refused(*SMALL, f"--data_dir={workshop.folder / 'nowhere'}", *arguments)
