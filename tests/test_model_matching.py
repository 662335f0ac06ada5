"""Shapes solved for equal cost: the known tiers, what the user fixed, the word `matched`, targets out of reach."""

import json

import pytest
import torch.nn as nn

import model_matching as matching
import train
from configurator import read_settings
from model_components import FFN_REGISTRY
from model_config import PRESETS, ModelArchitectureConfig
from model_flops import count
from training_helpers import book, read_json, workshop  # noqa: F401
from user_errors import UserError

TIERS = {"vocab_size": 69, "block_size": 2560}
MAMBA = {"arch_preset": "mamba", "block_pattern": "mamba/standard", "activation": "gelu"}  # a 4x FFN, no positions
MAMBA2 = {**MAMBA, "arch_preset": "mamba2", "block_pattern": "mamba2/standard"}


def config(preset, **changes):
    return ModelArchitectureConfig(**{"arch_preset": preset, "vocab_size": 69, "block_size": 64, **changes})


def tier(n_embd, n_layer, **changes):
    return ModelArchitectureConfig(**{**TIERS, "n_embd": n_embd, "n_layer": n_layer, "n_head": 4, **changes})


def solved(start, to, *fixed, match="params"):
    model = matching.solve(start, match, to, fixed)
    return (model.n_embd, model.n_layer), matching.record(model, match, to)


# ---- the known tiers: every parameter counts, the position table and the tied embedding included ---------------------


@pytest.mark.parametrize("n_embd, n_layer, changes, n_params", [
    (128, 4, {"arch_preset": "gpt2"}, 1_129_856),
    (128, 4, {"arch_preset": "linear_attention"}, 1_129_856),
    (112, 6, MAMBA, 1_155_616),
    (112, 6, MAMBA2, 1_253_416),
    (256, 6, {"arch_preset": "gpt2"}, 5_412_096),
    (256, 6, {"arch_preset": "linear_attention"}, 5_412_096),
    (224, 7, MAMBA, 5_196_352),
    (224, 7, MAMBA2, 5_376_371),
], ids=lambda value: value["arch_preset"] if isinstance(value, dict) else str(value))  # fmt: skip
def test_what_the_tiers_hold(n_embd, n_layer, changes, n_params):
    assert sum(count(tier(n_embd, n_layer, **changes))[0].values()) == n_params


def test_gpt2_128x4_written_out():
    C, L, V, T = 128, 4, 69, 2560
    block = (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 2 * 2 * C
    assert V * C + T * C + L * block + 2 * C == 1_129_856 == matching.costs(tier(C, L, arch_preset="gpt2"))["params"]


@pytest.mark.parametrize("preset", ["gpt2", "linear_attention"])
@pytest.mark.parametrize("to, shape, miss", [
    ("gpt2@1M", (128, 4), 0.0), ("1.1M", (128, 4), 2.71), ("gpt2@5M", (256, 6), 0.0), ("5.4M", (256, 6), 0.22),
])  # fmt: skip
def test_transformer_and_linear_attention_tiers(preset, to, shape, miss):
    found, record = solved(ModelArchitectureConfig(arch_preset=preset, **TIERS), to)
    assert found == shape and record["miss_percent"] == pytest.approx(miss, abs=0.005)
    assert record["is_matched"] == (miss < 1)


@pytest.mark.parametrize("changes, to, fixed, shape, miss", [
    (MAMBA, "gpt2@1M", {"n_layer": 6}, (112, 6), 2.28),
    (MAMBA, "gpt2@1M", {"n_embd": 112}, (112, 6), 2.28),
    (MAMBA, "1.1M", {"n_layer": 6}, (112, 6), 5.06),
    (MAMBA, "gpt2@5M", {"n_layer": 7}, (224, 7), -3.99),
    (MAMBA, "gpt2@5M", {"n_embd": 224}, (224, 7), -3.99),
    (MAMBA, "5.4M", {"n_layer": 7}, (224, 7), -3.77),
    (MAMBA2, "gpt2@5M", {}, (224, 7), -0.66),  # nothing fixed: Mamba-2 is the tier by itself
    (MAMBA2, "5.4M", {}, (224, 7), -0.44),
    (MAMBA, "gpt2@1M", {}, (136, 4), -0.36),  # nearer than 112 x 6
    (MAMBA, "gpt2@5M", {}, (272, 5), 0.57),  # nearer than 224 x 7
    (MAMBA, "5.4M", {}, (272, 5), 0.79),
], ids=str)  # fmt: skip
def test_mamba_tiers(changes, to, fixed, shape, miss):
    found, record = solved(ModelArchitectureConfig(**TIERS, **changes, **fixed), to, *fixed)
    assert found == shape and record["miss_percent"] == pytest.approx(miss, abs=0.005)
    assert record["is_matched"] == (abs(miss) < 1)


# ---- any architecture, any quantity ----------------------------------------------------------------------------------


TOO_COARSE = {"jamba"}  # 8 layers of pattern with 64 experts in them: at 5M one step of width is 17%


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in {"custom", *TOO_COARSE}])
def test_every_preset_comes_near_a_llama(preset):
    model = matching.solve(config(preset), "params", "llama@5M")
    value, target = (matching.costs(each)["params"] for each in (model, config("llama", model_size="5M")))
    assert abs(value / target - 1) <= 0.02  # all but rwkv7 within 1%
    assert model.n_embd % 8 == 0 and model.n_embd % model.n_head == 0
    assert model.n_layer % len(model.pattern()) == 0 and model.model_size is None
    before = config(preset)
    assert model.replace(n_layer=before.n_layer, n_embd=128, n_head=4) == before  # nothing but the shape is changed


@pytest.mark.parametrize("match", ["params", "active_params", "flops", "state"])
def test_every_quantity_is_the_one_that_is_matched(match):
    start = config("llama", block_size=128)
    model = matching.solve(start, match, "gpt2@5M")
    target = matching.costs(config("gpt2", model_size="5M", block_size=128))[match]
    assert matching.costs(model)[match] == pytest.approx(target, rel=0.01)
    assert matching.record(model, match, "gpt2@5M")["target"] == target


def test_costs_are_those_of_model_flops():
    groups, flops = count(config("mamba2"))
    costs = matching.costs(config("mamba2"))
    assert costs["params"] == costs["active_params"] == sum(groups.values()) and costs["flops"] == flops.training
    attention = matching.costs(config("gpt2"))
    assert attention["state"] == 2 * 4 * 128 * 64 * 4  # keys and values, 4 layers of 128, 64 tokens, 4 bytes


class Idle(nn.Module):
    def __init__(self, config, layer_index):
        super().__init__()
        self.weight = nn.Linear(config.n_embd, config.n_embd)
        self.experts = nn.Linear(config.n_embd, 7 * config.n_embd)
        self.experts.active_fraction = 2 / 7


def test_experts_count_by_what_one_token_uses():
    FFN_REGISTRY["idle"] = Idle
    one, two = (matching.costs(config("gpt2", ffn_type="idle", n_layer=n_layer)) for n_layer in (1, 2))
    C, mixer = 128, 4 * 128**2 + 4 * 128 + 4 * 128
    assert two["params"] - one["params"] == mixer + C * C + C + 7 * (C * C + C)
    assert two["active_params"] - one["active_params"] == mixer + C * C + C + 2 * (C * C + C)


class DeepStart(nn.Module):
    """Wide in the third block and after: extrapolating from the first two is wrong."""

    def __init__(self, config, layer_index):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_embd * (8 if layer_index >= 2 else 1), bias=False)
        self.down = nn.Linear(self.up.out_features, config.n_embd, bias=False)


def test_blocks_that_differ_with_depth_are_counted_one_by_one():
    FFN_REGISTRY["deep"] = DeepStart
    start = config("llama", ffn_type="deep", n_embd=64)
    (_, n_layer), record = solved(start, "1M", "n_embd")
    value = matching.costs(start.replace(n_layer=n_layer + 1, n_head=2))["params"]
    assert n_layer > 2 and abs(record["value"] - 1e6) < value - 1e6  # one more would be further away
    assert record["value"] < 1e6 < value


def test_a_pattern_is_repeated_whole_unless_the_width_is_fixed():
    start = config("mamba_hybrid", block_pattern="mamba,mamba,local_attention")
    assert matching.solve(start, "params", "1M").n_layer % 3 == 0
    depths = {matching.solve(start.replace(n_embd=64), "params", to, ["n_embd"]).n_layer for to in ("300k", "350k")}
    assert any(depth % 3 for depth in depths)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_what_is_fixed_stays():
    start = config("gpt2", n_layer=5, n_embd=192, n_head=6)
    wide = matching.solve(start, "params", "5M", ["n_layer", "n_head"])
    assert (wide.n_layer, wide.n_head) == (5, 6) and wide.n_embd % 48 == 0
    deep = matching.solve(start, "params", "5M", ["n_embd"])
    assert deep.n_embd == 192 and deep.n_head == 6 and deep.n_layer == 11


@pytest.mark.parametrize("n_embd, head_dim", [
    (64, 32), (112, 16), (128, 32), (256, 64), (768, 64), (2048, 128), (120, 40), (392, 56), (400, 80),
])  # fmt: skip
def test_heads_have_widths_that_kernels_are_written_for(n_embd, head_dim):
    model = matching.solve(config("gpt2", n_embd=n_embd), "params", 30 * n_embd**2, ["n_embd"])
    assert n_embd // model.n_head == head_dim


def test_a_narrow_width_of_eights_comes_before_a_network_of_another_kind():
    model = matching.solve(config("llama", vocab_size=256, block_size=256), "params", "4M")
    assert (model.n_layer, model.n_embd) == (7, 216)  # of multiples of 16 only 20 x 128 is within 1%
    hybrid = matching.solve(config("mamba_hybrid", vocab_size=4096, block_size=512), "active_params", "llama@10M")
    assert (hybrid.n_layer, hybrid.n_embd, hybrid.n_head) == (6, 392, 7)  # where llama@10M is 6 x 384, and not 26 x 192


def test_heads_count_only_where_a_part_has_them():
    assert not matching._Search(config("mamba"), "params", "1M", frozenset()).has_heads
    assert matching._Search(config("mamba_hybrid"), "params", "1M", frozenset()).has_heads


def test_heads_go_with_shared_keys():
    model = matching.solve(config("mistral", n_embd=320, n_kv_head=4), "params", "5M", ["n_embd"])
    assert model.n_head % 4 == 0  # 5 heads of 64 do not divide among n_kv_head=4


def test_of_shapes_within_a_per_cent_the_friendliest_is_taken():
    model = matching.solve(config("llama", vocab_size=50257, block_size=1024), "params", "gpt2@1B")
    assert model.n_embd % 256 == 0 and model.n_embd // model.n_head == 128


def test_proportions_follow_the_reference_and_light_blocks_come_twice():
    model = matching.solve(config("mamba2", vocab_size=50257, block_size=1024), "params", "gpt2@124M")
    assert (model.n_embd, model.n_layer) == (768, 23)  # of 6 n_embd^2 where GPT-2 has 12 blocks of 12 n_embd^2


def test_a_solve_counts_few_models(monkeypatch):
    calls, costs = [], matching.costs
    monkeypatch.setattr(matching, "costs", lambda model: calls.append(model.n_layer) or costs(model))
    matching.solve(config("gpt2"), "params", "gpt2@5M")
    assert len(calls) < 120 and sum(calls) / len(calls) < 3  # of one and two blocks: milliseconds each


# ---- the word ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target, is_matched", [(1_129_856 / 1.0099, True), (1_129_856 / 1.0101, False),
                                                (1_129_856 / 0.9901, True), (1_129_856 / 0.9899, False)])  # fmt: skip
def test_matched_is_said_within_one_per_cent_alone(target, is_matched):
    record = matching.record(tier(128, 4, arch_preset="gpt2"), "params", target)
    assert record["is_matched"] == is_matched == ("matched" in matching.sentence(record))
    assert f"({record['miss_percent']:+.2f}%)" in matching.sentence(record)


def test_the_record_is_json_and_names_both_numbers():
    record = json.loads(json.dumps(matching.record(tier(128, 4, arch_preset="gpt2"), "params", "gpt2@1M")))
    assert record == {"match": "params", "match_to": "gpt2@1M", "target": 1_129_856, "value": 1_129_856,
                      "miss_percent": 0.0, "is_matched": True}  # fmt: skip
    assert matching.sentence(record) == "params 1,129,856 for 1,129,856 of gpt2@1M (+0.00%): matched"


# ---- what cannot be done -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, to, fixed, words", [
    ({"n_layer": 3}, "5M", ["n_layer", "n_embd"], ["match=params has nothing to solve", "n_layer=3", "n_embd=128"]),
    ({}, "2k", [], ["match_to=2k is out of reach", "the nearest shape, n_layer=1 and n_embd=16", "for 2,000"]),
    ({}, "1e18", [], ["match_to=1e18 is out of reach"]),
    ({"n_layer": 90}, "5k", ["n_layer"], ["match_to=5k is out of reach with n_layer=90"]),
    ({"n_head": 7}, "5M", ["n_embd", "n_head"], ["n_embd=128 does not divide into n_head=7"]),
    ({"qk_norm": True, "block_pattern": "rnn"}, "5M", [], ["position_encoding"]),
])  # fmt: skip
def test_what_cannot_be_solved_is_refused_in_a_sentence(changes, to, fixed, words):
    start = config("llama", **changes)
    with pytest.raises(UserError) as refusal:
        matching.solve(start, "params", to, fixed)
    assert all(word in str(refusal.value) for word in words), refusal.value


# ---- from the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, kept", [
    ([], set()),
    (["--n_layer=3"], {"n_layer"}),
    (["--model_size=5M"], set()),
    (["--model_size=5M", "--n_layer=6"], {"n_layer"}),  # the size's own value, and said all the same
    (["--n_layer=6", "--model_size=5M"], set()),  # a later size takes its place
    (["--n_embd=64", "--n_head=2"], {"n_embd", "n_head"}),
])  # fmt: skip
def test_what_a_command_names_stays_and_what_a_size_brings_does_not(arguments, kept):
    settings = read_settings(arguments)
    assert settings.named & {*matching.SHAPE} == kept


def test_a_run_has_the_solved_shape_says_so_and_keeps_it_when_it_goes_on(workshop):  # noqa: F811
    folder = workshop.folder / "runs" / "a"
    shaped = ("--n_layer", "--n_embd", "--n_head")
    command = [argument for argument in workshop.command(name="a") if not argument.startswith(shaped)]
    train.main([*command, "--arch_preset=gru", "--match=params", "--match_to=60k", "--n_layer=2"])
    printed, record = workshop.printed(), read_json(folder / "config.json")
    found = record["resolved"]["matching"]
    assert found["value"] == record["parameters"]["total"] and found["target"] == 60_000
    assert matching.sentence(found) in printed
    shape = {name: record["model_config"][name] for name in matching.SHAPE}
    assert shape["n_layer"] == 2 and shape["n_embd"] % 8 == 0
    workshop.resume(folder, "--max_iters=10")
    again = read_json(folder / "config.json")
    assert {name: again["model_config"][name] for name in matching.SHAPE} == shape
    assert again["resolved"]["matching"] == found
    told = workshop.refused(f"--runs_dir={folder.parent}", "--run_name=a", "--init_from=resume", "--match_to=90k")
    assert "match_to='60k'" in told and "'90k'" in told
