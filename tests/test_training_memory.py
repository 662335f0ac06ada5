"""What a step holds: counted without data, held to the same step with data, and to arithmetic."""

import pytest
import torch
import torch.nn as nn

import training_memory
from configurator import Settings
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training_config import TrainConfig
from training_memory import StorageMeter, step_memory
from training_objectives import OBJECTIVE_REGISTRY
from training_place import Place
from training_recompute import checkpoint_activations

CPU = torch.device("cpu")
ALONE = Place(CPU, "float32", tf32=False)


def settings_of(preset="gpt2", train=(), **model):
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 64}
    config = ModelArchitectureConfig.from_preset(preset, **{**shape, **model})
    return Settings(config, TrainConfig(**{"batch_size": 4, "kernel_backend": "plain", **dict(train)}), [], {})


def n_parameters(settings):
    return sum(parameter.numel() for parameter in ConfigurableGPT(settings.model).parameters())


def test_the_meter_follows_a_storage_from_its_making_to_its_end():
    weight = torch.zeros(8, 8)
    with StorageMeter([weight]) as meter:
        a = torch.empty(100)
        b = a.view(10, 10)[2:]  # a view is no storage
        weight.t()
        assert meter.activations == 400
        c = a + 1
        assert meter.activations == meter.peak == 800
        del a, b
        assert meter.activations == 400
        del c
    assert (meter.activations, meter.most_activations, meter.gradients) == (0, 800, 0)


@pytest.mark.parametrize("share, peak", [(1.0, 4 * (6 * 5 + 3 * 5)), (0.0, 4 * (6 * 5 + 3 * 5))])
def test_a_gradient_leaves_the_activations_once_it_is_there(share, peak):
    layer = nn.Linear(5, 6, bias=False)
    meter = StorageMeter(layer.parameters(), share)
    layer.weight.register_post_accumulate_grad_hook(meter.gradient_is_there)
    with meter:
        x = torch.ones(3, 5)
        layer(x).backward(torch.ones(3, 6))
    assert meter.gradients == 4 * 30 and meter.activations == 4 * 15
    assert meter.peak >= peak


@pytest.mark.parametrize("preset, train", [
    ("gpt2", {}), ("llama", {"gradient_checkpointing": "full"}), ("llama", {"loss_chunk_elements": 1024}),
    ("mamba", {}), ("bert", {"objective": "masked_lm"}),
])  # fmt: skip
def test_without_data_it_counts_what_the_same_step_with_data_holds(preset, train):
    settings = settings_of(preset, train)
    model = ConfigurableGPT(settings.model)
    checkpoint_activations(model, settings.train)
    objective = OBJECTIVE_REGISTRY[settings.train.objective](model, settings.train)
    tokens = torch.randint(0, 60, (4, 64))
    batch = objective.prepare({"inputs": tokens, "targets": tokens, "window": torch.arange(4)}, 1)
    real = StorageMeter([*objective.parameters(), *objective.buffers(), *batch.values()])
    for parameter in objective.parameters():
        parameter.register_post_accumulate_grad_hook(real.gradient_is_there)
    with real:
        objective(batch)["loss"].backward()
    memory = step_memory(settings, ALONE)
    assert memory.kinds["activations"] == pytest.approx(real.most_activations, rel=0.03)


@pytest.mark.parametrize("name", list(OBJECTIVE_REGISTRY))
def test_every_objective_has_a_number(name):
    settings = settings_of("bert" if name == "masked_lm" else "gpt2", {"objective": name})
    heads = OBJECTIVE_REGISTRY[name].heads
    n_more = sum(n * (settings.model.n_embd + 1) for n in heads.values())  # weights and a bias for each output
    assert step_memory(settings, ALONE).kinds["weights"] == 4 * (n_parameters(settings) + n_more)


def test_weights_gradients_and_two_moments():
    settings = settings_of()
    n, memory = n_parameters(settings), step_memory(settings, ALONE)
    assert (memory.kinds["weights"], memory.kinds["gradients"]) == (4 * n, 4 * n)
    assert 8 * n <= memory.kinds["optimizer"] < 8 * n + 1000  # and a counter for each parameter
    assert memory.peak < sum(memory.kinds.values())
    assert step_memory(settings_of(train={"optimizer": "muon"}), ALONE).kinds["optimizer"] < 8 * n


def test_a_large_model_with_a_small_batch_is_weights_gradients_and_moments():
    settings = settings_of(n_embd=256, block_size=8, train={"batch_size": 1})
    assert step_memory(settings, ALONE).peak == pytest.approx(16 * n_parameters(settings), rel=0.05)


def test_an_update_that_needs_room_is_counted():
    memory = step_memory(settings_of(n_embd=256, block_size=8, train={"batch_size": 1, "optimizer": "muon"}), ALONE)
    assert memory.when == "optimizer step"
    assert memory.peak > sum(memory.kinds[kind] for kind in ("weights", "gradients", "optimizer"))


def test_experts_share_the_tokens_evenly():
    one, two = (
        step_memory(settings_of("moe", n_layer=1, experts_per_token=k, normalize_router_weights=False), ALONE).kinds[
            "activations"
        ]
        for k in (1, 2)
    )
    assert 1.2 < two / one < 2


def test_the_kernel_of_an_lstm_has_a_workspace():
    short, long = (step_memory(settings_of("lstm", block_size=T), ALONE).kinds["activations"] for T in (64, 128))
    assert short > 2 * 4 * 4 * 64 * 64 * 7 and long == pytest.approx(2 * short, rel=0.1)


def test_accumulated_gradients_are_there_during_the_next_forward():
    n = n_parameters(settings_of())
    once, twice = (step_memory(settings_of(train={"gradient_accumulation_steps": k}), ALONE) for k in (1, 4))
    assert twice.peak - once.peak == pytest.approx(4 * n, rel=0.1)


def test_half_precision_halves_most_of_it():
    full, half = (step_memory(settings_of("llama"), Place(CPU, dtype, False)) for dtype in ("float32", "bfloat16"))
    assert 0.4 < half.kinds["activations"] / full.kinds["activations"] < 0.8


@pytest.mark.parametrize("train, shares", [
    ({}, (1, 1, 1)), ({"use_zero1": True}, (1, 1, 1 / 4)), ({"use_fsdp": True}, (1 / 4, 1 / 4, 1 / 4)),
])  # fmt: skip
def test_what_a_mode_shares_and_adds(train, shares):
    settings = settings_of("llama", {**train, "gradient_accumulation_steps": 4})
    model = ConfigurableGPT(settings.model)
    alone, shared = step_memory(settings, ALONE).kinds, step_memory(settings, Place(CPU, "float32", False, 0, 0, 4))
    for kind, share in zip(("weights", "gradients", "optimizer"), shares, strict=True):
        assert shared.kinds[kind] == pytest.approx(alone[kind] * share)
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    block = 4 * sum(parameter.numel() for parameter in model.blocks[0].parameters())
    # two of two blocks gathered and the rest, and the gradients of one block
    assert shared.kinds["communication"] == (whole + block if "use_fsdp" in train else whole)
    assert "communication" not in alone


def test_gathering_in_half_precision_needs_no_copies_of_the_weights():
    train = {"use_fsdp": True, "gradient_accumulation_steps": 4, "batch_size": 1, "gradient_checkpointing": "full"}
    place = Place(CPU, "bfloat16", False, 0, 0, 4)
    two = [settings_of("llama", {**train, "fsdp_dtype": dtype}, block_size=8) for dtype in ("float32", "bfloat16")]
    kept, freed = (step_memory(settings, place).kinds["activations"] for settings in two)
    assert kept - freed == pytest.approx(2 * n_parameters(two[0]), rel=0.3)


@pytest.mark.parametrize("between", [1.0, 0.1])
@pytest.mark.parametrize("preset, train, depth", [
    ("gpt2", {}, 9), ("llama", {"gradient_checkpointing": "selective"}, 11),
    ("moe", {"gradient_accumulation_steps": 2}, 8),
    ("mamba_hybrid", {"gradient_checkpointing": "full"}, 14), ("llama", {"optimizer": "muon"}, 8),
])  # fmt: skip
def test_blocks_that_repeat_are_counted_from_two_shallow_models(monkeypatch, preset, train, depth, between):
    settings = settings_of(preset, train, n_layer=depth)
    counted = []
    whole = training_memory.counted_whole
    monkeypatch.setattr(
        training_memory, "counted_whole", lambda *given: counted.append(given[0].model.n_layer) or whole(*given)
    )
    found, every = training_memory.counted(settings, ALONE, between), whole(settings, ALONE, between)
    assert len(counted) == 2 and max(counted) < depth
    for what in ("weights", "gradients", "optimizer", "scratch", "communication"):
        assert found[what] == pytest.approx(every[what], rel=1e-6), what
    for what in ("activations", "peak"):
        assert training_memory.highest(found, what) == pytest.approx(training_memory.highest(every, what), rel=0.01)


def test_whole_gradients_between_micro_batches_are_counted():
    train, place = {"use_fsdp": True, "gradient_accumulation_steps": 8}, Place(CPU, "float32", False, 0, 0, 4)
    sharded, whole = (step_memory(settings_of(train={**train, "fsdp_accumulate": how}), place).kinds["gradients"]
                      for how in ("sharded", "whole"))  # fmt: skip
    assert whole == 4 * sharded == 4 * n_parameters(settings_of())


def test_replicas_hold_as_many_shards_each():
    settings = settings_of(train={"use_fsdp": True, "gradient_accumulation_steps": 4, "fsdp_replicas": 2})
    memory = step_memory(settings, Place(CPU, "float32", False, 0, 0, 4, replicas=2))
    assert memory.kinds["weights"] == 4 * n_parameters(settings) / 2


def test_a_rank_gathers_its_own_experts_alone():
    settings = settings_of("moe", {"use_fsdp": True, "gradient_accumulation_steps": 4})
    model = ConfigurableGPT(settings.model)
    experts = 4 * sum(block.ffn.experts.up.numel() + block.ffn.experts.down.numel() for block in model.blocks)
    outside, blocks = training_memory.gathered_bytes(model, Place(CPU, "float32", False, 0, 0, 4, expert_parallel=4))
    assert outside + sum(blocks) == 4 * n_parameters(settings) - experts * 3 / 4


def test_a_step_of_too_many_operators_is_not_counted(monkeypatch):
    monkeypatch.setattr(training_memory, "MAX_OPERATORS", 50)
    with pytest.raises(NotImplementedError, match="more than 50 operators"):
        step_memory(settings_of(), ALONE)
